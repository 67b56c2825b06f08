"""Sound files as they are met: opened, measured to their last sample, resampled, decoded tags."""

import math
import mmap
import re
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property, lru_cache
from io import BytesIO
from itertools import pairwise
from pathlib import Path

import numpy as np
import soundfile
import soxr

AUDIO_SUFFIXES = (
    ".wav", ".flac", ".ogg", ".oga", ".opus", ".mp3", ".aif", ".aiff", ".aifc", ".caf", ".w64",
    ".au", ".snd",
)  # fmt: skip
UNKNOWN_BYTES = (0, 2**32 - 1, 2**63 - 1, 2**64 - 1)
STEP_S = 0.05  # silence is looked for in steps of about this
QUIET_DB = -55.0  # below the file's peak level: silence
KEEP_QUIET_S = 0.5  # of a silence, so much stays
CANCELLED = 1e-3  # of the channels' energy; a mean with less is no mix of them
_BLOCK_STEPS = 128  # read at once: a three-hour file takes no more memory than a short one
_CORRECTED = re.compile(r"(?i)(?:riff|riff size|form|data|data size) *: (\d+) \(should be (\d+)\)")
_OGG_HEADER = 27  # bytes of a page before its table of lengths
_LAST_PAGE = 0x04  # flag of the page that ends a stream
# MPEG-1 and MPEG-2 layer III, kbit/s by the header's index (ISO 11172-3, 13818-3).
_KBPS = (
    (0, 8, 16, 24, 32, 40, 48, 56, 64, 80, 96, 112, 128, 144, 160),
    (0, 32, 40, 48, 56, 64, 80, 96, 112, 128, 160, 192, 224, 256, 320),
)
_MPEG_HZ = (44_100, 48_000, 32_000)


@contextmanager
def open_sound(path: Path) -> Iterator[soundfile.SoundFile]:
    """A sound file, open, with its true number of frames.

    Of an MP3 without a Xing header libsndfile guesses the length and reads no further, so its
    frames are counted and it is given such a header.
    """
    with path.open("rb") as file:
        state = path.stat()
        place, header = _missing_header(path, state.st_size, state.st_mtime_ns)
        source = BytesIO(file.read(place) + header + file.read()) if header else path
        with soundfile.SoundFile(source) as sound:
            yield sound


@lru_cache(maxsize=256)
def _missing_header(path: Path, size: int, changed_ns: int) -> tuple[int, bytes]:
    """Where an MP3 file lacks a Xing header, and that header; nothing for other files."""
    if path.suffix.lower() != ".mp3" or not size:
        return 0, b""
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        at, n_frames = 0, 0
        if data[:3] == b"ID3":
            at = 10 + sum((byte & 0x7F) << 7 * (3 - i) for i, byte in enumerate(data[6:10]))
        first = at = _next_frame(data, at)
        if first < 0:
            return 0, b""
        head = bytearray(data[first : first + 4])
        is_mpeg1, is_mono = head[1] >> 3 & 1, head[3] >> 6 == 3
        side = (17, 9)[is_mono] if not is_mpeg1 else (32, 17)[is_mono]
        tag = data[first + 4 + side : first + 8 + side]
        if tag in (b"Xing", b"Info") and data[first + 11 + side] & 1:  # it states the length
            return 0, b""
        while at >= 0 and (end := at + _frame_bytes(data, at)) <= size:
            n_frames += 1  # behind it the next, the end, or something else than sound
            at = end if _frame_bytes(data, end) else _next_frame(data, end)
    head[1] |= 1  # no checksum
    head[2] = 9 << 4 | head[2] & 0b1100  # room for the header, no padding byte
    body = bytes(head) + bytes(side) + b"Xing" + struct.pack(">II", 1, n_frames)
    return first, body.ljust(_frame_bytes(body, 0), b"\0")


def _next_frame(data: mmap.mmap, at: int) -> int:
    """Where two frames in a row begin, from `at` on; -1 = nowhere."""
    while at >= 0:
        length = _frame_bytes(data, at)
        if length and (at + length >= len(data) or _frame_bytes(data, at + length)):
            return at
        at = data.find(b"\xff", at + 1)
    return -1


def _frame_bytes(data: mmap.mmap | bytes, at: int) -> int:
    """The length of the MPEG layer III frame that begins there; 0 = none does."""
    if len(data) < at + 4 or data[at] != 0xFF or data[at + 1] & 0xE6 != 0xE2:
        return 0
    version, kbps, rate = data[at + 1] >> 3 & 3, data[at + 2] >> 4, data[at + 2] >> 2 & 3
    if version == 1 or kbps in (0, 15) or rate == 3:
        return 0
    is_mpeg1, hz = version == 3, _MPEG_HZ[rate] >> {3: 0, 2: 1, 0: 2}[version]
    return (144 if is_mpeg1 else 72) * 1000 * _KBPS[is_mpeg1][kbps] // hz + (data[at + 2] >> 1 & 1)


def load_segment(
    path: Path, sample_rate: int, channels: int, start_s: float = 0.0, seconds: float = math.inf
) -> np.ndarray:
    """A stretch of a file, resampled, in the wanted channels.

    Returns:
        float32 `[channel, sample]`; no samples if the file ends before `start_s`.
    """
    with open_sound(path) as sound:
        rate = sound.samplerate
        first = min(round(start_s * rate), sound.frames)
        last = sound.frames if math.isinf(seconds) else round((start_s + seconds) * rate)
        early = first  # GSM 6.10 is read from its beginning on alone …
        if sound.seekable():
            early = min(first, rate)  # … and frames of MP3 need those before them
            sound.seek(first - early)
        n_samples = early + max(0, last - first)
        wave = sound.read(n_samples, dtype="float32", always_2d=True)[early:]
    if wave.shape[1] != channels:
        wave = np.repeat(to_mono(wave), channels, axis=1)
    return soxr.resample(wave, rate, sample_rate, quality="HQ").T


