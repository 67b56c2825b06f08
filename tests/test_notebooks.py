"""Every notebook, executed with the `smoke` profile as a reader's `python -m lmd run` would."""

import json
from pathlib import Path

import pytest

from lmd.pipeline.plan import ROOT, RunOptions
from lmd.pipeline.run import run

NOTEBOOKS = sorted(path.stem for path in (ROOT / "notebooks").glob("[0-9][0-9]_*.ipynb"))
LIMIT_S = 360  # for all of them together, on two cores


@pytest.fixture(scope="module")
def smoke(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of one run of all notebooks; a failing one stops it, as for a reader."""
    out = tmp_path_factory.mktemp("outputs") / "smoke"
    run(RunOptions(profile="smoke", out=out))
    return out


@pytest.mark.skipif(not NOTEBOOKS, reason="no notebook yet")
@pytest.mark.parametrize("name", NOTEBOOKS)
def test_a_notebook_runs_to_its_end_and_leaves_figures(name: str, smoke: Path) -> None:
    record = json.loads((smoke / "run.json").read_text())["notebooks"].get(name)
    assert record is not None, "an earlier notebook failed"
    assert record["status"] == "done", record["error"]
    summary = json.loads((smoke / "metrics.json").read_text())
    assert summary["notebooks"][name]["metrics"]


@pytest.mark.skipif(not NOTEBOOKS, reason="no notebook yet")
def test_all_notebooks_together_are_quick(smoke: Path) -> None:
    records = json.loads((smoke / "run.json").read_text())["notebooks"]
    assert sum(record["seconds"] for record in records.values()) <= LIMIT_S
