"""Runs: refusals, choices, LoRA, what a run leaves behind. That they go on: test_resume.py."""

import dataclasses
import json
import shutil
import signal
import subprocess
import sys
import time
import warnings
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
from latents_fake import write_latents
from matplotlib.image import imread
from short_run import open_start
from training_worker import options_of

from lmd.__main__ import main
from lmd.checkpoint import build_model, load_model, read_header, save_checkpoint
from lmd.codec.spectral import SpectralCodec
from lmd.config import REGIMES, WindowConfig, preset
from lmd.data.encode import encoder_sha256
from lmd.errors import LmdError
from lmd.model.live_model import LiveModel
from lmd.model.text import HashTextEncoder
from lmd.pretrained import open_instrument
from lmd.stream.streamer import Streamer
from lmd.training.card import ABOUT, run_log
from lmd.training.draws import StepPlan, plan_step, shard_rows, step_noise
from lmd.training.lora import add_lora, merged_state
from lmd.training.module import LiveTraining
from lmd.training.options import (
    LIMITS,
    BaseRun,
    DistillRun,
    FinetuneRun,
    TrainOptions,
    check_options,
    command_words,
)
from lmd.training.run import matching_codec, sample_every, start_model
from lmd.training.trainer import choose_precision
from lmd.training.windows import LatentSource, Windows

WORDS = ["--preset", "tiny", "--batch", "8", "--precision", "32"]
WORDS += ["--accelerator", "cpu", "--no-progress", "--warmup", "1", "--lr", "3e-3"]


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    return write_latents(tmp_path_factory.mktemp("latents"))


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


def test_half_precision_learns_what_full_precision_does(data, straight, tmp_path):
    train_here("base", "--steps", 4, "--data", data, "--out", tmp_path, "--precision", "bf16")
    ratio = np.abs(losses(tmp_path) / losses(straight)[:4] - 1).max()
    assert ratio < 0.002  # measured 5e-5


def test_a_run_leaves_weights_logs_and_a_card(straight):
    model = load_model(straight / "base.safetensors")
    assert all(torch.isfinite(p).all() for p in model.parameters())
    header = read_header(straight / "base.safetensors")
    assert (header.kind, header.notes["steps"]) == ("base", 20)
    card = (straight / "base.md").read_text(encoding="utf-8")
    assert header.sha256 in card
    assert "python -m lmd train base" in card
    log = run_log(straight)
    assert {"loss", "frames/s", "GB", "ETA min", "lr"} <= set(log.columns)
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


@pytest.mark.parametrize(
    ("stage", "which"),
    [("base", "init"), ("finetune", "init"), ("distill", "init"), ("arc", "init"), ("arc", "base")],
)
def test_weights_that_learned_another_codecs_latents_are_refused(tmp_path, capsys, stage, which):
    data, out = write_latents(tmp_path / "latents"), tmp_path / "run"
    settings = json.loads((data / "latents.json").read_text(encoding="utf-8"))
    (data / "latents.json").write_text(json.dumps(settings | {"codec": "1" * 64}))
    files = {"init": tmp_path / "finetuned.safetensors", "base": tmp_path / "base.safetensors"}
    for name, path in files.items():
        notes = {"data": {"latent_settings": {"codec": ("2" if name == which else "1") * 64}}}
        weights, sizes = build_model(preset("tiny")).state_dict(), preset("tiny")
        save_checkpoint(path, weights, kind=path.stem, config=sizes, notes=notes)
    words = ["--preset", "tiny", "--data", data, "--out", out, "--init", files["init"]]
    if stage == "arc":
        words += [
            "--base",
            files["base"],
            "--updates",
            6,
            "--warmup",
            4,
            "--last-block",
            "blocks.1",
        ]
    assert main(["train", stage, *map(str, words)]) == 2
    told = f"--{which} {files[which]}, which learned latents of the codec 222222222222"
    assert told in capsys.readouterr().err
    assert not out.exists()


def test_a_run_keeps_what_it_was_begun_with(data, tmp_path, capsys, monkeypatch):
    """Another start in its folder is refused; a precision that was left open stays the same."""
    words = ["--steps", 1, "--data", data, "--out", tmp_path]
    train_here("base", *words)
    options = tmp_path / "options.json"
    begun = json.loads(options.read_text(encoding="utf-8"))
    assert begun["precision"] == "32"
    train_here("base", *words, "--precision", "auto")
    assert json.loads(options.read_text(encoding="utf-8")) == begun
    assert begun["compile"] is False
    monkeypatch.setattr("lmd.training.run.check_compiler", lambda: None)
    other = [*WORDS, *map(str, words), "--precision", "bf16", "--init", "other.safetensors"]
    assert main(["train", "base", *other, "--compile"]) == 2
    told = "(compile False → True, init_from None → other.safetensors, precision 32 → bf16)"
    assert told in capsys.readouterr().err


