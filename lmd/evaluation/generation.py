"""What is generated for an evaluation, and everything that is measured of it.

A unit is one batch of clips: one method, number of steps, primed or not, one seed. Its measures are
plain arrays that `lmd.evaluation.command` keeps on disk and puts together.

Source of the protocol: Live Music Diffusion Models (arXiv 2605.22717), tables and figures of the
evaluation, at this project's scale.
"""

import math
import os
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float
from torch import Tensor
from tqdm import tqdm

from lmd.codec.base import Codec
from lmd.config import Regime
from lmd.corpus.captions import TEMPO_WORDS
from lmd.corpus.manifest import Corpus, Row
from lmd.errors import LmdError
from lmd.evaluation.clip_metrics import Waves
from lmd.evaluation.tagger_card import NEAR
from lmd.model.dit import Condition
from lmd.model.text import Prompt, mix
from lmd.rng import derive_seed, generator
from lmd.stream.block import both_branches
from lmd.stream.controls import Controls
from lmd.stream.samplers import SamplerName
from lmd.stream.state import StreamState
from lmd.stream.streamer import Streamer


@dataclass(frozen=True)
class Method:
    """A way to make music: which weights, which regime, which sampler."""

    name: str
    weights: str
    regime: Regime
    sampler: SamplerName


# Everybody plays with the sampler that suits it best at every count of steps (docs/log.md): what
# ARC-Forcing is worth to somebody who has a solver of second order.
METHODS = (
    Method("naive", "finetuned", "full", "dpmpp"),
    Method("ED", "finetuned", "enc-dec", "dpmpp"),
    Method("BC", "finetuned", "block-causal", "dpmpp"),
    Method("ED+AF", "arc", "enc-dec", "dpmpp"),
    Method("BC+AF", "arc", "block-causal", "dpmpp"),
)
# The paper plays what is not ARC-Forced with Euler's method. Both sides with it: what ARC-Forcing
# is worth to somebody who has no such solver.
BY_EULER = "-Euler"  # ends these methods' names
WITH_EULER = tuple(
    replace(method, name=method.name + BY_EULER, sampler="euler")
    for method in METHODS
    if method.name != "naive"
)
ALL_METHODS = METHODS + WITH_EULER

FEW_STEPS = 8  # model calls per block up to which the aims are judged


@dataclass(frozen=True)
class Budget:
    """How much is generated.

    Attributes:
        n_clips: prompts of a seed, each from another held-out rendition.
        n_blocks: blocks of a clip.
        n_seeds: repetitions, each with other prompts and other noise, of what the aims are judged
            by: streams from silence in few steps.
        other_seeds: repetitions of every other line.
        steps: model calls per block, most first.
        naive_steps: those that the naive method is measured at (it costs five times as much).
        euler_steps: those of `WITH_EULER`, from silence alone.
        primed: whether clips that go on from real music are made too.
        drift_s, drift_clips, drift_steps: length, number per seed and model calls per block of the
            long streams; prompts fade with the first of these.
        drift_seeds: repetitions of the long streams, each with other prompts.
        speed_blocks: blocks that are timed, one stream alone.
        reference_s: how much of every held-out piece forms the reference.
        block_frames: of every block.
    """

    n_clips: int = 16
    n_blocks: int = 5
    n_seeds: int = 16
    other_seeds: int = 3
    steps: tuple[int, ...] = (50, 8, 4, 2)
    naive_steps: tuple[int, ...] = (50, 8, 4, 2)
    primed: bool = True
    drift_s: float = 300.0
    drift_clips: int = 4
    drift_steps: tuple[int, ...] = (8, 4, 2)
    drift_seeds: int = 3
    speed_blocks: int = 8
    reference_s: float = 60.0
    block_frames: int = 48
    euler_steps: tuple[int, ...] = (8, 4, 2)

    def seeds_of(self, method: Method, n_steps: int, primed: bool) -> int:
        """How often a line of the table is repeated."""
        is_slow = method.regime == "full" or n_steps > FEW_STEPS
        return self.other_seeds if is_slow or primed else self.n_seeds


FULL = Budget()
QUICK = Budget(16, 4, 3, 3, (8, 4, 2), (2,), False, 120.0, 4, (8, 4, 2), 3, 3, 20.0, euler_steps=())
BRIEF = Budget(8, 4, 3, 3, (8, 2), (2,), False, 40.0, 1, (8,), 3, 3, 20.0, euler_steps=())
SMOKE = Budget(2, 3, 2, 2, (1,), (1,), False, 30.0, 1, (1,), 2, 2, 10.0, euler_steps=(1,))


