"""Long measurements of a live stream, with what a player plays with: its engine and its defaults.

    python tools/soak.py paced|flat|stalls --json FILE

paced    real time: underruns and the shortest queue
flat     as fast as it goes, a take written, controls moved: memory, cost, loudness, brightness
stalls   stalls of 0.5, 1 and 3 blocks: what is counted, how soon it is over

With `--skip-waits` the clock counts computing and skips waiting (`flat` always does).
`flat` also draws a picture beside the JSON.
"""

import argparse
import json
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import psutil
from soak_flat import flat, frame_s, play_out

from lmd.errors import LmdError
from lmd.machine import machine_dict
from lmd.outputs import check_outputs, write_json
from lmd.play.engine import EngineOptions, LiveEngine
from lmd.play.pace import Made
from lmd.play.play_queue import SkippingClock, WallClock
from lmd.play.player_traits import PROMPTS
from lmd.play.sinks import NullSink
from lmd.pretrained import Instrument, open_instrument
from lmd.stream.controls import BOUNDARIES, Controls
from lmd.stream.state import StreamState
from lmd.stream.streamer import Block, Streamer

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
    parser.add_argument("what", choices=("paced", "flat", "stalls"))
    parser.add_argument("--seconds", type=float, default=600.0, help="of music (paced, flat)")
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
    if args.what == "flat":
        from soak_figure import plot_flat  # matplotlib after the measurement

        plot_flat(result).savefig(args.json.with_suffix(".png"), dpi=110)
    print(json.dumps({k: v for k, v in result.items() if k not in ("parts", "meters")}, indent=2))
    return 0


if __name__ == "__main__":
    sys.exit(main())
