"""`lmd bench live`: how soon a change is heard, with the player's defaults, by the clock.

lmd bench live --json live.json
"""

import random
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from lmd.errors import LmdError
from lmd.machine import machine_dict
from lmd.outputs import check_outputs, write_json
from lmd.play.engine import EngineOptions, LiveEngine, wait_with_bar
from lmd.play.pace import percentile
from lmd.play.play_queue import WallClock
from lmd.play.sinks import NullSink
from lmd.pretrained import Instrument, open_instrument

PROMPTS = ("string quartet, slow, minor", "solo piano, fast, major")
SETTLING_S = 6.0  # before the first change: a queue of two blocks is there


@dataclass(frozen=True)
class Options:
    """What is played, and how often it is changed."""

    changes: int = 60  # At random moments.
    least_s: float = 0.3  # Between two changes, at least.
    most_s: float = 1.5  # Between two changes, at most.
    block: Annotated[int | None, tyro.conf.arg(aliases=["--block-frames"])] = None  # In frames.
    steps: int | None = None  # Per block and branch.
    answer: Literal["at once", "next block"] = "at once"  # When a change is heard.
    commit_frames: int = 0  # So much of a plan is played before it is made again (0: all).
    source: str = "best"  # As for `lmd stream`.
    json: Path | None = None  # Write the result to this file.


def main(options: Options) -> int:
    """Measure and print; status 1 if the stream ran dry."""
    if options.changes < 1 or not 0 < options.least_s <= options.most_s:
        found = f"--changes {options.changes}, every {options.least_s} to {options.most_s} s"
        raise LmdError(found, "1 or more, in a growing range above 0", "Set them so.")
    check_outputs(json=options.json, json_key="slider_to_sound_ms")
    instrument = open_instrument(options.source)
    result = measure(instrument, options, WallClock())
    if options.json is not None:
        write_json(options.json, result)
    heard = result["slider_to_sound_ms"]
    print(
        f"{result['n_changes']} changes of {instrument.description}: slider to sound "
        f"{heard['p50']:.0f} ms (median), {heard['p95']:.0f} ms (p95), "
        f"{result['underruns']} underruns"
    )
    return int(result["underruns"] > 0)


def measure(instrument: Instrument, options: Options, clock: WallClock) -> dict[str, Any]:
    """Play to nobody by a clock, and move the mix of two prompts at random moments.

    Returns:
        `slider_to_sound_ms` (p50, p95, max: from asking to the first sample that carries the
        change), `planning_ms` (a cut, from beginning to end), `n_changes`, `underruns`, `rtf`, the
        settings, and the machine.
    """
    chosen = {"block_frames": options.block, "n_steps": options.steps}
    asked = {name: value for name, value in chosen.items() if value is not None}
    controls = instrument.controls(((PROMPTS[0], 1.0), (PROMPTS[1], 0.0)), **asked)
    moves = RandomMoves(options, clock)
    limit_s = SETTLING_S + (options.least_s + options.most_s) / 2 * (options.changes + 2)
    pacing = EngineOptions(
        answer=options.answer, commit_frames=options.commit_frames, limit_s=limit_s + 30
    )
    engine = LiveEngine(instrument.streamer, NullSink(moves), controls, pacing)
    moves.engine = engine
    engine.on_event = lambda event: moves.stop_if_done()
    engine.start()
    wait_with_bar(engine, limit_s)
    meters, latencies = engine.meters(), engine.ledger.latencies_ms()
    cuts_ms = [1e3 * made.made_s for made in engine.ledger.history if made.is_cut]
    return {
        "slider_to_sound_ms": {
            "p50": percentile(latencies, 50),
            "p95": percentile(latencies, 95),
            "max": max(latencies, default=None),
        },
        "planning_ms": {"p50": percentile(cuts_ms, 50), "p95": percentile(cuts_ms, 95)},
        "n_changes": len(latencies),
        "n_cuts": len(cuts_ms),
        "underruns": meters.underruns,
        "rtf": meters.rtf,
        "block_frames": controls.block_frames,
        "n_steps": controls.n_steps,
        "answer": options.answer,
        "commit_frames": options.commit_frames,
        "source": instrument.source,
        "engine": instrument.engine,
        "sha256": instrument.sha256,
        "machine": machine_dict(),
    }


class RandomMoves(WallClock):
    """A clock that moves the mix to another place at random moments.

    Whoever asks it for the time, e.g. the engine, may find a change due: it is asked for as of the
    moment that it was due at.
    """

    def __init__(self, options: Options, clock: WallClock) -> None:
        self.engine: LiveEngine | None = None
        self._clock, self._left = clock, options.changes
        self._rng = random.Random(1)
        self._wait: Callable[[], float] = lambda: self._rng.uniform(options.least_s, options.most_s)
        self._next_s = clock.now() + SETTLING_S

    def now(self) -> float:
        """The time; a change that is due is asked for first."""
        now_s = self._clock.now()
        if self.engine is not None and self._left and now_s >= self._next_s:
            due_s, self._next_s = self._next_s, self._next_s + self._wait()
            self._left -= 1
            mix = self._rng.random()
            prompt = ((PROMPTS[0], 1 - mix), (PROMPTS[1], mix))
            self.engine.control_queue.ask(due_s, prompt=prompt)
        return now_s

    def sleep(self, seconds: float, wake: Any) -> None:
        """Wait no longer than to the next change."""
        until_change_s = max(0.0, self._next_s - self._clock.now()) if self._left else seconds
        self._clock.sleep(min(seconds, until_change_s + 1e-4), wake)

    def stop_if_done(self) -> None:
        """End the stream once the last change has been answered."""
        if not self._left and self.engine is not None and not self.engine.control_queue.waiting():
            self.engine.configure(limit_s=0.0)
