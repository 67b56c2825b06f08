"""Where the sound goes: to nobody by a clock, to a file, to a sound card."""

import math
import threading
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import soundfile

from lmd.errors import LmdError
from lmd.play.play_queue import FADE_S, Clock, PlayQueue, SinkReport, WallClock


class NullSink:
    """Plays to nobody, by a clock: for tests, papermill and measurements.

    Args:
        clock: whose time it keeps (real time if None).
        keep: hold on to what was played, silence and fades included (`heard()`).
    """

    def __init__(self, clock: Clock | None = None, *, keep: bool = False) -> None:
        self.clock: Clock = WallClock() if clock is None else clock
        self._kept: list[np.ndarray] | None = [] if keep else None
        self._running, self._lock = False, threading.Lock()

    def open(self, sample_rate: int, channels: int) -> None:
        """Get ready."""
        self.sample_rate = sample_rate
        self.queue = PlayQueue(channels, round(FADE_S * sample_rate))
        self._since, self._pulled = self.clock.now(), 0

    def _advance(self) -> None:
        with self._lock:
            if not self._running:
                return
            due = int((self.clock.now() - self._since) * self.sample_rate) - self._pulled
            if due > 0:
                self._pulled += due
                played = self.queue.pull(due)
                if self._kept is not None:
                    self._kept.append(played)

    def write(self, samples: np.ndarray) -> None:
        """Append to the queue."""
        self._advance()
        self.queue.push(samples)

    def queued_s(self) -> float:
        """Seconds not yet played."""
        self._advance()
        return self.queue.level / self.sample_rate

    def run(self, running: bool) -> None:
        """Let the clock play, or stop it."""
        self._advance()
        if running and not self._running:
            self._since, self._pulled = self.clock.now(), 0
        self._running = running

    def report(self) -> SinkReport:
        """The counters."""
        self._advance()
        return self.queue.report(self.sample_rate)

    def heard(self) -> np.ndarray:
        """Everything played so far, `[channel, sample]` (with `keep=True`)."""
        if self._kept is None:
            raise LmdError("a NullSink that kept nothing", "keep=True", "Make it with keep=True.")
        self._advance()
        return np.concatenate(self._kept, axis=-1)

    def finish(self) -> None:
        """Nothing more will come."""
        self.queue.ending = True

    def close(self) -> None:
        """Stop."""
        self.run(False)


SUBTYPES = {".wav": "FLOAT", ".flac": "PCM_24"}
MAX_WAV_BYTES = 2**32 - 2**12  # of samples: a wav file counts itself in 32 bits, header included


def check_audio_path(path: Path) -> str:
    """How samples are stored in a file of that name.

    Raises:
        LmdError: another ending than wav or flac, or a folder that does not exist.
    """
    subtype = SUBTYPES.get(path.suffix.lower())
    if subtype is None:
        raise LmdError(f"the file name {path.name!r}", ".wav or .flac", "Change the name.")
    if not path.parent.is_dir():
        raise LmdError(f"no folder {str(path.parent)!r}", "an existing folder", "Make it first.")
    return subtype


class AudioFile:
    """A wav (float32, the very samples) or flac (24 bit) file that grows while it is written.

    Args:
        path: the file.
        sample_rate: in Hz.
        channels: of the sound.
        limit_s: write no more than this many seconds.

    Attributes:
        written: samples in the file.

    Raises:
        LmdError: see `check_audio_path`; the file cannot be made; a limit that no wav file holds.
    """

    def __init__(
        self,
        path: str | Path,
        sample_rate: int,
        channels: int,
        limit_s: float = math.inf,
    ) -> None:
        self.path, self.written = Path(path), 0
        subtype = check_audio_path(self.path)
        self._most = limit_s * sample_rate
        self._room = math.inf if subtype == SUBTYPES[".flac"] else MAX_WAV_BYTES // 4 // channels
        if self._room < self._most < math.inf:
            raise self._too_long(limit_s, sample_rate)
        self._rate = sample_rate
        try:
            self._file = soundfile.SoundFile(
                self.path, "w", samplerate=sample_rate, channels=channels, subtype=subtype
            )
        except (OSError, soundfile.LibsndfileError) as error:
            raise LmdError(
                f"{self.path} ({error})", "a file that can be written", "Choose another name."
            ) from error

    def write(self, samples: np.ndarray) -> None:
        """Append `[channel, sample]` up to the limit, and flush.

        A wav file then holds it whatever happens to the process; a flac file can be read to its
        end only after `close`.

        Raises:
            LmdError: more than a wav file holds; what was written before stays good.
        """
        if self.written + samples.shape[-1] > self._most:
            samples = samples[:, : round(self._most) - self.written]
        if self.written + samples.shape[-1] > self._room:
            raise self._too_long((self.written + samples.shape[-1]) / self._rate, self._rate)
        self._file.write(samples.T)
        self._file.flush()
        self.written += samples.shape[-1]

    def close(self) -> None:
        """Finish the file."""
        self._file.close()

    def _too_long(self, seconds: float, sample_rate: int) -> LmdError:
        return LmdError(
            f"{seconds:.0f} s for {self.path.name}",
            f"at most {self._room / sample_rate:.0f} s, since a wav file ends at 4 GiB",
            "Write a .flac file, or less at a time.",
        )


