"""Which files of a folder can be used, and why others cannot."""

import os
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from lmd.data.sound_files import open_sound, scan, truncation
from lmd.errors import LmdError

AUDIO_SUFFIXES = (
    ".wav", ".flac", ".ogg", ".oga", ".opus", ".mp3", ".aif", ".aiff", ".aifc",
)  # fmt: skip
UNREAD_AUDIO = (
    ".m4a", ".aac", ".wma", ".ape", ".wv", ".mpc", ".dsf", ".dff", ".mka", ".caf", ".w64", ".au",
    ".snd", ".amr", ".ac3", ".tta", ".tak", ".m4b",
)  # fmt: skip
COMPANIONS = (
    ".txt", ".json", ".yaml", ".yml", ".csv", ".md", ".jpg", ".jpeg", ".png", ".gif", ".webp",
    ".bmp", ".pdf", ".log", ".cue", ".m3u", ".m3u8", ".pls", ".nfo", ".ini", ".db", ".html", ".lrc",
)  # fmt: skip  # what lies beside music and holds none
STEM_MP4 = ".stem.mp4"  # MUSDB18's packed form, which soundfile cannot open
MIN_SECONDS = 1.0  # of a file, and of what sounds in it
MIN_SAMPLE_RATE = 16_000  # Hz; below, there is nothing over 8 kHz to learn from
MAX_CHANNELS = 2
UNKNOWN_FRAMES = 2**63 - 1  # libsndfile's word for a header that does not tell the length
TOLERANCE_S = 0.01  # encoders of Opus announce up to some milliseconds more than there is
MAX_REJECTED = 0.05  # of all files; more stop a build …
FEWEST_FILES = 20  # … of so many files or more
SILENT_PEAK = 1e-4  # -80 dB under full scale
MUSDB_STEMS = ("drums", "bass", "other", "vocals")


@dataclass(frozen=True)
class Reject:
    """A file that is not used, and why."""

    path: Path
    reason: str

    def __str__(self) -> str:
        """A line that any terminal takes, whatever bytes the name has."""
        return f"{os.fsencode(self.path).decode('utf-8', 'backslashreplace')}: {self.reason}"


@dataclass
class Report:
    """What a folder holds."""

    accepted: list[Path] = field(default_factory=list)  # sorted
    rejected: list[Reject] = field(default_factory=list)
    not_read: Counter[str] = field(default_factory=Counter)  # passed over, by ending (`.mid`)

    @property
    def too_many_rejected(self) -> bool:
        """Whether more than 5 % of 20 files or more are rejected."""
        n_files = len(self.accepted) + len(self.rejected)
        return n_files >= FEWEST_FILES and len(self.rejected) > MAX_REJECTED * n_files

    def reject(self, path: Path, reason: str) -> None:
        """Move a file from the accepted ones to the rejected."""
        self.accepted.remove(path)
        self.rejected.append(Reject(path, reason))

    def lines(self) -> Iterator[str]:
        """A line for every reject, and one about the kinds that are not read."""
        yield from (f"rejected  {item}" for item in self.rejected)
        if self.not_read:
            kinds = ", ".join(f"{kind} {n}" for kind, n in sorted(self.not_read.items()))
            yield f"{self.not_read.total()} files of kinds not read ({kinds})"

    def as_dict(self) -> dict[str, Any]:
        """`{"accepted": [path…], "rejected": [{"path", "reason"}…], "not_read": {".mid": 2}}`."""
        rejected = [{"path": str(item.path), "reason": item.reason} for item in self.rejected]
        accepted = [str(path) for path in self.accepted]
        return {"accepted": accepted, "rejected": rejected, "not_read": self.not_read}


def named_folder(text: str) -> Path:
    """A folder that is to be read.

    Raises:
        LmdError: there is no such folder, or no name.
    """
    if not text or not Path(text).is_dir():
        raise LmdError(f"{text!r}", "a folder of audio", "Check the path.")
    return Path(text)


def _walk(folder: Path, above: tuple[str, ...], seen: set[str]) -> Iterator[Path | Reject]:
    """Every file that may hold music, sorted, links followed; loops and closed folders as rejects.

    `above` are the real folders that led here, `seen` all so far.
    """
    try:
        children = sorted(folder.iterdir())
    except OSError as error:
        yield Reject(folder, f"folder cannot be opened: {error.strerror}")
        return
    for child in children:
        try:
            is_folder = child.is_dir()
        except OSError:
            is_folder = False
        name = child.name.lower()
        if is_folder and child.suffix.lower() not in AUDIO_SUFFIXES:
            real = os.path.realpath(child)
            if real in above:
                yield Reject(child, "symlink loop: it leads back to a folder that contains it")
            elif real not in seen:
                seen.add(real)
                yield from _walk(child, (*above, real), seen)
        elif name.endswith(UNREAD_AUDIO):
            yield Reject(child, f"{child.suffix} cannot be read: convert it to WAV or FLAC")
        elif child.suffix and not name.endswith(COMPANIONS):
            yield child


