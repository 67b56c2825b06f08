"""The long measurements, short: they measure what they say."""

import json
import mmap
import threading
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import scipy.stats
import soak
import torch
from fake_streamer import SAMPLE_RATE, FakeStreamer, VirtualClock
from soak import main, paced
from soak_flat import centroid_hz, flat, round_of, slopes

from lmd.checkpoint import read_header
from lmd.config import preset
from lmd.errors import LmdError
from lmd.play.pace import Ledger
from lmd.play.play_queue import WallClock
from lmd.play.player_traits import PROMPTS
from lmd.play.takes import TakeWriter
from lmd.play.timeline import Plan
from lmd.pretrained import SHIPPED, Instrument, open_instrument
from lmd.stream.controls import Controls

BLOCK_S = 2.4
LEAKED: list[mmap.mmap] = []


def fake(clock: VirtualClock | None = None, cost_s: float = 0.3) -> Instrument:
    streamer = FakeStreamer(clock, lambda index, controls: cost_s * controls.block_frames / 48)
    return Instrument(streamer, preset("tiny"), "fake", is_trained=False)


def test_a_paced_stream_is_measured_by_its_clock() -> None:
    clock = VirtualClock()
    kept = paced(fake(clock), Controls(), 120, clock)
    assert kept["meters"]["underruns"] == 0
    assert kept["lowest_queue_fraction"] >= 0.25
    late = paced(fake(VirtualClock(), 0.1), Controls(), 10, VirtualClock())
    assert late["meters"]["underruns"] == 0
    clock = VirtualClock()
    slow = paced(fake(clock, 3.0), Controls(), 120, clock)
    assert slow["meters"]["underruns"] > 5


def test_an_hour_is_played_by_the_whole_engine(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Controls] = []
    threads: set[str] = set()
    heard = TakeWriter.heard

    def noting(self: TakeWriter, plans: list[Plan], samples: np.ndarray) -> None:
        seen.extend(plan.controls for plan in plans)
        threads.add(threading.current_thread().name)
        heard(self, plans, samples)

    monkeypatch.setattr(TakeWriter, "heard", noting)
    start, instrument = Controls(prompt="organ"), fake()
    unhurried = SimpleNamespace(spend=lambda seconds: time.sleep(0.005))  # texts are read beside
    instrument.streamer.clock = unhurried  # type: ignore[attr-defined]
    found = flat(instrument, start, 64 * BLOCK_S)
    assert threads == {"lmd-live"}
    assert found["n_changes"] == 16
    assert found["meters"]["n_blocks"] == len(seen) == 64
    assert found["meters"]["underruns"] == 0
    assert found["take_bytes"] > 1000
    assert len(found["parts"]) == 10
    assert {c.boundary for c in seen} == {"exact", "fade"}
    assert len({c.prompt for c in seen}) == len({c.seed for c in seen}) == 2
    assert sum(c.drop_context_frames > 0 for c in seen) == 2
    # A round of seven changes, one every four blocks, ends where it began.
    assert seen[29] == start


def test_a_round_of_changes_ends_where_it_began() -> None:
    start = Controls(prompt="organ", boundary="fade", n_steps=1)
    end = start
    for change in round_of(start):
        end = replace(end, **change)
        end.validate(preset("small").window)
    assert replace(end, drop_context_frames=0) == start


def leak() -> None:
    """2 MB of fresh pages, whatever the allocator has kept back for itself."""
    LEAKED.append(mmap.mmap(-1, 2_000_000))
    LEAKED[-1].write(b"x" * 2_000_000)


