"""`lmd bench arc`: rows by rollout length, each measured in a process of its own."""

import itertools
import json
import os

import pytest
import torch

from lmd.__main__ import main
from lmd.arc.card import WHO
from lmd.arc.speed import COLUMNS, in_fresh_process, table, training_words
from lmd.arc.train import arc_run
from lmd.config import check_block, preset
from lmd.errors import LmdError
from lmd.machine import peak_mb

TINY = ["--preset", "tiny", "--batch", "2", "--last-block", "blocks.1", "--threads", "1"]


def bench(*words: str) -> int:
    return main(["bench", "arc", *TINY, "--updates", "1", *words])


def test_every_length_has_its_seconds_and_its_peak(tmp_path, capsys):
    path = tmp_path / "arc.json"
    words = ["--blocks", "1", "8", "--batch", "8", "--regime", "enc-dec", "--dtype", "float32"]
    assert bench(*words, "--checkpointing", "yes", "--json", str(path)) == 0
    short, long = json.loads(path.read_text())["rows"]
    assert set(short) == set(long) == set(COLUMNS)
    assert (short["frames"], long["frames"]) == (48, 384)
    assert long["generator_calls"] >= 8 >= short["generator_calls"] >= 1
    assert min(row[f"{who}_s"] for row in (short, long) for who in WHO.values()) > 0
    assert long["memory_gb"] > short["memory_gb"] > 0.1
    assert "median of 1 updates" in capsys.readouterr().out


def test_half_precision_has_a_row_of_its_own(tmp_path):
    """With one block: some processors take seven times as long in bfloat16."""
    path = tmp_path / "arc.json"
    words = ["--blocks", "1", "--dtype", "bfloat16", "--checkpointing", "yes"]
    assert bench(*words, "--json", str(path)) == 0
    (row,) = json.loads(path.read_text())["rows"]
    assert (row["dtype"], row["checkpointing"]) == ("bfloat16", "yes")
    assert min(row[f"{who}_s"] for who in WHO.values()) > 0
    assert row["memory_gb"] > 0.1


def test_unless_told_all_lengths_are_measured_in_both_precisions_with_and_without_checkpoints(
    monkeypatch, tmp_path
):
    """Of `small`, eight blocks at batch 8 among them; what a line runs is what it says."""
    ran = []

    def note(work, args, case):
        words = training_words(args, case, tmp_path)
        run = arc_run(words, preset(words.preset))
        ran.append((words.precision, run.checkpointing, *run.arc.n_blocks[0], run.batch))

    monkeypatch.setattr("lmd.arc.speed.in_fresh_process", note)
    assert main(["bench", "arc", "--json", str(tmp_path / "arc.json")]) == 0
    lines = itertools.product(("32", "bf16"), (False, True), (1, 2, 4, 8), (1.0,), (8,))
    assert ran == list(lines)
    report = json.loads((tmp_path / "arc.json").read_text())
    assert (report["preset"], report["batch"]) == ("small", 8)
    last = {name: value for name, value in report["rows"][-1].items() if value is not None}
    assert last == {"blocks": 8, "frames": 384, "dtype": "bfloat16", "checkpointing": "yes"}


@pytest.mark.skipif(os.name == "nt", reason="Windows has no fork server, and counts rightly")
def test_a_fresh_process_does_not_begin_with_the_peak_of_this_one():
    ballast = torch.ones(2**28)  # 1 GiB
    assert peak_mb(ballast.device) > 1024
    assert in_fresh_process(peak_mb, ballast.device) < 1024


def test_a_refusal_comes_back_from_its_process():
    with pytest.raises(LmdError, match="a block of 50 frames"):
        in_fresh_process(check_block, 192, 50)


def test_a_process_that_dies_leaves_a_line_without_figures():
    assert in_fresh_process(os._exit, 9) is None
    about = {"preset": "tiny", "batch": 2, "regime": "enc-dec", "steps": 8, "threads": 1}
    rows = [{**dict.fromkeys(COLUMNS), "blocks": 8}]
    shown = table({**about, "accelerator": "cpu", "updates": 1, "rows": rows})
    assert "want of memory" in shown
    assert shown.splitlines()[2].split()[:2] == ["8", "–"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--updates", "0"], "--updates 0"),
        (["--blocks", "0"], "--blocks '0'"),
        (["--block-frames", "50"], "a block of 50 frames"),
        (["--last-block", "blocks.7"], "blocks.7"),
    ],
)
def test_what_cannot_run_is_refused_before_anything_runs(words, message, capsys):
    assert bench(*words) == 2
    assert message in capsys.readouterr().err
