"""A person's own music: a folder of audio becomes a corpus like the rendered one."""

import argparse
import hashlib
import json
import math
import re
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from functools import lru_cache
from itertools import pairwise
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import soundfile
import torch
from tqdm import tqdm

from lmd.corpus.analysis import brightness_hz
from lmd.corpus.levels import block_powers, gain_of, gated_lufs, limit
from lmd.corpus.render import MAX_SECONDS
from lmd.data.check import MAX_REJECTED, MIN_SECONDS, Report
from lmd.data.corpus import (
    MANIFEST,
    SETTINGS,
    Corpus,
    Row,
    check_format,
    is_whole,
    write_manifest,
    write_wav,
)
from lmd.data.layouts import Track, survey
from lmd.data.places import check_folder_free
from lmd.data.resampling import resampled, to_mono
from lmd.data.silence import Heard, hear
from lmd.data.splits import copies, with_splits
from lmd.errors import LmdError

AUDIO_FORMAT = 2
SEGMENT_S = 600.0  # longer files are taken in in equal stretches of at most so many seconds
MAX_GAIN = 10 ** (30 / 20)  # what is softer stays soft: more would lift noise, not music


@dataclass(frozen=True)
class AudioSettings:
    """What a corpus of own music depends on, beside the files.

    Attributes:
        sample_rate: Hz.
        channels: 1 or 2; stereo is averaged to mono, mono is doubled to stereo.
        window_s: longest stretch in one file of the corpus.
        stems: keep stems where a data set brings them.

    Raises:
        LmdError: a value out of range.
    """

    sample_rate: int = 22_050
    channels: int = 1
    window_s: float = MAX_SECONDS
    stems: bool = False

    def __post_init__(self) -> None:
        check_format(self.sample_rate, self.channels, self.window_s)


def load_segment(
    path: Path, settings: AudioSettings, start_s: float = 0.0, seconds: float = SEGMENT_S
) -> np.ndarray:
    """A stretch of a file, resampled, in the wanted channels.

    Returns:
        float32 `[channel, sample]`; no samples if the file ends before `start_s`.
    """
    with soundfile.SoundFile(path) as sound:
        rate = sound.samplerate
        first, last = (min(round(s * rate), sound.frames) for s in (start_s, start_s + seconds))
        if first == last:
            return np.zeros((settings.channels, 0), np.float32)
        sound.seek(first)
        data = sound.read(last - first, dtype="float32", always_2d=True)
    wave = torch.from_numpy(data.T.copy())
    if wave.shape[0] != settings.channels:
        wave = to_mono(wave).repeat(settings.channels, 1)
    return resampled(wave, rate, settings.sample_rate).numpy()


def windows_of(n_samples: int, settings: AudioSettings) -> list[tuple[int, int]]:
    """Equal stretches, none longer than the window."""
    n_windows = math.ceil(n_samples / (settings.window_s * settings.sample_rate))
    edges = [round(i * n_samples / max(1, n_windows)) for i in range(n_windows + 1)]
    return list(pairwise(edges))


def take_in(job: tuple[Track, Path, Path, AudioSettings]) -> list[Row]:
    """Read, trim, level, cut and write one track."""
    track, folder, out, settings = job
    piece_id = track.mix.relative_to(folder).as_posix()
    slug = re.sub(r"[^A-Za-z0-9]+", "-", track.mix.with_suffix("").name).strip("-")[:40] or "x"
    digest = hashlib.sha256(piece_id.encode(errors="surrogateescape")).hexdigest()
    heard = hear(track.mix)
    load = lru_cache(maxsize=1)(load_segment)  # the only stretch of a short file is read once
    gain = _gain(_segments([track.mix], heard, settings, load), settings)
    paths = [track.mix, *(path for _, path in track.stems if settings.stems)]
    rows: list[Row] = []
    for segment in _joined(_segments(paths, heard, settings, load), settings):
        mix, *stems = gain * segment
        mix = limit(mix, settings.sample_rate)
        for start, end in windows_of(mix.shape[-1], settings):
            name = f"{slug}-{digest[:10]}__w{len(rows)}"
            parts = [stem[:, start:end] for stem in stems]
            rows.append(_write(track, piece_id, name, mix[:, start:end], parts, out, settings))
    return rows