def to_mono(wave: np.ndarray) -> np.ndarray:
    """The mean of the channels, or the louder one where they cancel: `[sample, channel]` to one."""
    mean, energies = wave.mean(1, keepdims=True), np.square(wave).sum(0)
    if np.square(mean).sum() < CANCELLED * energies.mean():
        return wave[:, [energies.argmax()]]
    return mean


@dataclass(frozen=True)
class Scan:
    """What a file sounds like from its first sample to the last that can be read."""

    n_samples: int
    sample_rate: int  # Hz
    step_s: float  # length of a step in seconds, a whole number of the file's samples
    steps: np.ndarray  # [step]: highest absolute value in any channel (in a mix they may cancel)

    @property
    def peak(self) -> float:
        """The highest absolute value in any channel."""
        return float(self.steps.max(initial=0))

    @cached_property
    def keep(self) -> np.ndarray:
        """Which steps to keep, bool `[step]`: see `sounding`."""
        return sounding(self.steps, self.step_s)

    @property
    def sounding_s(self) -> float:
        """How much is kept, in seconds."""
        return float(self.keep.sum()) * self.step_s

    def kept(self, n_samples: int, sample_rate: int, start_s: float = 0.0) -> np.ndarray:
        """Which samples of a stretch that begins at `start_s` to keep, bool `[sample]`.

        Its sample rate (Hz) is not necessarily the file's.
        """
        edges = (np.arange(len(self.keep) + 1) * self.step_s - start_s) * sample_rate
        edges = np.clip(np.round(edges).astype(int), 0, n_samples)
        edges[-1] = max(edges[-1], n_samples)  # resampling may add a sample
        return np.repeat(self.keep, np.diff(edges))


def sounding(steps: np.ndarray, step_s: float) -> np.ndarray:
    """Which steps to keep, bool `[step]`: half a second of a silence, none at the edges."""
    loud = np.flatnonzero(steps > steps.max(initial=0) * 10 ** (QUIET_DB / 20))
    keep = np.zeros(len(steps), bool)
    keep[loud] = True
    stay = round(KEEP_QUIET_S / step_s)
    for before, after in pairwise(loud):
        keep[before : min(before + stay, after) + 1] = True
    return keep


def scan(path: Path) -> Scan:
    """Read a file to its end, block by block."""
    with open_sound(path) as sound:
        rate = sound.samplerate
        step = max(1, round(STEP_S * rate))
        n_samples, steps = 0, [np.zeros(0, np.float32)]
        while len(block := sound.read(_BLOCK_STEPS * step, dtype="float32", always_2d=True)):
            n_samples += len(block)
            loud = np.abs(block).max(axis=1)
            steps.append(np.pad(loud, (0, -len(loud) % step)).reshape(-1, step).max(axis=1))
        return Scan(n_samples, rate, step / rate, np.concatenate(steps))


def truncation(path: Path, sound: soundfile.SoundFile) -> str | None:
    """What an open file lacks of what its header announces; None if nothing is known to be.

    libsndfile's log says it of formats with plain samples. FLAC and MP3 need no help: reading them
    to their end tells. Writers that stream leave the length at 0 or at its maximum.
    """
    if sound.format == "OGG":
        return "an Ogg stream without its end" if _ogg_is_cut(path) else None
    for announced, found in _CORRECTED.findall(sound.extra_info):
        lost = int(announced) - int(found)
        if lost > 1 and int(announced) not in UNKNOWN_BYTES:  # 1: the pad byte at the end
            return f"{lost} bytes of sound are missing"
    return None


def _ogg_is_cut(path: Path) -> bool:
    """Whether an Ogg file's last page is not whole, or is not the last of its stream.

    Source: RFC 3533, section 6.
    """
    size, flags = path.stat().st_size, _LAST_PAGE
    with path.open("rb") as file:
        while (head := file.read(_OGG_HEADER))[:4] == b"OggS":
            lengths = file.read(head[-1])
            if len(head) < _OGG_HEADER or file.seek(sum(lengths), 1) > size:
                return True
            flags = head[5]
    return not flags & _LAST_PAGE


def tags(path: Path) -> dict[str, str]:
    """Title, comment and genre of a file, in whatever encoding they are."""
    found = {}
    with open_sound(path) as sound:
        for name in ("title", "comment", "genre"):  # `copy_metadata` knows no encoding but UTF-8
            raw = soundfile._snd.sf_get_string(sound._file, soundfile._str_types[name])
            found[name] = decoded(soundfile._ffi.string(raw)).strip() if raw else ""
    return found


def decoded(data: bytes) -> str:
    """A text in UTF-8, else in Shift-JIS where it reads as Japanese, else in Latin-1.

    Shift-JIS that was taken for Latin-1 and written as UTF-8 is found, too.
    """
    try:
        text = data.decode("utf-8-sig")
        if not any("\x80" <= c <= "\x9f" for c in text):  # control characters, which no text has
            return text
        raw = text.encode("latin-1", errors="replace")
    except UnicodeDecodeError:
        raw, text = data, data.decode("cp1252", errors="replace").replace("\ufffd", "")
    try:
        japanese = raw.decode("cp932")
    except UnicodeDecodeError:
        return text
    wide = [c for c in japanese if not c.isascii()]
    has_kana = any("\u3040" <= c <= "\u30ff" for c in wide)
    is_plausible = has_kana or (len(wide) > 1 and 2 * len(wide) > len(japanese))
    is_narrow = any("\uff61" <= c <= "\uff9f" for c in wide)  # Latin-1's capitals read like this
    return japanese if is_plausible and not is_narrow else text
