"""The toy world follows its distribution, and ARC-Forcing halves the drift in it."""

import json
import math
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import toy_world as toy

from lmd.rng import generator

NOTEBOOKS = Path(__file__).parents[1] / "notebooks"


def sounds(n: int = 2000, n_blocks: int = 3) -> toy.Sounds:
    return toy.world(n, toy.CONTEXT + n_blocks * toy.BLOCK, generator(0, "toy test"))


def test_samples_of_the_world_follow_its_distribution():
    rest = toy.still(sounds()).flatten(0, 1).numpy()
    covariance = np.cov(rest, rowvar=False)
    # 8,000 samples: standard error of an entry up to 0.016; measured maximum 0.02
    assert np.abs(covariance - toy.distribution(rest.shape[1]).covariance).max() < 0.08
    assert max(toy.drift(sounds())) < 0.1


def test_distance_of_scaled_sounds_is_the_closed_form():
    """Scaling by a moves a centred Gaussian by |1 - a| times the root of its trace."""
    real = sounds(8000)
    faded = replace(real, latents=0.5 * real.latents)
    expected = 0.5 * math.sqrt(2 * toy.BLOCK)
    assert toy.drift(faded)[1] == pytest.approx(expected, rel=0.02)


def test_sounds_that_turn_at_another_speed_are_far_from_the_distribution():
    real = sounds()
    other = replace(real, kinds=(real.kinds + 1) % len(toy.SPEEDS))
    assert min(toy.drift(other)) > 0.5


def test_equal_seeds_play_equal_streams():
    torch.manual_seed(0)
    model, settings = toy.LiveModel(toy.SIZES), toy.ToySettings(n_streams=3, n_played=2)
    first, second = (toy.play(model, settings, 4).latents for _ in range(2))
    assert torch.equal(first, second)
    assert first.shape == (3, 4, toy.CONTEXT + 2 * toy.BLOCK)


def test_experiments_with_the_same_two_trainings_begin_alike_and_leave_each_other_alone():
    settings = toy.ToySettings(n_base=2, n_finetune=2)
    _, first = toy.prepare(settings, 5)
    weights = [parameter.detach().clone() for parameter in first.parameters()]
    with torch.no_grad():
        for parameter in first.parameters():
            parameter.zero_()
    _, second = toy.prepare(replace(settings, n_updates=7), 5)
    assert all(map(torch.equal, second.parameters(), weights))
    _, other = toy.prepare(replace(settings, n_blocks=1), 5)
    assert not all(map(torch.equal, other.parameters(), weights))


def test_the_script_writes_its_figures(tmp_path, monkeypatch):
    small = toy.ToySettings(
        n_base=2, n_finetune=2, n_updates=4, n_warmup=1, n_streams=8, n_played=3
    )
    monkeypatch.setattr(toy, "ToySettings", lambda: small)
    assert toy.main(["--seeds", "1", "--out", str(tmp_path)]) == 0
    report = json.loads((tmp_path / "toy_world.json").read_text())
    assert report["settings"]["n_updates"] == 4
    assert len(report["results"][0]["before"]) == 3
    assert (tmp_path / "toy_world.png").stat().st_size > 5000


@pytest.mark.slow
def test_arc_forcing_halves_the_drift(tmp_path):
    """The short form, one seed, in a process without shape checks, which double its time.

    Measured with one thread: 5.9 times less. The full form's three seeds are published in
    outputs/published/toy_world.json.
    """
    words = [NOTEBOOKS / "toy_world.py", "--short", "--seeds", "1", "--out", str(tmp_path)]
    one_thread = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(NOTEBOOKS.parent)}
    subprocess.run([sys.executable, *words], env=one_thread, check=True)
    (told,) = json.loads((tmp_path / "toy_world.json").read_text())["results"]
    assert told["before"][-1] > 1.5 * told["before"][0], "the fine-tuned model drifts"
    assert told["factor"] >= 2
