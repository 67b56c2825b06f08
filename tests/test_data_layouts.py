"""How music lies in a folder: stem layouts of data sets, captions beside the sound."""

import re
from pathlib import Path

import numpy as np
import pytest
import soundfile
import yaml
from audio_files import RATE, tone, write

from lmd.__main__ import main
from lmd.corpus.build import BuildSettings
from lmd.corpus.captions import stem_caption
from lmd.corpus.manifest import Corpus
from lmd.data.check import survey
from lmd.data.layouts import caption_of
from lmd.data.own_audio import build_audio
from lmd.data.splits import songs_of


def make_slakh(track: Path, suffix: str = ".flac", rate: int = 44_100) -> Path:
    """A made-up track as Slakh2100 (flac, 44.1 kHz) or BabySlakh (wav, 16 kHz) keeps it."""
    parts = {"S00": tone(5, rate, hz=110), "S01": tone(5, rate, hz=660), "S02": 0 * tone(5, rate)}
    for name, wave in parts.items():
        write(track / f"stems/{name}{suffix}", 0.5 * wave, rate)
    write(track / f"mix{suffix}", 0.5 * sum(parts.values()), rate)
    stems = {
        "S00": {"inst_class": "Bass", "is_drum": False, "program_num": 33},
        "S01": {"inst_class": "Piano", "is_drum": False, "program_num": 0},
        "S02": {"inst_class": "Drums", "is_drum": True, "program_num": 128},
        "S03": {"inst_class": "Guitar", "is_drum": False, "program_num": 27},
    }
    for name, stem in stems.items():
        stem |= {"audio_rendered": name in parts, "midi_saved": True, "plugin_name": "none.nkm"}
        stem |= {"midi_program_name": stem["inst_class"], "integrated_loudness": -20.0}
        midi = track / f"MIDI/{name}.mid"
        midi.parent.mkdir(exist_ok=True)
        midi.write_bytes(b"MThd")
    about = {"UUID": "1a81ae092884234f3264e2f45927f00a", "audio_dir": "stems", "midi_dir": "MIDI"}
    about |= {"normalized": True, "normalization_factor": -13.0, "overall_gain": 0.5}
    about |= {"target_peak": -1.0, "stems": stems}
    (track / "metadata.yaml").write_text(yaml.safe_dump(about))
    (track / "all_src.mid").write_bytes(b"MThd")
    return track


@pytest.mark.parametrize(
    ("place", "suffix", "rate", "split"),
    [
        ("slakh2100_flac_redux/train", ".flac", 44_100, "train"),
        ("slakh2100_flac_redux/validation", ".flac", 44_100, "validation"),
        ("babyslakh_16k", ".wav", 16_000, ""),
    ],
)
def test_slakh_tracks_bring_their_named_stems_and_their_split(
    tmp_path: Path, place: str, suffix: str, rate: int, split: str
) -> None:
    make_slakh(tmp_path / "in" / place / "Track00001", suffix, rate)
    tracks, _ = survey(tmp_path / "in")
    assert [track.split for track in tracks] == [split]
    rows, report = build_audio(tmp_path / "in", tmp_path / "out", BuildSettings(stems=True))
    assert not report.rejected
    assert [(row.instruments, row.split) for row in rows] == [
        ("bass|piano|drums", split or "train")
    ]
    corpus = Corpus(tmp_path / "out")
    stems = corpus.stems(0)
    assert stems.shape == (3, 1, 5 * RATE)
    # Stems keep the mix's gain: their sum is the mix (16 bits: a step per file on either side).
    assert np.abs(stems.sum(0) - corpus.wave(0)).max() < 12 / 32767
    said = stem_caption(rows[0], 1)
    assert "piano" in said
    assert not re.search("BPM|slow|fast|melody|voice", said)  # nobody knows
    assert rows[0].caption == "bass, drums, piano"


def test_a_slakh_track_that_lacks_an_announced_stem_is_rejected(tmp_path: Path) -> None:
    track = make_slakh(tmp_path / "in/train/Track00001")
    (track / "stems/S01.flac").unlink()
    write(tmp_path / "in/other.wav", tone(5))
    _, report = build_audio(tmp_path / "in", tmp_path / "out")
    assert list(report.rejected) == [track / "mix.flac"]
    assert "S01.flac" in report.rejected[track / "mix.flac"]


