"""`lmd bench`: what a block costs here, engine beside engine, regime beside regime.

All streams are played in turn, block by block, in one run, so that whatever else the machine does
falls on all of them. The regime `full` computes the whole window at every step.
"""

import json
import statistics
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import chain, product
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor
from tqdm import tqdm

from lmd.codec.base import Codec
from lmd.codec.oobleck import random_codec
from lmd.codec.spectral import SpectralCodec
from lmd.config import REGIMES, Preset, SpectralCodecConfig, preset
from lmd.errors import LmdError
from lmd.graph import PRECISIONS
from lmd.machine import (
    check_compiler,
    machine_dict,
    now_s,
    peak_mb,
    pick_device,
    trim_memory,
    tune_allocator,
)
from lmd.model.live_model import LiveModel
from lmd.model.text import HashTextEncoder
from lmd.outputs import check_outputs, write_json
from lmd.pretrained import DTYPES, ENGINES, open_instrument
from lmd.stream.block import LiveDenoiser
from lmd.stream.controls import Controls
from lmd.stream.streamer import Block, Streamer, StreamState

# Furthest latent of a compiled stream from the eager one, as a share of the largest. Measured with
# `tiny` and `small`: 6e-7 and 9e-3, one to five rounding steps; deeper models sum more of them.
COMPILE_TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 0.05}
UNHEARD_ROUNDS = 2  # the first makes caches, the second absorbs a block for the first time
NAMES = ["engine", "dtype", "regime", "n_steps"]  # of a row
COLUMNS = [*NAMES, "tokens_per_block", "dit_ms_p50", "dit_ms_p95", "decode_ms_p50", "ttff_ms"]
COLUMNS += ["rtf", "cache_mb", "speedup_vs_full", "rebuild_ms_p50"]
Streamers = Mapping[tuple[str, str], Streamer]  # by engine and precision


@dataclass(frozen=True)
class Options:
    """What is measured."""

    preset: str = "small"  # tiny, small or paper, with random weights
    source: str | None = None  # trained weights instead, as `lmd stream` takes them
    steps: tuple[int, ...] = (8,)  # model calls per block
    engine: tuple[str, ...] = ("torch",)  # torch, graph or both
    dtype: tuple[str, ...] = ("float32",)  # float32, bfloat16 or (graph) int8
    threads: int = 0  # how many; 0: as many as torch would use
    device: str = "cpu"  # cpu, cuda, mps or auto
    blocks: int = 8  # timed blocks of each stream
    block_frames: int = 48  # length of a block
    compile: bool = False  # by torch, block by block; exit status 1 if results move too far
    json: str | None = None  # write the figures to this file; - is standard output

    def check(self) -> None:
        """Refuse what cannot be measured."""
        if self.blocks < 2 or self.threads < 0:
            found = f"--blocks {self.blocks} --threads {self.threads}"
            expected = "at least 2 blocks and no negative number of threads"
            raise LmdError(found, expected, "Change them.")
        unknown = [*({*self.engine} - {*ENGINES}), *({*self.dtype} - {*PRECISIONS})]
        if unknown:
            expected = f"engines {', '.join(ENGINES)}; dtypes {', '.join(PRECISIONS)}"
            raise LmdError(f"{', '.join(unknown)}", expected, "Pick from these.")
        check_outputs(json=self.json, json_key="machine", make_folders=True)
        if self.compile:
            check_compiler()


def main(options: Options) -> int:
    """Measure; print the table and write the JSON, or with `--json -` print the JSON alone."""
    options.check()
    if options.threads:
        torch.set_num_threads(options.threads)
    report = measure(options)
    print(json.dumps(report, indent=2) if options.json == "-" else table(report))
    if options.json not in (None, "-"):
        write_json(options.json, report)
    compiled = report.get("compiled", {}).values()
    return int(any(made["max_difference"] > made["tolerance"] for made in compiled))


def measure(options: Options) -> dict[str, Any]:
    """Everything that the table shows, as plain values."""
    chosen, device, compiled, rows = preset(options.preset), pick_device(options.device), {}, []
    engines = [  # PyTorch multiplies no int8 here
        (engine, dtype)
        for engine, dtype in product(options.engine, options.dtype)
        if engine == "graph" or dtype in DTYPES
    ]
    with tempfile.TemporaryDirectory() as graphs:
        streamers = {each: open_streamer(options, *each, Path(graphs)) for each in engines}
        tune_allocator()
        for (engine, dtype), streamer in streamers.items():
            if options.compile and engine == "torch":
                compiled[dtype] = compile_blocks(streamer, options.block_frames)
        for n_steps in options.steps:
            base = Controls(prompt="organ", n_steps=n_steps, block_frames=options.block_frames)
            rows += play_in_turn(streamers, base, options.blocks)
    return {
        "preset": options.preset,
        "weights": options.source or "random",
        "threads": torch.get_num_threads(),
        "device": str(device),
        "block_s": options.block_frames / chosen.frame_rate_hz,
        "peak_mb": peak_mb(device),
        "machine": machine_dict(),
        **({"compiled": compiled} if compiled else {}),
        "rows": rows,
    }


