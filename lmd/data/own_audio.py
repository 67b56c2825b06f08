"""A person's own music: a folder of audio becomes a corpus like the rendered one."""

import errno
import hashlib
import math
import re
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, replace
from functools import lru_cache, partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from lmd.corpus.analysis import brightness_hz
from lmd.corpus.build import BuildSettings
from lmd.corpus.levels import block_powers, gain_of, gated_lufs, limit
from lmd.corpus.manifest import (
    MANIFEST,
    SETTINGS,
    Row,
    is_whole,
    new_row,
    read_manifest,
    write_manifest,
    write_sounds,
)
from lmd.corpus.scores import mapped
from lmd.corpus.tables import append_log, hold_settings, read_log
from lmd.data.check import MIN_SECONDS, Report, survey, unreadable
from lmd.data.layouts import Track
from lmd.data.sound_files import Scan, load_segment, open_sound, scan
from lmd.data.splits import with_splits
from lmd.errors import LmdError
from lmd.outputs import check_folder, write_json

AUDIO_FORMAT = 2
SEGMENT_S = 600.0  # longer files are taken in in equal stretches of at most so many seconds
MAX_GAIN = 10 ** (30 / 20)  # what is softer stays soft: more would lift noise, not music
MAX_REJECTED = 0.05  # of all files; more stop a build …
FEWEST_FILES = 20  # … of so many files or more
MOST_CAPTIONS = 20  # shown after a build


def windows_of(n_samples: int, longest: float) -> list[tuple[int, int]]:
    """Equal stretches, none longer than so many samples."""
    n_windows = math.ceil(n_samples / longest)
    edges = [round(i * n_samples / max(1, n_windows)) for i in range(n_windows + 1)]
    return list(pairwise(edges))


def take_in(job: tuple[Track, Path, Path, BuildSettings]) -> list[Row] | str:
    """Read, trim, level, cut and write one track; what its file raises is why it is not used."""
    track, folder, out, settings = job
    rate = settings.sample_rate
    try:
        scanned = scan(track.mix)
        load = lru_cache(maxsize=1)(  # the only stretch of a short file is read once
            partial(load_segment, sample_rate=rate, channels=settings.channels)
        )
        whole = _segments([track.mix], scanned, rate, load)
        blocks = [block_powers(segment[0], rate) for segment in whole]
        # One factor brings a whole mix, however long, to the corpus's loudness.
        gain = np.float32(min(gain_of(gated_lufs(np.concatenate(blocks))), MAX_GAIN))
        stems = track.stems if settings.stems else ()
        rows, about = [], _about(track, folder)
        about |= {"instruments": "|".join(name for name, _ in stems), "sample_rate": rate}
        segments = _segments([track.mix, *(path for _, path in stems)], scanned, rate, load)
        for segment in _joined(segments, MIN_SECONDS * rate):
            mix, *parts = gain * segment
            mix = limit(mix, rate)
            for start, end in windows_of(mix.shape[-1], settings.max_seconds * rate):
                window = mix[:, start:end]
                row = new_row(**about, brightness_hz=round(brightness_hz(window, rate), 1))
                row = replace(row, name=f"{row.name}__w{len(rows)}")
                rows.append(write_sounds(out, row, window, [part[:, start:end] for part in parts]))
        return rows
    except Exception as error:
        if getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT, errno.EROFS):
            raise  # that is not this file's fault
        return unreadable(error)


def _about(track: Track, folder: Path) -> dict[str, Any]:
    """What all rows of a track say."""
    piece_id = track.mix.relative_to(folder).as_posix()
    slug = re.sub(r"[^A-Za-z0-9]+", "-", track.mix.with_suffix("").name).strip("-")[:40] or "x"
    digest = hashlib.sha256(piece_id.encode(errors="surrogateescape")).hexdigest()
    return {
        "name": f"{slug}-{digest[:10]}",
        "piece_id": piece_id,
        "title": track.mix.stem,
        "split": track.split,
        "family": "own music",
        "caption": track.caption,
    }


def _segments(
    paths: Sequence[Path], scanned: Scan, rate: int, load: Callable[..., np.ndarray]
) -> Iterator[np.ndarray]:
    """A track's equal stretches without the silences of its mix `[mix and stems, channel, sample]`.

    `load` is `load_segment` in the corpus's format, whose sample rate is `rate` Hz.
    """
    duration_s = scanned.n_samples / scanned.sample_rate
    n_segments = math.ceil(duration_s / SEGMENT_S)
    length_s = duration_s / n_segments
    for start_s in (number * length_s for number in range(n_segments)):
        waves = [load(path, start_s=start_s, seconds=length_s) for path in paths]
        keep = scanned.kept(waves[0].shape[-1], rate, start_s)
        n = len(keep)
        padded = (np.pad(w[:, :n], ((0, 0), (0, max(0, n - w.shape[-1])))) for w in waves)
        yield np.stack([wave[:, keep] for wave in padded])


def _joined(segments: Iterator[np.ndarray], shortest: float) -> Iterator[np.ndarray]:
    """The same sound; of what is under so many samples, nothing stands alone."""
    held = next(segments)
    for segment in segments:
        if min(held.shape[-1], segment.shape[-1]) < shortest:
            held = np.concatenate([held, segment], axis=-1)
        else:
            yield held
            held = segment
    yield held


