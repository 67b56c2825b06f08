"""Which files of a folder can be used, and why others cannot."""

import json
import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import soundfile
from tqdm import tqdm

from lmd.data.silence import hear
from lmd.data.truncation import truncation
from lmd.errors import LmdError

AUDIO_SUFFIXES = (".wav", ".flac", ".ogg", ".opus", ".mp3", ".aif", ".aiff")
UNREAD_SUFFIXES = (".m4a", ".aac", ".wma", ".ape", ".wv", ".mpc", ".dsf", ".dff", ".mka", ".caf")
STEM_MP4 = ".stem.mp4"  # MUSDB18's packed form, which soundfile cannot open
MIN_SECONDS = 1.0  # of a file, and of what sounds in it
MIN_SAMPLE_RATE = 16_000  # Hz; below, there is nothing over 8 kHz to learn from
MAX_CHANNELS = 2
UNKNOWN_FRAMES = 2**63 - 1  # libsndfile's word for a header that does not tell the length
MAX_REJECTED = 0.05  # of all files; more stop a build
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
    """What a folder holds.

    Attributes:
        accepted: files that can be used, sorted.
        rejected: files, links and folders that cannot, each with its reason.
    """

    accepted: list[Path] = field(default_factory=list)
    rejected: list[Reject] = field(default_factory=list)

    @property
    def share_rejected(self) -> float:
        """Rejects among all audio files."""
        return len(self.rejected) / max(1, len(self.accepted) + len(self.rejected))

    def reject(self, path: Path, reason: str) -> None:
        """Move a file from the accepted ones to the rejected."""
        self.accepted.remove(path)
        self.rejected.append(Reject(path, reason))

    def as_json(self) -> str:
        """`{"accepted": [path…], "rejected": [{"path", "reason"}…]}`."""
        rejected = [{"path": str(item.path), "reason": item.reason} for item in self.rejected]
        return json.dumps({"accepted": [str(p) for p in self.accepted], "rejected": rejected})


def find_audio(folder: Path) -> Iterator[Path | Reject]:
    """Every file that is named like audio, sorted, links followed; loops come as rejects.

    Raises:
        LmdError: not a folder.
    """
    if not folder.is_dir():
        raise LmdError(f"{str(folder)!r}", "a folder of audio", "Check the path.")
    yield from _walk(folder, (os.path.realpath(folder),), {os.path.realpath(folder)})


def _walk(folder: Path, above: tuple[str, ...], seen: set[str]) -> Iterator[Path | Reject]:
    """The audio below one folder. `above`: the real folders that led here; `seen`: all so far."""
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
        if is_folder and child.suffix.lower() not in AUDIO_SUFFIXES:
            real = os.path.realpath(child)
            if real in above:
                yield Reject(child, "symlink loop: it leads back to a folder that contains it")
            elif real not in seen:
                seen.add(real)
                yield from _walk(child, (*above, real), seen)
        elif child.name.lower().endswith((*AUDIO_SUFFIXES, STEM_MP4)):
            yield child
        elif child.name.lower().endswith(UNREAD_SUFFIXES):
            yield Reject(child, f"{child.suffix} cannot be read: convert it to WAV or FLAC")


def fault(path: Path) -> str | None:
    """Why a file cannot be used; None if it can. Every sample is read.

    Refused: empty, unreadable, truncated, not audio, of unknown length, shorter than a second
    (without its silences, too), under 16 kHz, more than two channels, values that are not finite,
    silence, a name in another encoding than UTF-8. Long files and names in any script are welcome.

    One thing cannot be known: an MP3 without a Xing or LAME header does not say how long it is.
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
        return truncation(path) or _header_fault(path) or _sample_fault(path)
    except (soundfile.LibsndfileError, OSError) as error:
        said = getattr(error, "error_string", None) or error.strerror or str(error)
        return f"unreadable as audio: {str(said).strip().rstrip('.')}"


def _header_fault(path: Path) -> str | None:
    """What is wrong with a file's rate, channels or length."""
    about = soundfile.info(path)
    if about.frames == UNKNOWN_FRAMES:
        return "its header does not tell how long it is: encode it again (flac, ffmpeg)"
    if about.samplerate < MIN_SAMPLE_RATE:
        return f"sample rate {about.samplerate} Hz, under {MIN_SAMPLE_RATE} Hz"
    if about.channels > MAX_CHANNELS:
        return f"{about.channels} channels, more than {MAX_CHANNELS}"
    if about.duration < MIN_SECONDS:
        return f"{about.duration:.2f} s, shorter than {MIN_SECONDS:g} s"
    return None


def _sample_fault(path: Path) -> str | None:
    """What is wrong with a file's samples; it is read to its end."""
    heard, announced = hear(path), soundfile.info(path).frames
    if not np.isfinite(heard.peak):
        return "values that are not finite (NaN or infinite)"
    if heard.n_samples < announced:
        return f"truncated: {heard.n_samples} of {announced} samples can be read"
    if is_stem(path):
        return None
    if heard.peak < SILENT_PEAK:
        return "silent"
    if heard.sounding_s < MIN_SECONDS:
        return f"{heard.sounding_s:.2f} s of sound without its silences, under {MIN_SECONDS:g} s"
    return None


def is_stem(path: Path) -> bool:
    """Whether a file lies where Slakh2100 or MUSDB18 keep stems; those may be silent."""
    if path.stem in MUSDB_STEMS:
        return path.with_name("mixture" + path.suffix).is_file()
    beside = path.parent.parent.glob("mix.*") if path.parent.name == "stems" else ()
    return any(mix.stem == "mix" and mix.suffix.lower() in AUDIO_SUFFIXES for mix in beside)


def check_folder(folder: Path, progress: bool = True) -> Report:
    """Look at every audio file of a folder.

    Args:
        folder: where to look, with everything below it.
        progress: show a bar.

    Raises:
        LmdError: not a folder.
    """
    report = Report()
    found = list(find_audio(folder))
    for item in tqdm(found, desc="checking", mininterval=1, disable=not progress):
        reason = item.reason if isinstance(item, Reject) else fault(item)
        if isinstance(item, Reject):
            report.rejected.append(item)
        elif reason:
            report.rejected.append(Reject(item, reason))
        else:
            report.accepted.append(item)
    return report
