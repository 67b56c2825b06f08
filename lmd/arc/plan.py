"""What one update of ARC-Forcing does, as functions of (options, seed, update) alone.

Source: Live Music Diffusion Models (arXiv 2605.22717), ARC-Forcing; ARC (arXiv 2505.08175).
Taught in notebook 03_arc_forcing.
"""

from dataclasses import dataclass, field
from typing import Literal, NamedTuple

import torch

from lmd.arc.discriminator import PATCH_FRAMES, HeadConfig
from lmd.arc.losses import (
    LossWeights,
    Prompts,
    RealFakePair,
    RolloutPlan,
    draw_calls,
    rollout,
    text_memory,
)
from lmd.config import Regime, check_block
from lmd.errors import LmdError
from lmd.model.live_model import LiveModel
from lmd.rng import derive_seed, generator
from lmd.shapes import Latents, NoiseLevel
from lmd.stream.block import BlockPlan, LiveDenoiser
from lmd.stream.samplers import LOG_SNR_END, LOG_SNR_START, SamplerName
from lmd.training.draws import (
    BatchIndices,
    FinetuneOptions,
    context_dropout,
    draw_kept,
    draw_noise,
    pick,
)

Player = Literal["discriminator", "generator"]


CONDITIONS = ("prompt",)  # accompaniment, when there is one, would be another


@dataclass(frozen=True)
class ArcOptions:
    """What updates draw. Shares need not sum to one.

    Sources: context dropout, noise levels of the discriminator, contrastive weight and head are
    those of arXiv 2605.22717's configs. Ours: several step counts, since one model is to play with
    8, 4 and 2 steps (their noise levels are nested); both regimes; shorter rollouts for small
    machines (the paper has 12 blocks).
    """

    context_frames: int = 192
    window_frames: int = 240  # the length that the model is told while it streams
    frame_rate_hz: float = 22_050 / 1024
    regimes: tuple[tuple[Regime, float], ...] = (("block-causal", 0.5), ("enc-dec", 0.5))
    block_lengths: tuple[tuple[int, float], ...] = ((48, 1.0),)
    n_blocks: tuple[tuple[int, float], ...] = ((8, 1.0),)  # of a rollout
    n_steps: tuple[tuple[int, float], ...] = ((8, 0.4), (4, 0.3), (2, 0.3))
    sampler: SamplerName = "pingpong"
    plays_out: bool = False  # see RolloutPlan; False in arXiv 2605.22717
    context_dropout_all: float = 0.25
    context_dropout_part: float = 0.1
    text_dropout: float = 0.1  # once per rollout, for player and judge alike
    log_snr: tuple[float, float] = (LOG_SNR_START, LOG_SNR_END)  # what the discriminator sees
    weights: LossWeights = field(default_factory=LossWeights)
    contrast: tuple[str, ...] = CONDITIONS  # what the contrastive loss gives to the wrong row
    n_warmup: int = 100  # first updates, of the discriminator alone
    last_block: str = "blocks.3"  # of the base, in the discriminator
    head: HeadConfig = field(default_factory=HeadConfig)

    def __post_init__(self) -> None:
        if self.contrast != CONDITIONS:
            raise LmdError(
                f"a contrast of {', '.join(self.contrast) or 'nothing'}",
                f"{', '.join(CONDITIONS)}: what these models are asked by",
                "Leave it; a weight of 0 turns the term off.",
            )
        for o, _ in self.block_lengths:
            check_block(self.context_frames, o)
            for n, _ in self.n_blocks:
                if n < 1 or (n * o) % PATCH_FRAMES:
                    raise LmdError(
                        f"a rollout of {n} blocks of {o} frames",
                        f"a positive multiple of {PATCH_FRAMES} frames",
                        "Choose other block lengths or numbers of blocks.",
                    )

    @property
    def dropout(self) -> FinetuneOptions:
        """The context dropout in the words of fine-tuning, which draws it."""
        s = self.context_frames
        return FinetuneOptions(
            block_lengths=self.block_lengths,
            context_frames=s,
            target_frames=s,
            enc_dec_frames=s,
            context_dropout_all=self.context_dropout_all,
            context_dropout_part=self.context_dropout_part,
        )


