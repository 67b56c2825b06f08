"""What every training step draws, as functions of (seed, purpose, step, row).

Regime, split point and block length are drawn once for the whole global batch; noise levels, noise
and dropout per row. Nothing depends on what was drawn before, so a run may stop and go on anywhere,
and several processes draw what one would.

Source: Live Music Diffusion Models (arXiv 2605.22717), fine-tuning settings.
"""

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from lmd.config import Regime
from lmd.errors import LmdError
from lmd.rng import generator
from lmd.shapes import Latents
from lmd.training.options import TrainOptions

PerItem = Float[Tensor, " batch"]  # one number per row
PerBlock = Float[Tensor, "batch block"]  # one number per row and noised block
SHIFT = (256, 0.5), (4096, 1.15)  # frames of a window, and the exponent of its noise levels


class BatchIndices(NamedTuple):
    """Which rows of which global batch: randomness depends on these and on nothing else."""

    seed: int
    step: int
    positions: tuple[int, ...]  # in the global batch
    n_global: int  # rows of the global batch
    weight: float = 1.0  # of their mean loss in the mean over all parts of the batch


@dataclass(frozen=True)
class StepPlan:
    """What the whole global batch of a step does."""

    regime: Regime | None  # None: base training, no context
    n_frames: int  # of the window
    block_frames: int = 0  # of each target block
    n_targets: int = 1  # noised blocks per window
    context_frames: int = 0  # before the first target block

    @property
    def taught_frames(self) -> int:
        """Frames of one window that the loss looks at."""
        return self.n_frames if self.regime is None else self.block_frames * self.n_targets


def pick(options: tuple[tuple[Any, float], ...], u: float) -> Any:
    """The option at which the running sum of shares passes `u` times their total."""
    total, passed = sum(share for _, share in options), 0.0
    for value, share in options:
        passed += share
        if u * total < passed:
            return value
    return options[-1][0]


def _uniform(seed: int, purpose: str, *step: int) -> float:
    return float(torch.rand((), generator=generator(seed, purpose, *step), dtype=torch.float64))