@pytest.mark.parametrize(
    ("wrong", "told"),
    [
        (["--batch", "6", "--accumulate", "4"], "a global batch of 6 rows for 4 parts"),
        (["--lr", "-1"], "--lr -1"),
        (["--init", "nowhere.safetensors"], "no file nowhere.safetensors"),
        (["--sample-every", "2", "--codec", "nowhere.safetensors"], "no file nowhere.safetensors"),
    ],
)
def test_a_refused_command_leaves_its_folder_to_the_corrected_one(
    data, tmp_path, capsys, wrong, told
):
    words = ["--steps", 1, "--data", data, "--out", tmp_path / "run"]
    assert main(["train", "base", *WORDS, *map(str, words), *wrong]) == 2
    assert told in capsys.readouterr().err
    assert not (tmp_path / "run" / "options.json").exists()
    train_here("base", *words)


def test_a_run_that_kept_nothing_may_be_begun_with_other_options(data, tmp_path, monkeypatch):
    """It died in its first step."""
    words = ["--steps", 2, "--data", data, "--out", tmp_path]
    real = LatentSource.windows

    def poisoned(*args):
        windows = real(*args)
        windows.latents[:] = torch.nan
        return windows

    with monkeypatch.context() as patched:
        patched.setattr(LatentSource, "windows", poisoned)
        assert main(["train", "base", *WORDS, *map(str, words)]) == 2
    assert (tmp_path / "options.json").is_file()
    train_here("base", *words, "--lr", "1e-3")
    assert run_log(tmp_path)["step"].tolist() == [0, 1]


def test_torn_options_are_refused_with_what_to_do(data, straight, tmp_path, capsys):
    shutil.copytree(straight, tmp_path / "run")
    (tmp_path / "run" / "options.json").write_text('{"a":')
    words = ["--steps", "21", "--data", str(data), "--out", str(tmp_path / "run")]
    assert main(["train", "base", *WORDS, *words]) == 2
    assert "Remove it to go on" in capsys.readouterr().err


NUMBERS = [
    *(f"{flag} 0" for flag in ("--steps", "--batch", "--accumulate", "--devices", "--num-nodes")),
    *(f"--checkpoint-every {n}" for n in (0, -1)),
    *(f"--lr {n}" for n in (0, -1, "nan", "inf")),
    *(f"{flag} -1" for flag in ("--lora", "--warmup", "--sample-every")),
    *(f"{flag} {n}" for flag in ("--text-dropout", "--short-context") for n in (-0.1, 1.5, "nan")),
    *(f"--ema {n}" for n in (-0.1, 1, 2)),
    *("--batch 1e+09", "--lora 100000", "--lora 33", "--accumulate 1e+06", "--devices 1e+07"),
]


@pytest.mark.parametrize("words", NUMBERS)
def test_numbers_that_mean_nothing_are_refused_by_name(data, tmp_path, capsys, words):
    more = ["--data", str(data), "--out", str(tmp_path / "run")]
    flag, value = words.split()
    value = f"{float(value):.0f}" if "e+" in value else value
    assert main(["train", "finetune", *WORDS, *more, flag, value]) == 2
    assert f"found {words}" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_numbers_at_the_ends_of_their_limits_are_accepted(tmp_path):
    for change in ({"text_dropout": 0.0}, {"text_dropout": 1.0}, {"ema": 0.0}, {"lr": 1e-9}):
        check_options(dataclasses.replace(BaseRun(out=tmp_path), **change))
    assert set(LIMITS) >= {"batch", "lora", "steps", "devices"}


def test_an_out_that_is_a_file_is_refused(data, tmp_path, capsys):
    (tmp_path / "file").write_text("mine")
    for out in (tmp_path / "file", tmp_path / "file" / "run"):
        words = ["--data", str(data), "--out", str(out)]
        assert main(["train", "base", *WORDS, *words]) == 2
        assert "which is no folder; expected a folder" in capsys.readouterr().err
    assert (tmp_path / "file").read_text() == "mine"


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_gpu_that_is_not_there_is_refused(data, tmp_path, capsys):
    words = ["--data", str(data), "--out", str(tmp_path / "run"), "--accelerator", "gpu"]
    assert main(["train", "base", *WORDS, "--steps", "2", *words]) == 2
    assert "no 1 × gpu here" in capsys.readouterr().err
    assert not (tmp_path / "run" / "options.json").exists()


