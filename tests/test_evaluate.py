"""The evaluation from end to end on a corpus of tones, and the parts it is put together from."""

import argparse
import json
import math
import re
import socket
from dataclasses import fields, replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from lmd.checkpoint import save_checkpoint
from lmd.config import RecogniserConfig
from lmd.corpus.instruments import FAMILIES
from lmd.corpus.manifest import Corpus, Row, write_manifest, write_wav
from lmd.corpus.scores import cached_piece
from lmd.errors import LmdError
from lmd.evaluation.aims import aims, difference
from lmd.evaluation.clip_metrics import OTHER, Judge, Measured
from lmd.evaluation.command import (
    BUDGETS,
    chosen_methods,
    configure,
    main,
    planned,
    with_long_streams,
)
from lmd.evaluation.earlier import Earlier
from lmd.evaluation.generation import (
    METHODS,
    WITH_EULER,
    Budget,
    Clip,
    choose_rows,
    controls_for,
    cut_clips,
    decoded,
    fade_prompts,
    generate,
    measure_speed,
    side_by_side,
)
from lmd.evaluation.held_out import PIECES
from lmd.evaluation.metrics import frechet, gaussian
from lmd.evaluation.other_listeners import open_listeners
from lmd.evaluation.report import told
from lmd.evaluation.rows import (
    Reference,
    Truths,
    drift_rows,
    other_values,
    rolled,
    row_of,
    tempo_share,
)
from lmd.evaluation.run import Evaluation, Sources, pairs_of
from lmd.evaluation.tagger import (
    HOP,
    TEMPI_BPM,
    Recogniser,
    band_levels,
    cut,
    load_recogniser,
    tempo_bpm,
)
from lmd.evaluation.train_tagger import tempo_labels
from lmd.pretrained import open_instrument

RATE = 22_050
MEASURED = ("naive", "BC+AF")
FAMILY_NAMES = ("strings", "brass", "choir", "piano")


def melody(seed: int, seconds: float) -> np.ndarray:
    """Notes of C major with a few overtones, two a second."""
    rng, t = np.random.default_rng(seed), np.arange(round(RATE / 2)) / RATE
    notes = []
    for _ in range(round(2 * seconds)):
        hz = 440 * 2 ** ((rng.choice([60, 62, 64, 65, 67, 69, 71]) - 69) / 12)
        note = sum(np.sin(2 * np.pi * k * hz * t) / k**2 for k in range(1, 2 + seed % 4))
        notes.append(0.2 * note * np.exp(-3 * t))
    return np.concatenate(notes).astype(np.float32)


def a_row(name: str, split: str, family: str, n_samples: int, bpm: float = 120.0) -> Row:
    """A line of a manifest."""
    return Row(
        name=name,
        piece_id=name,
        composer="nobody",
        title=name,
        split=split,
        rendition=0,
        seed=0,
        family=family,
        instruments=family,
        tempo_bpm=bpm,
        key="C",
        mode="major",
        metre="4/4",
        transposition=0,
        articulation="legato",
        dynamics="soft",
        density_hz=2.0,
        brightness_hz=1000.0,
        duration_s=n_samples / RATE,
        n_samples=n_samples,
        sample_rate=RATE,
        channels=1,
        caption=f"{family}, {bpm:.0f} BPM",
        path=f"audio/{name}.wav",
        stem_paths="",
        sha256="",
    )


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> argparse.Namespace:
    """A corpus of melodies and a recogniser with random weights."""
    folder = tmp_path_factory.mktemp("world")
    rows = []
    for number in range(7):
        wave = melody(number, 17)
        split = "test" if number < 4 else "validation"
        row = a_row(f"p{number}", split, FAMILY_NAMES[number % 4], len(wave))
        write_wav(folder / "corpus" / row.path, wave[None], RATE)
        rows.append(row)
    write_manifest(folder / "corpus", rows)
    (folder / "corpus" / "corpus.json").write_text('{"hours": 2.0}')
    torch.manual_seed(0)
    model = Recogniser(RecogniserConfig(tuple(FAMILIES), width=16, embedding=8))
    path = folder / "recogniser.safetensors"
    save_checkpoint(path, model.state_dict(), kind="recogniser", config=model.config)
    return argparse.Namespace(folder=folder, corpus=folder / "corpus", recogniser=path)


def run(world: argparse.Namespace, out: Path, *more: str) -> int:
    parser = argparse.ArgumentParser()
    configure(parser)
    given = ["--data", world.corpus, "--recogniser", world.recogniser, "--out", out]
    given += ["--parts", world.folder / "parts", "--budget", "smoke", "--threads", "1", *more]
    return main(parser.parse_args([str(word) for word in given]))


# --- the whole ----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def report(world: argparse.Namespace) -> Path:
    """One smoke run with random weights."""
    out = world.folder / "out"
    assert run(world, out, "--random", "tiny", "--methods", *MEASURED) == 0
    return out


def test_an_evaluation_writes_a_row_per_method_with_finite_intervals(report: Path) -> None:
    result = json.loads((report / "evaluation.json").read_text())
    assert [row["method"] for row in result["rows"]] == list(MEASURED)
    for row in result["rows"]:
        for name in ("fd", "kl", "joins", "clicks"):
            assert row[name]["low"] <= row[name]["mean"] <= row[name]["high"], name
            assert row[name]["n"] == 2
        assert row["speed"]["evaluations"] == row["n_steps"]
        speed = row["speed"]["rtf"]
        assert speed["low"] <= speed["mean"] <= speed["high"]
        assert speed["mean"] > 0
        assert speed["n"] == 3
    assert set(result["anchors"]) == {"real", "codec", "shuffled", "other prompts"}
    assert len(result["drift"]) == len(result["fades"]) == 1  # all but the naive one
    assert set(result["drift_anchors"]) == {"real", "codec", "shuffled"}
    assert all(row["distance"]["level"]["mean"] > 0 for row in result["drift_anchors"].values())
    assert result["random_weights"]


