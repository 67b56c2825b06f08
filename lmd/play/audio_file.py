"""Sound files that grow while they are written."""

import math
import shutil
from pathlib import Path
from typing import BinaryIO

import numpy as np
import soundfile
import soxr

from lmd.errors import LmdError

SUBTYPES = {".wav": "FLOAT", ".flac": "PCM_24"}
MAX_WAV_BYTES = 2**32 - 2**12  # of samples: a wav file counts itself in 32 bits, header included
WRITING_FAILED = (OSError, RuntimeError, LmdError)  # a full disk; libsndfile's are RuntimeErrors
SFC_SET_ADD_PEAK_CHUNK = 0x1050  # of sndfile.h


def check_audio_path(path: Path) -> str:
    """How samples are stored in a file of that name (`LmdError`: another ending, no folder)."""
    subtype = SUBTYPES.get(path.suffix.lower())
    if subtype is None:
        raise LmdError(f"the file name {path.name!r}", ".wav or .flac", "Change the name.")
    if not path.parent.is_dir():
        raise LmdError(f"no folder {str(path.parent)!r}", "an existing folder", "Make it first.")
    return subtype


def read_audio(file: Path | BinaryIO, sample_rate: int, channels: int, last_s: float) -> np.ndarray:
    """The end of a sound file, `[channel, sample]` float32, at another rate and mixed down.

    Raises:
        LmdError: not a file that libsndfile reads.
    """
    name = getattr(file, "name", file)
    try:
        with soundfile.SoundFile(file) as opened:
            n = min(opened.frames, math.ceil((last_s + 0.1) * opened.samplerate))
            opened.seek(opened.frames - n)
            samples, found_rate = opened.read(n, "float32", always_2d=True), opened.samplerate
    except (OSError, soundfile.LibsndfileError) as error:
        found, kinds = f"{name} ({error})", "sound that can be read: wav, flac, ogg or mp3"
        raise LmdError(found, kinds, "Convert it.") from error
    if samples.shape[1] != channels:
        samples = samples.mean(axis=1, keepdims=True).repeat(channels, axis=1)
    if found_rate != sample_rate:
        samples = soxr.resample(samples, found_rate, sample_rate, "HQ")
    return samples.T[:, -round(last_s * sample_rate) :]


class AudioFile:
    """A wav (float32, the very samples) or flac (24 bit) file; equal samples make equal files.

    Args:
        path, sample_rate, channels: of the file.
        limit_s: write no more than this many seconds.

    Raises:
        LmdError: see `check_audio_path`; the file cannot be made; a limit that no wav file, or not
            the disk, holds.
    """

    def __init__(
        self, path: str | Path, sample_rate: int, channels: int, limit_s: float = math.inf
    ) -> None:
        self.path, self.written, self._rate = Path(path), 0, sample_rate
        subtype = check_audio_path(self.path)
        self._most, self._room = limit_s * sample_rate, math.inf  # samples
        if subtype == "FLOAT":
            self._room = MAX_WAV_BYTES // 4 // channels
            if self._room < self._most < math.inf:
                raise self._too_long(limit_s)
            free = shutil.disk_usage(self.path.parent).free
            if free < self._most * 4 * channels < math.inf:
                raise self._no_room(f"{free / 1e6:.0f} MB free for {limit_s:.0f} s")
        try:
            self._file = soundfile.SoundFile(self.path, "w", sample_rate, channels, subtype)
        except (OSError, soundfile.LibsndfileError) as error:
            raise LmdError(
                f"{self.path} ({error})", "a file that can be written", "Choose another name."
            ) from error
        # A float wav's PEAK chunk holds the time of day: without it equal streams are equal bytes.
        handle, null = self._file._file, soundfile._ffi.NULL
        soundfile._snd.sf_command(handle, SFC_SET_ADD_PEAK_CHUNK, null, 0)

    def write(self, samples: np.ndarray) -> None:
        """Append `[channel, sample]` up to the limit, and flush.

        A wav file then holds it whatever happens to the process; a flac file can be read to its
        end only after `close`.

        Raises:
            LmdError: more than a wav file or the disk holds; what was written before stays good.
        """
        if self.written + samples.shape[-1] > self._most:
            samples = samples[:, : round(self._most) - self.written]
        if self.written + samples.shape[-1] > self._room:
            raise self._too_long((self.written + samples.shape[-1]) / self._rate)
        try:
            self._file.write(samples.T)
            self._file.flush()
        except (OSError, soundfile.LibsndfileError, AssertionError) as error:
            raise self._no_room(str(error)) from error
        self.written += samples.shape[-1]

    def close(self) -> None:
        """Finish the file."""
        self._file.close()

    def _no_room(self, found: str) -> LmdError:
        return LmdError(f"{self.path} ({found})", "room on the disk", "Make some, or go elsewhere.")

    def _too_long(self, seconds: float) -> LmdError:
        return LmdError(
            f"{seconds:.0f} s for {self.path.name}",
            f"at most {self._room / self._rate:.0f} s, since a wav file ends at 4 GiB",
            "Write a .flac file, or less at a time.",
        )
