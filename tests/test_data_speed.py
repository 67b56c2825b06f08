"""`lmd bench data`: what it measures adds up, and it says what it needs."""

import json
from pathlib import Path

import numpy as np
import pytest
from latents_fake import write_latents

from lmd.__main__ import main
from lmd.corpus.build import BuildSettings, build_corpus
from lmd.corpus.manifest import Corpus
from lmd.training.data_speed import BATCHES, WINDOWS_FRAMES


def test_music_and_windows_are_counted_over_the_time_they_took(tmp_path: Path) -> None:
    corpus, cache = tmp_path / "corpus", tmp_path / "cache"
    settings = BuildSettings(collections=("corelli",), max_seconds=6.0)
    build_corpus(corpus, 12 / 3600, settings, cache=cache)
    latents = write_latents(tmp_path / "latents")
    words = ["--data", corpus, "--latents", latents, "--cache", cache, "--json", tmp_path / "a"]
    words += ["--turns", 2, "--batch", 4]
    assert main(["bench", "data", *map(str, words)]) == 0
    found = json.loads((tmp_path / "a").read_text())
    render, *reads = found["rows"]
    assert (found["threads"], found["batch"]) == (1, 4)
    assert [row["items"] for row in found["rows"]] == [2, 2 * BATCHES, 2 * BATCHES]
    assert [row["what"] for row in reads] == [f"batches of {n} frames" for n in WINDOWS_FRAMES]
    rows = Corpus(corpus).rows
    music_s = rows[0].duration_s + rows[-1].duration_s
    # Of two items the median and the 95th percentile are the shorter and the longer one.
    assert render["per_second"] == pytest.approx(
        music_s / (render["ms_p50"] + render["ms_p95"]) * 1e3
    )
    for row in reads:
        assert row["ms_p50"] <= row["ms_p95"]
        assert np.isfinite(row["per_second"])
        # Half of the batches take the median or less.
        assert row["per_second"] < 2 * 4 / (row["ms_p50"] / 1e3)


@pytest.mark.parametrize("words", [["--turns", "0"], ["--data", "nowhere"]])
def test_what_cannot_be_measured_is_refused(
    words: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["bench", "data", *words]) == 2
    assert "found" in capsys.readouterr().err