def methods_of(euler_steps: Sequence[int]) -> tuple[Method, ...]:
    """All methods that a budget with these `euler_steps` has rows for."""
    return ALL_METHODS if euler_steps else METHODS


@dataclass(frozen=True)
class Clip:
    """A prompt, the truth behind it, and the music around it.

    Attributes:
        row: the held-out rendition.
        context: what a primed stream hears first, `[before]` samples.
        real: how it really goes on, `[after]` samples.
    """

    row: Row
    context: Float[Tensor, " before"]
    real: Float[Tensor, " after"]

    @property
    def tempo_range(self) -> tuple[float, float]:
        """What the caption asks for, BPM: around a number, or what a word stands for; else nan."""
        if self.names_bpm:
            return self.row.tempo_bpm / (1 + NEAR), self.row.tempo_bpm * (1 + NEAR)
        ends = [0.0, *(end for end, _ in TEMPO_WORDS)]
        said = [
            (len(word), ends[place], ends[place + 1])
            for place, (_, words) in enumerate(TEMPO_WORDS)
            for word in words
            if word in self.row.caption
        ]
        if not said:
            return math.nan, math.nan
        _, low, high = max(said)  # the longest: "very slow" holds "slow"
        return low / (1 + NEAR), high * (1 + NEAR)

    @property
    def names_bpm(self) -> bool:
        """Whether the caption gives the tempo as a number."""
        return "BPM" in self.row.caption


def of_one_family(rows: Sequence[Row]) -> list[int]:
    """The rows that one family of instruments plays."""
    return [index for index, row in enumerate(rows) if row.family != "mixed"]


def choose_rows(rows: Sequence[Row], n: int, shortest_s: float, seed: int) -> list[int]:
    """Rows of one family each that are long enough: `n` for each seed, or all if there are fewer.

    They are dealt out in one order of chance, so that seeds share none until all were dealt; after
    the last comes the first again.

    Raises:
        LmdError: fewer than two such rows.
    """
    suited = [k for k in of_one_family(rows) if rows[k].duration_s >= shortest_s]
    if len(suited) < 2:
        raise LmdError(
            f"{len(suited)} held-out pieces of one family and {shortest_s:.0f} s",
            "at least 2",
            "Build more hours: python -m lmd data build --hours H.",
        )
    order = torch.randperm(len(suited), generator=generator(0, "evaluated rows")).tolist()
    n = min(n, len(suited))
    return [suited[order[(seed * n + k) % len(suited)]] for k in range(n)]


def cut_clips(
    corpus: Corpus, chosen: Sequence[int], context_samples: int, n_samples: int, seed: int
) -> list[Clip]:
    """Excerpts of some pieces; the place depends on the seed."""
    clips = []
    for index in chosen:
        row = corpus.rows[index]
        room = row.n_samples - context_samples - n_samples
        place = torch.rand((), generator=generator(seed, "excerpt", row.name))
        start = int(place * (room + 1))
        wave = torch.from_numpy(corpus.wave(index, start, context_samples + n_samples)).mean(0)
        clips.append(Clip(row, wave[:context_samples], wave[context_samples:]))
    return clips


class PromptedStreamer(Streamer):
    """Streams side by side, each with a prompt of its own; all other controls are shared."""

    prompts: tuple[Prompt, ...] = ()

    def _condition(self, controls: Controls, batch: int) -> Condition:
        """One row per stream, the unguided branch behind them where guidance is on."""
        tokens = torch.cat([mix(self.text, prompt) for prompt in self.prompts])
        condition = self.denoiser.condition(tokens, self.window_s)
        if not controls.is_guided:
            return condition
        return both_branches(condition, self.denoiser.null_condition(condition))


def side_by_side(streamer: Streamer, prompts: Sequence[Prompt]) -> PromptedStreamer:
    """The same instrument with one stream per prompt."""
    many = PromptedStreamer(streamer.denoiser, streamer.codec, streamer.text, streamer.window)
    many.prompts = tuple(prompts)
    return many


def controls_for(method: Method, n_steps: int, budget: Budget, seed: int, cfg: float) -> Controls:
    """How a method plays. ARC-Forced weights take no guidance; the others take `cfg`."""
    return Controls(
        prompt="one per stream",
        cfg_scale=1.0 if method.weights == "arc" else cfg,
        n_steps=n_steps,
        sampler=method.sampler,
        block_frames=budget.block_frames,
        regime=method.regime,
        seed=derive_seed(seed, "evaluation") % 2**31,
    )


