"""From the measures of clips to lines of a table: every value with its interval over seeds."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import numpy as np

from lmd.evaluation.clip_metrics import Measured
from lmd.evaluation.metrics import (
    Gaussian,
    Interval,
    frechet,
    gaussian,
    jackknife,
    kl_divergence,
    mean_interval,
    slope,
)

PER_CLIP = ("key_share", "key_clarity", "consonance", "classes_at_once", "joins", "clicks")
LEVELS = ("loudness_lufs", "centroid_hz")


@dataclass(frozen=True)
class Truths:
    """What is known about the clips of one seed.

    Attributes:
        family: index of the family that the prompt asks for `[clip]`.
        tempo_range: what the prompt asks for, BPM `[clip, 2]`; nan where it says nothing.
        names_bpm: whether it says so with a number `[clip]`.
        real: the measures of how the pieces really go on.
        texts: the prompts' embeddings `[clip, size]`, by listener that reads.
    """

    family: np.ndarray
    tempo_range: np.ndarray
    names_bpm: np.ndarray
    real: Measured
    texts: dict[str, np.ndarray] = field(default_factory=dict)


@dataclass(frozen=True)
class Reference:
    """Held-out music as a cloud.

    Attributes:
        gaussian: in the recogniser's embedding.
        windows: how many went into it.
        others: in the embeddings of further listeners, by name.
    """

    gaussian: Gaussian
    windows: int
    others: dict[str, Gaussian] = field(default_factory=dict)


def row_of(
    seeds: Sequence[Measured], truths: Sequence[Truths], reference: Reference
) -> dict[str, Any]:
    """All measures of one line.

    Args:
        seeds: one `Measured` per seed.
        truths: of the same clips.
        reference: held-out music.

    Returns:
        Intervals over seeds (`mean`, `low`, `high`, `n`) of `fd` (at one seed's sample size), `kl`
        (nats, real against found), `family` and `tempo` (shares recognised), and the means of the
        measures of clips; `fd_infinite` (all seeds together, extrapolated), `windows` per seed,
        `pooled` (see `pooled_distances`).
    """
    embeddings = [flat(one) for one in seeds]
    pooled = pooled_distances(embeddings, reference.gaussian)
    together = pooled.get(str(len(seeds)), {"all": float("nan"), "without": []})
    kl = [kl_divergence(t.real.family, one.family) for one, t in zip(seeds, truths, strict=True)]
    pairs = list(zip(seeds, truths, strict=True))
    values = {
        "fd": [frechet(gaussian(x), reference.gaussian) for x in embeddings],
        "kl": kl,
        "family": [float((m.family.argmax(1) == t.family).mean()) for m, t in pairs],
        "tempo": [tempo_share(m, t) for m, t in pairs],
        **{name: [mean(getattr(m, name)) for m in seeds] for name in (*PER_CLIP, *LEVELS)},
    }
    return {
        "windows": len(embeddings[0]),
        "clips": len(seeds[0].family),
        "fd_infinite": asdict(jackknife(together["all"], together["without"])),
        **{name: asdict(mean_interval(value)) for name, value in values.items()},
        "others": {
            name: asdict(mean_interval(value))
            for name, value in other_values(pairs, reference).items()
        },
        "by_seed": {name: values[name] for name in ("fd", "kl", "family")},
        "pooled": pooled,
    }


def other_values(
    pairs: Sequence[tuple[Measured, Truths]], reference: Reference
) -> dict[str, list[float]]:
    """What further listeners say, one value per seed.

    An array with three axes is embeddings of windows (Fréchet distance), one of two axes is tags
    (divergence from the real pieces') or, where the prompts have embeddings too, a match (cosine).
    """
    values: dict[str, list[float]] = {}
    for measured, truth in pairs:
        for name, heard in measured.others.items():
            if heard.ndim == 3:
                cloud = gaussian(heard.reshape(-1, heard.shape[-1]))
                values.setdefault(f"FD {name}", []).append(frechet(cloud, reference.others[name]))
            elif name in truth.texts:
                text = truth.texts[name]
                lengths = np.linalg.norm(heard, axis=1) * np.linalg.norm(text, axis=1)
                cosine = ((heard * text).sum(1) / lengths).mean()
                values.setdefault(f"cosine {name}", []).append(float(cosine))
            else:
                divergence = kl_divergence(truth.real.others[name], heard)
                values.setdefault(f"KL {name}", []).append(divergence)
    return values


def pooled_distances(seeds: Sequence[np.ndarray], reference: Gaussian) -> dict[str, dict[str, Any]]:
    """Fréchet distances of the first 2, 3, … seeds together, so that lines can be compared.

    Returns:
        By the number of seeds: `all` of them together, and `without` each of them.
    """

    def distance(some: Sequence[np.ndarray]) -> float:
        return frechet(gaussian(np.concatenate(some)), reference)

    return {
        str(n): {
            "all": distance(seeds[:n]),
            "without": [distance([*seeds[:k], *seeds[k + 1 : n]]) for k in range(n)],
        }
        for n in range(2, len(seeds) + 1)
    }


def flat(measured: Measured) -> np.ndarray:
    """All windows of all clips `[window, size]`."""
    return measured.embedding.reshape(-1, measured.embedding.shape[-1])


def mean(values: np.ndarray) -> float:
    """Mean of what could be measured; nan if nothing could."""
    known = values[np.isfinite(values)]
    return float(known.mean()) if len(known) else float("nan")


def tempo_share(measured: Measured, truth: Truths) -> float:
    """Share of clips whose recognised tempo is right, among prompts that tell one.

    Right = within 8 % of a number of BPM, of its half or of its double; after a word (adagio) in
    the range that the word stands for, 8 % wider on either side.
    """
    low, high = truth.tempo_range.T
    told = np.isfinite(low)
    if not told.any():
        return float("nan")
    exact, half, double = (
        (low <= factor * measured.tempo_bpm) & (factor * measured.tempo_bpm <= high)
        for factor in (1, 0.5, 2)
    )
    right = exact | (truth.names_bpm & (half | double))
    return float(right[told].mean())


def anchor_rows(
    anchors: dict[str, list[Measured]], truths: Sequence[Truths], reference: Reference
) -> dict[str, dict[str, Any]]:
    """What every line is read against.

    Returns:
        `real`: how the pieces really go on (its KL is against another excerpt of the same piece);
        `codec`: the same through the codec, the floor of everything made of latents;
        `shuffled`: the same with the latent frames in random order, the ceiling of distances;
        `other prompts`: real music judged by another piece's prompt, the ceiling of KL and the
        chance level of adherence.
    """
    real = [truth.real for truth in truths]
    rows = {
        "real": row_of(real, truths, reference),
        "codec": row_of(anchors["codec"], truths, reference),
        "shuffled": row_of(anchors["shuffled"], truths, reference),
        "other prompts": row_of(real, [rolled(truth) for truth in truths], reference),
    }
    pairs = zip(anchors["context"], truths, strict=True)
    own = [kl_divergence(truth.real.family, context.family) for context, truth in pairs]
    rows["real"]["kl"] = asdict(mean_interval(own))
    return rows


def rolled(truth: Truths) -> Truths:
    """The truths of other clips: each clip gets the next one's."""
    real = truth.real
    return Truths(
        np.roll(truth.family, 1),
        np.roll(truth.tempo_range, 1, axis=0),
        np.roll(truth.names_bpm, 1),
        replace(
            real,
            family=np.roll(real.family, 1, axis=0),
            others={name: np.roll(value, 1, axis=0) for name, value in real.others.items()},
        ),
        {name: np.roll(text, 1, axis=0) for name, text in truth.texts.items()},
    )


def drift_rows(seeds: Sequence[dict[str, np.ndarray]], bin_s: float) -> dict[str, Any]:
    """Curves and slopes of long streams.

    Args:
        seeds: per seed, measures `[stream, bin]`.
        bin_s: length of a bin.

    Returns:
        `times_s` (middles of the bins), `streams`, and for each measure `curve` (an interval per
        bin over all streams), `level` (over the streams' means) and `slope_per_minute` (over their
        own slopes).
    """
    joined = {name: np.concatenate([seed[name] for seed in seeds]) for name in seeds[0]}
    n_bins = next(iter(joined.values())).shape[1]
    times_s = (np.arange(n_bins) + 0.5) * bin_s
    result: dict[str, Any] = {
        "times_s": times_s.tolist(),
        "streams": len(next(iter(joined.values()))),
    }
    for name, values in joined.items():
        result[name] = {
            "curve": [asdict(mean_interval(column)) for column in values.T],
            "level": asdict(mean_interval(values.mean(1))),
            "slope_per_minute": asdict(per_minute(slope(times_s, values))),
        }
    return result


def levels_of(seeds: Sequence[dict[str, np.ndarray]]) -> dict[str, Any]:
    """The levels alone, an interval for each measure, of music too short for a slope."""
    return {
        name: {"level": asdict(mean_interval(np.concatenate([s[name].mean(1) for s in seeds])))}
        for name in seeds[0]
    }


def per_minute(per_second: Interval) -> Interval:
    """A slope in other units."""
    return replace(
        per_second,
        mean=60 * per_second.mean,
        low=60 * per_second.low,
        high=60 * per_second.high,
    )
