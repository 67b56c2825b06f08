"""An hour of music as fast as it goes, by everything that plays: does anything grow or drift?

The engine's thread fills its queue by a clock that skips the waits, a take is written, and a
control is moved every few blocks, always through the same round, so that the parts of the hour are
alike.
"""

import itertools
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import psutil
from scipy import stats

from lmd.errors import LmdError
from lmd.play.engine import EngineOptions, Event, LiveEngine, wait_with_bar
from lmd.play.pace import Made, percentile
from lmd.play.play_queue import SkippingClock
from lmd.play.player_traits import PROMPTS, mixed
from lmd.play.sinks import NullSink
from lmd.play.takes import TakeWriter, header_of
from lmd.pretrained import Instrument
from lmd.stream.controls import Controls
from lmd.stream.streamer import Streamer

CHANGE_EVERY = 4  # blocks


class CentroidSink(NullSink):
    """A sink that notes the brightness of what it is given, and what noting it costs."""

    def __init__(self) -> None:
        super().__init__(SkippingClock())
        self.centroids_hz: list[float] = []
        self.spent_s = 0.0

    def write(self, samples: np.ndarray) -> None:
        """Append to the queue."""
        super().write(samples)
        began = time.thread_time()
        self.centroids_hz.append(centroid_hz(samples[0], self.sample_rate))
        self.spent_s += time.thread_time() - began


class LongRunMonitor:
    """Follows an engine and sums up its blocks, part by part.

    Args:
        sink: the engine's.
        controls: those it begins with, to which every round of changes returns.
        seconds, n_parts: of music, and in how many parts.
    """

    def __init__(
        self, sink: CentroidSink, controls: Controls, seconds: float, n_parts: int
    ) -> None:
        self.engine: LiveEngine | None = None
        self.parts: list[dict[str, float]] = []
        self.n_asked = 0
        self._sink, self._part_s = sink, seconds / n_parts
        self._round, self._process = itertools.cycle(round_of(controls)), psutil.Process()
        self._costs_s: list[float] = []
        self._levels_db: list[float] = []
        self._cpu_s = self._own_cpu_s()

    def follow(self, event: Event) -> None:
        """Take note of a block; move a control now and then (`LiveEngine.on_event`)."""
        if not isinstance(event, Made) or self.engine is None:
            return
        cpu_s = self._own_cpu_s()
        self._costs_s.append(cpu_s - self._cpu_s)
        self._levels_db.append(event.level_db)
        played_s = (event.first_sample + event.n_samples) / self._sink.sample_rate
        if played_s >= (len(self.parts) + 1) * self._part_s:
            self._close_part(played_s)
        if event.number % CHANGE_EVERY == CHANGE_EVERY - 1:
            self.n_asked += 1
            self.engine.change(**next(self._round))
        self._cpu_s = self._own_cpu_s()

    def _own_cpu_s(self) -> float:
        """Processor time of all threads, less what the measuring took."""
        return time.process_time() - self._sink.spent_s

    def _close_part(self, played_s: float) -> None:
        self.parts.append(
            {
                "minutes": played_s / 60,
                "rss_mb": self._process.memory_info().rss / 2**20,
                "cpu_ms_p50": 1e3 * (percentile(self._costs_s, 50) or 0.0),
                "level_db": float(np.mean(self._levels_db)),
                "centroid_hz": float(np.mean(self._sink.centroids_hz)),
            }
        )
        for values in (self._costs_s, self._levels_db, self._sink.centroids_hz):
            values.clear()


def round_of(controls: Controls) -> list[dict[str, Any]]:
    """Changes that end where they began."""
    prompt = controls.prompt
    text = prompt if isinstance(prompt, str) else prompt[0][0]
    return [
        {"prompt": mixed(text, PROMPTS[1], 0.5)},
        {"prompt": prompt},
        {"seed": controls.seed + 1},
        {"n_steps": max(1, controls.n_steps - 1)},
        {"n_steps": controls.n_steps, "drop_context_frames": controls.block_frames},
        {"boundary": "exact" if controls.boundary == "fade" else "fade"},
        {"boundary": controls.boundary, "seed": controls.seed},
    ]


def flat(instrument: Instrument, controls: Controls, seconds: float, n_parts: int = 10) -> dict:
    """A stream as fast as it goes, in parts: each one's memory, cost, loudness and brightness.

    Raises:
        LmdError: not a block for every part.
        RuntimeError: the engine failed.
    """
    block_s = controls.block_frames * frame_s(instrument.streamer)
    if not seconds >= n_parts * block_s:
        least = f"{n_parts * block_s:.1f}, {n_parts} parts of a block or more"
        raise LmdError(f"{seconds:g} s of music", least, "Raise --seconds.")
    sink = CentroidSink()
    monitor = LongRunMonitor(sink, controls, seconds, n_parts)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "take.jsonl"
        monitor.engine = LiveEngine(
            instrument.streamer,
            sink,
            controls,
            EngineOptions(limit_s=seconds, answer="next block"),
            take=TakeWriter(path, header_of(instrument.streamer, instrument.source)),
            on_event=monitor.follow,
        )
        play_out(monitor.engine, seconds)
        take_bytes = path.stat().st_size
    return {
        "parts": monitor.parts,
        **slopes(monitor.parts),
        "n_changes": monitor.n_asked,
        "take_bytes": take_bytes,
        "meters": asdict(monitor.engine.meters()),
    }


def play_out(engine: LiveEngine, seconds: float) -> None:
    """Play to the end behind a progress bar.

    Raises:
        RuntimeError: the engine failed.
    """
    engine.start()
    wait_with_bar(engine, seconds)


def frame_s(streamer: Streamer) -> float:
    """How long a latent frame lasts, in seconds."""
    return streamer.codec.samples_per_frame / streamer.codec.sample_rate


def slopes(parts: Sequence[dict[str, float]]) -> dict[str, float]:
    """Straight lines through the parts after the first, which warms up.

    Of loudness and brightness `…_95` says within how much of the slope the true one lies, at 95 %.
    """
    later = parts[1:]
    minutes = [part["minutes"] for part in later]
    lines = {k: stats.linregress(minutes, [part[k] for part in later]) for k in later[0]}
    slope = {k: float(line.slope) for k, line in lines.items()}
    spread = float(stats.t.ppf(0.975, len(later) - 2))
    half = len(later) // 2
    first, second = (
        float(np.median([p["cpu_ms_p50"] for p in some])) for some in (later[:half], later[half:])
    )
    return {
        "rss_mb_per_minute": slope["rss_mb"],
        "cost_second_half_to_first": second / first,
        "level_db_per_minute": slope["level_db"],
        "level_db_per_minute_95": spread * float(lines["level_db"].stderr),
        "centroid_hz_per_minute": slope["centroid_hz"],
        "centroid_hz_per_minute_95": spread * float(lines["centroid_hz"].stderr),
    }


def centroid_hz(samples: np.ndarray, sample_rate: int) -> float:
    """Where the middle of the power spectrum lies: brightness."""
    power = np.abs(np.fft.rfft(samples)) ** 2
    freqs = np.fft.rfftfreq(samples.shape[-1], 1 / sample_rate)
    return float((power * freqs).sum() / max(power.sum(), 1e-12))
