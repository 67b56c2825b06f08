"""Fill the counts of `data/README.md` in, from the scores: `python tools/corpus_statistics.py`.

It also looks for versions of held-out pieces among those that are trained on, and says there which
are most alike. A chorale returns with an ornament, an upbeat, another metre.

A figure is eight successive intervals of one voice, repeated notes left out, so that neither key
nor rhythm matters. Two pieces are versions of one another if half of the figures of some voice of
either are in the other, in whatever voice. Versions with an ornament in every phrase escape this.
"""

import argparse
import sys
from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
from tqdm import tqdm

from lmd.corpus.scores import (
    COLLECTIONS,
    DEFAULT_CACHE,
    TRAINED_ON,
    Piece,
    Shelf,
    intervals,
)
from lmd.errors import LmdError

BEGIN, END = "<!-- begin counts -->\n", "<!-- end counts -->"
README = Path("data/README.md")
FIGURE = 8  # intervals
FEWEST_FIGURES = 10  # of a voice that is asked for; a shorter one says little
VERSION = 0.5  # share of a voice's figures

Figures = list[set[tuple[int, ...]]]  # of each voice


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


def counts_table(
    pieces: Sequence[Piece],
    rejected: Sequence[str],
    collections: Sequence[str] = COLLECTIONS,
) -> str:
    """A Markdown table: pieces, rejects, notes and splits of collections, and of all of them."""
    lines = ["| collection | pieces | left out | notes | train | validation | test |"]
    lines.append("|---|--:|--:|--:|--:|--:|--:|")
    for name in (*collections, "all"):
        own = [p for p in pieces if name in (p.composer, "all")]
        out = [piece_id for piece_id in rejected if name in (piece_id.split("/")[0], "all")]
        splits = Counter(piece.split for piece in own)
        values = [len(own), len(out), sum(len(p.notes) for p in own)]
        values += [splits[split] for split in ("train", "validation", "test")]
        lines.append(f"| {name} | " + " | ".join(f"{value:,}" for value in values) + " |")
    return "\n".join(lines) + "\n"


def held_out_like(pieces: Sequence[Piece]) -> str:
    """A line: which held-out piece is most like one that is trained on.

    Raises:
        LmdError: it is a version of that piece.
    """
    found = {piece.piece_id: figures(piece.table) for piece in tqdm(pieces, "figures", delay=2)}
    held, trained = (
        [piece.piece_id for piece in pieces if (piece.split == "train") == is_trained_on]
        for is_trained_on in (False, True)
    )
    near = nearest(held, trained, found)
    versions = [f"{name} ({near[name][1]})" for name in near if near[name][0] >= VERSION]
    if versions:
        raise LmdError(
            f"held out, though a version is trained on: {', '.join(sorted(versions))}",
            f"less than {VERSION:.0%} of a voice's figures in common",
            "Add them to TRAINED_ON in lmd/corpus/scores.py.",
        )
    (share, other), name = max((value, name) for name, value in near.items())
    n_moved = sum(piece.piece_id in TRAINED_ON for piece in pieces)
    return (
        f"Trained on as versions of others: {n_moved} pieces. Most alike of what is held "
        f"out and trained on now: {name} and {other}, {share:.0%} of a voice's figures.\n"
    )


def filled(text: str, counts: str) -> str:
    """The README's text with these lines between its markers."""
    head, rest = text.split(BEGIN)
    return head + BEGIN + counts + END + rest.split(END, 1)[1]


def main(argv: list[str] | None = None) -> int:
    """Write the counts, or (`--check`) return 1 if they are not what the scores give.

    Raises:
        LmdError: see `held_out_like`.
    """
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true")
    parser.add_argument("--workers", type=int, default=1)
    args = parser.parse_args(argv)
    before = README.read_text()
    shelf = Shelf(COLLECTIONS, DEFAULT_CACHE, args.workers)
    pieces, rejected = shelf.pieces(shelf.ids), list(shelf.rejected)
    counts = f"{counts_table(pieces, rejected)}\n{held_out_like(pieces)}"
    after = filled(before, counts)
    if not args.check:
        README.write_text(after)
    return int(args.check and before != after)


if __name__ == "__main__":
    sys.exit(main())
