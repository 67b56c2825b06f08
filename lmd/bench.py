"""`python -m lmd bench`: what a block costs here, beside the naive baseline and the bound.

The three regimes are streamed in turn, block by block, in one run, so that whatever else the
machine does falls on all of them. The bound says what the machine's own matrix products and memory
reading, measured in the same run, would allow for the same passes.
"""

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import psutil
import torch
from torch import Tensor
from tqdm import tqdm

from lmd.checkpoint import load_codec, load_model
from lmd.codec import Codec
from lmd.config import REGIMES, Preset, SpectralCodecConfig, WindowConfig, preset
from lmd.controls import Controls
from lmd.dit import LiveModel
from lmd.errors import LmdError
from lmd.machine import (
    check_compiler,
    machine_dict,
    pick_device,
    trim_memory,
    tune_allocator,
)
from lmd.oobleck import random_codec
from lmd.packed import PackedLinear, can_pack, is_packed, pack, packing_pays
from lmd.spectral import SpectralCodec
from lmd.stream import Block, Streamer
from lmd.text import HashTextEncoder

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
COLUMNS = ("regime", "n_steps", "tokens_per_block", "dit_ms_p50", "dit_ms_p95", "decode_ms_p50")
COLUMNS += ("ttff_ms", "rtf", "peak_mb", "cache_mb", "speedup_vs_naive", "bound_speedup")
COLUMNS += ("of_bound", "rebuild_ms_p50")


@dataclass(frozen=True)
class Rates:
    """What the machine can do: matrix products and reading."""

    product_flops: float  # floating-point operations per second in the model's precision
    read_bytes: float  # bytes per second


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the command's arguments."""
    parser.add_argument("--preset", default="small", help="tiny, small or paper")
    parser.add_argument("--steps", type=int, nargs="+", default=[8], help="model calls per block")
    parser.add_argument("--dtype", choices=DTYPES, default="float32")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--device", default="cpu", help="cpu, cuda, mps or auto")
    parser.add_argument("--blocks", type=int, default=8, help="timed blocks per regime")
    parser.add_argument("--block-frames", type=int, default=48)
    parser.add_argument("--model", type=Path, help="a checkpoint; random weights otherwise")
    parser.add_argument("--codec", type=Path, help="a codec checkpoint; random weights otherwise")
    parser.add_argument(
        "--no-pack", action="store_true", help="keep plain layers even where packed ones are faster"
    )
    parser.add_argument("--compile", action="store_true", help="compile the blocks; warm-up shown")
    parser.add_argument("--long", type=int, default=0, help="also stream this many blocks on end")
    parser.add_argument("--json", help="write the figures to this file, - for standard output")


def main(args: argparse.Namespace) -> int:
    """Measure, print the table, write the JSON."""
    if args.long and args.long < 110:
        raise LmdError(f"--long {args.long}", "at least 110 blocks", "Raise it.")
    if args.blocks < 2 or args.threads < 1:
        raise LmdError(
            f"--blocks {args.blocks} --threads {args.threads}",
            "at least 2 blocks and 1 thread",
            "Raise them.",
        )
    if args.compile:
        check_compiler()
    torch.set_num_threads(args.threads)
    report = measure(args)
    tell(report, table(report), args.json)
    return 0


def tell(report: dict, readable: str, path: str | None) -> None:
    """Print the table and write the JSON to a file; with the path `-` print the JSON alone."""
    text = json.dumps(report, indent=2)
    if path == "-":
        print(text)
        return
    print(readable)
    if path:
        Path(path).write_text(text + "\n", encoding="utf-8")


def measure(args: argparse.Namespace) -> dict:
    """Everything that the table shows, as plain values."""
    chosen, device = preset(args.preset), pick_device(args.device)
    dtype = DTYPES[args.dtype]
    rates = machine_rates(chosen, dtype, device)
    # The codec first: what its making needs for a moment is free again before the model comes.
    codec = load_codec(args.codec) if args.codec else build_random_codec(chosen, dtype)
    trim_memory()
    model = (load_model(args.model) if args.model else random_model(chosen)).to(device, dtype)
    named = model.dit.blocks.named_parameters()
    n_weights = sum(p.numel() for name, p in named if "to_kv" not in name)  # the text's: once
    model.eval()
    n_tokens = args.block_frames + 1
    if not args.no_pack and not args.compile and packing_pays(model, n_tokens):
        pack(model, n_tokens)
    tune_allocator()
    text = HashTextEncoder(chosen.text.n_tokens, chosen.dit.text_dim)
    streamer = Streamer(model, codec, text, chosen.window)
    compiled = compile_blocks(streamer, args.block_frames) if args.compile else {}
    rows = []
    block_s = args.block_frames / chosen.frame_rate_hz
    for n_steps in args.steps:
        base = Controls(prompt="organ", n_steps=n_steps, block_frames=args.block_frames)
        timings = interleaved(streamer, base, args.blocks)
        bounds_ms = {
            regime: bound_ms(regime, chosen.window, base, rates, n_weights, dtype.itemsize)
            for regime in REGIMES
        }
        rows += [
            row_of(regime, base, chosen.window, timings, bounds_ms, block_s) for regime in REGIMES
        ]
    return {
        "preset": args.preset,
        "dtype": args.dtype,
        "threads": args.threads,
        "device": str(device),
        "packed": is_packed(model),
        **compiled,
        "weights": str(args.model or "random"),
        "block_s": block_s,
        "product_gflops": rates.product_flops / 1e9,
        "read_gbytes_s": rates.read_bytes / 1e9,
        "machine": machine_dict(),
        **(long_stream(streamer, args.block_frames, args.steps[0], args.long) if args.long else {}),
        "rows": rows,
    }


