"""A handful of held-out renditions, for those who have not built the whole corpus."""

from pathlib import Path

from tqdm import tqdm

from lmd.corpus.build import BuildSettings, build_row
from lmd.corpus.manifest import MANIFEST, Corpus, write_manifest
from lmd.corpus.render import draw_rendition
from lmd.corpus.scores import DEFAULT_CACHE, Shelf
from lmd.errors import LmdError

# Pieces that the split keeps out of training, whatever is built; checked when they are read.
CHORALES = {
    "test": "305 335 342 372 383 427 3.6 8.6 60.5 99.6 153.9 244.32",
    "validation": "255 260 291 298 336 362 363 409",
}
PIECES = {
    split: tuple(f"bach/bwv{number}" for number in numbers.split())
    for split, numbers in CHORALES.items()
}
MAX_SECONDS = 30.0
FIRST_RENDITION = 1000  # far from those of a corpus that is built


def render_held_out(out: Path, per_piece: int = 2, cache: Path = DEFAULT_CACHE) -> Path:
    """Render some test and validation pieces, each played by one family, into a small corpus.

    Args:
        out: its folder; a manifest that is there already is kept.
        per_piece: renditions of each piece, by different families.
        cache: where parsed scores are kept.

    Returns:
        `out`.

    Raises:
        LmdError: a piece is not in the split where it should be.
    """
    if (out / MANIFEST).is_file():
        return out
    settings, rows = BuildSettings(max_seconds=MAX_SECONDS), []
    shelf = Shelf(("bach",), cache)
    jobs = []
    for split, names in PIECES.items():
        for piece in shelf.pieces(names):
            if piece.split != split:
                raise LmdError(f"{piece.piece_id} in {piece.split}", split, "Choose another piece.")
            number, families = FIRST_RENDITION, {"mixed"}
            for _ in range(per_piece):
                while (how := draw_rendition(piece, number, 0, MAX_SECONDS)).family in families:
                    number += 1
                families.add(how.family)
                jobs.append((piece, number, settings, out))
    for job in tqdm(jobs, desc="rendering held-out music", mininterval=1):
        rows.append(build_row(job))
    write_manifest(out, rows)
    return out


def held_out_corpus(folder: Path, otherwise: Path, cache: Path = DEFAULT_CACHE) -> Path:
    """The built corpus in `folder` if it has held-out music enough, else a small one.

    Args:
        folder: where a built corpus may be.
        otherwise: where the small one is rendered.
        cache: where parsed scores are kept.
    """
    try:
        enough = all(len(Corpus(folder, split)) >= 8 for split in ("test", "validation"))
    except LmdError:
        enough = False
    return folder if enough else render_held_out(otherwise, 2, cache)
