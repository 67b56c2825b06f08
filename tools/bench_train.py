"""What a training step costs here: the base's, and the fine-tune's in both live regimes.

    python tools/bench_train.py --preset small --data data/latents --json train.json

The steps take turns in one run, so that whatever else the machine does falls on all of them.
"""

import statistics
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import pandas as pd
import torch
import tyro
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode
from tqdm import tqdm

from lmd.checkpoint import build_model
from lmd.config import Preset, Regime, preset
from lmd.machine import check_compiler, machine_dict, now_s, pick_device, tune_allocator
from lmd.outputs import check_outputs, write_json
from lmd.training.draws import BatchIndices, plan_step, step_noise
from lmd.training.losses import stage_loss
from lmd.training.options import BaseRun, FinetuneRun, TrainOptions
from lmd.training.windows import LatentSource

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


@dataclass(frozen=True)
class Options:
    """What is measured.

    Attributes:
        preset: tiny, small or paper.
        dtype: of the products; weights are float32.
        batch: windows per step.
        steps: timed steps of each kind.
        threads: that torch uses.
        device: cpu, cuda or auto.
        compile: compile the blocks, warm-up not timed.
        data: also time reading batches from this folder of latents.
        json: write the figures to this file.
    """

    preset: str = "small"
    dtype: Literal["float32", "bfloat16"] = "float32"
    batch: int = 8
    steps: int = 12
    threads: int = torch.get_num_threads()
    device: str = "cpu"
    compile: bool = False
    data: Path | None = None
    json: Path | None = None


@dataclass
class Kind:
    """A kind of training step, and what was measured of it, in seconds per step."""

    name: str
    options: TrainOptions
    clean: Tensor  # [batch, latent, frame]
    step_s: list[float] = field(default_factory=list)
    data_s: list[float] = field(default_factory=list)
    wait_s: list[float] = field(default_factory=list)


def kinds(sizes: Preset, batch: int, device: torch.device) -> list[Kind]:
    """The base on its usual window, and a fine-tune in each live regime on the stream's blocks."""
    found: list[tuple[str, TrainOptions]] = [("base", BaseRun(batch=batch, long_share=0.0))]
    live: tuple[Regime, ...] = ("block-causal", "enc-dec")
    blocks = ((sizes.window.block_frames, 1.0),)
    usual = FinetuneRun(batch=batch, block_lengths=blocks, short_context=0.0)
    found += [(regime, replace(usual, regimes=((regime, 1.0),))) for regime in live]
    shapes = [(batch, sizes.dit.latent_dim, plan_step(o, 0).n_frames) for _, o in found]
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


def measure(options: Options) -> list[dict[str, Any]]:
    """The rows of the table."""
    sizes, device = preset(options.preset), pick_device(options.device)
    student = Student(sizes, DTYPES[options.dtype], device)
    subjects = kinds(sizes, options.batch, device)
    source = LatentSource(options.data, 0) if options.data else None
    gflop = []
    for kind in subjects:
        with FlopCounterMode(display=False) as counter:
            student.step(kind, 0)  # a warm-up as well
        gflop.append(counter.get_total_flops() / 1e9)
    if options.compile:
        check_compiler()
        student.model.dit.compile_blocks()
        for kind in subjects:
            student.step(kind, 0)
    with ThreadPoolExecutor(1) as reader:
        for index in tqdm(range(options.steps), desc="rounds", mininterval=1, file=sys.stderr):
            for kind in subjects:
                reading = reader.submit(time_reading, source, kind, index) if source else None
                began = now_s(device)
                student.step(kind, index)
                ended = now_s(device)
                kind.step_s.append(ended - began)
                if reading:
                    kind.data_s.append(reading.result())
                    kind.wait_s.append(time.perf_counter() - ended)
    return [row_of(kind, each) for kind, each in zip(subjects, gflop, strict=True)]


def time_reading(source: LatentSource, kind: Kind, index: int) -> float:
    """Seconds for reading a batch in a thread, as a run does while the step before computes."""
    began = time.perf_counter()
    source.windows(index, range(len(kind.clean)), kind.clean.shape[-1])
    return time.perf_counter() - began


def row_of(kind: Kind, gflop: float) -> dict[str, Any]:
    """One line of the table: `wait` is what is left of reading when the step has ended."""
    plan, step_s = plan_step(kind.options, 0), statistics.median(kind.step_s)
    row = {
        "step": kind.name,
        "n_frames": plan.n_frames,
        "step_ms_p50": 1e3 * step_s,
        "step_ms_p95": 1e3 * pd.Series(kind.step_s).quantile(0.95),
        "frames_per_s": len(kind.clean) * plan.taught_frames / step_s,
        "step_gflop": gflop,
        "gflop_per_s": gflop / step_s,
    }
    if kind.data_s:
        row["data_ms_p50"] = 1e3 * statistics.median(kind.data_s)
        row["wait_ms_p50"] = 1e3 * statistics.median(kind.wait_s)
    return row


def main(options: Options) -> None:
    """Measure, print the table, write the JSON."""
    check_outputs(json=options.json, make_folders=True)
    torch.set_num_threads(options.threads)
    tune_allocator()
    rows = measure(options)
    print(pd.DataFrame(rows).to_markdown(index=False, floatfmt=".4g"))
    if options.json:
        about = {k: v for k, v in vars(options).items() if k not in ("json", "data")}
        report = {**about, "machine": machine_dict(), "rows": rows}
        write_json(options.json, report)


if __name__ == "__main__":
    main(tyro.cli(Options, config=(tyro.conf.FlagCreatePairsOff,)))
