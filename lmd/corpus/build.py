"""Scores rendered into a corpus: the same settings give the same bytes."""

import math
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path

import torch
from tqdm import tqdm

from lmd.corpus.analysis import brightness_hz, find_key, onset_density
from lmd.corpus.captions import caption
from lmd.corpus.instruments import INSTRUMENTS
from lmd.corpus.manifest import (
    COLUMNS,
    SETTINGS,
    Row,
    is_whole,
    new_row,
    write_manifest,
    write_sounds,
)
from lmd.corpus.render import MAX_SECONDS, Rendered, draw_rendition, render
from lmd.corpus.scores import COLLECTIONS, DEFAULT_CACHE, TRAINED_ON, Piece, Shelf, mapped
from lmd.corpus.soundfont import Soundfont
from lmd.corpus.tables import append_log, hold_settings, read_log, read_settings
from lmd.corpus.tones import default_soundfont, shared_bank
from lmd.errors import LmdError
from lmd.outputs import check_apart, check_folder, file_sha256, write_json
from lmd.rng import generator

CORPUS_FORMAT = 1
SAMPLE_RATES = (8_000, 192_000)  # Hz, lowest and highest
STEMS_SHARE = 4  # a rendition's stems take about so many times the room of its mix
FEWEST_SCORES, MOST_SCORES = 3, 32  # parsed at once; so few need no further process


@dataclass(frozen=True)
class BuildSettings:
    """What a corpus depends on; the same settings give the same bytes."""

    seed: int = 0
    sample_rate: int = 22_050
    channels: int = 1
    max_seconds: float = MAX_SECONDS  # longest sound in one file
    soundfont: str = ""  # path; empty = the one inside pretty_midi
    stems: bool = False  # write the stems too (they can be played again at any time)
    collections: tuple[str, ...] = COLLECTIONS

    def check(self) -> None:
        """Refuse a format that no corpus can have, before anything is written in it.

        Raises:
            LmdError: a rate, a number of channels or a longest sound out of range.
        """
        low, high = SAMPLE_RATES
        if not low <= self.sample_rate <= high:
            todo = "22050 is what the shipped weights take."
            raise LmdError(f"--sample-rate {self.sample_rate}", f"{low} … {high} Hz", todo)
        if self.channels not in (1, 2):
            raise LmdError(f"--channels {self.channels}", "1 or 2", "Give one of these.")
        if not 1 <= self.max_seconds < math.inf:
            expected = "1 or more, but not without end"
            raise LmdError(f"--max-seconds {self.max_seconds}", expected, "Give seconds.")


Job = tuple[Piece, int, BuildSettings, Path]  # a rendition, by its number, and where it goes


def plan(shelf: Shelf, hours: float, settings: BuildSettings) -> list[tuple[Piece, int]]:
    """Which renditions make up so many hours: every piece once, shuffled, then every piece again.

    More hours extend the plan; they change nothing of its beginning. Scores are parsed as far as
    they are likely to be needed. Fermatas make it a little longer.

    Raises:
        LmdError: none of the scores can be used.
    """
    chosen: list[tuple[Piece, int]] = []
    seconds, wanted_s, rendition = 0.0, hours * 3600, 0
    while seconds < wanted_s:
        source = generator(settings.seed, "plan", rendition)
        order = [shelf.ids[i] for i in torch.randperm(len(shelf.ids), generator=source).tolist()]
        while order and seconds < wanted_s:
            guess = math.ceil(2 * (wanted_s - seconds) / settings.max_seconds)
            n = min(max(guess, FEWEST_SCORES), MOST_SCORES)
            batch, order = order[:n], order[n:]
            for piece in shelf.pieces(batch):
                how = draw_rendition(piece, rendition, settings.seed, settings.max_seconds)
                seconds += (how.end_quarter - how.start_quarter) * 60 / how.tempo_bpm
                chosen.append((piece, rendition))
                if seconds >= wanted_s:
                    break
        rendition += 1
        if not chosen:
            reasons = list(shelf.rejected.values())[:3]
            raise LmdError(f"no usable score: {reasons}", "at least one", "See --collections.")
    return chosen


