"""A training run in a process of its own, so that it can be killed: see test_resume.py."""

import os
import signal
import sys
from importlib import import_module
from pathlib import Path
from typing import Any

from lmd.__main__ import importing

with importing():
    import lightning as L
    import tyro
    from lightning.pytorch.callbacks import Callback

    from lmd.training.run import train
    from lmd.training.trainer import AtomicCheckpointIO


def die(*_: object) -> None:
    """End the process without a farewell."""
    os.kill(os.getpid(), signal.SIGKILL)


class KillAfter(Callback):
    """Die once a step is done."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_train_batch_end(self, trainer: L.Trainer, *args: object) -> None:
        if trainer.global_step == self.step:
            die()


def kill_in_write(step: int) -> None:
    """Die while the checkpoint of a step is written: half of it is there, under another name."""
    save = AtomicCheckpointIO.save_checkpoint

    def save_or_die(disk: AtomicCheckpointIO, state: dict[str, Any], path: Any, **_: Any) -> None:
        if Path(path).name == f"step={step:07d}.ckpt":
            os.fsync = lambda file: die(os.ftruncate(file, os.fstat(file).st_size // 2))
        save(disk, state, path)

    AtomicCheckpointIO.save_checkpoint = save_or_die


def options_of(stage: str, words: list[str]) -> Any:
    """What `lmd train STAGE` makes of its words."""
    options = import_module(f"lmd.training.train_{stage}").Options
    return tyro.cli(options, args=words, config=(tyro.conf.FlagCreatePairsOff,))


def main() -> None:
    """`training_worker.py after:STEP|writing:STEP STAGE [options of lmd train]`."""
    (when, step), stage = sys.argv[1].split(":"), sys.argv[2]
    if when == "writing":
        kill_in_write(int(step))
    deaths = [KillAfter(int(step))] if when == "after" else []
    train(options_of(stage, sys.argv[3:]), deaths)


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parents[1]))
    main()
