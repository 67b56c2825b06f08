"""Real scores as note tables: music21's bundled corpus, parsed once, cached, split by piece."""

import json
import re
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from fractions import Fraction
from functools import cached_property, lru_cache
from multiprocessing import get_context
from pathlib import Path
from typing import Any, Literal, TypeVar
from zipfile import BadZipFile

import numpy as np
import torch
from tqdm import tqdm

from lmd.errors import LmdError
from lmd.outputs import write_atomic
from lmd.rng import derive_seed

R = TypeVar("R")
Note = tuple[float, float, int, int, int]  # onset, duration (quarters), MIDI pitch, voice, fermata
Split = Literal["train", "validation", "test"]
TABLE_FORMAT = 1
DEFAULT_CACHE = Path("data/cache")
MAX_VOICES = 8

# Folders of the music21 corpus whose encodings carry no "all rights reserved"; data/README.md says
# what each of them states and why the others are left out.
COLLECTIONS: tuple[str, ...] = (
    "bach", "beethoven", "ciconia", "corelli", "cpebach", "haydn", "luca", "lusitano",
    "monteverdi", "mozart", "schumann_robert", "weber",
)  # fmt: skip
# Pieces that the draw of `Piece.split` would hold out, and that are trained on all the same, since
# a version of theirs is. `tools/corpus_statistics.py` says which are missing here.
_CHORALES = """
11.6 13.6 31.9 40.3 44.7 69.6-a 70.11 84.5 88.7 93.7 124.6 154.8 157.5 166.6 244.10 244.29-a 244.37
245.11 248.12-2 248.35-3 288 328 392 393 395
"""
TRAINED_ON = frozenset(f"bach/bwv{number}" for number in _CHORALES.split())
_SUFFIXES = (".mxl", ".xml", ".musicxml")
# What music21's readers raise on files that are torn or not what their name says.
_UNREADABLE = (ValueError, LookupError, AttributeError, SyntaxError, OSError, BadZipFile)
_RESERVED = ("all rights reserved", "ut orpheus", "orpheus ediz")


@dataclass(frozen=True)
class Piece:
    """A score as a note table; a piece is what the split and the renditions count."""

    piece_id: str  # collection and file, e.g. `bach/bwv66.6`
    composer: str  # the collection's folder name
    title: str  # as the file states it, else the identifier
    voices: tuple[str, ...]  # one name per voice, highest part first
    metre: str  # the first time signature, e.g. `4/4`
    measures: tuple[float, ...]  # onsets of the bars, in quarter notes
    notes: tuple[Note, ...]

    @cached_property
    def table(self) -> np.ndarray:
        """The notes as a float64 array `[note, 5]`, ordered by onset."""
        return np.array(self.notes, dtype=np.float64).reshape(-1, 5)

    @property
    def quarters(self) -> float:
        """The piece's length in quarter notes."""
        return float((self.table[:, 0] + self.table[:, 1]).max())

    @cached_property
    def group(self) -> str:
        """What is drawn together: pieces whose top voices begin with the same intervals."""
        first = intervals(self.table, voice=0)[:8]
        return ",".join(map(str, first)) if len(first) >= 4 else self.piece_id

    @property
    def split(self) -> Split:
        """The piece's split: 1 in 16 validation, 1 in 16 test, whatever the build's seed.

        But for versions of pieces that are trained on, which are trained on, too.
        """
        if self.piece_id in TRAINED_ON:
            return "train"
        draw = derive_seed(0, "split", self.group) % 16
        return "validation" if draw == 0 else "test" if draw == 1 else "train"


def intervals(table: np.ndarray, voice: int) -> list[int]:
    """Successive intervals of a voice of a note table `[note, 5]`, repeated notes left out."""
    own = table[table[:, 3] == voice]
    steps = np.diff(own[np.argsort(own[:, 0], kind="stable"), 2].astype(int))
    return steps[steps != 0].tolist()


