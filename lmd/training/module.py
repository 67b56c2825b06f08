"""Training by regression under Lightning: a thin module that calls the losses.

Step k of a run is a function of (options, k): its batch, noise, levels and dropout. A checkpoint
therefore holds weights, their moving average, the optimizer and k, and a run that was killed goes
on with the losses it would have had.

Taught in notebook 02_outpaint.
"""

import copy
import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple, Protocol

import lightning as L
import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.utils.data import DataLoader, IterableDataset

from lmd.config import Preset
from lmd.errors import LmdError
from lmd.model.dit import Condition
from lmd.model.live_model import LiveModel
from lmd.model.text import TextEncoder
from lmd.shapes import BlockLatents, Latents, Tokens
from lmd.stream.block import BlockPlan
from lmd.training.distill import DistillOptions, draw_points, trajectory_loss, walk
from lmd.training.draws import (
    BaseOptions,
    BatchIndices,
    FinetuneOptions,
    PerItem,
    StepPlan,
    base_plan,
    context_dropout,
    draw_kept,
    draw_levels,
    draw_noise,
    finetune_plan,
    one_block_plan,
)
from lmd.training.losses import (
    drop_text,
    flow_loss,
    outpaint_loss,
    packed_loss,
    packing_of,
)
from lmd.training.read_ahead import read_ahead
from lmd.training.sharding import shard

Stage = Literal["base", "finetune", "distill"]


class Windows(NamedTuple):
    """Rows of a batch: latents `[row, latent, frame]`, their captions, and where they are from."""

    latents: Latents
    prompts: list[str]
    names: list[str]


class WindowSource(Protocol):
    """Where batches come from; the answer depends on the arguments alone."""

    def windows(self, step: int, positions: Sequence[int], n_frames: int) -> Windows:
        """The rows at these positions of the global batch of a step."""
        ...