def open_streamer(options: Options, engine: str, dtype: str, graphs: Path) -> Streamer:
    """What plays on that engine in that precision, always the same weights.

    `graphs` is a folder, empty at first, where graphs of random weights are left for the next.
    """
    if options.source is not None:
        how = {"device": options.device, "dtype": dtype, "engine": engine}
        return open_instrument(options.source, **how).streamer
    chosen, device = preset(options.preset), pick_device(options.device)
    codec = build_random_codec(chosen, DTYPES.get(dtype, torch.float32))
    if engine == "graph":
        from lmd.graph.export import export
        from lmd.graph.runtime import load_graphs

        if not any(graphs.iterdir()):
            plain = build_random_codec(chosen, torch.float32)
            export(random_model(chosen), plain, chosen, graphs, source="random")
        _, exported, own, _ = load_graphs(graphs, dtype)
        model, codec = LiveDenoiser(exported), own or codec
    else:
        codec.to(device)
        model = random_model(chosen).to(device, DTYPES[dtype]).eval()
    trim_memory()
    encoder = HashTextEncoder(chosen.text.n_tokens, chosen.dit.text_dim)
    return Streamer(model, codec, encoder, chosen.window)


def compile_blocks(streamer: Streamer, block_frames: int) -> dict[str, float]:
    """Compile every transformer block (CUDA graphs on a GPU): warm-up time, distance from eager.

    Two blocks of each regime: the second one's first pass absorbs the first where that is done.
    """
    once = [Controls("organ", regime=r, n_steps=2, block_frames=block_frames) for r in REGIMES]
    plans = [controls for controls in once for _ in range(2)]

    def latents() -> Tensor:
        return torch.cat([block.latents for block in streamer.stream(plans)], dim=-1)

    eager, began = latents(), time.perf_counter()
    mode = "reduce-overhead" if streamer.denoiser.device.type == "cuda" else "default"
    dit = streamer.denoiser.model.dit
    dit.compile_blocks(mode)
    difference = (latents() - eager).abs().max() / eager.abs().max()
    return {
        "seconds": time.perf_counter() - began,
        "max_difference": difference.item(),
        "tolerance": COMPILE_TOLERANCE[dit.dtype],
    }


def play_in_turn(streamers: Streamers, base: Controls, n_blocks: int) -> list[dict[str, Any]]:
    """Play every stream in every regime in turn, after unheard rounds; a row of each."""
    played: dict[tuple[str, str, str], list[Block]] = {
        (*engine, regime): [] for engine in streamers for regime in REGIMES
    }
    states: dict[tuple[str, str, str], StreamState] = {}
    rounds = range(-UNHEARD_ROUNDS, n_blocks)
    for round_index in tqdm(rounds, desc="blocks", mininterval=1, file=sys.stderr):
        for key, blocks in played.items():
            streamer, controls = streamers[key[:2]], replace(base, regime=key[2])
            block, states[key] = streamer.step(states.get(key) or streamer.start(), controls)
            if round_index >= 0:
                blocks.append(block)
    rows = []
    for (engine, dtype, regime), blocks in played.items():
        names = {"engine": engine, "dtype": dtype, "regime": regime}
        state = states.pop((engine, dtype, regime))
        row = row_of(streamers[engine, dtype], state, replace(base, regime=regime), blocks)
        naive_ms = statistics.median(block.dit_ms for block in played[engine, dtype, "full"])
        rows.append(names | row | {"speedup_vs_full": naive_ms / row["dit_ms_p50"]})
    return rows