@lru_cache(maxsize=64)
def corpus_files(collections: tuple[str, ...] = COLLECTIONS) -> dict[str, Path]:
    """Identifiers and paths of the scores in some of music21's collections, sorted.

    Raises:
        LmdError: a collection that the installed corpus does not have.
    """
    from music21 import common

    root = Path(common.getCorpusFilePath())
    found: dict[str, Path] = {}
    known = {path.name for path in root.iterdir() if path.is_dir()}
    for name in collections:
        if name not in known:
            raise LmdError(f"collection {name!r}", f"a folder of {root}", "Check the spelling.")
        for path in sorted((root / name).rglob("*")):
            if path.suffix in _SUFFIXES and "_old" not in path.stem:
                relative = path.relative_to(root)
                found.setdefault(relative.with_suffix("").as_posix(), path)
    return dict(sorted(found.items()))


def parse_piece(piece_id: str, path: Path) -> Piece | str:
    """Read one score; the reason if it cannot be used."""
    from music21 import converter, stream
    from music21.exceptions21 import Music21Exception

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            score = converter.parse(path, forceSource=True, storePickle=False)
            if not isinstance(score, stream.Score):
                return f"not a single score but a {type(score).__name__}"
            if score.parts and any(n.transposition for n in score.recurse().getInstruments()):
                score = score.toSoundingPitch()
    except (*_UNREADABLE, Music21Exception) as error:
        return f"music21 cannot read it: {type(error).__name__}: {error}"[:160]
    rights = " ".join(str(value) for _, value in score.metadata.all()).lower()
    if any(word in rights for word in _RESERVED):
        return "its metadata reserve all rights"
    parts = [part for part in score.parts if part.flatten().notes]
    notes = [note for voice, part in enumerate(parts) for note in _part_notes(part, voice)]
    reason = _fault(notes, len(parts))
    if reason:
        return reason
    signatures = parts[0].recurse().getElementsByClass("TimeSignature")
    metadata = score.metadata
    title = (metadata.title or metadata.movementName or "") if metadata else ""
    return Piece(
        piece_id=piece_id,
        composer=piece_id.split("/")[0],
        title=re.sub(r"\.(mxl|xml|musicxml)$", "", str(title)) or piece_id,
        voices=tuple(str(part.partName or f"voice {i + 1}") for i, part in enumerate(parts)),
        metre=signatures[0].ratioString if signatures else "4/4",
        measures=tuple(round(float(m.offset), 6) for m in parts[0].getElementsByClass("Measure")),
        notes=tuple(sorted(notes)),
    )


def _part_notes(part: Any, voice: int) -> Iterable[Note]:
    """The sounding notes of one part: ties joined, grace notes left out."""
    sounding: dict[int, list[Fraction | float]] = {}  # pitch -> [onset, end, fermata]
    for element in part.flatten().notes:
        if element.duration.isGrace or not element.duration.quarterLength:
            continue
        fermata = any(type(mark).__name__ == "Fermata" for mark in element.expressions)
        onset, end = element.offset, element.offset + element.duration.quarterLength
        for single in element.notes if element.isChord else [element]:
            if not hasattr(single, "pitch"):
                continue
            pitch, tie = int(single.pitch.midi), single.tie or element.tie
            open_note = sounding.get(pitch)
            goes_on = tie is not None and tie.type in ("stop", "continue")
            if goes_on and open_note and abs(float(open_note[1] - onset)) < 1e-6:
                open_note[1], open_note[2] = end, max(open_note[2], fermata)
                continue
            if open_note:
                yield _row(open_note, pitch, voice)
            sounding[pitch] = [onset, end, fermata]
    for pitch, open_note in sounding.items():
        yield _row(open_note, pitch, voice)


def _row(note: list[Any], pitch: int, voice: int) -> Note:
    """A finished note in the table's units."""
    onset, end, fermata = note
    return round(float(onset), 6), round(float(end - onset), 6), pitch, voice, int(fermata)


