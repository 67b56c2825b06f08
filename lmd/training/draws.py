"""What every training step draws, as functions of (seed, purpose, step, row).

Regime, split point and block length are drawn once for the whole global batch; noise levels, noise
and dropout per row. Nothing depends on what was drawn before, so a run may stop and go on anywhere,
and several processes draw what one would.

Source: Live Music Diffusion Models (arXiv 2605.22717), fine-tuning settings.
"""

from dataclasses import dataclass
from typing import Annotated, Any, Literal, NamedTuple, TypeVar

import torch
import tyro
from jaxtyping import Float
from torch import Tensor

from lmd.config import Regime, check_block
from lmd.errors import LmdError
from lmd.rng import generator
from lmd.shapes import Latents

PerItem = Float[Tensor, " batch"]  # one number per row
PerBlock = Float[Tensor, "batch block"]  # one number per row and noised block
Shares = tuple[tuple[Regime, float], ...]
Lengths = tuple[tuple[int, float], ...]  # in frames, and their shares
LevelDistribution = Literal["uniform", "logit-normal", "trunc-logit-normal", "log-snr"]
States = Literal["trajectory", "straight"]  # what a distilled student sees
LossOn = Literal["block", "velocity"]  # what it is compared on
T = TypeVar("T")
Hidden = Annotated[T, tyro.conf.Fixed, tyro.conf.Suppress]  # a field that is no flag


@dataclass(frozen=True)
class NoiseOptions:
    """How noise levels are drawn. Source: arXiv 2605.22717, public configs (uniform, shifted).

    Attributes:
        distribution: of the noise levels.
    """

    distribution: Annotated[LevelDistribution, tyro.conf.arg(name="noise")] = "uniform"
    shift: Hidden[bool] = True  # more noise for longer windows, by these exponents
    shift_low: Hidden[float] = 0.5
    shift_high: Hidden[float] = 1.15
    shift_frames: Hidden[tuple[int, int]] = (256, 4096)
    truncate: Hidden[float] = 0.075  # trunc-logit-normal: the lowest value kept
    log_snr_mean: Hidden[float] = -1.2
    log_snr_std: Hidden[float] = 2.0


@dataclass(frozen=True)
class BaseOptions:
    """What a base step draws: a usual window, or a long one.

    Attributes:
        long_share: share of steps on 768 frames; ours, keeps three quarters of the compute short.
    """

    window_frames: Hidden[int] = 240
    long_frames: Hidden[int] = 768  # 192 + 12 · 48: what the discriminator of ARC-Forcing sees
    long_share: float = 0.1


@dataclass(frozen=True)
class ContextOptions:
    """The context, and how often all of it or its oldest part is dropped (arXiv 2605.22717)."""

    context_frames: Hidden[int] = 192
    context_dropout_all: Hidden[float] = 0.2
    context_dropout_part: Hidden[float] = 0.3


@dataclass(frozen=True)
class FinetuneOptions(ContextOptions):
    """What a fine-tuning step draws.

    A short context is that of a stream with a shorter memory (`WindowConfig`). Context dropout
    keeps the window and zeroes its oldest frames, as a stream that began a moment ago has them.
    Ours: the shares, since one checkpoint is to play all; several targets per pass.

    Attributes:
        short_context: share of steps whose context is 1 … n − 1 blocks, all alike.
    """

    regimes: Hidden[Shares] = (("block-causal", 0.6), ("enc-dec", 0.3), ("full", 0.1))
    block_lengths: Hidden[Lengths] = ((48, 0.4), (24, 0.3), (16, 0.15), (12, 0.15))
    short_context: float = 0.25
    target_frames: Hidden[int] = 240  # block-causal: taught in one pass
    enc_dec_frames: Hidden[int] = 192  # enc-dec: the same, as noised copies of one block

    def __post_init__(self) -> None:
        for block_frames, _ in self.block_lengths:
            for n_frames in (self.context_frames, self.target_frames, self.enc_dec_frames):
                check_block(n_frames, block_frames)


