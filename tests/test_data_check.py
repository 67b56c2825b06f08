"""Which files of a folder are refused, and why."""

import errno
import json
import os
import re
import sys
from pathlib import Path

import numpy as np
import pytest
import soundfile
from audio_files import FORMATS, RATE, make_bad, tone, write

from lmd.__main__ import main
from lmd.data.check import fault, survey
from lmd.data.own_audio import build_audio
from lmd.data.sound_files import AUDIO_SUFFIXES, _frame_bytes, load_segment, scan
from lmd.errors import LmdError

BAD = {
    "zero": "empty file",
    "text": "unreadable as audio",
    "nan": "not finite",
    "short": "shorter than 1 s",
    "8khz": "8000 Hz",
    "7-channel": "7 channels",
    "silent": "silent",
    "hardly-a-sound": r"0\.3\d s of sound without its silences, under 1 s",
    "directory": "not a file",
    "broken-link": "link",
    "link-to-itself": "link",
    "packed-stems": "MUSDB18-HQ",
}


@pytest.mark.parametrize("kind", BAD)
def test_each_bad_file_is_refused_for_its_own_reason(tmp_path: Path, kind: str) -> None:
    path = make_bad(tmp_path, kind)
    write(tmp_path / "good.wav", tone(2))
    report = survey(tmp_path)[1]
    assert list(report.rejected) == [path]
    assert re.search(BAD[kind], report.rejected[path]), report.rejected[path]
    assert report.accepted == [tmp_path / "good.wav"]


WRITERS: dict[str, tuple[int, dict[str, str]]] = {  # rate, and what soundfile must be told
    suffix: (44_100, {}) for suffix in AUDIO_SUFFIXES
} | {
    **{suffix: (44_100, {"format": name}) for suffix, name in FORMATS.items()},
    ".opus": (48_000, {"format": "OGG", "subtype": "OPUS"}),
    ".rf64.wav": (44_100, {"format": "RF64"}),
}


def write_noise(path: Path, seconds: float = 4.0) -> Path:
    rate, how = WRITERS["".join(path.suffixes)]
    noise = np.random.default_rng(0).uniform(-0.5, 0.5, (round(seconds * rate), 1))
    return write(path, noise, rate, **how)


@pytest.mark.parametrize("share", [0.1, 0.5, 0.99])
@pytest.mark.parametrize("suffix", WRITERS)
def test_a_file_that_ends_early_is_refused(tmp_path: Path, suffix: str, share: float) -> None:
    path = write_noise(tmp_path / f"a{suffix}")
    assert fault(path) is None
    whole = path.read_bytes()
    path.write_bytes(whole[: round(share * len(whole))])
    assert re.match("truncated|unreadable as audio", fault(path) or "")