def describe(piece: Piece, rendition: int, settings: BuildSettings, sound: Rendered) -> Row:
    """A rendition's row, without its files: what was drawn, and what its notes and sound show."""
    how = draw_rendition(piece, rendition, settings.seed, settings.max_seconds)
    key, mode = find_key(sound.notes[:, 2], sound.notes[:, 1])
    duration_s = sound.wave.shape[-1] / settings.sample_rate
    sources = (piece, how, settings)
    known = {name: getattr(s, name) for s in sources for name in COLUMNS if hasattr(s, name)}
    known |= {
        "name": _row_name(piece, rendition),
        "instruments": "|".join(how.instruments),
        "key": key,
        "mode": mode,
        "density_hz": round(onset_density(sound.notes[:, 0], duration_s), 3),
        "brightness_hz": round(brightness_hz(sound.wave, settings.sample_rate), 1),
    }
    return new_row(**known)


def _row_name(piece: Piece, rendition: int) -> str:
    """The unique name of a rendition, and of its file."""
    return f"{piece.piece_id.replace('/', '__')}__r{rendition}"


def build_row(job: Job) -> Row:
    """Render, write and describe one rendition."""
    piece, rendition, settings, out = job
    how = draw_rendition(piece, rendition, settings.seed, settings.max_seconds)
    bank = shared_bank(settings.soundfont, settings.sample_rate)
    sound = render(piece, how, bank, settings.channels)
    row = describe(piece, rendition, settings, sound)
    row = replace(row, caption=caption(row))
    return write_sounds(out, row, sound.wave, sound.stems if settings.stems else ())


def build_corpus(
    out: Path,
    hours: float,
    settings: BuildSettings | None = None,
    workers: int = 1,
    cache: Path = DEFAULT_CACHE,
) -> list[Row]:
    """Render a corpus of so many hours into `out`; what is already there and whole is kept.

    Raises:
        LmdError: the folder holds a corpus built with other settings.
    """
    settings = settings or BuildSettings()
    settings.check()
    if not 0 < hours < 10_000:
        raise LmdError(f"{hours} hours", "more than 0 and less than 10,000", "Give --hours H.")
    check_apart(out=out, cache=cache)
    n_bytes = int(2 * 3600 * hours * settings.sample_rate) * settings.channels
    check_folder(out, n_bytes * (1 + STEMS_SHARE * settings.stems))
    check_folder(cache)
    shelf = Shelf(settings.collections, cache, workers)
    _hold_settings(out, settings, hours)
    jobs = {
        _row_name(piece, rendition): (piece, rendition, settings, out)
        for piece, rendition in plan(shelf, hours, settings)
    }
    rejected = [{"piece_id": i, "reason": text} for i, text in sorted(shelf.rejected.items())]
    write_json(out / "rejected_scores.json", rejected)
    rows: dict[str, Row] = {}
    log = out / "rows.jsonl"
    for entry in read_log(log):
        if entry.keys() == set(COLUMNS) and is_whole(out, row := Row(**entry)):
            # Of a build, perhaps, that knew fewer versions.
            rows[row.name] = replace(row, split="train") if row.piece_id in TRAINED_ON else row
    missing = [job for name, job in jobs.items() if name not in rows]
    n_done = len(jobs) - len(missing)
    made = mapped(build_row, missing, workers)
    for row in tqdm(made, "rendering", len(jobs), initial=n_done, mininterval=1):
        rows[row.name] = row
        append_log(log, asdict(row))
    # In the order of the plan, then those of an earlier, longer build.
    ordered = [rows[name] for name in dict.fromkeys([*jobs, *rows])]
    write_manifest(out, ordered)
    return ordered


def _hold_settings(out: Path, settings: BuildSettings, hours: float) -> None:
    """Write the corpus's settings, or hold them against those of an earlier run.

    How many hours were asked for is noted too; more may be asked for later.
    """
    soundfont = Path(settings.soundfont) if settings.soundfont else default_soundfont()
    missing = {item.program for item in INSTRUMENTS.values()} - set(Soundfont(soundfont).programs)
    if missing:
        found = f"no programs {sorted(missing)} in {soundfont.name}"
        raise LmdError(found, "a General MIDI set", "Give another --soundfont.")
    path = out / SETTINGS
    if path.is_file():
        hours = max(hours, read_settings(path).get("hours", 0.0))
    values = {field.name: getattr(settings, field.name) for field in fields(BuildSettings)}
    values |= {"format": CORPUS_FORMAT, "hours": hours, "soundfont_sha256": file_sha256(soundfont)}
    hold_settings(path, values, free=("hours",))
