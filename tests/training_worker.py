"""A training run in a process of its own, so that it can be killed: see test_resume.py."""

import argparse
import os
import signal
import sys
from pathlib import Path
from typing import Any

from lmd.__main__ import importing

with importing():
    import lightning as L
    from lightning.pytorch.callbacks import Callback

    from lmd.training import run as train_run
    from lmd.training.trainer import AtomicCheckpointIO, RunOptions, fit


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


def main() -> None:
    """`training_worker.py after:STEP|writing:STEP STAGE [options of lmd train]`."""
    (when, step), stage = sys.argv[1].split(":"), sys.argv[2]
    parser = argparse.ArgumentParser()
    train_run.configure(parser, stage)
    args = parser.parse_args(sys.argv[3:])
    deaths = [KillAfter(int(step))] if when == "after" else []
    if when == "writing":
        kill_in_write(int(step))

    def fit_until_killed(module: object, run: RunOptions, callbacks: list) -> L.Trainer:
        return fit(module, run, [*callbacks, *deaths])

    train_run.fit = fit_until_killed
    train_run.train(stage, args)


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parents[1]))
    main()
