"""Where the sound goes: nowhere, to nobody by a clock, to a sound card, to a browser."""

import threading
from collections.abc import Callable
from typing import Any

import numpy as np

from lmd.errors import LmdError
from lmd.play.play_queue import FADE_S, PlayQueue, SinkReport, WallClock

HOLD_S = 2.2  # of sound that a person hears again where it would fall silent


class Sink:
    """Something that plays; opened paused, so that it can be primed.

    As it stands it plays nowhere and keeps no time, so nothing can be late: a stream into it is
    made as fast as it goes, e.g. to be recorded (`LiveEngine.record`).
    """

    lead_s = 0.005  # so long before its turn must a sample be handed over

    def __init__(self, clock: WallClock | None = None) -> None:
        self.clock = clock or WallClock()

    def open(self, sample_rate: int, channels: int) -> None:
        """Get ready, paused and empty."""

    def write(self, samples: np.ndarray) -> None:
        """Append `[channel, sample]` float32; never blocks."""

    def replace(self, sample: int, samples: np.ndarray) -> None:
        """Play other samples from that one of the stream on (see `PlayQueue.replace`)."""

    def queued_s(self) -> float:
        """Seconds written and not yet played."""
        return 0.0

    def run(self, running: bool) -> None:
        """Play, or pause."""

    def hold(self, on: bool) -> None:
        """Repeat what was heard last and go no further, or go on (see `PlayQueue.hold`)."""

    def report(self) -> SinkReport:
        """The counters."""
        return SinkReport()

    def finish(self) -> None:
        """Nothing more will come: to run dry is no underrun any more."""

    def close(self) -> None:
        """Play nothing more."""


class QueueSink(Sink):
    """What the sinks of this process share: a `PlayQueue` that something pulls from."""

    hold_s = 0.0  # of sound that is repeated when the queue runs dry; 0: silence

    def _advance(self) -> None:
        """Play what is due, where nobody else does."""

    def open(self, sample_rate: int, channels: int) -> None:
        self.sample_rate = sample_rate
        sizes = (round(seconds * sample_rate) for seconds in (FADE_S, self.hold_s))
        self.queue, self._written = PlayQueue(channels, *sizes), 0

    def write(self, samples: np.ndarray) -> None:
        self.replace(self._written, samples)

    def replace(self, sample: int, samples: np.ndarray) -> None:
        self._advance()
        self.queue.replace(sample, samples)
        self._written = sample + samples.shape[-1]

    def hold(self, on: bool) -> None:
        self._advance()
        self.queue.hold(on)

    def queued_s(self) -> float:
        self._advance()
        return max(0, self._written - self.queue.heard) / self.sample_rate

    def report(self) -> SinkReport:
        self._advance()
        return self.queue.report(self.sample_rate)

    def finish(self) -> None:
        self.queue.ending = True


class NullSink(QueueSink):
    """Plays to nobody, by a clock: for papermill and measurements."""

    def __init__(self, clock: WallClock | None = None) -> None:
        super().__init__(clock)
        self._running, self._lock = False, threading.Lock()

    def open(self, sample_rate: int, channels: int) -> None:
        super().open(sample_rate, channels)
        self._since, self._pulled = self.clock.now(), 0

    def _advance(self) -> None:
        with self._lock:
            if not self._running:
                return
            due = int((self.clock.now() - self._since) * self.sample_rate) - self._pulled
            if due > 0:
                self._pulled += due
                self.queue.pull(due)

    def run(self, running: bool) -> None:
        self._advance()
        if running and not self._running:
            self._since, self._pulled = self.clock.now(), 0
        self._running = running

    def close(self) -> None:
        self.run(False)


