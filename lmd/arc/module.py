"""ARC-Forcing under Lightning: two networks, two optimizers, alternating updates.

Update k is a function of (options, k): its rollout, batch, noise and dropout. A checkpoint holds
both networks, the generator's moving average, both optimizers and k, and a run that was killed goes
on with the numbers it would have had.

Taught in notebook 03_arc_forcing.
"""

import copy
import math
import time
import warnings
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import NamedTuple

import lightning as L
import torch
from lightning.pytorch.strategies import ParallelStrategy
from torch.utils.data import DataLoader, IterableDataset

from lmd.arc.discriminator import Discriminator
from lmd.arc.losses import GanLoss, Prompts, derangement, discriminator_loss, frozen, generator_loss
from lmd.arc.plan import ArcBatch, ArcOptions, UpdatePlan, draw_dropped, plan_update, play_trial
from lmd.errors import LmdError
from lmd.machine import memory_gb
from lmd.model.live_model import LiveModel
from lmd.model.text import TextEncoder
from lmd.rng import generator as rng
from lmd.shapes import Latents
from lmd.training.draws import BatchIndices
from lmd.training.module import WindowSource, check_parts, clip_gradient


@dataclass(frozen=True)
class ArcRun:
    """A whole run.

    Sources: weight decay, clipping and the moving average are those of arXiv 2605.22717's ARC
    configs. Ours: no momentum (they have 0.9), since in `lmd.arc.toy_world` the two networks then
    chase each other (see docs/log.md); learning rates, which they have at 1e-6 for a model 26
    times larger, batches ten times larger and 18,000 updates.
    """

    n_updates: int
    batch: int = 8  # rows of the global batch: all devices, all accumulated parts
    accumulate: int = 1
    seed: int = 0
    lr_generator: float = 2e-5
    lr_discriminator: float = 1e-4
    betas: tuple[float, float] = (0.0, 0.95)
    weight_decay: float = 0.01
    clip_norm: float = 1.0
    ema: float = 0.99
    checkpointing: bool = False
    winning_accuracy: float = 0.98  # above this for `winning_updates`, the discriminator has won
    winning_updates: int = 30
    arc: ArcOptions = field(default_factory=ArcOptions)


class Part(NamedTuple):
    """What one process does in one go: some rows of an update's global batch."""

    rows: BatchIndices
    latents: Latents
    prompts: list[str]
    wrong_prompts: list[str]
    names: list[str]


def make_part(run: ArcRun, source: WindowSource, update: int, shard: int, n_shards: int) -> Part:
    """The rows of one shard, with the prompts that the derangement of the whole batch deals them.

    Raises:
        LmdError: see `check_parts`.
    """
    check_parts(run.batch, n_shards)
    each, n_frames = run.batch // n_shards, plan_update(run.arc, run.seed, update).n_frames
    positions = tuple(range(shard * each, (shard + 1) * each))
    windows = source.windows(update, positions, n_frames)
    wrong = windows.prompts
    if run.arc.weights.contrastive:
        order = derangement(run.batch, rng(run.seed, "derangement", update)).tolist()
        wrong = source.windows(update, [order[p] for p in positions], n_frames).prompts
    rows = BatchIndices(run.seed, update, positions, run.batch)
    return Part(rows, windows.latents, windows.prompts, wrong, windows.names)


class UpdateBatches(IterableDataset):
    """One item per update, from the run's current one on: the parts of this process."""

    def __init__(self, module: "ArcTraining") -> None:
        self.module = module

    def __len__(self) -> int:
        """All updates of the run, also those before a restart."""
        return self.module.run.n_updates

    def __iter__(self) -> Iterator[list[Part]]:
        module, run = self.module, self.module.run
        size, rank = module.trainer.world_size, module.trainer.global_rank
        for update in range(module.trainer.global_step, run.n_updates):
            shards = [part * size + rank for part in range(run.accumulate)]
            n_shards = size * run.accumulate
            yield [make_part(run, module.source, update, shard, n_shards) for shard in shards]


