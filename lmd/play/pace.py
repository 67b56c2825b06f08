"""How fast blocks come, what to do when they come too late: costs, meters, advice."""

import math
import threading
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

from lmd.errors import LmdError
from lmd.play.control_queue import Change
from lmd.play.play_queue import SinkReport
from lmd.shapes import Wave
from lmd.stream.controls import Controls

N_RECENT = 16
HEADROOM = 0.7  # of a block's length that `auto` lets its making take


@dataclass(frozen=True)
class Made:
    """One block as it was made and handed to the sink.

    Attributes:
        number: counts blocks from 0.
        first_sample, n_samples: its place in the stream.
        own_sample: from where on its own frames are heard (later than `first_sample` by what an
            exact seam held back of the block before).
        length_s: seconds of music.
        controls: what it was made with.
        made_s: seconds from taking the controls to having the samples.
        dit_ms, decode_ms: of which in the transformer, in the decoder.
        rebuilt: whether the context's keys were computed afresh.
        queued_s: seconds in the sink's queue just before it was handed over.
        level_db: its RMS level in dB under full scale (−120 for silence).
        fault: why it was replaced, or None.
    """

    number: int
    first_sample: int
    n_samples: int
    own_sample: int
    length_s: float
    controls: Controls
    made_s: float
    dit_ms: float
    decode_ms: float
    rebuilt: bool
    queued_s: float
    level_db: float
    fault: str | None = None

    @property
    def rtf(self) -> float:
        """Seconds heard per second computed."""
        return self.length_s / self.made_s if self.made_s > 0 else math.inf


@dataclass(frozen=True)
class Meters:
    """The state of a live stream at a moment.

    Attributes:
        state: "new", "priming", "playing", "paused", "waiting" (for a lost page), "stopped",
            "failed".
        n_blocks: made so far.
        played_s: seconds of music handed to the sink.
        queued_s, target_s: seconds in the queue, and how many there should be.
        rtf: real-time factor, median of the last 16 blocks.
        dit_ms, decode_ms: medians of the last 16 blocks.
        level_db: RMS level of the last block.
        underruns, silent_s, lowest_s: as the sink counted them.
        n_changes: changes whose latency was measured.
        latency_p50_ms, latency_p95_ms: from asking to the first sample that carries the change.
        n_steps: model calls of the last block (fewer than asked if `auto` is on).
        advice: what would help, one line each.
        error: the last thing that went wrong.
    """

    state: str = "new"
    n_blocks: int = 0
    played_s: float = 0.0
    queued_s: float = 0.0
    target_s: float = 0.0
    rtf: float | None = None
    dit_ms: float | None = None
    decode_ms: float | None = None
    level_db: float | None = None
    underruns: int = 0
    silent_s: float = 0.0
    lowest_s: float | None = None
    n_changes: int = 0
    latency_p50_ms: float | None = None
    latency_p95_ms: float | None = None
    n_steps: int | None = None
    advice: tuple[str, ...] = ()
    error: str = ""


@dataclass(frozen=True)
class EngineOptions:
    """How the engine paces itself.

    Attributes:
        queue_s: target depth of the queue in seconds; None: two blocks. It is never less than one
            block plus `safety_s`.
        safety_s: seconds that are to be left in the queue when a block arrives; more where blocks
            cost so much that a quarter of that is more.
        auto_steps: use fewer steps than asked for while the model is too slow.
        roll_seed: another seed for every block, derived from the one asked for.
        limit_s: stop after so many seconds of music.
    """

    queue_s: float | None = None
    safety_s: float = 0.04
    auto_steps: bool = False
    roll_seed: bool = False
    limit_s: float | None = None

    def __post_init__(self) -> None:
        for name in ("queue_s", "safety_s", "limit_s"):
            value = getattr(self, name)
            is_number = isinstance(value, int | float) and not isinstance(value, bool)
            if value is not None and not (is_number and 0 <= value < math.inf):
                raise LmdError(f"{name} = {value!r}", "seconds, 0 or more", f"Set {name} so.")


@dataclass(frozen=True)
class Promise:
    """A change that has got its block.

    Attributes:
        change: what was asked.
        block, sample: the first block that carries it, and where its own frames begin.
        latency_ms: from asking to that sample's turn in the sink; None if nothing was playing.
    """

    change: Change
    block: int
    sample: int
    latency_ms: float | None


@dataclass(frozen=True)
class Trouble:
    """Something went wrong and was survived.

    Attributes:
        kind: "fault", "underrun", "refused" (a text), "recording" (it ended).
        message: for a person.
    """

    kind: str
    message: str


def percentile(values: Sequence[float], percent: float) -> float | None:
    """The smallest value that at least `percent` of the values do not exceed; None of nothing."""
    if not values:
        return None
    ordered = sorted(values)
    return ordered[max(0, math.ceil(len(ordered) * percent / 100) - 1)]


