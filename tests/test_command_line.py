"""The command line as a shell meets it: names, pipes, terminals, full disks, interrupts."""

import errno
import importlib
import os
import subprocess
import sys
import tomllib
from dataclasses import is_dataclass

import pytest

import lmd.__main__ as command_line
from lmd import __version__
from lmd.pipeline.plan import ROOT

LMD = [sys.executable, "-m", "lmd"]


def run(*words, **environment):
    """A process of its own; what it prints as bytes."""
    return subprocess.run(
        [*LMD, *words], cwd=ROOT, capture_output=True, check=False, env=os.environ | environment
    )


def test_lmd_is_a_command_and_says_its_version():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    assert project["project"]["scripts"] == {"lmd": "lmd.__main__:main"}
    assert project["tool"]["setuptools"]["dynamic"]["version"] == {"attr": "lmd.__version__"}
    assert run("--version").stdout.decode() == f"lmd {__version__}\n"


@pytest.mark.parametrize("name", command_line.COMMANDS, ids=" ".join)
def test_a_command_is_a_module_with_flags_and_main(name):
    module = importlib.import_module(command_line.COMMANDS[name][0])
    assert callable(module.main)
    assert is_dataclass(module.Options)


def test_an_unknown_command_is_answered_with_the_list(capsys):
    assert command_line.main(["strem", "piano"]) == 2
    assert "\n  stream  " in capsys.readouterr().err


def test_old_names_say_what_they_are_called_now(capsys):
    assert command_line.main(["interpolate", "a", "b"]) == 2
    assert "`python tools/interpolate.py` now" in capsys.readouterr().err
    for name in ("tagger", "recogniser"):
        assert command_line.main(["train", name, "--help"]) == 2
        assert "`python tools/train_tagger.py` now" in capsys.readouterr().err


@pytest.mark.parametrize("words", [("--help",), ("convert", "--help")])
@pytest.mark.skipif(os.name == "nt", reason="pipes close otherwise there")
def test_a_reader_that_goes_away_is_no_error(words):
    """`lmd --help | head -1`."""
    reader, writer = os.pipe()
    os.close(reader)
    result = subprocess.run(
        [*LMD, *words], cwd=ROOT, stdout=writer, stderr=subprocess.PIPE, check=False
    )
    os.close(writer)
    assert result.returncode == command_line.BROKEN_PIPE
    assert result.stderr == b""


def test_a_terminal_that_knows_only_ascii_is_no_error():
    result = run("convert", "Füße🎹", "--out", "x", PYTHONIOENCODING="ascii", PYTHONUTF8="0")
    assert result.returncode == 2
    assert rb"found F\xfc\xdfe\U0001f3b9 holding no folder" in result.stderr
    shown = run("evaluate", "--help", PYTHONIOENCODING="ascii", PYTHONUTF8="0")
    assert shown.returncode == 0, shown.stderr


@pytest.mark.parametrize(
    ("error", "status", "line"),
    [
        (OSError(errno.ENOSPC, "No space left on device", "a.wav"), 2, "a.wav: No space left"),
        (PermissionError(errno.EACCES, "Permission denied", "a.wav"), 2, "a.wav: Permission"),
        (KeyboardInterrupt(), 130, "interrupted"),
    ],
)
def test_a_full_disk_and_an_interrupt_are_said_in_one_line(
    monkeypatch, capsys, error, status, line
):
    def fail(_):
        raise error

    monkeypatch.setattr("lmd.stable_audio.parity.main", fail)
    assert command_line.main(["parity", "x"]) == status
    shown = capsys.readouterr().err
    assert shown.startswith(f"lmd parity: {line}")
    assert shown.count("\n") == 1


def test_other_faults_are_not_hidden(monkeypatch):
    def fail(_):
        raise FileNotFoundError(errno.ENOENT, "a fault of ours", "a.wav")

    monkeypatch.setattr("lmd.stable_audio.parity.main", fail)
    with pytest.raises(FileNotFoundError):
        command_line.main(["parity", "x"])