@dataclass(frozen=True)
class TrainOptions:
    """A whole run.

    Sources: betas, weight decay and clipping are those of arXiv 2605.22717's base pre-training and
    ARC configs; the learning rate is higher because the model is 26 times smaller; warm-up,
    constant rate and linear cool-down follow arXiv 2405.18392; the moving average is what is
    shipped.
    """

    stage: Stage
    n_steps: int
    batch: int = 8  # rows of the global batch: all devices, all accumulated parts
    accumulate: int = 1
    seed: int = 0
    lr: float = 5e-4
    warmup_steps: int = 100
    cooldown_share: float = 0.2  # of the steps, at the end
    betas: tuple[float, float] = (0.9, 0.95)
    weight_decay: float = 0.01
    clip_norm: float = 1.0
    ema: float = 0.999
    checkpointing: bool = False
    base: BaseOptions = field(default_factory=BaseOptions)
    finetune: FinetuneOptions = field(default_factory=FinetuneOptions)
    distill: DistillOptions = field(default_factory=DistillOptions)

    def plan(self, step: int) -> StepPlan:
        """What step `step` does."""
        if self.stage == "base":
            return base_plan(self.base, self.seed, step)
        if self.stage == "distill":
            regimes, n_points = self.distill.regimes, self.distill.n_points
            return one_block_plan(self.finetune, regimes, n_points, self.seed, step)
        return finetune_plan(self.finetune, self.seed, step)

    def n_rows(self, plan: StepPlan) -> int:
        """Rows of the global batch; a long window takes the place of several short ones."""
        if self.stage != "base" or plan.n_frames <= self.base.window_frames:
            return self.batch
        fitting = max(1, self.batch * self.base.window_frames // plan.n_frames)
        return 1 << (fitting.bit_length() - 1)  # a power of two divides among processes

    def lr_factor(self, step: int) -> float:
        """Warm-up, constant, linear cool-down to a twentieth."""
        left = (self.n_steps - step) / max(1.0, self.cooldown_share * self.n_steps)
        return min(1.0, (step + 1) / max(1, self.warmup_steps), max(0.05, left))


def check_parts(batch: int, n_parts: int) -> None:
    """Refuse a global batch that does not divide among the parts of a step.

    Raises:
        LmdError: it does not.
    """
    if batch % n_parts:
        raise LmdError(
            f"a global batch of {batch} rows for {n_parts} parts",
            "a multiple (parts are processes × accumulation)",
            "Change --batch, --devices or --accumulate.",
        )


def shard_rows(options: TrainOptions, step: int, shard: int, n_shards: int) -> BatchIndices:
    """The rows of one part (process, accumulation) of a step's global batch, split evenly.

    Where a step has fewer rows than parts, a part that gets none computes the first one with
    weight 0, so that all processes do the same work.

    Raises:
        LmdError: see `check_parts`.
    """
    check_parts(options.batch, n_shards)
    n = options.n_rows(options.plan(step))
    own = range(shard * n // n_shards, (shard + 1) * n // n_shards)
    weight = len(own) * n_shards / n
    return BatchIndices(options.seed, step, tuple(own) or (0,), n, weight)


def step_noise(options: TrainOptions, rows: BatchIndices, n_channels: int) -> Tensor:
    """The noise of a step's rows, in the shape that its plan calls for; drawn on the CPU.

    Returns:
        `[row, latent, frame]`, or `[row, target, latent, frame]` where blocks are taught in packs.
    """
    plan = options.plan(rows.step)
    if options.stage == "distill":
        return draw_noise(rows, n_channels, plan.block_frames)
    if plan.regime in (None, "full"):
        return draw_noise(rows, n_channels, plan.n_frames)
    return draw_noise(rows, plan.n_targets, n_channels, plan.block_frames)


def stage_loss(
    model: LiveModel,
    clean: Latents,
    noise: Tensor,
    condition: Condition,
    options: TrainOptions,
    rows: BatchIndices,
) -> PerItem:
    """The loss of every row of a step, with everything else that the step draws.

    Args:
        model: the transformer.
        clean: windows of the step's length.
        noise: see `step_noise`.
        condition: their prompts and length, before dropout.
        options: of the run.
        rows: which rows these are.

    Returns:
        One loss per row.
    """
    plan, device = options.plan(rows.step), clean.device
    stage = options.base if options.stage == "base" else options.finetune
    condition = drop_text(condition, draw_kept(rows, "text dropout", stage.text_dropout))
    n_levels_frames = plan.n_frames if plan.regime != "block-causal" else options.base.window_frames
    t = draw_levels(stage.noise, rows, plan.n_targets, n_levels_frames).to(device)
    if plan.regime is None:
        return flow_loss(model, clean, noise, t[:, 0], condition)
    s, o = plan.context_frames, plan.block_frames
    clean = context_dropout(clean, options.finetune, rows, o, s)
    packing = packing_of(plan)
    if packing is None:
        return outpaint_loss(model, clean, noise, t[:, 0], condition, plan)
    return packed_loss(model, clean, noise, t, condition, packing).mean(dim=1)


def distill_loss(
    model: LiveModel,
    teacher: LiveModel,
    clean: Latents,
    noise: BlockLatents,
    prompt: Tokens,
    seconds: float,
    options: TrainOptions,
    rows: BatchIndices,
) -> PerItem:
    """The warm-up's loss of every row of a step, with everything else that the step draws.

    Args:
        model: learns.
        teacher: what it started from.
        clean: windows of the step's length; the block at their end is not looked at.
        noise: see `step_noise`.
        prompt: prompt embeddings, before dropout.
        seconds: the length that both are told.
        options: of the run.
        rows: which rows these are.
    """
    plan = options.plan(rows.step)
    s = plan.context_frames
    kept = draw_kept(rows, "text dropout", options.finetune.text_dropout)
    context = context_dropout(clean, options.finetune, rows, plan.block_frames)[..., :s]
    block = BlockPlan(plan.regime, plan.block_frames)
    asked = drop_text(teacher.condition(prompt, seconds), kept)
    walked = walk(teacher, context, noise, asked, block, options.distill)
    if options.distill.points_on == "chord":
        walked = walked.chord()
    points = draw_points(options.distill, options.seed, rows.step)
    condition = drop_text(model.condition(prompt, seconds), kept)
    loss_on = options.distill.loss_on
    return trajectory_loss(model, context, walked, points, condition, block, loss_on)


def clip_gradient(model: nn.Module, limit: float, step: int, last_checkpoint: str) -> None:
    """Bring the gradient's norm down to a limit.

    Raises:
        LmdError: the gradient is not finite; no weight has seen it.
    """
    norm = nn.utils.clip_grad_norm_(model.parameters(), limit)
    norm = norm.full_tensor() if isinstance(norm, DTensor) else norm
    if not math.isfinite(norm.item()):
        raise LmdError(
            f"a gradient of norm {norm.item()} at step {step}",
            "a finite gradient",
            f"Last good checkpoint: {last_checkpoint}. Lower the learning rate, or use "
            "--precision 32.",
        )


class StepBatches(IterableDataset):
    """Micro-batches of one process, from the run's current step on."""

    def __init__(self, module: "LiveTraining") -> None:
        self.module = module

    def __len__(self) -> int:
        """All micro-batches of the run, also those before a restart."""
        return self.module.options.n_steps * self.module.options.accumulate

    def __iter__(self) -> Iterator[dict[str, Any]]:
        """Read ahead, each with `waited_s`: for how long it was not there when it was asked for."""
        batches = read_ahead(self.read(self.module.trainer.global_step))
        asked = time.perf_counter()
        for batch in batches:
            yield {**batch, "waited_s": time.perf_counter() - asked}
            asked = time.perf_counter()

    def read(self, first_step: int) -> Iterator[dict[str, Any]]:
        """One by one, functions of their number."""
        module, options = self.module, self.module.options
        n_shards = module.trainer.world_size * options.accumulate
        for step in range(first_step, options.n_steps):
            for part in range(options.accumulate):
                shard = part * module.trainer.world_size + module.trainer.global_rank
                rows = shard_rows(options, step, shard, n_shards)
                n_frames = options.plan(step).n_frames
                windows = module.source.windows(step, rows.positions, n_frames)
                noise = step_noise(options, rows, windows.latents.shape[1])
                yield {"rows": rows, "noise": noise, **windows._asdict()}


class LiveTraining(L.LightningModule):
    """The stage that the options name; every decision is made in pure functions.

    The teacher of `distill` is the model as it is handed in; no checkpoint holds it.
    """

    def __init__(
        self,
        model: LiveModel,
        text: TextEncoder,
        source: WindowSource,
        preset: Preset,
        options: TrainOptions,
    ) -> None:
        super().__init__()
        self.model, self.options, self.preset = model, options, preset
        self.text, self.source = text, source
        model.dit.checkpointing = options.checkpointing
        self.ema = copy.deepcopy(model).requires_grad_(False)
        is_taught = options.stage == "distill"
        self.teachers = [copy.deepcopy(self.ema)] if is_taught else []  # a list hides it
        self.parts: list[Tensor] = []  # losses of the parts of a step under way
        self.last_checkpoint = "none yet"

    def configure_model(self) -> None:
        """Split weights and average among processes where the strategy brings a mesh for it."""
        if self.device_mesh is not None:
            shard(self, self.model, self.ema, self.device_mesh["data_parallel"])

    def train_dataloader(self) -> DataLoader:
        """Batches addressed by step; made after a checkpoint was restored."""
        return DataLoader(StepBatches(self), batch_size=None)

    def transfer_batch_to_device(
        self, batch: dict[str, Any], device: torch.device, dataloader_idx: int
    ) -> dict[str, Any]:
        """Move the tensors; Lightning's own way looks into every name and row for more of them."""
        return {k: v.to(device) if isinstance(v, Tensor) else v for k, v in batch.items()}

    def window_s(self, plan: StepPlan) -> float:
        """The length that the model is told: of the base's window, or of the stream's.

        A stream is told its memory and the preset's block, whatever block it plays now.
        """
        n_frames = plan.n_frames
        if plan.regime is not None:
            n_frames = plan.context_frames + self.preset.window.block_frames
        return n_frames / self.preset.frame_rate_hz

    def training_step(self, batch: dict[str, Any], index: int) -> Tensor:
        """Mean loss of this process's rows, weighted so that the parts' mean is the batch's."""
        clean, noise = batch["latents"], batch["noise"]
        tokens = self.text.encode(batch["prompts"]).to(self.device)
        options, rows = self.options, batch["rows"]
        seconds = self.window_s(options.plan(rows.step))
        if self.teachers:
            teacher = self.teachers[0].to(self.device)
            losses = distill_loss(self.model, teacher, clean, noise, tokens, seconds, options, rows)
        else:
            condition = self.model.condition(tokens, seconds)
            losses = stage_loss(self.model, clean, noise, condition, options, rows)
        loss = losses.mean() * rows.weight
        if not math.isfinite(loss.item()):
            raise LmdError(
                f"a loss of {loss.item()} at step {rows.step} on {batch['names']}",
                "a finite loss",
                f"Last good checkpoint: {self.last_checkpoint}. Lower --lr, or look at these rows.",
            )
        self.parts.append(loss.detach())
        if len(self.parts) == self.options.accumulate:
            mean = torch.stack(self.parts).mean()
            self.parts = []
            self.log("loss", mean, prog_bar=True, batch_size=len(clean), sync_dist=True)
        return loss

    def on_train_start(self) -> None:
        """The schedule's rate from the first step on; a checkpoint of a shorter run has its own."""
        rate = self.options.lr * self.options.lr_factor(self.trainer.global_step)
        for group in self.trainer.optimizers[0].param_groups:
            group["lr"] = rate

    def configure_optimizers(self) -> dict[str, Any]:
        """AdamW with a warm-up, a constant rate and a cool-down."""
        o = self.options
        trained = [p for p in self.model.parameters() if p.requires_grad]
        adam = torch.optim.AdamW(trained, o.lr, o.betas, weight_decay=o.weight_decay, fused=True)
        rate = torch.optim.lr_scheduler.LambdaLR(adam, lambda step: o.lr_factor(step))
        return {"optimizer": adam, "lr_scheduler": {"scheduler": rate, "interval": "step"}}

    def configure_gradient_clipping(
        self,
        optimizer: torch.optim.Optimizer,
        gradient_clip_val: float | None = None,
        gradient_clip_algorithm: str | None = None,
    ) -> None:
        """Clip by norm; a gradient that is not finite ends the run before it reaches a weight."""
        assert gradient_clip_val is not None
        clip_gradient(self.model, gradient_clip_val, self.trainer.global_step, self.last_checkpoint)

    def optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        """Step, then move the average, so that a checkpoint of this step holds both."""
        super().optimizer_step(*args, **kwargs)
        step = self.trainer.global_step
        keep = min(self.options.ema, (1 + step) / (10 + step))
        with torch.no_grad():
            pairs = zip(self.ema.parameters(), self.model.parameters(), strict=True)
            averaged, present = map(list, zip(*pairs, strict=True))
            torch._foreach_lerp_(averaged, present, 1 - keep)
