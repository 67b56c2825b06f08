"""`lmd bench`: what a block costs here, engine beside engine, regime beside regime.

All streams are played in turn, block by block, in one run, so that whatever else the machine does
falls on all of them. `full` computes the whole window at every step. With stable-audio-tools
installed, its own transformer's pass over the same window is timed as well: the naive baseline.
"""

import json
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from importlib.util import find_spec
from itertools import chain, product
from pathlib import Path

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
COLUMNS = ("engine", "dtype", "regime", "n_steps", "tokens_per_block", "dit_ms_p50", "dit_ms_p95")
COLUMNS += ("decode_ms_p50", "ttff_ms", "rtf", "cache_mb", "speedup_vs_full", "rebuild_ms_p50")


@dataclass(frozen=True)
class Options:
    """Measure.

    Attributes:
        preset: tiny, small or paper, with random weights.
        source: trained weights instead, as `lmd stream` takes them.
        steps: model calls per block.
        engine: torch, graph or both.
        dtype: float32, bfloat16 or (graph) int8.
        threads: how many; 0: as many as torch would use.
        device: cpu, cuda, mps or auto.
        blocks: timed blocks of each stream.
        block_frames: length of a block.
        compile: let torch compile the blocks; exit status 1 if results move too far.
        long: also stream this many blocks on end.
        json: write the figures to this file; - is standard output.
    """

    preset: str = "small"
    source: str | None = None
    steps: tuple[int, ...] = (8,)
    engine: tuple[str, ...] = ("torch",)
    dtype: tuple[str, ...] = ("float32",)
    threads: int = 0
    device: str = "cpu"
    blocks: int = 8
    block_frames: int = 48
    compile: bool = False
    long: int = 0
    json: str | None = None

    def check(self) -> None:
        """Refuse what cannot be measured."""
        if self.long and self.long < 110:
            raise LmdError(f"--long {self.long}", "at least 110 blocks", "Raise it.")
        if self.blocks < 2 or self.threads < 0:
            raise LmdError(
                f"--blocks {self.blocks} --threads {self.threads}",
                "at least 2 blocks and no negative number of threads",
                "Change them.",
            )
        unknown = [*({*self.engine} - {*ENGINES}), *({*self.dtype} - {*PRECISIONS})]
        if unknown:
            expected = f"engines {', '.join(ENGINES)}; dtypes {', '.join(PRECISIONS)}"
            raise LmdError(f"{', '.join(unknown)}", expected, "Pick from these.")
        check_outputs(json=self.json, json_key="machine", make_folders=True)
        if self.compile:
            check_compiler()


def main(options: Options) -> int:
    """Measure, print the table, write the JSON."""
    options.check()
    if options.threads:
        torch.set_num_threads(options.threads)
    report = measure(options)
    tell(report, table(report), options.json)
    compiled = report.get("compiled", {})
    return int(any(c["max_difference"] > c["tolerance"] for c in compiled.values()))


def tell(report: dict, readable: str, path: str | None) -> None:
    """Print the table and write the JSON to a file; with the path `-` print the JSON alone."""
    if path == "-":
        print(json.dumps(report, indent=2))
        return
    print(readable)
    if path is not None:
        write_json(path, report)


def measure(options: Options) -> dict:
    """Everything that the table shows, as plain values."""
    chosen, extra = preset(options.preset), {}
    device = pick_device(options.device)
    engines = [  # PyTorch multiplies no int8 here
        (engine, dtype)
        for engine, dtype in product(options.engine, options.dtype)
        if engine == "graph" or dtype in DTYPES
    ]
    with opened(options, chosen, engines) as streamers:
        tune_allocator()
        if options.compile:
            for (engine, dtype), streamer in streamers.items():
                if engine == "torch":
                    made = compile_blocks(streamer, options.block_frames)
                    extra.setdefault("compiled", {})[dtype] = made
        rows = []
        for n_steps in options.steps:
            base = Controls(prompt="organ", n_steps=n_steps, block_frames=options.block_frames)
            timings = interleaved(streamers, base, options.blocks)
            rows += [row_of(key, timings, base, chosen) for key in timings]
        if options.long:
            streamer = next(iter(streamers.values()))
            extra |= long_stream(streamer, options.block_frames, options.steps[0], options.long)
        if find_spec("stable_audio_tools") is not None:
            reference = {d: reference_pass_ms(chosen, d) for d in options.dtype if d in DTYPES}
            extra["stable_audio_tools_pass_ms"] = reference
            for row in rows:
                if row["dtype"] in reference:
                    naive_ms = row["n_steps"] * reference[row["dtype"]]
                    row["speedup_vs_naive"] = naive_ms / row["dit_ms_p50"]
    return {
        "preset": options.preset,
        "weights": options.source or "random",
        "threads": torch.get_num_threads(),
        "device": str(device),
        "block_s": options.block_frames / chosen.frame_rate_hz,
        "peak_mb": peak_mb(device),
        "machine": machine_dict(),
        **extra,
        "rows": rows,
    }


