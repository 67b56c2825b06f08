"""`lmd stream` and `lmd replay` as a person runs them: files, interrupts, full disks, refusals."""

import json
import os
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import soundfile

from lmd.__main__ import main
from lmd.errors import LmdError
from lmd.outputs import check_outputs, write_json
from lmd.play.takes import play_again, read_take
from lmd.pretrained import open_instrument

TINY = ["--preset", "tiny", "--steps", "1", "--block-frames", "8"]


def lmd(*words: str | Path, **options: object) -> subprocess.CompletedProcess:
    """A command as a process of its own, to its end."""
    command = [sys.executable, "-m", "lmd", *map(str, words)]
    return subprocess.run(
        command, capture_output=True, text=True, timeout=300, check=False, **options
    )


def test_a_stream_whose_blocks_cannot_be_played_ends_with_status_1(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise LmdError("nothing", "music", "None.")

    monkeypatch.setattr("lmd.stream.streamer.Streamer.step", refuse)
    words = ["stream", "organ", "--preset", "tiny", "--seconds", "2", "-o", str(tmp_path / "x.wav")]
    assert main(words) == 1


def test_streaming_from_the_command_line_writes_sound_take_and_numbers(tmp_path: Path) -> None:
    wav, take, numbers = (tmp_path / name for name in ("out.flac", "out.jsonl", "out.json"))
    words = ["stream", "organ", "--preset", "tiny", "--seconds", "5", "-o", wav, "--take", take]
    words += ["--json", numbers, "--steps", "2", "--block-frames", "24"]
    assert main([str(word) for word in words]) == 0
    samples, rate = soundfile.read(wav)
    assert samples.size == 5 * rate
    summary = json.loads(numbers.read_text())
    assert summary["meters"]["underruns"] == 0
    assert summary["source"] == read_take(take).header.source
    assert summary["rtf_all"] > 0


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["organ"], "nowhere to play to"),
        (["organ", "-o", "x.mp3", "--seconds", "1"], "the file name 'x.mp3'"),
        (["organ", "-o", "x.wav", "--seconds", "0"], "--seconds 0"),
        (["organ", "-o", "x.wav", "--seconds", "1e-9"], "--seconds 1e-09"),
        (["organ", "-o", "x.wav", "--block-frames", "7"], "a block of 7 frames"),
        (["organ", "-o", "x.wav", "--source", "magic"], "source 'magic'"),
        (["organ", "-o", "x.wav", "--source", "random:huge:0"], "preset 'huge'"),
        (["", "-o", "x.wav", "--cfg-scale", "3"], "with no text"),
        (["organ", "--play", "--paced"], "both --paced and --play"),
        (["organ", "-o", "x.wav", "--take", "x.jsonl", "--steps", "100"], "n_steps = 100"),
        (["organ", "-o", ".wav", "--paced", "--take", "x.jsonl"], "the file name '.wav'"),
        (["organ", "-o", "x.wav", "--source", "random:tiny:0:codec"], "the shipped codec is not"),
        (["organ", "-o", "x.wav", "--source", "random:tiny:²"], "random:PRESET:SEED"),
        (["harp\udcff", "-o", "x.wav", "--take", "x.jsonl"], "surrogates not allowed"),
    ],
)
def test_the_command_line_refuses_in_one_line(
    words: list[str],
    said: str,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["stream", "--preset", "tiny", *words]) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert said in error
    assert "expected" in error
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("where", [["-o", "out.flac"], ["--paced"]])
def test_an_interrupted_stream_says_so_in_one_line_and_its_take_is_whole(
    where: list[str], tmp_path: Path
) -> None:
    words = ["stream", "organ", *TINY, "--seconds", "80000", "--take", "take.jsonl", *where]
    command = [sys.executable, "-m", "lmd", *words, "--json", "numbers.json"]
    take_path, deadline = tmp_path / "take.jsonl", time.monotonic() + 120
    with subprocess.Popen(command, cwd=tmp_path, stderr=subprocess.PIPE, text=True) as process:
        while not take_path.exists() or '"blocks"' not in take_path.read_text():
            assert process.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.05)
        process.send_signal(signal.SIGINT)
        _, said = process.communicate(timeout=60)
    assert process.returncode == 130, said
    assert "Traceback" not in said
    assert said.strip().splitlines()[-1].startswith("lmd stream: interrupted")
    take = read_take(take_path)
    assert take.sha256 is not None
    assert json.loads((tmp_path / "numbers.json").read_text())["meters"]["state"] == "stopped"
    if where[0] == "-o":
        assert soundfile.info(tmp_path / "out.flac").frames == take.n_samples
    again = play_again(take, open_instrument(take.header.source).streamer)
    assert sum(samples.shape[-1] for samples in again) == take.n_samples


