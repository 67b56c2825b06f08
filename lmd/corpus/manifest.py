"""A corpus on disk: a manifest, one WAV per sound, stems stored or played again."""

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import soundfile

from lmd.corpus.render import Rendered, Rendition, draw_rendition, note_times, render
from lmd.corpus.scores import DEFAULT_CACHE, Piece, Split, cached_piece
from lmd.corpus.tables import read_rows, read_settings, write_rows
from lmd.corpus.tones import shared_bank
from lmd.errors import LmdError
from lmd.outputs import file_sha256

MANIFEST = "manifest.csv"
SETTINGS = "corpus.json"
_HEADER_BYTES = 44  # RIFF, fmt and data headers of a plain 16-bit PCM file


@dataclass(frozen=True)
class Row:
    """One rendition (or one window of a person's own music): a line of the manifest."""

    name: str  # unique
    piece_id: str
    composer: str
    title: str
    split: str  # of the piece: pieces, not renditions, are split
    rendition: int  # with the seed: what it was drawn from; 0 for own music
    seed: int
    family: str
    instruments: str  # one per voice, joined by "|"
    tempo_bpm: float  # quarter notes a minute; 0 = not known
    key: str  # it and the mode were found by analysis
    mode: str
    metre: str  # as the score states it
    transposition: int  # semitones
    articulation: str  # it and dynamics: words of `lmd.corpus.render`
    dynamics: str
    density_hz: float  # onsets a second
    brightness_hz: float  # spectral centroid
    duration_s: float
    n_samples: int
    sample_rate: int
    channels: int
    caption: str
    path: str  # of the mix's WAV, relative to the manifest
    stem_paths: str  # of the stored stems, joined by "|"; empty = played again when asked for
    sha256: str  # of the WAV's bytes


COLUMNS: tuple[str, ...] = tuple(field.name for field in fields(Row))


def new_row(**known: Any) -> Row:
    """A row of what is known; the rest is empty or zero."""
    return Row(**{**{field.name: field.type() for field in fields(Row)}, **known})


def write_wav(path: Path, wave: np.ndarray, sample_rate: int) -> None:
    """Write float `[channel, sample]` as 16-bit PCM; the same samples give the same bytes."""
    path.parent.mkdir(parents=True, exist_ok=True)
    data = np.round(np.clip(wave, -1, 1) * 32767).astype(np.int16).T
    partial = path.with_suffix(".tmp")
    soundfile.write(partial, data, sample_rate, "PCM_16", format="WAV")
    partial.replace(path)


def write_sounds(folder: Path, row: Row, wave: np.ndarray, stems: Sequence[np.ndarray]) -> Row:
    """Write a mix and its stems, each `[channel, sample]`; the row with what is to say of them."""
    path = f"audio/{row.name}.wav"
    stem_paths = [f"stems/{row.name}__v{voice}.wav" for voice in range(len(stems))]
    for place, sound in zip((path, *stem_paths), (wave, *stems), strict=True):
        write_wav(folder / place, sound, row.sample_rate)
    return replace(
        row,
        path=path,
        stem_paths="|".join(stem_paths),
        sha256=file_sha256(folder / path),
        n_samples=wave.shape[-1],
        channels=wave.shape[0],
        duration_s=round(wave.shape[-1] / row.sample_rate, 4),
    )