@dataclass(frozen=True)
class DistillOptions:
    """What a distillation step draws, besides blocks and dropout, which are the fine-tune's.

    Sources: trajectories of DPM++ and the plain squared error are those of arXiv 2605.22717's code
    (50 steps there, guidance 7); straight paths: arXiv 2209.03003.

    Attributes:
        n_steps: sampler steps of the teacher.
        cfg_scale: its guidance.
        n_timesteps: how many of its steps the student looks at in one pass.
        states: what the student sees: the teacher's own states, or the straight path between the
            noise and the block that it became.
        loss_on: clean blocks or velocities are compared.
    """

    n_steps: Annotated[int, tyro.conf.arg(name="teacher-steps")] = 8
    cfg_scale: float = 1.5
    n_timesteps: Annotated[int, tyro.conf.arg(name="timesteps", aliases=["--points"])] = 4
    regimes: Hidden[Shares] = (("block-causal", 0.6), ("enc-dec", 0.4))
    states: Annotated[States, tyro.conf.arg(aliases=["--points-on"])] = "straight"
    loss_on: LossOn = "block"

    def __post_init__(self) -> None:
        if not 1 <= self.n_timesteps <= self.n_steps:
            raise LmdError(
                f"{self.n_timesteps} timesteps of a trajectory of {self.n_steps} steps",
                f"1 to {self.n_steps}",
                "Lower --timesteps, or raise --teacher-steps.",
            )


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


def base_plan(options: BaseOptions, seed: int, step: int) -> StepPlan:
    """Whether this step looks at the long length."""
    is_long = _uniform(seed, "long", step) < options.long_share
    return StepPlan(None, options.long_frames if is_long else options.window_frames)


def finetune_plan(options: FinetuneOptions, seed: int, step: int) -> StepPlan:
    """Regime, block length and split point of this step."""
    regime, o = draw_regime(options.regimes, options, seed, step)
    s = draw_split(options, o, seed, step)
    if regime == "block-causal":
        return StepPlan(regime, s + options.target_frames, o, options.target_frames // o, s)
    n_targets = options.enc_dec_frames // o if regime == "enc-dec" else 1
    return StepPlan(regime, s + o, o, n_targets, s)


def distill_plan(
    options: DistillOptions, blocks: FinetuneOptions, seed: int, step: int
) -> StepPlan:
    """A step that looks at one block after a whole context, once for every timestep."""
    regime, o = draw_regime(options.regimes, blocks, seed, step)
    s = blocks.context_frames
    return StepPlan(regime, s + o, o, options.n_timesteps, s)


def draw_regime(
    regimes: Shares, options: FinetuneOptions, seed: int, step: int
) -> tuple[Regime, int]:
    """Regime and block length of this step."""
    regime = pick(regimes, _uniform(seed, "regime", step))
    return regime, pick(options.block_lengths, _uniform(seed, "block length", step))


def draw_split(options: FinetuneOptions, block_frames: int, seed: int, step: int) -> int:
    """Context frames of this step: all of them, or 1 … n − 1 blocks."""
    n = options.context_frames // block_frames
    if n == 1 or _uniform(seed, "short context", step) >= options.short_context:
        return options.context_frames
    return block_frames * (1 + int((n - 1) * _uniform(seed, "split point", step)))


def draw_timesteps(options: DistillOptions, seed: int, step: int) -> list[int]:
    """Which steps of the teacher's trajectory a step looks at; the same for all rows."""
    order = torch.randperm(options.n_steps, generator=generator(seed, "points of a walk", step))
    return sorted(order[: options.n_timesteps].tolist())


def noise_levels(options: NoiseOptions, u: Tensor, n_frames: int) -> Tensor:
    """Noise levels at the quantiles `u` (0 … 1, any shape) of the chosen distribution.

    The window's length shifts them: `t' = e^m t / (1 + (e^m - 1) t)`.

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
    options: ContextOptions,
    rows: BatchIndices,
    block_frames: int,
    context_frames: int | None = None,
) -> Latents:
    """Forget all of the context, or its oldest blocks, in some rows: zero latents, mask still 1.

    That is also what a stream from silence starts with, and has until its memory is full.
    `context_frames` of these windows are those of the options by default.
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