class FileSink:
    """Writes to a file as fast as it is fed; it keeps no time, so nothing can be late.

    Args:
        path: a wav or flac file.
        limit_s: write no more than this many seconds.
    """

    def __init__(self, path: str | Path, limit_s: float = float("inf")) -> None:
        self.path, self.clock, self._limit_s = Path(path), WallClock(), limit_s
        self._file: AudioFile | None = None
        self._written = 0

    def open(self, sample_rate: int, channels: int) -> None:
        """Create the file."""
        self._file = AudioFile(self.path, sample_rate, channels, self._limit_s)

    def write(self, samples: np.ndarray) -> None:
        """Append to the file."""
        if self._file is not None:
            self._file.write(samples)
            self._written = self._file.written

    def queued_s(self) -> float:
        """Always 0: what is written is done with."""
        return 0.0

    def run(self, running: bool) -> None:
        """Nothing to start or pause."""

    def report(self) -> SinkReport:
        """Everything written counts as heard."""
        return SinkReport(heard_samples=self._written)

    def finish(self) -> None:
        """Nothing to do: every write is already on its way to the disk."""

    def close(self) -> None:
        """Finish the file."""
        if self._file is not None:
            self._file.close()
            self._file = None


def _sounddevice() -> ModuleType:
    """The optional library, or a refusal that says how to get it."""
    try:
        import sounddevice
    except (ImportError, OSError) as error:  # OSError: the package without the PortAudio library
        raise LmdError(
            f"no usable sounddevice ({error})",
            "the optional package and the PortAudio library",
            "Install with `pip install lmd[soundcard]`, or choose another sink.",
        ) from error
    return sounddevice


class SoundCardSink:
    """The local sound card through sounddevice (optional); its callback never waits.

    Args:
        device: a sounddevice device (None: the default one).

    Raises:
        LmdError: sounddevice, PortAudio or the device is missing.
    """

    def __init__(self, device: Any = None) -> None:
        self._library, self._device = _sounddevice(), device
        self.clock = WallClock()
        self._stream: Any = None

    def open(self, sample_rate: int, channels: int) -> None:
        """Open the device."""
        self.sample_rate = sample_rate
        self.queue = PlayQueue(channels, round(FADE_S * sample_rate))
        try:
            self._stream = self._library.OutputStream(
                samplerate=sample_rate,
                channels=channels,
                dtype="float32",
                device=self._device,
                callback=self._callback,
            )
        except self._library.PortAudioError as error:
            raise LmdError(
                f"a sound card that refuses {sample_rate} Hz × {channels} ({error})",
                "an output device that takes it",
                "Name another device, or choose another sink.",
            ) from error

    def _callback(self, out: np.ndarray, n: int, _time: Any, _status: Any) -> None:
        out[:] = self.queue.pull(n).T

    def write(self, samples: np.ndarray) -> None:
        """Append to the queue."""
        self.queue.push(samples)

    def queued_s(self) -> float:
        """Seconds not yet handed to the card."""
        return self.queue.level / self.sample_rate

    def run(self, running: bool) -> None:
        """Start or stop the card."""
        if running and not self._stream.active:
            self._stream.start()
        elif not running and self._stream.active:
            self._stream.stop()

    def report(self) -> SinkReport:
        """The counters."""
        return self.queue.report(self.sample_rate)

    def finish(self) -> None:
        """Nothing more will come."""
        self.queue.ending = True

    def close(self) -> None:
        """Release the device."""
        if self._stream is not None:
            self._stream.close()