def plan_step(options: TrainOptions, step: int) -> StepPlan:
    """A usual or a long window of the base; else regime, block length and split point."""

    def uniform(purpose: str) -> float:
        return _uniform(options.seed, purpose, step)

    if options.stage == "base":
        is_long = uniform("long") < options.long_share
        return StepPlan(None, options.long_frames if is_long else options.window_frames)
    regime: Regime = pick(options.regimes, uniform("regime"))
    o, s = pick(options.block_lengths, uniform("block length")), options.context_frames
    if options.stage == "distill":  # one block, once for every timestep
        return StepPlan(regime, s + o, o, options.n_timesteps, s)
    n_blocks = s // o
    if n_blocks > 1 and uniform("short context") < options.short_context:
        s = o * (1 + int((n_blocks - 1) * uniform("split point")))
    if regime == "block-causal":
        return StepPlan(regime, s + options.target_frames, o, options.target_frames // o, s)
    n_targets = options.enc_dec_frames // o if regime == "enc-dec" else 1
    return StepPlan(regime, s + o, o, n_targets, s)


def shard_rows(options: TrainOptions, step: int, shard: int, n_shards: int) -> BatchIndices:
    """The rows of one part (process, accumulation) of a step's global batch, split evenly.

    A long window of the base takes the place of several short ones. Where a step has fewer rows
    than parts, a part that gets none computes the first one with weight 0, so that all processes do
    the same work.
    """
    check_parts(options.batch, n_shards)
    n, n_frames = options.batch, plan_step(options, step).n_frames
    if options.stage == "base" and n_frames > options.window_frames:
        fitting = max(1, n * options.window_frames // n_frames)
        n = 1 << (fitting.bit_length() - 1)  # a power of two divides among processes
    own = range(shard * n // n_shards, (shard + 1) * n // n_shards)
    weight = len(own) * n_shards / n
    return BatchIndices(options.seed, step, tuple(own) or (0,), n, weight)


def check_parts(batch: int, n_parts: int) -> None:
    """Refuse a global batch that does not divide among the parts of a step."""
    if batch % n_parts:
        raise LmdError(
            f"a global batch of {batch} rows for {n_parts} parts",
            "a multiple (parts are processes × accumulation)",
            "Change --batch, --devices or --accumulate.",
        )


def draw_timesteps(options: TrainOptions, step: int) -> list[int]:
    """Which noise levels of the teacher a step looks at; the same for all rows."""
    drawn_from = generator(options.seed, "points of a walk", step)
    order = torch.randperm(options.teacher_steps, generator=drawn_from)
    return sorted(order[: options.n_timesteps].tolist())


def draw_levels(rows: BatchIndices, n_targets: int, n_frames: int) -> PerBlock:
    """Noise levels `[row, target]`: `even_quantiles`, shifted for windows of that length."""
    return shift_levels(even_quantiles(rows, n_targets), n_frames)


def even_quantiles(rows: BatchIndices, n_targets: int) -> PerBlock:
    """Numbers from 0 to 1, spread evenly over all rows and targets of the global batch.

    One uniform number per step shifts an even grid, so that every step sees every part of the path
    whatever the batch (less variance than independent draws).
    """
    cells = torch.tensor(rows.positions)[:, None] * n_targets + torch.arange(n_targets)
    start = _uniform(rows.seed, "noise level", rows.step)
    order = torch.randperm(
        rows.n_global * n_targets, generator=generator(rows.seed, "level order", rows.step)
    )
    return (start + order[cells].double() / (rows.n_global * n_targets)) % 1


def shift_levels(u: Tensor, n_frames: int) -> Tensor:
    """More noise for longer windows: `e^m u / (1 + (e^m - 1) u)`, as in the paper's configs."""
    u = u.double().clamp(1e-6, 1 - 1e-6)
    (first, low), (last, high) = SHIFT
    m = low + (high - low) * (min(max(n_frames, first), last) - first) / (last - first)
    grown = torch.exp(torch.tensor(m, dtype=torch.float64))
    return (grown * u / (1 + (grown - 1) * u)).float()


def step_noise(options: TrainOptions, rows: BatchIndices, n_channels: int) -> Tensor:
    """The noise of a step's rows, drawn on the CPU: `[row, latent, frame]`, of a window or a block,
    or `[row, target, latent, frame]` where blocks are taught in packs.
    """
    plan = plan_step(options, rows.step)
    if options.stage == "distill":
        return draw_noise(rows, n_channels, plan.block_frames)
    if plan.regime in (None, "full"):
        return draw_noise(rows, n_channels, plan.n_frames)
    return draw_noise(rows, plan.n_targets, n_channels, plan.block_frames)


def draw_noise(rows: BatchIndices, *shape: int) -> Tensor:
    """Standard normal numbers `[row, *shape]`, each row from its own generator."""
    noise = torch.empty(len(rows.positions), *shape)
    for row, position in zip(noise, rows.positions, strict=True):
        row.normal_(generator=generator(rows.seed, "noise", rows.step, position))
    return noise


def draw_kept(rows: BatchIndices, purpose: str, dropout: float) -> PerItem:
    """1 for rows that keep something, 0 for those that lose it, e.g. their text."""
    drawn = [_uniform(rows.seed, purpose, rows.step, p) >= dropout for p in rows.positions]
    return torch.tensor(drawn, dtype=torch.float32)


def context_dropout(
    clean: Latents,
    rows: BatchIndices,
    block_frames: int,
    context_frames: int,
    drop_all: float,
    drop_part: float,
) -> Latents:
    """Drop all of the context, or its oldest blocks, in shares of the rows: zeros, mask still 1.

    That is also what a stream from silence starts with, and has until its memory is full.
    """
    n = context_frames // block_frames
    dropped = []
    for p in rows.positions:
        u = _uniform(rows.seed, "context dropout", rows.step, p)
        part = 1 + int(n * _uniform(rows.seed, "forgotten blocks", rows.step, p))
        blocks = n if u < drop_all else part if u < drop_all + drop_part else 0
        dropped.append(blocks * block_frames)
    keep = torch.arange(clean.shape[-1]) >= torch.tensor(dropped)[:, None]
    return clean * keep.to(clean)[:, None]
