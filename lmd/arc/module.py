"""ARC-Forcing under Lightning: two networks, two optimizers, alternating updates.

Update k is a function of (options, k): its rollout, batch, noise and dropout.

Source: Live Music Diffusion Models (arXiv 2605.22717), ARC-Forcing; ARC (arXiv 2505.08175).
Taught in notebook 03_arc_forcing.
"""

import copy
import time
import warnings
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import lightning as L
import torch
from lightning.pytorch.strategies import ParallelStrategy
from torch import Tensor

from lmd.arc.discriminator import Discriminator
from lmd.arc.losses import (
    GanLoss,
    Prompts,
    RealFakePair,
    RolloutPlan,
    derangement,
    discriminator_loss,
    draw_calls,
    frozen,
    generator_loss,
    rollout,
    text_memory,
)
from lmd.arc.options import ArcRun, numbers
from lmd.machine import memory_gb
from lmd.model.live_model import LiveModel
from lmd.model.text import TextEncoder
from lmd.rng import derive_seed
from lmd.rng import generator as rng
from lmd.shapes import Latents, NoiseLevel
from lmd.stream.block import BlockPlan, LiveDenoiser
from lmd.training.draws import (
    BatchIndices,
    check_parts,
    context_dropout,
    draw_kept,
    draw_noise,
)
from lmd.training.module import clip_gradient, move_average
from lmd.training.trainer import check_finite
from lmd.training.windows import Items, WindowSource

Network = Literal["discriminator", "generator"]


@dataclass(frozen=True)
class UpdatePlan:
    """One update: whose turn it is, and how the rollout goes (see `RolloutPlan`)."""

    trains: Network
    block: BlockPlan
    n_steps: int
    n_calls: tuple[int, ...]
    n_frames: int  # context and rollout


def plan_update(options: ArcRun, seed: int, update: int) -> UpdatePlan:
    """Whose turn it is, how long and how the rollout goes; the same for all rows."""
    g = rng(seed, "arc plan", update)

    def choose(values: Sequence[Any]) -> Any:
        return values[int(float(torch.rand((), generator=g, dtype=torch.float64)) * len(values))]

    regime = choose(options.regimes.split(","))
    several = options.block_frames, options.blocks, options.steps
    o, n_blocks, n_steps = [choose(numbers(text)) for text in several]
    is_generator = update >= options.warmup and (update - options.warmup) % 2 == 1
    return UpdatePlan(
        "generator" if is_generator else "discriminator",
        BlockPlan(regime, o),
        n_steps,
        draw_calls(n_blocks, n_steps, g),
        options.context_frames + n_blocks * o,
    )


def draw_dropped(options: ArcRun, rows: BatchIndices) -> Tensor:
    """Which rows have no condition, in both networks; once for the whole rollout."""
    return draw_kept(rows, "arc text dropout", options.text_dropout) == 0


def draw_scored_levels(options: ArcRun, rows: BatchIndices) -> NoiseLevel:
    """Noise levels at which the discriminator looks: `sigmoid(-u)`, u even over `log_snr`."""
    low, high = options.log_snr
    draws = [rng(rows.seed, "judged level", rows.step, p) for p in rows.positions]
    u = torch.stack([torch.rand((), generator=drawn_from) for drawn_from in draws])
    return torch.sigmoid(-(low + (high - low) * u))


def make_pair(
    model: LiveModel,
    clean: Latents,
    asked: Prompts,
    wrong: Prompts,
    rows: BatchIndices,
    plan: UpdatePlan,
    options: ArcRun,
) -> RealFakePair:
    """Roll out and set beside real windows `clean`; with graph if it is the generator's turn.

    The model is conditioned on the length of its window, as when it streams; the discriminator on
    that of the whole sequence, as when it was the base.
    """
    s, shares = options.context_frames, (options.from_silence, options.context_dropout_part)
    real = context_dropout(clean, rows, plan.block.block_frames, s, *shares)
    seeds = tuple(derive_seed(rows.seed, "rollout", rows.step, p) for p in rows.positions)
    calls = plan.n_steps, plan.n_calls
    how = RolloutPlan(plan.block, *calls, seeds, options.sampler, options.plays_out)
    learns = plan.trains == "generator"
    with torch.set_grad_enabled(learns):
        condition = asked.for_model(model, options.window_frames / options.frame_rate_hz)
        given = LiveDenoiser(model), real[..., :s], condition, how
        fake = rollout(*given, with_grad=learns, memory=text_memory(model, condition))
    noise = draw_noise(rows, 2, *clean.shape[1:]).to(clean)
    return RealFakePair(
        real=real,
        fake=fake,
        asked=asked,
        wrong=wrong,
        t=draw_scored_levels(options, rows).to(clean),
        noise=noise[:, 0],
        nudge=noise[:, 1],
        first_frame=s,
        seconds=plan.n_frames / options.frame_rate_hz,
    )


class Part(NamedTuple):
    """What one process does in one go: some rows of an update's global batch."""

    rows: BatchIndices
    latents: Latents
    prompts: list[str]
    wrong_prompts: list[str]
    names: list[str]


def make_part(run: ArcRun, source: WindowSource, update: int, shard: int, n_shards: int) -> Part:
    """One shard's rows, with the prompts that the derangement of the whole batch deals them."""
    check_parts(run.batch, n_shards)
    each, n_frames = run.batch // n_shards, plan_update(run, run.seed, update).n_frames
    positions = tuple(range(shard * each, (shard + 1) * each))
    windows = source.windows(update, positions, n_frames)
    wrong = windows.prompts
    if run.contrastive:
        order = derangement(run.batch, rng(run.seed, "derangement", update)).tolist()
        wrong = source.windows(update, [order[p] for p in positions], n_frames).prompts
    rows = BatchIndices(run.seed, update, positions, run.batch)
    return Part(rows, windows.latents, windows.prompts, wrong, windows.names)