@dataclass(frozen=True)
class UpdatePlan:
    """One update.

    Attributes:
        trains: whose turn it is.
        block: regime and block length of the rollout.
        n_steps: length of the noise schedule.
        n_calls: per block, which call learns.
        n_frames: context and rollout.
    """

    trains: Player
    block: BlockPlan
    n_steps: int
    n_calls: tuple[int, ...]
    n_frames: int


def plan_update(options: ArcOptions, seed: int, update: int) -> UpdatePlan:
    """Whose turn it is, how long and how the rollout goes; the same for all rows."""
    g = generator(seed, "arc plan", update)

    def choose(shares: tuple[tuple, ...]) -> int | str:
        return pick(shares, float(torch.rand((), generator=g, dtype=torch.float64)))

    regime, o = choose(options.regimes), choose(options.block_lengths)
    n_blocks, n_steps = choose(options.n_blocks), choose(options.n_steps)
    is_generator = update >= options.n_warmup and (update - options.n_warmup) % 2 == 1
    return UpdatePlan(
        "generator" if is_generator else "discriminator",
        BlockPlan(regime, o),
        n_steps,
        draw_calls(n_blocks, n_steps, g),
        options.context_frames + n_blocks * o,
    )


def draw_dropped(options: ArcOptions, rows: BatchIndices) -> torch.Tensor:
    """Which rows are played and judged without their condition; once for the whole rollout."""
    return draw_kept(rows, "arc text dropout", options.text_dropout) == 0


def draw_judged_levels(options: ArcOptions, rows: BatchIndices) -> NoiseLevel:
    """Noise levels at which the discriminator looks: `sigmoid(-u)`, u even over `log_snr`."""
    low, high = options.log_snr
    u = [
        torch.rand((), generator=generator(rows.seed, "judged level", rows.step, p))
        for p in rows.positions
    ]
    return torch.sigmoid(-(low + (high - low) * torch.stack(u)))


class ArcBatch(NamedTuple):
    """Real windows of an update, and where everything random about them comes from."""

    clean: Latents  # `plan.n_frames` frames
    asked: Prompts
    wrong: Prompts  # prompts of others, for the contrastive term
    rows: BatchIndices


def play_trial(
    model: LiveModel, batch: ArcBatch, plan: UpdatePlan, options: ArcOptions
) -> RealFakePair:
    """Roll out and set beside real music; with graph if it is the generator's turn.

    The model is told the length of its window, as when it streams; the discriminator that of the
    whole sequence, as when it was the base. Dropped context is zero on both sides.
    """
    s, rows, clean = options.context_frames, batch.rows, batch.clean
    real = context_dropout(clean, options.dropout, rows, plan.block.block_frames)
    seeds = tuple(derive_seed(rows.seed, "rollout", rows.step, p) for p in rows.positions)
    with torch.set_grad_enabled(plan.trains == "generator"):
        condition = batch.asked.for_model(model, options.window_frames / options.frame_rate_hz)
        fake = rollout(
            LiveDenoiser(model),
            real[..., :s],
            condition,
            RolloutPlan(
                plan.block, plan.n_steps, plan.n_calls, seeds, options.sampler, options.plays_out
            ),
            with_grad=plan.trains == "generator",
            memory=text_memory(model, condition),
        )
    noise = draw_noise(rows, 2, *clean.shape[1:]).to(clean)
    return RealFakePair(
        real=real,
        fake=fake,
        asked=batch.asked,
        wrong=batch.wrong,
        t=draw_judged_levels(options, rows).to(clean),
        noise=noise[:, 0],
        nudge=noise[:, 1],
        first_frame=s,
        seconds=plan.n_frames / options.frame_rate_hz,
    )
