"""Every notebook, executed with the `smoke` profile as a reader's `python -m lmd run` would."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from lmd.pipeline.plan import ROOT, Options
from lmd.pipeline.run import main as run
from lmd.play.takes import read_take

NOTEBOOKS = sorted(path.stem for path in (ROOT / "notebooks").glob("[0-9][0-9]_*.ipynb"))
LIMIT_S = 360  # for all of them together, on two cores

pytestmark = pytest.mark.alone


@pytest.fixture(scope="module")
def smoke(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of one run of all notebooks; a failing one stops it, as for a reader."""
    out = tmp_path_factory.mktemp("outputs") / "smoke"
    run(Options(profile="smoke", out=out))
    return out


@pytest.mark.skipif(not NOTEBOOKS, reason="no notebook yet")
@pytest.mark.parametrize("name", NOTEBOOKS)
def test_a_notebook_runs_to_its_end_and_leaves_figures(
    name: str, smoke: Path, record_property: Callable[[str, object], None]
) -> None:
    record = json.loads((smoke / "run.json").read_text())["notebooks"].get(name)
    assert record is not None, "an earlier notebook failed"
    assert record["status"] == "done", record["error"]
    record_property(f"notebook {name}", f"{record['seconds']:.0f} s")
    summary = json.loads((smoke / "metrics.json").read_text())
    assert summary["notebooks"][name]["metrics"]


@pytest.mark.parametrize("name", ["00_listen", "04_play"])
def test_half_a_minute_is_streamed_to_nobody_and_measured(name: str, smoke: Path) -> None:
    summary = json.loads((smoke / "metrics.json").read_text())
    metrics = summary["notebooks"][name]["metrics"]
    assert metrics["played_s"] >= 30
    assert metrics["underruns"] == 0
    assert metrics["rtf"] > 1
    takes = list((smoke / name / "takes").glob("*.jsonl"))  # the player's own, with its null sink
    assert max(read_take(path).n_samples for path in takes) >= 30 * 22_050


@pytest.mark.skipif(not NOTEBOOKS, reason="no notebook yet")
def test_all_notebooks_together_are_quick(smoke: Path) -> None:
    records = json.loads((smoke / "run.json").read_text())["notebooks"]
    assert sum(record["seconds"] for record in records.values()) <= LIMIT_S