def fault(path: Path) -> str | None:
    """Why a file cannot be used; None if it can. Every sample is read.

    Refused: empty, unreadable, truncated, not audio, of unknown length, shorter than a second
    (without its silences, too), under 16 kHz, more than two channels, values that are not finite,
    silence, a name in another encoding than UTF-8. What cannot be known: an MP3 without a Xing or
    LAME header does not say how long it was.
    """
    try:
        str(path).encode()
    except UnicodeEncodeError:
        return "its name is not valid UTF-8: rename it"
    if path.name.lower().endswith(STEM_MP4):
        return "MP4 stems cannot be read: use the WAV form of the data set (MUSDB18-HQ)"
    try:
        if not path.exists():
            return "broken or looping link" if path.is_symlink() else "it is gone"
        if not path.is_file():
            return "not a file"
        if path.stat().st_size == 0:
            return "empty file (0 bytes)"
        return truncation(path) or _sound_fault(path)
    except Exception as error:  # of whatever kind: it is this file's, and the others go on
        return unreadable(error)


def unreadable(error: Exception) -> str:
    """The reason for a file that raised something."""
    text = getattr(error, "error_string", None) or getattr(error, "strerror", None) or str(error)
    return f"unreadable as audio: {str(text or type(error).__name__).strip().rstrip('.')}"


def _sound_fault(path: Path) -> str | None:
    """What is wrong with a file's rate, channels, length or samples; it is read to its end."""
    with open_sound(path) as sound:
        announced, rate, channels = sound.frames, sound.samplerate, sound.channels
    if announced == UNKNOWN_FRAMES:
        return "its header does not tell how long it is: encode it again (flac, ffmpeg)"
    if rate < MIN_SAMPLE_RATE:
        return f"sample rate {rate} Hz, under {MIN_SAMPLE_RATE} Hz"
    if channels > MAX_CHANNELS:
        return f"{channels} channels, more than {MAX_CHANNELS}"
    if announced < MIN_SECONDS * rate:
        return f"{announced / rate:.2f} s, shorter than {MIN_SECONDS:g} s"
    scanned = scan(path)
    if not np.isfinite(scanned.peak):
        return "values that are not finite (NaN or infinite)"
    if scanned.n_samples < announced - TOLERANCE_S * rate:
        return f"truncated: {scanned.n_samples} of {announced} samples can be read"
    if is_stem(path):
        return None
    if scanned.peak < SILENT_PEAK:
        return "silent"
    if scanned.sounding_s < MIN_SECONDS:
        return f"{scanned.sounding_s:.2f} s of sound without its silences, under {MIN_SECONDS:g} s"
    return None


def is_stem(path: Path) -> bool:
    """Whether a file lies where Slakh2100 or MUSDB18 keep stems; those may be silent."""
    if path.stem in MUSDB_STEMS:
        return path.with_name("mixture" + path.suffix).is_file()
    beside = path.parent.parent.glob("mix.*") if path.parent.name == "stems" else ()
    return any(mix.stem == "mix" and mix.suffix.lower() in AUDIO_SUFFIXES for mix in beside)


def check_folder(folder: Path, progress: bool = True) -> Report:
    """Look at every audio file of a folder.

    Raises:
        LmdError: not a folder, or nothing in it that could be used or refused.
    """
    real = os.path.realpath(named_folder(str(folder)))
    report, found = Report(), list(_walk(folder, (real,), {real}))
    for item in tqdm(found, desc="checking", mininterval=1, disable=not progress):
        if isinstance(item, Reject):
            report.rejected.append(item)
        elif not item.name.lower().endswith((*AUDIO_SUFFIXES, STEM_MP4)):
            report.not_read[item.suffix.lower()] += 1
        elif reason := fault(item):
            report.rejected.append(Reject(item, reason))
        else:
            report.accepted.append(item)
    if not report.accepted and not report.rejected:
        found = ": ".join([f"no music in {folder}", *report.lines()])
        expected = f"files of these kinds: {' '.join(AUDIO_SUFFIXES)}"
        raise LmdError(found, expected, "Check the path, or convert them.")
    return report
