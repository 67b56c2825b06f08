"""The machine around a run: precision, throughput, checkpoints, logs, and Lightning's Trainer."""

import io
import math
import pickle
import time
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal

import lightning as L
import torch
from lightning.pytorch.callbacks import Callback, ModelCheckpoint, TQDMProgressBar
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from lightning.pytorch.plugins.io import TorchCheckpointIO
from lightning.pytorch.strategies import DDPStrategy
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from lmd.checkpoint import save_checkpoint, write_atomic
from lmd.config import DiTConfig, Preset
from lmd.errors import LmdError
from lmd.machine import half_products, machine_dict, memory_gb
from lmd.training.draws import StepPlan
from lmd.training.lora import merged_state
from lmd.training.losses import packing_of
from lmd.training.module import LiveTraining
from lmd.training.sharding import Sharding

PRECISIONS = {"32": "32-true", "bf16": "bf16-mixed"}
BF16_GAIN = 1.3  # how much faster bf16 products must be to be worth their rounding


@dataclass(frozen=True)
class RunOptions:
    """Where and on what a run runs.

    Attributes:
        out: the run's folder: checkpoints, logs, samples, weights.
        devices: processes per node.
        num_nodes: machines; start the same command on each with torchrun or SLURM.
        strategy: `ddp` keeps whole copies, `fsdp` splits them (`lmd.training.sharding`).
        precision: `32`, `bf16`, or `auto` for whichever computes faster here.
        checkpoint_every: steps between checkpoints.
        accelerator: Lightning's name: `auto`, `cpu`, `gpu`.
        progress: whether to draw the bar.
        keep_last: whether the last step is kept, too, so that the run can be made longer.
    """

    out: Path
    devices: int = 1
    num_nodes: int = 1
    strategy: Literal["ddp", "fsdp"] = "ddp"
    precision: Literal["auto", "32", "bf16"] = "auto"
    checkpoint_every: int = 200
    accelerator: str = "auto"
    progress: bool = True
    keep_last: bool = True


def product_rate(
    dtype: torch.dtype, width: int, seconds: float = 0.3, n_tokens: int = 1920
) -> float:
    """Floating-point operations per second of the transformer's feed-forward product.

    The best of many, so that other programs on the machine do not flatter a run's utilisation.
    """
    device = "cuda" if torch.cuda.is_available() else "cpu"
    a = torch.randn(n_tokens, width, device=device, dtype=dtype)
    b = torch.randn(width, 8 * width, device=device, dtype=dtype)
    best, until = math.inf, time.perf_counter() + seconds
    while time.perf_counter() < until:
        start = time.perf_counter()
        float((a @ b)[0, 0])
        best = min(best, time.perf_counter() - start)
    return 2 * a.numel() * b.shape[1] / best


def choose_precision(wanted: str, width: int, n_processes: int = 1) -> str:
    """`32` or `bf16`; `auto` takes bf16 where products are `BF16_GAIN` times as fast.

    Several processes must agree, so there the hardware decides instead of the clock: bf16 on CUDA
    and on CPUs with instructions for its products.
    """
    if wanted != "auto":
        return wanted
    if torch.cuda.is_available() or n_processes > 1:
        fast = torch.cuda.is_available() or bool(half_products(machine_dict()))
        return "bf16" if fast else "32"
    # Few tokens: without instructions for it, one bfloat16 product of a whole batch takes a second.
    half, single = (product_rate(d, width, 0.1, 240) for d in (torch.bfloat16, torch.float32))
    return "bf16" if half >= BF16_GAIN * single else "32"


@lru_cache(maxsize=64)  # a training's plans are of a few kinds
def step_flops(config: DiTConfig, plan: StepPlan, n_rows: int) -> float:
    """Floating-point operations of a training step: three times its forward products.

    Counts the linear layers over frames and global tokens, attention scores and values of the pairs
    that see each other, cross-attention's queries and outputs; leaves out text, norms and
    activation. In the last block, clean frames and global tokens have but queries, keys and values.
    """
    d, packing = config.width, packing_of(plan)
    tokens = read = plan.n_frames + 1
    pairs = pairs_read = tokens * tokens
    if packing is not None:
        noisy_tokens = slice(packing.n_clean, len(packing.attn_mask) - plan.n_targets)
        tokens, read = len(packing.attn_mask), add_noise.stop - add_noise.start
        pairs, pairs_read = int(packing.attn_mask.sum()), int(packing.attn_mask[noisy_tokens].sum())
    behind_attention = 1 + 2 + 3 * config.ff_mult  # matrices of d × d: to_out, cross-attention, ff
    n_behind = tokens * (config.depth - 1) + read
    linear = (tokens * config.depth * 3 + n_behind * behind_attention) * d * d
    attention = (pairs * (config.depth - 1) + pairs_read) * 2 * d
    return 3 * 2 * n_rows * (linear + attention)


