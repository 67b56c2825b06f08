"""What plays ahead of time: clocks, and a queue that never clicks when it runs dry.

A sink is fed ahead of time and plays by a clock of its own. What it has not played yet is the
queue; when the queue runs dry the sink fades to silence, counts an underrun, keeps its clock
running and comes back with the next samples that arrive.
"""

import math
import threading
import time
from dataclasses import dataclass

import numpy as np
import torch

from lmd.codec.base import equal_power_fade

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


def crossfaded(old: np.ndarray, new: np.ndarray) -> np.ndarray:
    """`new` with `old` fading out over its beginning, both `[channel, sample]`.

    Equal power whatever the two have in common: with gains a (in) and b (out), a² + b² = 1, the sum
    is divided by √(1 + 2abr), where r is their correlation (not below 0). So the level of a held
    tone that both play does not swell.
    """
    n = min(old.shape[-1], new.shape[-1])
    if not n:
        return new
    old, start = old[:, :n].astype(np.float64), new[:, :n].astype(np.float64)
    power = math.sqrt((old**2).sum() * (start**2).sum())
    r = max(0.0, float((old * start).sum()) / power) if power > 0 else 0.0
    gains = equal_power_fade(n, torch.zeros(0, dtype=torch.float64))
    gain_in, gain_out = (gain.numpy() for gain in gains)
    mixed = (start * gain_in + old * gain_out) / np.sqrt(1 + 2 * r * gain_in * gain_out)
    return np.concatenate([mixed.astype(np.float32), new[:, n:]], axis=-1)


class PlayQueue:
    """A queue of samples that fades out before it runs dry and in when it has sound again.

    The gain before sample i is `min(gain[i-1] + 1/f, remaining[i]/f, 1)` with f samples of fade, so
    it reaches 0 with the last sample there is. Where it is below 1, the last `hold_samples` are
    heard again in a loop, instead of silence. The browser's worklet does the same.
    """

    def __init__(self, channels: int, fade_samples: int, hold_samples: int = 0) -> None:
        self._samples = np.zeros((channels, 0), dtype=np.float32)
        self._fade, self._gain, self._dry = max(1, fade_samples), 0.0, True
        self._n_hold, self._past = hold_samples, self._samples  # what was played last
        self._loop, self._loop_at = self._samples, 0
        self._may_play = math.inf  # samples that may be played before all is held
        self._lock = threading.Lock()
        self.level = self.heard = self.silent = self.underruns = 0
        self.lowest: float = float("inf")
        self.ending = False  # set when nothing more will come: then running dry is no underrun

    def push(self, samples: np.ndarray) -> None:
        """Append `[channel, sample]`."""
        self.replace(self.heard + self.level, samples)

    def replace(self, sample: int, samples: np.ndarray) -> None:
        """Play `[channel, sample]` from that sample of the stream on, and nothing else behind it.

        What waited there fades out under it. Too late, it begins with what is due now.
        """
        with self._lock:
            late = max(0, self.heard - sample)
            kept = self._samples[:, : sample + late - self.heard]
            replaced = self._samples[:, kept.shape[-1] :][:, : self._fade]
            if late < samples.shape[-1]:
                new = crossfaded(replaced, samples[:, late:])
                self._samples = np.concatenate([kept, new], axis=-1)
                self.level = self._samples.shape[-1]

    def hold(self, on: bool) -> None:
        """Stay where the stream is, in a loop of what was heard last; or go on."""
        with self._lock:
            self._may_play = self._fade if on else math.inf

    def report(self, sample_rate: int) -> SinkReport:
        """The counters."""
        return SinkReport(self.heard, self.silent, self.underruns, self.lowest / sample_rate)

    def pull(self, n: int) -> np.ndarray:
        """The next n samples `[channel, sample]`: sound as far as there is some, then silence."""
        with self._lock:
            remaining = min(self.level, self._may_play)
            n_sound = int(min(n, remaining))
            out = np.zeros((len(self._samples), n), dtype=np.float32)
            out[:, :n_sound] = self._samples[:, :n_sound]
            self._shape(out, n_sound, int(remaining))
            self._samples = self._samples[:, n_sound:]
            self.level -= n_sound
            self._may_play -= n_sound
            self._count(n, n_sound)
        return out

    def _shape(self, out: np.ndarray, n_sound: int, remaining: int) -> None:
        """The gain, and under it the loop; in place."""
        n, fade = out.shape[-1], self._fade
        past = (
            np.concatenate([self._past, out[:, :n_sound]], axis=-1) if self._n_hold else self._past
        )
        if n and (self._gain < 1 or remaining - n < fade):
            i, gain = np.arange(n_sound), np.zeros(n, dtype=np.float32)
            rising, falling = self._gain + (i + 1) / fade, (remaining - 1 - i) / fade
            gain[:n_sound] = np.clip(np.minimum(rising, falling), 0, 1)
            out *= gain
            if self._gain == 1:  # it begins to fall
                first = int(np.argmax(gain < 1))
                self._loop = self._looped(past[:, : self._past.shape[-1] + first])
                self._loop_at = -first
            if self._loop.size:
                at = (self._loop_at + np.arange(n)) % self._loop.shape[-1]
                out += (1 - gain) * self._loop[:, at]
                self._loop_at += n
            self._gain = float(gain[-1])
        self._past = past[:, max(0, past.shape[-1] - self._n_hold) :]

    def _looped(self, past: np.ndarray) -> np.ndarray:
        """What was played last, its beginning cross-faded from its end: it goes on into itself."""
        past = past[:, max(0, past.shape[-1] - self._n_hold) :]
        n = past.shape[-1] - self._fade
        return crossfaded(past[:, n:], past[:, :n]) if n >= self._fade else past[:, :0]

    def _count(self, n: int, n_sound: int) -> None:
        self.heard += n_sound
        self._dry = self._dry and not n_sound
        if n_sound < n and self._may_play > 0:
            self.underruns += not self._dry and not self.ending
            self.silent += n - n_sound
            self._dry = True
        if n and not self.ending and self._may_play > 0:
            self.lowest = min(self.lowest, self.level)
