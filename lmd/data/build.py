"""`python -m lmd data build`: the score corpus rendered, or a folder of audio taken in."""

import argparse
import hashlib
import json
import math
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, replace
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from lmd.corpus.analysis import brightness_hz, find_key, onset_density
from lmd.corpus.captions import Described, caption, stem_caption
from lmd.corpus.draw import Draw, QuickDraw
from lmd.corpus.render import MAX_SECONDS, Rendered, draw_rendition, render
from lmd.corpus.scores import COLLECTIONS, DEFAULT_CACHE, Piece, Shelf
from lmd.corpus.tones import ToneBank, default_soundfont, file_sha256, shared_bank
from lmd.corpus.tunes import TRAINED_ON
from lmd.data.corpus import SETTINGS, Row, check_format, is_whole, write_manifest, write_wav
from lmd.data.places import check_folder_free
from lmd.errors import LmdError
from lmd.rng import generator

CORPUS_FORMAT = 1
FEWEST_SCORES, MOST_SCORES = 3, 32  # parsed at once; so few need no further process


@dataclass(frozen=True)
class BuildSettings:
    """What a rendered corpus depends on; the same settings give the same bytes.

    Raises:
        LmdError: a value out of range.
    """

    seed: int = 0
    sample_rate: int = 22_050
    channels: int = 1
    max_seconds: float = MAX_SECONDS
    soundfont: str = ""  # path; empty = the one inside pretty_midi
    stems: bool = False  # write the stems too (they can be played again at any time)
    collections: tuple[str, ...] = COLLECTIONS

    def __post_init__(self) -> None:
        check_format(self.sample_rate, self.channels, self.max_seconds)


def plan(shelf: Shelf, hours: float, settings: BuildSettings) -> list[tuple[Piece, int]]:
    """Which renditions make up so many hours: every piece once, shuffled, then every piece again.

    More hours extend the plan; they change nothing of its beginning. Scores are parsed as far as
    they are likely to be needed.

    Args:
        shelf: the scores.
        hours: at least this much at the written tempo (fermatas make it a little longer).
        settings: for the seed and the longest excerpt.

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
            reasons = [item.reason for item in shelf.rejected.values()]
            raise LmdError(f"no usable score: {reasons[:3]}", "at least one", "See --collections.")
    return chosen


def row_name(piece: Piece, rendition: int) -> str:
    """The unique name of a rendition, and of its file."""
    return f"{piece.piece_id.replace('/', '__')}__r{rendition}"


def describe(piece: Piece, rendition: int, settings: BuildSettings, sound: Rendered) -> Described:
    """The facts of a rendition: what was drawn, and what is found in its notes and sound."""
    how = draw_rendition(piece, rendition, settings.seed, settings.max_seconds)
    tonic, mode = find_key(sound.notes[:, 2], sound.notes[:, 1])
    duration_s = sound.wave.shape[-1] / settings.sample_rate
    return Described(
        composer=piece.composer,
        family=how.family,
        instruments=how.instruments,
        tempo_bpm=how.tempo_bpm,
        tonic=tonic,
        mode=mode,
        metre=piece.metre,
        density_hz=round(onset_density(sound.notes[:, 0], duration_s), 3),
        brightness_hz=round(brightness_hz(sound.wave, settings.sample_rate), 1),
        articulation=how.articulation,
        dynamics=how.dynamics,
    )


def build_row(job: tuple[Piece, int, BuildSettings, Path]) -> Row:
    """Render, write and describe one rendition."""
    piece, rendition, settings, out = job
    how = draw_rendition(piece, rendition, settings.seed, settings.max_seconds)
    bank = shared_bank(settings.soundfont, settings.sample_rate)
    sound = render(piece, how, bank, settings.channels)
    about = describe(piece, rendition, settings, sound)
    name = row_name(piece, rendition)
    path = f"audio/{name}.wav"
    write_wav(out / path, sound.wave, settings.sample_rate)
    stem_paths = []
    if settings.stems:
        for voice, stem in enumerate(sound.stems):
            stem_paths.append(f"stems/{name}__v{voice}.wav")
            write_wav(out / stem_paths[-1], stem, settings.sample_rate)
    return Row(
        name=name,
        piece_id=piece.piece_id,
        composer=piece.composer,
        title=piece.title,
        split=piece.split,
        rendition=rendition,
        seed=settings.seed,
        family=how.family,
        instruments="|".join(how.instruments),
        tempo_bpm=how.tempo_bpm,
        key=about.tonic,
        mode=about.mode,
        metre=piece.metre,
        transposition=how.transposition,
        articulation=how.articulation,
        dynamics=how.dynamics,
        density_hz=about.density_hz,
        brightness_hz=about.brightness_hz,
        duration_s=round(sound.wave.shape[-1] / settings.sample_rate, 4),
        n_samples=sound.wave.shape[-1],
        sample_rate=settings.sample_rate,
        channels=settings.channels,
        caption=caption(about, Draw(settings.seed, "caption", piece.piece_id, rendition)),
        path=path,
        stem_paths="|".join(stem_paths),
        sha256=hashlib.sha256((out / path).read_bytes()).hexdigest(),
    )


def described(row: Row) -> Described:
    """The facts of a rendition, from its row."""
    return Described(
        row.composer, row.family, tuple(row.instruments.split("|")), row.tempo_bpm, row.key,
        row.mode, row.metre, row.density_hz, row.brightness_hz, row.articulation, row.dynamics,
    )  # fmt: skip


def row_stem_caption(row: Row, voice: int) -> str:
    """The caption of one voice of a rendition."""
    draw = Draw(row.seed, "caption", row.piece_id, row.rendition)
    return stem_caption(described(row), voice, draw)


def further_captions(row: Row, n: int) -> list[str]:
    """Up to `n` other captions of a rendition; none of someone's own music, which says its own."""
    if not row.articulation:
        return []
    about = described(row)
    draws = (QuickDraw(row.seed, "caption", row.piece_id, row.rendition, k) for k in range(n))
    said = [caption(about, draw) for draw in draws]
    return [text for text in dict.fromkeys(said) if text != row.caption]


