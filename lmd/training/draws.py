"""What every training step draws, as functions of (seed, purpose, step, row): rule 10.

Regime, split point and block length are drawn once for the whole global batch; noise levels, noise
and dropout per row. Nothing depends on what was drawn before, so a run may stop and go on anywhere,
and several processes draw what one would.

Source: Live Music Diffusion Models (arXiv 2605.22717), fine-tuning settings.
"""

from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from lmd.config import Regime, check_block
from lmd.errors import LmdError
from lmd.rng import generator
from lmd.shapes import Latents

PerItem = Float[Tensor, " batch"]  # one number per row
PerBlock = Float[Tensor, "batch block"]  # one number per row and noised block
Shares = tuple[tuple[Regime, float], ...]
LevelDistribution = Literal["uniform", "logit-normal", "trunc-logit-normal", "log-snr"]


@dataclass(frozen=True)
class NoiseOptions:
    """How noise levels are drawn. Source: arXiv 2605.22717, public configs (uniform, shifted)."""

    distribution: LevelDistribution = "uniform"
    shift: bool = True  # more noise for longer windows, as in the configs
    shift_low: float = 0.5  # exponent at `shift_frames[0]`
    shift_high: float = 1.15  # exponent at `shift_frames[1]`
    shift_frames: tuple[int, int] = (256, 4096)
    truncate: float = 0.075  # trunc-logit-normal: lowest value kept
    log_snr_mean: float = -1.2
    log_snr_std: float = 2.0


@dataclass(frozen=True)
class BaseOptions:
    """What a base step draws.

    Sources: text dropout 0.1 is the usual value for guidance (arXiv 2207.12598); the long length is
    what the discriminator of ARC-Forcing looks at, 192 + 12 · 48 frames (arXiv 2605.22717).
    """

    text_dropout: float = 0.1
    window_frames: int = 240
    long_frames: int = 768
    long_share: float = 0.1  # of the steps; ours, keeps three quarters of the compute short
    noise: NoiseOptions = field(default_factory=NoiseOptions)


@dataclass(frozen=True)
class FinetuneOptions:
    """What a fine-tuning step draws.

    The split point is where known music ends and the first target block begins: at
    `context_frames`, or earlier. An earlier one makes the window shorter, as a stream with a
    shorter memory has it (`WindowConfig`). That is another computation than context dropout, which
    keeps the window and zeroes its oldest frames, as a stream that began a moment ago has them. In
    the block-causal regime the window goes on behind the split, so one pass teaches every later
    split as well, with that memory before each.

    Sources: context and context dropout from arXiv 2605.22717 (configs: all 0.2, oldest part 0.3;
    192 frames, always). Ours: the shares of regimes, block lengths and shorter memories, since one
    checkpoint is to play them all; several targets per pass, since most of a pass is context.
    """

    regimes: Shares = (
        ("block-causal", 0.6),
        ("enc-dec", 0.3),
        ("full", 0.1),
    )
    block_lengths: tuple[tuple[int, float], ...] = ((48, 0.4), (24, 0.3), (16, 0.15), (12, 0.15))
    context_frames: int = 192
    short_context: float = 0.25  # share of steps whose context is 1 … n − 1 blocks, all alike
    target_frames: int = 240  # block-causal: frames taught in one pass, a multiple of each length
    enc_dec_frames: int = 192  # enc-dec: the same, as noised copies of the one target block
    context_dropout_all: float = 0.2
    context_dropout_part: float = 0.3
    text_dropout: float = 0.1
    noise: NoiseOptions = field(default_factory=NoiseOptions)

    def __post_init__(self) -> None:
        for block_frames, _ in self.block_lengths:
            check_block(self.context_frames, block_frames)
            check_block(self.target_frames, block_frames)
            check_block(self.enc_dec_frames, block_frames)


class BatchIndices(NamedTuple):
    """Which rows of which global batch: randomness depends on these and on nothing else.

    `weight` is that of their mean loss in the mean over all parts of the batch: 1 in equal parts.
    """

    seed: int
    step: int
    positions: tuple[int, ...]  # in the global batch
    n_global: int  # rows of the global batch
    weight: float = 1.0


@dataclass(frozen=True)
class StepPlan:
    """What the whole global batch of a step does.

    Attributes:
        regime: who sees whom; None: base training, no context.
        n_frames: window length.
        block_frames: of each target block.
        n_targets: noised blocks per window.
        context_frames: known frames before the first target block: the split point.
    """

    regime: Regime | None
    n_frames: int
    block_frames: int = 0
    n_targets: int = 1
    context_frames: int = 0

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


def base_plan(options: BaseOptions, seed: int, step: int) -> StepPlan:
    """Whether this step looks at the long length."""
    is_long = _uniform(seed, "long", step) < options.long_share
    return StepPlan(None, options.long_frames if is_long else options.window_frames)


