"""What a run is, written down when its training begins and compared when it goes on."""

import json
from pathlib import Path
from typing import Any

import lightning as L
from lightning.pytorch.callbacks import Callback

from lmd.checkpoint import read_header
from lmd.config import preset, to_dict
from lmd.data.encode import encoder_sha256
from lmd.errors import LmdError
from lmd.outputs import write_atomic
from lmd.training.options import RunOptions

OPTIONS = "options.json"
KEPT = ("checkpoints/*.ckpt", "*.safetensors")  # what makes a folder a run's
# Options that may change when a run goes on: how long, where, on what, what is kept on the way.
FREE = {"n_steps", "n_updates", "out", "data", "codec", "init", "discriminator"}
FREE |= {"devices", "num_nodes", "strategy", "accelerator", "checkpoint_every", "no_progress"}
FREE |= {"sample_every", "encoder", "threads"}


class RunRecord(Callback):
    """`options.json` of a run, and the codec beside its weights; written once it trains.

    What is `known` besides the options: hashes of what the run begins with and learns from.

    Raises:
        LmdError: the folder holds a run with other options (a longer one is welcome).
    """

    def __init__(self, options: RunOptions, known: dict[str, Any], codec: Path | None) -> None:
        self.out, self.codec, before = options.out, codec, recorded(options.out)
        own = {name: value for name, value in to_dict(options).items() if name not in FREE}
        self.options = json.loads(json.dumps(own | known | {"n_steps": options.n_steps}))
        other = [line for line in changes(before, self.options) if not line.startswith("n_steps ")]
        if other:
            raise LmdError(
                f"a run in {self.out} that was started with other options ({', '.join(other)})",
                "the same options, or an empty folder",
                "Give them again, or another --out.",
            )

    def on_train_start(self, trainer: L.Trainer, module: Any) -> None:
        """Everything has been checked and loaded."""
        write_atomic(self.out / OPTIONS, json.dumps(self.options, indent=1).encode())
        beside = self.out / "codec.safetensors"
        if self.codec is not None and trainer.is_global_zero and not beside.exists():
            write_atomic(beside, self.codec.read_bytes())


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


def matching_codec(options: RunOptions, encoder: str | None) -> Path | None:
    """`--codec`, or the one beside the weights that a run begins with, if it made the latents.

    `encoder` is the hash of the encoder that made them, where they say it.
    """
    sizes, starts = preset(options.preset).codec, options.starts().values()
    beside = [path.with_name("codec.safetensors") for path in starts if path is not None]
    there = [path for path in (options.codec, *beside) if path.is_file()]
    fitting = (path for path in there if read_header(path).config == sizes)
    return next((path for path in fitting if encoder in (None, encoder_sha256(path))), None)
