"""Two processes, which Lightning starts itself, write the shards that one writes."""

import sys
import warnings
from pathlib import Path

import pytest
import torch
from corpus_fake import make_corpus
from data_worker import main
from nodes import HERE, run_pair

from lmd.checkpoint import save_checkpoint
from lmd.codec.spectral import SpectralCodec
from lmd.config import preset
from lmd.data.shards import LatentShards


@pytest.fixture(scope="module")
def both(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """What one process made, and what two made of the same."""
    folder = tmp_path_factory.mktemp("processes")
    corpus = make_corpus(folder / "corpus", n_rows=5).folder
    config = preset("tiny").codec
    torch.manual_seed(0)
    tensors = SpectralCodec(config).state_dict()
    save_checkpoint(folder / "codec.safetensors", tensors, kind="codec", config=config)
    words = [str(corpus), str(folder / "codec.safetensors")]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        main(*words, str(folder / "one"), "1")
    run_pair(sys.executable, HERE / "data_worker.py", *words, folder / "two", "2")
    return folder / "one", folder / "two"


def test_two_processes_encode_what_one_encodes(both: tuple[Path, Path]) -> None:
    one, two = ({path.name: path.read_bytes() for path in folder.iterdir()} for folder in both)
    assert len(LatentShards(both[0]).entries) == 15  # five mixes, two stems each
    assert two.keys() == one.keys()
    assert two == one
    LatentShards(both[1])  # every shard is whole