def build_corpus(
    out: Path,
    hours: float,
    settings: BuildSettings | None = None,
    workers: int = 1,
    cache: Path = DEFAULT_CACHE,
) -> list[Row]:
    """Render a corpus; what is already there and whole is kept.

    Args:
        out: the folder to fill.
        hours: how much music.
        settings: seed, format, soundfont, scores.
        workers: processes.
        cache: where parsed scores are kept.

    Returns:
        The manifest's rows.

    Raises:
        LmdError: the folder holds a corpus built with other settings, or cannot be written.
    """
    settings = settings or BuildSettings()
    if not 0 < hours < 10_000:
        raise LmdError(f"{hours} hours", "more than 0 and less than 10,000", "Give --hours H.")
    check_folder_free(out)
    shelf = Shelf(settings.collections, cache, workers)
    _check_settings(out, settings, hours)
    jobs = [(piece, rendition, settings, out) for piece, rendition in plan(shelf, hours, settings)]
    rejected = [asdict(item) for item in sorted(shelf.rejected.values(), key=lambda r: r.piece_id)]
    (out / "rejected_scores.json").write_text(json.dumps(rejected, indent=1) + "\n")
    rows: dict[str, Row] = {}
    with (out / "rows.jsonl").open("a+") as log:
        for row in _finished(log, out):  # of a build, perhaps, that knew fewer versions
            rows[row.name] = replace(row, split="train") if row.piece_id in TRAINED_ON else row
        missing = [job for job in jobs if row_name(job[0], job[1]) not in rows]
        with tqdm(
            total=len(jobs), initial=len(jobs) - len(missing), desc="rendering", mininterval=1
        ) as bar:
            for count, row in enumerate(_rendered(missing, workers), 1):
                rows[row.name] = row
                log.write(json.dumps(asdict(row), sort_keys=True) + "\n")
                log.flush()
                bar.update()
                if count % 100 == 0:
                    write_manifest(out, _in_order(jobs, rows))
    ordered = _in_order(jobs, rows)
    write_manifest(out, ordered)
    return ordered


