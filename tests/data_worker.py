"""What test_data_processes.py compares, in one process or in several: encoding, then sampling."""

import json
import sys
from pathlib import Path

from lmd.__main__ import importing
from lmd.__main__ import main as lmd

with importing():
    import lightning as L
    import torch
    from torch import nn

    from lmd.data.encode import QUIET
    from lmd.data.latents import LatentDataModule

GLOBAL_BATCH, STEPS = 4, 6


class Listener(L.LightningModule):
    """Trains nothing; remembers which windows it saw."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(()))
        self.seen: list[list[str]] = []

    def training_step(self, batch: dict, batch_idx: int) -> torch.Tensor:
        self.seen.append(batch["identity"])
        return self.weight * batch["latents"].mean()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


def main(corpus: str, codec: str, out: str, devices: str, n_workers: str) -> None:
    """Encode a corpus and write down what each process sees of its windows."""
    words = ["--data", corpus, "--codec", codec, "--out", out, "--stems", "--rows-per-shard", "1"]
    assert lmd(["data", "encode", *words, "--accelerator", "cpu", "--devices", devices]) == 0
    trainer = L.Trainer(
        **QUIET, accelerator="cpu", devices=int(devices), max_steps=STEPS, limit_val_batches=0,
        enable_progress_bar=False,
    )  # fmt: skip
    listener = Listener()
    data = LatentDataModule(out, 12, GLOBAL_BATCH, seed=3, n_workers=int(n_workers))
    trainer.fit(listener, data)
    (Path(out) / f"seen-{trainer.global_rank}.json").write_text(json.dumps(listener.seen))


if __name__ == "__main__":
    main(*sys.argv[1:])
