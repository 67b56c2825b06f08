"""An ARC run in a process of its own, so that it can be killed: see test_train_arc.py."""

import os
import signal
import sys

from lmd.__main__ import importing

with importing():
    import lightning as L
    import tyro
    from lightning.pytorch.callbacks import Callback

    from lmd.arc.train import Options, main


class KillAt(Callback):
    """End the process without a farewell once an update is done."""

    def __init__(self, update: int) -> None:
        self.update = update

    def on_train_batch_end(self, trainer: L.Trainer, *args: object) -> None:
        if trainer.global_step == self.update:
            os.kill(os.getpid(), signal.SIGKILL)


if __name__ == "__main__":  # arc_worker.py KILL_UPDATE [options of lmd train arc]
    config = (tyro.conf.FlagCreatePairsOff,)
    main(tyro.cli(Options, args=sys.argv[2:], config=config), [KillAt(int(sys.argv[1]))])
