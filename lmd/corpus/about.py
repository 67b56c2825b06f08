"""Fill the counts of `data/README.md` in, from the scores: `python -m lmd.corpus.about`.

It also looks for versions of held-out pieces among those that are trained on, and says there which
are most alike.
"""

import argparse
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from tqdm import tqdm

from lmd.corpus.scores import COLLECTIONS, DEFAULT_CACHE, Piece, Rejected, load_scores
from lmd.corpus.tunes import TRAINED_ON, VERSION, figures, nearest
from lmd.errors import LmdError

BEGIN, END = "<!-- begin counts -->\n", "<!-- end counts -->"
README = Path("data/README.md")


def counts_table(
    pieces: Sequence[Piece],
    rejected: Sequence[Rejected],
    collections: Sequence[str] = COLLECTIONS,
) -> str:
    """A Markdown table: pieces, rejects, notes and splits of collections, and of all of them."""
    lines = ["| collection | pieces | left out | notes | train | validation | test |"]
    lines.append("|---|--:|--:|--:|--:|--:|--:|")
    for name in (*collections, "all"):
        own = [p for p in pieces if name in (p.composer, "all")]
        out = [r for r in rejected if name in (r.piece_id.split("/")[0], "all")]
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
            "Add them to TRAINED_ON in lmd/corpus/tunes.py.",
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
    pieces, rejected = load_scores(COLLECTIONS, DEFAULT_CACHE, args.workers)
    counts = f"{counts_table(pieces, rejected)}\n{held_out_like(pieces)}"
    after = filled(before, counts)
    if not args.check:
        README.write_text(after)
    return int(args.check and before != after)


if __name__ == "__main__":
    sys.exit(main())
