"""Whatever ends a run, it goes on as if nothing had been: bit for bit, in every stage."""

import os
import subprocess
import sys
import warnings
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import torch
from latents_fake import write_latents
from nodes import HERE

from lmd.__main__ import main
from lmd.checkpoint import load_model, read_header
from lmd.training.card import run_log
from lmd.training.module import LiveTraining
from lmd.training.options import TrainOptions
from lmd.training.trainer import AtomicCheckpointIO, checkpoints
from lmd.training.windows import LatentSource

WORDS = ["--preset", "tiny", "--batch", "8", "--precision", "32"]
WORDS += ["--accelerator", "cpu", "--no-progress", "--warmup", "1", "--lr", "3e-3"]
STAGES = ("base", "finetune", "distill")


class Runs(NamedTuple):
    """Twenty steps in one go of each stage, in a folder of its name; each from the one before."""

    folder: Path
    words: dict[str, list[str]]

    def weights(self, stage: str, out: Path | None = None) -> Path:
        name = "base" if stage == "base" else "finetuned"
        return (out or self.folder / stage) / f"{name}.safetensors"


def train_here(stage: str, *words: object) -> int:
    """A run in this process; Lightning's own warnings are not ours to fail on."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return main(["train", stage, *WORDS, *map(str, words)])


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> Runs:
    folder = tmp_path_factory.mktemp("runs")
    data = write_latents(folder / "latents")
    made = Runs(folder, {stage: ["--data", str(data)] for stage in STAGES})
    made.words["finetune"] += ["--init", str(made.weights("base"))]
    made.words["distill"] += ["--init", str(made.weights("finetune"))]
    made.words["distill"] += ["--teacher-steps", "3", "--points", "2"]
    for stage in STAGES:
        words = ["--steps", 20, "--checkpoint-every", 20, *made.words[stage]]
        assert train_here(stage, *words, "--out", folder / stage) == 0
    return made


def losses(out: Path) -> np.ndarray:
    return run_log(out)["loss"].to_numpy()


def run_until_death(when: str, stage: str, *words: object) -> None:
    """A training process that ends itself as `kill -9` would."""
    done = subprocess.run(
        [sys.executable, *map(str, [HERE / "training_worker.py", when, stage, *WORDS, *words])],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        cwd=HERE.parent,
        capture_output=True,
        text=True,
        timeout=900,  # on a machine that does much else
        check=False,
    )
    assert done.returncode == -9, done.stderr


@pytest.mark.parametrize(
    ("stage", "when"), [("base", "after:13"), ("finetune", "writing:15"), ("distill", "writing:15")]
)
def test_a_killed_run_goes_on_with_the_same_losses(runs, stage, when, tmp_path):
    """20 steps = checkpoint at 10, kill -9 later, and the rest: equal losses, equal weights.

    Between two checkpoints, or while one is written: then the one before it is what there is.
    """
    every = 10 if when == "after:13" else 5
    words = ["--steps", 20, "--checkpoint-every", every, *runs.words[stage], "--out", tmp_path]
    run_until_death(when, stage, *words)
    kept = sorted(path.name for path in (tmp_path / "checkpoints").glob("step=*"))
    assert kept[-1] == "step=0000010.ckpt"
    torn = list((tmp_path / "checkpoints").glob(".step=0000015.ckpt.*"))
    assert len(torn) == (when == "writing:15")
    assert train_here(stage, *words) == 0
    assert run_log(tmp_path)["step"].tolist() == list(range(20))
    assert len(list((tmp_path / "logs").glob("from-*"))) == 2
    assert np.array_equal(losses(tmp_path), losses(runs.folder / stage))  # bit for bit
    ours, theirs = (read_header(runs.weights(stage, out)).sha256 for out in (tmp_path, None))
    assert ours == theirs


@pytest.mark.parametrize("stage", STAGES)
def test_a_complete_run_is_made_longer_from_its_last_step(runs, stage, tmp_path, monkeypatch):
    """Though no checkpoint was due there; every step, also the first new one, at its own rate."""
    used, step = {}, LiveTraining.optimizer_step

    def watch(module, *args, **more):
        used[module.trainer.global_step] = module.optimizers().param_groups[0]["lr"]
        step(module, *args, **more)

    monkeypatch.setattr(LiveTraining, "optimizer_step", watch)
    words = ["--checkpoint-every", 3, *runs.words[stage], "--out", tmp_path]
    assert train_here(stage, *words, "--steps", 4) == 0
    kept = [path.name for path in checkpoints(tmp_path)]
    assert kept == ["step=0000003.ckpt", "step=0000004.ckpt"]
    used.clear()
    assert train_here(stage, *words, "--steps", 7) == 0
    assert run_log(tmp_path)["step"].tolist() == list(range(7))
    assert sorted(path.name for path in (tmp_path / "logs").iterdir())[1:] == ["from-0000004"]
    longer = TrainOptions(stage, n_steps=7, lr=3e-3, warmup_steps=1)
    assert used == {k: 3e-3 * longer.lr_factor(k) for k in (4, 5, 6)}


def test_a_torn_checkpoint_is_named_with_the_one_before_it(runs, tmp_path, capsys):
    words = ["--checkpoint-every", 2, *runs.words["base"], "--out", tmp_path]
    assert train_here("base", *words, "--steps", 4) == 0
    older, newest = checkpoints(tmp_path)
    newest.write_bytes(newest.read_bytes()[:1000])
    assert train_here("base", *words, "--steps", 5) == 2
    told = capsys.readouterr().err
    assert f"{newest}, which cannot be read" in told
    assert "goes on from step=0000002.ckpt" in told
    newest.unlink()
    assert train_here("base", *words, "--steps", 5) == 0
    newest, older = checkpoints(tmp_path)[-1], checkpoints(tmp_path)[:-1]
    for path in older:
        path.unlink()
    newest.write_bytes(b"")
    assert train_here("base", *words, "--steps", 6) == 2
    assert "begins anew" in capsys.readouterr().err


def test_a_live_model_is_distilled_from_itself(runs):
    """The teacher is what the run was given; no checkpoint holds it."""
    out = runs.folder / "distill"
    kept = torch.load(next((out / "checkpoints").iterdir()), weights_only=False)
    assert {name.split(".")[0] for name in kept["state_dict"]} == {"model", "ema"}
    assert losses(out)[-3:].mean() < losses(out)[:3].mean()
    header, given = (read_header(runs.weights(stage)) for stage in ("distill", "finetune"))
    assert header.notes["init"]["sha256"] == given.sha256
    assert header.sha256 != given.sha256
    card = runs.weights("distill").with_suffix(".md").read_text(encoding="utf-8")
    assert "python -m lmd train distill" in card
    assert "started from" in card
    assert "in the regimes block-causal and enc-dec." in card
    assert "(mean squared error of clean blocks)" in card


@pytest.mark.parametrize("stage", STAGES)
def test_a_loss_that_is_not_finite_names_step_rows_and_checkpoint(
    runs, stage, tmp_path, monkeypatch, capsys
):
    real = LatentSource.windows

    def poisoned(source, step, positions, n_frames):
        windows = real(source, step, positions, n_frames)
        if step == 2:
            windows.latents[0, 0, 0] = torch.nan
        return windows

    monkeypatch.setattr(LatentSource, "windows", poisoned)
    words = ["--steps", 4, "--checkpoint-every", 1, *runs.words[stage], "--out", tmp_path]
    assert train_here(stage, *words) == 2
    told = capsys.readouterr().err
    assert "a loss of nan at step 2 on ['sound" in told
    assert told.count("/mix@") == 8  # every row of the batch
    assert f"Last good checkpoint: {tmp_path / 'checkpoints' / 'step=0000002.ckpt'}" in told
    assert (tmp_path / "checkpoints" / "step=0000002.ckpt").is_file()


@pytest.mark.parametrize("stage", STAGES)
def test_a_gradient_that_is_not_finite_reaches_no_weight(
    runs, stage, tmp_path, monkeypatch, capsys
):
    """The loss of that step is finite; the weights that are kept are those before it."""

    def poison(module):
        if module.trainer.global_step == 2:
            module.model.dit.project_in.weight.grad[0, 0] = torch.nan

    monkeypatch.setattr(LiveTraining, "on_after_backward", poison)
    words = ["--steps", 4, "--checkpoint-every", 1, *runs.words[stage], "--out", tmp_path]
    assert train_here(stage, *words) == 2
    told = capsys.readouterr().err
    assert "gradient of norm nan at step 2" in told
    assert "step=0000002.ckpt" in told  # after two good steps
    kept = load_model(runs.weights(stage, tmp_path))
    assert all(torch.isfinite(p).all() for p in kept.parameters())


def test_a_checkpoint_survives_an_error_during_the_next_write(tmp_path, monkeypatch):
    """E.g. a full disk; nothing is left of what was begun."""
    path, disk = tmp_path / "a.ckpt", AtomicCheckpointIO()
    disk.save_checkpoint({"step": 1}, path)

    def die(*args: object) -> None:
        raise OSError("no space left on device")

    monkeypatch.setattr(os, "fsync", die)
    with pytest.raises(OSError, match="no space"):
        disk.save_checkpoint({"step": 2}, path)
    assert disk.load_checkpoint(path, weights_only=True) == {"step": 1}
    assert list(tmp_path.iterdir()) == [path]