def test_a_leak_and_a_drift_would_be_seen() -> None:
    class Leaky(FakeStreamer):
        def step(self, state, controls):  # type: ignore[no-untyped-def]
            leak()
            block, following = super().step(state, controls)
            block.wave.mul_(0.98**state.index)
            return block, following

    seconds = 100 * BLOCK_S
    steady = flat(fake(), Controls(), seconds)
    leaky = flat(Instrument(Leaky(), preset("tiny"), "fake", False), Controls(), seconds)
    assert abs(steady["level_db_per_minute"]) < 0.01
    assert steady["level_db_per_minute_95"] < 0.01 < 4 < -leaky["level_db_per_minute"]
    assert leaky["level_db_per_minute_95"] < 0.5
    # 25 blocks a minute: 2 MB each, and 0.175 dB each.
    assert leaky["rss_mb_per_minute"] > 25
    assert leaky["level_db_per_minute"] == pytest.approx(-25 * 0.1755, rel=0.05)


def test_an_hour_of_less_than_a_block_a_part_is_refused() -> None:
    with pytest.raises(LmdError, match=r"expected 24\.0, 10 parts of a block or more"):
        flat(fake(), Controls(), 9 * BLOCK_S)


def test_slopes_say_how_sure_they_are() -> None:
    names = ("rss_mb", "cpu_ms_p50", "level_db", "centroid_hz")
    noise = [0.0, 1.0, -1.0, 1.0, -1.0, 1.0, -1.0, 0.0]
    parts = [{"minutes": float(i)} | dict.fromkeys(names, 2.0 * i + noise[i]) for i in range(8)]
    found = slopes(parts)
    line = scipy.stats.linregress(range(1, 8), [part["level_db"] for part in parts[1:]])
    assert found["level_db_per_minute"] == pytest.approx(line.slope)
    # 2.571: Student's quantile of 97.5 % with 5 degrees of freedom (a table's)
    assert found["level_db_per_minute_95"] == pytest.approx(2.571 * line.stderr, rel=1e-3)


def test_a_leak_beside_the_streamer_would_be_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    note = Ledger.note

    def leaking(self: Ledger, *args: object) -> None:
        leak()
        note(self, *args)

    monkeypatch.setattr(Ledger, "note", leaking)
    assert flat(fake(), Controls(), 100 * BLOCK_S)["rss_mb_per_minute"] > 25


def test_brightness_of_a_tone_is_its_frequency() -> None:
    t = torch.arange(SAMPLE_RATE) / SAMPLE_RATE
    wave = torch.sin(2 * torch.pi * 440 * t).numpy()
    assert centroid_hz(wave, SAMPLE_RATE) == pytest.approx(440, rel=1e-3)


def test_stalls_are_counted_and_over_and_say_with_what(tmp_path: Path) -> None:
    path = tmp_path / "stalls.json"
    words = ["stalls", "--source", "random:tiny:0", "--steps", "1", "--block-frames", "8"]
    assert main([*words, "--skip-waits", "--json", str(path)]) == 0
    found = json.loads(path.read_text())
    for row in found["stalls"].values():
        assert row["underruns"] >= 1
        # A queue of one block was in hand; what the block itself takes comes on top.
        assert row["stall_s"] - 0.4 < row["silent_s"] < row["stall_s"] + 0.5
    assert (found["source"], found["n_steps"], found["block_frames"]) == ("random:tiny:0", 1, 8)
    assert (found["boundary"], found["clock"]) == ("exact", "SkippingClock")
    assert found["machine"]["n_cores"] > 0
    assert main(["flat", "--source", "magic", "--json", str(path)]) == 2


def test_what_is_measured_is_what_a_player_would_play(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """The best weights there are, as they sound best, in real time."""
    asked: list[tuple[object, ...]] = []

    def noting(instrument: Instrument, controls: Controls, seconds: float, clock: object) -> dict:
        asked.append((instrument.source, controls, type(clock)))
        return {}

    monkeypatch.setattr(soak, "paced", noting)
    path = tmp_path / "paced.json"
    assert main(["paced", "--json", str(path)]) == 0
    best = open_instrument()
    assert asked == [(best.source, best.controls(PROMPTS[0]), WallClock)]
    told = json.loads(path.read_text())
    assert told["n_steps"] == best.controls("").n_steps
    assert told["sha256"] == read_header(SHIPPED / f"{best.source}.safetensors").sha256
    assert open_instrument("random:tiny:0").sha256 is None