def _segments(
    paths: Sequence[Path],
    heard: Heard,
    settings: AudioSettings,
    load: Callable[[Path, AudioSettings, float, float], np.ndarray],
) -> Iterator[np.ndarray]:
    """A track's equal stretches, one after another, without the silences of its mix.

    Args:
        paths: the mix, then its stems.
        heard: where the mix sounds.
        settings: format of the corpus.
        load: `load_segment`.

    Yields:
        float32 `[file, channel, sample]`.
    """
    duration_s = soundfile.info(paths[0]).duration
    n_segments = math.ceil(duration_s / SEGMENT_S)
    length_s = duration_s / n_segments
    for number in range(n_segments):
        start_s = number * length_s
        waves = [load(path, settings, start_s, length_s) for path in paths]
        keep = heard.kept(waves[0].shape[-1], settings.sample_rate, start_s)
        yield np.stack([_of_length(wave, len(keep))[:, keep] for wave in waves])


def _of_length(wave: np.ndarray, n_samples: int) -> np.ndarray:
    """`[channel, sample]`, cut or followed by silence."""
    return np.pad(wave[:, :n_samples], ((0, 0), (0, max(0, n_samples - wave.shape[-1]))))


def _gain(segments: Iterator[np.ndarray], settings: AudioSettings) -> np.float32:
    """The one factor that brings a whole mix, however long, to the corpus's loudness."""
    blocks = [block_powers(segment[0], settings.sample_rate) for segment in segments]
    return np.float32(min(gain_of(gated_lufs(np.concatenate(blocks))), MAX_GAIN))


def _joined(segments: Iterator[np.ndarray], settings: AudioSettings) -> Iterator[np.ndarray]:
    """The same sound; of what is under a second, nothing stands alone."""
    shortest = MIN_SECONDS * settings.sample_rate
    held = next(segments)
    for segment in segments:
        if min(held.shape[-1], segment.shape[-1]) < shortest:
            held = np.concatenate([held, segment], axis=-1)
        else:
            yield held
            held = segment
    yield held


def _write(
    track: Track,
    piece_id: str,
    name: str,
    wave: np.ndarray,
    stems: list[np.ndarray],
    out: Path,
    settings: AudioSettings,
) -> Row:
    """Write one window and say what it is."""
    path = f"audio/{name}.wav"
    write_wav(out / path, wave, settings.sample_rate)
    stem_paths = [f"stems/{name}__v{voice}.wav" for voice in range(len(stems))]
    for stem_path, stem in zip(stem_paths, stems, strict=True):
        write_wav(out / stem_path, stem, settings.sample_rate)
    instruments = [stem_name for stem_name, _ in track.stems] if stems else []
    return Row(
        name=name, piece_id=piece_id, composer="", title=track.mix.stem, split=track.split,
        rendition=0, seed=0, family="own music", instruments="|".join(instruments), tempo_bpm=0.0,
        key="", mode="", metre="", transposition=0, articulation="", dynamics="",
        density_hz=0.0, brightness_hz=round(brightness_hz(wave, settings.sample_rate), 1),
        duration_s=round(wave.shape[-1] / settings.sample_rate, 4), n_samples=wave.shape[-1],
        sample_rate=settings.sample_rate, channels=settings.channels, caption=track.caption,
        path=path, stem_paths="|".join(stem_paths),
        sha256=hashlib.sha256((out / path).read_bytes()).hexdigest(),
    )  # fmt: skip


def build_audio(
    folder: Path,
    out: Path,
    settings: AudioSettings | None = None,
    keep_going: bool = False,
    workers: int = 1,
) -> tuple[list[Row], Report]:
    """Take in a folder of audio; tracks that are there already are kept.

    Args:
        folder: where to look.
        out: the corpus to fill.
        settings: format of the corpus.
        keep_going: go on when more than 5 % of the files are rejected.
        workers: processes.

    Returns:
        The manifest's rows and the report on what was rejected.

    Raises:
        LmdError: too many rejects, nothing usable, a corpus made with other settings, or one
            inside the folder that is taken in, or a place that cannot be written.
    """
    settings = settings or AudioSettings()
    for written in (out, out / "audio", out / "stems"):
        if written.resolve().is_relative_to(folder.resolve()):
            raise LmdError(
                f"the corpus's {written} inside {folder}, which is taken in",
                "a folder outside: the next run would take in its own output",
                "Choose another --out.",
            )
    check_folder_free(out)
    tracks, report = survey(folder)
    _refuse_too_many(report, keep_going)
    _check_settings(out, settings)
    (out / "rejected.json").write_text(report.as_json() + "\n")
    of_track = _taken_in(tracks, folder, out, settings, workers)
    before = Corpus(out).rows if (out / MANIFEST).is_file() else []
    rows = with_splits([row for found in of_track for row in found], before)
    if not rows:
        raise LmdError(f"nothing usable in {folder}", "music", "See rejected.json.")
    write_manifest(out, rows)
    return rows, report