def generate(
    streamer: Streamer, clips: Sequence[Clip], controls: Controls, n_blocks: int, primed: bool
) -> Waves:
    """Mono clips, one per prompt, from silence or from each clip's real context."""
    many = side_by_side(streamer, [clip.row.caption for clip in clips])
    if primed:
        context = torch.stack([clip.context for clip in clips])[:, None]
        state = many.start(context=context.expand(-1, many.codec.channels, -1))
    else:
        state = many.start(batch=len(clips))
    blocks = many.stream(controls, n_blocks=n_blocks, state=state)
    return torch.cat([block.wave.mean(1) for block in blocks], dim=-1)


def decoded(codec: Codec, waves: Waves, shuffle_seed: int | None = None) -> Waves:
    """Through the codec and back; with a seed, each clip's frames in random order between."""
    n = waves.shape[1] // codec.samples_per_frame * codec.samples_per_frame
    out = []
    with torch.no_grad():
        for row, wave in enumerate(waves[:, None, :n]):
            latents = codec.encode(wave[None].expand(-1, codec.channels, -1))
            if shuffle_seed is not None:
                source = generator(shuffle_seed, "frames", row)
                latents = latents[..., torch.randperm(latents.shape[-1], generator=source)]
            out.append(codec.decode(latents).mean(1)[0])
    return torch.stack(out)


def measure_speed(streamer: Streamer, controls: Controls, n_blocks: int) -> dict[str, float]:
    """One stream alone: time to its first block from silence, and the pace after that.

    Returns:
        `ttff_ms` (median of three), `dit_ms`, `decode_ms` (medians), `rtf` (seconds heard over
        seconds computed), `evaluations` (decoder calls per block), `load` (processes that wanted
        this machine's cores in the last minute, this one included).
    """
    seconds = controls.block_frames * streamer.codec.samples_per_frame / streamer.codec.sample_rate
    controls = replace(controls, prompt="church organ, slow")
    list(streamer.stream(controls, n_blocks=1))  # text encoded, caches warm
    first_ms = []
    for _ in range(3):
        began = time.perf_counter()
        _, state = streamer.step(streamer.start(), controls)
        first_ms.append(1e3 * (time.perf_counter() - began))
    blocks = list(streamer.stream(controls, n_blocks=n_blocks, state=state))
    dit_ms = statistics.median(block.dit_ms for block in blocks)
    decode_ms = statistics.median(block.decode_ms for block in blocks)
    return {
        "ttff_ms": statistics.median(first_ms),
        "dit_ms": dit_ms,
        "decode_ms": decode_ms,
        "rtf": 1e3 * seconds / (dit_ms + decode_ms),
        "evaluations": float(blocks[0].n_evaluations),
        "load": os.getloadavg()[0] if hasattr(os, "getloadavg") else float("nan"),
    }


def long_stream(
    streamer: Streamer, prompts: Sequence[Prompt], controls: Controls, seconds: float
) -> Waves:
    """Streams from silence, that long."""
    many = side_by_side(streamer, prompts)
    per_block = controls.block_frames * many.codec.samples_per_frame
    n_blocks = -(-round(seconds * many.codec.sample_rate) // per_block) + 1
    state: StreamState = many.start(batch=len(prompts))
    blocks = many.stream(controls, n_blocks=n_blocks, state=state)
    shown = tqdm(blocks, total=n_blocks, desc="long stream", mininterval=2, leave=False)
    waves = torch.cat([block.wave.mean(1) for block in shown], dim=-1)
    return waves[:, : round(seconds * many.codec.sample_rate)]


def fade_prompts(
    streamer: Streamer, pairs: Sequence[tuple[str, str]], controls: Controls, n_blocks: int
) -> tuple[Waves, list[float]]:
    """Streams that go from one prompt to another, and the second one's weight at each block.

    A quarter of the blocks has the first prompt alone, the last quarter the second.
    """
    many = side_by_side(streamer, [first for first, _ in pairs])
    quarter = n_blocks / 4
    weights = [min(1.0, max(0.0, (k - quarter + 1) / (2 * quarter))) for k in range(n_blocks)]
    state, parts = many.start(batch=len(pairs)), []
    for weight in tqdm(weights, desc="fading prompts", mininterval=2, leave=False):
        many.prompts = tuple(((a, 1 - weight), (b, weight)) for a, b in pairs)
        block, state = many.step(state, replace(controls, prompt=f"faded by {weight:.3f}"))
        parts.append(block.wave.mean(1))
    return torch.cat(parts, dim=-1), weights
