"""`lmd data check FOLDER`: which files of a folder can be used, and why others cannot."""

import os
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import tyro
from tqdm import tqdm

from lmd.data.layouts import Track, is_stem, track_of
from lmd.data.sound_files import AUDIO_SUFFIXES, open_sound, scan, truncation
from lmd.errors import LmdError
from lmd.outputs import check_outputs, write_json

STEM_MP4 = ".stem.mp4"  # MUSDB18's packed form, which soundfile cannot open
UNREAD_AUDIO = (
    ".m4a", ".aac", ".wma", ".ape", ".wv", ".mpc", ".dsf", ".dff", ".mka", ".amr", ".ac3", ".tta",
    ".tak", ".m4b", STEM_MP4,
)  # fmt: skip
COMPANIONS = (
    ".txt", ".json", ".yaml", ".yml", ".csv", ".md", ".jpg", ".jpeg", ".png", ".gif", ".webp",
    ".bmp", ".pdf", ".log", ".cue", ".m3u", ".m3u8", ".pls", ".nfo", ".ini", ".db", ".html", ".lrc",
)  # fmt: skip  # what lies beside music and holds none
MIN_SECONDS = 1.0  # of a file, and of what sounds in it
MIN_SAMPLE_RATE = 16_000  # Hz; below, there is nothing over 8 kHz to learn from
MAX_CHANNELS = 2
UNKNOWN_FRAMES = 2**63 - 1  # libsndfile's word for a header that does not tell the length
TOLERANCE_S = 0.01  # encoders of Opus announce up to some milliseconds more than there is
SILENT_PEAK = 1e-4  # -80 dB under full scale


@dataclass(frozen=True)
class Options:
    """Flags of the command.

    Attributes:
        folder: folder of audio.
        json: write the report here as JSON.
    """

    folder: tyro.conf.Positional[str]
    json: Path | None = None


def main(options: Options) -> int:
    """Report on a folder; status 1 if anything was rejected."""
    check_outputs(json=options.json, json_key="accepted", make_folders=True)
    _, report = survey(named_folder(options.folder))
    for line in report.lines():
        print(line)
    n_accepted, n_rejected = len(report.accepted), len(report.rejected)
    print(f"{n_accepted} accepted, {n_rejected} rejected in {options.folder}")
    if options.json is not None:
        write_json(options.json, report.as_dict())
    return 1 if report.rejected else 0


@dataclass
class Report:
    """What a folder holds."""

    accepted: list[Path] = field(default_factory=list)  # sorted
    rejected: dict[Path, str] = field(default_factory=dict)  # and why
    not_read: Counter[str] = field(default_factory=Counter)  # passed over, by ending (`.mid`)

    def reject(self, path: Path, reason: str) -> None:
        """Move a file from the accepted ones to the rejected."""
        self.accepted.remove(path)
        self.rejected[path] = reason

    def lines(self) -> Iterator[str]:
        """A line for every reject, and one about the kinds that are not read.

        Any terminal takes them, whatever bytes a name has.
        """
        for path, reason in self.rejected.items():
            name = os.fsencode(path).decode("utf-8", "backslashreplace")
            yield f"rejected  {name}: {reason}"
        if self.not_read:
            kinds = ", ".join(f"{kind} {n}" for kind, n in sorted(self.not_read.items()))
            yield f"{self.not_read.total()} files of kinds not read ({kinds})"

    def as_dict(self) -> dict[str, Any]:
        """`{"accepted": [path…], "rejected": [{"path", "reason"}…], "not_read": {".mid": 2}}`."""
        rejected = [{"path": str(path), "reason": text} for path, text in self.rejected.items()]
        accepted = [str(path) for path in self.accepted]
        return {"accepted": accepted, "rejected": rejected, "not_read": self.not_read}


def survey(folder: Path) -> tuple[list[Track], Report]:
    """What a folder of music holds: its tracks, and the report on all its files.

    Raises:
        LmdError: not a folder, or nothing in it that could be used or refused.
    """
    report, tracks = Report(), []
    files, report.rejected = _walk(named_folder(str(folder)))
    for path in tqdm(files, desc="checking", mininterval=1):
        if not path.name.lower().endswith((*AUDIO_SUFFIXES, *UNREAD_AUDIO)):
            report.not_read[path.suffix.lower()] += 1
        elif reason := fault(path):
            report.rejected[path] = reason
        else:
            report.accepted.append(path)
    if not report.accepted and not report.rejected:
        found = ": ".join([f"no music in {folder}", *report.lines()])
        expected = f"files of these kinds: {' '.join(AUDIO_SUFFIXES)}"
        raise LmdError(found, expected, "Check the path, or convert them.")
    usable = set(report.accepted)
    for path in filter(lambda path: not is_stem(path), sorted(usable)):
        try:
            track = track_of(folder, path)
        except Exception as error:  # of whatever kind: the other tracks go on
            reason = " ".join(str(error).split())
            report.reject(path, f"a file that describes it cannot be read: {reason}")
            continue
        lost = [stem.name for _, stem in track.stems if stem not in usable]
        if lost:
            report.reject(path, f"stems missing or unusable: {', '.join(lost)}")
        else:
            tracks.append(track)
    return tracks, report


def named_folder(text: str) -> Path:
    """A folder that is to be read.

    Raises:
        LmdError: there is no such folder, or no name.
    """
    if not text or not Path(text).is_dir():
        raise LmdError(f"{text!r}", "a folder of audio", "Check the path.")
    return Path(text)


def _walk(folder: Path) -> tuple[list[Path], dict[Path, str]]:
    """Every file that may hold music, sorted, links followed; loops and closed folders."""
    files, rejected, seen = [], {}, {os.path.realpath(folder)}

    def closed(error: OSError) -> None:
        rejected[Path(error.filename)] = f"folder cannot be opened: {error.strerror}"

    for place, folders, names in os.walk(folder, onerror=closed, followlinks=True):
        inside, folders[:] = sorted(folders), []
        for name in inside:
            real = os.path.realpath(os.path.join(place, name))
            if name.lower().endswith(AUDIO_SUFFIXES):
                names.append(name)
            elif real not in seen:
                seen.add(real)
                folders.append(name)
            elif Path(os.path.realpath(place)).is_relative_to(real):
                rejected[Path(place, name)] = "symlink loop: it leads back to where it lies"
        paths = (Path(place, name) for name in names)
        files += [p for p in paths if p.suffix and not p.name.lower().endswith(COMPANIONS)]
    return sorted(files), rejected


def fault(path: Path) -> str | None:
    """Why a file cannot be used; None if it can. Every sample is read.

    Refused: empty, unreadable, truncated, not audio, of unknown length, shorter than a second
    (without its silences, too), under 16 kHz, more than two channels, values that are not finite,
    silence, a name in another encoding than UTF-8. What cannot be known: an MP3 without a Xing or
    LAME header does not say how long it was.
    """
    try:
        str(path).encode()
        if path.name.lower().endswith(STEM_MP4):
            return "MP4 stems cannot be read: use the WAV form of the data set (MUSDB18-HQ)"
        if path.name.lower().endswith(UNREAD_AUDIO):
            return f"{path.suffix} cannot be read: convert it to WAV or FLAC"
        if not path.exists():
            return "broken or looping link" if path.is_symlink() else "it is gone"
        if not path.is_file():
            return "not a file"
        return _sound_fault(path) if path.stat().st_size else "empty file (0 bytes)"
    except UnicodeEncodeError:
        return "its name is not valid UTF-8: rename it"
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
        lost = truncation(path, sound)
    if lost:
        return f"truncated: {lost}"
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