def test_weights_of_the_same_shapes_but_another_meaning_are_refused(tmp_path):
    """What shapes do not show: text encoder, its tokens, the longest length, the rotary base."""
    tiny, path = preset("tiny"), tmp_path / "base.safetensors"
    weights = LiveModel(tiny.dit).state_dict()
    near = dataclasses.replace(tiny, dit=dataclasses.replace(tiny.dit, rope_base=10_000.5))
    save_checkpoint(path, weights, kind="base", config=near)
    start_model("base", tiny, path, 0)
    others = {
        r"rope_base 5000.0 → 10000.0": {"dit": dataclasses.replace(tiny.dit, rope_base=5_000.0)},
        "max_seconds 512.0 → 256.0": {"text": dataclasses.replace(tiny.text, max_seconds=512.0)},
        "n_tokens 9 → 8": {"text": dataclasses.replace(tiny.text, n_tokens=9)},
        "encoder t5-base → hash": {"text": dataclasses.replace(tiny.text, encoder="t5-base")},
    }
    for told, other in others.items():
        save_checkpoint(path, weights, kind="base", config=dataclasses.replace(tiny, **other))
        with pytest.raises(LmdError, match=told):
            start_model("base", tiny, path, 0)


def test_a_base_without_steps_can_be_begun_with(tmp_path):
    """A converted or interpolated one has no `steps`."""
    tiny = preset("tiny")
    weights = LiveModel(tiny.dit).state_dict()
    save_checkpoint(tmp_path / "base.safetensors", weights, kind="base", config=tiny)
    assert open_start(tmp_path, tiny, 0)[1] == "a base that was not trained here"
    notes = {"steps": 7}
    save_checkpoint(tmp_path / "base.safetensors", weights, kind="base", config=tiny, notes=notes)
    assert open_start(tmp_path, tiny, 0)[1] == "the shipped base, 7 steps"


def test_a_card_says_what_its_run_did():
    assert ABOUT["finetune"].endswith("block by block, in all three regimes.")
    assert {regime for regime, _ in FinetuneRun.regimes} == set(REGIMES)
    about = ABOUT["distill"].format(o=DistillRun(teacher_steps=6, cfg_scale=2.0))
    assert "6 steps of its teacher at guidance 2 end at" in about
    regimes = " and ".join(regime for regime, _ in DistillRun.regimes)
    assert about.endswith(f"in the regimes {regimes}.")


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


def tiny_codec(folder: Path) -> Path:
    sizes, path = preset("tiny"), folder / "codec.safetensors"
    weights = SpectralCodec(sizes.codec).state_dict()
    save_checkpoint(path, weights, kind="codec", config=sizes.codec)
    return path


def how_often(codec: Path, encoder: str | None, asked: int | None = None) -> int:
    """Steps from sound to sound of a run with that codec, on latents of that encoder."""
    options = BaseRun(preset="tiny", codec=codec, sample_every=asked)
    return sample_every(options, matching_codec(options, encoder))


def test_a_run_plays_now_and_then_if_the_codec_is_its_own(tmp_path):
    codec = tiny_codec(tmp_path)
    of_small = Path(__file__).parents[1] / "data/pretrained/codec.safetensors"
    assert how_often(codec, None) == 500
    assert how_often(tmp_path / "none.safetensors", None) == 0
    assert how_often(of_small, None) == 0
    assert how_often(codec, None, 0) == 0
    assert how_often(codec, None, 7) == 7
    with pytest.raises(LmdError, match="another codec than that of the latents"):
        how_often(of_small, None, 7)


def test_a_codec_of_the_same_sizes_is_not_played_if_the_latents_are_of_another(tmp_path):
    codec = tiny_codec(tmp_path)
    assert how_often(codec, encoder_sha256(codec)) == 500
    assert how_often(codec, "of another") == 0
    assert how_often(codec, encoder_sha256(codec), 2) == 2
    with pytest.raises(LmdError, match="another codec"):
        how_often(codec, "of another", 2)