class ArcTraining(L.LightningModule):
    """Generator and discriminator in turn; every decision is made in pure functions."""

    def __init__(
        self,
        generator: LiveModel,
        discriminator: Discriminator,
        text: TextEncoder,
        source: WindowSource,
        run: ArcRun,
    ) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.generator, self.discriminator, self.run = generator, discriminator, run
        self.ema = copy.deepcopy(generator).requires_grad_(False)
        self.text, self.source, self.last_checkpoint = text, source, "none yet"
        for model in (generator, discriminator.base):
            model.dit.checkpointing = run.checkpointing
        self.register_buffer("n_winning", torch.zeros((), dtype=torch.long))

    def train_dataloader(self) -> DataLoader:
        """Updates addressed by number; made after a checkpoint was restored."""
        return DataLoader(UpdateBatches(self), batch_size=None)

    def configure_optimizers(self) -> list[torch.optim.Optimizer]:
        """AdamW for each network; constant rates."""
        run = self.run
        pairs = (self.generator, run.lr_generator), (self.discriminator, run.lr_discriminator)
        return [
            torch.optim.AdamW(
                net.parameters(), lr, run.betas, weight_decay=run.weight_decay, fused=True
            )
            for net, lr in pairs
        ]

    def training_step(self, parts: list[Part], index: int) -> None:
        """One update of one network."""
        began, update = time.perf_counter(), parts[0].rows.step
        plan = plan_update(self.run.arc, self.run.seed, update)
        verdicts = []
        for i, part in enumerate(parts):
            parallel = isinstance(self.trainer.strategy, ParallelStrategy)
            is_last = i == len(parts) - 1 or not parallel
            with nullcontext() if is_last else self.trainer.strategy.block_backward_sync():
                verdicts.append(self.backward_part(part, plan))
        trained = (self.generator, self.discriminator)[plan.trains == "discriminator"]
        optimizer = self.optimizers()[plan.trains == "discriminator"]
        clip_gradient(trained, self.run.clip_norm, update, self.last_checkpoint)
        optimizer.step()
        optimizer.zero_grad()
        if plan.trains == "generator":
            self.move_average((update - self.run.arc.n_warmup) // 2)
        self.report(plan, verdicts, time.perf_counter() - began)

    def backward_part(self, part: Part, plan: UpdatePlan) -> GanLoss:
        """Roll out, judge, go backward; gradient reaches the network whose turn it is."""
        prompts = [self.text.encode(p).to(self.device) for p in (part.prompts, part.wrong_prompts)]
        dropped = draw_dropped(self.run.arc, part.rows).to(self.device)
        asked, wrong = (Prompts(prompt, dropped) for prompt in prompts)
        batch = ArcBatch(part.latents, asked, wrong, part.rows)
        trial = play_trial(self.generator, batch, plan, self.run.arc)
        is_generator = plan.trains == "generator"
        with frozen(self.discriminator) if is_generator else nullcontext():
            if is_generator:
                verdict = generator_loss(self.discriminator, trial)
            else:
                verdict = discriminator_loss(self.discriminator, trial, self.run.arc.weights)
            if not math.isfinite(verdict.loss.item()):
                raise LmdError(
                    f"a {plan.trains} loss of {verdict.loss.item()} at update {part.rows.step} "
                    f"on {part.names}",
                    "a finite loss",
                    f"Last good checkpoint: {self.last_checkpoint}. Lower --lr-generator and "
                    "--lr-discriminator, or raise --r1 and --r2.",
                )
            self.manual_backward(verdict.loss / self.run.accumulate)
        return verdict

    @torch.no_grad()
    def move_average(self, n_before: int) -> None:
        """Move the averaged weights towards the generator's, faster while the average is young."""
        keep = min(self.run.ema, (1 + n_before) / (10 + n_before))
        averaged, present = list(self.ema.parameters()), list(self.generator.parameters())
        torch._foreach_lerp_(averaged, present, 1 - keep)

    def report(self, plan: UpdatePlan, verdicts: list[GanLoss], took_s: float) -> None:
        """Log the update, and warn when the discriminator has won."""
        mean = {
            name: torch.stack([getattr(v, name).float().mean() for v in verdicts]).mean()
            for name in ("pair", "contrastive", "real", "fake", "accuracy")
        }
        who = plan.trains
        values = {f"{who}/pair": mean["pair"], "accuracy": mean["accuracy"]}
        if who == "discriminator":
            values["discriminator/contrastive"] = mean["contrastive"]
            won = mean["accuracy"].item() > self.run.winning_accuracy
            self.n_winning.copy_((self.n_winning + 1) * won)
            if self.n_winning.item() == self.run.winning_updates:
                warn_of_winning(self.run)
        self.log_dict(values, prog_bar=True, batch_size=1, sync_dist=True)
        options = self.run.arc
        n_frames = plan.n_frames - options.context_frames
        full = plan.n_steps * len(plan.n_calls)
        costs = {
            "real score": mean["real"],
            "fake score": mean["fake"],
            "is_generator": float(who == "generator"),
            "rollout_frames": float(n_frames),
            "calls": float(full if options.plays_out else sum(plan.n_calls)),
            "update_s": took_s,
            "memory_gb": memory_gb(self.device),
        }
        self.log_dict(costs, batch_size=1)


def warn_of_winning(run: ArcRun) -> None:
    """Say that the discriminator has won, and what to do about it."""
    warnings.warn(
        f"the discriminator has told real from generated in more than {run.winning_accuracy:.0%} "
        f"of the pairs for {run.winning_updates} of its updates: it has won and teaches little. "
        "Lower --lr-discriminator, raise --r1 and --r2, or raise --lr-generator.",
        stacklevel=2,
    )
