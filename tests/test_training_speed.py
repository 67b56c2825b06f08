"""`lmd bench train`: what it says is there and possible."""

import json
import time

import pytest
import torch
from latents_fake import write_latents

from lmd.__main__ import main
from lmd.config import preset
from lmd.training.speed import Product, Student, kinds
from lmd.training.windows import LatentSource

ROW = {"step", "n_frames", "step_ms_p50", "step_ms_p95", "frames_per_s", "step_gflop"}
ROW |= {"product_gflops", "share", "data_ms_p50", "wait_ms_p50"}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_no_step_is_faster_than_its_products_allow(dtype, tmp_path, capsys):
    """Every figure that is promised, and a share of the products' rate that can be."""
    data, path = write_latents(tmp_path), tmp_path / "speed.json"
    words = ["--preset", "tiny", "--batch", "2", "--steps", "2", "--threads", "1"]
    words += ["--dtype", dtype, "--data", str(data), "--json", str(path)]
    assert main(["bench", "train", *words]) == 0
    report = json.loads(path.read_text(encoding="utf-8"))
    about = {
        "preset",
        "dtype",
        "compiled",
        "batch",
        "steps",
        "threads",
        "device",
        "machine",
        "rows",
    }
    assert set(report) == about
    assert [row["step"] for row in report["rows"]] == ["base", "block-causal", "enc-dec"]
    shown = capsys.readouterr().out
    for row in report["rows"]:
        assert set(row) == ROW
        assert 0 < row["share"] < 1.5
        assert 0 < row["step_ms_p50"] <= row["step_ms_p95"]
        assert row["data_ms_p50"] > 0
        assert row["wait_ms_p50"] >= 0
        assert row["step"] in shown


def test_waiting_is_what_a_step_does_not_hide_of_reading(tmp_path, monkeypatch):
    """A disk that takes longer than any step here."""
    monkeypatch.setattr(LatentSource, "windows", lambda *_: time.sleep(0.5))
    data, path = write_latents(tmp_path), tmp_path / "speed.json"
    words = ["--preset", "tiny", "--batch", "2", "--steps", "1", "--threads", "1"]
    assert main(["bench", "train", *words, "--data", str(data), "--json", str(path)]) == 0
    for row in json.loads(path.read_text(encoding="utf-8"))["rows"]:
        assert row["data_ms_p50"] >= 500
        hidden = row["data_ms_p50"] - row["wait_ms_p50"]
        assert hidden == pytest.approx(row["step_ms_p50"], abs=100)


def test_the_products_are_those_of_the_linear_layers():
    """All of the transformer's: 240 frames and a global token, two rows, two layers."""
    sizes, device = preset("tiny"), torch.device("cpu")
    base = kinds(sizes, 2, device)[0]
    products = Student(sizes, torch.float32, device).products(base)
    n_rows, width = 2 * 241, sizes.dit.width
    assert products[Product(n_rows, width, 3 * width)] == sizes.dit.depth
    assert products[Product(n_rows, width, 2 * sizes.dit.ff_mult * width)] == sizes.dit.depth
    assert products[Product(n_rows, width, width)] == 3 * sizes.dit.depth  # outputs and a query


def test_a_batch_of_nothing_is_refused(capsys):
    assert main(["bench", "train", "--preset", "tiny", "--batch", "0"]) == 2
    assert "--batch 0" in capsys.readouterr().err
