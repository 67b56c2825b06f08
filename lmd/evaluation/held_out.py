"""A handful of held-out renditions, for those who have not built the whole corpus."""

from pathlib import Path

from tqdm import tqdm

from lmd.corpus.build import BuildSettings, build_row
from lmd.corpus.manifest import MANIFEST, Corpus, write_manifest
from lmd.corpus.render import draw_rendition
from lmd.corpus.scores import DEFAULT_CACHE, Shelf
from lmd.errors import LmdError

# Pieces that the split keeps out of training, whatever is built (a test holds them to it).
CHORALES = {
    "test": "305 335 342 372 383 427 3.6 8.6 60.5 99.6 153.9 244.32",
    "validation": "255 260 291 298 336 362 363 409",
}
PIECES = {split: [f"bach/bwv{n}" for n in ns.split()] for split, ns in CHORALES.items()}
MAX_SECONDS = 30.0
FIRST_RENDITION = 1000  # far from those of a corpus that is built


def held_out_corpus(folder: Path, otherwise: Path, cache: Path = DEFAULT_CACHE) -> Path:
    """The built corpus in `folder` if it has held-out music enough, else a small one, made once."""
    try:
        if all(len(Corpus(folder, split)) >= 8 for split in ("test", "validation")):
            return folder
    except LmdError:
        pass
    if not (otherwise / MANIFEST).is_file():
        render_held_out(otherwise, cache)
    return otherwise


def render_held_out(out: Path, cache: Path) -> None:
    """Render the held-out pieces, each by two families, into a corpus."""
    shelf, settings, jobs = Shelf(("bach",), cache), BuildSettings(max_seconds=MAX_SECONDS), []
    for piece in shelf.pieces([name for names in PIECES.values() for name in names]):
        number, families = FIRST_RENDITION, {"mixed"}
        for _ in range(2):
            while (how := draw_rendition(piece, number, 0, MAX_SECONDS)).family in families:
                number += 1
            families.add(how.family)
            jobs.append((piece, number, settings, out))
    shown = tqdm(jobs, desc="rendering held-out music", mininterval=1)
    write_manifest(out, [build_row(job) for job in shown])
