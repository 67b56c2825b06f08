"""Every measure of a batch of clips, and of long streams in pieces."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from einops import rearrange
from jaxtyping import Float
from torch import Tensor

from lmd.corpus.analysis import brightness_hz
from lmd.corpus.levels import loudness_lufs
from lmd.evaluation.clips import Waves
from lmd.evaluation.metrics import Gaussian, boundary_ratio, click_ratio, typicality
from lmd.evaluation.tagger import Tagger, Tags, tempo_bpm
from lmd.evaluation.tonality import peak_chroma, tonality

Measures = dict[str, np.ndarray]  # by name; the first axis is the clip, nan: nothing to measure
TONALITY = ("key_share", "key_clarity", "consonance", "classes_at_once")
OVER_TIME = ("distance", "loudness_lufs", "centroid_hz", "key_clarity")
QUIET_LUFS = -70.0  # silence is given this loudness


class ClipMetrics:
    """Applies all measures to a batch of clips, at the tagger's sample rate.

    Raises:
        LmdError: clips at another rate.
    """

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
            `[clip]` each: `tempo_bpm`, those of `TONALITY`, `joins` and `clicks` (ratios at the
            boundaries), `loudness_lufs`, `centroid_hz`.
        """
        clips = [self._clip(wave, boundaries) for wave in waves]
        return {name: np.array([clip[name] for clip in clips]) for name in clips[0]}

    def _clip(self, wave: Float[Tensor, " sample"], boundaries: Sequence[int]) -> dict[str, Any]:
        tags, found = self.tags(wave), tonality(peak_chroma(wave, self.sample_rate))
        return {
            "embedding": tags.embedding.numpy(),
            "family": tags.family.mean(0).numpy(),
            "tempo_bpm": tempo_bpm(tags.tempo),
            **{name: getattr(found, name, np.nan) for name in TONALITY},
            "joins": boundary_ratio(wave, boundaries, self.sample_rate),
            "clicks": click_ratio(wave, boundaries),
            "loudness_lufs": max(QUIET_LUFS, loudness_lufs(wave[None].numpy(), self.sample_rate)),
            "centroid_hz": brightness_hz(wave[None].numpy(), self.sample_rate),
        }

    def over_time(self, waves: Waves, reference: Gaussian, bin_s: float) -> Measures:
        """Every `bin_s` seconds of long streams: those of `OVER_TIME`, `[stream, bin]` each.

        `distance` is the mean `typicality` against the reference; silence has no clear key.
        """
        size = round(bin_s * self.sample_rate)
        parts = rearrange(
            waves[:, : waves.shape[1] // size * size], "stream (bin n) -> (stream bin) n", n=size
        )
        bins = self.measure(parts, boundaries=())
        bins["distance"] = np.array([typicality(e, reference).mean() for e in bins["embedding"]])
        bins["key_clarity"] = np.nan_to_num(bins["key_clarity"])
        return {name: bins[name].reshape(len(waves), -1) for name in OVER_TIME}
