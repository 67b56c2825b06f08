"""A training run in a process of its own, so that it can be killed: see test_training.py."""

import argparse
import os
import signal
import sys
from pathlib import Path

import lightning as L
from lightning.pytorch.callbacks import Callback

from lmd.training import run as train_run
from lmd.training.trainer import RunOptions, fit


class KillAt(Callback):
    """End the process without a farewell once a step is done."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_train_batch_end(self, trainer: L.Trainer, *args: object) -> None:
        if trainer.global_step == self.step:
            os.kill(os.getpid(), signal.SIGKILL)


def main() -> None:
    """`training_worker.py KILL_STEP STAGE [options of lmd train]`."""
    kill_step, stage = int(sys.argv[1]), sys.argv[2]
    parser = argparse.ArgumentParser()
    train_run.configure(parser, stage)
    args = parser.parse_args(sys.argv[3:])
    real_fit = fit

    def fit_until_killed(module: object, run: RunOptions, callbacks: list) -> L.Trainer:
        return real_fit(module, run, [*callbacks, KillAt(kill_step)])

    train_run.fit = fit_until_killed
    train_run.train(stage, args)


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parents[1]))
    main()
