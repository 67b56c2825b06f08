"""How fast scores become sound and latents become batches, on one core.

    python tools/bench_data.py --data data/corpus --latents data/latents --json data.json

Renditions of the corpus are played again, without writing them; batches of both window lengths are
read, from the page cache after the first round. All take turns in one run.
"""

import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
import tyro
from tqdm import tqdm

from lmd.corpus.manifest import Corpus
from lmd.corpus.scores import DEFAULT_CACHE
from lmd.data.latents import LatentWindows
from lmd.machine import machine_dict
from lmd.outputs import check_outputs, write_json

WINDOWS_FRAMES = (240, 768)  # of a step, and of ARC-Forcing's discriminator
BATCHES = 32  # read in a turn


@dataclass(frozen=True)
class Options:
    """What is measured.

    Attributes:
        data: a corpus of rendered scores.
        latents: its latents.
        cache: of parsed scores.
        batch: windows of a batch.
        turns: renditions, and times 32 batches of either length.
        json: write the figures to this file.
    """

    data: Path = Path("data/corpus")
    latents: Path = Path("data/latents")
    cache: Path = DEFAULT_CACHE
    batch: int = 16
    turns: int = 20
    json: Path | None = None


def measure(options: Options) -> list[dict[str, Any]]:
    """The rows of the table."""
    corpus = Corpus(options.data)
    windows = [LatentWindows(options.latents, window_frames=n) for n in WINDOWS_FRAMES]
    every = np.linspace(0, len(corpus) - 1, options.turns).round().astype(int)
    corpus.play_again(every[0], options.cache)  # reads the soundfont
    render_s: list[float] = []
    read_s: list[list[float]] = [[] for _ in windows]
    for turn, index in enumerate(tqdm(every, desc="turns", mininterval=2, file=sys.stderr)):
        render_s.append(timed(lambda index=index: corpus.play_again(index, options.cache)))
        for own, some in zip(read_s, windows, strict=True):
            steps = range(BATCHES * turn, BATCHES * (turn + 1))
            own += [timed(lambda k=k, w=some: w.batch(k, range(options.batch))) for k in steps]
    music_s = sum(corpus.rows[index].duration_s for index in every)
    return [
        line("rendering", "seconds of music", music_s, render_s),
        *(
            line(f"batches of {n} frames", "windows", options.batch * len(own), own)
            for n, own in zip(WINDOWS_FRAMES, read_s, strict=True)
        ),
    ]


def timed(work: Callable[[], object]) -> float:
    """Seconds that it takes."""
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


def line(what: str, unit: str, amount: float, each_s: list[float]) -> dict[str, Any]:
    """One line of the table."""
    p50, p95 = (1e3 * pd.Series(each_s).quantile(q) for q in (0.5, 0.95))
    return {
        "what": what,
        "unit": unit,
        "per_second": amount / sum(each_s),
        "ms_p50": p50,
        "ms_p95": p95,
        "items": len(each_s),
    }


def main(options: Options) -> None:
    """Measure, print the table, write the JSON."""
    check_outputs(json=options.json, make_folders=True)
    torch.set_num_threads(1)
    rows = measure(options)
    print(pd.DataFrame(rows).to_markdown(index=False, floatfmt=".4g"))
    if options.json:
        report = {"threads": 1, "batch": options.batch, "machine": machine_dict(), "rows": rows}
        write_json(options.json, report)


if __name__ == "__main__":
    main(tyro.cli(Options))
