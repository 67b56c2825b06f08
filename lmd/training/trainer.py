"""The machine around a run: precision, checkpoints, signals, logs, and Lightning's Trainer."""

import io
import logging
import math
import pickle
import signal
import sys
import threading
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import Callback, ModelCheckpoint, TQDMProgressBar
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from lightning.pytorch.plugins.io import TorchCheckpointIO
from lightning.pytorch.strategies import DDPStrategy
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from lmd.errors import LmdError
from lmd.machine import half_products, machine_dict
from lmd.outputs import write_atomic
from lmd.training.options import RunOptions
from lmd.training.sharding import Sharding

PRECISIONS = {"32": "32-true", "bf16": "bf16-mixed"}


def fit(module: Any, callbacks: Sequence[Callback] = ()) -> L.Trainer:
    """Train a module as its `options` say, from the newest checkpoint in their folder if any.

    The module has `options`, a `RunOptions` with `n_steps`; its `last_checkpoint` is kept up.

    Raises:
        LmdError: devices that are not there; see `AtomicCheckpointIO`; what the module raises.
        SystemExit: 128 + the signal's number, where one stopped the run; a checkpoint holds it.
    """
    found, stop = checkpoints(module.options.out), StopOnSignal()
    newest = found[-1] if found else None
    trainer = build_trainer(module, newest, [stop, *callbacks])
    module.last_checkpoint = str(newest or "none yet")
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", module=r"lightning\..*")
        warnings.filterwarnings("ignore", category=UserWarning, message=".*LeafSpec.*")
        trainer.fit(module, ckpt_path=newest, weights_only=False)
    if stop.received:
        print(
            f"stopped at step {trainer.global_step} by {stop.received.name}; "
            f"the same command goes on from {module.last_checkpoint}",
            file=sys.stderr,
        )
        raise SystemExit(128 + stop.received)
    return trainer


def build_trainer(module: Any, newest: Path | None, callbacks: Sequence[Callback]) -> L.Trainer:
    """Lightning's Trainer for a run: logs, atomic checkpoints, precision, processes."""
    logging.getLogger("lightning.pytorch.utilities.rank_zero").setLevel(logging.WARNING)
    options: RunOptions = module.options
    start = int(newest.stem.split("=")[1]) if newest else 0
    logs = {"save_dir": options.out, "name": "logs", "version": f"from-{start:07d}"}
    bar = [] if options.no_progress else [TQDMProgressBar(refresh_rate=1)]
    try:
        return L.Trainer(
            accelerator=options.accelerator,
            devices=options.devices,
            num_nodes=options.num_nodes,
            strategy=choose_strategy(options),
            precision=PRECISIONS[choose_precision(options.precision)],
            max_steps=options.n_steps,
            max_epochs=-1,
            accumulate_grad_batches=options.accumulate if module.automatic_optimization else 1,
            logger=[CSVLogger(**logs, flush_logs_every_n_steps=10), TensorBoardLogger(**logs)],
            log_every_n_steps=1,
            callbacks=[Checkpoints(options), *bar, *callbacks],
            enable_progress_bar=not options.no_progress,
            enable_model_summary=False,
            plugins=[AtomicCheckpointIO()],
            use_distributed_sampler=False,
        )
    except MisconfigurationException as error:
        raise LmdError(
            f"no {options.devices} × {options.accelerator} here ({str(error).partition('.')[0]})",
            "devices that this machine has",
            "Change --accelerator or --devices.",
        ) from error


def choose_precision(wanted: str) -> str:
    """`auto`: bf16 on CUDA, and on CPUs with instructions for its products; else 32."""
    if wanted != "auto":
        return wanted
    fast = torch.cuda.is_available() or bool(half_products(machine_dict()))
    return "bf16" if fast else "32"


def choose_strategy(options: RunOptions) -> Any:
    """How processes share the work; a single one needs nothing."""
    if options.n_processes == 1:
        return "auto"
    backend = "nccl" if torch.cuda.is_available() and options.accelerator != "cpu" else "gloo"
    if options.strategy == "fsdp":
        return Sharding(options.n_processes, backend)
    return DDPStrategy(process_group_backend=backend, find_unused_parameters=True)


def check_finite(what: str, value: float, where: str, advice: str) -> None:
    """Stop a run before a bad number reaches its weights.

    Raises:
        LmdError: NaN or infinite.
    """
    if not math.isfinite(value):
        raise LmdError(f"{what} {value} at {where}", "a finite one", advice)


def checkpoints(out: Path) -> list[Path]:
    """A run's checkpoints, newest last."""
    return sorted((out / "checkpoints").glob("step=*.ckpt"))


class Checkpoints(ModelCheckpoint):
    """The newest two, also of the step at which a run ends or is stopped, to go on from."""

    def __init__(self, options: RunOptions) -> None:
        super().__init__(
            options.out / "checkpoints",
            filename="{step:07d}",
            monitor="step",
            mode="max",
            save_top_k=2,
            every_n_train_steps=options.checkpoint_every,
            save_on_train_epoch_end=False,
        )

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: Any, *rest: Any) -> None:
        """Where the run ends, too."""
        super().on_train_batch_end(trainer, pl_module, *rest)
        ends = trainer.should_stop or trainer.global_step == trainer.max_steps
        if ends and self._last_global_step_saved != trainer.global_step:
            self._save_topk_checkpoint(trainer, self._monitor_candidates(trainer))

    def _save_checkpoint(self, trainer: L.Trainer, filepath: str) -> None:
        super()._save_checkpoint(trainer, filepath)
        trainer.lightning_module.last_checkpoint = filepath


class AtomicCheckpointIO(TorchCheckpointIO):
    """A checkpoint is there whole or not at all, whenever the process dies."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, *_: Any, **__: Any) -> None:
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


class StopOnSignal(Callback):
    """Ends a run behind the step in which SIGTERM or Ctrl-C came; a second one ends it at once."""

    def __init__(self) -> None:
        self.received: signal.Signals | None = None
        self.before: dict[signal.Signals, Any] = {}

    def on_train_start(self, trainer: L.Trainer, module: Any) -> None:
        """Listen, instead of Lightning, which would leave without a checkpoint."""
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self.before[number] = signal.signal(number, self._note)

    def _note(self, number: int, frame: Any) -> None:
        self.received = signal.Signals(number)
        signal.signal(number, signal.SIG_DFL)

    def on_train_batch_end(
        self, trainer: L.Trainer, module: Any, outputs: Any, batch: Any, index: int
    ) -> None:
        """All processes stop at the same step."""
        if (index + 1) % trainer.accumulate_grad_batches == 0:
            stops = trainer.strategy.reduce_boolean_decision(self.received is not None, all=False)
            trainer.should_stop = trainer.should_stop or stops

    def teardown(self, trainer: L.Trainer, module: Any, stage: str) -> None:
        """Whoever listened before does so again."""
        for number, handler in self.before.items():
            signal.signal(number, handler)
        self.before = {}

    def on_exception(self, trainer: L.Trainer, module: Any, exception: BaseException) -> None:
        """Likewise."""
        self.teardown(trainer, module, "fit")