class Corpus:
    """A built corpus. Waves are memory-mapped: a window costs no more than its own samples.

    Args:
        folder: what `lmd data build --out` wrote.
        split: only this split; None = everything.

    Raises:
        LmdError: no manifest there, a torn one, or no row of that split.
    """

    def __init__(self, folder: Path | str, split: Split | None = None) -> None:
        self.folder = Path(folder)
        self.rows = [row for row in read_manifest(self.folder) if split in (None, row.split)]
        if not self.rows:
            found = f"no {split or ''} sound in {self.folder}"
            raise LmdError(found, "at least one", "Build more hours: lmd data build --hours H.")
        self.sample_rate, self.channels = self.rows[0].sample_rate, self.rows[0].channels
        self._maps: dict[str, np.memmap] = {}

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def duration_s(self) -> float:
        """All of it, in seconds."""
        return sum(row.duration_s for row in self.rows)

    def settings(self) -> dict[str, Any]:
        """What the corpus was built with; empty where nothing says so."""
        path = self.folder / SETTINGS
        return read_settings(path) if path.is_file() else {}

    def wave(self, index: int, start: int = 0, n_samples: int | None = None) -> np.ndarray:
        """Samples of a row's mix, float32 `[channel, sample]`, -1 … 1.

        So many from `start` on, None = to the end; beyond the end there is silence.
        """
        pcm = self._map(self.rows[index].path, self.rows[index])
        n_samples = len(pcm) - start if n_samples is None else n_samples
        part = np.asarray(pcm[start : start + n_samples], dtype=np.float32).T / 32767
        return np.pad(part, ((0, 0), (0, n_samples - part.shape[1])))

    def stems(self, index: int, cache: Path = DEFAULT_CACHE) -> np.ndarray:
        """The voices of a row before the limiter, float32 `[voice, channel, sample]`.

        Stored stems are read (16 bit); others are played again, bit for bit as they were.

        Raises:
            LmdError: own music without stems; a score or soundfont that is not as it was.
        """
        row = self.rows[index]
        if row.stem_paths:
            paths = row.stem_paths.split("|")
            return np.stack([self._map(p, row).T.astype(np.float32) / 32767 for p in paths])
        if "soundfont" not in self.settings():
            raise LmdError(f"no stems of {row.name}", "stems stored by --stems", "Build with it.")
        return self.play_again(index, cache).stems

    def without_stems(self) -> list[int]:
        """The rows of which there are no stems: own music that brought none."""
        if "soundfont" in self.settings():
            return []  # scores are played again
        return [index for index, row in enumerate(self.rows) if not row.stem_paths]

    def notes(self, index: int, cache: Path = DEFAULT_CACHE) -> np.ndarray:
        """A row's notes as they were played, float64 `[note, 5]`: see `note_times`.

        Raises:
            LmdError: own music, of which there is no score.
        """
        return note_times(*self._drawn_again(index, cache))

    def play_again(self, index: int, cache: Path = DEFAULT_CACHE) -> Rendered:
        """Render a row once more; the samples are those of the first time.

        Raises:
            LmdError: see `notes`; a soundfont that differs from the one of the build.
        """
        played, settings = self._drawn_again(index, cache), self.settings()
        bank = shared_bank(settings["soundfont"], settings["sample_rate"])
        if file_sha256(bank.soundfont) != settings["soundfont_sha256"]:
            found = f"soundfont {bank.soundfont.name} with other contents"
            raise LmdError(found, "the one of the build", "Restore it, or build the corpus again.")
        return render(*played, bank, settings["channels"])

    def _drawn_again(self, index: int, cache: Path) -> tuple[Piece, Rendition]:
        row, settings = self.rows[index], self.settings()
        if "soundfont" not in settings:
            raise LmdError(f"no score of {row.name}", "a rendered corpus", "Use one.")
        piece = cached_piece(row.piece_id, cache)
        return piece, draw_rendition(piece, row.rendition, row.seed, settings["max_seconds"])

    def _map(self, path: str, row: Row) -> np.ndarray:
        """A WAV's samples, mapped once; the file's length is checked against the manifest."""
        if path not in self._maps:
            file, wanted = self.folder / path, _n_bytes(row)
            size = file.stat().st_size if file.is_file() else 0
            if size != wanted:
                todo = "Run the build again: it makes what is missing or torn."
                raise LmdError(f"{path} with {size} bytes", f"{wanted}, as the manifest says", todo)
            shape = (row.n_samples, row.channels)
            self._maps[path] = np.memmap(file, "<i2", "r", offset=_HEADER_BYTES, shape=shape)
        return self._maps[path]


def _n_bytes(row: Row) -> int:
    """Length of each of a row's WAV files."""
    return _HEADER_BYTES + 2 * row.n_samples * row.channels


def is_whole(folder: Path, row: Row) -> bool:
    """Whether the files of a row, stems among them, are there at full length."""
    paths = [folder / path for path in (row.path, *row.stem_paths.split("|")) if path]
    return all(path.is_file() and path.stat().st_size == _n_bytes(row) for path in paths)


def read_manifest(folder: Path) -> list[Row]:
    """The rows of a corpus, in the order of the plan; `LmdError` if there is no whole manifest."""
    return read_rows(folder / MANIFEST, Row, "lmd data build")


def write_manifest(folder: Path, rows: Sequence[Row]) -> None:
    """Write the manifest in one stroke; a reader sees the old one or the new one."""
    write_rows(folder / MANIFEST, Row, rows)
