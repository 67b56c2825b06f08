"""The commands for several devices and machines: the losses of one process, but rounding."""

import warnings
from pathlib import Path

import numpy as np
import pytest
from latents_fake import write_latents
from nodes import ADDRESSES, finish_nodes, free_port, run_pair, start
from pages import command_with

from lmd.__main__ import main
from lmd.training.card import run_log

WORDS = ["--steps", "4", "--batch", "8", "--precision", "32", "--accelerator", "cpu"]
WORDS += ["--no-progress", "--warmup", "1", "--lr", "3e-3"]


@pytest.fixture(scope="module")
def one(tmp_path_factory) -> Path:
    """A folder with `latents`, and what one process made of them."""
    return alone("base", tmp_path_factory.mktemp("one"))


def alone(stage: str, folder: Path) -> Path:
    """The run of one process, in a folder with its `latents`."""
    data = write_latents(folder / "latents")
    words = ["--preset", "tiny", "--data", str(data), "--out", str(folder), *WORDS]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert main(["train", stage, *words]) == 0
    return folder


def distance(one: Path, several: Path) -> float:
    """How far the losses of two runs are apart, at most."""
    first, second = (run_log(out)["loss"].to_numpy() for out in (one, several))
    assert len(first) == len(second) == 4
    return float(np.abs(first - second).max())


def test_several_devices_as_the_docs_say(one, tmp_path):
    """Two processes instead of four, which Lightning starts itself."""
    places = {"small": "tiny", "data/latents": str(one / "latents")}
    words = command_with("lmd train base --preset", places)
    words[words.index("--devices") + 1] = "2"
    run_pair(*words, *WORDS, "--out", tmp_path)
    assert distance(one, tmp_path) < 1e-5  # measured 2e-7: sums in another order


def test_several_devices_teach_blocks_as_one_does(tmp_path):
    """The same line for the fine-tune, whose steps take turns between regimes and lengths."""
    one = alone("finetune", tmp_path / "one")
    places = {"small": "tiny", "data/latents": str(one / "latents")}
    places["train base"] = "train finetune"
    words = command_with("lmd train base --preset", places)
    words[words.index("--devices") + 1] = "2"
    run_pair(*words, *WORDS, "--out", tmp_path / "two")
    assert distance(one, tmp_path / "two") < 1e-5


def test_two_machines_as_the_docs_say(one, tmp_path):
    """torchrun twice, one process each, at two addresses."""
    places = {"small": "tiny", "data/latents": str(one / "latents")}
    places |= {"HOST": ADDRESSES[0], "29500": str(free_port())}
    places |= {"--nproc-per-node 4": "--nproc-per-node 1", "--devices 4": "--devices 1"}
    commands = [
        command_with("torchrun", {**places, "--node-rank 0": f"--node-rank {node}"})
        for node in range(len(ADDRESSES))
    ]
    more = [*WORDS, "--out", tmp_path]
    finish_nodes([start(node, *words, *more) for node, words in enumerate(commands)])
    assert distance(one, tmp_path) < 1e-5  # measured 2e-7