def test_the_codec_of_the_latents_is_put_beside_the_weights(data, tmp_path, capsys):
    """Then they can be played as they are; a codec that lies there already is left alone."""
    codec, out = tiny_codec(tmp_path), tmp_path / "run"
    words = ["--steps", 1, "--data", data, "--out", out, "--codec", codec, "--sample-every", 0]
    train_here("finetune", *words)
    assert (out / "codec.safetensors").read_bytes() == codec.read_bytes()
    open_instrument(f"{out}:finetuned", engine="torch")
    init, more = out / "finetuned.safetensors", tmp_path / "more"  # it goes on with the weights
    train_here("finetune", *words[:4], "--sample-every", 0, "--init", init, "--out", more)
    assert (more / "codec.safetensors").read_bytes() == codec.read_bytes()
    (out / "codec.safetensors").unlink()
    with pytest.raises(LmdError, match=r"Copy it there.*codec.safetensors"):
        open_instrument(f"{out}:finetuned", engine="torch")
    (out / "codec.safetensors").write_text("mine")
    train_here("finetune", *words[2:], "--steps", 2)
    assert (out / "codec.safetensors").read_text() == "mine"


def test_nothing_is_advertised_and_nothing_is_used_to_more_than_the_full(data, tmp_path, capfd):
    train_here("base", "--steps", 1, "--data", data, "--out", tmp_path)
    shown = capfd.readouterr()
    assert not {"Tip", "litlogger", "mfu"} & set((shown.out + shown.err).split())


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_run_that_is_ended_from_outside_keeps_its_step_and_says_so(data, tmp_path, number):
    """Exit status 128 + signal, so that `train … && cp …` stops; the checkpoint is the last step's.

    The same command then goes on: every step once.
    """
    words = ["--steps", 4000, "--checkpoint-every", 4000, "--data", data, "--out", tmp_path]
    command = [sys.executable, "-m", "lmd", "train", "base", *WORDS, *map(str, words)]
    process = subprocess.Popen(
        command, cwd=Path(__file__).parents[1], stderr=subprocess.PIPE, text=True
    )
    try:
        until = time.monotonic() + 300  # on a machine that does much else
        while not list(tmp_path.glob("logs/*/metrics.csv")) and time.monotonic() < until:
            time.sleep(0.1)
        process.send_signal(number)
        _, told = process.communicate(timeout=300)
    finally:
        process.kill()
    assert process.returncode == 128 + number, told
    (kept,) = (tmp_path / "checkpoints").glob("*.ckpt")
    assert f"by {number.name}" in told
    assert str(kept) in told
    assert "Traceback" not in told
    step = int(kept.stem.split("=")[1])
    assert run_log(tmp_path)["step"].iloc[-1] == step - 1
    assert read_header(tmp_path / "base.safetensors").notes["steps"] == step


@pytest.mark.parametrize("stage", ["base", "finetune"])
def test_a_card_claims_nothing_that_was_not_done(data, straight, tmp_path, stage):
    """Weights trained on own music, from a base: no other corpus, no licence, no evaluation."""
    init = ["--init", straight / "base.safetensors"] if stage == "finetune" else []
    train_here(stage, "--steps", 1, "--data", data, "--out", tmp_path, *init)
    (card,) = tmp_path.glob("*.md")
    text = card.read_text(encoding="utf-8")
    for untrue in ("music21", "soundfont", "licence", "published", "Measured"):
        assert untrue not in text
    assert "4 sounds" in text
    assert "holds no evaluation" in text
    assert ("| started from |" in text) == bool(init)


@pytest.mark.parametrize("stage", ["base", "finetune"])
def test_sounds_and_pictures_come_every_so_often(data, stage, tmp_path):
    """Two of four steps; the prompt stands over the picture."""
    sizes, codec = preset("tiny"), tmp_path / "codec.safetensors"
    weights = SpectralCodec(sizes.codec).state_dict()
    save_checkpoint(codec, weights, kind="codec", config=sizes.codec)
    words = ["--steps", 4, "--sample-every", 2, "--codec", codec]
    train_here(stage, *words, "--data", data, "--out", tmp_path / "run")
    names = sorted(path.name for path in (tmp_path / "run/samples").iterdir())
    assert names == [f"step-000000{k}.{kind}" for k in (2, 4) for kind in ("png", "wav")]
    for name in names:
        path = tmp_path / "run/samples" / name
        if path.suffix == ".wav":
            wave, rate = soundfile.read(path)
            assert rate == sizes.codec.sample_rate
            assert len(wave) / rate == pytest.approx(240 / sizes.frame_rate_hz, rel=0.05)
            assert np.abs(wave).max() > 0
        else:
            picture_of = imread(path)
            assert picture_of.shape[0] > 100
            assert np.ptp(picture_of) > 0.5