def test_every_command_ends_an_interrupt_in_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupt(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("lmd.play.replay.read_take", interrupt)
    assert main(["replay", "take.jsonl"]) == 130
    assert capsys.readouterr().err == "lmd replay: interrupted\n"


@pytest.mark.parametrize(
    "words",
    [
        ["-o", "x.wav", "--take", "x.wav"],
        ["-o", "x.wav", "--json", "./x.wav"],
        ["--paced", "--take", "x.jsonl", "--json", "x.jsonl"],
        ["-o", "song.wav", "--take", "link.wav"],
    ],
)
def test_two_outputs_in_one_file_are_refused(
    words: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("song.wav").write_bytes(b"a recording")
    Path("link.wav").symlink_to("song.wav")
    assert main(["stream", "organ", *TINY, *words]) == 2
    assert "two places" in capsys.readouterr().err
    assert Path("song.wav").read_bytes() == b"a recording"
    assert len(list(tmp_path.iterdir())) == 2


@pytest.mark.parametrize(
    "content", [b"RIFF\0\0\0\0WAVE", b"# notes", b'{"a": 1}\n{"b": 2}\n', b"3"]
)
def test_numbers_never_replace_a_file_that_is_no_json(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "song.wav"
    path.write_bytes(content)
    words = ["stream", "organ", *TINY, "--paced", "--seconds", "1"]
    assert main([*words, "--json", str(path)]) == 2
    assert path.read_bytes() == content
    for fine in ("", '{"rtf_all": 1}'):
        path.write_text(fine)
        check_outputs(json=path)


def test_a_refused_stream_leaves_every_file_as_it_was(tmp_path: Path) -> None:
    wav, take = tmp_path / "x.wav", tmp_path / "x.jsonl"
    wav.write_bytes(b"music")
    take.write_text("a take")
    words = ["stream", "organ", *TINY, "-o", str(wav), "--take", str(take)]
    assert main(words) == 2  # a take is never replaced
    assert (wav.read_bytes(), take.read_text()) == (b"music", "a take")
    take.unlink()
    assert main([*words, "--seconds", "80000"]) == 2  # more than a wav file holds
    assert wav.read_bytes() == b"music"
    assert not take.exists()


def test_a_take_is_not_replaced_by_its_replay(tmp_path: Path) -> None:
    path = tmp_path / "take.wav"
    path.write_text("{}")
    assert main(["replay", str(path), "-o", str(path)]) == 2
    assert path.read_text() == "{}"


@pytest.mark.parametrize("flag", ["-o", "--take", "--json"])
@pytest.mark.parametrize("place", ["missing/x.wav", "folder.wav", "/proc/x.wav"])
def test_a_place_that_cannot_be_written_is_said_before_the_work(
    flag: str,
    place: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture,
) -> None:
    (tmp_path / "folder.wav").mkdir()
    monkeypatch.setattr("lmd.play.stream_command.open_instrument", lambda *a, **k: 1 / 0)
    assert main(["stream", "organ", "--paced", flag, str(tmp_path / place)]) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert line.startswith("lmd stream: found")


def at_most(n_bytes: int) -> object:
    """Files of the process that is started may grow no larger, as on a full disk."""
    return lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (n_bytes, n_bytes))


def test_a_disk_that_fills_up_ends_a_stream_in_one_line(tmp_path: Path) -> None:
    words = ["stream", "organ", *TINY, "--seconds", "20", "-o", "x.wav", "--take", "x.jsonl"]
    done = lmd(*words, cwd=tmp_path, preexec_fn=at_most(200_000))
    assert done.returncode == 1
    assert "Traceback" not in done.stderr
    assert "expected room on the disk" in done.stdout.splitlines()[-1]
    assert soundfile.info(tmp_path / "x.wav").duration > 1
    assert read_take(tmp_path / "x.jsonl").sha256 is not None


def test_numbers_that_find_no_room_after_the_music_are_one_refusal(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(LmdError, match="File exists"):
        write_json(tmp_path / "file" / "x.json", {})


def test_equal_streams_are_equal_files(tmp_path: Path) -> None:
    for name in ("a.wav", "b.wav"):
        assert main(["stream", "organ", *TINY, "--seconds", "3", "-o", str(tmp_path / name)]) == 0
        time.sleep(1.1)  # the time of day used to stand in the header
    assert (tmp_path / "a.wav").read_bytes() == (tmp_path / "b.wav").read_bytes()


def test_what_is_said_to_be_written_was_written(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "x.wav"
    assert main(["stream", "organ", "--preset", "tiny", "--seconds", "3", "-o", str(path)]) == 0
    assert "\n3.0 s of music" in capsys.readouterr().out
    assert soundfile.info(path).duration == 3


def test_help_may_be_cut_short_and_any_terminal_will_do(tmp_path: Path) -> None:
    ascii_only = os.environ | {"PYTHONIOENCODING": "ascii", "LC_ALL": "C"}
    for words in (["--help"], ["stream", "--help"]):
        command = [sys.executable, "-m", "lmd", *words]
        pipe = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "env": ascii_only}
        with subprocess.Popen(command, **pipe) as process:
            process.stdout.close()  # nobody reads
            said = process.stderr.read()
        assert (process.returncode, said) == (141, b"")
    done = lmd("stream", "organ", *TINY, "--seconds", "1", "-o", tmp_path / "x.wav", env=ascii_only)
    assert done.returncode == 0, done.stderr
    assert r"\xd7 real time" in done.stdout
