"""`python -m lmd bench data`: how fast scores become sound and latents become batches, on one core.

    python -m lmd bench data --data data/corpus --latents data/latents --json data.json

Renditions of the corpus are played again, without writing them; batches of both window lengths are
read, from the page cache after the first round. All take turns in one run.
"""

import argparse
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from lmd.bench import check_output, grid, percentile, tell
from lmd.corpus.manifest import Corpus, play_again
from lmd.corpus.scores import DEFAULT_CACHE
from lmd.data.latents import LatentWindows
from lmd.errors import LmdError
from lmd.machine import machine_dict

WINDOWS_FRAMES = (240, 768)  # of a step, and of ARC-Forcing's discriminator
BATCHES = 32  # read in a turn
COLUMNS = ("what", "unit", "per_second", "ms_p50", "ms_p95", "items")


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the command's arguments."""
    add = parser.add_argument
    add("--data", type=Path, default=Path("data/corpus"), help="a corpus of rendered scores")
    add("--latents", type=Path, default=Path("data/latents"), help="its latents")
    add("--cache", type=Path, default=DEFAULT_CACHE, help="of parsed scores")
    add("--batch", type=int, default=16, help="windows of a batch")
    add("--turns", type=int, default=20, help="renditions, and times 32 batches of either length")
    add("--json", help="write the figures to this file, - for standard output")


def main(args: argparse.Namespace) -> int:
    """Measure, print the table, write the JSON."""
    for name, value in {"--batch": args.batch, "--turns": args.turns}.items():
        if value < 1:
            raise LmdError(f"{name} {value}", "1 or more", "Correct the number.")
    check_output(args.json)
    torch.set_num_threads(1)
    report = {"threads": 1, "batch": args.batch, "machine": machine_dict(), "rows": measure(args)}
    tell(report, "\n".join(grid(COLUMNS, report["rows"])), args.json)
    return 0


def measure(args: argparse.Namespace) -> list[dict]:
    """The rows of the table.

    Raises:
        LmdError: no corpus of scores, or no latents of it.
    """
    corpus = Corpus(args.data)
    settings = corpus.settings()
    if "soundfont" not in settings:
        raise LmdError(
            f"a corpus of recordings in {args.data}", "one of scores", "Name one with --data."
        )
    windows = [LatentWindows(args.latents, window_frames=n) for n in WINDOWS_FRAMES]
    every = np.linspace(0, len(corpus) - 1, args.turns).round().astype(int)
    rows = [corpus.rows[index] for index in every]
    play_again(rows[0], settings, args.cache)  # reads the soundfont
    render_s: list[float] = []
    read_s: list[list[float]] = [[] for _ in windows]
    for turn, row in enumerate(tqdm(rows, desc="turns", mininterval=2, file=sys.stderr)):
        render_s.append(timed(lambda row=row: play_again(row, settings, args.cache)))
        for own, some in zip(read_s, windows, strict=True):
            steps = range(BATCHES * turn, BATCHES * (turn + 1))
            own += [timed(lambda k=k, w=some: w.batch(k, range(args.batch))) for k in steps]
    music_s = sum(row.duration_s for row in rows)
    return [
        _line("rendering", "seconds of music", music_s, render_s),
        *(
            _line(f"batches of {n} frames", "windows", args.batch * len(own), own)
            for n, own in zip(WINDOWS_FRAMES, read_s, strict=True)
        ),
    ]


def timed(work: Callable[[], object]) -> float:
    """Seconds that it takes."""
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


def _line(what: str, unit: str, amount: float, each_s: list[float]) -> dict:
    p50, p95 = (1e3 * percentile(each_s, q) for q in (50, 95))
    return {
        "what": what,
        "unit": unit,
        "per_second": amount / sum(each_s),
        "ms_p50": p50,
        "ms_p95": p95,
        "items": len(each_s),
    }
