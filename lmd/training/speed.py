"""`python -m lmd bench train`: what a training step costs here, beside what its products would.

The base's step, both fine-tune regimes' steps and the matrix products of their linear layers take
turns in one run, so that whatever else the machine does falls on all of them.
"""

import argparse
import statistics
import sys
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn
from tqdm import tqdm

from lmd.bench import check_output, grid, percentile, tell
from lmd.checkpoint import build_model
from lmd.config import Preset, Regime, preset
from lmd.errors import LmdError
from lmd.machine import check_compiler, machine_dict, pick_device, tune_allocator
from lmd.training.draws import BaseOptions, BatchIndices, FinetuneOptions
from lmd.training.module import TrainOptions, WindowSource, stage_loss, step_noise
from lmd.training.run import open_latents
from lmd.training.trainer import step_flops

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
COLUMNS = ("step", "n_frames", "step_ms_p50", "step_ms_p95", "frames_per_s", "step_gflop")
COLUMNS += ("product_gflops", "share", "data_ms_p50", "wait_ms_p50")


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the command's arguments."""
    add = parser.add_argument
    add("--preset", default="small", help="tiny, small or paper")
    add("--dtype", choices=DTYPES, default="float32", help="of the products; weights are float32")
    add("--batch", type=int, default=8, help="windows per step")
    add("--steps", type=int, default=12, help="timed steps of each kind")
    add("--threads", type=int, default=torch.get_num_threads())
    add("--device", default="cpu", help="cpu, cuda or auto")
    add("--compile", action="store_true", help="compile the blocks, warm-up not timed")
    add("--data", type=Path, help="also time reading batches from this folder of latents")
    add("--json", help="write the figures to this file, - for standard output")


def main(args: argparse.Namespace) -> int:
    """Measure, print the table, write the JSON."""
    counts = {"--batch": args.batch, "--steps": args.steps, "--threads": args.threads}
    for name, value in counts.items():
        if value < 1:
            raise LmdError(f"{name} {value}", "1 or more", "Correct the number.")
    check_output(args.json)
    if args.compile:
        check_compiler()
    torch.set_num_threads(args.threads)
    tune_allocator()
    report = measure(args)
    tell(report, table(report), args.json)
    return 0


class Product(NamedTuple):
    """What one linear layer computes: `[n_rows, n_in]` times its weight `[n_out, n_in]`."""

    n_rows: int  # batch times tokens
    n_in: int
    n_out: int

    @property
    def flop(self) -> float:
        """Floating-point operations of the forward and of both backward products."""
        return 3 * 2.0 * self.n_rows * self.n_in * self.n_out


@dataclass
class Kind:
    """A kind of training step, and what was measured of it, in seconds per step."""

    name: str
    options: TrainOptions
    clean: Tensor  # [batch, latent, frame]
    products: Counter[Product] = field(default_factory=Counter)
    step_s: list[float] = field(default_factory=list)
    products_s: list[float] = field(default_factory=list)
    data_s: list[float] = field(default_factory=list)
    wait_s: list[float] = field(default_factory=list)


def kinds(sizes: Preset, batch: int, device: torch.device) -> list[Kind]:
    """The base on its usual window, and a fine-tune in each live regime on the stream's blocks."""
    lengths = ((sizes.window.block_frames, 1.0),)
    base = BaseOptions(long_share=0.0)
    found = [("base", TrainOptions("base", 1, batch, base=base))]
    live: tuple[Regime, ...] = ("block-causal", "enc-dec")
    for regime in live:
        finetune = FinetuneOptions(
            regimes=((regime, 1.0),), block_lengths=lengths, short_context=0.0
        )
        found.append((regime, TrainOptions("finetune", 1, batch, finetune=finetune)))
    shapes = [(batch, sizes.dit.latent_dim, o.plan(0).n_frames) for _, o in found]
    return [
        Kind(name, options, torch.randn(shape, device=device))
        for (name, options), shape in zip(found, shapes, strict=True)
    ]


