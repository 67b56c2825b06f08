"""`tools/bench_*.py`: their figures add up, and the old commands say where they are now."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from latents_fake import write_latents

from lmd.__main__ import main
from lmd.corpus.manifest import Corpus
from lmd.data.build import BuildSettings, build_corpus

TOOLS = Path(__file__).parents[1] / "tools"


def bench(what: str, path: Path, *words: object) -> dict:
    """The figures of a script, and that its table shows them."""
    command = [sys.executable, TOOLS / f"bench_{what}.py", *words, "--json", path]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(TOOLS.parent)}
    done = subprocess.run(
        [*map(str, command)], env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    report = json.loads(path.read_text(encoding="utf-8"))
    assert all(name in done.stdout for name in report["rows"][0])
    return report


def test_steps_of_every_kind_are_timed_beside_reading(tmp_path):
    data = write_latents(tmp_path / "latents")
    words = ["--preset", "tiny", "--batch", 2, "--steps", 2, "--threads", 1, "--data", data]
    report = bench("train", tmp_path / "speed.json", *words)
    assert [row["step"] for row in report["rows"]] == ["base", "block-causal", "enc-dec"]
    for row in report["rows"]:
        assert 0 < row["step_ms_p50"] <= row["step_ms_p95"]
        assert row["gflop_per_s"] == pytest.approx(row["step_gflop"] / row["step_ms_p50"] * 1e3)
        assert row["data_ms_p50"] > 0
        assert row["wait_ms_p50"] >= 0


def test_longer_rollouts_cost_more_calls_and_memory(tmp_path):
    words = ["--preset", "tiny", "--batch", 8, "--last-block", "blocks.1", "--threads", 1]
    words += ["--updates", 1, "--blocks", 1, 8, "--precision", "32", "--checkpointing", "yes"]
    short, long = bench("arc", tmp_path / "arc.json", *words)["rows"]
    assert (short["frames"], long["frames"]) == (48, 384)
    assert long["generator_calls"] >= 8 >= short["generator_calls"] >= 1
    assert min(row[f"{who}_s"] for row in (short, long) for who in ("generator", "discriminator"))
    assert long["memory_gb"] > short["memory_gb"] > 0.1


def test_music_and_windows_are_counted_over_the_time_they_took(tmp_path):
    corpus, cache = tmp_path / "corpus", tmp_path / "cache"
    settings = BuildSettings(collections=("corelli",), max_seconds=6.0)
    build_corpus(corpus, 12 / 3600, settings, cache=cache)
    words = ["--data", corpus, "--latents", write_latents(tmp_path / "latents")]
    words += ["--cache", cache, "--turns", 2, "--batch", 4]
    render, *reads = bench("data", tmp_path / "data.json", *words)["rows"]
    rows = Corpus(corpus).rows
    music_s, took_s = rows[0].duration_s + rows[-1].duration_s, 2 * render["ms_p50"] / 1e3
    assert render["per_second"] == pytest.approx(music_s / took_s)  # of two, the median is the mean
    assert [row["items"] for row in reads] == [64, 64]


@pytest.mark.parametrize("what", ["train", "data", "arc"])
def test_the_old_commands_say_where_they_are_now(what, capsys):
    assert main(["bench", what, "--json", "x.json"]) == 2
    assert f"python tools/bench_{what}.py" in capsys.readouterr().err