def row_of(
    streamer: Streamer, state: StreamState, controls: Controls, blocks: Sequence[Block]
) -> dict[str, Any]:
    """A line of the table, from timed blocks; rebuilds and a first block are timed now."""
    made = rebuilds(streamer, state, controls)
    began_s = now_s(streamer.denoiser.device)
    streamer.step(streamer.start(), controls)
    first_s = now_s(streamer.denoiser.device) - began_s
    rebuild_ms = {cause: [block.dit_ms for block in made[cause]] for cause in made}
    dit_ms = [block.dit_ms for block in blocks]
    dit_ms_p50 = statistics.median(dit_ms)
    decode_ms = statistics.median(block.decode_ms for block in blocks)
    codec, o, n_steps = streamer.codec, controls.block_frames, controls.n_steps
    block_s = o * codec.samples_per_frame / codec.sample_rate
    n_context = streamer.window.context_frames
    return {
        "n_steps": n_steps,
        "tokens_per_block": tokens_of(controls.regime, n_context, o, n_steps),
        "dit_ms_p50": dit_ms_p50,
        "dit_ms_p95": float(np.percentile(dit_ms, 95, method="nearest")),
        "decode_ms_p50": decode_ms,
        "ttff_ms": 1e3 * first_s,
        "rtf": 1e3 * block_s / (dit_ms_p50 + decode_ms),
        "cache_mb": state.memory.n_bytes / 2**20 if state.memory else 0.0,
        "rebuild_ms_p50": statistics.median(chain(*rebuild_ms.values())),
        "rebuild_ms": {cause: statistics.median(ms) for cause, ms in rebuild_ms.items()},
    }


def rebuilds(
    streamer: Streamer, state: StreamState, base: Controls, n_times: int = 2
) -> dict[str, list[Block]]:
    """Blocks that encode their context afresh, by the control that invalidated the cache.

    All are made with `base` (which drops a block of context, for that cause); what differs is the
    block before.
    """
    lengths, before = streamer.window.block_lengths(), replace(base, n_steps=1)
    length = min(set(lengths) - {base.block_frames}, key=lambda n: abs(n - base.block_frames))
    regime = "enc-dec" if base.regime == "block-causal" else "block-causal"
    dropping = replace(base, drop_context_frames=base.block_frames)
    made = {}
    for cause, earlier, present in (
        ("prompt", replace(before, prompt="harp"), base),
        ("block_frames", replace(before, block_frames=length), base),
        ("regime", replace(before, regime=regime), base),
        ("drop_context_frames", before, dropping),
    ):
        ready = streamer.step(state, earlier)[1]
        made[cause] = [streamer.step(ready, present)[0] for _ in range(n_times)]
    return made


def tokens_of(regime: str, n_context: int, block_frames: int, n_steps: int) -> int:
    """Tokens that go through the transformer for one block; the global token counts."""
    context = {"full": n_steps * n_context, "enc-dec": n_context + 1, "block-causal": block_frames}
    return context[regime] + n_steps * (block_frames + 1)


def random_model(chosen: Preset) -> LiveModel:
    """Random weights that keep the scale of what goes through: sines of huge numbers are dear."""
    model, generator = LiveModel(chosen.dit), torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        if parameter.ndim > 1:
            fan_in = parameter[0].numel()
            parameter.data.normal_(0, fan_in**-0.5, generator=generator)
    return model.eval().requires_grad_(False)


def build_random_codec(chosen: Preset, dtype: torch.dtype) -> Codec:
    """A codec of the preset's shape with random weights; a stream from silence encodes nothing."""
    if isinstance(chosen.codec, SpectralCodecConfig):
        torch.manual_seed(0)
        return SpectralCodec(chosen.codec).eval().requires_grad_(False)
    return random_codec(chosen.codec, dtype=dtype).let_encoder_go()


def table(report: Mapping[str, Any]) -> str:
    """The report for reading, three significant digits each."""
    rows = pd.DataFrame(report["rows"])
    rebuilt = rows[NAMES].join(pd.DataFrame([*rows["rebuild_ms"]]).add_prefix("by "))
    grids = [
        frame.to_string(index=False, float_format=lambda value: f"{value:.3g}")
        for frame in (rows[COLUMNS], rebuilt)
    ]
    head = f"preset {report['preset']}, {report['threads']} threads, {report['device']}; "
    head += f"block {report['block_s']:.2f} s, at most {report['peak_mb']:.0f} MiB held"
    about = "ms of a block whose context is encoded afresh, by the control that changed"
    lines = [head, grids[0], "", about, grids[1]]
    for dtype, made in report.get("compiled", {}).items():
        lines.append(
            f"compiled {dtype} in {made['seconds']:.0f} s; furthest from eager, of the largest "
            f"latent: {made['max_difference']:.1e} ({made['tolerance']:.0e} allowed)"
        )
    return "\n".join(lines)