class Student:
    """A model of the preset's size and its optimizer, which takes whole training steps."""

    def __init__(self, sizes: Preset, dtype: torch.dtype, device: torch.device) -> None:
        self.sizes, self.dtype, self.device = sizes, dtype, device
        self.model = build_model(sizes).to(device)
        self.adam = torch.optim.AdamW(self.model.parameters(), fused=True)

    def step(self, kind: Kind, index: int) -> None:
        """Forward, backward, clip, AdamW; the moving average is left out."""
        options, n_rows, text = kind.options, len(kind.clean), self.sizes.text
        rows = BatchIndices(options.seed, index, tuple(range(n_rows)), n_rows)
        prompts = kind.clean.new_ones(n_rows, text.n_tokens, self.sizes.dit.text_dim)
        noise = step_noise(options, rows, kind.clean.shape[1]).to(self.device)
        half = self.dtype != torch.float32
        with torch.autocast(self.device.type, self.dtype, enabled=half):
            condition = self.model.condition(prompts, 5.0)
            loss = stage_loss(self.model, kind.clean, noise, condition, options, rows).mean()
        loss.backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), options.clip_norm)
        self.adam.step()
        self.adam.zero_grad()

    def products(self, kind: Kind) -> Counter[Product]:
        """The linear layers' products that a step of that kind takes, and how often."""
        seen: Counter[Product] = Counter()

        def note(layer: nn.Linear, inputs: tuple[Tensor, ...], output: Tensor) -> None:
            n_rows = inputs[0].numel() // layer.in_features
            seen[Product(n_rows, layer.in_features, layer.out_features)] += 1

        layers = [module for module in self.model.modules() if isinstance(module, nn.Linear)]
        hooks = [layer.register_forward_hook(note) for layer in layers]
        self.step(kind, 0)
        for hook in hooks:
            hook.remove()
        return seen

    def time_products(self, products: Counter[Product]) -> float:
        """Seconds for all of a step's products and nothing else; equal ones are timed once."""
        total = 0.0
        for product, count in products.items():
            n_rows, n_in, n_out = product
            x, weight, gradient = (
                torch.ones(shape, dtype=self.dtype, device=self.device)
                for shape in ((n_rows, n_in), (n_out, n_in), (n_rows, n_out))
            )
            began = self.now()
            for left, right in ((x, weight.T), (gradient, weight), (gradient.T, x)):
                torch.mm(left, right)
            total += count * (self.now() - began)
        return total

    def now(self) -> float:
        """Seconds, when the device has done what was asked of it."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter()


def measure(args: argparse.Namespace) -> dict:
    """Everything that the table shows, as plain values: `_ms` milliseconds, `_gflops` 10⁹ per s."""
    sizes, device = preset(args.preset), pick_device(args.device)
    student, subjects = Student(sizes, DTYPES[args.dtype], device), kinds(sizes, args.batch, device)
    source = open_latents(args.data, sizes, 0) if args.data else None
    for kind in subjects:
        kind.products = student.products(kind)  # a warm-up as well
        student.time_products(kind.products)
    if args.compile:
        student.model.dit.compile_blocks()
        for kind in tqdm(subjects, desc="compiling", mininterval=1, file=sys.stderr):
            student.step(kind, 0)
    with ThreadPoolExecutor(1) as reader:
        for index in tqdm(range(args.steps), desc="rounds", mininterval=1, file=sys.stderr):
            for kind in subjects:
                reading = reader.submit(time_reading, source, kind, index) if source else None
                began = student.now()
                student.step(kind, index)
                ended = student.now()
                kind.step_s.append(ended - began)
                if reading:
                    kind.data_s.append(reading.result())
                    kind.wait_s.append(time.perf_counter() - ended)
                kind.products_s.append(student.time_products(kind.products))
    return {
        "preset": args.preset,
        "dtype": args.dtype,
        "compiled": args.compile,
        "batch": args.batch,
        "steps": args.steps,
        "threads": args.threads,
        "device": str(device),
        "machine": machine_dict(),
        "rows": [row_of(kind, sizes) for kind in subjects],
    }


def time_reading(source: WindowSource, kind: Kind, index: int) -> float:
    """Seconds for reading a batch in a thread, as a run does while the step before computes."""
    began = time.perf_counter()
    source.windows(index, range(len(kind.clean)), kind.clean.shape[-1])
    return time.perf_counter() - began


def row_of(kind: Kind, sizes: Preset) -> dict:
    """One line of the table.

    `share` is what a step reaches of the rate of its products (MFU): the median over the rounds,
    each step beside the products that were timed right after it. `data` is what reading the next
    batch takes beside a step, `wait` what is left of that when the step has ended.
    """
    plan, n_rows = kind.options.plan(0), len(kind.clean)
    step_s, products_s = statistics.median(kind.step_s), statistics.median(kind.products_s)
    flop = step_flops(sizes.dit, plan, n_rows)
    products_flop = sum(p.flop * count for p, count in kind.products.items())
    ratios = [products / step for step, products in zip(kind.step_s, kind.products_s, strict=True)]
    return {
        "step": kind.name,
        "n_frames": plan.n_frames,
        "step_ms_p50": 1e3 * step_s,
        "step_ms_p95": 1e3 * percentile(kind.step_s, 95),
        "frames_per_s": n_rows * plan.taught_frames / step_s,
        "step_gflop": flop / 1e9,
        "product_gflops": products_flop / products_s / 1e9,
        "share": flop / products_flop * statistics.median(ratios),
        "data_ms_p50": 1e3 * statistics.median(kind.data_s) if kind.data_s else None,
        "wait_ms_p50": 1e3 * statistics.median(kind.wait_s) if kind.wait_s else None,
    }


def table(report: dict) -> str:
    """The rows for reading."""
    how = f"{report['dtype']}{', compiled' if report['compiled'] else ''}"
    head = (
        f"preset {report['preset']}, {how}, batch {report['batch']}, "
        f"{report['threads']} threads, {report['device']}; median of {report['steps']} steps"
    )
    names = [name for name in COLUMNS if report["rows"][0][name] is not None]
    return "\n".join([head, *grid(names, report["rows"])])
