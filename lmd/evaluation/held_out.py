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
PIECES = {split: [f"bach/bwv{n}" for n in ns.split()] for split, ns in CHORALES.items()}
MAX_SECONDS = 30.0
FIRST_RENDITION = 1000  # far from those of a corpus that is built


def render_held_out(out: Path, cache: Path = DEFAULT_CACHE) -> Path:
    """Render some held-out pieces, each by two families, into a folder unless it is a corpus.

    Raises:
        LmdError: a piece is not in the split where it should be.
    """
    if (out / MANIFEST).is_file():
        return out
    shelf, settings, jobs = Shelf(("bach",), cache), BuildSettings(max_seconds=MAX_SECONDS), []
    for split, names in PIECES.items():
        for piece in shelf.pieces(names):
            if piece.split != split:
                raise LmdError(f"{piece.piece_id} in {piece.split}", split, "Choose another piece.")
            number, families = FIRST_RENDITION, {"mixed"}
            for _ in range(2):
                while (how := draw_rendition(piece, number, 0, MAX_SECONDS)).family in families:
                    number += 1
                families.add(how.family)
                jobs.append((piece, number, settings, out))
    shown = tqdm(jobs, desc="rendering held-out music", mininterval=1)
    write_manifest(out, [build_row(job) for job in shown])
    return out


def held_out_corpus(folder: Path, otherwise: Path, cache: Path = DEFAULT_CACHE) -> Path:
    """The built corpus in `folder` if it has held-out music enough, else a small one."""
    try:
        if all(len(Corpus(folder, split)) >= 8 for split in ("test", "validation")):
            return folder
    except LmdError:
        pass
    return render_held_out(otherwise, cache)
