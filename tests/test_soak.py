"""The long measurements, short: they measure what they say."""

import json
import mmap
from pathlib import Path

import pytest
import torch
from fake_streamer import SAMPLE_RATE, FakeStreamer, VirtualClock

from lmd.config import preset
from lmd.controls import Controls
from lmd.instrument import Instrument
from lmd.play import soak
from lmd.play.soak import centroid_hz, flat, latency, main, paced

BLOCK_S = 2.4


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


def test_latency_grows_with_the_block(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(soak, "LATENCY_BLOCKS_FRAMES", (12, 48))
    clocks: list[VirtualClock] = []
    instrument = fake()

    def clock() -> VirtualClock:
        clocks.append(VirtualClock())
        instrument.streamer.clock = clocks[-1]  # type: ignore[attr-defined]
        return clocks[-1]

    rows = latency(instrument, Controls(), 30, clock)["blocks"]
    short, long = rows["12"], rows["48"]
    assert short["underruns"] == long["underruns"] == 0
    assert short["n_changes"] >= 25
    # Uniform moments: half a block and the cost on average, a whole one and the cost at most.
    for row, cost_ms in ((short, 75), (long, 300)):
        assert 0.3 * row["block_ms"] < row["p50_ms"] < row["block_ms"] + cost_ms
        assert row["p95_ms"] <= row["block_ms"] + cost_ms + 60 + 1
    assert long["p50_ms"] > 2 * short["p50_ms"]


def test_a_leak_and_a_drift_would_be_seen() -> None:
    kept: list[mmap.mmap] = []  # fresh pages, whatever the allocator has kept back for itself

    class Leaky(FakeStreamer):
        def step(self, state, controls):  # type: ignore[no-untyped-def]
            kept.append(mmap.mmap(-1, 2_000_000))
            kept[-1].write(b"x" * 2_000_000)
            block, following = super().step(state, controls)
            block.wave.mul_(0.98**state.index)
            return block, following

    seconds = 100 * BLOCK_S
    steady = flat(fake(), Controls(), seconds)
    leaky = flat(Instrument(Leaky(), preset("tiny"), "fake", False), Controls(), seconds)
    assert abs(steady["level_db_per_minute"]) < 0.01
    # 25 blocks a minute: 2 MB each, and 0.175 dB each.
    assert leaky["rss_mb_per_minute"] > 25
    assert leaky["level_db_per_minute"] == pytest.approx(-25 * 0.1755, rel=0.05)


def test_brightness_of_a_tone_is_its_frequency() -> None:
    t = torch.arange(SAMPLE_RATE) / SAMPLE_RATE
    wave = torch.sin(2 * torch.pi * 440 * t)[None, None]
    assert centroid_hz(wave, SAMPLE_RATE) == pytest.approx(440, rel=1e-3)


@pytest.mark.slow
def test_stalls_of_the_real_streamer_are_counted_and_over(tmp_path: Path) -> None:
    path = tmp_path / "stalls.json"
    words = ["stalls", "--source", "random:tiny:0", "--steps", "1", "--block-frames", "16"]
    assert main([*words, "--json", str(path)]) == 0
    rows = json.loads(path.read_text())["stalls"]
    for row in rows.values():
        assert row["underruns"] >= 1
        assert row["silent_s"] < row["stall_s"] + 0.5
    assert main(["flat", "--source", "magic", "--json", str(path)]) == 2