def compile_blocks(streamer: Streamer, block_frames: int) -> dict[str, float]:
    """Compile every transformer block (CUDA graphs on a GPU): warm-up time, distance from eager."""
    plans = [Controls("organ", regime=r, n_steps=2, block_frames=block_frames) for r in REGIMES]

    def latents() -> Tensor:
        return torch.cat([block.latents for block in streamer.stream([*plans, *plans])], dim=-1)

    eager, began = latents(), time.perf_counter()
    device = streamer.denoiser.device.type
    mode = "reduce-overhead" if device == "cuda" else "default"
    streamer.denoiser.model.dit.compile_blocks(mode)
    difference = (latents() - eager).abs().max() / eager.abs().max()
    return {
        "compile_s": time.perf_counter() - began,
        "compile_max_difference": difference.item(),
    }


@dataclass
class Timings:
    """What was measured of one regime."""

    blocks: list[Block] = field(default_factory=list)
    ttff_ms: float = 0.0
    rebuild_ms: list[float] = field(default_factory=list)
    cache_bytes: int = 0


def interleaved(streamer: Streamer, base: Controls, n_blocks: int) -> dict[str, Timings]:
    """Stream the regimes in turn, after one unheard round; then rebuilds and first blocks."""
    states, timings = {}, {regime: Timings() for regime in REGIMES}
    for round_index in tqdm(range(n_blocks + 1), desc="blocks", mininterval=1, file=sys.stderr):
        for regime, measured in timings.items():
            state = states.get(regime) or streamer.start()
            block, states[regime] = streamer.step(state, replace(base, regime=regime))
            if round_index:
                measured.blocks.append(block)
    for regime, measured in timings.items():
        memory = states[regime].memory
        measured.cache_bytes = memory.n_bytes if memory else 0
        for prompt in ("harp", "flute"):
            changed = replace(base, regime=regime, prompt=prompt)
            measured.rebuild_ms.append(streamer.step(states[regime], changed)[0].dit_ms)
        began = time.perf_counter()
        streamer.step(streamer.start(), replace(base, regime=regime))
        measured.ttff_ms = 1e3 * (time.perf_counter() - began)
    return timings


def long_stream(streamer: Streamer, block_frames: int, n_steps: int, n_blocks: int) -> dict:
    """Whether late blocks cost what early ones do: medians of 50 blocks and the cache's size."""
    state, dit_ms, sizes = streamer.start(), [], set()
    controls = Controls(prompt="organ", n_steps=n_steps, block_frames=block_frames)
    for _ in tqdm(range(n_blocks), desc="long stream", mininterval=1, file=sys.stderr):
        block, state = streamer.step(state, controls)
        dit_ms.append(block.dit_ms)
        sizes.add(state.memory.n_bytes)
    early, late = statistics.median(dit_ms[10:60]), statistics.median(dit_ms[-50:])
    return {
        "long_blocks": n_blocks,
        "long_cost_ratio": late / early,
        "long_cache_sizes": len(sizes),
    }


def bound_ms(
    regime: str, window: WindowConfig, base: Controls, rates: Rates, n_weights: int, n_bytes: int
) -> float:
    """What the passes of a block would take if nothing but products or reading held them up."""
    passes = tokens_of_passes(regime, window.context_frames, base.block_frames, base.n_steps)
    reading_s = n_weights * n_bytes / rates.read_bytes
    return 1e3 * sum(max(2 * n_weights * n / rates.product_flops, reading_s) for n in passes)


def row_of(
    regime: str,
    base: Controls,
    window: WindowConfig,
    timings: dict[str, Timings],
    bounds_ms: dict[str, float],
    block_s: float,
) -> dict:
    """One line of the table."""
    measured, naive = timings[regime], timings["full"]
    dit = [block.dit_ms for block in measured.blocks]
    dit_ms = statistics.median(dit)
    decode_ms = statistics.median(block.decode_ms for block in measured.blocks)
    passes = tokens_of_passes(regime, window.context_frames, base.block_frames, base.n_steps)
    return {
        "regime": regime,
        "n_steps": base.n_steps,
        "tokens_per_block": sum(passes),
        "dit_ms_p50": dit_ms,
        "dit_ms_p95": percentile(dit, 95),
        "decode_ms_p50": decode_ms,
        "ttff_ms": measured.ttff_ms,
        "rtf": 1e3 * block_s / (dit_ms + decode_ms),
        "peak_mb": peak_mb(measured.blocks[0].latents.device),
        "cache_mb": measured.cache_bytes / 2**20,
        "speedup_vs_naive": statistics.median(block.dit_ms for block in naive.blocks) / dit_ms,
        "bound_speedup": bounds_ms["full"] / bounds_ms[regime],
        "of_bound": bounds_ms[regime] / dit_ms,
        "rebuild_ms_p50": statistics.median(measured.rebuild_ms),
    }