@pytest.mark.parametrize("torn", ["stems: {S00: [", "- a list", "stems: \xff"])
def test_a_slakh_track_with_a_torn_description_is_rejected(tmp_path: Path, torn: str) -> None:
    track = make_slakh(tmp_path / "in/train/Track00001")
    (track / "metadata.yaml").write_bytes(torn.encode("latin-1"))
    write(tmp_path / "in/other.wav", tone(5))
    rows, report = build_audio(tmp_path / "in", tmp_path / "out", BuildSettings(), keep_going=True)
    assert [row.path for row in rows] != []
    assert any("cannot be read" in reason for reason in report.rejected.values())


def test_musdb_tracks_bring_four_stems(tmp_path: Path) -> None:
    song = tmp_path / "in/test/Some Band - Some Song"
    names = ("drums", "bass", "other", "vocals")
    parts = [0.3 * tone(5, 44_100, 2, hz) for hz in (150, 300, 450)] + [0 * tone(5, 44_100, 2)]
    for name, wave in zip(names, parts, strict=True):
        write(song / f"{name}.wav", wave, 44_100)
    write(song / "mixture.wav", sum(parts), 44_100)
    rows, report = build_audio(
        tmp_path / "in", tmp_path / "out", BuildSettings(channels=2, stems=True)
    )
    assert not report.rejected  # silent vocals are no fault
    assert [(row.instruments, row.split) for row in rows] == [("drums|bass|other|vocals", "test")]
    assert rows[0].caption == "Some Band Some Song"
    corpus = Corpus(tmp_path / "out")
    assert np.abs(corpus.stems(0).sum(0) - corpus.wave(0)).max() < 4 / 32767


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


def tagged(path: Path, **tags: bytes) -> Path:
    """A FLAC file with these bytes as its tags."""
    with soundfile.SoundFile(path, "w", RATE, 1) as file:
        for name, value in tags.items():
            setattr(file, name, name.upper()[0] * len(value))
        file.write(tone(2))
    data = path.read_bytes()
    for name, value in tags.items():
        placeholder = name.upper().encode()[:1] * len(value)
        assert data.count(b"=" + placeholder) == 1
        data = data.replace(b"=" + placeholder, b"=" + value)
    path.write_bytes(data)
    return path


@pytest.mark.parametrize(
    ("text", "encoding"),
    [
        ("Übung für Flöte", "latin-1"),
        ("Bézier – “été”", "cp1252"),
        ("交響曲第九番", "cp932"),
        ("ドラゴンの歌 Op. 3", "cp932"),
        ("Übung für 交響曲", "utf-8"),
    ],
)
def test_tags_and_sidecars_are_read_in_the_encoding_they_have(
    tmp_path: Path, text: str, encoding: str
) -> None:
    path = tagged(tmp_path / "x.flac", title=text.encode(encoding))
    assert caption_of(path) == text
    path.with_suffix(".txt").write_bytes(text.encode(encoding))
    assert caption_of(path) == text


def test_shift_jis_that_was_taken_for_latin_1_is_read(tmp_path: Path) -> None:
    spoilt = "ドラゴンの歌".encode("cp932").decode("latin-1").encode()
    assert caption_of(tagged(tmp_path / "x.flac", title=spoilt)) == "ドラゴンの歌"


@pytest.mark.parametrize(
    "comment",
    [
        "Encoded with LAME 3.100", "Lavf58.76.100", "Exact Audio Copy   (Secure mode)",
        "Visit https://band.bandcamp.com", "00001A2B 00001C3D 000076F1", "Processed by SoX",
        "Ripped by me", "Downloaded from www.music.example", "(c) 2009 A Label", "320 kbps",
        "0", "-", "Track 1",
    ],
)  # fmt: skip
def test_what_programs_write_into_tags_is_no_caption(tmp_path: Path, comment: str) -> None:
    path = tagged(tmp_path / "x.flac", comment=comment.encode())
    assert caption_of(path) == caption_of(write(tmp_path / "plain.flac", tone(2)))
    tagged(path, title=b"Track 07", genre=b"Other", comment=comment.encode())
    assert caption_of(path) == caption_of(tmp_path / "plain.flac")
    tagged(path, title=b"An air", genre=b"folk", comment=b"slow, played on a whistle")
    assert caption_of(path) == "folk, An air, slow, played on a whistle"