class Throughput(Callback):
    """Frames taught per second, utilisation, memory and time left, in the bar and in the logs."""

    def __init__(self, width: int) -> None:
        self.width, self.since, self.first = width, 0.0, 0

    def on_train_start(self, trainer: L.Trainer, module: Any) -> None:
        """Measure the products' rate and start the clock."""
        half = trainer.precision == PRECISIONS["bf16"]
        self.rate = product_rate(torch.bfloat16 if half else torch.float32, self.width)
        self.since, self.first = time.perf_counter(), trainer.global_step
        self.last = self.since

    def on_train_batch_end(
        self, trainer: L.Trainer, module: LiveTraining, outputs: Any, batch: Any, index: int
    ) -> None:
        """After each optimizer step."""
        o, now = module.options, time.perf_counter()
        if (index + 1) % o.accumulate:
            return
        plan, rows = o.plan(batch["rows"].step), batch["rows"]
        done, took = trainer.global_step - self.first, now - self.last
        left = (o.n_steps - trainer.global_step) * (now - self.since) / max(1, done)
        self.last = now
        used = {}
        if o.stage != "distill":  # whose teacher would not be counted
            flops = step_flops(module.preset.dit, plan, rows.n_global)
            used = {"mfu": flops / took / self.rate / trainer.world_size}
        module.log_dict(
            {
                "frames/s": plan.taught_frames * rows.n_global / took,
                **used,
                "GB": memory_gb(module.device),
                "ETA min": left / 60,
            },
            prog_bar=True,
            batch_size=1,
        )
        module.log_dict(
            {
                "seconds": now - self.since,
                "lr": trainer.optimizers[0].param_groups[0]["lr"],
                "data wait ms": 1e3 * batch["waited_s"],
            },
            batch_size=1,
        )


class AtomicCheckpointIO(TorchCheckpointIO):
    """A checkpoint is there whole or not at all, whenever the process dies."""

    def save_checkpoint(
        self, checkpoint: dict[str, Any], path: Any, storage_options: Any | None = None
    ) -> None:
        """Write beside the target, flush to disk, then rename."""
        buffer = io.BytesIO()
        torch.save(checkpoint, buffer)
        write_atomic(path, buffer.getvalue())

    def load_checkpoint(self, path: Any, *args: Any, **more: Any) -> dict[str, Any]:
        """Read one.

        Raises:
            LmdError: it is torn; names the one before it.
        """
        try:
            return super().load_checkpoint(path, *args, **more)
        except (RuntimeError, EOFError, pickle.UnpicklingError) as error:
            path = Path(path)
            older = [other.name for other in sorted(path.parent.glob("*.ckpt")) if other < path]
            begins = f"goes on from {older[-1]}" if older else "begins anew"
            raise LmdError(
                f"{path}, which cannot be read ({str(error).partition('.')[0]})",
                "a whole checkpoint",
                f"Remove it; the run then {begins}.",
            ) from error


class Export(Callback):
    """The averaged weights as safetensors (float16, LoRA merged in), at every checkpoint.

    Args:
        path: of the file; its stem says what kind of weights they are.
        every: optimizer steps from one export to the next.
        sizes: the preset.
        notes: what the file says about its making.
    """

    def __init__(self, path: Path, every: int, sizes: Preset, notes: dict[str, Any]) -> None:
        self.path, self.every, self.sizes, self.notes = path, every, sizes, notes
        self.exported = 0

    def on_train_batch_end(self, trainer: L.Trainer, module: Any, *args: Any) -> None:
        """Every `every` optimizer steps."""
        if trainer.global_step % self.every == 0:
            self.export(trainer, module)

    def on_train_end(self, trainer: L.Trainer, module: Any) -> None:
        """The final weights."""
        self.export(trainer, module)

    def export(self, trainer: L.Trainer, module: Any) -> None:
        """Write them, once per step: all processes gather, the first one writes."""
        step = trainer.global_step
        if step == self.exported:
            return
        self.exported, weights = step, merged_state(module.ema)
        if trainer.is_global_zero:
            notes, kind = {**self.notes, "steps": step}, self.path.stem
            save_checkpoint(
                self.path, weights, kind=kind, config=self.sizes, notes=notes, stored="float16"
            )


def checkpoints(out: Path) -> list[Path]:
    """A run's checkpoints, newest last."""
    return sorted((out / "checkpoints").glob("step=*.ckpt"))


