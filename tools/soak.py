"""Long measurements of a live stream, with what a player plays with: its engine and its defaults.

    python tools/soak.py paced|flat|latency|stalls --json FILE

paced    real time: underruns and the shortest queue
flat     as fast as it goes, a take written, controls moved: memory, cost, loudness, brightness
latency  slider to sound over block lengths, changes at random moments
stalls   stalls of 0.5, 1 and 3 blocks: what is counted, how soon it is over

With `--skip-waits` the clock counts computing and skips waiting (`flat` always does).
`latency` and `flat` also draw a picture beside the JSON.
"""

import argparse
import json
import random
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import psutil
from soak_flat import flat, frame_s, play_out

from lmd.errors import LmdError
from lmd.machine import machine_dict
from lmd.outputs import check_outputs, write_json
from lmd.play.engine import EngineOptions, LiveEngine
from lmd.play.pace import Made, percentile
from lmd.play.play_queue import SkippingClock, WallClock
from lmd.play.player_traits import PROMPTS
from lmd.play.sinks import NullSink
from lmd.pretrained import Instrument, open_instrument
from lmd.stream.controls import BOUNDARIES, Controls
from lmd.stream.state import StreamState
from lmd.stream.streamer import Block, Streamer

LATENCY_BLOCKS_FRAMES = (6, 12, 24, 48, 96)
SETTABLE = ("n_steps", "block_frames", "boundary")


def paced(instrument: Instrument, controls: Controls, seconds: float, clock: WallClock) -> dict:
    """A stream by the clock; the aim: no underrun, and a queue never under a quarter."""
    engine = LiveEngine(
        instrument.streamer, NullSink(clock), controls, EngineOptions(limit_s=seconds)
    )
    play_out(engine, seconds)
    meters = engine.meters()
    lowest = (meters.lowest_s or 0.0) / meters.target_s
    return {"meters": asdict(meters), "lowest_queue_fraction": lowest}


def latency(
    instrument: Instrument, controls: Controls, n_changes: int, clock: Callable[[], WallClock]
) -> dict:
    """Slider to sound with a queue of one block, for several block lengths."""
    rows = {}
    for block_frames in LATENCY_BLOCKS_FRAMES:
        block_s = block_frames * frame_s(instrument.streamer)
        clock_of_changes = RandomChanges(random.Random(block_frames), block_s, clock())
        options = EngineOptions(queue_s=block_s, limit_s=(1.5 * n_changes + 10) * block_s)
        start = replace(controls, block_frames=block_frames)
        engine = LiveEngine(instrument.streamer, NullSink(clock_of_changes), start, options)
        clock_of_changes.engine = engine
        play_out(engine, options.limit_s)
        meters = engine.meters()
        rows[str(block_frames)] = {
            "block_ms": 1e3 * block_s,
            "n_changes": meters.n_changes,
            "p50_ms": meters.latency_p50_ms,
            "p95_ms": meters.latency_p95_ms,
            "rtf": meters.rtf,
            "made_ms_p95": percentile([1e3 * m.made_s for m in engine.ledger.history], 95),
            "underruns": meters.underruns,
        }
    return {"blocks": rows}


class RandomChanges:
    """A clock that asks for another seed at random moments while it waits."""

    def __init__(self, rng: random.Random, block_s: float, clock: WallClock) -> None:
        self.engine: LiveEngine | None = None
        self._rng, self._block_s, self._clock = rng, block_s, clock
        self._next_s, self._seed = clock.now() + 8 * block_s, 0

    def now(self) -> float:
        """The time; a change that is due is asked for first."""
        now_s = self._clock.now()
        if self.engine is not None and now_s >= self._next_s:
            due_s, self._seed = self._next_s, self._seed + 1
            self._next_s = now_s + self._rng.uniform(1, 2) * self._block_s
            self.engine.control_queue.ask(due_s, seed=self._seed)
        return now_s

    def sleep(self, seconds: float, wake: Any) -> None:
        """Wait no longer than to the next change."""
        until_change_s = max(0.0, self._next_s - self._clock.now())
        self._clock.sleep(min(seconds, until_change_s + 1e-4), wake)


