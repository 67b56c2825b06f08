"""What a newcomer meets first: environment files, make targets, pages, notebooks as committed."""

import argparse
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import tomllib
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import numpy as np
import pytest
import readme as filler  # tools/readme.py
import soundfile
import tyro
import yaml
from matplotlib.image import imread
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from pages import PAGES, README, command_with, lmd_commands, shell_lines, typed

from lmd.__main__ import COMMANDS
from lmd.checkpoint import read_header
from lmd.config import PRESETS
from lmd.pipeline.notebook import parameters_of
from lmd.pipeline.plan import ROOT, Options, plan

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
LOCK = (ROOT / "requirements.lock").read_text().splitlines()
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
LOCKED = dict(line.split("==") for line in LOCK if not line.startswith("#"))
FOLDERS = ("data", "outputs")  # that have a page of their own
NO_GIT = shutil.which("git") is None or not (ROOT / ".git").exists()


def tracked_files() -> list[Path]:
    out = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, check=True)
    return [ROOT / name for name in out.stdout.decode().split("\0") if name]


def test_the_lock_holds_versions_and_nothing_else() -> None:
    assert len(LOCKED) > 50
    for line in LOCK:
        assert re.fullmatch(r"#.*|[A-Za-z0-9._-]+==[A-Za-z0-9.+!]+", line), line
        assert not re.match(r"nvidia-|cuda-|triton", line), line
    assert LOCKED["torch"] == LOCKED["torchaudio"] == "2.11.0"


def test_the_lock_satisfies_pyproject() -> None:
    locked = {name.lower().replace("_", "-"): number for name, number in LOCKED.items()}
    wanted = [*PROJECT["dependencies"], *PROJECT["optional-dependencies"]["dev"]]
    for text in wanted:
        requirement = Requirement(text)
        number = locked[requirement.name.lower().replace("_", "-")]
        assert requirement.specifier.contains(number), text


def test_this_environment_has_the_locked_versions() -> None:
    found = {}
    for name, number in LOCKED.items():
        try:
            found[name] = version(name) == number
        except PackageNotFoundError:
            found[name] = False
    wrong = sorted(name for name, same in found.items() if not same)
    assert not wrong, f"run `make install` or `make lock`: {wrong}"


def test_environment_yml_and_pyproject_agree() -> None:
    environment = yaml.safe_load((ROOT / "environment.yml").read_text())
    python = next(d for d in environment["dependencies"] if str(d).startswith("python="))
    assert SpecifierSet(PROJECT["requires-python"]).contains(python.partition("=")[2])
    pip = next(d for d in environment["dependencies"] if isinstance(d, dict))["pip"]
    assert pip == ["-r requirements.lock", "-e .[dev]"]  # so both take what the lock holds
    assert environment["name"] == PROJECT["name"]


@pytest.mark.skipif(shutil.which("make") is None, reason="make is not installed")
def test_make_run_and_make_test_do_what_the_readme_says(tmp_path: Path) -> None:
    venv = tmp_path / "venv"
    (venv / "bin").mkdir(parents=True)
    shutil.copy(ROOT / "requirements.lock", venv / "installed.lock")

    def dry(target: str) -> str:
        command = ["make", "-n", target, f"VENV={venv}"]
        environment = {k: v for k, v in os.environ.items() if not k.startswith("MAKE")}
        result = subprocess.run(
            command, cwd=ROOT, capture_output=True, text=True, check=True, env=environment
        )
        return result.stdout

    assert "-m lmd run --profile quick" in dry("run")
    tests = dry("test")
    for words in ("ruff check .", "ruff format --check .", "lint-imports", "-m pytest"):
        assert words in tests
    assert "jupyter lab --ip 127.0.0.1 notebooks/00_listen.ipynb" in dry("lab")


@pytest.mark.skipif(shutil.which("make") is None, reason="make is not installed")
def test_make_installs_again_only_when_the_lock_changed(tmp_path: Path) -> None:
    for name in ("Makefile", "requirements.lock"):
        shutil.copy(ROOT / name, tmp_path)
    fake = tmp_path / "python"  # notes its arguments; `-m venv DIR` leaves itself there
    fake.write_text(
        "#!/bin/sh\n"
        f'echo "$@" >> {tmp_path}/calls\n'
        f'[ "$2" = venv ] && mkdir -p "$3/bin" && cp {tmp_path}/python "$3/bin/python"\n'
        "exit 0\n"
    )
    fake.chmod(0o755)

    def installs() -> int:
        subprocess.run(["make", "install", f"PYTHON={fake}"], cwd=tmp_path, check=True)
        return (tmp_path / "calls").read_text().count("pip --disable-pip-version-check install -r")

    assert [installs(), installs()] == [1, 1]
    with (tmp_path / "requirements.lock").open("a") as lock:
        lock.write("one-more==1.0\n")
    assert [installs(), installs()] == [2, 2]


