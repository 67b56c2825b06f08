"""Where a file sounds: one rule for the check of a folder and for taking it in."""

from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from pathlib import Path

import numpy as np
import soundfile

STEP_S = 0.05  # silence is looked for in steps of about this
QUIET_DB = -55.0  # below the file's peak level: silence
KEEP_QUIET_S = 0.5  # of a silence, so much stays
_BLOCK_STEPS = 128  # read at once: a three-hour file takes no more memory than a short one


@dataclass(frozen=True)
class Heard:
    """What a file sounds like from its first sample to its last.

    Attributes:
        n_samples: how many could be read.
        peak: highest absolute value in any channel; not finite where a sample is not.
        step_s: length of a step in seconds, a whole number of the file's samples.
        steps: highest absolute value of each step, in any channel: opposite channels would cancel
            in a mono mix `[step]`.
    """

    n_samples: int
    peak: float
    step_s: float
    steps: np.ndarray

    @cached_property
    def keep(self) -> np.ndarray:
        """Which steps to keep, bool `[step]`: see `sounding`."""
        return sounding(self.steps, self.step_s)

    @property
    def sounding_s(self) -> float:
        """How much is kept, in seconds."""
        return float(self.keep.sum()) * self.step_s

    def kept(self, n_samples: int, sample_rate: int, start_s: float = 0.0) -> np.ndarray:
        """Which samples of a stretch to keep, bool `[sample]`.

        Args:
            n_samples: length of the stretch.
            sample_rate: Hz, not necessarily the file's.
            start_s: where in the file it begins.
        """
        edges = (np.arange(len(self.keep) + 1) * self.step_s - start_s) * sample_rate
        edges = np.clip(np.round(edges).astype(int), 0, n_samples)
        edges[-1] = max(edges[-1], n_samples)  # resampling may add a sample
        return np.repeat(self.keep, np.diff(edges))


def sounding(steps: np.ndarray, step_s: float) -> np.ndarray:
    """Which steps to keep: silences are cut down to half a second, at the edges to none.

    Args:
        steps: peak of each step `[step]`.
        step_s: its length in seconds.

    Returns:
        bool `[step]`.
    """
    loud = np.flatnonzero(steps > steps.max(initial=0) * 10 ** (QUIET_DB / 20))
    keep = np.zeros(len(steps), bool)
    keep[loud] = True
    stay = round(KEEP_QUIET_S / step_s)
    for before, after in pairwise(loud):
        keep[before : min(before + stay, after) + 1] = True
    return keep


def hear(path: Path) -> Heard:
    """Read a file to its end, block by block."""
    with soundfile.SoundFile(path) as sound:
        step = max(1, round(STEP_S * sound.samplerate))
        n_samples, peaks, steps = 0, [0.0], [np.zeros(0, np.float32)]
        while len(block := sound.read(_BLOCK_STEPS * step, dtype="float32", always_2d=True)):
            n_samples += len(block)
            peaks.append(float(np.abs(block).max()))
            loud = np.abs(block).max(axis=1)
            loud = np.pad(loud, (0, -len(loud) % step))
            steps.append(loud.reshape(-1, step).max(axis=1))
        return Heard(
            n_samples, float(np.max(peaks)), step / sound.samplerate, np.concatenate(steps)
        )