class _Stalling(Streamer):
    """A streamer that sleeps before some blocks."""

    def __init__(self, inner: Streamer, stalls_s: dict[int, float]) -> None:
        self.__dict__.update(inner.__dict__)
        self._stalls_s = stalls_s

    def step(self, state: StreamState, controls: Controls) -> tuple[Block, StreamState]:
        """Sleep if it is this block's turn, then the step itself."""
        time.sleep(self._stalls_s.get(state.index, 0.0))
        return super().step(state, controls)


def stalls(instrument: Instrument, controls: Controls, clock: Callable[[], WallClock]) -> dict:
    """Stalls with a queue of one block: counts, silence, depth before and after."""
    rows = {}
    block_s = controls.block_frames * frame_s(instrument.streamer)
    for blocks in (0.5, 1.0, 3.0):
        streamer = _Stalling(instrument.streamer, {8: blocks * block_s})
        options = EngineOptions(queue_s=block_s, limit_s=20 * block_s)
        engine = LiveEngine(streamer, NullSink(clock()), controls, options)
        play_out(engine, options.limit_s)
        history: list[Made] = list(engine.ledger.history)
        rows[str(blocks)] = {
            "underruns": engine.meters().underruns,
            "silent_s": engine.meters().silent_s,
            "stall_s": blocks * block_s,
            "queued_before_ms": [1e3 * made.queued_s for made in history[5:8]],
            "queued_after_ms": [1e3 * made.queued_s for made in history[10:13]],
        }
    return {"stalls": rows}


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """What was asked for, with what it was measured on."""
    instrument = open_instrument(args.source, preset_name=args.preset)
    asked = {name: value for name in SETTABLE if (value := getattr(args, name)) is not None}
    controls = instrument.controls(PROMPTS[0], **asked)
    skips = args.skip_waits or args.what == "flat"
    clock = SkippingClock if skips else WallClock
    if args.what == "paced":
        result = paced(instrument, controls, args.seconds, clock())
    elif args.what == "flat":
        result = flat(instrument, controls, args.seconds)
    elif args.what == "latency":
        result = latency(instrument, controls, args.changes, clock)
    else:
        result = stalls(instrument, controls, clock)
    about = {"source": instrument.source, "sha256": instrument.sha256}
    about |= {"preset": instrument.preset.name, **asdict(controls)}
    about |= {"clock": clock.__name__, "waits_skipped": skips}
    about |= {"load_at_end": psutil.getloadavg()[0], "machine": machine_dict()}
    return {"what": args.what, **about, **result}


def main(argv: Sequence[str] | None = None) -> int:
    """Measure and write JSON."""
    parser = argparse.ArgumentParser(prog="python tools/soak.py", description=__doc__)
    parser.add_argument("what", choices=("paced", "flat", "latency", "stalls"))
    parser.add_argument("--seconds", type=float, default=600.0, help="of music (paced, flat)")
    parser.add_argument("--changes", type=int, default=40, help="per block length (latency)")
    parser.add_argument("--source", default="best")
    parser.add_argument("--preset", default="small")
    parser.add_argument("--steps", type=int, dest="n_steps", help="(default: the weights' own)")
    parser.add_argument("--block-frames", type=int)
    parser.add_argument("--boundary", "--seam", choices=BOUNDARIES)
    parser.add_argument("--skip-waits", action="store_true", help="computing counts, waiting not")
    parser.add_argument("--json", type=Path, required=True)
    args = parser.parse_args(argv)
    try:
        check_outputs(json=args.json)
        result = measure(args)
    except LmdError as error:
        print(f"lmd soak: {error}", file=sys.stderr)
        return 2
    write_json(args.json, result)
    _draw(result, args.json.with_suffix(".png"))
    print(json.dumps({k: v for k, v in result.items() if k not in ("parts", "meters")}, indent=2))
    return 0


def _draw(result: dict[str, Any], path: Path) -> None:
    """The picture of what was measured, where there is one to draw."""
    from soak_figure import plot_flat, plot_latency  # matplotlib after the measurement

    plots = {"flat": plot_flat, "latency": plot_latency}
    if result["what"] in plots:
        plots[result["what"]](result).savefig(path, dpi=110)


if __name__ == "__main__":
    sys.exit(main())
