"""A person's own music: what is taken in, what is refused and why, and stem layouts."""

import hashlib
import itertools
import json
import os
import re
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import soundfile
import yaml

from lmd.__main__ import main
from lmd.data import audio, check
from lmd.data.audio import AudioSettings, build_audio, sounding, windows_of, with_splits
from lmd.data.build import row_stem_caption
from lmd.data.check import check_folder, fault
from lmd.data.corpus import Corpus
from lmd.data.layouts import caption_of, survey
from lmd.data.levels import TARGET_LUFS, loudness_lufs
from lmd.errors import LmdError

RATE = 22_050


def tone(seconds: float, rate: int = RATE, channels: int = 1, hz: float = 440) -> np.ndarray:
    wave = 0.3 * np.sin(2 * np.pi * hz * np.arange(round(seconds * rate)) / rate)
    return np.repeat(wave[:, None], channels, axis=1).astype(np.float32)


def write(path: Path, wave: np.ndarray, rate: int = RATE, **kwargs: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    soundfile.write(path, wave, rate, **kwargs)
    return path


def nan_wave() -> np.ndarray:
    wave = tone(2)
    wave[1000] = np.nan
    return wave


def make_bad(folder: Path, kind: str) -> Path:
    """A file of a certain fault."""
    path = folder / f"{kind}.wav"
    folder.mkdir(parents=True, exist_ok=True)
    if kind == "zero":
        path.write_bytes(b"")
    elif kind == "text":
        path.write_text("these are words, not sound\n" * 50)
    elif kind in ("truncated", "truncated-flac"):
        path = path.with_suffix(".flac" if "flac" in kind else ".wav")
        write(path, np.random.default_rng(0).uniform(-0.5, 0.5, (4 * RATE, 1)))
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    elif kind == "directory":
        path.mkdir()
    elif kind == "broken-link":
        path.symlink_to(folder / "nowhere.wav")
    elif kind == "link-to-itself":
        path.symlink_to(path)
    elif kind == "packed-stems":
        path = folder / "song.stem.mp4"
        path.write_bytes(b"\0" * 100)
    else:
        waves = {
            "nan": (nan_wave(), RATE, "FLOAT"),
            "short": (tone(0.1), RATE, "PCM_16"),
            "8khz": (tone(2, 8000), 8000, "PCM_16"),
            "7-channel": (tone(2, channels=7), RATE, "PCM_16"),
            "silent": (0 * tone(2), RATE, "PCM_16"),
        }
        wave, rate, subtype = waves[kind]
        write(path, wave, rate, subtype=subtype)
    return path


BAD = {
    "zero": "empty file",
    "text": "unreadable as audio",
    "truncated": "truncated",
    "truncated-flac": "truncated|unreadable",
    "nan": "not finite",
    "short": "shorter than 1 s",
    "8khz": "8000 Hz",
    "7-channel": "7 channels",
    "silent": "silent",
    "directory": "not a file",
    "broken-link": "link",
    "link-to-itself": "link",
    "packed-stems": "MUSDB18-HQ",
}


@pytest.mark.parametrize("kind", BAD)
def test_each_bad_file_is_refused_for_its_own_reason(tmp_path: Path, kind: str) -> None:
    import re

    path = make_bad(tmp_path, kind)
    write(tmp_path / "good.wav", tone(2))
    report = check_folder(tmp_path, progress=False)
    assert [item.path for item in report.rejected] == [path]
    assert re.search(BAD[kind], report.rejected[0].reason), report.rejected[0].reason
    assert report.accepted == [tmp_path / "good.wav"]


@pytest.mark.parametrize("suffix", check.AUDIO_SUFFIXES)
def test_every_format_is_read(tmp_path: Path, suffix: str) -> None:
    how = {".aif": {"format": "AIFF"}, ".opus": {"format": "OGG", "subtype": "OPUS"}}
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
    report = check_folder(tmp_path, progress=False)
    assert sorted(p.name for p in report.accepted) == sorted(names)
    rows, _ = build_audio(tmp_path, tmp_path.parent / "corpus")
    assert len({row.name for row in rows}) == 4
    assert len(Corpus(tmp_path.parent / "corpus")) == 4


def test_a_symlink_loop_is_reported_once_and_ends(tmp_path: Path) -> None:
    write(tmp_path / "album/a.wav", tone(2))
    (tmp_path / "album/again").symlink_to(tmp_path)
    report = check_folder(tmp_path, progress=False)
    assert report.accepted == [tmp_path / "album/a.wav"]
    assert [(r.path.name, "symlink loop" in r.reason) for r in report.rejected] == [("again", True)]


def test_a_folder_linked_twice_is_read_once(tmp_path: Path) -> None:
    write(tmp_path / "a/x.wav", tone(2))
    (tmp_path / "b").symlink_to(tmp_path / "a")
    report = check_folder(tmp_path, progress=False)
    assert len(report.accepted) == 1
    assert not report.rejected


def test_a_long_file_is_taken_in_piece_by_piece(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Three hours take no more memory than a segment; here a segment is 10 s long."""
    monkeypatch.setattr(audio, "SEGMENT_S", 10.0)
    write(tmp_path / "in/long.wav", tone(47))
    sizes = []
    real = audio.load_segment
    monkeypatch.setattr(
        audio, "load_segment", lambda *args: (sizes.append(len((w := real(*args))[0])), w)[1]
    )
    rows, _ = build_audio(tmp_path / "in", tmp_path / "out", AudioSettings(window_s=6.0))
    assert max(sizes) == round(9.4 * RATE)  # five equal stretches, no short remainder
    assert sum(row.n_samples for row in rows) == 47 * RATE
    assert max(row.duration_s for row in rows) <= 6
    assert len({row.piece_id for row in rows}) == 1


def test_a_three_hour_file_is_accepted(tmp_path: Path) -> None:
    path = write(tmp_path / "three_hours.wav", tone(1, 16_000), 16_000)
    n_bytes = 3 * 3600 * 16_000 * 2
    with path.open("r+b") as file:  # a sparse file: two seconds of tone, then zeros
        file.truncate(44 + n_bytes)
        file.seek(4)
        file.write((36 + n_bytes).to_bytes(4, "little"))
        file.seek(40)
        file.write(n_bytes.to_bytes(4, "little"))
    assert soundfile.info(path).duration == pytest.approx(3 * 3600)
    assert fault(path) is None


def test_the_report_is_json_and_the_status_says_if_anything_was_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    good = write(tmp_path / "in/good.wav", tone(2))
    out = tmp_path / "report.json"
    assert main(["data", "check", str(tmp_path / "in"), "--json", str(out)]) == 0
    assert json.loads(out.read_text()) == {"accepted": [str(good)], "rejected": []}
    bad = make_bad(tmp_path / "in", "zero")
    assert main(["data", "check", str(tmp_path / "in"), "--json", str(out)]) == 1
    assert json.loads(out.read_text()) == {
        "accepted": [str(good)],
        "rejected": [{"path": str(bad), "reason": "empty file (0 bytes)"}],
    }
    assert "1 accepted, 1 rejected" in capsys.readouterr().out
    assert main(["data", "check", str(tmp_path / "nowhere")]) == 2


def test_more_than_five_percent_rejects_stop_the_build_with_the_list(tmp_path: Path) -> None:
    for number in range(18):
        write(tmp_path / f"in/{number}.wav", tone(4.5, hz=200 + 10 * number))
    make_bad(tmp_path / "in", "zero")
    with pytest.raises(LmdError, match=r"zero\.wav: empty file"):
        build_audio(tmp_path / "in", tmp_path / "out")
    assert not (tmp_path / "out").exists()
    rows, report = build_audio(tmp_path / "in", tmp_path / "out", keep_going=True)
    assert len(rows) == 18
    assert len(json.loads((tmp_path / "out/rejected.json").read_text())["rejected"]) == 1
    assert len(report.rejected) == 1
    write(tmp_path / "in/18.wav", tone(4.5))  # 1 of 20 is 5 %: not more
    rows, _ = build_audio(tmp_path / "in", tmp_path / "out")
    assert len(rows) == 19


def test_music_arrives_resampled_at_the_stated_loudness(tmp_path: Path) -> None:
    loud, quiet = tone(6, 44_100, 2), 0.02 * tone(6, 48_000)
    write(tmp_path / "in/loud.wav", loud, 44_100)
    write(tmp_path / "in/quiet.wav", quiet, 48_000, subtype="FLOAT")
    for channels in (1, 2):
        out = tmp_path / f"out{channels}"
        build_audio(tmp_path / "in", out, AudioSettings(channels=channels))
        corpus = Corpus(out)
        for index in range(2):
            wave = corpus.wave(index)
            assert wave.shape == (channels, 6 * RATE)
            spectrum = np.abs(np.fft.rfft(wave[0]))
            assert np.argmax(spectrum) / 6 == pytest.approx(440, abs=0.5)
            # 16 bits and the limiter at the resampler's edges; measured: 0.02
            assert loudness_lufs(wave, RATE) == pytest.approx(TARGET_LUFS, abs=0.1)


def test_silences_are_trimmed_to_half_a_second_and_to_nothing_at_the_edges() -> None:
    wave = np.concatenate([np.zeros(2 * RATE), tone(1)[:, 0], np.zeros(3 * RATE), tone(1)[:, 0]])
    wave = np.concatenate([wave, np.zeros(RATE)])[None].astype(np.float32)
    keep = sounding(wave, RATE)
    assert keep.shape == (8 * RATE,)
    # Steps of 50 ms: each border is right to one step.
    assert keep.sum() / RATE == pytest.approx(1 + 0.5 + 1, abs=0.15)
    assert not keep[: 2 * RATE - RATE // 20].any()
    assert not sounding(np.zeros((1, RATE), np.float32), RATE).any()


def test_windows_cover_everything_once_and_none_is_too_long() -> None:
    settings = AudioSettings(window_s=10.0)
    for seconds in (4, 9.9, 10.1, 25, 301):
        windows = windows_of(round(seconds * RATE), settings)
        assert windows[0][0] == 0
        assert windows[-1][1] == round(seconds * RATE)
        assert all(a[1] == b[0] for a, b in itertools.pairwise(windows))
        assert max(end - start for start, end in windows) <= 10 * RATE + 1
    assert windows_of(3 * RATE, settings) == []


def test_captions_come_from_text_then_json_then_tags_then_the_folder(tmp_path: Path) -> None:
    path = write(tmp_path / "slow_piano-pieces/x.flac", tone(2))
    assert caption_of(path) == "slow piano pieces"
    with soundfile.SoundFile(path, "w", RATE, 1) as file:
        file.genre, file.title = "Baroque", "Air"
        file.write(tone(2))
    assert caption_of(path) == "Baroque, Air"
    path.with_suffix(".json").write_text('{"prompt": "a  slow\\n air"}')
    assert caption_of(path) == "a slow air"
    path.with_suffix(".json").write_text('{"prompt": "an air"}', "utf-8-sig")  # as Windows writes
    assert caption_of(path) == "an air"
    path.with_suffix(".txt").write_text("an air\nfor strings\n", "utf-8-sig")
    assert caption_of(path) == "an air for strings"


def test_the_folder_one_stands_in_has_a_name_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(tmp_path / "slow_piano/x.wav", tone(5))
    (tmp_path / "slow_piano/inner").mkdir()
    monkeypatch.chdir(tmp_path / "slow_piano")
    assert caption_of(Path("x.wav")) == "slow piano"
    monkeypatch.chdir("inner")
    assert caption_of(Path("../x.wav")) == "slow piano"


def test_a_sidecar_that_is_no_json_is_reported(tmp_path: Path) -> None:
    path = write(tmp_path / "in/x.wav", tone(5))
    path.with_suffix(".json").write_text('{"caption": "an air",}')
    tracks, report = survey(tmp_path / "in", progress=False)
    assert (tracks, report.accepted) == ([], [])
    assert "x.json is not JSON" in report.rejected[0].reason
    assert main(["data", "check", str(tmp_path / "in")]) == 1


def test_music_in_a_format_that_cannot_be_read_is_reported(tmp_path: Path) -> None:
    write(tmp_path / "in/a.wav", tone(2))
    (tmp_path / "in/b.m4a").write_bytes(b"ftyp")
    (tmp_path / "in/cover.jpg").write_bytes(b"picture")
    report = check_folder(tmp_path / "in", progress=False)
    assert [(r.path.name, r.reason) for r in report.rejected] == [
        ("b.m4a", ".m4a cannot be read: convert it to WAV or FLAC")
    ]


@pytest.mark.skipif(sys.platform != "linux", reason="only there a name may be any bytes")
def test_a_name_that_is_not_utf8_is_refused_and_can_be_printed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = write(tmp_path / "in/x.wav", tone(2))
    os.rename(path, os.fsencode(path.parent) + b"/M\xfcsic.wav")
    assert main(["data", "check", str(tmp_path / "in")]) == 1
    assert "M\\xfcsic.wav: its name is not valid UTF-8" in capsys.readouterr().out


def make_slakh(root: Path) -> Path:
    """A made-up track in the layout of Slakh2100 (BabySlakh lacks the split folder)."""
    track = root / "train/Track00001"
    parts = {"S00": tone(5, hz=110), "S01": tone(5, hz=660), "S02": 0 * tone(5)}
    for name, wave in parts.items():
        write(track / f"stems/{name}.flac", 0.5 * wave)
    write(track / "mix.flac", 0.5 * sum(parts.values()))
    about = {
        "UUID": "1a81ae092884234f3264e2f45927f00a",
        "stems": {
            "S00": {"inst_class": "Bass", "program_num": 33, "audio_rendered": True},
            "S01": {"inst_class": "Piano", "program_num": 0, "audio_rendered": True},
            "S02": {"inst_class": "Drums", "is_drum": True, "audio_rendered": True},
            "S03": {"inst_class": "Guitar", "audio_rendered": False},
        },
    }
    (track / "metadata.yaml").write_text(yaml.safe_dump(about))
    (track / "all_src.mid").write_bytes(b"MThd")
    return track


def test_slakh_tracks_bring_their_named_stems_and_their_split(tmp_path: Path) -> None:
    make_slakh(tmp_path / "in")
    rows, report = build_audio(tmp_path / "in", tmp_path / "out", AudioSettings(stems=True))
    assert not report.rejected
    assert [(row.instruments, row.split) for row in rows] == [("bass|piano|drums", "train")]
    corpus = Corpus(tmp_path / "out")
    stems = corpus.stems(0)
    assert stems.shape == (3, 1, 5 * RATE)
    # Stems keep the mix's gain: their sum is the mix (16 bits: a step per stem, one for the mix).
    assert np.abs(stems.sum(0) - corpus.wave(0)).max() < 3 / 32767
    said = row_stem_caption(rows[0], 1)
    assert "piano" in said
    assert not re.search("BPM|slow|fast|melody|voice", said)  # nobody knows
    assert rows[0].caption == "bass, drums, piano"


def test_a_slakh_track_that_lacks_an_announced_stem_is_rejected(tmp_path: Path) -> None:
    track = make_slakh(tmp_path / "in")
    (track / "stems/S01.flac").unlink()
    write(tmp_path / "in/other.wav", tone(5))
    with pytest.raises(LmdError, match=r"S01\.flac"):
        build_audio(tmp_path / "in", tmp_path / "out")


@pytest.mark.parametrize("torn", ["stems: {S00: [", "- a list", "stems: \xff"])
def test_a_slakh_track_with_a_torn_description_is_rejected(tmp_path: Path, torn: str) -> None:
    track = make_slakh(tmp_path / "in")
    (track / "metadata.yaml").write_bytes(torn.encode("latin-1"))
    write(tmp_path / "in/other.wav", tone(5))
    rows, report = build_audio(tmp_path / "in", tmp_path / "out", AudioSettings(), keep_going=True)
    assert [row.path for row in rows] != []
    assert any("cannot be read" in reject.reason for reject in report.rejected)


def test_musdb_tracks_bring_four_stems(tmp_path: Path) -> None:
    song = tmp_path / "in/test/Some Band - Some Song"
    names = ("drums", "bass", "other", "vocals")
    parts = [0.3 * tone(5, 44_100, 2, hz) for hz in (150, 300, 450)] + [0 * tone(5, 44_100, 2)]
    for name, wave in zip(names, parts, strict=True):
        write(song / f"{name}.wav", wave, 44_100)
    write(song / "mixture.wav", sum(parts), 44_100)
    rows, report = build_audio(
        tmp_path / "in", tmp_path / "out", AudioSettings(channels=2, stems=True)
    )
    assert not report.rejected  # silent vocals are no fault
    assert [(row.instruments, row.split) for row in rows] == [("drums|bass|other|vocals", "test")]
    assert rows[0].caption == "Some Band Some Song"
    corpus = Corpus(tmp_path / "out")
    assert np.abs(corpus.stems(0).sum(0) - corpus.wave(0)).max() < 4 / 32767


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
    with pytest.raises(LmdError, match="another way"):
        build_audio(tmp_path / "in", tmp_path / "out", AudioSettings(channels=2))


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


def test_a_track_with_too_little_sound_is_reported(tmp_path: Path) -> None:
    write(tmp_path / "in/long.wav", tone(5))
    short = write(tmp_path / "in/short.wav", tone(2.5))
    with pytest.raises(LmdError, match="1 of 2 files rejected"):
        build_audio(tmp_path / "in", tmp_path / "out")
    rows, report = build_audio(tmp_path / "in", tmp_path / "out", keep_going=True)
    assert [row.title for row in rows] == ["long"]
    assert [(r.path, r.reason) for r in report.rejected] == [
        (short, "under 4 s of sound without its silences")
    ]
    assert "short.wav" in (tmp_path / "out/rejected.json").read_text()


def test_there_is_always_something_to_train_on(tmp_path: Path) -> None:
    write(tmp_path / "in/a.wav", tone(5))
    (row,), _ = build_audio(tmp_path / "in", tmp_path / "out")
    for number in range(300):  # one in eight is drawn for validation or test
        alone = with_splits([replace(row, piece_id=f"{number}", split="")])
        assert [one.split for one in alone] == ["train"]
        pair = [replace(row, piece_id=f"{number}-{i}", split="") for i in range(2)]
        assert sorted(one.split for one in with_splits(pair)) == ["train", "validation"]
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
    assert main(words) == 2
    assert "text.wav" in capsys.readouterr().err
    assert main([*words, "--keep-going"]) == 0
    assert "text.wav" in capsys.readouterr().out
    with pytest.raises(LmdError, match="no stems"):
        Corpus(tmp_path / "out").stems(0)
