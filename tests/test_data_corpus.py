"""A built corpus: the same bytes every time, resumable, split by piece, stems played again."""

import errno
import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
from audio_files import tone, write
from corpus_fake import make_corpus

from lmd.__main__ import main
from lmd.corpus.analysis import find_key
from lmd.corpus.build import BuildSettings, build_corpus, plan
from lmd.corpus.levels import limit
from lmd.corpus.manifest import COLUMNS, Corpus, read_manifest, write_wav
from lmd.corpus.render import sum_stems
from lmd.corpus.scores import Shelf
from lmd.errors import LmdError
from lmd.outputs import check_folder

SETTINGS = BuildSettings(collections=("corelli", "ciconia", "luca"), max_seconds=6.0)
HOURS = 18 / 3600


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory, cache: Path) -> Path:
    out = tmp_path_factory.mktemp("corpus")
    build_corpus(out, HOURS, SETTINGS, cache=cache)
    return out


def contents(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def test_two_builds_are_equal_to_the_byte(built: Path, cache: Path, tmp_path: Path) -> None:
    build_corpus(tmp_path, HOURS, SETTINGS, cache=cache)
    assert contents(tmp_path) == contents(built)


@pytest.mark.slow
def test_two_processes_build_what_one_builds(built: Path, cache: Path, tmp_path: Path) -> None:
    build_corpus(tmp_path, HOURS, SETTINGS, workers=2, cache=cache)
    assert contents(tmp_path) == contents(built)


def test_what_was_built_before_a_piece_was_known_as_a_version_is_trained_on(
    built: Path, cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = shutil.copytree(built, tmp_path / "corpus")
    log, piece = folder / "rows.jsonl", Corpus(built).rows[0].piece_id
    log.write_text(log.read_text().replace('"split": "train"', '"split": "test"'))
    monkeypatch.setattr("lmd.corpus.build.TRAINED_ON", {piece})
    build_corpus(folder, HOURS, SETTINGS, cache=cache)
    splits = {row.piece_id: row.split for row in Corpus(folder).rows}
    assert splits.pop(piece) == "train"
    assert "train" not in splits.values()


def test_an_interrupted_build_goes_on_and_ends_the_same(
    built: Path, cache: Path, tmp_path: Path
) -> None:
    build_corpus(tmp_path, HOURS / 2, SETTINGS, cache=cache)
    rows = Corpus(tmp_path).rows
    assert 0 < len(rows) < len(Corpus(built))
    torn = tmp_path / rows[0].path
    torn.write_bytes(torn.read_bytes()[:-100])
    untouched = tmp_path / rows[1].path
    before = untouched.stat().st_mtime_ns
    with (tmp_path / "rows.jsonl").open("a") as log:
        log.write('5\n{"name": "x"}\n{"name": "cut of')  # the kill came in the middle of a line
    build_corpus(tmp_path, HOURS, SETTINGS, cache=cache)
    assert untouched.stat().st_mtime_ns == before
    new, old = contents(tmp_path), contents(built)
    new.pop("rows.jsonl"), old.pop("rows.jsonl")  # a log: it also remembers the torn line
    assert new == old


def test_more_hours_extend_the_plan_and_change_nothing_of_it(cache: Path) -> None:
    shelf = Shelf(SETTINGS.collections, cache)
    names = [
        [(piece.piece_id, n) for piece, n in plan(shelf, hours, SETTINGS)]
        for hours in (HOURS, 3 * HOURS)
    ]
    assert names[1][: len(names[0])] == names[0]
    assert len(set(names[1])) == len(names[1]) > len(names[0])
    assert {n for _, n in names[1][:3]} == {0}  # every piece once before any comes again


def test_no_more_scores_are_parsed_than_are_likely_to_be_needed(cache: Path, monkeypatch) -> None:
    shelf, asked = Shelf(SETTINGS.collections, cache), []
    pieces = shelf.pieces

    def noted(piece_ids):
        asked.append(len(piece_ids))
        return pieces(piece_ids)

    monkeypatch.setattr(shelf, "pieces", noted)
    assert 1 <= len(plan(shelf, SETTINGS.max_seconds / 2 / 3600, SETTINGS)) <= 3
    assert asked == [3]


def test_fewer_hours_than_there_are_change_nothing(cache: Path, tmp_path: Path) -> None:
    build_corpus(tmp_path, 2 * HOURS, SETTINGS, cache=cache)
    before = contents(tmp_path)
    build_corpus(tmp_path, HOURS, SETTINGS, cache=cache)
    assert contents(tmp_path) == before


@pytest.mark.slow
def test_no_piece_is_in_two_splits(cache: Path, tmp_path: Path) -> None:
    """Over seeds and renditions, as the manifests that were written say."""
    found: dict[str, set[str]] = {}
    n_rows = 0
    for seed in range(2):
        # 9 pieces, one of them for validation, one for tests
        settings = BuildSettings(seed=seed, max_seconds=2.0, collections=("haydn",))
        build_corpus(tmp_path / str(seed), 1 / 60, settings, cache=cache)
        for row in read_manifest(tmp_path / str(seed)):
            found.setdefault(row.piece_id, set()).add(row.split)
            n_rows += 1
    assert n_rows > 2 * len(found)
    assert all(len(splits) == 1 for splits in found.values())
    assert set.union(*found.values()) == {"train", "validation", "test"}


def test_pandas_opens_the_manifest_and_every_row_is_true(built: Path) -> None:
    table = pd.read_csv(built / "manifest.csv")
    assert tuple(table.columns) == COLUMNS
    corpus = Corpus(built)
    for index, row in enumerate(corpus.rows):
        wave = corpus.wave(index)
        assert wave.shape == (1, row.n_samples)
        assert row.duration_s == pytest.approx(row.n_samples / row.sample_rate, abs=1e-4)
        assert 0.02 < np.abs(wave).max() <= 0.951
        assert row.caption
        assert len(row.instruments.split("|")) >= 1


def test_stems_played_again_give_the_stored_mix_to_the_bit(built: Path, cache: Path) -> None:
    corpus = Corpus(built)
    for index in range(len(corpus)):
        stems = corpus.stems(index, cache)
        wave = limit(sum_stems(stems), corpus.sample_rate)
        assert np.array_equal(np.round(wave * 32767), np.round(corpus.wave(index) * 32767))


def test_the_notes_are_those_that_the_voices_play(built: Path, cache: Path) -> None:
    """A voice sounds from the first of its notes on, and is silent before."""
    corpus = Corpus(built)
    for index, row in enumerate(corpus.rows):
        notes, stems = corpus.notes(index, cache), corpus.stems(index, cache)
        assert np.array_equal(notes, corpus.play_again(index, cache).notes)
        assert set(notes[:, 3]) <= set(range(len(stems)))
        for voice, stem in enumerate(stems):
            own = notes[notes[:, 3] == voice]
            first = round(own[:, 0].min() * row.sample_rate) if len(own) else stem.shape[-1]
            assert not stem[:, :first].any()
            assert bool(stem[:, first : first + row.sample_rate].any()) == bool(len(own))
        assert find_key(notes[:, 2], notes[:, 1]) == (row.key, row.mode)


def test_stored_stems_are_those_played_again_in_16_bits(cache: Path, tmp_path: Path) -> None:
    settings = BuildSettings(collections=("corelli",), max_seconds=4.0, stems=True)
    build_corpus(tmp_path, 3 / 3600, settings, cache=cache)
    corpus = Corpus(tmp_path)
    stored = corpus.stems(0, cache)
    assert stored.shape[0] == 3
    row = corpus.rows[0]
    object.__setattr__(row, "stem_paths", "")
    # Half a step of 16 bits, and 1/32767 of it for the clipping that loud stems may meet.
    assert np.abs(stored - np.clip(corpus.stems(0, cache), -1, 1)).max() < 0.51 / 32767


def test_a_window_costs_no_more_than_its_samples_and_ends_in_silence(built: Path) -> None:
    corpus = Corpus(built)
    whole = corpus.wave(0)
    assert np.array_equal(corpus.wave(0, 1000, 500), whole[:, 1000:1500])
    tail = corpus.wave(0, whole.shape[1] - 10, 30)
    assert np.array_equal(tail[:, :10], whole[:, -10:])
    assert not tail[:, 10:].any()


def test_another_seed_in_the_same_folder_is_refused(built: Path, cache: Path) -> None:
    with pytest.raises(LmdError, match="other seed"):
        build_corpus(built, HOURS, BuildSettings(**{**vars(SETTINGS), "seed": 1}), cache=cache)


def test_a_torn_wave_is_named(built: Path, tmp_path: Path) -> None:
    for name, data in contents(built).items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(data)
    row = Corpus(tmp_path).rows[0]
    (tmp_path / row.path).write_bytes(b"")
    with pytest.raises(LmdError, match=row.path):
        Corpus(tmp_path).wave(0)


def test_missing_things_are_said(tmp_path: Path) -> None:
    with pytest.raises(LmdError, match="data build"):
        Corpus(tmp_path)
    (tmp_path / "manifest.csv").write_text("a,b\n1,2\n")
    with pytest.raises(LmdError, match="columns"):
        read_manifest(tmp_path)
    with pytest.raises(LmdError, match="hours"):
        build_corpus(tmp_path / "x", 0, SETTINGS)


@pytest.mark.parametrize(
    ("damage", "told"),
    [
        (lambda text: "", r"manifest\.csv, line 1: it ends"),
        (lambda text: text[:-1], r"line 4: it ends in the middle"),
        (lambda text: text[:-9], r"line 4: 25 of 26 values"),
        (lambda text: text[: text.rindex(",")], r"line 4: "),
        (lambda text: text + "\n", r"line 5: "),
        (lambda text: text.replace("22050", "many", 1), r"line 2: invalid literal .*'many'"),
        (lambda text: text.replace("r1", '"r1', 1), r"line \d+: "),
        (lambda text: text[:400] + "\0\udcff" + text[400:], r"manifest\.csv, line 1: .*0xff"),
    ],
)
def test_a_torn_manifest_is_refused_with_its_line(tmp_path: Path, damage, told: str) -> None:
    path = make_corpus(tmp_path, n_rows=3).folder / "manifest.csv"
    path.write_bytes(damage(path.read_text()).encode(errors="surrogateescape"))
    with pytest.raises(LmdError, match=told):
        Corpus(tmp_path)


@pytest.mark.parametrize("text", ["", "{", "[1]", "null", "[" * 100_000, "\x80"])
def test_torn_settings_are_refused(tmp_path: Path, text: str) -> None:
    corpus = make_corpus(tmp_path, n_rows=3)
    (tmp_path / "corpus.json").write_text(text, "latin-1")
    with pytest.raises(LmdError, match=r"corpus\.json"):
        corpus.settings()
    with pytest.raises(LmdError, match=r"corpus\.json"):
        build_corpus(tmp_path, HOURS, SETTINGS)


@pytest.mark.parametrize("name", ["/etc", "../corpus", ".", "bach/..", "bach/chorales", ""])
def test_a_path_is_no_collection(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    assert main(["data", "build", "--out", str(tmp_path / "x"), "--collections", name]) == 2
    assert f"found collection {name!r}" in capsys.readouterr().err
    assert not (tmp_path / "x").exists()


@pytest.mark.parametrize("own", [True, False])
def test_a_full_disk_is_said_in_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], own: bool
) -> None:
    write(tmp_path / "in/a.wav", tone(2))
    words = ["data", "build", "--out", str(tmp_path / "out"), "--hours", "0.001"]
    words += ["--audio", str(tmp_path / "in")] if own else ["--cache", str(tmp_path / "cache")]

    def refuse(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device", "a.wav")

    monkeypatch.setattr("lmd.corpus.manifest.write_wav", refuse)
    assert main(words) == 2
    (line,) = [x for x in capsys.readouterr().err.splitlines() if x.startswith("lmd data build")]
    assert "a.wav: No space left on device" in line


def test_a_disk_that_is_too_small_or_closed_is_refused_before_the_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    write(tmp_path / "in/a.wav", tone(2))
    monkeypatch.setattr("shutil.disk_usage", lambda _: SimpleNamespace(free=10**9))
    assert main(["data", "build", "--out", str(out), "--hours", "10"]) == 2
    assert "1.00 GB free" in capsys.readouterr().err
    assert not out.exists()
    for words in (["--hours", "0.001"], ["--audio", str(tmp_path / "in")]):
        assert main(["data", "build", "--out", "/proc/out", *words]) == 2
        assert "expected a folder that can be written" in capsys.readouterr().err


def test_what_an_interrupted_build_left_needs_no_room_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with (tmp_path / "half.wav").open("wb") as file:
        file.truncate(2 * 10**9)  # a sparse file
    monkeypatch.setattr("shutil.disk_usage", lambda _: SimpleNamespace(free=10**9))
    check_folder(tmp_path, 3 * 10**9)
    with pytest.raises(LmdError, match=r"1\.00 GB free .* expected about 1\.10 GB more"):
        check_folder(tmp_path, 31 * 10**8)


def test_16_bit_files_hold_what_was_given(tmp_path: Path) -> None:
    import soundfile

    wave = np.random.default_rng(0).uniform(-1, 1, (2, 500)).astype(np.float32)
    write_wav(tmp_path / "a.wav", wave, 8000)
    read, rate = soundfile.read(tmp_path / "a.wav", dtype="int16")
    assert rate == 8000
    assert np.array_equal(read.T, np.round(wave * 32767))


def test_the_command_builds_and_counts(
    cache: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["data", "build", "--out", str(tmp_path), "--hours", str(1 / 3600)]
    words += ["--collections", "ciconia", "--max-seconds", "4", "--cache", str(cache)]
    assert main(words) == 0
    assert "1 renditions of 1 pieces" in capsys.readouterr().out
    assert json.loads((tmp_path / "corpus.json").read_text())["seed"] == 0
    assert main([*words, "--soundfont", "missing.sf2"]) == 2
    assert "missing.sf2" in capsys.readouterr().err