def _fault(notes: list[Note], n_voices: int) -> str | None:
    """Why a note table cannot be used; None if it can."""
    if not notes:
        return "no notes"
    if n_voices > MAX_VOICES:
        return f"{n_voices} parts, more than {MAX_VOICES}"
    table = np.array(notes)
    if not np.isfinite(table).all() or (table[:, 0] < 0).any() or (table[:, 1] <= 0).any():
        return "a note before the beginning or without length"
    if (table[:, 2] < 21).any() or (table[:, 2] > 108).any():
        return "a pitch outside the piano's range"
    ends = [float(table[table[:, 3] == v][:, :2].sum(axis=1).max()) for v in range(n_voices)]
    length = max(ends)
    if length < 12:
        return f"only {length:g} quarter notes long"
    if min(ends) < 0.6 * length:
        return "a part ends before 60 % of the piece (parts out of step)"
    if len(notes) / length < 0.5:
        return "fewer than one note in two quarter notes"
    return None


@lru_cache(maxsize=2048)
def _read_table(path: Path) -> Piece | str:
    """One cached note table, or the reason why there is none."""
    values = json.loads(path.read_text())
    if "rejected" in values:
        return values["rejected"]
    del values["format"]
    for key in ("voices", "measures"):
        values[key] = tuple(values[key])
    values["notes"] = tuple(map(tuple, values["notes"]))
    return Piece(**values)


def _parse_to_cache(job: tuple[str, Path, Path]) -> None:
    """Parse one score into its cache file, or the reason why it cannot be used."""
    piece_id, source, target = job
    result = parse_piece(piece_id, source)
    values = {"rejected": result} if isinstance(result, str) else asdict(result)
    values["format"] = TABLE_FORMAT
    text = json.dumps(values, separators=(",", ":"), sort_keys=True)
    write_atomic(target, text.encode())


class Shelf:
    """The scores of some collections, parsed when they are asked for, once.

    Args:
        collections: folder names of music21's corpus; `LmdError` for one that is not in it.
        cache: where the note tables are kept, one JSON file a piece.
        workers: processes that parse what is not cached yet.
    """

    def __init__(
        self,
        collections: Sequence[str] = COLLECTIONS,
        cache: Path = DEFAULT_CACHE,
        workers: int = 1,
    ) -> None:
        from music21 import __version__

        self.files = corpus_files(tuple(collections))
        self.ids = tuple(self.files)
        self.rejected: dict[str, str] = {}  # reasons by name
        self._folder = cache / f"scores-{TABLE_FORMAT}-music21-{__version__}"
        self._workers = workers

    def pieces(self, piece_ids: Sequence[str]) -> list[Piece]:
        """The usable ones among some pieces, in their order; the others join `rejected`."""
        paths = {i: self._folder / f"{i.replace('/', '__')}.json" for i in piece_ids}
        jobs = [(i, self.files[i], path) for i, path in paths.items() if not path.is_file()]
        if jobs:
            parsed = mapped(_parse_to_cache, jobs, self._workers if len(jobs) > 3 else 1)
            list(tqdm(parsed, "parsing scores", len(jobs), mininterval=1))
        tables = {piece_id: _read_table(path) for piece_id, path in paths.items()}
        self.rejected |= {i: found for i, found in tables.items() if isinstance(found, str)}
        return [found for found in tables.values() if isinstance(found, Piece)]


def cached_piece(piece_id: str, cache: Path = DEFAULT_CACHE) -> Piece:
    """One piece, from the cache or from its score.

    Raises:
        LmdError: no such piece in the installed corpus, or one that is rejected.
    """
    shelf = Shelf((piece_id.split("/")[0],), cache)
    if piece_id not in shelf.files:
        raise LmdError(f"piece {piece_id!r}", "one of the installed corpus", "Check its name.")
    for piece in shelf.pieces([piece_id]):
        return piece
    found = f"piece {piece_id!r}: {shelf.rejected[piece_id]}"
    raise LmdError(found, "a usable score", "Take another.")


def mapped(
    function: Callable[[Any], R], jobs: Sequence[Any], workers: int, threads: int = 0
) -> Iterator[R]:
    """`map`, in `workers` processes if there are several, with `threads` of PyTorch each."""
    if workers <= 1 or len(jobs) < 2:
        yield from map(function, jobs)
        return
    start = (torch.set_num_threads, (threads,)) if threads else (None, ())
    with ProcessPoolExecutor(workers, get_context("spawn"), *start) as pool:
        yield from pool.map(function, jobs, chunksize=4 if len(jobs) > 16 * workers else 1)