class Remember(ModelCheckpoint):
    """Keeps the last step, too, if told so; tells the module where its last good checkpoint is."""

    def __init__(self, *args: Any, keep_last: bool, **more: Any) -> None:
        super().__init__(*args, **more)
        self.keep_last = keep_last

    def on_train_start(self, trainer: L.Trainer, pl_module: Any) -> None:
        """A run that goes on has one from the start."""
        super().on_train_start(trainer, pl_module)
        if trainer.ckpt_path:
            pl_module.last_checkpoint = str(trainer.ckpt_path)

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: Any, *rest: Any) -> None:
        """The last step is kept whatever its number, so that a longer run goes on from there."""
        super().on_train_batch_end(trainer, pl_module, *rest)
        is_kept = self._last_global_step_saved == trainer.global_step
        if self.keep_last and trainer.global_step == trainer.max_steps and not is_kept:
            self._save_topk_checkpoint(trainer, self._monitor_candidates(trainer))

    def _save_checkpoint(self, trainer: L.Trainer, filepath: str) -> None:
        super()._save_checkpoint(trainer, filepath)
        trainer.lightning_module.last_checkpoint = filepath


def build_trainer(
    run: RunOptions, width: int, n_steps: int, callbacks: Sequence[Callback], **more: Any
) -> L.Trainer:
    """Lightning's Trainer for a run: logs, atomic checkpoints, precision, processes.

    Args:
        run: where and on what.
        width: of the transformer, to choose a precision for.
        n_steps: optimizer steps of the whole run.
        callbacks: what else happens on the way.
        more: of the Trainer's own arguments.

    Raises:
        LmdError: devices that are not there.
    """
    n_processes = run.devices * run.num_nodes
    precision = choose_precision(run.precision, width, n_processes)
    start = int(found[-1].stem.split("=")[1]) if (found := checkpoints(run.out)) else 0
    logs = {"save_dir": run.out, "name": "logs", "version": f"from-{start:07d}"}
    keep = Remember(
        run.out / "checkpoints",
        filename="{step:07d}",
        monitor="step",
        mode="max",
        save_top_k=2,
        every_n_train_steps=run.checkpoint_every,
        save_on_train_epoch_end=False,
        keep_last=run.keep_last,
    )
    bar = [TQDMProgressBar(refresh_rate=1)] if run.progress else []
    try:
        return L.Trainer(
            accelerator=run.accelerator,
            devices=run.devices,
            num_nodes=run.num_nodes,
            strategy=choose_strategy(run, n_processes),
            precision=PRECISIONS[precision],
            max_steps=n_steps,
            max_epochs=-1,
            logger=[CSVLogger(**logs, flush_logs_every_n_steps=10), TensorBoardLogger(**logs)],
            log_every_n_steps=1,
            callbacks=[keep, *bar, *callbacks],
            enable_progress_bar=run.progress,
            enable_model_summary=False,
            plugins=[AtomicCheckpointIO()],
            use_distributed_sampler=False,
            **more,
        )
    except MisconfigurationException as error:
        raise LmdError(
            f"no {run.devices} × {run.accelerator} here ({str(error).partition('.')[0]})",
            "devices that this machine has",
            "Change --accelerator or --devices.",
        ) from error


def choose_strategy(run: RunOptions, n_processes: int) -> Any:
    """How processes share the work; a single one needs nothing."""
    if n_processes == 1:
        return "auto"
    backend = "nccl" if torch.cuda.is_available() and run.accelerator != "cpu" else "gloo"
    if run.strategy == "fsdp":
        return Sharding(n_processes, backend)
    return DDPStrategy(process_group_backend=backend, find_unused_parameters=True)


def go_on(trainer: L.Trainer, module: L.LightningModule, out: Path) -> L.Trainer:
    """Train from the newest checkpoint in the run's folder, or from the start if it has none."""
    found = checkpoints(out)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", module=r"lightning\..*")
        warnings.filterwarnings("ignore", category=UserWarning, message=".*LeafSpec.*")
        trainer.fit(module, ckpt_path=str(found[-1]) if found else None, weights_only=False)
    return trainer


def fit(module: LiveTraining, run: RunOptions, callbacks: Sequence[Callback] = ()) -> L.Trainer:
    """Train the base or the fine-tune, going on where the run's folder left off."""
    o, width = module.options, module.preset.dit.width
    trainer = build_trainer(
        run,
        width,
        o.n_steps,
        [Throughput(width), *callbacks],
        accumulate_grad_batches=o.accumulate,
        gradient_clip_val=o.clip_norm,
    )
    return go_on(trainer, module, run.out)
