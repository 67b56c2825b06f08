"""How music lies in a folder: plain files, Slakh2100, MUSDB18; and what it is called."""

import codecs
import json
import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from lmd.data.check import AUDIO_SUFFIXES, MUSDB_STEMS, Reject, Report, check_folder, is_stem
from lmd.data.sound_files import decoded, tags
from lmd.errors import LmdError

_CAPTION_KEYS = ("caption", "prompt", "description", "text", "title")
_SPLIT_FOLDERS = ("train", "validation", "test")
_EMPTY_TAG = re.compile(  # says nothing of the music
    r"(track|title|audio|untitled|unknown|other|default|none|n/?a|misc|genre|new recording)?"
    r"[\W\d_]*|[0-9a-f \-]{8,}",
    re.IGNORECASE,
)
_ENCODER_WORDS = re.compile(  # of programs, shops and rippers: not of the music
    r"encod|\blame\b|\blav[fc]|ffmpeg|\bsox\b|libvorbis|libopus|libflac|xiph|\bitun|audacity|"
    r"audio ?copy|\beac\b|\bripp?|convert|download|created|generated|made with|processed|"
    r"mastered|recorded (with|by)|https?:|www\.|\.(com|net|org)\b|copyright|©|\(c\)|rights|"
    r"\bk?bps\b|\bvbr\b|\bv?\d+\.\d+\.\d+",
    re.IGNORECASE,
)


@dataclass(frozen=True)
class Track:
    """One piece of a person's music."""

    mix: Path  # the file with everything in it
    stems: tuple[tuple[str, Path], ...]  # names and files of its voices, if they are known
    split: str  # as the data set's own folders say; empty = to be drawn
    caption: str  # what it says about itself


def survey(folder: Path, progress: bool = True) -> tuple[list[Track], Report]:
    """What a folder of music holds: its tracks, and the report on all its files.

    Raises:
        LmdError: not a folder.
    """
    report, tracks = check_folder(folder, progress), []
    for item in list(_find_tracks(folder, report.accepted)):
        if isinstance(item, Reject):
            report.reject(item.path, item.reason)
        else:
            tracks.append(item)
    return tracks, report


def _find_tracks(folder: Path, accepted: Sequence[Path]) -> Iterator[Track | Reject]:
    """Gather accepted files into tracks; one without a stem or with a torn sidecar is rejected."""
    usable = set(accepted)
    for path in accepted:
        if is_stem(path):
            continue
        try:
            track = _slakh(folder, path) or _musdb(folder, path)
            track = track or Track(path, (), _own_split(folder, path), caption_of(path))
        except json.JSONDecodeError as error:
            yield Reject(path, f"{path.with_suffix('.json').name} is not JSON: {error}")
            continue
        except Exception as error:  # of whatever kind: the other tracks go on
            reason = " ".join(str(error).split())
            yield Reject(path, f"a file that describes it cannot be read: {reason}")
            continue
        lost = [stem.name for _, stem in track.stems if stem not in usable]
        yield Reject(path, f"stems missing or unusable: {', '.join(lost)}") if lost else track


def _slakh(folder: Path, mix: Path) -> Track | None:
    """Slakh2100, BabySlakh: `Track00001/mix.flac`, `stems/S00.flac` …, `metadata.yaml`."""
    stems_folder, about = mix.parent / "stems", mix.parent / "metadata.yaml"
    if mix.stem != "mix" or not stems_folder.is_dir():
        return None
    values: Any = yaml.safe_load(about.read_text(encoding="utf-8")) if about.is_file() else {}
    if not isinstance(values, dict):
        raise yaml.YAMLError(f"{about.name} holds a {type(values).__name__}, expected a mapping")
    listed = values.get("stems") or {}
    files = {p.stem: p for p in sorted(stems_folder.iterdir()) if p.suffix in AUDIO_SUFFIXES}
    stems = []
    for key in sorted(set(files) | set(listed)):
        entry = listed.get(key) or {}
        if entry.get("audio_rendered", True):
            path = files.get(key, stems_folder / f"{key}{mix.suffix}")
            stems.append((str(entry.get("inst_class") or key).lower(), path))
    named = sorted({name for name, _ in stems})
    return Track(mix, tuple(stems), _own_split(folder, mix), caption_of(mix, ", ".join(named)))


def _musdb(folder: Path, mix: Path) -> Track | None:
    """MUSDB18-HQ: `train/Artist - Title/mixture.wav` beside drums, bass, other, vocals."""
    if mix.stem != "mixture":
        return None
    stems = [(name, mix.with_name(name + mix.suffix)) for name in MUSDB_STEMS]
    if not any(path.exists() for _, path in stems):
        return None
    return Track(mix, tuple(stems), _own_split(folder, mix), caption_of(mix))


def _own_split(folder: Path, path: Path) -> str:
    """The split that a data set's own folders name; empty if they name none."""
    parts = [part.lower() for part in path.relative_to(folder).parts[:-1]]
    return next((part for part in parts if part in _SPLIT_FOLDERS), "")


def caption_of(path: Path, otherwise: str = "") -> str:
    """A file's caption: its `.txt`, its `.json`, its tags, `otherwise`, or its folder's name.

    Raises:
        json.JSONDecodeError: there is a JSON sidecar, and it is none.
        LmdError: a sidecar is no text.
    """
    text = path.with_suffix(".txt")
    found = _words(_read_text(text)) if text.is_file() else ""
    found = found or _json_caption(path.with_suffix(".json")) or _words(_tag_caption(path))
    folder = Path(os.path.abspath(path)).parent.name
    return found or _words(otherwise) or _words(folder.replace("_", " ").replace("-", " "))


def _words(text: str) -> str:
    """The words of a text; what UTF-8 cannot hold (half a pair of surrogates) becomes "?"."""
    return " ".join(text.encode(errors="replace").decode().replace("\0", " ").split())


def _read_text(path: Path) -> str:
    """A sidecar's text: UTF-16 where its first bytes say so, else see `decoded`.

    Raises:
        LmdError: it holds NUL, so it is neither.
    """
    data = path.read_bytes()
    is_wide = data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE))
    text = data.decode("utf-16", errors="replace") if is_wide else decoded(data)
    if "\0" in text:
        raise LmdError(f"NUL in {path.name}", "a text in UTF-8", "Save it as UTF-8.")
    return text


def _json_caption(path: Path) -> str:
    """The caption in a JSON sidecar; empty if there is none."""
    if not path.is_file():
        return ""
    values = json.loads(_read_text(path))
    found = [values.get(key) for key in _CAPTION_KEYS] if isinstance(values, dict) else [values]
    return next((words for v in found if isinstance(v, str) and (words := _words(v))), "")


def _tag_caption(path: Path) -> str:
    """Genre, title and comment from a file's tags, without what programs write there."""
    found = tags(path)
    comment = found["comment"]
    words = [found["genre"], found["title"], "" if _ENCODER_WORDS.search(comment) else comment]
    kept = [text for text in words if not _EMPTY_TAG.fullmatch(text)]
    return ", ".join(dict.fromkeys(kept))
