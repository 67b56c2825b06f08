"""A person's own music: how it is read, levelled, trimmed, cut and kept."""

import hashlib
import itertools
import json
import os
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import soundfile
from audio_files import FORMATS, RATE, make_bad, tone, write

from lmd.__main__ import main
from lmd.corpus.build import BuildSettings
from lmd.corpus.levels import TARGET_LUFS, loudness_lufs
from lmd.corpus.manifest import Corpus, write_manifest
from lmd.data import own_audio
from lmd.data.check import fault, survey
from lmd.data.own_audio import build_audio, windows_of
from lmd.data.sound_files import AUDIO_SUFFIXES, load_segment, scan, sounding
from lmd.data.splits import with_splits
from lmd.errors import LmdError


@pytest.mark.parametrize("suffix", AUDIO_SUFFIXES)
def test_every_format_is_read(tmp_path: Path, suffix: str) -> None:
    how = {suffix: {"format": name} for suffix, name in FORMATS.items()}
    how[".opus"] = {"format": "OGG", "subtype": "OPUS"}
    rate = 48_000 if suffix == ".opus" else 44_100  # Opus knows no other
    path = tmp_path / f"in/a{suffix}"
    path.parent.mkdir()
    soundfile.write(path, tone(5, rate, 2), rate, **how.get(suffix, {}))
    assert fault(path) is None
    rows, _ = build_audio(tmp_path / "in", tmp_path / "out")
    assert [row.sample_rate for row in rows] == [RATE]


def test_names_in_any_script_are_welcome(tmp_path: Path) -> None:
    names = ["Übung Nr. 1.wav", "交響曲.flac", "песня – ♭.ogg", "sp ace'quote.wav"]
    for name in names:
        write(tmp_path / "音楽" / name, tone(5))
    report = survey(tmp_path)[1]
    assert sorted(p.name for p in report.accepted) == sorted(names)
    rows, _ = build_audio(tmp_path, tmp_path.parent / "corpus")
    assert len({row.name for row in rows}) == 4
    assert len(Corpus(tmp_path.parent / "corpus")) == 4


