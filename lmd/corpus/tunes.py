"""Which scores share a tune: a chorale returns with an ornament, an upbeat, another metre.

A figure is eight successive intervals of one voice, repeated notes left out, so that neither key
nor rhythm matters. Two pieces are versions of one another if half of the figures of some voice of
either are in the other, in whatever voice. Versions with an ornament in every phrase escape this.
"""

from collections.abc import Collection, Iterator, Mapping

import numpy as np

FIGURE = 8  # intervals
FEWEST_FIGURES = 10  # of a voice that is asked for; a shorter one says little
VERSION = 0.5  # share of a voice's figures

# Pieces that the draw of `Piece.split` would hold out, and that are trained on all the same, since
# a version of theirs is; `lmd.corpus.about` compares all pieces and says which are missing.
_CHORALES = """
11.6 13.6 31.9 40.3 44.7 69.6-a 70.11 84.5 88.7 93.7 124.6 154.8 157.5 166.6 244.10 244.29-a 244.37
245.11 248.12-2 248.35-3 288 328 392 393 395
"""
TRAINED_ON = frozenset(f"bach/bwv{number}" for number in _CHORALES.split())

Figures = list[set[tuple[int, ...]]]  # of each voice


def intervals(table: np.ndarray, voice: int) -> list[int]:
    """Successive intervals of a voice of a note table `[note, 5]`, repeated notes left out."""
    own = table[table[:, 3] == voice]
    steps = np.diff(own[np.argsort(own[:, 0], kind="stable"), 2].astype(int))
    return steps[steps != 0].tolist()


def figures(table: np.ndarray) -> Figures:
    """The figures of the voices of a note table `[note, 5]`, see `Piece.table`."""
    found: Figures = []
    for voice in np.unique(table[:, 3]):
        steps = intervals(table, voice)
        found.append({tuple(steps[i : i + FIGURE]) for i in range(len(steps) - FIGURE + 1)})
    return found


def shared(a: Figures, b: Figures) -> float:
    """The largest share of a voice's figures, of either piece, that are in the other piece."""
    return max((*_shares(a, b), *_shares(b, a)), default=0.0)


def _shares(voices: Figures, other: Figures) -> Iterator[float]:
    everywhere = set().union(*other)
    for voice in voices:
        if len(voice) >= FEWEST_FIGURES:
            yield len(voice & everywhere) / len(voice)


def nearest(
    wanted: Collection[str], among: Collection[str], found: Mapping[str, Figures]
) -> dict[str, tuple[float, str]]:
    """For each of some pieces the one among others that shares most, and how much."""
    near: dict[str, tuple[float, str]] = {}
    for name in wanted:
        shares = [(shared(found[name], found[other]), other) for other in among]
        near[name] = max(shares, default=(0.0, ""))
    return near