def test_captions_are_shown_after_a_build_with_their_windows_counted(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for number in range(3):
        write(tmp_path / f"in/slow airs/{number}.wav", tone(2, hz=300 + 40 * number))
    write(tmp_path / "in/jigs/x.wav", tone(2))
    main(["data", "build", "--audio", str(tmp_path / "in"), "--out", str(tmp_path / "out")])
    told = capsys.readouterr().out
    assert "captions (windows):\n     3 slow airs\n     1 jigs\n" in told
    assert "song.txt beside song.wav" in told


def test_a_song_and_its_stems_side_by_side_share_a_split(tmp_path: Path) -> None:
    hz = iter(range(200, 2000, 20))
    for number in range(12):
        for name in ("song", "guitar", "02_drums"):
            write(tmp_path / f"in/{number}/{name}.ogg", tone(2, hz=next(hz)))
        write(tmp_path / f"in/Air {number}.ogg", tone(2, hz=next(hz)))
        write(tmp_path / f"in/Air {number} (vocals).ogg", tone(2, hz=next(hz)))
    rows, _ = build_audio(tmp_path / "in", tmp_path / "out")
    splits: dict[str, set[str]] = {}
    for row, song in ((row, songs_of([r.piece_id for r in rows])[row.piece_id]) for row in rows):
        splits.setdefault(song, set()).add(row.split)
    assert len(splits) == 24
    assert all(len(found) == 1 for found in splits.values())
    assert {row.split for row in rows} >= {"train", "validation"}


def test_which_files_are_one_song() -> None:
    def songs(*names: str) -> int:
        return len(set(songs_of([f"album/{name}" for name in names]).values()))

    assert songs("song.ogg", "guitar.ogg") == 1
    assert songs("The Title.ogg", "guitar.ogg", "01 drums.ogg") == 1
    assert songs("The Title.ogg", "The Title - bass.wav", "Other Title.ogg") == 2
    assert songs("one.ogg", "two.ogg", "guitar.ogg") == 3
    assert songs("song1.wav", "song2.wav", "mix 1.wav", "mix 2.wav", "Track 3.wav") == 5


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
    tracks, report = survey(tmp_path / "in")
    assert (tracks, report.accepted) == ([], [])
    assert "x.json is not JSON" in report.rejected[path]
    assert main(["data", "check", str(tmp_path / "in")]) == 1


@pytest.mark.parametrize("name", ["utf-16-le", "utf-16-be"])
@pytest.mark.parametrize(("suffix", "text"), [(".txt", "{}"), (".json", '{{"caption": "{}"}}')])
def test_sidecars_in_utf16_are_read(tmp_path: Path, name: str, suffix: str, text: str) -> None:
    path = write(tmp_path / "in/x.wav", tone(5))
    path.with_suffix(suffix).write_bytes(("\ufeff" + text.format("ein Flötenstück")).encode(name))
    assert caption_of(path) == "ein Flötenstück"


@pytest.mark.parametrize("name", ["utf-16-le", "utf-32"])
@pytest.mark.parametrize("suffix", [".txt", ".json"])
def test_a_sidecar_that_is_no_text_is_reported(tmp_path: Path, name: str, suffix: str) -> None:
    path = write(tmp_path / "in/x.wav", tone(5))
    path.with_suffix(suffix).write_bytes(b'"slow piano"'.decode().encode(name))
    _, report = survey(tmp_path / "in")
    assert f"NUL in x{suffix}; expected a text in UTF-8" in report.rejected[path]


def test_half_a_character_in_a_sidecar_does_not_stop_the_build(tmp_path: Path) -> None:
    path = write(tmp_path / "in/x.wav", tone(5))
    path.with_suffix(".json").write_text(r'{"caption": "an air \ud83d\u0000 \ud83c\udfb5"}')
    build_audio(tmp_path / "in", tmp_path / "out")
    assert Corpus(tmp_path / "out").rows[0].caption == "an air ? 🎵"


def test_a_text_beside_stems_makes_them_no_stems(tmp_path: Path) -> None:
    write(tmp_path / "in/stems/a.wav", tone(5))
    (tmp_path / "in/mix.txt").write_text("songs")
    tracks, report = survey(tmp_path / "in")
    assert [track.mix.name for track in tracks] == ["a.wav"]
    write(tmp_path / "in/stems/silent.wav", 0 * tone(5))
    assert list(survey(tmp_path / "in")[1].rejected.values()) == ["silent"]
    write(tmp_path / "in/mix.WAV", tone(5))
    tracks, report = survey(tmp_path / "in")
    assert ([track.mix.name for track in tracks], report.rejected) == (["mix.WAV"], {})
