"""A recording beside the music: begun and finished at any time, from any thread."""

import math
import threading
from pathlib import Path

import numpy as np

from lmd.errors import LmdError
from lmd.play.sinks import AudioFile


class Recorder:
    """At most one file at a time; what is written while there is none is let go."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._file: AudioFile | None = None
        self._closed = False

    def start(
        self, path: str | Path, sample_rate: int, channels: int, limit_s: float = math.inf
    ) -> Path:
        """Write what comes from now on, or `limit_s` of it, to a wav or flac file; its path.

        Raises:
            LmdError: see `AudioFile`; or a recording is under way, or the stream has ended.
        """
        with self._lock:
            if self._closed:  # nobody would finish the file
                raise LmdError("a stream that has ended", "one that plays", "Start another first.")
            if self._file is not None:
                raise LmdError("a recording under way", "none", "Stop it first.")
            self._file = AudioFile(path, sample_rate, channels, limit_s)
            return self._file.path

    def write(self, samples: np.ndarray) -> None:
        """Append `[channel, sample]` to the file, if there is one."""
        with self._lock:
            if self._file is not None:
                self._file.write(samples)

    def stop(self) -> Path | None:
        """Finish the file, if there is one; its path."""
        with self._lock:
            file, self._file = self._file, None
        if file is None:
            return None
        file.close()
        return file.path

    def close(self) -> None:
        """Finish the file; no other can be started."""
        with self._lock:
            self._closed = True
        self.stop()
