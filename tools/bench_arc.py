"""What an update of ARC-Forcing costs, by length of the rollout.

    python tools/bench_arc.py --preset small --batch 8 --blocks 1 2 4 8 --json arc.json

Every line of the table is a short run of `lmd train arc` itself, with random weights and stand-ins
for music, in a process of its own: the most memory that one has held is then that of no other.
"""

import itertools
import sys
import tempfile
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, replace
from multiprocessing import get_context
from pathlib import Path
from typing import Any, Literal

import pandas as pd
import torch
import tyro
from tqdm import tqdm

from lmd.arc.card import WHO, arc_log
from lmd.arc.discriminator import Discriminator, HeadConfig
from lmd.arc.module import ArcTraining
from lmd.arc.options import ArcRun
from lmd.checkpoint import build_model
from lmd.config import preset
from lmd.machine import machine_dict, peak_mb, tune_allocator
from lmd.model.text import HashTextEncoder
from lmd.outputs import check_outputs, write_json
from lmd.training.trainer import fit
from lmd.training.windows import Windows

N_UNTIMED = 2  # the first update of either network makes room and loads code


@dataclass(frozen=True)
class Options:
    """What is measured.

    Attributes:
        preset: tiny, small or paper.
        blocks: lengths of a rollout.
        block_frames: of each block.
        batch: rollouts per update.
        precision: of the products.
        checkpointing: without and with recomputed layers.
        regime: who sees whom.
        steps: calls of a block; 1 to all of them are made.
        last_block: of the base, in the discriminator.
        updates: timed updates of each network.
        threads: that torch uses.
        accelerator: auto, cpu or gpu.
        json: write the figures to this file.
    """

    preset: str = "small"
    blocks: tuple[int, ...] = (1, 2, 4, 8)
    block_frames: int = 48
    batch: int = 8
    precision: tuple[Literal["32", "bf16"], ...] = ("32", "bf16")
    checkpointing: tuple[Literal["no", "yes"], ...] = ("no", "yes")
    regime: Literal["block-causal", "enc-dec"] = "block-causal"
    steps: int = 8
    last_block: str = ArcRun.last_block
    updates: int = 6
    threads: int = torch.get_num_threads()
    accelerator: Literal["auto", "cpu", "gpu"] = "cpu"
    json: Path | None = None


class StandIns:
    """Noise in place of music."""

    def __init__(self, latent_dim: int) -> None:
        self.latent_dim = latent_dim

    def windows(self, step: int, positions: Sequence[int], n_frames: int) -> Windows:
        """See `lmd.training.windows.WindowSource`."""
        names = [f"stand-in {p}" for p in positions]
        return Windows(torch.randn(len(names), self.latent_dim, n_frames), names, names)


def run_of(options: Options, precision: str, checkpointing: str, n_blocks: int) -> ArcRun:
    """The options of `lmd train arc` for a line of the table."""
    run = ArcRun(
        preset=options.preset,
        batch=options.batch,
        blocks=str(n_blocks),
        block_frames=str(options.block_frames),
        steps=str(options.steps),
        regimes=options.regime,
        last_block=options.last_block,
        precision=precision,
        accelerator=options.accelerator,
        checkpointing=checkpointing == "yes",
        n_updates=N_UNTIMED + 2 * options.updates,
        warmup=0,
        no_progress=True,
    )
    run.check()
    return run


def measure(run: ArcRun, threads: int) -> dict[str, float]:
    """Train in this process: median seconds and calls of an update, and peak memory in GB."""
    torch.set_num_threads(threads)
    tune_allocator()
    sizes = preset(run.preset)
    with tempfile.TemporaryDirectory() as out:
        run = replace(run, out=Path(out))
        head = HeadConfig.of(sizes.dit.width)
        discriminator = Discriminator(build_model(sizes), run.last_block, head)
        text = HashTextEncoder(sizes.text.n_tokens, sizes.dit.text_dim)
        source = StandIns(sizes.dit.latent_dim)
        module = ArcTraining(build_model(sizes), discriminator, text, source, run)
        fit(module)
        log = arc_log(Path(out))
    timed = log[log["step"] >= N_UNTIMED].groupby("is_generator").median()
    on_gpu, own = log["memory_gb"].max(), peak_mb(torch.device("cpu")) * 2**20 / 1e9
    found = {"memory_gb": own if module.device.type == "cpu" else float(on_gpu)}
    for number, who in WHO.items():
        found[f"{who}_s"] = float(timed["update_s"][number])
        found[f"{who}_calls"] = float(timed["calls"][number])
    return found


def in_fresh_process(run: ArcRun, threads: int) -> dict[str, float]:
    """`measure` in a process that has done nothing before; empty if it died, e.g. of memory."""
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        try:
            return pool.submit(measure, run, threads).result()
        except BrokenProcessPool:
            return {}


def main(options: Options) -> None:
    """Measure, print the table, write the JSON."""
    check_outputs(json=options.json, make_folders=True)
    cases = list(itertools.product(options.precision, options.checkpointing, options.blocks))
    runs = [run_of(options, *case) for case in cases]  # what cannot run is refused before any does
    rows: list[dict[str, Any]] = []
    for (precision, checkpointing, blocks), run in zip(
        tqdm(cases, desc="lines", mininterval=1, file=sys.stderr), runs, strict=True
    ):
        about = {"blocks": blocks, "frames": blocks * options.block_frames}
        about |= {"precision": precision, "checkpointing": checkpointing}
        rows.append(about | in_fresh_process(run, options.threads))
    print(pd.DataFrame(rows).to_markdown(index=False, floatfmt=".3g"))
    if options.json:
        about = {k: v for k, v in vars(options).items() if k != "json"}
        report = {**about, "machine": machine_dict(), "rows": rows}
        write_json(options.json, report)


if __name__ == "__main__":
    main(tyro.cli(Options))
