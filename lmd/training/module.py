"""Training by regression under Lightning: a thin module that calls one pure loss.

Step k of a run is a function of (options, k): its batch, noise, levels and dropout. So a run that
was killed goes on with the losses it would have had. Taught in notebook 02_outpaint.
"""

import copy
import time
from collections.abc import Iterator
from typing import Any

import lightning as L
import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from lmd.config import Preset
from lmd.machine import memory_gb
from lmd.model.live_model import LiveModel
from lmd.model.text import TextEncoder
from lmd.training.distill import distill_loss
from lmd.training.draws import StepPlan, plan_step, shard_rows, step_noise
from lmd.training.lora import merged_state
from lmd.training.losses import stage_loss
from lmd.training.options import TrainOptions
from lmd.training.sharding import shard
from lmd.training.trainer import check_finite
from lmd.training.windows import Items, WindowSource, read_ahead


class LiveTraining(L.LightningModule):
    """The base, the fine-tune or the distillation; every decision is made in pure functions.

    The teacher of the distillation is the model as it is handed in; no checkpoint holds it.
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
        distills = options.stage == "distill"
        self.teachers = [copy.deepcopy(self.ema)] if distills else []  # a list hides it
        self.parts: list[Tensor] = []  # losses of the parts of a step under way
        self.last_checkpoint = "none yet"

    def training_step(self, batch: dict[str, Any], index: int) -> Tensor:
        """Mean loss of this process's rows, weighted so that the parts' mean is the batch's."""
        clean, noise, rows, options = batch["latents"], batch["noise"], batch["rows"], self.options
        prompt = self.text.encode(batch["prompts"]).to(self.device)
        seconds = self.window_s(plan_step(options, rows.step))
        if self.teachers:
            teacher = self.teachers[0].to(self.device)
            losses = distill_loss(self.model, teacher, clean, noise, prompt, seconds, options, rows)
        else:
            condition = self.model.condition(prompt, seconds)
            losses = stage_loss(self.model, clean, noise, condition, options, rows)
        loss = losses.mean() * rows.weight
        advice = f"Last good checkpoint: {self.last_checkpoint}. Lower --lr, or look at these rows."
        check_finite("a loss of", loss.item(), f"step {rows.step} on {batch['names']}", advice)
        self.parts.append(loss.detach())
        if len(self.parts) == options.accumulate:
            mean = torch.stack(self.parts).mean()
            self.parts = []
            self.log("loss", mean, prog_bar=True, batch_size=len(clean), sync_dist=True)
        return loss

    def window_s(self, plan: StepPlan) -> float:
        """The length that the model is conditioned on: of the base's window, or of the stream's.

        A stream's is its context and the preset's block, whatever block it plays now.
        """
        streamed = plan.context_frames + self.preset.window.block_frames
        n_frames = plan.n_frames if plan.regime is None else streamed
        return n_frames / self.preset.frame_rate_hz

    def configure_optimizers(self) -> dict[str, Any]:
        """AdamW with a warm-up, a constant rate and a cool-down."""
        o = self.options
        trained = [p for p in self.model.parameters() if p.requires_grad]
        adam = torch.optim.AdamW(trained, o.lr, o.betas, weight_decay=o.weight_decay, fused=True)
        rate = torch.optim.lr_scheduler.LambdaLR(adam, lambda step: o.lr_factor(step))
        return {"optimizer": adam, "lr_scheduler": {"scheduler": rate, "interval": "step"}}

    def on_train_start(self) -> None:
        """Start the clock, at the schedule's rate: a checkpoint of a shorter run has its own."""
        self.began = self.last_end = time.perf_counter()
        self.first_step = self.trainer.global_step
        rate = self.options.lr * self.options.lr_factor(self.first_step)
        for group in self.trainer.optimizers[0].param_groups:
            group["lr"] = rate

    def configure_gradient_clipping(self, *_: Any, **more: Any) -> None:
        """Clip by norm; a gradient that is not finite ends the run before it reaches a weight."""
        step = self.trainer.global_step
        clip_gradient(self.model, self.options.clip_norm, step, self.last_checkpoint)

    def optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        """Step, then move the average, so that a checkpoint of this step holds both."""
        super().optimizer_step(*args, **kwargs)
        move_average(self.ema, self.model, self.options.ema, self.trainer.global_step)

    def on_train_batch_end(self, outputs: Any, batch: dict[str, Any], index: int) -> None:
        """Frames taught per second, memory and time left, in the bar and in the logs."""
        if (index + 1) % self.options.accumulate:
            return
        rows, now, step = batch["rows"], time.perf_counter(), self.trainer.global_step
        taught = plan_step(self.options, rows.step).taught_frames * rows.n_global
        took, self.last_end = now - self.last_end, now
        left_s = (self.options.n_steps - step) * (now - self.began) / (step - self.first_step)
        shown = {"frames/s": taught / took, "GB": memory_gb(self.device), "ETA min": left_s / 60}
        logged = {
            "seconds": now - self.began,
            "lr": self.trainer.optimizers[0].param_groups[0]["lr"],
            "data wait ms": 1e3 * batch["waited_s"],
        }
        self.log_dict(shown, prog_bar=True, batch_size=1)
        self.log_dict(logged, batch_size=1)

    def configure_model(self) -> None:
        """Split weights and average among processes where the strategy brings a mesh for it."""
        if self.device_mesh is not None:
            shard(self, self.model, self.ema, self.device_mesh["data_parallel"])

    def exported(self) -> dict[str, Tensor]:
        """The averaged weights under their ordinary names; every process has to ask."""
        return merged_state(self.ema)

    def train_dataloader(self) -> Items:
        """Batches addressed by step, those before a restart counted."""
        return Items(self.batches, self.options.n_steps * self.options.accumulate)

    def batches(self) -> Iterator[dict[str, Any]]:
        """From the run's step on, read ahead; `waited_s`: for how long one was not there yet."""
        batches = read_ahead(self.read(self.trainer.global_step))
        asked = time.perf_counter()
        for batch in batches:
            yield {**batch, "waited_s": time.perf_counter() - asked}
            asked = time.perf_counter()

    def read(self, first_step: int) -> Iterator[dict[str, Any]]:
        """Micro-batches of this process, each a function of its number."""
        options, trainer = self.options, self.trainer
        n_shards = trainer.world_size * options.accumulate
        for step in range(first_step, options.n_steps):
            for part in range(options.accumulate):
                own = part * trainer.world_size + trainer.global_rank
                rows = shard_rows(options, step, own, n_shards)
                n_frames = plan_step(options, step).n_frames
                windows = self.source.windows(step, rows.positions, n_frames)
                noise = step_noise(options, rows, windows.latents.shape[1])
                yield {"rows": rows, "noise": noise, **windows._asdict()}

    def transfer_batch_to_device(
        self, batch: dict[str, Any], device: torch.device, dataloader_idx: int
    ) -> dict[str, Any]:
        """Move the tensors; Lightning's own way looks into every name and row for more of them."""
        return {k: v.to(device) if isinstance(v, Tensor) else v for k, v in batch.items()}


@torch.no_grad()
def move_average(average: nn.Module, model: nn.Module, decay: float, n_before: int) -> None:
    """Move averaged weights towards the present ones, faster while the average is young.

    Not Lightning's `WeightAveraging`, which does not work with split weights.
    """
    keep = min(decay, (1 + n_before) / (10 + n_before))
    averaged, present = list(average.parameters()), list(model.parameters())
    torch._foreach_lerp_(averaged, present, 1 - keep)


def clip_gradient(model: nn.Module, limit: float, step: int, last_checkpoint: str) -> None:
    """Bring the gradient's norm down to a limit.

    Raises:
        LmdError: the gradient is not finite; no weight has seen it.
    """
    norm = nn.utils.clip_grad_norm_(model.parameters(), limit)
    norm = norm.full_tensor() if isinstance(norm, DTensor) else norm
    advice = "Lower the learning rate, or use --precision 32."
    advice = f"Last good checkpoint: {last_checkpoint}. {advice}"
    check_finite("a gradient of norm", norm.item(), f"step {step}", advice)
