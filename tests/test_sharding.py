"""`--strategy fsdp`: two processes that split the weights do what one process does."""

import shutil
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from latents_fake import write_latents
from nodes import HERE, finish_nodes, start_nodes
from sharding_worker import main, train

from lmd.checkpoint import load_tensors, read_header
from lmd.training.card import run_log

RUNS = ("straight", "lora")


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> Path:
    """The worker's runs in `one` process and in `two`, with their `data`."""
    folder = tmp_path_factory.mktemp("sharding")
    data = write_latents(folder)
    words = [data, folder / "two", "--num-nodes", 2, "--strategy", "fsdp"]
    processes = start_nodes(HERE / "sharding_worker.py", *words)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        main(str(data), folder / "one")
    finish_nodes(processes)
    return folder


def losses(out: Path) -> np.ndarray:
    return run_log(out)["loss"].to_numpy()


@pytest.mark.parametrize("name", RUNS)
def test_two_processes_that_split_the_weights_lose_what_one_loses(runs, name):
    """Four base steps; two LoRA steps with recomputed layers, in two parts each."""
    both, one = losses(runs / "two" / name), losses(runs / "one" / name)
    assert len(both) == len(one)
    assert np.abs(both - one).max() < 1e-5  # measured 2.4e-7: sums in another order


def test_each_process_keeps_half_of_the_weights_and_of_their_average(runs):
    whole = int((runs / "one/straight/held-0").read_text())
    parts = [int((runs / f"two/straight/held-{rank}").read_text()) for rank in range(2)]
    assert sum(parts) == whole
    assert max(parts) < 0.51 * whole


def test_a_split_run_that_was_stopped_goes_on_with_the_same_losses(runs):
    """Two steps, a restart and two steps: bit for bit those of four."""
    straight, resumed = runs / "two/straight", runs / "two/resumed"
    assert len(list((resumed / "logs").glob("from-*"))) == 2
    assert np.array_equal(losses(resumed), losses(straight))
    ours, theirs = (read_header(out / "base.safetensors").sha256 for out in (resumed, straight))
    assert ours == theirs


@pytest.mark.parametrize("file", ["straight/base.safetensors", "lora/finetuned.safetensors"])
def test_weights_are_exported_whole_and_equal_those_of_one_process(runs, file):
    both, one = (load_tensors(runs / n / file)[0] for n in ("two", "one"))
    assert both.keys() == one.keys()
    for name, tensor in one.items():
        # measured 3e-5, one unit of float16: sums in another order
        assert torch.allclose(both[name], tensor, rtol=2e-3, atol=1e-4), name


def test_one_process_goes_on_from_what_two_have_left(runs, tmp_path):
    shutil.copytree(runs / "two/resumed/checkpoints", tmp_path / "checkpoints")
    (tmp_path / "checkpoints/step=0000004.ckpt").unlink()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        data = str(runs)
        train("base", ["--data", data, "--steps", "4", "--out", str(tmp_path)])
    assert np.abs(losses(tmp_path) - losses(runs / "one/straight")[2:]).max() < 1e-5
