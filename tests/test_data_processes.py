"""Two processes, which Lightning starts itself: the shards and the windows of one."""

import json
import sys
import warnings
from pathlib import Path

import pytest
import torch
from corpus_fake import make_corpus
from data_worker import GLOBAL_BATCH, STEPS, main
from nodes import HERE, run_pair

from lmd.checkpoint import save_checkpoint
from lmd.codec.spectral import SpectralCodec
from lmd.config import preset
from lmd.data.shards import LatentShards


@pytest.fixture(scope="module")
def both(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """What one process made, and what two with two loader processes each made of the same."""
    folder = tmp_path_factory.mktemp("processes")
    corpus = make_corpus(folder / "corpus", n_rows=5).folder
    config = preset("tiny").codec
    torch.manual_seed(0)
    tensors = SpectralCodec(config).state_dict()
    save_checkpoint(folder / "codec.safetensors", tensors, kind="codec", config=config)
    words = [str(corpus), str(folder / "codec.safetensors")]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        main(*words, str(folder / "one"), "1", "0")
    run_pair(sys.executable, HERE / "data_worker.py", *words, folder / "two", "2", "2")
    return folder / "one", folder / "two"


def test_two_processes_encode_what_one_encodes(both: tuple[Path, Path]) -> None:
    one, two = (
        {path.name: path.read_bytes() for path in folder.iterdir() if "seen" not in path.name}
        for folder in both
    )
    assert len(LatentShards(both[0]).entries) == 15  # five mixes, two stems each
    assert two.keys() == one.keys()
    assert two == one
    assert LatentShards(both[1]).faults() == {}


def test_two_processes_with_two_loaders_each_see_the_windows_of_one(
    both: tuple[Path, Path],
) -> None:
    (one,), two = (
        [json.loads(path.read_text()) for path in sorted(folder.glob("seen-*.json"))]
        for folder in both
    )
    assert [len(batch) for batch in one] == [GLOBAL_BATCH] * STEPS
    assert [first + second for first, second in zip(*two, strict=True)] == one
    assert len({name for batch in one for name in batch}) > GLOBAL_BATCH