class SoundCardSink(QueueSink):
    """The local sound card through sounddevice (optional); its callback never waits.

    Raises:
        LmdError: sounddevice, PortAudio or the device (None: the default one) is missing.
    """

    def __init__(self, device: Any = None) -> None:
        super().__init__()
        self.hold_s = HOLD_S
        try:
            import sounddevice
        except (ImportError, OSError) as error:  # OSError: without the PortAudio library
            raise LmdError(
                f"no usable sounddevice ({error})",
                "the optional package and the PortAudio library",
                "Install with `pip install sounddevice` (in a clone `pip install -e "
                "'.[soundcard]'`), or choose another sink.",
            ) from error
        self._library, self._device, self._stream = sounddevice, device, None

    def open(self, sample_rate: int, channels: int) -> None:
        super().open(sample_rate, channels)
        try:
            options = {"dtype": "float32", "device": self._device, "callback": self._callback}
            self._stream = self._library.OutputStream(
                samplerate=sample_rate, channels=channels, **options
            )
        except self._library.PortAudioError as error:
            raise LmdError(
                f"a sound card that refuses {sample_rate} Hz × {channels} ({error})",
                "an output device that takes it",
                "Name another device, or choose another sink.",
            ) from error

    def _callback(self, out: np.ndarray, n: int, _time: Any, _status: Any) -> None:
        out[:] = self.queue.pull(n).T

    def run(self, running: bool) -> None:
        if running != self._stream.active:
            (self._stream.start if running else self._stream.stop)()

    def close(self) -> None:
        if self._stream is not None:
            self._stream.close()


class BrowserSink(Sink):
    """The queue inside a browser's audio worklet, as its reports tell.

    Between two reports the worklet is taken to play on by the clock, so a kernel that is busy with
    a long cell (and reads no messages) does not starve it. After `patience_s` without a report the
    page is taken for closed or asleep and nothing more is sent until it speaks again. `send` hands
    a message and its binary buffers to the page.
    """

    lead_s = 0.04  # a message's way to the page, and the worklet's own buffer

    def __init__(
        self,
        send: Callable[[dict[str, Any], list[bytes]], None],
        clock: WallClock | None = None,
        patience_s: float = 30.0,
    ) -> None:
        super().__init__(clock)
        self._send, self._patience_s = send, patience_s
        self._lock = threading.Lock()
        self.epoch = 0  # counts openings: reports of an earlier one are ignored
        self.sample_rate = 0  # until it is opened
        self._begin()

    def _begin(self) -> None:
        self._running, self._written, self._report = False, 0, SinkReport()
        self._reported_at: float | None = None

    def open(self, sample_rate: int, channels: int) -> None:
        with self._lock:
            self.sample_rate = sample_rate
            self.epoch += 1
            self._begin()
        self._message("open", sample_rate=sample_rate, channels=channels, hold_s=HOLD_S)

    def _message(self, kind: str, buffers: list[bytes] | None = None, **values: Any) -> None:
        self._send({"kind": kind, "epoch": self.epoch, **values}, buffers or [])

    def write(self, samples: np.ndarray) -> None:
        self.replace(self._written, samples)

    def replace(self, sample: int, samples: np.ndarray) -> None:
        pcm = np.rint(np.clip(samples.T, -1, 1) * 32767).astype("<i2")
        with self._lock:
            self._written = sample + samples.shape[-1]
        self._message("audio", [pcm.tobytes()], first=sample, n=samples.shape[-1])

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
        with self._lock:
            played = float(self._report.heard_samples)
            if self._running and self._reported_at is not None:
                age_s = self.clock.now() - self._reported_at
                if age_s > self._patience_s:
                    return float("inf")
                played = min(self._written, played + age_s * self.sample_rate)
            return max(0.0, self._written - played) / self.sample_rate

    def run(self, running: bool) -> None:
        with self._lock:
            self._running = running
            self._reported_at = self.clock.now()
        self._message("run", running=running)

    def hold(self, on: bool) -> None:
        self._message("hold", on=on)

    def report(self) -> SinkReport:
        return self._report

    def finish(self) -> None:
        self._message("finish")

    def close(self) -> None:
        self._message("close")