def test_an_mp3_without_a_header_does_not_say_how_long_it_was(tmp_path: Path) -> None:
    """What the documentation states as a limit: nothing in the file tells."""
    path = write_noise(tmp_path / "a.mp3")
    data = path.read_bytes().replace(b"Xing", bytes(4)).replace(b"Info", bytes(4))
    path.write_bytes(data[: len(data) // 2])
    assert fault(path) is None
    assert soundfile.info(path).duration < 3


def test_a_flac_that_does_not_tell_its_length_has_a_reason_of_its_own(tmp_path: Path) -> None:
    """As encoders leave it that write to a pipe."""
    path = write_noise(tmp_path / "a.flac")
    data = bytearray(path.read_bytes())
    data[21] &= 0xF0  # the number of samples: 36 bits of the first block
    data[22:26] = bytes(4)
    path.write_bytes(data)
    assert fault(path) == "its header does not tell how long it is: encode it again (flac, ffmpeg)"


def test_the_check_accepts_what_the_build_takes_in_and_nothing_else(tmp_path: Path) -> None:
    waves = {"short": tone(0.9), "brief": tone(1.5), "long": tone(6)}
    pauses = np.concatenate([tone(0.3), 0 * tone(2)] * 4)
    for name, wave in {**waves, "pauses": pauses, "hardly": pauses[: 2 * RATE]}.items():
        write(tmp_path / f"in/{name}.wav", wave)
    checked = survey(tmp_path / "in")[1]
    rows, built = build_audio(tmp_path / "in", tmp_path / "out", keep_going=True)
    assert [path.stem for path in checked.accepted] == ["brief", "long", "pauses"]
    assert sorted(row.title for row in rows) == ["brief", "long", "pauses"]
    assert built == checked
    assert json.loads((tmp_path / "out/rejected.json").read_text()) == built.as_dict()
    for number in range(15):
        write(tmp_path / f"in/short{number}.wav", waves["short"])
    with pytest.raises(LmdError, match=r"17 of 20 files rejected:\n .*hardly\.wav: 0\.3\d s"):
        build_audio(tmp_path / "in", tmp_path / "out")


def test_a_file_that_may_not_be_opened_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write(tmp_path / "mine.wav", tone(2))
    path.chmod(0)
    if os.access(path, os.R_OK):  # nothing is forbidden to an administrator
        real = Path.open

        def refuse(self: Path, *args: object) -> object:
            if self == path:
                raise PermissionError(errno.EACCES, "Permission denied", str(self))
            return real(self, *args)

        monkeypatch.setattr(Path, "open", refuse)
    assert survey(tmp_path)[1].rejected == {path: "unreadable as audio: Permission denied"}


def test_a_folder_that_may_not_be_opened_is_reported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(tmp_path / "a.wav", tone(2))
    (tmp_path / "closed").mkdir()
    real = os.scandir

    def scandir(path: str) -> object:
        if Path(path) == tmp_path / "closed":
            raise PermissionError(errno.EACCES, "Permission denied", path)
        return real(path)

    monkeypatch.setattr(os, "scandir", scandir)
    report = survey(tmp_path)[1]
    assert report.accepted == [tmp_path / "a.wav"]
    assert report.rejected == {tmp_path / "closed": "folder cannot be opened: Permission denied"}


def test_a_symlink_loop_is_reported_once_and_ends(tmp_path: Path) -> None:
    write(tmp_path / "album/a.wav", tone(2))
    (tmp_path / "album/again").symlink_to(tmp_path)
    report = survey(tmp_path)[1]
    assert report.accepted == [tmp_path / "album/a.wav"]
    ((path, reason),) = report.rejected.items()
    assert path.name == "again"
    assert "symlink loop" in reason


def test_a_folder_linked_twice_is_read_once(tmp_path: Path) -> None:
    write(tmp_path / "a/x.wav", tone(2))
    (tmp_path / "b").symlink_to(tmp_path / "a")
    report = survey(tmp_path)[1]
    assert len(report.accepted) == 1
    assert not report.rejected


def test_a_three_hour_file_is_accepted(tmp_path: Path) -> None:
    path = write(tmp_path / "three_hours.wav", tone(2, 16_000), 16_000)
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
    assert json.loads(out.read_text()) == {"accepted": [str(good)], "rejected": [], "not_read": {}}
    bad = make_bad(tmp_path / "in", "zero")
    assert main(["data", "check", str(tmp_path / "in"), "--json", str(out)]) == 1
    assert json.loads(out.read_text()) == {
        "accepted": [str(good)],
        "rejected": [{"path": str(bad), "reason": "empty file (0 bytes)"}],
        "not_read": {},
    }
    assert "1 accepted, 1 rejected" in capsys.readouterr().out
    before = good.read_bytes()
    caption = good.with_suffix(".json")
    caption.write_text('{"caption": "an air"}')
    for place in (tmp_path, good / "report.json", good, caption, Path(__file__)):
        assert main(["data", "check", str(tmp_path / "in"), "--json", str(place)]) == 2
        assert "accepted" not in capsys.readouterr().out
    assert good.read_bytes() == before
    assert "air" in caption.read_text()
    assert main(["data", "check", str(tmp_path / "nowhere")]) == 2


def test_music_in_a_format_that_cannot_be_read_is_reported(tmp_path: Path) -> None:
    write(tmp_path / "in/a.wav", tone(2))
    (tmp_path / "in/b.m4a").write_bytes(b"ftyp")
    (tmp_path / "in/cover.jpg").write_bytes(b"picture")
    report = survey(tmp_path / "in")[1]
    reason = ".m4a cannot be read: convert it to WAV or FLAC"
    assert report.rejected == {tmp_path / "in/b.m4a": reason}


def test_kinds_that_are_passed_over_are_counted_by_name(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write(tmp_path / "in/a.wav", tone(2))
    for name in ("a.mid", "b.MID", "c.mp4", "d.webm", "cover.jpg", "a.txt"):
        (tmp_path / "in" / name).write_bytes(b"data")
    assert main(["data", "check", str(tmp_path / "in")]) == 0
    assert "4 files of kinds not read (.mid 2, .mp4 1, .webm 1)" in capsys.readouterr().out


@pytest.mark.parametrize("names", [(), ("a.mid", "b.mid"), ("cover.jpg",)])
def test_a_folder_without_music_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], names: tuple[str, ...]
) -> None:
    for name in names:
        (tmp_path / name).write_bytes(b"data")
    for words in (["check", str(tmp_path)], ["build", "--audio", str(tmp_path)]):
        assert main(["data", *words, *(["--out", f"{tmp_path}-out"] * (len(words) > 2))]) == 2
        told = capsys.readouterr().err
        assert f"no music in {tmp_path}" in told
        assert (".mid 2" in told) == (len(names) == 2)


@pytest.mark.parametrize("words", [["check", ""], ["build", "--audio", ""]])
def test_an_empty_name_is_not_the_folder_one_stands_in(
    words: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["data", *words]) == 2
    assert "found ''; expected a folder" in capsys.readouterr().err


@pytest.mark.parametrize(
    "words",
    [
        *(f"data {name}" for name in ("build", "encode")), "evaluate", "export", "convert folder",
        *(f"train {name}" for name in ("codec", "base", "finetune", "distill", "arc")),
    ],
)  # fmt: skip
def test_an_empty_out_is_not_the_folder_one_stands_in(
    words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit, match="2"):
        main([*words.split(), "--out", ""])
    said = " ".join(capsys.readouterr().err.replace("│", " ").split())
    assert "Error parsing --out: found ''; expected a file or folder" in said


def without_xing(path: Path) -> bytes:
    """An MP3's frames alone."""
    data = path.read_bytes()
    return data[_frame_bytes(data, 0) :]


@pytest.mark.parametrize("rate", [22_050, 44_100, 48_000])
@pytest.mark.parametrize("mode", ["VARIABLE", "CONSTANT"])
@pytest.mark.parametrize("around", [(b"", b""), (b"ID3\x04\0\0\0\0\2\0" + bytes(256), b"TAG" * 42)])
def test_an_mp3_without_a_xing_header_is_read_to_its_end(
    tmp_path: Path, rate: int, mode: str, around: tuple[bytes, bytes]
) -> None:
    noise = np.random.default_rng(0).uniform(-0.3, 0.3, (3 * rate, 1)).astype(np.float32)
    pauses = np.concatenate([noise, 1e-4 * tone(9, rate)] * 2)  # few bytes, much time
    path = write(tmp_path / "a.mp3", pauses, rate, bitrate_mode=mode, compression_level=0.5)
    whole = load_segment(path, rate, 1)[0]
    path.write_bytes(around[0] + without_xing(path) + around[1])
    assert fault(path) is None
    found = load_segment(path, rate, 1)[0]
    # The encoder's delay, and what fills its last frame, are in the header that is gone.
    assert len(whole) <= len(found) < len(whole) + 4000
    assert abs(scan(path).n_samples - len(found)) == 0
    late = np.argmax(np.correlate(found[: 12_000 + 3000], whole[:12_000], "valid"))
    assert np.abs(found[late : late + len(whole) - 3000] - whole[:-3000]).max() < 1e-5
    part = load_segment(path, rate, 1, 12.5, 2.0)[0]
    assert np.abs(part - found[round(12.5 * rate) :][: 2 * rate]).max() < 1e-5


def announce_more(path: Path, n_samples: int) -> None:
    """Let the last page of an Ogg file end later than its sound does."""
    data = bytearray(path.read_bytes())
    page = data.rindex(b"OggS")
    end = int.from_bytes(data[page + 6 : page + 14], "little") + n_samples
    data[page + 6 : page + 14] = end.to_bytes(8, "little")
    data[page + 22 : page + 26] = bytes(4)
    crc = 0
    for byte in data[page:]:
        crc ^= byte << 24
        for _ in range(8):
            crc = (crc << 1 ^ (0x04C11DB7 if crc >> 31 else 0)) & 0xFFFFFFFF
    data[page + 22 : page + 26] = crc.to_bytes(4, "little")
    path.write_bytes(data)


@pytest.mark.parametrize(("missing", "is_fine"), [(10, True), (400, True), (4800, False)])
def test_an_opus_file_may_lack_some_milliseconds(
    tmp_path: Path, missing: int, is_fine: bool
) -> None:
    path = write_noise(tmp_path / "a.opus")
    announce_more(path, missing)
    assert (soundfile.info(path).frames - scan(path).n_samples > 0) or is_fine
    assert (fault(path) is None) == is_fine


@pytest.mark.parametrize("seconds", [4, 25])
def test_gsm_in_a_wav_is_taken_in(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, seconds: int
) -> None:
    """It can be read from its beginning on alone."""
    monkeypatch.setattr("lmd.data.own_audio.SEGMENT_S", 10.0)
    write(tmp_path / "in/gsm.wav", tone(seconds, 44_100), 44_100, subtype="GSM610")
    rows, report = build_audio(tmp_path / "in", tmp_path / "out")
    assert not report.rejected
    assert sum(row.duration_s for row in rows) == pytest.approx(seconds, abs=0.05)


@pytest.mark.parametrize("error", [ValueError("odd"), MemoryError(), OSError(5, "bad sector")])
def test_whatever_a_file_raises_while_it_is_taken_in_is_its_own_reject(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    for name in ("a", "bad", "c"):
        write(tmp_path / f"in/{name}.wav", tone(2, hz=200 + 50 * len(name)))

    def load(path: Path, **how: object) -> np.ndarray:
        if path.stem == "bad":
            raise error
        return load_segment(path, **how)

    monkeypatch.setattr("lmd.data.own_audio.load_segment", load)
    rows, report = build_audio(tmp_path / "in", tmp_path / "out")
    assert [row.title for row in rows] == ["a", "c"]
    assert list(report.rejected) == [tmp_path / "in/bad.wav"]
    assert report.rejected[tmp_path / "in/bad.wav"].startswith("unreadable as audio: ")
    assert json.loads((tmp_path / "out/rejected.json").read_text())["rejected"]


@pytest.mark.skipif(sys.platform != "linux", reason="only there a name may be any bytes")
def test_a_name_that_is_not_utf8_is_refused_and_can_be_printed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = write(tmp_path / "in/x.wav", tone(2))
    os.rename(path, os.fsencode(path.parent) + b"/M\xfcsic.wav")
    assert main(["data", "check", str(tmp_path / "in")]) == 1
    assert "M\\xfcsic.wav: its name is not valid UTF-8" in capsys.readouterr().out
