"""`python -m lmd bench arc`: what an update of ARC-Forcing costs, by length of the rollout.

    python -m lmd bench arc --preset small --batch 8 --blocks 1 2 4 8 --json arc.json

Every line of the table is a short run of `lmd train arc` itself, with random weights and stand-ins
for music, in a process of its own: the most memory that one has held is then that of no other. No
checkpoint is written.
"""

import argparse
import itertools
import logging
import sys
import tempfile
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import replace
from multiprocessing import get_all_start_methods, get_context
from pathlib import Path
from typing import NamedTuple, TypeVar

import torch
from tqdm import tqdm

from lmd.arc import train
from lmd.arc.card import WHO, arc_log
from lmd.arc.discriminator import Discriminator
from lmd.arc.module import ArcTraining
from lmd.arc.plan import ArcOptions
from lmd.bench import check_output, grid, tell
from lmd.checkpoint import build_model
from lmd.config import preset
from lmd.errors import LmdError
from lmd.machine import machine_dict, peak_mb, tune_allocator
from lmd.model.text import HashTextEncoder
from lmd.training.run import run_options
from lmd.training.windows import StandInSource

Answer = TypeVar("Answer")

PRECISIONS = {"float32": "32", "bfloat16": "bf16"}
N_UNTIMED = 2  # the first update of either network makes room and loads code
COLUMNS = ("blocks", "frames", "dtype", "checkpointing", "generator_s", "generator_calls")
COLUMNS += ("discriminator_s", "discriminator_calls", "memory_gb")


class Case(NamedTuple):
    """One line of the table."""

    dtype: str  # of the products; weights are float32
    checkpointing: bool
    n_blocks: int


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the command's arguments."""
    add = parser.add_argument
    add("--preset", default="small", help="tiny, small or paper")
    add("--blocks", type=int, nargs="+", default=[1, 2, 4, 8], help="lengths of a rollout")
    add("--block-frames", type=int, default=48)
    add("--batch", type=int, default=8, help="rollouts per update")
    add("--dtype", choices=PRECISIONS, nargs="+", default=list(PRECISIONS), help="of the products")
    add("--checkpointing", choices=("no", "yes"), nargs="+", default=["no", "yes"])
    add("--regime", choices=("block-causal", "enc-dec"), default="block-causal")
    add("--steps", type=int, default=8, help="calls of a block; 1 to all of them are made")
    add("--last-block", default=ArcOptions.last_block, help="of the base, in the discriminator")
    add("--updates", type=int, default=6, help="timed updates of each network")
    add("--threads", type=int, default=torch.get_num_threads())
    add("--accelerator", choices=("auto", "cpu", "gpu"), default="cpu")
    add("--json", help="write the figures to this file, - for standard output")


def main(args: argparse.Namespace) -> int:
    """Measure, print the table, write the JSON."""
    for name, value in {"--updates": args.updates, "--threads": args.threads}.items():
        if value < 1:
            raise LmdError(f"{name} {value}", "1 or more", "Correct the number.")
    check_output(args.json)
    torch.set_num_threads(args.threads)
    kinds = itertools.product(args.dtype, args.checkpointing, args.blocks)
    cases = [Case(dtype, word == "yes", n_blocks) for dtype, word, n_blocks in kinds]
    with torch.device("meta"):  # refuse what cannot run before any of it does
        for case in cases:
            build_module(training_words(args, case, Path()))
    bar = tqdm(cases, desc="lines", mininterval=1, file=sys.stderr)
    report = {
        "preset": args.preset,
        "batch": args.batch,
        "regime": args.regime,
        "steps": args.steps,
        "updates": args.updates,
        "threads": args.threads,
        "accelerator": args.accelerator,
        "machine": machine_dict(),
        "rows": [row_of(args, case, in_fresh_process(measure, args, case)) for case in bar],
    }
    tell(report, table(report), args.json)
    return 0


