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
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from itertools import chain
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from lmd.bound import Pass, bound_ms, machine_rates, passes_of
from lmd.checkpoint import load_codec, load_model
from lmd.codec.base import Codec
from lmd.codec.oobleck import OobleckCodec, random_codec
from lmd.codec.spectral import SpectralCodec, decode_in_panels
from lmd.config import REGIMES, Preset, SpectralCodecConfig, preset
from lmd.data.places import check_file_free
from lmd.decoder_speed import measure_decoder
from lmd.errors import LmdError
from lmd.machine import (
    check_compiler,
    machine_dict,
    peak_mb,
    pick_device,
    trim_memory,
    tune_allocator,
)
from lmd.model.live_model import LiveModel
from lmd.model.text import HashTextEncoder
from lmd.packed import fastest_layout, is_packed, pack
from lmd.stream.controls import Controls
from lmd.stream.streamer import Block, Streamer, StreamState

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
# Furthest latent of a compiled stream from the eager one, as a share of the largest. Measured with
# `tiny` and `small`: 6e-7, 9e-3, 1e-3, one to five rounding steps; deeper models sum more of them.
COMPILE_TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 0.05, torch.float16: 0.01}
UNHEARD_ROUNDS = 2  # the first makes caches, the second absorbs a block for the first time
COLUMNS = ("regime", "n_steps", "tokens_per_block", "dit_ms_p50", "dit_ms_p95", "decode_ms_p50")
COLUMNS += ("ttff_ms", "rtf", "peak_mb", "cache_mb", "speedup_vs_naive", "bound_speedup")
COLUMNS += ("of_bound", "rebuild_ms_p50")


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
    parser.add_argument(
        "--compile", action="store_true", help="compile the blocks; 1 if results move too far"
    )
    parser.add_argument(
        "--decoder", action="store_true", help="also stream Stable Audio's decoder on its own"
    )
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
    check_output(args.json)
    if args.compile:
        check_compiler()
    torch.set_num_threads(args.threads)
    report = measure(args)
    tell(report, table(report), args.json)
    agrees = not args.compile or report["compile_max_difference"] <= report["compile_tolerance"]
    return 0 if agrees else 1


def check_output(path: str | None) -> None:
    """Refuse a path for `tell` that cannot be written.

    Raises:
        LmdError: it is a folder, lies in a file, or may not be written.
    """
    if path and path != "-":
        check_file_free(Path(path))


def tell(report: dict, readable: str, path: str | None) -> None:
    """Print the table and write the JSON to a file; with the path `-` print the JSON alone."""
    text = json.dumps(report, indent=2)
    if path == "-":
        print(text)
        return
    print(readable)
    if path:
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        Path(path).write_text(text + "\n", encoding="utf-8")


def measure(args: argparse.Namespace) -> dict:
    """Everything that the table shows, as plain values."""
    chosen, device = preset(args.preset), pick_device(args.device)
    dtype = DTYPES[args.dtype]
    rates = machine_rates(chosen, dtype, device)
    model, codec = open_parts(chosen, args.model, args.codec, dtype, device)
    if args.decoder and not isinstance(codec, OobleckCodec):
        raise LmdError(
            f"--decoder with preset {args.preset}",
            "a preset with Stable Audio's autoencoder: paper",
            "Leave the option out: decode_ms_p50 is this codec's time.",
        )
    of_block = {name: p.numel() for name, p in model.dit.blocks[-1].named_parameters()}
    n_met = sum(n for name, n in of_block.items() if "to_kv" not in name)  # the text's: once
    n_spared = n_met - of_block["self_attn.to_qkv.weight"]
    n_weights = n_met * len(model.dit.blocks)
    n_tokens = args.block_frames + 1
    layout = "plain" if args.no_pack or args.compile else fastest_layout(model, n_tokens)
    pack(model, layout, n_tokens)
    if layout == "panels":
        decode_in_panels(codec)  # as instruments do
    trim_memory()
    tune_allocator()
    text = HashTextEncoder(chosen.text.n_tokens, chosen.dit.text_dim)
    streamer = Streamer(model, codec, text, chosen.window)
    extra = compile_blocks(streamer, args.block_frames) if args.compile else {}
    rows = []
    block_s = args.block_frames / chosen.frame_rate_hz
    for n_steps in args.steps:
        base = Controls(prompt="organ", n_steps=n_steps, block_frames=args.block_frames)
        timings = interleaved(streamer, base, args.blocks)
        n_context = chosen.window.context_frames
        passes = {r: passes_of(r, n_context, args.block_frames, n_steps) for r in REGIMES}
        bounds_ms = {
            regime: bound_ms(of_regime, rates, n_weights, n_spared, dtype.itemsize)
            for regime, of_regime in passes.items()
        }
        rows += [row_of(regime, n_steps, passes, timings, bounds_ms, block_s) for regime in REGIMES]
    if args.decoder:
        extra["decoder"] = asdict(measure_decoder(codec, args.block_frames, args.blocks))
    if args.long:
        extra |= long_stream(streamer, args.block_frames, args.steps[0], args.long)
    return {
        "preset": args.preset,
        "dtype": args.dtype,
        "threads": args.threads,
        "device": str(device),
        "packed": is_packed(model),
        "layout": layout,
        "weights": str(args.model or "random"),
        "block_s": block_s,
        "product_gflops": rates.product_flops / 1e9,
        "read_gbytes_s": rates.read_bytes / 1e9,
        "machine": machine_dict(),
        **extra,
        "rows": rows,
    }


