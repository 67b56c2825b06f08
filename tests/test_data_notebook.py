"""Notebook 01 and the package say the same thing."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lmd.corpus.render import sum_stems
from lmd.data.latents import LatentWindows
from lmd.data.shards import LatentShards, map_shard, shard_fault
from lmd.rng import derive_seed

NOTEBOOK = Path(__file__).parents[1] / "notebooks/01_data_prep.ipynb"


@pytest.fixture(scope="module")
def cells() -> list[dict[str, Any]]:
    return json.loads(NOTEBOOK.read_text())["cells"]


@pytest.fixture(scope="module")
def ideas(cells: list[dict[str, Any]]) -> dict[str, Any]:
    """What the cells tagged `idea` define."""
    names: dict[str, Any] = {"derive_seed": derive_seed}
    for cell in cells:
        if "idea" in cell["metadata"].get("tags", []):
            exec("".join(cell["source"]), names)
    return names


def test_the_notebooks_mix_is_the_packages_to_the_bit(ideas: dict[str, Any]) -> None:
    stems = np.random.default_rng(0).standard_normal((5, 2, 1000)).astype(np.float32)
    assert np.array_equal(ideas["mix_of"](stems), sum_stems(stems))


def test_the_notebooks_window_is_the_packages(ideas: dict[str, Any]) -> None:
    windows = object.__new__(LatentWindows)
    windows.seed, windows.lead_frames, windows._first = 3, 0, np.array([0, 50, 51, 200])
    for step in range(100):
        entry, start = windows.pick(step, 2)
        assert windows._first[entry] + start == ideas["which_window"](3, step, 2, 200)


def test_the_notebook_is_committed_without_outputs(cells: list[dict[str, Any]]) -> None:
    code = [cell for cell in cells if cell["cell_type"] == "code"]
    assert all(cell["outputs"] == [] and cell["execution_count"] is None for cell in code)
    tagged = [cell for cell in code if "parameters" in cell["metadata"].get("tags", [])]
    assert len(tagged) == 1


def test_a_missing_shard_says_so(tmp_path: Path) -> None:
    assert shard_fault(tmp_path / "shard-00000.safetensors") == "missing"
    with pytest.raises(ValueError, match="missing"):
        map_shard(tmp_path / "shard-00000.safetensors")
    with pytest.raises(ValueError, match="data encode"):
        LatentShards(tmp_path)