def test_the_ci_script_is_executable_and_parses() -> None:
    script = ROOT / ".ci" / "run"
    assert os.access(script, os.X_OK)
    subprocess.run(["bash", "-n", script], check=True)


@pytest.mark.parametrize("command", lmd_commands(), ids=" ".join)
def test_a_command_of_the_pages_is_accepted_as_written(command: list[str]) -> None:
    if command == ["--help"]:
        return  # run for real below
    name = next(tuple(command[:n]) for n in (2, 1) if tuple(command[:n]) in COMMANDS)
    module, words = importlib.import_module(COMMANDS[name][0]), command[len(name) :]
    if hasattr(module, "Options"):
        tyro.cli(module.Options, args=words, config=(tyro.conf.FlagCreatePairsOff,))
        return
    parser = argparse.ArgumentParser()
    module.configure(parser)
    parser.parse_args(words)


def test_commands_named_in_sentences_exist() -> None:
    """`lmd bench arc`, `python -m lmd.x`, `python tools/x.py`, `tests/test_x.py`."""
    for path, text in PAGES.items():
        for words in re.findall(r"`(?:python -m )?lmd ([a-z ]+)", text):
            first = tuple(words.split())
            assert any(first[:n] in COMMANDS for n in (1, 2)), f"lmd {words} in {path.name}"
        for module in re.findall(r"python -m (lmd\.[\w.]+)", text):
            assert importlib.util.find_spec(module), f"{module} in {path.name}"
        for file in re.findall(r"\b(tools/\w+\.py|tests/\w+\.py|lmd/[\w/]+\.\w+)", text):
            assert (ROOT / file).is_file(), f"{file} in {path.name}"


def test_lmd_is_a_command() -> None:
    assert PROJECT["scripts"] == {"lmd": "lmd.__main__:main"}
    assert importlib.import_module("lmd.__main__").main(["--help"]) == 0


def code_has(name: str) -> bool:
    """Whether a dotted name of the package can be imported or looked up."""
    parts = name.split(".")
    for n in range(len(parts), 0, -1):
        try:
            found = importlib.import_module(".".join(parts[:n]))
        except ModuleNotFoundError:
            continue
        for part in parts[n:]:
            if part in getattr(found, "__dataclass_fields__", {}):
                return True  # a field without a default is no attribute of the class
            if not hasattr(found, part):
                return False
            found = getattr(found, part)
        return True
    return False


def test_names_of_the_code_in_the_pages_exist() -> None:
    named = {n for text in PAGES.values() for n in re.findall(r"`(lmd\.[\w.]+)`", text)}
    assert len(named) > 80
    missing = sorted(name for name in named if not code_has(name))
    assert not missing
    assert not code_has("lmd.model.masks.no_such_mask")