def test_rows_of_parts_make_up_the_global_batch():
    options = TrainOptions("base", n_steps=50, batch=8)
    for step in range(50):
        whole = shard_rows(options, step, 0, 1)
        parts = [shard_rows(options, step, shard, 2) for shard in range(2)]
        assert whole.positions == sum((part.positions for part in parts), ())
        assert {part.n_global for part in parts} == {whole.n_global}
    with pytest.raises(LmdError, match="for 3 parts"):
        shard_rows(options, 0, 0, 3)


@pytest.mark.parametrize(("batch", "n_parts"), [(8, 4), (8, 8), (48, 3), (48, 6)])
def test_a_batch_is_the_same_however_many_parts_share_it(batch, n_parts):
    """Long steps have 2 and 8 rows here: fewer than parts, or not a multiple of them."""
    options = TrainOptions("base", n_steps=50, batch=batch)
    long = [k for k in range(50) if plan_step(options, k).n_frames > options.window_frames]
    for step in (long[0], 0):
        whole = shard_rows(options, step, 0, 1)
        parts = [shard_rows(options, step, shard, n_parts) for shard in range(n_parts)]
        assert whole.weight == 1
        assert {part.n_global for part in parts} == {whole.n_global}
        assert sum(part.weight for part in parts) == pytest.approx(n_parts)
        weighing = [part for part in parts if part.weight]
        assert whole.positions == sum((part.positions for part in weighing), ())
        for part in weighing:  # every row counts alike
            per_row = part.weight / len(part.positions) / n_parts
            assert per_row == pytest.approx(1 / whole.n_global)
        assert all(part.positions for part in parts)  # each has something to compute


def test_a_long_step_in_more_parts_than_rows_loses_what_it_loses_whole(data, tmp_path):
    words = ["--steps", 3, "--long-share", 1, "--data", data, "--sample-every", 0]
    train_here("base", *words, "--out", tmp_path / "whole")
    train_here("base", *words, "--out", tmp_path / "parts", "--accumulate", 4)
    assert np.abs(losses(tmp_path / "parts") - losses(tmp_path / "whole")).max() < 1e-5


def test_precision_is_chosen_by_what_multiplies_bfloat16(monkeypatch):
    assert choose_precision("bf16") == "bf16"
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    for half, chosen in (("AMX", "bf16"), ("", "32")):
        monkeypatch.setattr("lmd.training.trainer.half_products", lambda _, half=half: half)
        assert choose_precision("auto") == chosen


def test_the_command_that_a_card_shows_gives_the_same_run():
    words = ["--short-context", "0.0", "--checkpointing", "--compile", "--strategy", "fsdp"]
    options = options_of("finetune", words)
    shown = command_words(options)
    assert shown[:5] == ["python", "-m", "lmd", "train", "finetune"]
    assert options_of("finetune", shown[5:]) == options
    more = {"checkpointing": True, "compile": True, "strategy": "fsdp"}
    assert options == FinetuneRun(short_context=0.0, **more)


@pytest.mark.parametrize("memory_frames", [192, 96])
def test_a_model_is_told_the_length_that_a_stream_of_that_memory_tells_it(data, memory_frames):
    sizes = preset("tiny")
    text = HashTextEncoder(sizes.text.n_tokens, sizes.text.dim)
    model, codec = LiveModel(sizes.dit), SpectralCodec(sizes.codec)
    stream = Streamer(model, codec, text, WindowConfig(memory_frames, 48))
    options = TrainOptions("finetune", n_steps=5, batch=2)
    module = LiveTraining(model, text, LatentSource(data, 0), sizes, options)
    plan = StepPlan("enc-dec", memory_frames + 12, 12, 16, memory_frames)
    assert module.window_s(plan) == pytest.approx(stream.window_s)
    assert module.window_s(StepPlan(None, 768)) == pytest.approx(768 / sizes.frame_rate_hz)


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
    windows = Silence().windows(0, rows.positions, plan_step(options, 0).n_frames)
    module.log = lambda *args, **kwargs: None
    noise = step_noise(options, rows, 8)
    loss = module.training_step({"rows": rows, "noise": noise, **windows._asdict()}, 0)
    assert loss.item() == pytest.approx(1.0, abs=0.1)  # a fresh model is silent: the noise's power