def in_fresh_process(work: Callable[..., Answer], *arguments: object) -> Answer | None:
    """The answer of a process that has done nothing before, or None if it died.

    Where there is a fork server, that starts it: the peak memory of a process that is spawned
    begins, on Linux, with what the one that spawns it has held.
    """
    way = "forkserver" if "forkserver" in get_all_start_methods() else "spawn"
    context = get_context(way)
    if way == "forkserver":
        context.set_forkserver_preload([__name__])  # imported once for all
    with ProcessPoolExecutor(1, mp_context=context) as pool:
        try:
            return pool.submit(work, *arguments).result()
        except BrokenProcessPool:
            return None


def training_words(args: argparse.Namespace, case: Case, out: Path) -> argparse.Namespace:
    """The arguments of `lmd train arc` for a line of the table."""
    parser = argparse.ArgumentParser()
    train.configure(parser)
    words = {
        "preset": args.preset,
        "batch": args.batch,
        "blocks": case.n_blocks,
        "block-frames": args.block_frames,
        "steps": args.steps,
        "regimes": args.regime,
        "last-block": args.last_block,
        "precision": PRECISIONS[case.dtype],
        "accelerator": args.accelerator,
        "updates": N_UNTIMED + 2 * args.updates,
        "checkpoint-every": N_UNTIMED + 2 * args.updates + 1,
        "warmup": 0,
        "out": out,
    }
    flags = ["--no-progress", *(["--checkpointing"] if case.checkpointing else [])]
    return parser.parse_args([f"--{name}={value}" for name, value in words.items()] + flags)


def build_module(words: argparse.Namespace) -> ArcTraining:
    """Both networks with random weights, and something to listen to.

    Raises:
        LmdError: sizes that do not fit, see `arc_run`.
    """
    sizes = preset(words.preset)
    run = train.arc_run(words, sizes)
    judge = Discriminator(build_model(sizes), run.arc.last_block, run.arc.head)
    text = HashTextEncoder(sizes.text.n_tokens, sizes.dit.text_dim)
    source = StandInSource(sizes.dit.latent_dim, words.seed)
    return ArcTraining(build_model(sizes), judge, text, source, run)


def measure(args: argparse.Namespace, case: Case) -> dict[str, float]:
    """Train in this process: median seconds and calls of an update, and peak memory in GB."""
    torch.set_num_threads(args.threads)
    tune_allocator()
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    with tempfile.TemporaryDirectory() as out:
        words = training_words(args, case, Path(out))
        module = build_module(words)
        train.fit(module, replace(run_options(words), keep_last=False))
        log = arc_log(Path(out))
    timed = log[log["step"] >= N_UNTIMED].groupby("is_generator").median()
    on_gpu, own = log["memory_gb"].max(), peak_mb(torch.device("cpu")) * 2**20 / 1e9
    found = {"memory_gb": own if module.device.type == "cpu" else float(on_gpu)}
    for number, who in WHO.items():
        found[f"{who}_s"] = float(timed["update_s"][number])
        found[f"{who}_calls"] = float(timed["calls"][number])
    return found


def row_of(args: argparse.Namespace, case: Case, found: dict[str, float] | None) -> dict:
    """One line of the table; what a process that died would have found is None."""
    about = {
        "blocks": case.n_blocks,
        "frames": case.n_blocks * args.block_frames,
        "dtype": case.dtype,
        "checkpointing": "yes" if case.checkpointing else "no",
    }
    return {**dict.fromkeys(COLUMNS), **about, **(found or {})}


def table(report: dict) -> str:
    """The rows for reading."""
    head = (
        f"preset {report['preset']}, batch {report['batch']}, {report['regime']}, "
        f"{report['steps']} steps, {report['threads']} threads, {report['accelerator']}; "
        f"median of {report['updates']} updates of each network"
    )
    rows = [
        {name: "–" if value is None else value for name, value in row.items()}
        for row in report["rows"]
    ]
    died = ["–: the process was ended from outside, most likely for want of memory"]
    return "\n".join([head, *grid(COLUMNS, rows), *(died if rows != report["rows"] else [])])
