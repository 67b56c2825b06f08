"""Runs: exact resume, processes that share a batch, refusals, LoRA, what a run leaves behind."""

import dataclasses
import json
import os
import subprocess
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from latents_fake import write_latents
from nodes import HERE, finish_nodes, start_nodes

from lmd.__main__ import main
from lmd.checkpoint import load_model, read_header
from lmd.config import preset
from lmd.dit import LiveModel
from lmd.errors import LmdError
from lmd.instrument import open_instrument
from lmd.text import HashTextEncoder
from lmd.training.card import run_log
from lmd.training.curriculum import StepPlan
from lmd.training.lora import add_lora, merged_state
from lmd.training.module import LiveTraining, TrainOptions, Windows, shard_rows
from lmd.training.samples import averaged_model, picture, play_module
from lmd.training.trainer import AtomicCheckpointIO, choose_precision, step_flops
from lmd.training.windows import LatentSource

WORDS = ["--preset", "tiny", "--batch", "8", "--precision", "32"]
WORDS += ["--accelerator", "cpu", "--no-progress", "--warmup", "1", "--lr", "3e-3"]


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    return write_latents(tmp_path_factory.mktemp("latents"))


def start_worker(*words: object) -> subprocess.Popen:
    """A training process that ends itself at the step that is its first word."""
    return subprocess.Popen(
        [sys.executable, *map(str, [HERE / "training_worker.py", *words])],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        cwd=HERE.parent,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def losses(out: Path) -> np.ndarray:
    return run_log(out)["loss"].to_numpy()


def train_here(stage: str, *words: object) -> None:
    """A run in this process; Lightning's own warnings are not ours to fail on."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert main(["train", stage, *WORDS, *map(str, words)]) == 0


@pytest.fixture(scope="module")
def straight(data, tmp_path_factory) -> Path:
    """Twenty base steps in one go."""
    out = tmp_path_factory.mktemp("straight")
    train_here("base", "--steps", 20, "--data", data, "--out", out)
    return out


def test_a_killed_run_goes_on_with_the_same_losses(data, straight, tmp_path):
    """20 steps = checkpoint at 10, kill -9 at 13, and the rest: equal losses, equal weights."""
    words = [*WORDS, "--steps", 20, "--checkpoint-every", 10, "--data", data, "--out", tmp_path]
    killed = start_worker(13, "base", *words)
    killed.communicate(timeout=900)  # on a machine that does much else
    assert killed.returncode == -9
    assert [p.name for p in (tmp_path / "checkpoints").iterdir()] == ["step=0000010.ckpt"]
    train_here("base", *words[len(WORDS) :])
    assert run_log(tmp_path)["step"].tolist() == list(range(20))
    assert np.array_equal(losses(tmp_path), losses(straight))  # bit for bit
    ours, theirs = (read_header(p / "base.safetensors").sha256 for p in (tmp_path, straight))
    assert ours == theirs


def test_half_precision_learns_what_full_precision_does(data, straight, tmp_path):
    train_here("base", "--steps", 4, "--data", data, "--out", tmp_path, "--precision", "bf16")
    ratio = np.abs(losses(tmp_path) / losses(straight)[:4] - 1).max()
    assert ratio < 0.002  # measured 5e-5


def test_two_nodes_lose_what_one_process_loses(data, straight, tmp_path):
    """Two processes, two nodes by address, the same global batch: the same losses but rounding."""
    words = [*WORDS, "--steps", 4, "--num-nodes", 2, "--data", data, "--out", tmp_path]
    finish_nodes(start_nodes("-m", "lmd", "train", "base", *words))
    both, one = losses(tmp_path), losses(straight)[:4]
    assert np.abs(both - one).max() < 1e-5  # measured 2e-7: sums in another order


def test_a_run_leaves_weights_logs_and_a_card(straight):
    model = load_model(straight / "base.safetensors")
    assert all(torch.isfinite(p).all() for p in model.parameters())
    header = read_header(straight / "base.safetensors")
    assert (header.kind, header.notes["steps"]) == ("base", 20)
    card = (straight / "base.md").read_text(encoding="utf-8")
    assert header.sha256 in card
    assert "python -m lmd train base" in card
    log = run_log(straight)
    assert {"loss", "frames/s", "mfu", "GB", "ETA min", "lr"} <= set(log.columns)
    assert log["loss"].iloc[-5:].mean() < log["loss"].iloc[:5].mean()
    assert list((straight / "logs").glob("*/events.out.tfevents*"))


def test_accumulated_parts_lose_what_one_batch_loses(data, straight, tmp_path):
    train_here("base", "--steps", 4, "--accumulate", 2, "--data", data, "--out", tmp_path)
    assert np.abs(losses(tmp_path) - losses(straight)[:4]).max() < 1e-5  # measured 2e-7


def test_a_finetune_starts_from_a_base_and_plays_every_regime(data, straight, tmp_path):
    init = straight / "base.safetensors"
    train_here("finetune", "--steps", 6, "--data", data, "--out", tmp_path, "--init", init)
    header = read_header(tmp_path / "finetuned.safetensors")
    assert header.kind == "finetuned"
    assert np.isfinite(losses(tmp_path)).all()


def test_a_live_model_is_distilled_from_itself_and_a_killed_run_goes_on(data, straight, tmp_path):
    """The teacher is what the run was given, also after a restart; no checkpoint holds it."""
    start = tmp_path / "start"
    train_here(
        "finetune",
        "--steps",
        4,
        "--init",
        straight / "base.safetensors",
        "--data",
        data,
        "--out",
        start,
    )
    init = start / "finetuned.safetensors"
    words = ["--init", init, "--teacher-steps", 3, "--points", 2, "--data", data]
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    train_here("distill", "--steps", 12, *words, "--out", whole)
    words = [*WORDS, "--steps", 12, "--checkpoint-every", 6, *words, "--out", broken]
    killed = start_worker(8, "distill", *words)
    killed.communicate(timeout=900)
    assert killed.returncode == -9
    kept = torch.load(next((broken / "checkpoints").iterdir()), weights_only=False)
    assert {name.split(".")[0] for name in kept["state_dict"]} == {"model", "ema"}
    train_here("distill", *words[len(WORDS) :])
    assert np.array_equal(losses(broken), losses(whole))
    assert losses(whole)[-3:].mean() < losses(whole)[:3].mean()
    header = read_header(whole / "finetuned.safetensors")
    assert header.notes["init"]["sha256"] == read_header(init).sha256
    assert header.sha256 != read_header(init).sha256
    card = (whole / "finetuned.md").read_text(encoding="utf-8")
    assert "python -m lmd train distill" in card
    assert "started from" in card


def test_a_base_is_not_distilled(data, straight, tmp_path, capsys):
    words = ["--init", straight / "base.safetensors", "--data", data, "--out", tmp_path]
    assert main(["train", "distill", *WORDS, "--steps", "2", *map(str, words)]) != 0
    assert "Fine-tune it first" in capsys.readouterr().err


def test_other_options_in_the_same_folder_are_refused(data, straight, capsys):
    words = [*WORDS, "--data", str(data), "--out", str(straight)]
    assert main(["train", "base", *words, "--steps", "30", "--lr", "0.5"]) == 2
    assert "lr 0.003 → 0.5" in capsys.readouterr().err


def test_latents_of_another_codec_are_refused(data, tmp_path, capsys):
    words = ["--preset", "small", "--data", str(data), "--out", str(tmp_path)]
    assert main(["train", "base", *words]) == 2
    assert "latents of 8 channels" in capsys.readouterr().err


def test_a_run_keeps_what_it_was_begun_with(data, tmp_path, capsys):
    """Another start in its folder is refused; a precision that was left open stays the same."""
    words = ["--steps", 1, "--data", data, "--out", tmp_path]
    train_here("base", *words)
    options = tmp_path / "options.json"
    begun = json.loads(options.read_text(encoding="utf-8"))
    assert begun["precision"] == "32"
    train_here("base", *words, "--precision", "auto")
    assert json.loads(options.read_text(encoding="utf-8")) == begun
    other = [*WORDS, *map(str, words), "--precision", "bf16", "--init", "other.safetensors"]
    assert main(["train", "base", *other]) == 2
    assert "(init None → other.safetensors, precision 32 → bf16)" in capsys.readouterr().err


def test_a_gradient_that_is_not_finite_reaches_no_weight(data, tmp_path, monkeypatch, capsys):
    """The loss of that step is finite; the weights that are kept are those before it."""

    def poison(module):
        if module.trainer.global_step == 2:
            module.model.dit.project_in.weight.grad[0, 0] = torch.nan

    monkeypatch.setattr(LiveTraining, "on_after_backward", poison)
    words = ["--steps", 4, "--checkpoint-every", 1, "--data", data, "--out", tmp_path]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert main(["train", "base", *WORDS, *map(str, words)]) == 2
    told = capsys.readouterr().err
    assert "gradient of norm nan at step 2" in told
    assert "step=0000002.ckpt" in told  # after two good steps
    kept = load_model(tmp_path / "base.safetensors")
    assert all(torch.isfinite(p).all() for p in kept.parameters())


def test_a_loss_that_is_not_finite_names_step_rows_and_checkpoint(data):
    options = TrainOptions("base", n_steps=5, batch=2)
    sizes = preset("tiny")
    source = LatentSource(data, 0)
    text = HashTextEncoder(sizes.text.n_tokens, sizes.text.dim)
    module = LiveTraining(LiveModel(sizes.dit), text, source, sizes, options)
    module.last_checkpoint = "step=3.ckpt"
    rows = shard_rows(options, 4, 0, 1)
    windows = source.windows(4, rows.positions, options.plan(4).n_frames)
    windows.latents[0, 0, 0] = float("nan")
    with pytest.raises(LmdError, match=r"nan at step 4 on \['sound.*step=3.ckpt"):
        module.training_step({"rows": rows, **windows._asdict()}, 0)


def test_a_checkpoint_survives_a_death_during_the_next_write(tmp_path, monkeypatch):
    path, disk = tmp_path / "a.ckpt", AtomicCheckpointIO()
    disk.save_checkpoint({"step": 1}, path)

    def die(*args: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "fsync", die)
    with pytest.raises(KeyboardInterrupt):
        disk.save_checkpoint({"step": 2}, path)
    assert disk.load_checkpoint(path, weights_only=True) == {"step": 1}


def test_lora_changes_nothing_at_first_and_merges_into_ordinary_weights():
    torch.manual_seed(0)
    plain = LiveModel(preset("tiny").dit)
    before = {k: v.clone() for k, v in plain.state_dict().items()}
    model = add_lora(plain, rank=2)
    merged = merged_state(model)
    assert merged.keys() == before.keys()
    assert all(torch.equal(merged[k], before[k]) for k in before)
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert all("lora_" in name or "to_input_add" in name for name in trained)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.add_(0.1)
    noisy, t = torch.randn(1, 8, 12), torch.tensor([0.5])
    condition = model.condition(torch.randn(1, 3, 16), 5.0)
    fresh = LiveModel(preset("tiny").dit)
    fresh.load_state_dict(merged_state(model))
    error = (fresh(noisy, t, condition) - model(noisy, t, condition)).abs().max()
    assert error < 1e-5  # measured 1e-7: one product instead of two


@pytest.mark.parametrize("stage", ["base", "finetune"])
def test_a_run_can_be_heard_on_the_way(data, stage, tmp_path):
    """Sound and picture of the averaged weights; the weights stay where they are."""
    options, sizes = TrainOptions(stage, n_steps=5, batch=2), preset("tiny")
    text = HashTextEncoder(sizes.text.n_tokens, sizes.text.dim)
    source = LatentSource(data, 0)
    module = LiveTraining(LiveModel(sizes.dit), text, source, sizes, options)
    codec = open_instrument(preset_name="tiny").streamer.codec
    model = averaged_model(module)
    wave = play_module(module, model, codec, "organ", seed=0)
    window_s = 240 / sizes.frame_rate_hz
    assert wave.shape[-1] / codec.sample_rate == pytest.approx(window_s, rel=0.05)
    assert torch.equal(wave, play_module(module, model, codec, "organ", seed=0))
    picture(wave, codec.sample_rate, tmp_path / "a.png", "organ")
    assert (tmp_path / "a.png").stat().st_size > 1000


def test_rows_of_parts_make_up_the_global_batch():
    options = TrainOptions("base", n_steps=50, batch=8)
    for step in range(50):
        whole = shard_rows(options, step, 0, 1)
        parts = [shard_rows(options, step, shard, 2) for shard in range(2)]
        assert whole.positions == sum((part.positions for part in parts), ())
        assert {part.n_global for part in parts} == {whole.n_global}
    with pytest.raises(LmdError, match="for 3 parts"):
        shard_rows(options, 0, 0, 3)


def test_flops_are_those_of_the_products():
    """Against torch's own counter, on the forward pass of the base."""
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.utils.flop_counter import FlopCounterMode

    sizes = dataclasses.replace(preset("tiny").dit, width=64)
    model = LiveModel(sizes)
    condition = model.condition(torch.zeros(2, 1, 16), 5.0)
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        model(torch.randn(2, 8, 240), torch.rand(2), condition)
    ours = step_flops(sizes, StepPlan(None, 240), 2, 192) / 3
    assert ours == pytest.approx(counter.get_total_flops(), rel=0.05)  # we leave out the text


def test_precision_is_chosen_by_measurement_only_where_one_process_decides():
    assert choose_precision("bf16", 32) == "bf16"
    assert choose_precision("auto", 32) in ("32", "bf16")


def test_a_source_of_ones_own_will_do(data):
    """Anything with `windows` trains: here, silence."""

    class Silence:
        def windows(self, step, positions, n_frames):
            n = len(positions)
            return Windows(torch.zeros(n, 8, n_frames), [""] * n, ["silence"] * n)

    options, sizes = TrainOptions("finetune", n_steps=5, batch=2), preset("tiny")
    text = HashTextEncoder(sizes.text.n_tokens, sizes.text.dim)
    module = LiveTraining(LiveModel(sizes.dit), text, Silence(), sizes, options)
    rows = shard_rows(options, 0, 0, 1)
    windows = Silence().windows(0, rows.positions, options.plan(0).n_frames)
    module.log = lambda *args, **kwargs: None
    loss = module.training_step({"rows": rows, **windows._asdict()}, 0)
    assert loss.item() == pytest.approx(1.0, abs=0.1)  # a fresh model is silent: the noise's power
