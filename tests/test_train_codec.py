"""Training the codec: what a step depends on, restarts, losses, and the measures' zero points."""

import csv
import dataclasses
import json
import math

import measure_codec
import numpy as np
import pytest
import torch
from lightning.pytorch.callbacks import Callback

from lmd.__main__ import main as command
from lmd.checkpoint import load_codec, read_header
from lmd.codec import phase
from lmd.codec.spectral import SpectralCodec, stft
from lmd.config import preset
from lmd.corpus.manifest import Corpus, Row, write_manifest, write_wav
from lmd.errors import LmdError
from lmd.rng import normal
from lmd.training.codec.losses import (
    Discriminator,
    advance_loss,
    discriminator_loss,
    generator_loss,
    level_loss,
    mel_matrix,
    multi_resolution_loss,
)
from lmd.training.codec.module import CodecRun, CodecWindows, learning_rate
from lmd.training.codec.train import Options, build, main
from lmd.training.trainer import checkpoints

RATE = 22_050
pytestmark = [
    # raised inside Lightning and the TensorBoard writer, not by this project
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::UserWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
]


def notes(seed: int, n_samples: int = 1024 * 60) -> np.ndarray:
    """Decaying tones, a new one every third of a second."""
    time = np.arange(n_samples) / RATE
    wave = np.zeros(n_samples)
    for i in range(int(time[-1] * 3)):
        since = np.clip(time - i / 3, 0, None)
        hz = 220 * 2 ** ((seed * 3 + i * 5) % 12 / 12)
        wave += 0.2 * np.sin(2 * np.pi * hz * since) * np.exp(-6 * since) * (since > 0)
    return wave[None].astype(np.float32)


@pytest.fixture(scope="module")
def corpus_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("corpus")
    fields = {f.name: "" if f.type in (str, "str") else 0 for f in dataclasses.fields(Row)}
    rows = []
    for i, split in enumerate(("train", "train", "test", "test", "test")):
        wave = notes(i)
        write_wav(folder / "audio" / f"{i}.wav", wave, RATE)
        known = {
            "name": f"row {i}",
            "piece_id": str(i),
            "split": split,
            "family": "piano" if i % 2 else "strings",
            "n_samples": wave.shape[1],
            "duration_s": wave.shape[1] / RATE,
            "sample_rate": RATE,
            "channels": 1,
            "path": f"audio/{i}.wav",
        }
        rows.append(Row(**{**fields, **known}))
    write_manifest(folder, rows)
    return folder


def options(corpus_folder, out, **changed) -> Options:
    values = {"preset": "tiny", "n_steps": 6, "encoder_steps": 2, "adversarial_from": 4, "batch": 2}
    values |= {"frames": 6, "threads": 1, "accelerator": "cpu", "no_progress": True, **changed}
    return Options(data=corpus_folder, out=out, **values)