@contextmanager
def opened(
    options: Options, chosen: Preset, engines: Sequence[tuple[str, str]]
) -> Iterator[dict[tuple[str, str], Streamer]]:
    """A streamer for every engine and precision, all of the same weights."""
    if options.source is not None:
        yield {
            (engine, dtype): open_instrument(
                options.source, device=options.device, dtype=dtype, engine=engine
            ).streamer
            for engine, dtype in engines
        }
        return
    device = pick_device(options.device)
    encoder = HashTextEncoder(chosen.text.n_tokens, chosen.dit.text_dim)
    with tempfile.TemporaryDirectory() as folder:
        graphs = Path(folder) / "graphs"
        if any(engine == "graph" for engine, _ in engines):
            from lmd.graph.export import export

            codec = build_random_codec(chosen, torch.float32)
            export(random_model(chosen), codec, chosen, graphs, source="random")
            del codec
        streamers = {}
        for engine, dtype in engines:
            if engine == "graph":
                from lmd.graph.runtime import load_graphs

                _, model, codec, _ = load_graphs(graphs, dtype)
                codec = codec or build_random_codec(chosen, DTYPES.get(dtype, torch.float32))
                model = LiveDenoiser(model)
            else:
                codec = build_random_codec(chosen, DTYPES[dtype])
                codec.to(device)
                model = random_model(chosen).to(device, DTYPES[dtype]).eval()
            streamers[engine, dtype] = Streamer(model, codec, encoder, chosen.window)
            trim_memory()
        yield streamers


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
    mode = "reduce-overhead" if streamer.denoiser.device.type == "cuda" else "default"
    dit = streamer.denoiser.model.dit
    dit.compile_blocks(mode)
    difference = (latents() - eager).abs().max() / eager.abs().max()
    return {
        "seconds": time.perf_counter() - began,
        "max_difference": difference.item(),
        "tolerance": COMPILE_TOLERANCE[dit.dtype],
    }


@dataclass
class Timings:
    """What was measured of one stream."""

    blocks: list[Block] = field(default_factory=list)
    ttff_ms: float = 0.0
    rebuild_ms: dict[str, list[float]] = field(default_factory=dict)
    cache_bytes: int = 0


Key = tuple[str, str, str]  # engine, precision, regime


def interleaved(
    streamers: Mapping[tuple[str, str], Streamer], base: Controls, n_blocks: int
) -> dict[Key, Timings]:
    """Play every stream in turn, after unheard rounds; then rebuilds and first blocks."""
    keys: list[Key] = [(*engine, regime) for engine in streamers for regime in REGIMES]
    states, timings = {}, {key: Timings() for key in keys}
    rounds = range(-UNHEARD_ROUNDS, n_blocks)
    for round_index in tqdm(rounds, desc="blocks", mininterval=1, file=sys.stderr):
        for key, measured in timings.items():
            streamer, controls = streamers[key[:2]], replace(base, regime=key[2])
            block, states[key] = streamer.step(states.get(key) or streamer.start(), controls)
            if round_index >= 0:
                measured.blocks.append(block)
    for key, measured in timings.items():
        streamer, controls = streamers[key[:2]], replace(base, regime=key[2])
        state = states.pop(key)
        measured.cache_bytes = state.memory.n_bytes if state.memory else 0
        made = rebuilds(streamer, state, controls)
        measured.rebuild_ms = {cause: [b.dit_ms for b in blocks] for cause, blocks in made.items()}
        began = now_s(streamer.denoiser.device)
        streamer.step(streamer.start(), controls)
        measured.ttff_ms = 1e3 * (now_s(streamer.denoiser.device) - began)
    return timings


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


def tokens_of(regime: str, n_context: int, block_frames: int, n_steps: int) -> int:
    """Tokens that go through the transformer for one block; the global token counts."""
    step = block_frames + 1
    if regime == "full":
        return n_steps * (n_context + step)
    if regime == "enc-dec":
        return n_context + 1 + n_steps * step
    return block_frames + n_steps * step


