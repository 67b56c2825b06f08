"""Every measure applied to a batch of clips, and to long streams in pieces."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields

import numpy as np
from jaxtyping import Float
from torch import Tensor

from lmd.corpus.analysis import brightness_hz
from lmd.corpus.levels import loudness_lufs
from lmd.errors import LmdError
from lmd.evaluation.metrics import Gaussian, click_ratio, join_ratio, typicality
from lmd.evaluation.other_listeners import Listener
from lmd.evaluation.tagger import HOP, Recogniser, band_levels, cut, tempo_bpm
from lmd.evaluation.tonality import peak_chroma, tonality

Waves = Float[Tensor, "clip sample"]
QUIET_LUFS = -70.0  # silence is given this loudness
OTHER = "other:"  # before the names of further listeners on disk
WINDOWS_OVERLAP = 2  # a new window every half window


@dataclass(frozen=True)
class Measured:
    """The measures of a batch of clips; nan where nothing could be measured.

    Attributes:
        embedding: `[clip, window, size]`.
        family: mean probabilities over the recogniser's families `[clip, family]`.
        tempo_bpm, key_share, key_clarity, consonance, classes_at_once: `[clip]`.
        joins, clicks: ratios at block boundaries `[clip]`.
        loudness_lufs, centroid_hz: `[clip]`.
        others: what further listeners heard, by name, first axis the clip.
    """

    embedding: np.ndarray
    family: np.ndarray
    tempo_bpm: np.ndarray
    key_share: np.ndarray
    key_clarity: np.ndarray
    consonance: np.ndarray
    classes_at_once: np.ndarray
    joins: np.ndarray
    clicks: np.ndarray
    loudness_lufs: np.ndarray
    centroid_hz: np.ndarray
    others: dict[str, np.ndarray] = field(default_factory=dict)

    def arrays(self) -> dict[str, np.ndarray]:
        """Everything in one flat mapping."""
        own = {name: value for name, value in vars(self).items() if name != "others"}
        return own | {f"{OTHER}{name}": value for name, value in self.others.items()}

    @staticmethod
    def from_arrays(arrays: Mapping[str, np.ndarray]) -> "Measured":
        """What `arrays` gave."""
        own = {name: value for name, value in arrays.items() if not name.startswith(OTHER)}
        return Measured(**own, others=others_in(arrays))


def others_in(arrays: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The further listeners' arrays among some."""
    return {k.removeprefix(OTHER): v for k, v in arrays.items() if k.startswith(OTHER)}


class Judge:
    """Applies all measures to a batch of clips.

    Args:
        recogniser: the project's own listener.
        sample_rate: of the clips.
        listeners: further ones, by name.

    Raises:
        LmdError: clips at another rate than the recogniser's.
    """

    def __init__(
        self,
        recogniser: Recogniser,
        sample_rate: int,
        listeners: Mapping[str, Listener] | None = None,
    ) -> None:
        if sample_rate != recogniser.config.sample_rate:
            raise LmdError(
                f"music at {sample_rate} Hz",
                f"{recogniser.config.sample_rate} Hz, at which the recogniser was fitted",
                "Fit one: python -m lmd train recogniser.",
            )
        self.recogniser, self.sample_rate = recogniser, sample_rate
        self.listeners = dict(listeners or {})
        self.window_steps = recogniser.config.window_steps

    def embed(self, wave: Float[Tensor, " sample"]) -> tuple[np.ndarray, np.ndarray, float]:
        """Embeddings `[window, size]`, mean family probabilities, tempo of one wave."""
        heard = self.recogniser.hear(self._windows(wave))
        family = heard.family.mean(0)
        return heard.embedding.numpy(), family.numpy(), tempo_bpm(heard.tempo)

    @property
    def window_s(self) -> float:
        """Length of the recogniser's window."""
        return self.window_steps * HOP / self.sample_rate

    def families_over_time(self, wave: Float[Tensor, " sample"]) -> np.ndarray:
        """Family probabilities of every window `[window, family]`, one every half window."""
        return self.recogniser.hear(self._windows(wave)).family.numpy()

    def _windows(self, wave: Float[Tensor, " sample"]) -> Tensor:
        """Overlapping windows of levels."""
        levels = band_levels(wave, self.sample_rate)
        return cut(levels, self.window_steps, self.window_steps // WINDOWS_OVERLAP)

    def measure(self, waves: Waves, joins: Sequence[int]) -> Measured:
        """Everything about some clips that have block boundaries at the same samples."""
        rows: dict[str, list] = {f.name: [] for f in fields(Measured) if f.name != "others"}
        for wave in waves:
            embedding, family, tempo = self.embed(wave)
            found = tonality(peak_chroma(wave, self.sample_rate))
            values = {
                "embedding": embedding,
                "family": family,
                "tempo_bpm": tempo,
                **{
                    name: np.nan if found is None else getattr(found, name)
                    for name in ("key_share", "key_clarity", "consonance", "classes_at_once")
                },
                "joins": join_ratio(wave, list(joins), self.sample_rate),
                "clicks": click_ratio(wave, list(joins)),
                "loudness_lufs": self.loudness(wave),
                "centroid_hz": brightness_hz(wave[None].numpy(), self.sample_rate),
            }
            for name, value in values.items():
                rows[name].append(value)
        others = {
            name: np.array([listener.hear(wave, self.sample_rate) for wave in waves])
            for name, listener in self.listeners.items()
        }
        return Measured(**{name: np.array(value) for name, value in rows.items()}, others=others)

    def loudness(self, wave: Float[Tensor, " sample"]) -> float:
        """LUFS, silence at the bottom."""
        return max(QUIET_LUFS, loudness_lufs(wave[None].numpy(), self.sample_rate))


def drift(judge: Judge, waves: Waves, reference: Gaussian, bin_s: float) -> dict[str, np.ndarray]:
    """Measures of every `bin_s` seconds of long streams, each `[stream, bin]`."""
    size = round(bin_s * judge.sample_rate)
    rows: dict[str, list[list[float]]] = {
        name: [] for name in ("distance", "loudness_lufs", "centroid_hz", "key_clarity")
    }
    for wave in waves:
        parts = wave.split(size)[: len(wave) // size]
        found = [tonality(peak_chroma(part, judge.sample_rate)) for part in parts]
        rows["distance"].append(
            [float(typicality(judge.embed(part)[0], reference).mean()) for part in parts]
        )
        rows["loudness_lufs"].append([judge.loudness(part) for part in parts])
        rows["centroid_hz"].append(
            [brightness_hz(part[None].numpy(), judge.sample_rate) for part in parts]
        )
        rows["key_clarity"].append([0.0 if f is None else f.key_clarity for f in found])
    return {name: np.array(values) for name, values in rows.items()}