def test_the_readme_names_make_targets_that_exist() -> None:
    targets = set(re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    named = {line.split()[1] for line in shell_lines(README) if line.startswith("make ")}
    assert {"run", "test", "lab"} <= named <= targets


def test_every_promise_names_tests_that_exist() -> None:
    text = (ROOT / "docs" / "promises.md").read_text(encoding="utf-8")
    named = re.findall(r"`(test_\w+\.py)::(test_\w+)`", text)
    assert len(named) > 20
    for file, name in named:
        assert f"def {name}(" in (ROOT / "tests" / file).read_text(encoding="utf-8"), name


def test_help_lists_every_command() -> None:
    result = subprocess.run(
        [sys.executable, "-m", "lmd", "--help"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    for words in COMMANDS:
        assert f"\n  {' '.join(words)} " in result.stdout


def test_data_check_reads_a_folder_of_ones_own_as_the_readme_says(tmp_path: Path) -> None:
    soundfile.write(tmp_path / "a.wav", np.sin(np.arange(220_500) * 0.06) / 3, 22_050)
    command = next(line for line in lmd_commands() if line[:2] == ["data", "check"])
    words = [str(tmp_path) if word == "MY_MUSIC" else word for word in command]
    result = subprocess.run(
        [sys.executable, "-m", "lmd", *words], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stderr


def test_a_stream_is_written_as_the_readme_says(tmp_path: Path) -> None:
    """Three seconds instead of a minute."""
    places = {"-o organ.wav": f"-o {tmp_path}/organ.wav", "--seconds 60": "--seconds 3"}
    command = command_with('lmd stream "church organ', places)
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    wave, rate = soundfile.read(tmp_path / "organ.wav")
    assert len(wave) / rate == pytest.approx(3, abs=0.1)
    assert np.abs(wave).max() > 0.01


def carry_out(text: str, cwd: Path) -> None:
    """Every line of a block of shell commands, one after the other."""
    for line in text.replace("\\\n", "").splitlines():
        environment = os.environ | {"PYTHONPATH": str(ROOT)}
        result = subprocess.run(
            typed(line), cwd=cwd, capture_output=True, text=True, check=False, env=environment
        )
        assert result.returncode == 0, f"{line}\n{result.stdout}\n{result.stderr}"


def block_of(title: str, page: str = README) -> str:
    """The first block of shell commands in a section of a page."""
    section = page[page.index(f"## {title}") :]
    return section.partition("```sh\n")[2].partition("```")[0]


@pytest.mark.slow
def test_ones_own_music_is_learned_and_played_as_the_readme_says(tmp_path: Path) -> None:
    """The commands of that section in their order, on half a minute of sound and two steps."""
    music = tmp_path / "music"
    music.mkdir()
    for hz in (220, 330):
        tone = np.sin(np.arange(16 * 22_050) * 2 * np.pi * hz / 22_050) / 3
        soundfile.write(music / f"tone {hz}.wav", tone, 22_050)
    text = block_of("Your own music")
    places = {"MY_MUSIC": str(music), "-o mine.wav": f"-o {tmp_path}/mine.wav --seconds 3"}
    places |= {name: f"{tmp_path}/{name}" for name in ("data/mine-latents", "runs/mine")}
    places |= {"data/mine ": f"{tmp_path}/data/mine ", "data/mine\n": f"{tmp_path}/data/mine\n"}
    places["--lora 16"] = "--lora 16 --steps 2 --batch 2 --no-progress"
    for name, place in places.items():
        assert name in text
        text = text.replace(name, place)
    carry_out(text, ROOT)
    wave, rate = soundfile.read(tmp_path / "mine.wav")
    assert len(wave) / rate == pytest.approx(3, abs=0.1)
    assert np.abs(wave).max() > 0.001


@pytest.mark.slow
def test_all_stages_go_by_hand_as_the_docs_say(tmp_path: Path) -> None:
    """The commands of that section in their order, on a minute of music and two steps each."""
    (tmp_path / "data").mkdir()
    (tmp_path / "data/pretrained").symlink_to(ROOT / "data/pretrained")
    text = block_of("All stages by hand", PAGES[ROOT / "docs" / "training.md"])
    few = "--batch 2 --no-progress"
    places = {"--hours 24": "--hours 0.02 --collections bach"}  # quick to parse
    places["train base"] = f"train base --steps 2 {few}"
    places["train codec"] = "train codec --steps 3 --encoder-steps 1 --batch 2 --frames 16"
    places |= {f"train {name}": f"train {name} --steps 2 {few}" for name in ("finetune", "distill")}
    places["--updates 60 --warmup 24 --blocks 6"] = "--updates 4 --warmup 2 --blocks 2"
    places["--batch 4"] = few
    places["--seconds 60"] = "--seconds 3"
    for name, place in places.items():
        assert name in text
        text = text.replace(name, place)
    carry_out(text, tmp_path)
    header = read_header(tmp_path / "runs/arc/arc.safetensors")
    made = read_header(tmp_path / "runs/distill/finetuned.safetensors")
    assert header.notes["init"]["sha256"] == made.sha256
    assert len(soundfile.read(tmp_path / "harp.wav")[0]) > 0


def test_the_pages_are_filled_in_from_the_files() -> None:
    used = set()
    for name in filler.PAGES:
        text = PAGES[ROOT / name]
        up = "../" * name.count("/")
        assert filler.fill(text, ROOT, up) == text, "run `python tools/readme.py`"
        used |= set(re.findall(r"<!-- begin (\w+)", text))
    assert used == set(filler.BLOCKS)
    assert filler.main(check=True) == 0


def test_the_readme_is_short() -> None:
    assert len(README.encode()) <= 8192


def test_the_pages_show_pictures_and_play_sounds() -> None:
    """Every block for one has its link, to a picture that is not blank or a sound one hears."""
    paths = []
    for page in map(ROOT.joinpath, filler.PAGES):
        for match in filler.BLOCK.finditer(PAGES[page]):
            if match[2] == "media":
                link = re.search(r"\]\(([^)]+)\)", match[4])
                assert link, "run `python tools/readme.py --publish outputs/quick`"
                paths.append(page.parent / link[1])
    pictures = [path for path in paths if path.suffix == ".png"]
    sounds = [path for path in paths if path.suffix == ".ogg"]
    assert pictures
    assert sounds
    assert all(np.ptp(imread(path)) > 0.5 for path in pictures)
    assert all(np.abs(soundfile.read(path)[0]).max() > 0.05 for path in sounds)


def test_links_of_the_pages_lead_somewhere() -> None:
    pages = [*PAGES, *(ROOT / folder / "README.md" for folder in FOLDERS)]
    for page in pages:
        for link in re.findall(r"\]\(([^)#]+)[^)]*\)", page.read_text(encoding="utf-8")):
            if not link.startswith("http"):
                assert (page.parent / link).exists(), f"{link} in {page.name}"


def test_the_block_length_that_the_readme_names_is_that_of_the_preset() -> None:
    preset = PRESETS["small"]
    block_s = preset.window.block_frames / preset.frame_rate_hz
    assert f"blocks of {block_s:.1f} s, cut at any frame" in README


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_is_committed_bare_and_can_be_run(path: Path) -> None:
    notebook = json.loads(path.read_text(encoding="utf-8"))
    assert notebook["metadata"]["kernelspec"]["name"] == "python3"
    code = [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]
    for cell in code:
        assert cell["outputs"] == []
        assert cell["execution_count"] is None
    tagged = [cell for cell in code if "parameters" in cell["metadata"].get("tags", [])]
    assert len(tagged) == 1
    assert {"output_dir", "seed", "preset"} <= set(parameters_of(path))
    first = notebook["cells"][0]
    assert first["cell_type"] == "markdown"
    assert "".join(first["source"]).startswith("# ")


@pytest.mark.skipif(not NOTEBOOKS, reason="no notebook yet")
def test_nbstripout_would_change_nothing() -> None:
    command = [sys.executable, "-m", "nbstripout", "--verify", *map(str, NOTEBOOKS)]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout + result.stderr


@pytest.mark.parametrize("profile", ["smoke", "quick", "full", "paper"])
@pytest.mark.skipif(not NOTEBOOKS, reason="no notebook yet")
def test_every_profile_fits_the_notebooks(profile: str) -> None:
    assert len(plan(Options(profile=profile))) == len(NOTEBOOKS)


@pytest.mark.skipif(NO_GIT, reason="not a git checkout")
def test_no_tracked_file_names_a_registry_or_somebodys_folders() -> None:
    words = ["py" + "pi.org", "python" + "hosted", "/wo" + "rk/", "/ro" + "ot/", "conda" + ".org"]
    pattern = re.compile("|".join(map(re.escape, words)).encode())
    named = [str(path) for path in tracked_files() if pattern.search(_bytes(path))]
    assert not named


def _bytes(path: Path) -> bytes:
    return path.read_bytes() if path.is_file() and path.stat().st_size < 1_000_000 else b""


def test_publishing_copies_what_the_pages_name_and_fills_it_in(tmp_path: Path) -> None:
    run = tmp_path / "outputs" / "quick"
    (run / "04_play").mkdir(parents=True)
    soundfile.write(run / "04_play" / "stream.wav", np.zeros(44_100), 22_050)
    (tmp_path / "notebooks").mkdir()
    first = ["# 04 · Play\n", "\n", "One block by hand.\n", "\n", "**Typed out:** a block."]
    notebook = {"cells": [{"cell_type": "markdown", "source": first}]}
    (tmp_path / "notebooks" / "04_play.ipynb").write_text(json.dumps(notebook))
    entry = {"status": "done", "seconds": 93, "metrics": {"rtf": 12.25}}
    machine = {"cpu": "a CPU", "n_cores": 2, "memory_gib": 8.0, "amx": True, "gpu": ""}
    summary = {"profile": "quick", "machine": machine, "notebooks": {"04_play": entry}}
    (run / "metrics.json").write_text(json.dumps(summary))
    text = (
        "<!-- begin notebooks quick -->\n<!-- end -->\n"
        "<!-- begin media 04_play/stream.wav | Hear it -->\nold\n<!-- end -->\n"
    )
    filler.copy_run(run, [text], tmp_path)
    filled = filler.fill(text, tmp_path, "../")
    row = "| [`04_play`](../notebooks/04_play.ipynb) | One block by hand. | a block | 1.6 |"
    assert row in filled
    assert "on a CPU with AMX, 2 cores, 8 GiB" in filled
    assert "[Hear it](../outputs/published/04_play_stream.ogg) (2 s)" in filled
    assert "old" not in filled
    assert filler.fill(filled, tmp_path, "../") == filled
