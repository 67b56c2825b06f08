"""An ARC run in a process of its own, so that it can be killed: see test_train_arc.py."""

import argparse
import os
import signal
import sys

from lmd.__main__ import importing

with importing():
    import lightning as L
    from lightning.pytorch.callbacks import Callback

    from lmd.arc import train as train_arc
    from lmd.arc.module import ArcTraining
    from lmd.training.trainer import RunOptions


class KillAt(Callback):
    """End the process without a farewell once an update is done."""

    def __init__(self, update: int) -> None:
        self.update = update

    def on_train_batch_end(self, trainer: L.Trainer, *args: object) -> None:
        if trainer.global_step == self.update:
            os.kill(os.getpid(), signal.SIGKILL)


def main() -> None:
    """`arc_worker.py KILL_UPDATE [options of lmd train arc]`."""
    parser = argparse.ArgumentParser()
    train_arc.configure(parser)
    args = parser.parse_args(sys.argv[2:])
    real_fit, killer = train_arc.fit, KillAt(int(sys.argv[1]))

    def fit_until_killed(module: ArcTraining, where: RunOptions, callbacks: tuple) -> L.Trainer:
        return real_fit(module, where, (*callbacks, killer))

    train_arc.fit = fit_until_killed
    train_arc.main(args)


if __name__ == "__main__":
    main()