def test_a_long_file_is_taken_in_piece_by_piece(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Three hours take no more memory than a segment; here a segment is 10 s long."""
    monkeypatch.setattr(own_audio, "SEGMENT_S", 10.0)
    write(tmp_path / "in/long.wav", tone(47))
    sizes = []

    def noted(*args: object, **kwargs: object) -> np.ndarray:
        sizes.append(load_segment(*args, **kwargs).shape[-1])
        return load_segment(*args, **kwargs)

    monkeypatch.setattr(own_audio, "load_segment", noted)
    rows, _ = build_audio(tmp_path / "in", tmp_path / "out", BuildSettings(max_seconds=6.0))
    assert max(sizes) == round(9.4 * RATE)  # five equal stretches, no short remainder
    assert sum(row.n_samples for row in rows) == 47 * RATE
    assert max(row.duration_s for row in rows) <= 6
    assert len({row.piece_id for row in rows}) == 1


def test_more_than_five_percent_rejects_stop_the_build_with_the_list(tmp_path: Path) -> None:
    for number in range(18):
        write(tmp_path / f"in/{number}.wav", tone(4.5, hz=200 + 10 * number))
    make_bad(tmp_path / "in", "zero")
    rows, _ = build_audio(tmp_path / "in", tmp_path / "few")  # 19 files: one may be bad
    assert len(rows) == 18
    make_bad(tmp_path / "in", "text")
    with pytest.raises(LmdError, match=r"zero\.wav: empty file"):
        build_audio(tmp_path / "in", tmp_path / "out")
    assert not (tmp_path / "out").exists()
    rows, report = build_audio(tmp_path / "in", tmp_path / "out", keep_going=True)
    assert len(rows) == 18
    assert len(json.loads((tmp_path / "out/rejected.json").read_text())["rejected"]) == 2
    assert len(report.rejected) == 2
    (tmp_path / "in/text.wav").unlink()
    write(tmp_path / "in/18.wav", tone(4.5))  # 1 of 20 is 5 %: not more
    rows, _ = build_audio(tmp_path / "in", tmp_path / "out")
    assert len(rows) == 19


def test_music_arrives_resampled_at_the_stated_loudness(tmp_path: Path) -> None:
    loud, quiet = tone(6, 44_100, 2), 0.02 * tone(6, 48_000)
    write(tmp_path / "in/loud.wav", loud, 44_100)
    write(tmp_path / "in/quiet.wav", quiet, 48_000, subtype="FLOAT")
    for channels in (1, 2):
        out = tmp_path / f"out{channels}"
        build_audio(tmp_path / "in", out, BuildSettings(channels=channels))
        corpus = Corpus(out)
        for index in range(2):
            wave = corpus.wave(index)
            assert wave.shape == (channels, 6 * RATE)
            spectrum = np.abs(np.fft.rfft(wave[0]))
            assert np.argmax(spectrum) / 6 == pytest.approx(440, abs=0.5)
            # 16 bits and the limiter at the resampler's edges; measured: 0.02
            assert loudness_lufs(wave, RATE) == pytest.approx(TARGET_LUFS, abs=0.1)


def test_silences_are_trimmed_to_half_a_second_and_to_nothing_at_the_edges() -> None:
    steps = np.concatenate([np.full(n, level) for n, level in ((40, 0), (20, 1), (60, 1e-3))])
    steps = np.concatenate([steps, np.ones(20), np.zeros(20)])
    keep = sounding(steps, step_s=0.05)
    kept = [20, 10, 20]  # sound, half a second of silence, sound
    assert np.flatnonzero(keep).tolist() == [*range(40, 40 + sum(kept[:2])), *range(120, 140)]
    assert not sounding(np.zeros(20), 0.05).any()
    assert not len(sounding(np.zeros(0), 0.05))


@pytest.mark.parametrize("rate", [RATE, 44_100, 96_000])
def test_what_sounds_is_found_at_any_rate_and_from_any_place(tmp_path: Path, rate: int) -> None:
    parts = [0 * tone(2, rate), tone(1, rate), 0 * tone(3, rate), tone(1, rate), 0 * tone(1, rate)]
    scanned = scan(write(tmp_path / "a.wav", np.concatenate(parts), rate))
    assert scanned.n_samples == 8 * rate
    assert scanned.peak == pytest.approx(0.3, abs=1e-3)
    # Steps of 50 ms: each border is right to one step.
    assert scanned.sounding_s == pytest.approx(1 + 0.5 + 1, abs=0.15)
    whole = scanned.kept(8 * RATE, RATE)
    assert len(whole) == 8 * RATE
    assert whole.sum() / RATE == pytest.approx(scanned.sounding_s, abs=1e-3)
    cut = [scanned.kept(n * RATE, RATE, start_s) for start_s, n in ((0, 3), (3, 4), (7, 1))]
    assert np.array_equal(np.concatenate(cut), whole)


def test_sound_whose_channels_cancel_is_no_silence(tmp_path: Path) -> None:
    left = tone(12, RATE)
    right = left.copy()
    right[4 * RATE : 8 * RATE] *= -1
    scanned = scan(write(tmp_path / "wide.wav", np.concatenate([left, right], axis=1), RATE))
    assert scanned.sounding_s == pytest.approx(12, abs=0.05)


@pytest.mark.parametrize("seconds", [3.0, 1.4])
def test_a_long_file_keeps_its_dynamics_across_its_segments(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, seconds: float
) -> None:
    """Quiet at first, loud at last: one gain for all of it, however it is cut."""
    noise = 0.2 * np.random.default_rng(0).standard_normal(round(12.3 * RATE))
    noise[: 6 * RATE] *= 0.1
    noise[2 * RATE : round(5.6 * RATE)] = 0  # segments with too little sound to stand alone
    write(tmp_path / "in/a.wav", noise, subtype="FLOAT")
    found = []
    for name, segment_s in (("whole", 600.0), ("cut", seconds)):
        monkeypatch.setattr(own_audio, "SEGMENT_S", segment_s)
        rows, _ = build_audio(tmp_path / "in", tmp_path / name)
        corpus = Corpus(tmp_path / name)
        assert min(row.duration_s for row in rows) >= 1
        found.append(np.concatenate([corpus.wave(i)[0] for i in range(len(corpus))]))
    assert len(rows) > 2
    whole, cut = found
    assert len(cut) == len(whole)
    quiet, loud = slice(0, 2 * RATE), slice(3 * RATE, None)
    gains_db = [20 * np.log10(np.std(cut[part]) / np.std(whole[part])) for part in (quiet, loud)]
    assert gains_db[0] == pytest.approx(gains_db[1], abs=0.02)
    assert gains_db[1] == pytest.approx(0, abs=0.1)  # blocks over the borders are not measured
    assert 20 * np.log10(np.std(cut[loud]) / np.std(cut[quiet])) == pytest.approx(20, abs=0.1)


def test_windows_cover_everything_once_and_none_is_too_long() -> None:
    for seconds in (4, 9.9, 10.1, 25, 301):
        windows = windows_of(round(seconds * RATE), 10.0 * RATE)
        assert windows[0][0] == 0
        assert windows[-1][1] == round(seconds * RATE)
        assert all(a[1] == b[0] for a, b in itertools.pairwise(windows))
        assert max(end - start for start, end in windows) <= 10 * RATE + 1
    assert windows_of(0, 10.0 * RATE) == []


def test_a_second_run_takes_in_only_what_is_new(tmp_path: Path) -> None:
    for number in range(3):
        write(tmp_path / f"in/{number}.wav", tone(5, hz=300 + 50 * number))
    rows, _ = build_audio(tmp_path / "in", tmp_path / "out")
    stamps = {row.path: (tmp_path / "out" / row.path).stat().st_mtime_ns for row in rows}
    write(tmp_path / "in/new.wav", tone(5, hz=500))
    more, _ = build_audio(tmp_path / "in", tmp_path / "out")
    assert len(more) == 4
    assert all((tmp_path / "out" / p).stat().st_mtime_ns == t for p, t in stamps.items())
    assert "validation" in {row.split for row in more}
    with pytest.raises(LmdError, match="other channels"):
        build_audio(tmp_path / "in", tmp_path / "out", BuildSettings(channels=2))


def test_a_file_that_was_replaced_or_lost_is_taken_in_again(tmp_path: Path) -> None:
    source = write(tmp_path / "in/a.wav", tone(5, hz=440))
    (row,), _ = build_audio(tmp_path / "in", tmp_path / "out")
    write(source, tone(5, hz=880))  # of the same size
    os.utime(source, ns=(0, 0))
    (other,), _ = build_audio(tmp_path / "in", tmp_path / "out")
    assert other.sha256 != row.sha256
    made = tmp_path / "out" / other.path
    made.write_bytes(b"")
    build_audio(tmp_path / "in", tmp_path / "out")
    assert hashlib.sha256(made.read_bytes()).hexdigest() == other.sha256


def test_the_corpus_may_not_lie_in_the_folder_that_is_taken_in(tmp_path: Path) -> None:
    write(tmp_path / "in/a.wav", tone(5))
    for out in (tmp_path / "in", tmp_path / "in/corpus", tmp_path / "x/../in/corpus"):
        with pytest.raises(LmdError, match="take in its own output"):
            build_audio(tmp_path / "in", out)
    assert [path.name for path in (tmp_path / "in").iterdir()] == ["a.wav"]


@pytest.mark.parametrize("name", ["audio", "stems"])
def test_the_corpus_may_not_be_written_into_the_folder_that_is_taken_in(
    tmp_path: Path, name: str
) -> None:
    write(tmp_path / name / "a.wav", tone(5))
    with pytest.raises(LmdError, match="take in its own output"):
        build_audio(tmp_path / name, tmp_path)
    assert [path.name for path in tmp_path.rglob("*.*")] == ["a.wav"]


def test_the_same_music_under_several_names_is_in_one_split(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for number in range(12):
        source = write(tmp_path / f"in/{number}.wav", tone(2, hz=300 + 40 * number))
        write(tmp_path / f"in/copies/{number}.flac", soundfile.read(source)[0])
    (tmp_path / "in/linked.wav").symlink_to(tmp_path / "in/0.wav")
    rows, _ = build_audio(tmp_path / "in", tmp_path / "out")
    splits: dict[str, set[str]] = {}
    for row in rows:
        splits.setdefault(row.sha256, set()).add(row.split)
    assert [len(found) for found in splits.values()] == [1] * 12
    assert {row.split for row in rows} >= {"train", "validation"}
    main(["data", "build", "--audio", str(tmp_path / "in"), "--out", str(tmp_path / "out")])
    said = capsys.readouterr().out
    assert said.count("the same music") == 12
    assert f"0.wav, copies/0.flac, linked.wav ({rows[0].split})" in said


def test_music_that_is_there_already_keeps_its_split(tmp_path: Path) -> None:
    """Whatever is added, renamed, or was drawn in another way when it was taken in."""
    for number in range(4):
        write(tmp_path / f"in/{number}.wav", tone(2, hz=300 + 40 * number))
    rows, _ = build_audio(tmp_path / "in", tmp_path / "out")
    splits = dict(zip("0123", ("test", "train", "test", "validation"), strict=True))
    write_manifest(tmp_path / "out", [replace(row, split=splits[row.title]) for row in rows])
    (tmp_path / "in/0.wav").rename(tmp_path / "in/renamed.wav")
    write(tmp_path / "in/copy of 2.wav", tone(2, hz=380))
    write(tmp_path / "in/1.wav", tone(2, hz=700))  # other music under an old name
    rows, _ = build_audio(tmp_path / "in", tmp_path / "out")
    found = {row.title: row.split for row in rows}
    assert found == {"1": found["1"], "2": "test", "3": "validation"} | dict.fromkeys(
        ("renamed", "copy of 2"), "test"
    )
    assert found["1"] == "train"  # for otherwise there is nothing to train on
    for number in range(20):
        write(tmp_path / f"in/more-{number}.wav", tone(2, hz=800 + 40 * number))
    rows, _ = build_audio(tmp_path / "in", tmp_path / "out")
    assert {row.title: row.split for row in rows if "more" not in row.title} == found


def test_copies_in_several_splits_stay_there_and_new_ones_are_trained_on(tmp_path: Path) -> None:
    write(tmp_path / "in/a.wav", tone(5))
    (row,), _ = build_audio(tmp_path / "in", tmp_path / "out")
    before = [replace(row, piece_id=name, split=name) for name in ("train", "test")]
    rows = [replace(row, piece_id=name, split="") for name in ("test", "new", "train")]
    assert [one.split for one in with_splits(rows, before)] == ["test", "train", "train"]


def test_a_file_that_comes_back_brings_its_own_sound(tmp_path: Path) -> None:
    """Its first rows are in the log still, but the files of these names hold another sound."""
    source = write(tmp_path / "in/x.wav", tone(5, hz=440))
    os.utime(source, ns=(0, 0))
    first, _ = build_audio(tmp_path / "in", tmp_path / "out")
    write(source, tone(5, hz=880))  # of the same length
    build_audio(tmp_path / "in", tmp_path / "out")
    write(source, tone(5, hz=440))
    os.utime(source, ns=(0, 0))
    for _ in range(2):
        again, _ = build_audio(tmp_path / "in", tmp_path / "out")
        made = (tmp_path / "out" / again[0].path).read_bytes()
        assert again == first
        assert hashlib.sha256(made).hexdigest() == first[0].sha256


@pytest.mark.parametrize("rate", [44_101, 44_122, 44_056, 47_953, 22_051, 44_100, 48_000])
def test_music_at_any_rate_arrives_in_time_and_in_shape(tmp_path: Path, rate: int) -> None:
    path = write(tmp_path / "a.wav", tone(5, rate), rate, subtype="FLOAT")
    (wave,) = load_segment(path, RATE, 1)
    assert len(wave) == 5 * RATE
    # Measured 2e-5; at a rate off by a millionth the end would be 4e-3 off.
    assert np.abs(wave - tone(5)[:, 0])[200:-200].max() < 1e-4


@pytest.mark.parametrize("hz", [12_000, 13_000, 15_000, 20_000])
def test_what_lies_above_half_the_new_rate_is_gone(tmp_path: Path, hz: float) -> None:
    path = write(tmp_path / "a.wav", tone(4, 44_100, hz=hz), 44_100, subtype="FLOAT")
    level = np.std(load_segment(path, RATE, 1)[0, RATE:-RATE]) / np.std(tone(4))
    assert 20 * np.log10(level) < -60


@pytest.mark.parametrize("rate", [44_100, 48_000, 96_000])
@pytest.mark.parametrize("hz", [100, 5_000, 0.45 * RATE])
def test_what_lies_below_keeps_its_level(tmp_path: Path, rate: int, hz: float) -> None:
    path = write(tmp_path / "a.wav", tone(4, rate, hz=hz), rate, subtype="FLOAT")
    level = np.std(load_segment(path, RATE, 1)[0, RATE:-RATE]) / np.std(tone(4))
    assert 20 * np.log10(level) == pytest.approx(0, abs=0.05)


def test_channels_that_cancel_become_the_louder_one(tmp_path: Path) -> None:
    left = tone(3)
    path = write(tmp_path / "in/a.wav", np.concatenate([0.8 * left, -0.8 * left], axis=1))
    rows, report = build_audio(tmp_path / "in", tmp_path / "out")
    assert len(report.accepted) == len(rows) == 1
    assert loudness_lufs(Corpus(tmp_path / "out").wave(0), RATE) == pytest.approx(
        TARGET_LUFS, abs=0.1
    )
    write(path, np.concatenate([left, -0.98 * left], axis=1), subtype="FLOAT")
    assert np.allclose(load_segment(path, RATE, 1)[0], left[:, 0], atol=1e-6)
    write(path, np.concatenate([left, 0 * left], axis=1), subtype="FLOAT")
    assert np.allclose(load_segment(path, RATE, 1)[0], 0.5 * left[:, 0], atol=1e-6)
    assert not load_segment(write(path, 0 * tone(2, channels=2)), RATE, 1).any()


@pytest.mark.parametrize(
    "option",
    [
        *(("--max-seconds", value) for value in ("0", "nan", "-3", "inf")),
        *(("--sample-rate", value) for value in ("0", "-5", "300")),
    ],
)
@pytest.mark.parametrize("own", [True, False])
def test_a_mistaken_option_leaves_nothing_behind(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], option: tuple[str, str], own: bool
) -> None:
    write(tmp_path / "in/a.wav", tone(2))
    words = ["data", "build", "--out", str(tmp_path / "out"), *option]
    assert main([*words, *(["--audio", str(tmp_path / "in")] if own else [])]) == 2
    assert f"found {option[0]} {option[1]}" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("own", [True, False])
def test_a_corpus_where_a_file_is_gets_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], own: bool
) -> None:
    source = write(tmp_path / "in/a.wav", tone(2))
    for out in (source, source / "corpus"):
        words = ["data", "build", "--out", str(out)]
        assert main([*words, *(["--audio", str(tmp_path / "in")] if own else [])]) == 2
    assert capsys.readouterr().err


def test_there_is_always_something_to_train_on(tmp_path: Path) -> None:
    write(tmp_path / "in/a.wav", tone(5))
    (row,), _ = build_audio(tmp_path / "in", tmp_path / "out")
    for number in range(300):  # one in eight is drawn for validation or test
        alone = with_splits([replace(row, sha256=f"{number}", split="")])
        assert [one.split for one in alone] == ["train"]
        names = [f"{number}-{i}" for i in range(2)]
        pair = [replace(row, piece_id=name, sha256=name, split="") for name in names]
        assert sorted(one.split for one in with_splits(pair)) == ["train", "validation"]
        added = replace(row, piece_id="added", sha256=f"{number}", split="")
        assert [one.split for one in with_splits([row, added], [row])] == ["train", "validation"]
    kept = with_splits([row, replace(row, piece_id="own", split="test")])
    assert [one.split for one in kept] == ["train", "test"]


def test_the_build_command_takes_in_a_folder(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write(tmp_path / "in/a.wav", tone(5))
    words = ["data", "build", "--audio", str(tmp_path / "in"), "--out", str(tmp_path / "out")]
    assert main(words) == 0
    assert "1 windows of 1 files" in capsys.readouterr().out
    make_bad(tmp_path / "in", "text")
    for number in range(18):
        (tmp_path / f"in/{number}.wav").write_bytes(b"")
    assert main(words) == 2
    assert "text.wav" in capsys.readouterr().err
    assert main([*words, "--keep-going"]) == 0
    assert "text.wav" in capsys.readouterr().out
    with pytest.raises(LmdError, match="no stems"):
        Corpus(tmp_path / "out").stems(0)
    with pytest.raises(LmdError, match="no score"):
        Corpus(tmp_path / "out").notes(0)
