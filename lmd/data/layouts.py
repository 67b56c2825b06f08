"""How music lies in a folder: plain files, Slakh2100, MUSDB18; and what it is called."""

import codecs
import json
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from lmd.data.sound_files import AUDIO_SUFFIXES, decoded, tags
from lmd.errors import LmdError

MUSDB_STEMS = ("drums", "bass", "other", "vocals")
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


def is_stem(path: Path) -> bool:
    """Whether a file lies where Slakh2100 or MUSDB18 keep stems; those may be silent."""
    if path.stem in MUSDB_STEMS:
        return path.with_name("mixture" + path.suffix).is_file()
    beside = path.parent.parent.glob("mix.*") if path.parent.name == "stems" else ()
    return any(mix.stem == "mix" and mix.suffix.lower() in AUDIO_SUFFIXES for mix in beside)


def track_of(folder: Path, mix: Path) -> Track:
    """A file with its stems, if it lies as in a data set that has them.

    MUSDB18-HQ: `train/Artist - Title/mixture.wav` beside drums, bass, other, vocals.
    """
    stems, otherwise = [], ""
    if mix.stem == "mix" and (mix.parent / "stems").is_dir():
        stems = _slakh_stems(mix)
        otherwise = ", ".join(sorted({name for name, _ in stems}))
    elif mix.stem == "mixture":
        stems = [(name, mix.with_name(name + mix.suffix)) for name in MUSDB_STEMS]
        stems = stems if any(path.exists() for _, path in stems) else []
    parts = [part.lower() for part in mix.relative_to(folder).parts[:-1]]
    split = next((part for part in parts if part in _SPLIT_FOLDERS), "")
    return Track(mix, tuple(stems), split, caption_of(mix, otherwise))


def _slakh_stems(mix: Path) -> list[tuple[str, Path]]:
    """Slakh2100, BabySlakh: `Track00001/mix.flac`, `stems/S00.flac` …, `metadata.yaml`."""
    folder, about = mix.parent / "stems", mix.parent / "metadata.yaml"
    values: Any = yaml.safe_load(about.read_text(encoding="utf-8")) if about.is_file() else {}
    if not isinstance(values, dict):
        raise yaml.YAMLError(f"{about.name} holds a {type(values).__name__}, expected a mapping")
    listed = values.get("stems") or {}
    files = {path.stem: path for path in folder.iterdir() if path.suffix in AUDIO_SUFFIXES}
    stems = []
    for key in sorted(set(files) | set(listed)):
        entry = listed.get(key) or {}
        if entry.get("audio_rendered", True):
            path = files.get(key, folder / f"{key}{mix.suffix}")
            stems.append((str(entry.get("inst_class") or key).lower(), path))
    return stems


def caption_of(path: Path, otherwise: str = "") -> str:
    """A file's caption: its `.txt`, its `.json`, its tags, `otherwise`, or its folder's name.

    Raises:
        LmdError: a sidecar is no text, or the JSON one no JSON.
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
    try:
        values = json.loads(_read_text(path))
    except json.JSONDecodeError as error:
        raise LmdError(f"{path.name} is not JSON: {error}", "JSON", "Repair it.") from error
    found = [values.get(key) for key in _CAPTION_KEYS] if isinstance(values, dict) else [values]
    return next((words for v in found if isinstance(v, str) and (words := _words(v))), "")


def _tag_caption(path: Path) -> str:
    """Genre, title and comment from a file's tags, without what programs write there."""
    found = tags(path)
    comment = found["comment"]
    words = [found["genre"], found["title"], "" if _ENCODER_WORDS.search(comment) else comment]
    kept = [text for text in words if not _EMPTY_TAG.fullmatch(text)]
    return ", ".join(dict.fromkeys(kept))