def test_eulers_rows_stand_beside_the_others_and_need_no_timings(
    world: argparse.Namespace, report: Path, tmp_path: Path
) -> None:
    methods = ("--methods", "BC+AF", "BC+AF-Euler")
    assert run(world, tmp_path, "--random", "tiny", *methods) == 0
    result = json.loads((tmp_path / "evaluation.json").read_text())
    plain, euler = result["rows"]
    assert (plain["sampler"], euler["sampler"]) == ("dpmpp", "euler")
    assert euler["fd"]["mean"] == pytest.approx(plain["fd"]["mean"], rel=1e-3)  # of one step
    assert plain["speed"]
    assert euler["speed"] is None
    assert not any("timings" in text for text in result["not_measured"])
    written = (tmp_path / "evaluation.md").read_text()
    assert "but for the rows named Euler" in written
    assert "--methods BC+AF BC+AF-Euler" in written
    assert "Euler" not in (report / "evaluation.md").read_text().partition("Not measured")[0]


def test_the_tables_and_figures_come_from_the_json(report: Path) -> None:
    text = (report / "evaluation.md").read_text()
    result = json.loads((report / "evaluation.json").read_text())
    assert text.count("**BC+AF**") == 1
    assert told(result["anchors"]["codec"]["fd"]) in text
    assert "Random weights" in text
    assert "(`python -m lmd data build --hours 2`)" in text
    command = re.search(r"Repeated by `python -m lmd evaluate (.+?)`", text)
    assert command is not None
    parser = argparse.ArgumentParser()
    configure(parser)
    args = parser.parse_args(command[1].split())
    assert (args.budget, args.methods, args.drift_seconds) == ("smoke", list(MEASURED), 30.0)
    assert args.random == "tiny"
    assert parser.parse_args(["--quick"]).budget == "quick"
    with pytest.raises(SystemExit):
        parser.parse_args(["--quick", "--budget", "brief"])
    for name in ("distance", "drift", "fade"):
        assert (report / f"evaluation_{name}.png").stat().st_size > 5_000


def without_timings(result: dict) -> dict:
    return result | {"rows": [row | {"speed": None} for row in result["rows"]]}


def test_a_second_run_makes_nothing_again_but_timings_and_says_the_same(
    world: argparse.Namespace, report: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*args: object, **kwargs: object) -> None:
        raise AssertionError("generated although it was there")

    for name in ("generate", "long_stream", "fade_prompts", "decoded"):
        monkeypatch.setattr(f"lmd.evaluation.run.{name}", refuse)
    again = report.parent / "again"
    assert run(world, again, "--random", "tiny", "--methods", *MEASURED) == 0
    first, second = (json.loads((x / "evaluation.json").read_text()) for x in (report, again))
    assert without_timings(second) == without_timings(first)
    for old, new in zip(first["rows"], second["rows"], strict=True):
        assert old["speed"]["rtf"] != new["speed"]["rtf"]  # of the machine, now


def test_weights_that_are_missing_are_named_not_invented(
    world: argparse.Namespace, tmp_path: Path
) -> None:
    instrument = open_instrument("random:tiny:0")
    codec = instrument.streamer.codec.model
    config = instrument.preset.codec
    save_checkpoint(tmp_path / "codec.safetensors", codec.state_dict(), kind="codec", config=config)
    assert run(world, tmp_path / "out", "--weights", str(tmp_path)) == 0
    result = json.loads((tmp_path / "out" / "evaluation.json").read_text())
    assert result["rows"] == []
    assert result["not_measured"] == [f"{k}: no such weights" for k in ("arc", "finetuned")]
    assert all(aim["met"] is None for aim in result["aims"])


def test_a_recogniser_of_another_rate_is_refused(world: argparse.Namespace) -> None:
    model, _ = load_recogniser(world.recogniser)
    with pytest.raises(LmdError, match="44100"):
        Judge(model, 44_100)
    with pytest.raises(LmdError, match="at least 4096"):
        band_levels(torch.zeros(1000), RATE)


# --- what is generated --------------------------------------------------------------------------

BUDGET = Budget(n_clips=2, n_blocks=3)


def test_music_of_families_that_the_listener_does_not_know_is_refused_at_once(
    world: argparse.Namespace, tmp_path: Path
) -> None:
    rows = [replace(row, family="own music") for row in Corpus(world.corpus).rows]
    write_manifest(tmp_path, rows)
    sources = Sources(tmp_path, tmp_path, world.recogniser, tmp_path / "parts", random="tiny")
    with pytest.raises(LmdError, match="test pieces played by own music"):
        Evaluation(sources, BUDGETS["smoke"])
    assert not (tmp_path / "parts").exists()