def row_of(key: Key, timings: Mapping[Key, Timings], base: Controls, chosen: Preset) -> dict:
    """One line of the table."""
    (engine, dtype, regime), measured = key, timings[key]
    dit = [block.dit_ms for block in measured.blocks]
    dit_ms = statistics.median(dit)
    decode_ms = statistics.median(block.decode_ms for block in measured.blocks)
    naive = statistics.median(block.dit_ms for block in timings[engine, dtype, "full"].blocks)
    rebuild_ms = {cause: statistics.median(ms) for cause, ms in measured.rebuild_ms.items()}
    return {
        "engine": engine,
        "dtype": dtype,
        "regime": regime,
        "n_steps": base.n_steps,
        "tokens_per_block": tokens_of(
            regime, chosen.window.context_frames, base.block_frames, base.n_steps
        ),
        "dit_ms_p50": dit_ms,
        "dit_ms_p95": percentile(dit, 95),
        "decode_ms_p50": decode_ms,
        "ttff_ms": measured.ttff_ms,
        "rtf": 1e3 * base.block_frames / chosen.frame_rate_hz / (dit_ms + decode_ms),
        "cache_mb": measured.cache_bytes / 2**20,
        "speedup_vs_full": naive / dit_ms,
        "rebuild_ms_p50": statistics.median(chain(*measured.rebuild_ms.values())),
        "rebuild_ms": rebuild_ms,
    }


def reference_pass_ms(chosen: Preset, dtype: str, n_times: int = 5) -> float:
    """One pass of the whole window by stable-audio-tools' own transformer of the same shape."""
    from stable_audio_tools.models.dit import DiffusionTransformer

    c, window = chosen.dit, chosen.window.window_frames
    model = DiffusionTransformer(
        io_channels=c.latent_dim, embed_dim=c.width, depth=c.depth, num_heads=c.n_heads,
        cond_token_dim=c.text_dim, global_cond_dim=c.global_dim, attn_kwargs={"qk_norm": "ln"},
    ).to(DTYPES[dtype]).eval()  # fmt: skip
    noisy, t = torch.randn(1, c.latent_dim, window), torch.rand(1)
    text = torch.randn(1, chosen.text.n_tokens + 1, c.text_dim)
    given = [x.to(DTYPES[dtype]) for x in (noisy, t, text, torch.randn(1, c.global_dim))]
    spent = []
    with torch.inference_mode():
        for _ in range(n_times + 1):
            began = time.perf_counter()
            model(given[0], given[1], cross_attn_cond=given[2], global_embed=given[3])
            spent.append(1e3 * (time.perf_counter() - began))
    return statistics.median(spent[1:])


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
    return model.eval().requires_grad_(False)


def build_random_codec(chosen: Preset, dtype: torch.dtype) -> Codec:
    """A codec of the preset's shape with random weights; a stream from silence encodes nothing."""
    if isinstance(chosen.codec, SpectralCodecConfig):
        torch.manual_seed(0)
        return SpectralCodec(chosen.codec).eval().requires_grad_(False)
    return random_codec(chosen.codec, dtype=dtype).let_encoder_go()


def percentile(values: list[float], percent: float) -> float:
    """The nearest-rank percentile."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, round(percent / 100 * (len(ordered) - 1)))]


def table(report: dict) -> str:
    """The rows for reading."""
    lines = [
        f"preset {report['preset']}, {report['threads']} threads, {report['device']}; "
        f"block {report['block_s']:.2f} s, at most {report['peak_mb']:.0f} MiB held",
        *grid(COLUMNS, report["rows"]),
        "",
        "ms of a block whose context is encoded afresh, by the control that changed",
    ]
    names = ("engine", "dtype", "regime", "n_steps")
    rebuilt = [
        {name: row[name] for name in names}
        | {f"by {cause}": ms for cause, ms in row["rebuild_ms"].items()}
        for row in report["rows"]
    ]
    lines += grid(list(rebuilt[0]), rebuilt)
    for dtype, made in report.get("compiled", {}).items():
        lines.append(
            f"compiled {dtype} in {made['seconds']:.0f} s; furthest from eager, of the largest "
            f"latent: {made['max_difference']:.1e} ({made['tolerance']:.0e} allowed)"
        )
    for dtype, ms in report.get("stable_audio_tools_pass_ms", {}).items():
        lines.append(f"stable-audio-tools, one pass of the whole window, {dtype}: {ms:.0f} ms")
    if "long_blocks" in report:
        lines.append(
            f"after {report['long_blocks']} blocks a block costs {report['long_cost_ratio']:.3f} "
            f"of what an early one does; {report['long_cache_sizes']} cache size(s) seen"
        )
    return "\n".join(lines)


def grid(columns: Sequence[str], rows: Sequence[Mapping[str, object]]) -> list[str]:
    """A head and the rows, three significant digits each, a line each."""
    frame = pd.DataFrame(list(rows), columns=list(columns))
    return frame.to_string(index=False, float_format=lambda x: f"{x:.3g}").splitlines()