class CostBook:
    """What blocks have cost, by what determines their cost."""

    def __init__(self, n_remembered: int = 32) -> None:
        self._n = n_remembered
        self._costs: dict[tuple[object, ...], deque[float]] = {}

    @staticmethod
    def _key(controls: Controls) -> tuple[object, ...]:
        c = controls
        return (c.block_frames, c.n_steps, c.sampler, c.regime, c.is_guided)

    def note(self, controls: Controls, made_s: float) -> None:
        """One more block."""
        self._costs.setdefault(self._key(controls), deque(maxlen=self._n)).append(made_s)

    def expected_s(self, controls: Controls) -> float | None:
        """The most that such a block cost lately, one stall forgiven; None if there was none."""
        costs = sorted(self._costs.get(self._key(controls), ()))
        return costs[-2 if len(costs) > 7 else -1] if costs else None


def affordable_steps(made: Made) -> int:
    """How many steps would have let this block be made in `HEADROOM` of its length (at least 1)."""
    step_s = made.dit_ms / 1e3 / max(1, made.controls.n_steps)
    other_s = made.made_s - made.dit_ms / 1e3
    if step_s <= 0:
        return made.controls.n_steps
    return max(1, math.floor((HEADROOM * made.length_s - other_s) / step_s))


def advice_for(recent: Sequence[Made]) -> tuple[str, ...]:
    """What would make blocks cheap enough, cheapest loss first; nothing if they are already.

    Args:
        recent: the latest blocks, newest last.

    Returns:
        Lines for a person, with the numbers that they follow from.
    """
    good = [made for made in recent if made.fault is None]
    if not good or median(made.rtf for made in good) > 1 / HEADROOM:
        return ()
    last, rtf = good[-1], median(made.rtf for made in good)
    controls, lines = last.controls, []
    steps = affordable_steps(last)
    if steps < controls.n_steps:
        saved_s = last.dit_ms / 1e3 * (1 - steps / controls.n_steps)
        effect = "would keep up" if last.made_s - saved_s < last.length_s else "would help"
        lines.append(f"fewer steps: {steps} instead of {controls.n_steps} {effect}")
    if controls.is_guided:
        lines.append("guidance off (1): every step then runs one branch instead of two")
    if controls.regime != "block-causal":
        lines.append("the block-causal regime: it computes the context once, not at every block")
    if last.decode_ms > last.dit_ms:
        lines.append("longer blocks: decoding costs more than denoising, and its margin per block")
    lines.append("other programs: close what else uses the processor")
    return (f"Blocks come at {rtf:.2f}× real time. What would help:", *lines)


class Ledger:
    """What was made and promised, kept for meters, charts and pacing; safe between threads.

    Attributes:
        history: the latest 4096 blocks.
        promises: the latest 1024 changes that have got their block.
        costs: of blocks, for pacing.
    """

    def __init__(self) -> None:
        self.history: deque[Made] = deque(maxlen=4096)
        self.promises: deque[Promise] = deque(maxlen=1024)
        self.costs = CostBook()
        self._lock = threading.Lock()

    def note(self, made: Made, promises: Sequence[Promise]) -> None:
        """One more block, and the changes that it is the first to carry."""
        with self._lock:
            self.history.append(made)
            self.promises.extend(promises)
            if made.fault is None:
                self.costs.note(made.controls, made.made_s)

    def recent(self, n: int = N_RECENT) -> list[Made]:
        """The latest blocks, newest last."""
        with self._lock:
            return list(self.history)[-n:]

    def latencies_ms(self) -> list[float]:
        """From asking to sound, of every change that was asked while music played."""
        with self._lock:
            return [p.latency_ms for p in self.promises if p.latency_ms is not None]

    def meters(self, report: SinkReport, sample_rate: int, **present: Any) -> Meters:
        """The meters: `present` holds what only the engine knows."""
        recent, latencies = self.recent(), self.latencies_ms()
        last = recent[-1] if recent else None
        return Meters(
            rtf=median(made.rtf for made in recent) if recent else None,
            dit_ms=median(made.dit_ms for made in recent) if recent else None,
            decode_ms=median(made.decode_ms for made in recent) if recent else None,
            level_db=last.level_db if last else None,
            n_steps=last.controls.n_steps if last else None,
            underruns=report.underruns,
            silent_s=report.silent_samples / sample_rate,
            lowest_s=report.lowest_s if report.lowest_s < math.inf else None,
            n_changes=len(latencies),
            latency_p50_ms=percentile(latencies, 50),
            latency_p95_ms=percentile(latencies, 95),
            advice=advice_for(recent),
            **present,
        )


def level_db(wave: Wave) -> float:
    """RMS level in dB under full scale; −120 for silence, and where there is no sample."""
    if not wave.numel():
        return -120.0
    rms = float(wave.detach().float().square().mean().sqrt())
    return 20 * math.log10(max(rms, 1e-6))