def tokens_of_passes(regime: str, context: int, block: int, n_steps: int) -> list[int]:
    """How many tokens each transformer pass of a block computes, once a stream is under way."""
    if regime == "full":
        return [context + block + 1] * n_steps
    if regime == "enc-dec":
        return [context] + [block + 1] * n_steps
    return [2 * block + 1] + [block + 1] * (n_steps - 1)


def machine_rates(chosen: Preset, dtype: torch.dtype, device: torch.device) -> Rates:
    """This machine's best matrix product of the model's widths, and its reading speed."""
    width, wide = chosen.dit.width, 2 * chosen.dit.ff_mult * chosen.dit.width
    best = 0.0
    for n_rows in (chosen.window.window_frames + 1, 1024):
        a = torch.randn(n_rows, width, device=device).to(dtype)
        layer = torch.nn.Linear(width, wide, bias=False, device=device).to(dtype)
        layers = [layer]
        if device.type == "cpu" and can_pack(dtype):
            layers.append(PackedLinear(layer, n_rows))
        for way in layers:
            with torch.no_grad():
                seconds = fastest(lambda a=a, way=way: way(a), device)
            best = max(best, 2 * n_rows * width * wide / seconds)
    buffer = torch.zeros(2**26, device=device)
    seconds = fastest(lambda: buffer.sum(), device)
    return Rates(best, buffer.nbytes / seconds)


def fastest(work: Callable[[], object], device: torch.device, n: int = 7) -> float:
    """The shortest of a few timings, in seconds."""
    seconds = []
    for _ in range(n + 2):
        began = time.perf_counter()
        work()
        if device.type == "cuda":
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - began)
    return min(seconds[2:])


def random_model(chosen: Preset) -> LiveModel:
    """Random weights of the preset's shape that keep the scale of what goes through them.

    Latents far from unit scale would slow the codec down: sines of huge numbers are dear.
    """
    model = LiveModel(chosen.dit)
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        if parameter.ndim > 1:
            fan_in = parameter[0].numel()
            parameter.data.normal_(0, fan_in**-0.5, generator=generator)
    return model.requires_grad_(False)


def build_random_codec(chosen: Preset, dtype: torch.dtype) -> Codec:
    """A codec of the preset's shape with random weights."""
    if isinstance(chosen.codec, SpectralCodecConfig):
        return SpectralCodec(chosen.codec).eval().requires_grad_(False)
    return random_codec(chosen.codec, dtype=dtype)


def peak_mb(device: torch.device) -> float:
    """The most memory this process has held, in MiB: the GPU's on a GPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated() / 2**20
    info = psutil.Process().memory_info()
    peak = getattr(info, "peak_wset", None)  # Windows
    if peak is None:
        import resource

        unit = 1 if sys.platform == "darwin" else 1024
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
    return peak / 2**20


def percentile(values: list[float], percent: float) -> float:
    """The nearest-rank percentile."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, round(percent / 100 * (len(ordered) - 1)))]


def table(report: dict) -> str:
    """The rows for reading."""
    head = (
        f"preset {report['preset']}, {report['dtype']}, {report['threads']} threads, "
        f"{report['device']}; products {report['product_gflops']:.0f} GFLOP/s, "
        f"reading {report['read_gbytes_s']:.1f} GB/s; block {report['block_s']:.2f} s"
    )
    lines = grid(COLUMNS, report["rows"])
    if "compile_s" in report:
        lines.append(
            f"compiled in {report['compile_s']:.0f} s; furthest from eager, of the largest latent: "
            f"{report['compile_max_difference']:.1e}"
        )
    if "long_blocks" in report:
        lines.append(
            f"after {report['long_blocks']} blocks a block costs {report['long_cost_ratio']:.3f} "
            f"of what an early one does; {report['long_cache_sizes']} cache size(s) seen"
        )
    return "\n".join([head, *lines])


def grid(columns: Sequence[str], rows: Sequence[Mapping[str, object]]) -> list[str]:
    """A head and the rows, right-aligned, a line each."""
    cells = [list(columns)] + [[_show(row[name]) for name in columns] for row in rows]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    return ["  ".join(c.rjust(w) for c, w in zip(row, widths, strict=True)) for row in cells]


def _show(value: object) -> str:
    """A number with three significant digits, a name as it is."""
    if isinstance(value, float):
        return f"{value:.3g}" if value < 1000 else f"{value:.0f}"
    return str(value)