def _refuse_too_many(report: Report, keep_going: bool) -> None:
    """Stop when more than 5 % are rejected, with the list."""
    if report.share_rejected > MAX_REJECTED and not keep_going:
        listed = "".join(f"\n  {item}" for item in report.rejected)
        raise LmdError(
            f"{len(report.rejected)} of {len(report.accepted) + len(report.rejected)} files "
            f"rejected:{listed}\n",
            f"at most {MAX_REJECTED:.0%}",
            "Repair or remove them, or use --keep-going.",
        )


def _taken_in(
    tracks: Sequence[Track], folder: Path, out: Path, settings: AudioSettings, workers: int
) -> list[list[Row]]:
    """The rows of every track, those of an earlier run first read from its log.

    A piece's files have the same names whatever it was, so the last entry of each alone counts.
    """
    last: dict[str, tuple[str, list[Row]]] = {}
    with (out / "tracks.jsonl").open("a+") as log:
        log.seek(0)
        for line in log.read().splitlines():
            try:
                entry = json.loads(line)
            except json.JSONDecodeError:
                continue  # torn by an interruption
            rows = [Row(**row) for row in entry["rows"]]
            last[rows[0].piece_id if rows else entry["key"]] = (entry["key"], rows)
        done = {key: rows for key, rows in last.values() if all(is_whole(out, r) for r in rows)}
        keys = [_key(track, folder) for track in tracks]
        missing = [i for i, key in enumerate(keys) if key not in done]
        jobs = [(tracks[i], folder, out, settings) for i in missing]
        results = tqdm(_run(jobs, workers), total=len(jobs), desc="taking in", mininterval=1)
        for i, rows in zip(missing, results, strict=True):
            done[keys[i]] = rows
            entry = {"key": keys[i], "rows": [asdict(row) for row in rows]}
            log.write(json.dumps(entry, sort_keys=True) + "\n")
            log.flush()
    return [done[key] for key in keys]


def _key(track: Track, folder: Path) -> str:
    """What a track was when it was taken in: its place, words, and files as they were."""
    about = [track.mix.relative_to(folder).as_posix(), track.caption, track.split]
    for name, path in (("", track.mix), *track.stems):
        state = path.stat()
        about.append(f"{name}:{path.name}:{state.st_size}:{state.st_mtime_ns}")
    return "|".join(about)


def _run(jobs: list[Any], workers: int) -> Iterator[list[Row]]:
    """Rows per track, from one process or several."""
    if workers <= 1 or len(jobs) < 2:
        yield from map(take_in, jobs)
        return
    with ProcessPoolExecutor(
        workers, get_context("spawn"), torch.set_num_threads, (1,)
    ) as pool:  # one thread each, as in the command: copies must give the same bytes
        yield from pool.map(take_in, jobs)


def _check_settings(out: Path, settings: AudioSettings) -> None:
    """Write the corpus's settings, or hold them against those of an earlier run."""
    values = {"format": AUDIO_FORMAT, "kind": "audio", **asdict(settings)}
    path = out / SETTINGS
    out.mkdir(parents=True, exist_ok=True)
    if path.is_file() and json.loads(path.read_text()) != values:
        raise LmdError(
            f"{out} holding a corpus made in another way",
            "the same settings, to go on with it",
            "Choose another --out, or remove that folder.",
        )
    path.write_text(json.dumps(values, indent=1, sort_keys=True) + "\n")


def build_from_folder(args: argparse.Namespace) -> int:
    """`python -m lmd data build --audio FOLDER`."""
    settings = AudioSettings(args.sample_rate, args.channels, args.max_seconds, args.stems)
    rows, report = build_audio(args.audio, args.out, settings, args.keep_going, args.workers)
    for item in report.rejected:
        print(f"rejected  {item}")
    for line in copies(rows):
        print(f"the same music  {line}")
    hours = sum(row.duration_s for row in rows) / 3600
    n_pieces = len({row.piece_id for row in rows})
    print(f"{len(rows)} windows of {n_pieces} files, {hours:.2f} h, in {args.out}")
    return 0