def test_results_are_not_to_go_where_a_file_is(world: argparse.Namespace, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    with pytest.raises(LmdError, match="no folder"):
        run(world, tmp_path / "file")
    with pytest.raises(LmdError, match="no folder"):
        run(world, tmp_path / "out", "--parts", tmp_path / "file" / "parts")


def clips_of(world: argparse.Namespace, seed: int = 0) -> list[Clip]:
    corpus = Corpus(world.corpus, "test")
    chosen = choose_rows(corpus.rows, 2, 15.0, 0)
    return cut_clips(corpus, chosen, 192 * 1024, 3 * 48 * 1024, seed)


def test_every_seed_gets_other_prompts_and_none_of_mixed_or_short_pieces() -> None:
    long, short = 20 * RATE, 5 * RATE
    rows = [a_row(name, "test", "strings", long) for name in "abcdefg"]
    rows += [a_row("h", "test", "mixed", long), a_row("i", "test", "brass", short)]
    seeds = [choose_rows(rows, 3, 15.0, seed) for seed in range(3)]
    assert seeds == [choose_rows(rows, 3, 15.0, seed) for seed in range(3)]
    dealt = [index for seed in seeds for index in seed]
    assert sorted(dealt[:7]) == [0, 1, 2, 3, 4, 5, 6]
    assert dealt[7:] == dealt[:2]  # all were dealt: from the first again
    assert sorted(choose_rows(rows, 9, 15.0, 1)) == [0, 1, 2, 3, 4, 5, 6]
    with pytest.raises(LmdError, match="Build more hours"):
        choose_rows(rows, 3, 60.0, 0)


def test_a_fade_goes_from_one_family_to_another() -> None:
    families = ["piano", "piano", "organ", "choir", "choir"]
    clips = [
        Clip(a_row(f"{k}", "test", family, RATE), torch.zeros(1), torch.zeros(1))
        for k, family in enumerate(families)
    ]
    pairs = [(a.row.piece_id, b.row.piece_id) for a, b in pairs_of(clips)]
    assert pairs == [("0", "2"), ("1", "3")]


def test_an_excerpt_goes_on_where_its_context_ends(world: argparse.Namespace) -> None:
    corpus = Corpus(world.corpus, "test")
    for clip in clips_of(world):
        index = [row.name for row in corpus.rows].index(clip.row.name)
        whole = torch.from_numpy(corpus.wave(index))[0]
        both = torch.cat([clip.context, clip.real])
        assert any(
            torch.equal(whole[start : start + len(both)], both)
            for start in (whole == both[0]).nonzero()[:, 0].tolist()
        )
    other = clips_of(world, seed=1)
    assert not torch.equal(clips_of(world)[0].real, other[0].real)


def test_streams_side_by_side_sound_as_each_alone(world: argparse.Namespace) -> None:
    """Each with its own prompt; the noise of a batch is drawn together, so one seed per stream."""
    streamer = open_instrument("random:tiny:0").streamer
    controls = controls_for(METHODS[4], 1, BUDGET, 0, 1.0)
    prompts = ["church organ", "music box, fast"]
    many = side_by_side(streamer, prompts)
    together = next(many.stream(controls, n_blocks=1, state=many.start(batch=2)))
    swapped = side_by_side(streamer, prompts[::-1])
    exchanged = next(swapped.stream(controls, n_blocks=1, state=swapped.start(batch=2)))
    assert not torch.allclose(together.latents, exchanged.latents, atol=1e-3)
    alone = side_by_side(streamer, prompts[:1] * 2)
    first = next(alone.stream(controls, n_blocks=1, state=alone.start(batch=2)))
    assert torch.allclose(together.latents[0], first.latents[0], atol=1e-5)  # measured 0.0


@pytest.mark.parametrize("primed", [False, True])
def test_generated_clips_are_repeatable_and_primed_ones_differ(
    world: argparse.Namespace, primed: bool
) -> None:
    streamer, clips = open_instrument("random:tiny:0").streamer, clips_of(world)
    controls = controls_for(METHODS[4], 1, BUDGET, 0, 1.0)
    waves = generate(streamer, clips, controls, 3, primed)
    n_frames = 3 * 48 - streamer.codec.lookahead_frames
    assert waves.shape == (2, n_frames * streamer.codec.samples_per_frame)
    assert torch.equal(waves, generate(streamer, clips, controls, 3, primed))
    assert not torch.allclose(waves, generate(streamer, clips, controls, 3, not primed), atol=1e-4)


def test_shuffled_frames_keep_the_codecs_material_but_not_its_order(
    world: argparse.Namespace,
) -> None:
    codec = open_instrument("random:tiny:0").streamer.codec
    waves = torch.stack([clip.real for clip in clips_of(world)])
    plain, shuffled = decoded(codec, waves), decoded(codec, waves, shuffle_seed=0)
    assert plain.shape == shuffled.shape == waves.shape
    assert not torch.allclose(plain, shuffled, atol=1e-3)
    assert torch.equal(shuffled, decoded(codec, waves, shuffle_seed=0))


def test_a_fade_begins_with_one_prompt_and_ends_with_the_other() -> None:
    streamer = open_instrument("random:tiny:0").streamer
    controls = controls_for(METHODS[4], 1, BUDGET, 0, 1.0)
    waves, weights = fade_prompts(streamer, [("organ", "flute"), ("choir", "harp")], controls, 8)
    assert waves.shape[0] == 2
    assert weights[0] == 0.0 or weights[1] == 0.25
    assert weights == sorted(weights)
    assert weights[-2:] == [1.0, 1.0]


def test_speed_counts_the_decoders_calls() -> None:
    streamer = open_instrument("random:tiny:0").streamer
    found = measure_speed(streamer, controls_for(METHODS[2], 3, BUDGET, 0, 1.0), 2)
    assert found["evaluations"] == 3
    assert found["ttff_ms"] > 0
    block_ms = 1e3 * 48 * 1024 / RATE
    assert found["rtf"] == pytest.approx(block_ms / (found["dit_ms"] + found["decode_ms"]))


# --- how it is put together ---------------------------------------------------------------------


def measured(family: list[list[float]], embedding: np.ndarray, **values: list[float]) -> Measured:
    names = {each.name for each in fields(Measured)} - {"embedding", "family", "others"}
    plain = {name: np.full(len(family), 1.0) for name in names}
    given = {name: np.array(value, dtype=float) for name, value in values.items()}
    return Measured(embedding=embedding, family=np.array(family), **(plain | given))


def test_a_row_counts_families_and_tempi_and_leaves_out_what_is_not_a_number() -> None:
    rng = np.random.default_rng(0)
    embedding = rng.normal(size=(3, 8, 2))
    said = measured(
        [[0.9, 0.1], [0.2, 0.8], [0.6, 0.4]],
        embedding,
        tempo_bpm=[61, 150, 100],
        key_share=[0.8, math.nan, 0.6],
    )
    truth = Truths(
        family=np.array([0, 1, 1]),
        tempo_range=np.array([[111.0, 130.0], [111.0, 130.0], [math.nan, math.nan]]),
        names_bpm=np.array([True, True, False]),
        real=said,
    )
    cloud, far = (gaussian(embedding.reshape(-1, 2) + shift) for shift in (0, 3))
    row = row_of([said, said], [truth, truth], Reference(cloud, 24))
    assert row["family"]["mean"] == pytest.approx(2 / 3)
    assert row["tempo"]["mean"] == 0.5  # 61 is half of 120, 150 is wrong, the third was not told
    assert row["key_share"]["mean"] == pytest.approx(0.7)
    assert row["kl"]["mean"] == pytest.approx(0)
    assert row["fd"]["mean"] == pytest.approx(0, abs=1e-9)
    # the same music twice (its covariance is divided by n - 1: 3e-4)
    assert row["fd_infinite"]["mean"] == pytest.approx(0, abs=1e-3)
    beside = row_of([said, said], [truth, truth], Reference(far, 24))  # the mean is 3, 3 away
    assert beside["fd_infinite"]["mean"] == pytest.approx(18, abs=1e-3)
    assert beside["pooled"]["2"]["without"] == pytest.approx([18, 18], abs=1e-3)
    assert (row["windows"], row["clips"]) == (24, 3)
    turned = rolled(truth)
    assert turned.family.tolist() == [1, 0, 1]
    assert tempo_share(said, truth) == 0.5
    by_word = replace(truth, names_bpm=np.zeros(3, bool))
    assert tempo_share(said, by_word) == 0.0  # half of a range of words is another range


@pytest.mark.parametrize(
    ("caption", "low", "high"),
    [
        ("organ, 120 BPM", 120 / 1.08, 120 * 1.08),
        ("organ, allegro, 120 BPM", 120 / 1.08, 120 * 1.08),
        ("very slow organ", 0.0, 60 * 1.08),
        ("slow organ", 60 / 1.08, 76 * 1.08),
        ("moderately fast organ", 100 / 1.08, 120 * 1.08),
    ],
)
def test_a_caption_asks_for_a_number_or_for_the_range_of_its_word(
    caption: str, low: float, high: float
) -> None:
    row = replace(a_row("a", "test", "piano", RATE, bpm=120.0), caption=caption)
    clip = Clip(row, torch.zeros(1), torch.zeros(1))
    assert clip.tempo_range == pytest.approx((low, high))
    silent = Clip(replace(row, caption="organ"), torch.zeros(1), torch.zeros(1))
    assert np.isnan(silent.tempo_range).all()


def test_what_the_aims_are_judged_by_is_repeated_most() -> None:
    budget = Budget(n_seeds=8, other_seeds=3, drift_steps=(2,))
    naive, streamed = METHODS[0], METHODS[2]
    assert [budget.seeds_of(streamed, n, False) for n in (50, 8, 2)] == [3, 8, 8]
    assert budget.seeds_of(naive, 2, False) == budget.seeds_of(streamed, 2, True) == 3


def test_every_seed_follows_long_streams_of_other_prompts(
    world: argparse.Namespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    sources = Sources(
        weights=Path("data/pretrained"),
        data=world.corpus,
        recogniser=world.recogniser,
        parts=world.folder / "prompts",
        random="tiny",
    )
    evaluation = Evaluation(sources, replace(BUDGETS["smoke"], drift_clips=1, drift_seeds=2))
    heard: list[list[str]] = []

    def follow(streamer: object, prompts: list[str], *rest: object) -> torch.Tensor:
        heard.append(prompts)
        return torch.zeros(1, 10 * RATE)

    monkeypatch.setattr("lmd.evaluation.run.long_stream", follow)
    evaluation.drift(METHODS[2], "0", 1)
    assert len(heard) == 2
    assert heard[0] != heard[1]


def a_line(method: str, fd: list[float], family: float = 1.0, key: float = 0.95) -> dict:
    interval = {"mean": float(np.mean(fd)), "low": 0.0, "high": 9.0, "n": len(fd)}
    pooled = {}  # as if the distances of seeds could be averaged
    for n in range(2, len(fd) + 1):
        without = [float(np.mean(fd[:k] + fd[k + 1 : n])) for k in range(n)]
        pooled[str(n)] = {"all": float(np.mean(fd[:n])), "without": without}
    return {
        "method": method,
        "n_steps": 8,
        "primed": False,
        "fd": interval,
        "windows": 7,
        "fd_infinite": interval,
        "family": interval | {"mean": family},
        "key_share": {"mean": key, "low": key - 0.01, "high": key + 0.01},
        "tempo": {"mean": 0.4, "low": 0.3, "high": 0.5},
        "by_seed": {"fd": fd},
        "pooled": pooled,
    }


def test_the_reference_is_all_held_out_music_and_of_long_streams_other_pieces(
    world: argparse.Namespace, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    sources = Sources(Path(), world.corpus, world.recogniser, tmp_path / "parts", "tiny", "cpu")
    evaluation = Evaluation(sources, BUDGETS["smoke"])
    test, other = (
        evaluation.embed_held_out(split)["embedding"] for split in ("test", "validation")
    )
    assert evaluation.reference.windows == len(test) + len(other) > len(test) > 0
    together = gaussian(np.concatenate([test, other]))
    assert frechet(evaluation.reference.gaussian, together) == pytest.approx(0, abs=1e-6)
    assert frechet(evaluation.other_pieces, gaussian(other)) == pytest.approx(0, abs=1e-6)
    assert frechet(evaluation.other_pieces, together) > 1e-3

    heard: list[object] = []

    def follow(judge: object, waves: object, cloud: object, bin_s: float) -> dict:
        heard.append(cloud)
        return {}

    monkeypatch.setattr("lmd.evaluation.run.drift", follow)
    monkeypatch.setattr("lmd.evaluation.run.long_stream", lambda *rest: None)
    evaluation.drift_of_seed(METHODS[2], "0", 1, 0)
    evaluation.drift_anchors_of(0)
    assert len(heard) == 4
    assert all(cloud is evaluation.other_pieces for cloud in heard)


def test_further_listeners_have_all_held_out_music_for_reference_too(
    world: argparse.Namespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    sources = Sources(Path(), world.corpus, world.recogniser, world.folder / "parts", "tiny", "cpu")
    evaluation = Evaluation(sources, BUDGETS["smoke"])
    points = {"validation": np.array([[0.0], [2.0]]), "test": np.array([[4.0], [6.0]])}
    monkeypatch.setattr(
        evaluation,
        "embed_held_out",
        lambda split: {"embedding": points[split], f"{OTHER}OpenL3": 10 * points[split]},
    )
    assert evaluation.reference.others["OpenL3"].mean == pytest.approx([30.0])


def test_aims_are_judged_seed_by_seed() -> None:
    slope_up = {"mean": 0.5, "low": 0.1, "high": 0.9}
    flat = {"mean": 0.1, "low": -0.1, "high": 0.3}
    drift = [
        {"method": name, "n_steps": 4, "times_s": [5.0, 15.0]}
        | {"distance": {"slope_per_minute": slope, "level": {"mean": 2.0}}}
        for name, slope in (("ED+AF", slope_up), ("BC+AF", flat))
    ]
    rows = [
        a_line("ED", [5.0, 7.0, 9.0]),
        a_line("ED+AF", [4.0, 6.1, 8.0]),
        a_line("BC", [5.0, 7.0, 9.0]),
        a_line("BC+AF", [4.0, 8.0, 7.0], family=0.8, key=0.92),
    ]
    anchor = a_line("real", [1.0, 1.0, 1.0])
    anchors = {"real": anchor, "codec": a_line("codec", [3.0, 3.5, 4.0]), "other prompts": anchor}
    said = {"rows": rows, "anchors": anchors, "drift": drift}
    found = aims(said | {"recogniser": {"embedding": 10}})
    met = [True, False, True, True, True, True, False, True, False, True, False]
    assert [one["met"] for one in found] == met
    assert all(one["aim"].endswith("both with DPM-Solver++") for one in found[:2])
    assert found[2]["found"] == "6.03 against 3.5 (ED+AF, 8 steps)"
    # by seeds: 4 - 2 * 3, 6.1 - 2 * 3.5, 8 - 2 * 4; Student's half width of three is 2.484 sd
    half = 4.302653 * np.std([-2.0, -0.9, 0.0], ddof=1) / math.sqrt(3)
    ends = f"-0.967 ({-0.966667 - half:.3g} – {-0.966667 + half:.3g}) beyond twice"
    assert ends in found[3]["found"]
    assert found[7]["aim"].startswith("BC+AF, 4 steps: no drift")
    assert "at most 0.1 over 20 s; the distance is 2" in found[7]["found"]
    assert "40.0% (30.0% – 50.0%) with ED+AF, 8 steps" in found[8]["found"]
    assert found[10]["found"] == "8 steps 95.0% → 92.0%"
    rarely = anchors | {"other prompts": anchor | {"tempo": {"mean": 0.2}}}
    assert aims(said | {"recogniser": {"embedding": 10}, "anchors": rarely})[8]["met"]
    euler = [a_line(row["method"] + "-Euler", [9.0, 9.5, 9.9]) for row in rows[::2]]
    euler += [a_line("ED+AF-Euler", [8.0, 8.6, 8.9]), a_line("BC+AF-Euler", [9.1, 9.6, 10.0])]
    more = aims(said | {"recogniser": {"embedding": 10}, "rows": rows + euler})
    assert [one["met"] for one in more] == [True, False, *met]
    assert [one["aim"].count("Euler's method") for one in more[:5]] == [1, 1, 0, 0, 0]
    assert "8 steps -0.967 " in more[0]["found"]
    once = [a_line("ED", [5.0]), a_line("ED+AF", [4.0])]
    alone = said | {"rows": once, "recogniser": {"embedding": 1}}
    assert aims(alone)[3]["met"] is None  # FD∞ needs more than one seed
    few = aims(said | {"recogniser": {"embedding": 11}})  # 21 windows are fewer than twice that
    assert few[2]["met"] is few[3]["met"] is None


def test_lines_of_fewer_seeds_are_not_the_best_and_are_compared_on_those_they_share() -> None:
    often, seldom = a_line("BC", [5.0, 6.0, 7.0, 8.0]), a_line("BC+AF", [4.0, 5.1], family=0.5)
    shipped = a_line("BC+AF", [6.0, 7.0, 8.0, 9.0], family=0.85) | {"n_steps": 4}
    anchors = {"real": a_line("real", [1.0]), "codec": a_line("codec", [9.0])}
    anchors["other prompts"] = anchors["real"]
    result = {"rows": [often, seldom, shipped], "anchors": anchors, "drift": []}
    found = aims(result | {"recogniser": {"embedding": 1}})
    told = {one["aim"].rpartition(": ")[2]: one for one in found if "family" in one["aim"]}
    assert told["the lowest FD∞"]["found"].startswith("100.0%")
    assert "BC, 8 steps" in told["the lowest FD∞"]["found"]
    assert (told["as shipped"]["met"], told["the lowest FD∞"]["met"]) == (False, True)
    change = difference(often, seldom)
    assert (change.mean, change.n) == (pytest.approx(-0.95), 2)


def test_drift_rows_find_the_slope_of_each_measure() -> None:
    rng, bins = np.random.default_rng(0), np.arange(30)
    seeds = [
        {
            "distance": 1 + 0.01 * bins + 0.1 * rng.normal(size=(4, 30)),
            "key_clarity": 0.7 + 0.02 * rng.normal(size=(4, 30)),
        }
        for _ in range(3)
    ]
    found = drift_rows(seeds, 10.0)
    change = found["distance"]["slope_per_minute"]
    assert change["low"] <= 0.06 <= change["high"]
    assert change["low"] > 0.05
    still = found["key_clarity"]["slope_per_minute"]
    assert still["low"] <= 0 <= still["high"]
    assert found["streams"] == 12
    assert found["times_s"][:2] == [5.0, 15.0]


# --- other listeners ----------------------------------------------------------------------------


def test_listeners_that_are_not_installed_are_named_and_nothing_is_fetched(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("lmd.evaluation.other_listeners.find_spec", lambda package: None)
    found, words = open_listeners()
    assert found == {}
    assert set(words.values()) == {"not installed"}


def test_a_listener_without_its_weights_gives_a_reason_instead_of_a_download(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def load(*args: object) -> None:
        socket.create_connection(("weights.example", 443))

    package = SimpleNamespace(models=SimpleNamespace(load_audio_embedding_model=load))
    monkeypatch.setattr(
        "lmd.evaluation.other_listeners.find_spec", lambda name: name == "openl3" or None
    )
    monkeypatch.setattr("lmd.evaluation.other_listeners.import_module", lambda name: package)
    before = socket.create_connection
    found, words = open_listeners()
    assert found == {}
    assert "no connection is opened" in words["OpenL3"]
    assert socket.create_connection is before


def test_installed_listeners_join_the_row(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fakes with the packages' own calls: what is tested is this side of the border."""

    def embedding(wave: np.ndarray, rate: int, **how: object) -> tuple[np.ndarray, None]:
        assert rate == 48_000
        return np.random.default_rng(len(wave)).normal(size=(6, 3)), None

    class Clap:
        def __init__(self, enable_fusion: bool) -> None:
            assert not enable_fusion

        def load_ckpt(self) -> None: ...

        def get_audio_embedding_from_data(self, x: np.ndarray, use_tensor: bool) -> np.ndarray:
            return np.array([[3.0, 4.0]])

        def get_text_embedding(self, texts: list[str], use_tensor: bool) -> np.ndarray:
            return np.array([[1.0, 0.0]] * len(texts))

    class Passt(torch.nn.Module):
        def forward(self, wave: torch.Tensor) -> torch.Tensor:
            return torch.tensor([[0.0, 1.0, 2.0]])

    packages = {
        "openl3": SimpleNamespace(
            models=SimpleNamespace(load_audio_embedding_model=lambda *a: "model"),
            get_audio_embedding=embedding,
        ),
        "hear21passt.base": SimpleNamespace(get_basic_model=lambda mode: Passt()),
        "laion_clap": SimpleNamespace(CLAP_Module=Clap),
    }
    monkeypatch.setattr("lmd.evaluation.other_listeners.find_spec", lambda name: name)
    monkeypatch.setattr("lmd.evaluation.other_listeners.import_module", lambda name: packages[name])
    listeners, words = open_listeners()
    assert set(words.values()) == {"used"}
    wave = torch.randn(RATE)
    heard = {name: np.array([one.hear(wave, RATE)] * 2) for name, one in listeners.items()}
    cloud = gaussian(heard["OpenL3"].reshape(-1, 3))
    truth = Truths(
        np.zeros(2, int),
        np.ones(2),
        np.ones(2, bool),
        replace(measured([[1.0]] * 2, np.zeros((2, 1, 1))), others=heard),
        {"CLAP": listeners["CLAP"].read(["a", "b"])},
    )
    values = other_values([(truth.real, truth)], Reference(cloud, 1, {"OpenL3": cloud}))
    assert values["FD OpenL3"] == pytest.approx([0], abs=1e-9)
    assert values["KL PaSST"] == pytest.approx([0], abs=1e-9)
    assert values["cosine CLAP"] == pytest.approx([0.6])
    flat = truth.real.arrays()
    assert np.array_equal(Measured.from_arrays(flat).others["CLAP"], heard["CLAP"])


# --- the recogniser -----------------------------------------------------------------------------


def test_levels_show_a_tone_at_its_pitch_and_a_full_scale_sine_at_nought_db() -> None:
    wave = torch.sin(2 * math.pi * 440 * torch.arange(2 * RATE) / RATE)
    levels = band_levels(wave, RATE)
    assert levels.shape == (188, 2 * RATE // HOP)
    semitones = levels[128:, 5:-5].mean(1)
    assert int(semitones.argmax()) == 69 - 36
    assert float(semitones.max()) == pytest.approx(0, abs=8)  # a band is an average: measured -5


def test_loudness_does_not_change_what_is_heard(world: argparse.Namespace) -> None:
    model, _ = load_recogniser(world.recogniser)
    wave = torch.from_numpy(melody(1, 8))
    loud, soft = model.listen(wave, RATE), model.listen(0.1 * wave, RATE)
    assert torch.allclose(loud.embedding, soft.embedding, atol=0.02)  # floors 1e-12: 0.001
    silence = model.listen(torch.zeros(8 * RATE), RATE)
    assert torch.isfinite(silence.embedding).all()


def test_windows_overlap_as_asked() -> None:
    levels = torch.arange(20.0)[None].expand(188, -1)
    windows = cut(levels, 8, 4)
    assert windows.shape == (4, 188, 8)
    assert windows[:, 0, 0].tolist() == [0, 4, 8, 12]
    with pytest.raises(LmdError, match="at least 30"):
        cut(levels, 30)


def test_a_tempo_label_is_read_back() -> None:
    tempi = torch.tensor([48.0, 60.0, 93.0, 128.0])
    for bpm, label in zip(tempi, tempo_labels(tempi), strict=True):
        assert tempo_bpm(label[None]) == pytest.approx(float(bpm), rel=0.02)  # measured 0.7 %
    assert TEMPI_BPM[0] > 40
    assert TEMPI_BPM[-1] < 160


# --- the notebook -------------------------------------------------------------------------------


def test_the_notebooks_distance_is_the_packages() -> None:
    path = Path(__file__).parents[1] / "notebooks/05_evaluate.ipynb"
    names = {"np": np}
    for cell in json.loads(path.read_text())["cells"]:
        if "idea" in cell["metadata"].get("tags", []):
            exec("".join(cell["source"]), names)
    rng = np.random.default_rng(0)
    a, b = rng.normal(size=(50, 6)), 1 + 2 * rng.normal(size=(40, 6))
    assert names["distance"](a, b) == pytest.approx(frechet(gaussian(a), gaussian(b)), rel=1e-9)


def test_the_pieces_of_the_small_corpus_are_held_out() -> None:
    for split, names in PIECES.items():
        assert [cached_piece(name).split for name in names] == [split] * len(names)


def test_what_no_time_is_left_for_is_named(world: argparse.Namespace, tmp_path: Path) -> None:
    words = ("--random", "tiny", "--methods", "BC", "--parts", tmp_path / "parts", "--minutes", "0")
    assert run(world, tmp_path / "out", *words) == 0
    result = json.loads((tmp_path / "out" / "evaluation.json").read_text())
    told = [text for text in result["not_measured"] if "no time left" in text]
    assert result["rows"] == result["drift"] == []
    units = ("from silence", "fading prompts", "long streams")
    assert told == [f"BC, 1 steps, {unit}: no time left (--minutes 0)" for unit in units]
    assert run(world, tmp_path / "out", *words[:-2]) == 0
    assert run(world, tmp_path / "again", *words) == 0  # what is there needs no time
    whole, again = (
        json.loads((tmp_path / name / "evaluation.json").read_text()) for name in ("out", "again")
    )
    assert without_timings(again)["rows"] == without_timings(whole)["rows"]
    assert again["drift"] == whole["drift"]
    assert len(again["rows"]) == len(again["fades"]) == 1
    assert "BC, 1 steps, from silence, timings: no time left" in "; ".join(again["not_measured"])


def test_an_earlier_result_is_extended_and_only_its_timings_are_made_again(
    world: argparse.Namespace, report: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*args: object, **kwargs: object) -> None:
        raise AssertionError("generated although the earlier result holds it")

    with monkeypatch.context() as patch:
        for name in ("generate", "long_stream", "fade_prompts"):
            patch.setattr(f"lmd.evaluation.run.{name}", refuse)
        words = ("--random", "tiny", "--methods", *MEASURED, "--parts", tmp_path / "parts")
        earlier = report / "evaluation.json"
        assert run(world, tmp_path / "out", *words, "--extend", earlier) == 0
    whole, extended = (
        json.loads((folder / "evaluation.json").read_text())
        for folder in (report, tmp_path / "out")
    )
    assert extended["extended"]["kept"] == 4  # two rows, a long stream, a fade
    assert (extended["drift"], extended["fades"]) == (whole["drift"], whole["fades"])
    for old, new in zip(whole["rows"], extended["rows"], strict=True):
        assert new | {"speed": None} == old | {"speed": None}
        assert new["speed"]["rtf"] != old["speed"]["rtf"]
    assert "4 of the lines' measures" in (tmp_path / "out" / "evaluation.md").read_text()
    # of one method, the other's lines are missing: they are measured, the rest is kept
    part = whole | {"rows": whole["rows"][1:]}
    (tmp_path / "part.json").write_text(json.dumps(part))
    assert run(world, tmp_path / "more", *words, "--extend", tmp_path / "part.json") == 0
    more = json.loads((tmp_path / "more" / "evaluation.json").read_text())
    assert more["extended"]["kept"] == 3
    known = Earlier.read(earlier, BUDGETS["smoke"])
    asked = planned([(METHODS[4], "random-tiny")], BUDGETS["smoke"])
    assert known.beyond(asked) == ["naive, 1 steps, from silence"]
    assert [r | {"speed": None} for r in more["rows"]] == [
        r | {"speed": None} for r in whole["rows"]
    ]


def test_several_processes_find_what_one_does_and_say_on_what(
    world: argparse.Namespace, report: Path, tmp_path: Path
) -> None:
    parts = tmp_path / "parts"
    words = ("--random", "tiny", "--methods", *MEASURED, "--parts", parts, "--no-timings")
    assert run(world, tmp_path / "out", *words, "--workers", "2") == 0
    one, several = (
        json.loads((folder / "evaluation.json").read_text())
        for folder in (report, tmp_path / "out")
    )
    for name in ("anchors", "drift", "fades", "made_on"):
        assert several[name] == one[name], name
    assert several["rows"] == [row | {"speed": None} for row in one["rows"]]
    assert sum("timings: not asked for" in text for text in several["not_measured"]) == 2
    for path in parts.glob("*/BC*.npz"):
        with np.load(path) as file:
            np.savez(path, **(dict(file) | {"made_on": np.array("an abacus")}))
    assert run(world, tmp_path / "again", *words) == 0
    told = (tmp_path / "again/evaluation.md").read_text()
    (here,) = one["made_on"]
    assert f"Music made on: {here} (here); an abacus; timed here." in told


def spoil(result: dict, *keys: str, value: object) -> dict:
    """The same with one value changed."""
    first, *rest = keys
    return result | {first: spoil(result[first], *rest, value=value) if rest else value}


@pytest.mark.parametrize(
    ("keys", "value", "told"),
    [
        (("recogniser", "sha256"), "0" * 64, "recogniser 0000"),
        (("reference_windows",), 1, "reference windows 1"),
        (("anchors", "codec", "fd", "mean"), 1e9, "fd 1e.09 of 'codec'"),
        (("budget", "n_clips"), 99, "'n_clips': 99"),
        (("budget", "n_seeds"), 99, "'n_seeds': 99"),
        (("budget",), None, "an evaluation"),
        (("anchors",), {}, "anchors"),
        (("anchors", "codec", "fd", "mean"), None, "fd nan of 'codec'"),
        (("anchors", "codec"), None, "an evaluation"),
    ],
)
def test_an_earlier_result_of_something_else_is_refused(
    world: argparse.Namespace,
    report: Path,
    tmp_path: Path,
    keys: tuple[str, ...],
    value: object,
    told: str,
) -> None:
    result = json.loads((report / "evaluation.json").read_text())
    (tmp_path / "other.json").write_text(json.dumps(spoil(result, *keys, value=value)))
    words = ("--random", "tiny", "--methods", *MEASURED, "--extend", tmp_path / "other.json")
    with pytest.raises(LmdError, match=told):
        run(world, tmp_path / "out", *words)
    assert not (tmp_path / "out").exists()


def test_the_telling_rows_come_first_and_the_naive_ones_last() -> None:
    units = [str(unit) for unit in planned([(m, "0") for m in METHODS], Budget())]
    assert len(units) == 5 * 4 * 2 + 4 * 4  # rows; a fade and long streams of 8, 4 and 2 steps
    assert units[0] == "ED, 8 steps, from silence"
    assert units.index("BC, 2 steps, long streams") < units.index("BC, 8 steps, primed")
    assert units[-1] == "naive, 50 steps, primed"
    euler = [str(unit) for unit in planned([(m, "0") for m in WITH_EULER], Budget())]
    assert len(euler) == 4 * 3
    assert {text.split(", ", 2)[2] for text in euler} == {"from silence"}
    assert not planned([(WITH_EULER[0], "0")], BUDGETS["quick"])
    with pytest.raises(LmdError, match="--methods BC-Euler; expected of naive, ED"):
        chosen_methods(["BC-Euler", "ED"], BUDGETS["quick"])


def test_long_streams_are_as_long_as_asked_for_and_of_every_count_of_steps() -> None:
    longer = with_long_streams(Budget(), 120.0, [8, 4])
    assert (longer.drift_s, longer.drift_steps) == (120.0, (8, 4))
    assert with_long_streams(Budget(), None, None) == Budget()
    streams = [u.n_steps for u in planned([(METHODS[2], "0")], longer) if u.kind == "drift"]
    assert streams == [8, 4]
    with pytest.raises(LmdError, match="drift-seconds 20"):
        with_long_streams(Budget(), 20.0, None)  # two measures make no slope
    with pytest.raises(LmdError, match="drift-steps 0"):
        with_long_streams(Budget(), None, [8, 0])
