"""The queue inside a browser, seen from the kernel."""

import threading
from collections.abc import Callable
from typing import Any

import numpy as np

from lmd.play.play_queue import Clock, SinkReport, WallClock


class BrowserSink:
    """The queue inside a browser's audio worklet, as its reports tell.

    Between two reports the worklet is taken to play on by the clock, so a kernel that is busy with
    a long cell (and reads no messages) does not starve it. After `patience_s` without a report the
    page is taken for closed or asleep and nothing more is sent until it speaks again.

    Args:
        send: hands a message and its binary buffers to the page.
        clock: the kernel's clock.
        patience_s: how long to go on without a report.
    """

    def __init__(
        self,
        send: Callable[[dict[str, Any], list[bytes]], None],
        clock: Clock | None = None,
        patience_s: float = 30.0,
    ) -> None:
        self.clock: Clock = WallClock() if clock is None else clock
        self._send, self._patience_s = send, patience_s
        self._lock = threading.Lock()
        self.epoch = 0  # counts openings: reports of an earlier one are ignored
        self.sample_rate = 0  # until it is opened
        self._running, self._written, self._report = False, 0, SinkReport()
        self._reported_at: float | None = None

    def open(self, sample_rate: int, channels: int) -> None:
        """Ask the page to get ready, with an empty queue."""
        with self._lock:
            self.sample_rate, self.channels = sample_rate, channels
            self.epoch += 1
            self._running, self._written, self._report = False, 0, SinkReport()
            self._reported_at = None
        self._tell("open", sample_rate=sample_rate, channels=channels)

    def _tell(self, kind: str, buffers: list[bytes] | None = None, **values: Any) -> None:
        self._send({"kind": kind, "epoch": self.epoch, **values}, buffers or [])

    def write(self, samples: np.ndarray) -> None:
        """Send samples as interleaved little-endian int16."""
        pcm = np.rint(np.clip(samples.T, -1, 1) * 32767).astype("<i2")
        with self._lock:
            first = self._written
            self._written += samples.shape[-1]
        self._tell("audio", [pcm.tobytes()], first=first, n=samples.shape[-1])

    def on_report(self, message: dict[str, Any]) -> None:
        """Take in what the worklet says of itself (see `player_audio.js`)."""
        numbers = [message.get(k) for k in ("heard", "silent", "underruns", "lowest")]
        if not all(isinstance(x, int | float) and 0 <= x < 2**53 for x in numbers):
            return
        heard, silent, underruns, lowest = (int(x) for x in numbers)
        with self._lock:  # `open` may be counting on at this moment
            if message.get("epoch") != self.epoch or not self.sample_rate:
                return
            self._report = SinkReport(heard, silent, underruns, lowest / self.sample_rate)
            self._reported_at = self.clock.now()

    def queued_s(self) -> float:
        """Seconds sent and, to the best of our knowledge, not yet played."""
        with self._lock:
            played = float(self._report.heard_samples)
            if self._running and self._reported_at is not None:
                age_s = self.clock.now() - self._reported_at
                if age_s > self._patience_s:
                    return float("inf")
                played = min(self._written, played + age_s * self.sample_rate)
            return (self._written - played) / self.sample_rate

    def lost(self) -> bool:
        """True when the page has said nothing for longer than the patience."""
        return self.queued_s() == float("inf")

    def run(self, running: bool) -> None:
        """Tell the worklet to play or to hold."""
        with self._lock:
            self._running = running
            self._reported_at = self.clock.now()
        self._tell("run", running=running)

    def report(self) -> SinkReport:
        """What the worklet counted last."""
        return self._report

    def finish(self) -> None:
        """Tell the worklet that nothing more will come."""
        self._tell("finish")

    def close(self) -> None:
        """Tell the page to stop."""
        self._tell("close")