def finetune_plan(options: FinetuneOptions, seed: int, step: int) -> StepPlan:
    """Regime, block length and split point of this step."""
    regime = pick(options.regimes, _uniform(seed, "regime", step))
    o = pick(options.block_lengths, _uniform(seed, "block length", step))
    s = draw_split(options, o, seed, step)
    if regime == "block-causal":
        return StepPlan(regime, s + options.target_frames, o, options.target_frames // o, s)
    n_targets = options.enc_dec_frames // o if regime == "enc-dec" else 1
    return StepPlan(regime, s + o, o, n_targets, s)


def draw_split(options: FinetuneOptions, block_frames: int, seed: int, step: int) -> int:
    """Context frames of this step: all of them, or 1 … n − 1 blocks."""
    n = options.context_frames // block_frames
    if n == 1 or _uniform(seed, "short context", step) >= options.short_context:
        return options.context_frames
    return block_frames * (1 + int((n - 1) * _uniform(seed, "split point", step)))


def one_block_plan(
    options: FinetuneOptions, regimes: Shares, n_points: int, seed: int, step: int
) -> StepPlan:
    """A step that looks at one block after a whole context, `n_points` times."""
    regime = pick(regimes, _uniform(seed, "regime", step))
    o = pick(options.block_lengths, _uniform(seed, "block length", step))
    return StepPlan(regime, options.context_frames + o, o, n_points, options.context_frames)


def noise_levels(options: NoiseOptions, u: Tensor, n_frames: int) -> Tensor:
    """Noise levels at the quantiles `u` (0 … 1, any shape) of the chosen distribution.

    Args:
        options: the distribution and its numbers.
        u: uniform numbers.
        n_frames: window length, for the shift `t' = e^m t / (1 + (e^m - 1) t)`.

    Raises:
        LmdError: no such distribution.
    """
    u = u.double().clamp(1e-6, 1 - 1e-6)
    z = torch.special.ndtri(u)
    if options.distribution == "uniform":
        t = u
    elif options.distribution == "logit-normal":
        t = z.sigmoid()
    elif options.distribution == "trunc-logit-normal":
        low = torch.special.ndtr(torch.logit(torch.tensor(options.truncate, dtype=torch.float64)))
        kept = torch.special.ndtri(low + (1 - low) * u).sigmoid()
        t = 1 - (kept - options.truncate) / (1 - options.truncate)
    elif options.distribution == "log-snr":
        t = (-(options.log_snr_mean + options.log_snr_std * z)).sigmoid()
    else:
        known = "uniform, logit-normal, trunc-logit-normal, log-snr"
        raise LmdError(f"noise distribution {options.distribution!r}", known, "Pick one of these.")
    if options.shift:
        first, last = options.shift_frames
        along = (min(max(n_frames, first), last) - first) / (last - first)
        m = options.shift_low + (options.shift_high - options.shift_low) * along
        grown = torch.exp(torch.tensor(m, dtype=torch.float64))
        t = grown * t / (1 + (grown - 1) * t)
    return t.float()


def draw_levels(
    options: NoiseOptions, rows: BatchIndices, n_targets: int, n_frames: int
) -> PerBlock:
    """Noise levels `[row, target]`, spread evenly over the whole global batch.

    One uniform number per step shifts an even grid over all rows and targets, so that every step
    sees every part of the path whatever the batch (less variance than independent draws).
    """
    cells = torch.tensor(rows.positions)[:, None] * n_targets + torch.arange(n_targets)
    start = _uniform(rows.seed, "noise level", rows.step)
    order = torch.randperm(
        rows.n_global * n_targets, generator=generator(rows.seed, "level order", rows.step)
    )
    u = (start + order[cells].double() / (rows.n_global * n_targets)) % 1
    return noise_levels(options, u, n_frames)


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
    options: FinetuneOptions,
    rows: BatchIndices,
    block_frames: int,
    context_frames: int | None = None,
) -> Latents:
    """Forget all of the context, or its oldest blocks, in some rows: zero latents, mask still 1.

    That is also what a stream from silence starts with, and has until its memory is full.

    Args:
        clean: windows, context in front.
        options: the rates.
        rows: which rows these are.
        block_frames: what is forgotten is so many whole blocks.
        context_frames: of these windows; None: those of the options.
    """
    n = (context_frames or options.context_frames) // block_frames
    forgotten = []
    for p in rows.positions:
        u = _uniform(rows.seed, "context dropout", rows.step, p)
        part = 1 + int(n * _uniform(rows.seed, "forgotten blocks", rows.step, p))
        partly = u < options.context_dropout_all + options.context_dropout_part
        blocks = n if u < options.context_dropout_all else part if partly else 0
        forgotten.append(blocks * block_frames)
    frame = torch.arange(clean.shape[-1])
    keep = (frame >= torch.tensor(forgotten)[:, None]).to(clean)
    return clean * keep[:, None]
