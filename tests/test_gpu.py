"""What only a machine with CUDA can show (`tests/test_devices.py`: what others know of it)."""

import json
import subprocess
import sys

import pytest
import torch
from engine import random_model, streamer
from latents_fake import write_latents

from lmd.__main__ import main
from lmd.pretrained import open_instrument
from lmd.stream.controls import Controls
from lmd.stream.streamer import Streamer

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA"),
]


@pytest.mark.parametrize("cfg_scale", [1.0, 1.5])
@pytest.mark.parametrize("regime", ["full", "enc-dec", "block-causal"])
def test_every_block_is_what_the_cpu_makes_of_the_same_state(regime, cfg_scale, tmp_path):
    here = streamer()
    there = Streamer(random_model().cuda(), here.codec, here.text, here.window)
    controls = Controls("organ", n_steps=3, block_frames=12, regime=regime, cfg_scale=cfg_scale)
    state, path = here.start(), tmp_path / "state.safetensors"
    for _ in range(4):
        here.save_state(state, path)
        block, state = here.step(state, controls)
        on_gpu, _ = there.step(there.load_state(path), controls)
        assert on_gpu.latents.is_cuda
        assert (on_gpu.latents.cpu() - block.latents).abs().max() < 1e-4


def test_an_instrument_takes_the_gpu_and_plays_the_same_music():
    plays = {}
    for device in ("cpu", "auto"):
        instrument = open_instrument("arc", device=device)
        controls = instrument.controls("church organ, slow", seed=3)
        block, _ = instrument.streamer.step(instrument.streamer.start(), controls)
        plays[device] = block
    assert plays["auto"].latents.is_cuda
    torch.testing.assert_close(plays["auto"].latents.cpu(), plays["cpu"].latents, rtol=0, atol=5e-3)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_cuda_graphs_agree_with_eager(dtype):
    """In a process of its own: the checks of shapes that tests run under cannot be compiled."""
    words = (
        f"-m lmd bench --preset tiny --device cuda --compile --steps 2 --blocks 2 --dtype {dtype}"
    )
    done = subprocess.run([sys.executable, *words.split()], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "furthest" in done.stdout


@pytest.mark.parametrize("precision", ["32", "bf16"])
def test_the_whole_training_runs_on_the_gpu(precision, tmp_path):
    latents = write_latents(tmp_path / "latents")
    common = ["--preset", "tiny", "--data", str(latents), "--batch", "2", "--no-progress"]
    common += ["--precision", precision, "--sample-every", "0"]
    base = ["train", "base", *common, "--steps", "3", "--out", str(tmp_path / "base")]
    assert main(base) == 0
    made = tmp_path / "base" / "base.safetensors"
    tuned = ["train", "finetune", *common, "--steps", "3", "--init", str(made)]
    assert main([*tuned, "--out", str(tmp_path / "tuned")]) == 0
    card = json.loads((tmp_path / "base" / "options.json").read_text())
    assert card["precision"] == precision