def open_parts(
    chosen: Preset,
    model_path: Path | None,
    codec_path: Path | None,
    dtype: torch.dtype,
    device: torch.device,
) -> tuple[LiveModel, Codec]:
    """Model and codec on the device, from files or with random weights.

    The codec first: what its making needs for a moment is free again before the model comes. A
    stream from silence encodes nothing, so Stable Audio's encoder is not kept.
    """
    codec = load_codec(codec_path, dtype) if codec_path else build_random_codec(chosen, dtype)
    if isinstance(codec, OobleckCodec):
        codec.let_encoder_go()
    codec.to(device)
    trim_memory()
    model = load_model(model_path) if model_path else random_model(chosen)
    return model.to(device, dtype).eval(), codec


def compile_blocks(streamer: Streamer, block_frames: int) -> dict[str, float]:
    """Compile every transformer block (CUDA graphs on a GPU): warm-up time, distance from eager.

    Two blocks of each regime: the second one's first pass absorbs the first where that is done. The
    distance is the largest of any latent of these, as a share of the largest latent.
    """
    once = [Controls("organ", regime=r, n_steps=2, block_frames=block_frames) for r in REGIMES]
    plans = [controls for controls in once for _ in range(2)]

    def latents() -> Tensor:
        return torch.cat([block.latents for block in streamer.stream(plans)], dim=-1)

    eager, began = latents(), time.perf_counter()
    device = streamer.denoiser.device.type
    mode = "reduce-overhead" if device == "cuda" else "default"
    streamer.denoiser.model.dit.compile_blocks(mode)
    difference = (latents() - eager).abs().max() / eager.abs().max()
    return {
        "compile_s": time.perf_counter() - began,
        "compile_max_difference": difference.item(),
        "compile_tolerance": COMPILE_TOLERANCE[streamer.denoiser.model.dit.dtype],
    }


@dataclass
class Timings:
    """What was measured of one regime."""

    blocks: list[Block] = field(default_factory=list)
    ttff_ms: float = 0.0
    rebuild_ms: dict[str, list[float]] = field(default_factory=dict)
    cache_bytes: int = 0


def interleaved(streamer: Streamer, base: Controls, n_blocks: int) -> dict[str, Timings]:
    """Stream the regimes in turn, after unheard rounds; then rebuilds and first blocks."""
    states, timings = {}, {regime: Timings() for regime in REGIMES}
    rounds = range(-UNHEARD_ROUNDS, n_blocks)
    for round_index in tqdm(rounds, desc="blocks", mininterval=1, file=sys.stderr):
        for regime, measured in timings.items():
            state = states.get(regime) or streamer.start()
            block, states[regime] = streamer.step(state, replace(base, regime=regime))
            if round_index >= 0:
                measured.blocks.append(block)
    for regime, measured in timings.items():
        state = states.pop(regime)
        measured.cache_bytes = state.memory.n_bytes if state.memory else 0
        made = rebuilds(streamer, state, replace(base, regime=regime))
        measured.rebuild_ms = {cause: [b.dit_ms for b in blocks] for cause, blocks in made.items()}
        began = time.perf_counter()
        streamer.step(streamer.start(), replace(base, regime=regime))
        measured.ttff_ms = 1e3 * (time.perf_counter() - began)
    return timings