def _in_order(jobs: Sequence[tuple[Piece, int, Any, Any]], rows: dict[str, Row]) -> list[Row]:
    """The finished rows in the order of the plan, then those of an earlier, longer build."""
    planned = [row_name(job[0], job[1]) for job in jobs]
    extra = set(rows) - set(planned)
    return [rows[name] for name in [*planned, *(n for n in rows if n in extra)] if name in rows]


def _finished(log: Any, out: Path) -> Iterator[Row]:
    """Rows of an earlier run whose files are there at full length."""
    log.seek(0)
    for line in log.read().splitlines():
        try:
            row = Row(**json.loads(line))
        except (json.JSONDecodeError, TypeError):
            continue  # the line that an interruption tore; its rendition is made again
        if is_whole(out, row):
            yield row


def _rendered(jobs: list[Any], workers: int) -> Iterator[Row]:
    """Rows in the order of the jobs, from one process or several."""
    if workers <= 1 or len(jobs) < 2:
        yield from map(build_row, jobs)
        return
    with ProcessPoolExecutor(workers, mp_context=get_context("spawn")) as pool:
        yield from pool.map(build_row, jobs, chunksize=4)


def _check_settings(out: Path, settings: BuildSettings, hours: float) -> None:
    """Write the corpus's settings, or hold them against those of an earlier run.

    How many hours were asked for is noted too; more may be asked for later.
    """
    out.mkdir(parents=True, exist_ok=True)
    soundfont = Path(settings.soundfont) if settings.soundfont else default_soundfont()
    ToneBank(soundfont, settings.sample_rate)  # a wrong file is refused before anything is written
    values = {
        "format": CORPUS_FORMAT,
        **json.loads(json.dumps(asdict(settings))),
        "soundfont_sha256": file_sha256(soundfont),
    }
    path = out / SETTINGS
    if path.is_file():
        before = json.loads(path.read_text())
        hours = max(hours, before.get("hours", 0.0))
        differing = sorted(k for k in values if before.get(k) != values[k])
        if differing:
            raise LmdError(
                f"{out} built with other {', '.join(differing)}",
                "the same settings, to go on with it",
                "Choose another --out, or remove that folder.",
            )
    text = json.dumps({**values, "hours": hours}, indent=1, sort_keys=True)
    path.write_text(text + "\n")


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the command's arguments."""
    add = parser.add_argument
    add("--out", type=Path, default=Path("data/corpus"), help="folder to fill")
    add("--hours", type=float, default=10.0, help="how much to render")
    add("--workers", type=int, default=1, help="processes")
    add("--seed", type=int, default=0)
    add("--sample-rate", type=int, default=22_050, help="Hz")
    add("--channels", type=int, default=1, choices=(1, 2))
    add("--max-seconds", type=float, default=MAX_SECONDS, help="longer pieces become excerpts")
    add("--soundfont", default="", help="an .sf2 or .sf3 file instead of the built-in one")
    add("--collections", nargs="+", default=COLLECTIONS, help="folders of music21's corpus")
    add("--stems", action="store_true", help="write stems too, instead of playing them again")
    add("--cache", type=Path, default=DEFAULT_CACHE, help="where parsed scores are kept")
    add("--audio", type=Path, help="take in this folder of audio instead of rendering scores")
    add("--keep-going", action="store_true", help="go on when more than 5 %% are rejected")


def main(args: argparse.Namespace) -> int:
    """Build a corpus and say what is in it."""
    torch.set_num_threads(1)
    if args.audio is not None:
        from lmd.data.audio import build_from_folder

        return build_from_folder(args)
    settings = BuildSettings(
        seed=args.seed,
        sample_rate=args.sample_rate,
        channels=args.channels,
        max_seconds=args.max_seconds,
        soundfont=args.soundfont,
        stems=args.stems,
        collections=tuple(args.collections),
    )
    rows = build_corpus(args.out, args.hours, settings, args.workers, args.cache)
    hours = sum(row.duration_s for row in rows) / 3600
    n_pieces = len({row.piece_id for row in rows})
    print(f"{len(rows)} renditions of {n_pieces} pieces, {hours:.2f} h, in {args.out}")
    return 0