class StopAt(Callback):
    """End a run early."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_train_batch_end(self, trainer, *_: object) -> None:
        trainer.should_stop = trainer.global_step == self.step


def logged(out) -> dict[int, dict[str, float]]:
    """Losses by step, from every CSV log of a run."""
    found = {}
    for path in sorted((out / "logs").rglob("metrics.csv")):
        with open(path, encoding="utf-8") as file:
            for row in csv.DictReader(file):
                found[int(row["step"])] = {k: float(v) for k, v in row.items() if v}
    return found


def test_six_steps_equal_three_and_a_restart_and_three(corpus_folder, tmp_path):
    """All three stages lie in these steps: encoder 0-1, decoder 2-3, discriminator 4-5."""
    assert main(options(corpus_folder, tmp_path / "whole")) == 0
    assert main(options(corpus_folder, tmp_path / "parts"), [StopAt(3)]) == 0
    assert [path.name for path in checkpoints(tmp_path / "parts")] == ["step=0000003.ckpt"]
    assert main(options(corpus_folder, tmp_path / "parts")) == 0
    whole, parts = logged(tmp_path / "whole"), logged(tmp_path / "parts")
    assert sorted(whole) == sorted(parts) == list(range(6))
    assert whole == parts
    assert "discriminator" in whole[5]
    assert "discriminator" not in whole[3]
    a, b = (load_codec(tmp_path / run / "codec.safetensors") for run in ("whole", "parts"))
    for (name, one), (_, other) in zip(a.state_dict().items(), b.state_dict().items(), strict=True):
        assert torch.equal(one, other), name
    assert read_header(tmp_path / "parts" / "codec.safetensors").notes["steps"] == 6


def test_a_complete_run_is_made_longer_and_one_that_is_long_enough_left_alone(
    corpus_folder, tmp_path
):
    def train(**changed) -> tuple[int, str]:
        words = {"n_steps": 4, "checkpoint_every": 3, **changed}
        assert main(options(corpus_folder, tmp_path, **words)) == 0
        header = read_header(tmp_path / "codec.safetensors")
        return header.notes["steps"], header.sha256

    short = train()
    assert short[0] == 4
    assert train() == short
    steps, weights = train(n_steps=6)
    assert steps == 6
    assert weights != short[1]
    assert sorted(logged(tmp_path)) == list(range(6))
    assert train() == (6, weights)


def test_a_run_goes_on_with_its_own_options_or_not_at_all(corpus_folder, tmp_path, capsys):
    """The step at which the discriminator joins is kept, where the words leave it open."""
    words = ["train", "codec", "--preset", "tiny", "--data", corpus_folder]
    words += ["--device", "cpu", "--no-progress"]
    words += ["--batch", 2, "--frames", 6, "--encoder-steps", 0, "--out", tmp_path]
    words = [str(word) for word in words]
    assert command([*words, "--steps", "2"]) == 0
    refused = {
        "--seed 7": "seed 0 → 7",
        "--noise 0.9": "noise 0.25 → 0.9",
        "--batch 3": "batch 2 → 3",
        "--learning-rate 1e-5": "learning_rate 0.001 → 1e-05",
        "--encoder-steps 1": "encoder_steps 0 → 1",
        "--precision bf16": "precision 32 → bf16",
        "--preset small": "preset tiny → small",
        f"--encoder {tmp_path / 'codec.safetensors'}": "encoder_from None → ",
    }
    for other, told in refused.items():
        assert command([*words, "--steps", "4", *other.split()]) == 2
        assert told in capsys.readouterr().err
    assert command([*words, "--steps", "4"]) == 0
    begun = json.loads((tmp_path / "options.json").read_text())
    assert (begun["n_steps"], begun["adversarial_from"]) == (4, 1)


@pytest.mark.parametrize(
    "words",
    [
        *(f"{flag} 0" for flag in ("--batch", "--checkpoint-every", "--steps")),
        *("--frames 1", "--frames 2"),  # no change from frame to frame, too short to be judged
        *(f"{flag} -1" for flag in ("--noise", "--encoder-steps", "--adversarial-from")),
        *("--learning-rate 0", "--learning-rate -1", "--threads -1"),
    ],
)
def test_numbers_that_mean_nothing_are_refused_by_name(corpus_folder, tmp_path, capsys, words):
    more = ["--preset", "tiny", "--data", str(corpus_folder), "--out", str(tmp_path / "run")]
    assert command(["train", "codec", *more, *words.split()]) == 2
    assert f"found {words}" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_every_stage_trains_in_half_precision(corpus_folder, tmp_path):
    for precision in ("32", "bf16"):
        assert main(options(corpus_folder, tmp_path / precision, precision=precision)) == 0
    full, half = (logged(tmp_path / precision) for precision in ("32", "bf16"))
    for step, values in full.items():
        found = float(half[step]["loss"]) / float(values["loss"])
        assert found == pytest.approx(1, abs=0.01), step  # measured 0.0016


def test_a_run_from_a_given_encoder_leaves_it_alone(corpus_folder, tmp_path):
    first = options(corpus_folder, tmp_path / "a", n_steps=3, adversarial_from=9)
    assert main(first) == 0
    given = tmp_path / "a" / "codec.safetensors"
    second = options(corpus_folder, tmp_path / "b", n_steps=2, encoder=given)
    assert main(second) == 0
    before, after = load_codec(given), load_codec(tmp_path / "b" / "codec.safetensors")
    wave = torch.from_numpy(notes(3))[None]
    assert torch.equal(before.encode(wave), after.encode(wave))
    latents = before.encode(wave)
    assert not torch.equal(before.decode(latents), after.decode(latents))


def test_a_batch_depends_on_seed_and_step_alone(corpus_folder):
    config, run = preset("tiny").codec, CodecRun(n_steps=9, batch=2, frames=4)
    first, second = (CodecWindows(Corpus(corpus_folder, "train"), config, run) for _ in range(2))
    first.batch(0)
    assert torch.equal(first.batch(7), second.batch(7))
    assert not torch.equal(first.batch(7), first.batch(8))
    assert first.batch(7).shape == (2, 1, 4096)


def test_training_reads_no_held_out_piece(corpus_folder, tmp_path):
    module = build(options(corpus_folder, tmp_path))
    assert {row.name for row in module.windows.corpus.rows} == {"row 0", "row 1"}


def test_a_corpus_of_another_rate_is_refused(corpus_folder):
    config = dataclasses.replace(preset("tiny").codec, sample_rate=44_100)
    with pytest.raises(LmdError, match="22050 Hz"):
        CodecWindows(Corpus(corpus_folder), config, CodecRun(n_steps=1))


def test_the_paper_preset_has_no_spectral_codec_to_train(corpus_folder, tmp_path):
    with pytest.raises(LmdError, match="tiny or small"):
        build(options(corpus_folder, tmp_path, preset="paper"))


def test_a_loss_that_is_not_finite_stops_the_run_and_names_the_step(
    corpus_folder, tmp_path, monkeypatch
):
    def poisoned(windows):
        for step in range(windows.options.n_steps):
            yield windows.batch(step) * (math.nan if step == 3 else 1)

    monkeypatch.setattr(CodecWindows, "__iter__", poisoned)
    with pytest.raises(LmdError, match=r"loss nan at step 3.*--learning-rate"):
        main(options(corpus_folder, tmp_path))


def test_learning_rate_warms_up_and_ends_at_a_twentieth():
    run = CodecRun(n_steps=1000, learning_rate=1.0)
    assert learning_rate(run, 0) == pytest.approx(0.01)
    assert learning_rate(run, 200) > 0.9
    assert learning_rate(run, 1000) == pytest.approx(0.05)


def test_losses_are_zero_for_the_truth_and_not_for_another():
    wave = 0.1 * normal((2, 1024 * 6), 0, "test wave")
    spectrum = stft(wave, 1024, 256)
    power = spectrum.abs().square()
    mel, weights = mel_matrix(513, RATE), torch.ones(513)
    level = 10 * torch.log10(power + 1e-8)
    # float32 logarithms; measured 2e-6 and 1e-6
    assert all(float(part) < 1e-4 for part in level_loss(level, power, mel, weights, -80.0))
    bins, bands = level_loss(level + 3, power, mel, weights, -80.0)
    assert float(bins) == pytest.approx(3, abs=1e-3)
    assert float(bands) == pytest.approx(3, abs=1e-3)
    in_time, _ = phase.advances(spectrum, 1024, 256)
    assert float(advance_loss(in_time, in_time, spectrum.abs())) == 0
    assert float(advance_loss(0 * in_time, in_time, spectrum.abs())) == pytest.approx(1, abs=0.1)
    assert float(multi_resolution_loss(wave, wave, RATE)) == 0
    assert float(multi_resolution_loss(wave / 2, wave, RATE)) == pytest.approx(6, abs=0.1)


def test_discriminator_losses_have_their_stated_targets():
    torch.manual_seed(0)
    discriminator = Discriminator(width=4)
    real = discriminator(0.1 * normal((2, 8192), 0, "test wave"))
    assert len(real) == 3
    ones, zeros = ([[torch.full((1,), v)]] for v in (1.0, 0.0))
    assert float(discriminator_loss(ones, zeros)) == 0
    assert float(discriminator_loss(zeros, ones)) == 2
    assert float(generator_loss(real, real)[1]) == 0
    assert float(generator_loss(real, discriminator(torch.zeros(2, 8192)))[1]) > 0.1


def test_every_trained_part_gets_a_gradient(corpus_folder, tmp_path):
    """In the last stage, decoder heads and blocks all learn; the encoder does not."""
    module = build(options(corpus_folder, tmp_path, encoder_steps=0, adversarial_from=9))
    wave = module.windows.batch(0)
    module._decoder_losses(wave)["loss"].backward()
    for name, parameter in module.codec.named_parameters():
        learns = parameter.grad is not None and bool(parameter.grad.abs().sum() > 0)
        assert learns == name.startswith("decoder."), name


def test_scores_of_a_wave_against_itself_are_perfect():
    wave = torch.from_numpy(notes(0))[0]
    scores = measure_codec.compare(wave, wave, RATE)
    assert scores.log_mel_db == 0
    assert scores.stft_distance == 0
    assert scores.chroma == pytest.approx(1, abs=1e-5)
    assert scores.onset_f1 == 1
    assert scores.si_sdr_db > 60


def test_scores_tell_what_is_wrong():
    wave = torch.from_numpy(notes(0))[0]
    louder = measure_codec.compare(2 * wave, wave, RATE)
    assert 0.5 < louder.log_mel_db <= 6.1  # 6.02 dB except where both lie under the floor
    assert louder.si_sdr_db > 60  # scale-invariant
    time = torch.arange(wave.shape[0]) / RATE
    other = measure_codec.compare(0.2 * torch.sin(2 * math.pi * 233.08 * time), wave, RATE)
    assert other.chroma < 0.6
    assert other.onset_f1 < 0.5  # a held tone against eight notes; measured 0.36
    assert other.si_sdr_db < 0


def test_onsets_are_found_where_notes_begin():
    found = measure_codec.onsets_s(torch.from_numpy(notes(0))[0], RATE)
    expected = torch.arange(1, 8) / 3
    nearest = (found[None] - expected[:, None]).abs().amin(1)
    assert nearest.max() < 0.04  # a window of 93 ms sees a hard attack before its middle does
    assert len(found) <= 9


def test_evaluate_reports_every_family_and_what_streaming_changes(corpus_folder):
    torch.manual_seed(0)
    codec = SpectralCodec(preset("tiny").codec).eval()
    with torch.no_grad():
        codec.decoder.level.bias.fill_(-2.5)
    result = measure_codec.evaluate(codec, Corpus(corpus_folder, "test"), hours=1.0)
    assert set(result["families"]) == {"piano", "strings"}
    assert result["all"]["n"] == 3
    assert result["stream_difference"] < 1e-3
    assert result["lookahead_frames"] <= 4
    table = measure_codec.markdown_table(result)
    assert table.count("\n") == 4
    assert "| piano | 1 |" in " ".join(table.split())


@pytest.fixture(scope="module")
def measured(corpus_folder, tmp_path_factory):
    """A codec of one step, its figures and its card."""
    out = tmp_path_factory.mktemp("measured")
    (corpus_folder / "corpus.json").write_text('{"kind": "audio"}')
    assert main(options(corpus_folder, out, n_steps=1, encoder_steps=0)) == 0
    weights, figures, card = (out / n for n in ("codec.safetensors", "s.json", "codec.md"))
    words = [weights, "--data", corpus_folder, "--json", figures, "--card", card, "--threads", 1]
    assert measure_codec.main([str(word) for word in words]) == 0
    return weights, json.loads(figures.read_text()), card.read_text()


def test_measuring_writes_figures_and_a_card_made_of_them(measured):
    weights, scores, text = measured
    assert scores["sha256"] == read_header(weights).sha256
    assert scores["sha256"] in text
    assert "2 recordings of `corpus" in text
    for untrue in ("music21", "licence", "soundfont"):
        assert untrue not in text
    assert "python -m lmd train codec" in text
    assert f"{scores['all']['log_mel_db']:.3f}" in text
    with pytest.raises(LmdError, match="scores of weights 0000"):
        measure_codec.codec_card(weights, {**scores, "sha256": "0" * 64})