def rebuilds(
    streamer: Streamer, state: StreamState, base: Controls, n_times: int = 2
) -> dict[str, list[Block]]:
    """Blocks that encode their context afresh, by the control that invalidated the cache.

    All are made with `base` (forgetting a block is added to it); what differs is the block before.
    """
    lengths, before = streamer.window.block_lengths(), replace(base, n_steps=1)
    length = min(set(lengths) - {base.block_frames}, key=lambda n: abs(n - base.block_frames))
    regime = "enc-dec" if base.regime == "block-causal" else "block-causal"
    forgetting = replace(base, drop_context_frames=base.block_frames)
    made = {}
    for cause, earlier, present in (
        ("prompt", replace(before, prompt="harp"), base),
        ("block_frames", replace(before, block_frames=length), base),
        ("regime", replace(before, regime=regime), base),
        ("drop_context_frames", before, forgetting),
    ):
        ready = streamer.step(state, earlier)[1]
        made[cause] = [streamer.step(ready, present)[0] for _ in range(n_times)]
    return made


def long_stream(streamer: Streamer, block_frames: int, n_steps: int, n_blocks: int) -> dict:
    """Whether late blocks cost what early ones do, and the cache's sizes.

    After `n_blocks - 50` blocks, a second stream begins; its blocks from the tenth on and the first
    one's last 50 take turns, so that whatever the machine does falls on both. Medians.
    """
    controls = Controls(prompt="organ", n_steps=n_steps, block_frames=block_frames)
    late, early, sizes = streamer.start(), streamer.start(), set()
    for _ in tqdm(range(n_blocks - 50), desc="long stream", mininterval=1, file=sys.stderr):
        _, late = streamer.step(late, controls)
        sizes.add(late.memory.n_bytes)
    for _ in range(10):
        _, early = streamer.step(early, controls)
    late_ms, early_ms = [], []
    for _ in tqdm(range(50), desc="in turns", mininterval=1, file=sys.stderr):
        block, late = streamer.step(late, controls)
        late_ms.append(block.dit_ms)
        sizes.add(late.memory.n_bytes)
        block, early = streamer.step(early, controls)
        early_ms.append(block.dit_ms)
    return {
        "long_blocks": n_blocks,
        "long_cost_ratio": statistics.median(late_ms) / statistics.median(early_ms),
        "long_cache_sizes": len(sizes),
    }


def row_of(
    regime: str,
    n_steps: int,
    passes: dict[str, list[Pass]],
    timings: dict[str, Timings],
    bounds_ms: dict[str, float],
    block_s: float,
) -> dict:
    """One line of the table."""
    measured, naive = timings[regime], timings["full"]
    dit = [block.dit_ms for block in measured.blocks]
    dit_ms = statistics.median(dit)
    decode_ms = statistics.median(block.decode_ms for block in measured.blocks)
    return {
        "regime": regime,
        "n_steps": n_steps,
        "tokens_per_block": sum(one.n_tokens for one in passes[regime]),
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
        "rebuild_ms_p50": statistics.median(chain(*measured.rebuild_ms.values())),
        "rebuild_ms": {k: statistics.median(v) for k, v in measured.rebuild_ms.items()},
    }


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
    rebuilt = [
        {name: row[name] for name in COLUMNS[:2]}
        | {f"by {cause}": ms for cause, ms in row["rebuild_ms"].items()}
        for row in report["rows"]
    ]
    lines += ["", "ms of a block whose context is encoded afresh, by the control that changed"]
    lines += grid(list(rebuilt[0]), rebuilt)
    if "compile_s" in report:
        lines.append(
            f"compiled in {report['compile_s']:.0f} s; furthest from eager, of the largest latent: "
            f"{report['compile_max_difference']:.1e} ({report['compile_tolerance']:.0e} allowed)"
        )
    if "decoder" in report:
        speed = report["decoder"]
        lines.append(
            f"decoder alone, {speed['dtype']}: {speed['ms_p50']:.0f} ms per block (p95 "
            f"{speed['ms_p95']:.0f}), {speed['rtf']:.1f} times real time; products at "
            f"{speed['product_gflops_s']:.0f} GFLOP/s would allow {speed['bound_rtf']:.1f}"
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
