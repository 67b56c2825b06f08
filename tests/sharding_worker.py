"""The runs that test_sharding.py compares, in one of several processes or in the only one."""

import sys
from pathlib import Path

from lmd.__main__ import importing

with importing():
    import lightning as L
    import torch
    from lightning.pytorch.callbacks import Callback
    from torch.distributed.tensor import DTensor
    from training_worker import options_of

    from lmd.training import run

WORDS = ["--preset", "tiny", "--batch", "8", "--precision", "32", "--accelerator", "cpu"]
WORDS += ["--no-progress", "--warmup", "1", "--lr", "3e-3", "--checkpoint-every", "2"]
LORA = ["--lora", "2", "--checkpointing", "--accumulate", "2"]


class StopAt(Callback):
    """End a run early, in all processes, and note how much of the weights each holds."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_train_batch_end(self, trainer: L.Trainer, *args: object) -> None:
        trainer.should_stop = trainer.global_step == self.step

    def on_train_end(self, trainer: L.Trainer, module: torch.nn.Module) -> None:
        held = [p.to_local() if isinstance(p, DTensor) else p for p in module.parameters()]
        n_held = sum(part.numel() for part in held)
        (module.options.out / f"held-{trainer.global_rank}").write_text(str(n_held))


def train(stage: str, words: list[str], stop_at: int = -1) -> None:
    """A run, ended early at step `stop_at`; the words are those of `lmd train`."""
    run.train(options_of(stage, [*WORDS, *words]), [StopAt(stop_at)])


def main(data: str, out: Path, *more: str) -> None:
    """Four base steps in one go; two, a restart and two; two LoRA steps in two parts each."""
    words = ["--data", data, *more]
    train("base", [*words, "--steps", "4", "--out", str(out / "straight")])
    for stop_at in (2, -1):
        train("base", [*words, "--steps", "4", "--out", str(out / "resumed")], stop_at)
    train("finetune", [*words, *LORA, "--steps", "2", "--out", str(out / "lora")])


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]), *sys.argv[3:])