def build_audio(
    folder: Path,
    out: Path,
    settings: BuildSettings | None = None,
    keep_going: bool = False,
    workers: int = 1,
) -> tuple[list[Row], Report]:
    """Take in a folder of audio; tracks that are there already are kept.

    Args:
        folder: where to look.
        out: the corpus to fill.
        settings: its format, longest windows, and whether stems that a data set brings are kept.
        keep_going: go on when more than 5 % of 20 files or more are rejected.
        workers: processes.

    Raises:
        LmdError: too many rejects, nothing usable, a corpus made with other settings, or one
            inside the folder that is taken in.
    """
    settings = settings or BuildSettings()
    settings.check()
    check_folder(out)
    for written in (out, out / "audio", out / "stems"):
        if written.resolve().is_relative_to(folder.resolve()):
            found = f"the corpus's {written} inside {folder}, which is taken in"
            expected = "a folder outside: the next run would take in its own output"
            raise LmdError(found, expected, "Choose another --out.")
    tracks, report = survey(folder)
    n_rejected, n_files = len(report.rejected), len(report.accepted) + len(report.rejected)
    too_many = n_files >= FEWEST_FILES and n_rejected > MAX_REJECTED * n_files
    if (too_many and not keep_going) or not tracks:
        listed = "".join(f"\n  {line}" for line in report.lines())
        found = f"{n_rejected} of {n_files} files rejected:{listed}\n"
        expected = f"at most {MAX_REJECTED:.0%}" if tracks else "music"
        todo = "Repair or remove them, or use --keep-going." if tracks else "Repair them."
        raise LmdError(found, expected, todo)
    check_folder(out, sum(_n_bytes(track, settings) for track in tracks))
    about = {"format": AUDIO_FORMAT, "kind": "audio", "window_s": settings.max_seconds}
    about |= {name: getattr(settings, name) for name in ("sample_rate", "channels", "stems")}
    hold_settings(out / SETTINGS, about)
    before = read_manifest(out) if (out / MANIFEST).is_file() else []
    rows = []
    for track, taken in zip(tracks, _taken_in(tracks, folder, out, settings, workers), strict=True):
        if isinstance(taken, str):
            report.reject(track.mix, taken)
        else:
            rows += taken
    write_json(out / "rejected.json", report.as_dict())
    if not rows:
        raise LmdError(f"nothing usable in {folder}", "music", f"See {out / 'rejected.json'}.")
    rows = with_splits(rows, before)
    write_manifest(out, rows)
    return rows, report


def _n_bytes(track: Track, settings: BuildSettings) -> int:
    """About how much room a track will take."""
    with open_sound(track.mix) as sound:
        n_samples = sound.frames * settings.sample_rate // sound.samplerate
    return 2 * n_samples * settings.channels * (1 + settings.stems * len(track.stems))


def _taken_in(
    tracks: Sequence[Track], folder: Path, out: Path, settings: BuildSettings, workers: int
) -> list[list[Row] | str]:
    """The rows of every track, those of an earlier run first read from its log.

    A piece's files have the same names whatever it was, so the last entry of each alone counts.
    """
    log, last = out / "tracks.jsonl", {}
    for entry in read_log(log):
        rows = [Row(**row) for row in entry["rows"]]
        last[rows[0].piece_id if rows else entry["key"]] = (entry["key"], rows)
    done: dict[str, list[Row] | str] = {
        key: rows for key, rows in last.values() if all(is_whole(out, row) for row in rows)
    }
    keys = [_key(track, folder) for track in tracks]
    missing = {key: track for key, track in zip(keys, tracks, strict=True) if key not in done}
    jobs = [(track, folder, out, settings) for track in missing.values()]
    # One thread each, as in the command: copies must give the same bytes.
    results = tqdm(mapped(take_in, jobs, workers, 1), "taking in", len(jobs), mininterval=1)
    for key, taken in zip(missing, results, strict=True):
        done[key] = taken
        if not isinstance(taken, str):
            append_log(log, {"key": key, "rows": [asdict(row) for row in taken]})
    return [done[key] for key in keys]


def _key(track: Track, folder: Path) -> str:
    """What a track was when it was taken in: its place, words, and files as they were."""
    about = [track.mix.relative_to(folder).as_posix(), track.caption, track.split]
    for name, path in (("", track.mix), *track.stems):
        state = path.stat()
        about.append(f"{name}:{path.name}:{state.st_size}:{state.st_mtime_ns}")
    return "|".join(about)


def caption_lines(rows: Sequence[Row]) -> Iterator[str]:
    """What the windows are called, most frequent first, and how to call them better."""
    counts = Counter(row.caption for row in rows)
    yield "captions (windows):"
    yield from (f"{n:6} {text}" for text, n in counts.most_common(MOST_CAPTIONS))
    if len(counts) > MOST_CAPTIONS:
        yield f"       and {len(counts) - MOST_CAPTIONS} others"
    yield "Better ones: write song.txt beside song.wav (genre, instruments, mood) and build again."
