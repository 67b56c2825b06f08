"""Which of a person's own music is trained on, and which is kept for validation and test."""

from collections.abc import Collection, Sequence
from dataclasses import replace

from lmd.data.corpus import Row
from lmd.rng import derive_seed


def with_splits(rows: Sequence[Row], before: Sequence[Row] = ()) -> list[Row]:
    """Rows with a split each: the data set's own, else 1 in 16 validation and 1 in 16 test.

    Chance goes by what a piece sounds like (its first window), not by its name: copies under other
    names share a split. It never leaves nothing to train on, nor, where it can, nothing to
    validate on.

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
    heard: dict[str, str] = {}  # music and its split; what is in several is trained on
    known = [(old_music[p], name) for p, name in old.items()]
    for sound, name in [*known, *((music[p], name) for p, name in split.items())]:
        if heard.get(sound) != "train":
            heard[sound] = name
    sounds = set(music.values())
    heard |= _drawn(sounds - set(heard), [heard[sound] for sound in sounds & set(heard)])
    split = {piece: heard[sound] for piece, sound in music.items()} | split
    return [replace(row, split=split[row.piece_id]) for row in rows]


def _music(rows: Sequence[Row]) -> dict[str, str]:
    """What each piece sounds like: the digest of its first window."""
    return {row.piece_id: row.sha256 for row in reversed(rows)}


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


def copies(rows: Sequence[Row]) -> list[str]:
    """Pieces that sound the same under several names, and their splits, a line each."""
    names: dict[str, list[str]] = {}
    for piece, sound in _music(rows).items():
        names.setdefault(sound, []).append(piece)
    split = {row.piece_id: row.split for row in rows}
    return [
        f"{', '.join(sorted(same))} ({', '.join(sorted({split[piece] for piece in same}))})"
        for same in names.values()
        if len(same) > 1
    ]
