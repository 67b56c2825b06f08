"""Fill the counts of `data/README.md` in, from the scores: `python -m lmd.data.about`."""

import argparse
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from lmd.data.scores import COLLECTIONS, DEFAULT_CACHE, load_scores

BEGIN, END = "<!-- begin counts -->\n", "<!-- end counts -->"
README = Path("data/README.md")


def counts_table(
    cache: Path = DEFAULT_CACHE, workers: int = 1, collections: Sequence[str] = COLLECTIONS
) -> str:
    """A Markdown table: pieces, rejects, notes and splits of collections, and of all of them."""
    pieces, rejected = load_scores(collections, cache, workers)
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


def filled(text: str, table: str) -> str:
    """The README's text with the table between its markers."""
    head, rest = text.split(BEGIN)
    return head + BEGIN + table + END + rest.split(END, 1)[1]


def main(argv: list[str] | None = None) -> int:
    """Write the counts, or (`--check`) return 1 if they are not what the scores give."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true")
    parser.add_argument("--workers", type=int, default=1)
    args = parser.parse_args(argv)
    before = README.read_text()
    after = filled(before, counts_table(workers=args.workers))
    if not args.check:
        README.write_text(after)
    return int(args.check and before != after)


if __name__ == "__main__":
    sys.exit(main())