class ArcTraining(L.LightningModule):
    """Generator and discriminator in turn; every decision is made in pure functions."""

    def __init__(
        self,
        generator: LiveModel,
        discriminator: Discriminator,
        text: TextEncoder,
        source: WindowSource,
        options: ArcRun,
    ) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.generator, self.discriminator, self.options = generator, discriminator, options
        self.ema = copy.deepcopy(generator).requires_grad_(False)
        self.text, self.source, self.last_checkpoint = text, source, "none yet"
        for model in (generator, discriminator.base):
            model.dit.checkpointing = options.checkpointing
        self.register_buffer("n_winning", torch.zeros((), dtype=torch.long))

    def training_step(self, parts: list[Part], index: int) -> None:
        """One update of one network."""
        began, update, run = time.perf_counter(), parts[0].rows.step, self.options
        plan = plan_update(run, run.seed, update)
        parallel, losses = isinstance(self.trainer.strategy, ParallelStrategy), []
        for i, part in enumerate(parts):
            is_last = i == len(parts) - 1 or not parallel
            with nullcontext() if is_last else self.trainer.strategy.block_backward_sync():
                losses.append(self.backward_part(part, plan))
        which = ("generator", "discriminator").index(plan.trains)
        network, optimizer = getattr(self, plan.trains), self.optimizers()[which]
        clip_gradient(network, run.clip_norm, update, self.last_checkpoint)
        optimizer.step()
        optimizer.zero_grad()
        if plan.trains == "generator":
            move_average(self.ema, self.generator, run.ema, (update - run.warmup) // 2)
        self.report(plan, losses, time.perf_counter() - began)

    def backward_part(self, part: Part, plan: UpdatePlan) -> GanLoss:
        """Roll out, score, go backward; gradient reaches the network whose turn it is."""
        run = self.options
        prompts = [self.text.encode(p).to(self.device) for p in (part.prompts, part.wrong_prompts)]
        dropped = draw_dropped(run, part.rows).to(self.device)
        asked, wrong = (Prompts(prompt, dropped) for prompt in prompts)
        pair = make_pair(self.generator, part.latents, asked, wrong, part.rows, plan, run)
        is_generator, weights = plan.trains == "generator", (run.contrastive, run.r1, run.r2)
        with frozen(self.discriminator) if is_generator else nullcontext():
            if is_generator:
                loss = generator_loss(self.discriminator, pair)
            else:
                loss = discriminator_loss(self.discriminator, pair, *weights)
            check_finite(
                f"a {plan.trains} loss of",
                loss.loss.item(),
                f"update {part.rows.step} on {part.names}",
                f"Last good checkpoint: {self.last_checkpoint}. Lower --lr-generator and "
                "--lr-discriminator, or raise --r1 and --r2.",
            )
            self.manual_backward(loss.loss / run.accumulate)
        return loss

    def configure_optimizers(self) -> list[torch.optim.Optimizer]:
        """AdamW for each network; constant rates."""
        run = self.options
        pairs = (self.generator, run.lr_generator), (self.discriminator, run.lr_discriminator)
        how = {"betas": run.betas, "weight_decay": run.weight_decay, "fused": True}
        return [torch.optim.AdamW(network.parameters(), lr, **how) for network, lr in pairs]

    def train_dataloader(self) -> Items:
        """Updates addressed by number, those before a restart counted."""
        return Items(self.batches, self.options.n_updates)

    def batches(self) -> Iterator[list[Part]]:
        """From the run's current update on, the parts of this process."""
        run, size = self.options, self.trainer.world_size
        shards = [part * size + self.trainer.global_rank for part in range(run.accumulate)]
        n_shards = size * run.accumulate
        for update in range(self.trainer.global_step, run.n_updates):
            yield [make_part(run, self.source, update, shard, n_shards) for shard in shards]

    def exported(self) -> dict[str, Tensor]:
        """The generator's averaged weights."""
        return self.ema.state_dict()

    def report(self, plan: UpdatePlan, losses: list[GanLoss], took_s: float) -> None:
        """Log the update, and warn when the discriminator has won."""
        mean = {
            name: torch.stack([getattr(loss, name).float().mean() for loss in losses]).mean()
            for name in ("pair", "contrastive", "real", "fake", "accuracy")
        }
        who, run = plan.trains, self.options
        values = {f"{who}/pair": mean["pair"], "accuracy": mean["accuracy"]}
        if who == "discriminator":
            values["discriminator/contrastive"] = mean["contrastive"]
            won = mean["accuracy"].item() > run.winning_accuracy
            self.n_winning.copy_((self.n_winning + 1) * won)
            if self.n_winning.item() == run.winning_updates:
                warnings.warn(
                    "the discriminator has scored real above generated in more than "
                    f"{run.winning_accuracy:.0%} of the pairs for {run.winning_updates} of its "
                    "updates: it has won and teaches little. Lower --lr-discriminator, raise --r1 "
                    "and --r2, or raise --lr-generator.",
                    stacklevel=2,
                )
        self.log_dict(values, prog_bar=True, batch_size=1, sync_dist=True)
        full = plan.n_steps * len(plan.n_calls)
        costs = {
            "real score": mean["real"],
            "fake score": mean["fake"],
            "is_generator": float(who == "generator"),
            "rollout_frames": float(plan.n_frames - run.context_frames),
            "calls": float(full if run.plays_out else sum(plan.n_calls)),
            "update_s": took_s,
            "memory_gb": memory_gb(self.device),
        }
        self.log_dict(costs, batch_size=1)
