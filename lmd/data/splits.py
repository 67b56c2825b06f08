"""Which of a person's own music is trained on, and which is kept for validation and test."""

import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import PurePosixPath

from lmd.corpus.manifest import Row
from lmd.rng import derive_seed

# Words of a file's name: a part of a song, or all of it.
_PARTS = re.compile(
    r"acapella|accompaniment|backing|bass|brass|choir|click|drums?|guitars?|hats|horns|keyboards?|"
    r"instrumental|keys|kick|lead|other|percussion|piano|rhythm|snare|solo|stem|strings|synths?|"
    r"toms|vocals?|voices?|vox"
)
_WHOLES = re.compile("full|master|mix|mixdown|mixture|song")


def with_splits(rows: Sequence[Row], before: Sequence[Row] = ()) -> list[Row]:
    """Rows with a split each: the data set's own, else 1 in 16 validation and 1 in 16 test.

    Chance goes by what a piece sounds like (its first window), not by its name: copies under other
    names share a split, and so do a song and its stems that lie side by side. It never leaves
    nothing to train on, nor, where it can, nothing to validate on.

    Args:
        rows: all windows; `split` is empty where it is to be drawn.
        before: the manifest as it was. A piece that is in there and sounds as it did keeps its
            split; one that is new, or has another name now, but sounds like one in there gets the
            same. So copies that an earlier version put into several splits stay there.
    """
    music, split = _music(rows), {row.piece_id: row.split for row in rows if row.split}
    old_music, old = _music(before), {row.piece_id: row.split for row in before}
    for piece, sound in music.items():
        if old_music.get(piece) == sound:
            split.setdefault(piece, old[piece])
    group = _groups(music)
    known = [(group.get(old_music[p], old_music[p]), name) for p, name in old.items()]
    known += [(group[music[p]], name) for p, name in split.items()]
    split_of: dict[str, str] = {}  # a group's; what is in several is trained on
    for sounds, name in known:
        if split_of.get(sounds) != "train":
            split_of[sounds] = name
    present = set(group.values())
    split_of |= _drawn(present - set(split_of), [split_of[s] for s in present & set(split_of)])
    split = {piece: split_of[group[sound]] for piece, sound in music.items()} | split
    return [replace(row, split=split[row.piece_id]) for row in rows]


def _music(rows: Sequence[Row]) -> dict[str, str]:
    """What each piece sounds like: the digest of its first window."""
    return {row.piece_id: row.sha256 for row in reversed(rows)}


def _groups(music: Mapping[str, str]) -> dict[str, str]:
    """The group of every sound, named after one of it: what belongs to one song shares a group."""
    group = {sound: sound for sound in music.values()}
    songs: dict[str, list[str]] = {}
    for piece, song in songs_of(music).items():
        songs.setdefault(song, []).append(music[piece])
    for sounds in songs.values():
        same = {group[sound] for sound in sounds}
        if len(same) > 1:
            first = min(same)
            group = {sound: first if name in same else name for sound, name in group.items()}
    return group


def songs_of(pieces: Collection[str]) -> dict[str, str]:
    """Which song each path belongs to, by its name without the words for parts of a song.

    `song.ogg` and `guitar.ogg` in one folder are one song, so are `Air.ogg` and `Air (vocals).ogg`;
    so is a single file beside others that are named after instruments alone.
    """
    songs, parts, wholes = {}, set(), {}
    for piece in pieces:
        path = PurePosixPath(piece)
        words = [word for word in re.split(r"[\W_]+", path.stem.lower()) if word]
        is_part = any(map(_PARTS.fullmatch, words))
        rest = [word for word in words if not (_PARTS.fullmatch(word) or _WHOLES.fullmatch(word))]
        if is_part and rest and rest[0].isdigit():
            rest = rest[1:]  # the number of a track
        songs[piece] = f"{path.parent}/{' '.join(rest)}"
        if is_part and not rest:
            parts.add(songs[piece])
        else:
            wholes.setdefault(f"{path.parent}/", set()).add(songs[piece])
    for song in parts:
        if len(wholes.get(song, ())) == 1:
            (whole,) = wholes[song]
            songs = {piece: whole if name == song else name for piece, name in songs.items()}
    return songs


def _drawn(sounds: Collection[str], taken: Collection[str]) -> dict[str, str]:
    """A split by chance for each of some sounds, beside the splits that others have."""
    values = {sound: derive_seed(0, "split", sound) for sound in sounds}
    names = {0: "validation", 1: "test"}
    splits = {sound: names.get(value % 16, "train") for sound, value in values.items()}
    in_order = sorted(values, key=lambda sound: values[sound])

    def n_with(split: str) -> int:
        return [*taken, *splits.values()].count(split)

    if in_order and not n_with("train"):
        splits[in_order[-1]] = "train"
    spare = [sound for sound in in_order if splits[sound] != "train" or n_with("train") > 1]
    if spare and not n_with("validation"):
        splits[spare[0]] = "validation"
    return splits


def copies(rows: Sequence[Row]) -> Iterator[str]:
    """A line for each sound that has several names: the names, and their splits."""
    split, names = {row.piece_id: row.split for row in rows}, {}
    for piece, sound in _music(rows).items():
        names.setdefault(sound, []).append(piece)
    for same in names.values():
        if len(same) > 1:
            splits = sorted({split[piece] for piece in same})
            yield f"the same music  {', '.join(sorted(same))} ({', '.join(splits)})"
