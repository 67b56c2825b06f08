"""What a run was begun with: written when its training begins, compared when it goes on."""

import json
from pathlib import Path
from typing import Any

import lightning as L
from lightning.pytorch.callbacks import Callback

from lmd.checkpoint import write_atomic
from lmd.errors import LmdError

OPTIONS = "options.json"
OPEN_ENDED = ("n_steps", "n_updates", "steps")  # a run may be made longer
KEPT = ("checkpoints/*.ckpt", "*.ckpt", "*.safetensors")  # what makes a folder a run's


def begun_as(out: Path) -> dict[str, Any]:
    """What the run in a folder was begun with; empty if there is none, or it has kept nothing.

    Raises:
        LmdError: a torn file.
    """
    path = out / OPTIONS
    if not path.is_file() or not any(any(out.glob(pattern)) for pattern in KEPT):
        return {}
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise LmdError(
            f"{path} that is not JSON ({error})",
            "the options that the run was begun with",
            "Remove it to go on with the options you give now, or name another --out.",
        ) from error


def compare(out: Path, before: dict[str, Any], known: dict[str, Any]) -> dict[str, Any]:
    """What a run is, as JSON holds it, if a folder's run may go on as that.

    Args:
        out: the run's folder.
        before: see `begun_as`.
        known: what the run is now.

    Raises:
        LmdError: the folder holds a run with other options (a longer one is welcome).
    """
    present = json.loads(json.dumps(known))
    other = [change for change in changes(before, present) if change[0] not in OPEN_ENDED]
    if other:
        told = ", ".join(f"{name} {old} → {new}" for name, old, new in other)
        raise LmdError(
            f"a run in {out} that was begun with other options ({told})",
            "the same options, or an empty folder",
            "Give them again, or another --out.",
        )
    return present


def changes(before: dict[str, Any], present: dict[str, Any]) -> list[tuple[str, Any, Any]]:
    """What is named in both and differs: `part.name`, old and new value, sorted by name."""
    found: list[tuple[str, Any, Any]] = []
    for name in sorted(set(before) & set(present)):
        old, new = before[name], present[name]
        if isinstance(old, dict) and isinstance(new, dict):
            found += [(f"{name}.{inner}", *values) for inner, *values in changes(old, new)]
        elif old != new:
            found.append((name, old, new))
    return found


class NoteOptions(Callback):
    """Writes down what a run is once it trains: a command that was refused leaves nothing."""

    def __init__(self, out: Path, options: dict[str, Any]) -> None:
        self.out, self.options = out, options

    def on_train_start(self, trainer: L.Trainer, module: Any) -> None:
        """Everything has been checked and loaded."""
        write_atomic(self.out / OPTIONS, json.dumps(self.options, indent=1).encode())
