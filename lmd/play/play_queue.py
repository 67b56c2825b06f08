"""What plays ahead of time: clocks, and a queue that never clicks when it runs dry.

A sink is fed ahead of time and plays by a clock of its own. What it has not played yet is the
queue; when the queue runs dry the sink fades to silence, counts an underrun, keeps its clock
running and comes back with the next samples that arrive.
"""

import threading
import time
from dataclasses import dataclass

import numpy as np

FADE_S = 0.02  # how long a sink takes to fade out before an underrun and in after it


class WallClock:
    """Real time."""

    def now(self) -> float:
        """Seconds, never going back."""
        return time.perf_counter()

    def sleep(self, seconds: float, wake: threading.Event) -> None:
        """Let `seconds` pass, or fewer if `wake` is set."""
        wake.wait(seconds)


class SkippingClock(WallClock):
    """Real time without the waiting: computing costs what it costs, a sleep is over at once.

    A stream then runs as fast as the model does, with the queue levels and underruns of real time.
    """

    _skipped_s = 0.0

    def now(self) -> float:
        """Seconds computed plus seconds slept."""
        return time.perf_counter() + self._skipped_s

    def sleep(self, seconds: float, wake: threading.Event) -> None:
        """Move the clock forward."""
        self._skipped_s += max(0.0, seconds)


@dataclass(frozen=True)
class SinkReport:
    """What a sink has counted since it was opened."""

    heard_samples: int = 0  # samples of the stream that were played
    silent_samples: int = 0  # samples of silence put in for want of anything else
    underruns: int = 0  # how many times the queue ran dry while playing
    lowest_s: float = float("inf")  # the shortest queue seen while playing


class PlayQueue:
    """A queue of samples that fades out before it runs dry and in when it has sound again.

    The gain before sample i is `min(gain[i-1] + 1/f, remaining[i]/f, 1)` with f samples of fade, so
    it reaches 0 with the last sample there is. The browser's worklet does the same.
    """

    def __init__(self, channels: int, fade_samples: int) -> None:
        self._samples = np.zeros((channels, 0), dtype=np.float32)
        self._fade, self._gain, self._dry = max(1, fade_samples), 0.0, True
        self._lock = threading.Lock()
        self.level = self.heard = self.silent = self.underruns = 0
        self.lowest: float = float("inf")
        self.ending = False  # set when nothing more will come: then running dry is no underrun

    def push(self, samples: np.ndarray) -> None:
        """Append `[channel, sample]`."""
        with self._lock:
            self._samples = np.concatenate([self._samples, samples], axis=-1)
            self.level += samples.shape[-1]

    def report(self, sample_rate: int) -> SinkReport:
        """The counters."""
        return SinkReport(self.heard, self.silent, self.underruns, self.lowest / sample_rate)

    def pull(self, n: int) -> np.ndarray:
        """The next n samples `[channel, sample]`: sound as far as there is some, then silence."""
        with self._lock:
            n_sound = min(n, self.level)
            out = np.zeros((len(self._samples), n), dtype=np.float32)
            out[:, :n_sound] = self._samples[:, :n_sound]
            self._shape(out[:, :n_sound])
            self._samples = self._samples[:, n_sound:]
            self.level -= n_sound
            self._count(n, n_sound)
        return out

    def _shape(self, out: np.ndarray) -> None:
        n, fade = out.shape[-1], self._fade
        if n and (self._gain < 1 or self.level - n < fade):
            i = np.arange(n)
            gain = np.minimum(self._gain + (i + 1) / fade, (self.level - 1 - i) / fade)
            gain = np.clip(gain, 0, 1).astype(np.float32)
            out *= gain
            self._gain = float(gain[-1])

    def _count(self, n: int, n_sound: int) -> None:
        self.heard += n_sound
        self._dry = self._dry and not n_sound
        if n_sound < n:
            self.underruns += not self._dry and not self.ending
            self.silent += n - n_sound
            self._dry, self._gain = True, 0.0
        if n and not self.ending:
            self.lowest = min(self.lowest, self.level)
