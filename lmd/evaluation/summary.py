"""From clips to lines of a table: what is measured of each, and its interval over seeds."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from einops import rearrange
from jaxtyping import Float
from torch import Tensor

from lmd.corpus.analysis import brightness_hz
from lmd.corpus.levels import loudness_lufs
from lmd.evaluation import metrics
from lmd.evaluation.clips import Waves
from lmd.evaluation.metrics import Gaussian, frechet, gaussian, kl_divergence, mean_interval
from lmd.evaluation.tagger import Tagger, Tags, tempo_bpm

Measures = Mapping[str, np.ndarray]  # by name; the first axis is the clip, nan: nothing to measure
TONALITY = ("key_share", "key_clarity", "consonance", "classes_at_once")
OVER_TIME = ("distance", "loudness_lufs", "centroid_hz", "key_clarity")
PER_CLIP = (*TONALITY, "joins", "clicks", "loudness_lufs", "centroid_hz")
QUIET_LUFS = -70.0  # silence is given this loudness


class ClipMetrics:
    """Applies all measures to a batch of clips, at the tagger's sample rate; refuses another."""

    def __init__(self, tagger: Tagger, sample_rate: int) -> None:
        tagger.check_rate(sample_rate)
        self.tagger, self.sample_rate = tagger, sample_rate

    def tags(self, wave: Float[Tensor, " sample"]) -> Tags:
        """What the tagger says of one wave, a window every half window."""
        return self.tagger.tag_wave(wave, overlap=2)

    def measure(self, waves: Waves, boundaries: Sequence[int]) -> Measures:
        """Everything about some clips, whose blocks meet at `boundaries` (samples).

        Returns:
            `embedding` `[clip, window, size]`; `family`, mean probabilities `[clip, family]`; and
            `tempo_bpm` and those of `PER_CLIP`, `[clip]` each.
        """
        rate, clips = self.sample_rate, []
        for wave in waves:
            tags, mono = self.tags(wave), wave[None].numpy()
            tonality = metrics.tonality(metrics.peak_chroma(wave, rate))
            clip = {
                "embedding": tags.embedding.numpy(),
                "family": tags.family.mean(0).numpy(),
                "tempo_bpm": tempo_bpm(tags.tempo),
                **{name: getattr(tonality, name, np.nan) for name in TONALITY},
                "joins": metrics.boundary_ratio(wave, boundaries, rate),
                "clicks": metrics.click_ratio(wave, boundaries),
                "loudness_lufs": max(QUIET_LUFS, loudness_lufs(mono, rate)),
                "centroid_hz": brightness_hz(mono, rate),
            }
            clips.append(clip)
        return {name: np.array([clip[name] for clip in clips]) for name in clips[0]}

    def over_time(self, waves: Waves, reference: Gaussian, bin_s: float) -> Measures:
        """Every `bin_s` seconds of long streams: those of `OVER_TIME`, `[stream, bin]` each.

        `distance` is the mean `typicality` against the reference; silence has no clear key.
        """
        size = round(bin_s * self.sample_rate)
        whole = waves[:, : waves.shape[1] // size * size]
        parts = rearrange(whole, "stream (bin n) -> (stream bin) n", n=size)
        bins = dict(self.measure(parts, boundaries=()))
        points = bins["embedding"]
        bins["distance"] = np.array([metrics.typicality(x, reference).mean() for x in points])
        bins["key_clarity"] = np.nan_to_num(bins["key_clarity"])
        return {name: bins[name].reshape(len(waves), -1) for name in OVER_TIME}


@dataclass(frozen=True)
class Truth:
    """What is known about the clips of one seed."""

    family: np.ndarray  # index of the family that the prompt asks for `[clip]`
    tempo_range: np.ndarray  # what the prompt asks for, BPM `[clip, 2]`; nan: it says nothing
    names_bpm: np.ndarray  # whether it says so with a number `[clip]`
    real_family: np.ndarray  # tagged in how the pieces really go on, `[clip, family]`

    @property
    def rolled(self) -> "Truth":
        """That of other clips: each clip gets the next one's."""
        return Truth(**{name: np.roll(value, 1, axis=0) for name, value in vars(self).items()})


def row_of(
    seeds: Sequence[Measures], truths: Sequence[Truth], reference: Gaussian
) -> dict[str, Any]:
    """All measures of one line, from those of each seed's clips and the truth about these.

    Returns:
        Intervals over seeds (`mean`, `low`, `high`, `n`) of `fd` (at one seed's sample size), `kl`
        (nats, real against found), `family` and `tempo` (shares recognised) and `PER_CLIP`;
        `fd_infinite` (all seeds together, extrapolated), `windows` and `clips` per seed; `pooled`:
        distances of the first 2, 3, … seeds, `all` together and `without` each, so that lines of
        other numbers of seeds can be compared.
    """
    points = [rearrange(one["embedding"], "clip window d -> (clip window) d") for one in seeds]

    def distance(some: Sequence[np.ndarray]) -> float:
        return frechet(gaussian(np.concatenate(some)), reference)

    pooled = {
        str(n): {
            "all": distance(points[:n]),
            "without": [distance([*points[:k], *points[k + 1 : n]]) for k in range(n)],
        }
        for n in range(2, len(seeds) + 1)
    }
    together = pooled.get(str(len(seeds)), {"all": math.nan, "without": []})
    pairs = list(zip(seeds, truths, strict=True))
    values = {
        "fd": [distance([each]) for each in points],
        "kl": [kl_divergence(truth.real_family, one["family"]) for one, truth in pairs],
        "family": [float((one["family"].argmax(1) == t.family).mean()) for one, t in pairs],
        "tempo": [tempo_share(one["tempo_bpm"], truth) for one, truth in pairs],
        **{name: [mean_interval(one[name]).mean for one in seeds] for name in PER_CLIP},
    }
    return {
        "windows": len(points[0]),
        "clips": len(seeds[0]["family"]),
        "fd_infinite": asdict(metrics.jackknife(together["all"], together["without"])),
        **{name: asdict(mean_interval(value)) for name, value in values.items()},
        "pooled": pooled,
    }


def tempo_share(tempo_bpm: np.ndarray, truth: Truth) -> float:
    """Share of clips whose recognised tempo is right, among prompts that name one; else nan.

    Right = within 8 % of a number of BPM, of its half or of its double; after a word (adagio) in
    the range that the word stands for, 8 % wider on either side.
    """
    low, high = truth.tempo_range.T
    exact, half, double = (
        (low <= factor * tempo_bpm) & (factor * tempo_bpm <= high) for factor in (1, 0.5, 2)
    )
    right = exact | (truth.names_bpm & (half | double))
    return mean_interval(np.where(np.isfinite(low), right, math.nan)).mean


def anchor_rows(
    anchors: Mapping[str, Sequence[Measures]], truths: Sequence[Truth], reference: Gaussian
) -> dict[str, dict[str, Any]]:
    """What every line is read against.

    Returns:
        `real`: how the pieces really go on (its KL is against another excerpt of the same piece);
        `codec`: the same through the codec, the floor of everything made of latents;
        `shuffled`: the same with the latent frames in random order, the ceiling of distances;
        `other prompts`: real music held against another piece's prompt, the ceiling of KL and the
        chance level of adherence.
    """
    names = ("real", "codec", "shuffled")
    rows = {name: row_of(anchors[name], truths, reference) for name in names}
    rows["other prompts"] = row_of(anchors["real"], [t.rolled for t in truths], reference)
    pairs = zip(anchors["context"], truths, strict=True)
    own = [kl_divergence(truth.real_family, context["family"]) for context, truth in pairs]
    rows["real"]["kl"] = asdict(mean_interval(own))
    return rows


def drift_row(seeds: Sequence[Measures], bin_s: float) -> dict[str, Any]:
    """Curves and slopes of long streams, from each seed's measures `[stream, bin]`.

    Returns:
        `times_s` (middles of the bins), `streams`, and for each measure `curve` (an interval per
        bin over all streams), `level` (over the streams' means) and, from three bins on,
        `slope_per_minute` (over their own slopes).
    """
    joined = {name: np.concatenate([seed[name] for seed in seeds]) for name in seeds[0]}
    n_streams, n_bins = next(iter(joined.values())).shape
    times_s = (np.arange(n_bins) + 0.5) * bin_s
    result: dict[str, Any] = {"times_s": times_s.tolist(), "streams": n_streams}
    for name, values in joined.items():
        result[name] = {
            "curve": [asdict(mean_interval(column)) for column in values.T],
            "level": asdict(mean_interval(values.mean(1))),
        }
        if n_bins > 2:
            result[name]["slope_per_minute"] = asdict(metrics.slope(times_s / 60, values))
    return result
