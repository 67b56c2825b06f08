"""Which files of a folder can be used, and why others cannot."""

import json
import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import soundfile
from tqdm import tqdm

from lmd.errors import LmdError

AUDIO_SUFFIXES = (".wav", ".flac", ".ogg", ".opus", ".mp3", ".aif", ".aiff")
UNREAD_SUFFIXES = (".m4a", ".aac", ".wma", ".ape", ".wv", ".mpc", ".dsf", ".dff", ".mka", ".caf")
STEM_MP4 = ".stem.mp4"  # MUSDB18's packed form, which soundfile cannot open
MIN_SECONDS = 1.0
MIN_SAMPLE_RATE = 16_000  # Hz; below, there is nothing over 8 kHz to learn from
MAX_CHANNELS = 2
MAX_REJECTED = 0.05  # of all files; more stop a build
SILENT_PEAK = 1e-4  # -80 dB under full scale
MUSDB_STEMS = ("drums", "bass", "other", "vocals")
_BLOCK = 1 << 18  # samples read at once: a three-hour file takes no more memory than a short one


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

    Refused: empty, unreadable, truncated, not audio, shorter than a second, under 16 kHz, more
    than two channels, values that are not finite, silence, a name in another encoding than UTF-8.
    Long files and names in any script are welcome.
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
        lost = _bytes_lost(path)
        if lost:
            return f"truncated: {lost} bytes of sound are missing"
        with soundfile.SoundFile(path) as sound:
            return _header_fault(sound) or _sample_fault(sound)
    except (soundfile.LibsndfileError, OSError) as error:
        said = getattr(error, "error_string", None) or error.strerror or str(error)
        return f"unreadable as audio: {str(said).strip().rstrip('.')}"


def _header_fault(sound: soundfile.SoundFile) -> str | None:
    """What is wrong with a file's rate, channels or length."""
    if sound.samplerate < MIN_SAMPLE_RATE:
        return f"sample rate {sound.samplerate} Hz, under {MIN_SAMPLE_RATE} Hz"
    if sound.channels > MAX_CHANNELS:
        return f"{sound.channels} channels, more than {MAX_CHANNELS}"
    seconds = sound.frames / sound.samplerate
    return f"{seconds:.2f} s, shorter than {MIN_SECONDS:g} s" if seconds < MIN_SECONDS else None


def _sample_fault(sound: soundfile.SoundFile) -> str | None:
    """What is wrong with a file's samples; it is read to its end, block by block."""
    n_read, peak = 0, 0.0
    while len(block := sound.read(_BLOCK, dtype="float32", always_2d=True)):
        n_read += len(block)
        block_peak = float(np.abs(block).max())
        if not np.isfinite(block_peak):
            return "values that are not finite (NaN or infinite)"
        peak = max(peak, block_peak)
    if n_read < sound.frames:
        return f"truncated: {n_read} of {sound.frames} samples can be read"
    return "silent" if peak < SILENT_PEAK and not is_stem(Path(sound.name)) else None


def is_stem(path: Path) -> bool:
    """Whether a file lies where Slakh2100 or MUSDB18 keep stems; those may be silent."""
    if path.stem in MUSDB_STEMS:
        return path.with_name("mixture" + path.suffix).is_file()
    return path.parent.name == "stems" and any(path.parent.parent.glob("mix.*"))


def _bytes_lost(path: Path) -> int:
    """How many bytes a WAV or AIFF lacks of what its header announces; 0 for other formats.

    libsndfile shortens such files without a word. Writers that stream leave the length at 0 or at
    its maximum: those announce nothing.
    """
    with path.open("rb") as file:
        head = file.read(12)
    order = {b"RIFF": "little", b"FORM": "big"}.get(head[:4])
    if order is None or len(head) < 12 or head[8:12] not in (b"WAVE", b"AIFF", b"AIFC"):
        return 0
    announced = int.from_bytes(head[4:8], order)
    if announced in (0, 0xFFFFFFFF):
        return 0
    return max(0, announced + 8 - path.stat().st_size - announced % 2)


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
