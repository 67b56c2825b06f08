"""A run's folder: what was asked for, written when training begins and compared when it goes on."""

import json
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import lightning as L
from lightning.pytorch.callbacks import Callback

from lmd.checkpoint import Config, save_checkpoint
from lmd.config import to_dict
from lmd.errors import LmdError
from lmd.outputs import write_atomic
from lmd.training.options import RunOptions
from lmd.training.trainer import fit

OPTIONS = "options.json"
KEPT = ("checkpoints/*.ckpt", "*.safetensors")  # what makes a folder a run's
# Options that may change when a run goes on: how long, where, on what, what is kept on the way.
FREE = {"n_steps", "n_updates", "out", "data", "codec", "init", "discriminator"}
FREE |= {"devices", "num_nodes", "strategy", "accelerator", "checkpoint_every", "no_progress"}
FREE |= {"sample_every", "encoder", "threads"}


class RunFolder(Callback):
    """What a run leaves beside checkpoints and logs: its options, its codec, weights, their card.

    Args:
        options: of the run.
        known: what else must stay the same: hashes of what it begins with and learns from.
        kind: of the weights, whose file has this name.
        config: their sizes.
        notes: what their file says about its making.
        codec: whose latents they learn; it is copied beside them.

    Raises:
        LmdError: the folder holds a run with other options (a longer one is welcome).
    """

    def __init__(
        self,
        options: RunOptions,
        known: dict[str, Any],
        kind: str,
        config: Config,
        notes: dict[str, Any],
        codec: Path | None = None,
    ) -> None:
        self.options, self.codec, self.config, self.notes = options, codec, config, notes
        self.weights, self.exported = options.out / f"{kind}.safetensors", False
        before = recorded(options.out)
        own = {name: value for name, value in to_dict(options).items() if name not in FREE}
        self.record = json.loads(json.dumps(own | known | {"n_steps": options.n_steps}))
        other = [line for line in changes(before, self.record) if not line.startswith("n_steps ")]
        if other:
            raise LmdError(
                f"a run in {options.out} that was started with other options ({', '.join(other)})",
                "the same options, or an empty folder",
                "Give them again, or another --out.",
            )

    def train(
        self,
        module: Any,
        callbacks: Sequence[Callback] = (),
        card: Callable[[Path, Any], str] | None = None,
    ) -> None:
        """`fit` a module that has `exported` weights; their card is made of file and options."""
        start = time.time()
        trainer = fit(module, [self, *callbacks])
        if not self.exported:  # the run was complete before
            self.export(trainer, module)
        if trainer.is_global_zero:
            if card:
                text = card(self.weights, self.options)
                write_atomic(self.weights.with_suffix(".md"), text.encode())
            print(f"{self.weights} after {trainer.global_step} steps, {time.time() - start:.0f} s")

    def on_train_start(self, trainer: L.Trainer, module: Any) -> None:
        """Everything has been checked and loaded."""
        write_atomic(self.options.out / OPTIONS, json.dumps(self.record, indent=1).encode())
        beside = self.options.out / "codec.safetensors"
        if self.codec is not None and trainer.is_global_zero and not beside.exists():
            write_atomic(beside, self.codec.read_bytes())

    def on_save_checkpoint(self, trainer: L.Trainer, module: Any, checkpoint: Any) -> None:
        """Weights with every checkpoint."""
        self.export(trainer, module)

    def export(self, trainer: L.Trainer, module: Any) -> None:
        """All processes gather the weights, the first one writes them."""
        self.exported, weights = True, module.exported()
        if trainer.is_global_zero:
            about = {"kind": self.weights.stem, "config": self.config, "stored": "float16"}
            notes = self.notes | {"steps": trainer.global_step}
            save_checkpoint(self.weights, weights, notes=notes, **about)


def recorded(out: Path) -> dict[str, Any]:
    """What the run in a folder was started with; empty if there is none, or it has kept nothing.

    Raises:
        LmdError: a torn file.
    """
    path = out / OPTIONS
    kept = [file for pattern in KEPT for file in out.glob(pattern) if file.stem != "codec"]
    if not path.is_file() or not kept:
        return {}
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise LmdError(
            f"{path} that is not JSON ({error})",
            "the options that the run was started with",
            "Remove it to go on with the options you give now, or name another --out.",
        ) from error


def changes(before: dict[str, Any], present: dict[str, Any], prefix: str = "") -> list[str]:
    """What is named in both and differs, as `part.name old → new`, sorted by name."""
    found = []
    for name in sorted(set(before) & set(present)):
        old, new = before[name], present[name]
        if isinstance(old, dict) and isinstance(new, dict):
            found += changes(old, new, f"{prefix}{name}.")
        elif old != new:
            found.append(f"{prefix}{name} {old} → {new}")
    return found
