"""Reading ahead changes when a batch is read, and nothing else."""

import threading
import warnings
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import psutil
import pytest
import torch
from latents_fake import write_latents

from lmd.__main__ import main
from lmd.errors import LmdError
from lmd.training import module
from lmd.training.card import run_log
from lmd.training.windows import LatentSource, read_ahead

WORDS = ["--preset", "tiny", "--batch", "2", "--precision", "32", "--accelerator", "cpu"]
WORDS += ["--no-progress", "--steps", "6"]


def readers() -> list[str]:
    """Reading threads that are alive."""
    return [t.name for t in threading.enumerate() if t.name.startswith("read-ahead")]


def train(data, out) -> int:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return main(["train", "base", *WORDS, "--data", str(data), "--out", str(out)])


def test_items_come_in_order_and_the_next_is_made_meanwhile():
    made = [threading.Event() for _ in range(5)]

    def items():
        for number, event in enumerate(made):
            event.set()
            yield number

    seen = []
    for number in read_ahead(items()):
        assert all(event.wait(10) for event in made[number : number + 2])
        assert not any(event.is_set() for event in made[number + 2 :])  # one ahead, not more
        seen.append(number)
    assert seen == list(range(5))
    assert not readers()


def test_an_error_comes_when_its_item_is_asked_for():
    def items():
        yield "good"
        raise LmdError("a torn shard", "a whole one", "Encode again.")

    batches = read_ahead(items())
    assert next(batches) == "good"
    with pytest.raises(LmdError, match="a torn shard"):
        next(batches)
    assert not readers()


def test_the_thread_ends_with_who_asks():
    batches = read_ahead(iter(range(100)))
    assert next(batches) == 0
    assert readers()
    batches.close()
    assert not readers()


def test_a_run_loses_the_same_with_and_without(tmp_path, monkeypatch):
    data = write_latents(tmp_path / "latents")
    assert train(data, tmp_path / "ahead") == 0
    assert not readers()
    monkeypatch.setattr(module, "read_ahead", lambda batches: batches)
    assert train(data, tmp_path / "in line") == 0
    ahead, in_line = (run_log(tmp_path / name) for name in ("ahead", "in line"))
    assert np.array_equal(ahead["loss"], in_line["loss"])  # bit for bit
    assert (ahead["data wait ms"] >= 0).all()


def test_a_fault_while_reading_ends_the_run_with_its_message(tmp_path, monkeypatch, capsys):
    """Three good steps, whose weights are kept; no thread is left behind."""
    real = LatentSource.windows

    def torn(source, step, positions, n_frames):
        if step == 3:
            raise LmdError("shard 7: its checksum differs", "a whole shard", "Encode again.")
        return real(source, step, positions, n_frames)

    monkeypatch.setattr(LatentSource, "windows", torn)
    assert train(write_latents(tmp_path / "latents"), tmp_path / "run") == 2
    assert "shard 7: its checksum differs" in capsys.readouterr().err
    assert not readers()
    assert run_log(tmp_path / "run")["step"].tolist() == [0, 1, 2]


def test_reading_starts_no_threads_of_torch(tmp_path):
    source = LatentSource(write_latents(tmp_path, latent_dim=64), 0)
    rows = range(16)  # enough for torch to share the work, if it had any
    process, before_n = psutil.Process(), torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        with ThreadPoolExecutor(1) as reader:
            reader.submit(int).result()
            alone = process.num_threads()
            reader.submit(source.windows, 0, rows, 240).result()
            assert process.num_threads() == alone
            reader.submit(torch.randn(16, 64, 240).double).result()  # what would be seen
            assert process.num_threads() > alone
    finally:
        torch.set_num_threads(before_n)
