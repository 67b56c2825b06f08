"""How fast blocks come, what to do when they come too late: costs, meters, advice."""

import math
import threading
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, replace
from statistics import median
from typing import Any, Literal

import numpy as np

import lmd
from lmd.errors import LmdError
from lmd.play.control_queue import MAX_LIVE_STEPS, Change
from lmd.play.play_queue import SinkReport
from lmd.rng import derive_seed
from lmd.stream.controls import Controls
from lmd.stream.streamer import Streamer

SAFETY_S = 0.04  # left in the queue when a block arrives, or a quarter of its cost
JITTER = 0.25  # of what a block costs at most: how much more the next one may cost
N_RECENT = 16
COST_DEPENDS_ON = ("block_frames", "n_steps", "sampler", "regime", "is_guided")
N_COSTS = 32  # blocks of one kind whose cost is remembered
HEADROOM = 0.7  # of a block's length that `auto` lets its making take, of time that cuts may take
ANSWERS = ("at once", "next block")
NEXT_BLOCK = {"block_frames", "regime", "boundary"}  # controls that no cut is made for
ANSWER_FRAMES = 12  # of a block that answers a change, beyond the codec's look-ahead
LEAST_REST_S = 0.12  # twice this, or twice what a block costs, is left in the queue meanwhile
REST_S = 1.0  # after a change: so long no more is planned than has to be
MEDIANS = ("rtf", "dit_ms", "decode_ms")
STARVED = 20  # times what such a block usually costs: something else has taken the cores


@dataclass(frozen=True)
class Made:
    """One block as it was made and handed to the sink."""

    number: int  # counts blocks from 0
    first_sample: int  # its place in the stream
    n_samples: int
    own_sample: int  # from where its own frames are heard: later by what `exact` held back
    length_s: float  # of music
    controls: Controls  # what it was made with
    made_s: float  # from taking the controls to having the samples
    dit_ms: float  # of which in the transformer
    decode_ms: float  # of which in the decoder
    queued_s: float  # in the sink's queue just before it was handed over
    level_db: float  # its RMS level under full scale (−120 for silence)
    limited_db: float = 0.0  # by how much the limiter turned it down
    fault: str | None = None  # why it was replaced
    is_cut: bool = False  # it replaces what was planned before

    @property
    def rtf(self) -> float:
        """Seconds heard per second computed."""
        return self.length_s / self.made_s if self.made_s > 0 else math.inf


@dataclass(frozen=True)
class Meters:
    """The state of a live stream at a moment; medians are of the last 16 blocks."""

    state: str = "new"  # priming, playing, paused, waiting (for a lost page), stopped, failed
    n_blocks: int = 0  # made so far
    played_s: float = 0.0  # seconds of music handed to the sink
    queued_s: float = 0.0  # in the queue
    target_s: float = 0.0  # how many there should be
    rtf: float | None = None  # real-time factor, median
    dit_ms: float | None = None  # median
    decode_ms: float | None = None  # median
    level_db: float | None = None  # of the last block, RMS
    limited_db: float = 0.0  # by how much the limiter turned the last block down
    underruns: int = 0  # as the sink counted them
    silent_s: float = 0.0
    lowest_s: float | None = None
    n_changes: int = 0  # whose latency was measured
    latency_p50_ms: float | None = None  # from asking to the first sample that carries the change
    latency_p95_ms: float | None = None
    n_steps: int | None = None  # of the last block (fewer than asked if `auto` is on)
    advice: tuple[str, ...] = ()  # what would help, one line each
    error: str = ""  # the last thing that went wrong


@dataclass(frozen=True)
class EngineOptions:
    """How the engine paces itself."""

    queue_s: float | None = None  # target depth (None: two blocks); at least a block + SAFETY_S
    auto_steps: bool = False  # fewer steps than asked for while the model is too slow
    roll_seed: bool = False  # another seed for every block, derived from the one asked for
    answer: Literal["at once", "next block"] = "at once"  # when a change is heard
    commit_frames: int = 0  # so much of a plan is played before it is made again (0: all)
    limit_s: float = math.inf  # stop after so much music

    def __post_init__(self) -> None:
        if self.answer not in ANSWERS:
            raise LmdError(f"answer {self.answer!r}", " or ".join(ANSWERS), "Pick one of these.")
        if type(self.commit_frames) is not int or self.commit_frames < 0:
            raise LmdError(f"commit_frames {self.commit_frames!r}", "frames, 0 or more", "Set it.")
        for name, other in {"queue_s": None, "limit_s": math.inf}.items():
            value = getattr(self, name)
            is_number = isinstance(value, int | float) and not isinstance(value, bool)
            if value != other and not (is_number and 0 <= value < math.inf):
                raise LmdError(f"{name} = {value!r}", "seconds, 0 or more", f"Set {name} so.")


@dataclass(frozen=True)
class AppliedChange:
    """A change that has got its block."""

    change: Change  # what was asked
    block: int  # the first that carries it
    sample: int  # where that block's own frames begin, or the cut
    latency_ms: float | None  # from asking to that sample's turn; None if nothing was playing


@dataclass(frozen=True)
class Trouble:
    """Something went wrong and was survived."""

    kind: str  # fault, underrun, threads, refused (a text), recording or take (it ended)
    message: str  # for a person


def percentile(values: Sequence[float], percent: float) -> float | None:
    """The smallest value that at least `percent` of the values do not exceed; None of nothing."""
    return float(np.percentile(values, percent, method="inverted_cdf")) if values else None


def affordable_steps(made: Made) -> int:
    """How many steps would have let this block be made in `HEADROOM` of its length (at least 1)."""
    if made.dit_ms <= 0:
        return made.controls.n_steps
    steps_s = made.dit_ms / 1e3
    left_s = HEADROOM * made.length_s - (made.made_s - steps_s)
    return max(1, math.floor(left_s / steps_s * made.controls.n_steps))


class Ledger:
    """What was made and applied, kept for meters, charts and pacing; safe between threads."""

    def __init__(self) -> None:
        self.history: deque[Made] = deque(maxlen=4096)  # the latest blocks
        self.applied: deque[AppliedChange] = deque(maxlen=1024)  # changes that got their block
        self._costs_s: dict[tuple[object, ...], deque[float]] = {}
        self._lock = threading.Lock()

    def note(self, made: Made, applied: Sequence[AppliedChange]) -> None:
        """One more block, and the changes that it is the first to carry."""
        with self._lock:
            self.history.append(made)
            self.applied.extend(applied)
            if made.fault is None:
                self._costs_of(made.controls, made.is_cut).append(made.made_s)

    def _costs_of(self, controls: Controls, is_cut: bool = False) -> deque[float]:
        """What blocks have cost that cost the same, in seconds."""
        key = (is_cut, *(getattr(controls, name) for name in COST_DEPENDS_ON))
        return self._costs_s.setdefault(key, deque(maxlen=N_COSTS))

    def planning_s(self, controls: Controls) -> float:
        """How long a cut with such a block takes: the 95th percentile of the latest ones.

        Before the first one it is guessed from the latest block.
        """
        costs = self._costs_of(controls, is_cut=True)
        return percentile(costs, 95) or 1.5 * (self.history[-1].made_s if self.history else 0.1)

    def expected_s(self, controls: Controls) -> float | None:
        """The most that such a block cost lately, one stall forgiven; None if there was none."""
        costs = sorted(self._costs_of(controls))
        return costs[-2 if len(costs) > 7 else -1] if costs else None

    def is_starved(self, controls: Controls) -> bool:
        """Whether the last two such blocks cost `STARVED` times what those before them did."""
        *before, a, b = (0.0, 0.0, *self._costs_of(controls))
        return len(before) > 6 and min(a, b) > STARVED * median(before[2:])

    def recent(self) -> list[Made]:
        """The latest blocks, newest last."""
        with self._lock:
            return list(self.history)[-N_RECENT:]

    def latencies_ms(self) -> list[float]:
        """From asking to sound, of the changes that were asked while music played."""
        with self._lock:
            return [a.latency_ms for a in self.applied if a.latency_ms is not None]

    def advice(self) -> tuple[str, ...]:
        """What would make such blocks cheap enough, cheapest loss first; nothing if they are."""
        good = [made for made in self.recent() if made.fault is None]
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
            lines.append("the block-causal regime: it computes the context once, not per block")
        if last.decode_ms > last.dit_ms:
            lines.append("longer blocks: decoding, with its margin per block, costs most")
        lines.append("other programs: close what else uses the processor")
        return (f"Blocks come at {rtf:.2f}× real time. What would help:", *lines)

    def advice_when_late(self) -> str:
        """What to say when the queue has run dry."""
        once = "One block came late; if it happens again, choose a longer queue."
        lines = [*self.advice()] or [once]
        if not lmd.SPIN_IS_LIMITED:
            lines.append("Import lmd before torch: waiting threads then leave the cores to others.")
        return " ".join(lines)

    def meters(self, report: SinkReport, sample_rate: int, **present: Any) -> Meters:
        """The meters: `present` holds what only the engine knows."""
        recent, latencies = self.recent(), self.latencies_ms()
        advice = self.advice()
        if recent:
            if recent[-1].limited_db >= 0.1:
                over = f"{recent[-1].limited_db:.0f} dB over full scale and is turned down"
                help_ = "Less guidance or more steps would help."
                advice = (f"The model plays {over}. {help_}", *advice)
            present |= {n: median(getattr(m, n) for m in recent) for n in MEDIANS}
            present |= {n: getattr(recent[-1], n) for n in ("level_db", "limited_db")}
            present["n_steps"] = recent[-1].controls.n_steps
        return Meters(
            underruns=report.underruns,
            silent_s=report.silent_samples / sample_rate,
            lowest_s=report.lowest_s if report.lowest_s < math.inf else None,
            n_changes=len(latencies),
            latency_p50_ms=percentile(latencies, 50),
            latency_p95_ms=percentile(latencies, 95),
            advice=advice,
            **present,
        )


class Pacer:
    """When the next block is due, and with how many steps it can be made in time."""

    def __init__(self, options: EngineOptions, ledger: Ledger, frame_s: float) -> None:
        self.options, self._ledger, self._frame_s = options, ledger, frame_s
        self._steps_cap = MAX_LIVE_STEPS

    def block_s(self, controls: Controls) -> float:
        """How long such a block lasts, in seconds."""
        return controls.block_frames * self._frame_s

    def depth_s(self, controls: Controls) -> float:
        """The queue's target depth with such blocks, in seconds."""
        block_s, asked_s = self.block_s(controls), self.options.queue_s
        return max(2 * block_s if asked_s is None else asked_s, block_s + SAFETY_S)

    def due_in_s(self, controls: Controls, queued_s: float, resting_s: float = 0.0) -> float:
        """Seconds until the next block must be made; not positive: now.

        For `resting_s` more no block is made that is not needed: another change may be under way.
        """
        block_s, expected_s = self.block_s(controls), self._ledger.expected_s(controls)
        cost_s = block_s if expected_s is None else min(expected_s, block_s)
        least_s = max(SAFETY_S, JITTER * cost_s)
        left_s = max(self.depth_s(controls) - block_s, least_s)
        due_s = queued_s - (left_s + cost_s)
        return max(due_s, min(resting_s, queued_s - 2 * max(cost_s, LEAST_REST_S)))

    def answering(self, controls: Controls, streamer: Streamer) -> Controls:
        """The controls for a block that answers a change: shorter, to be made soon.

        The shortest legal length of `ANSWER_FRAMES` beyond the codec's look-ahead is taken, at most
        the one that was asked for.
        """
        least = streamer.codec.lookahead_frames + ANSWER_FRAMES
        legal = [n for n in streamer.window.block_lengths() if least <= n < controls.block_frames]
        return replace(controls, block_frames=min(legal, default=controls.block_frames))

    def effective(self, controls: Controls, number: int) -> Controls:
        """What was asked of block `number`, as `auto_steps` and `roll_seed` change it."""
        if self.options.auto_steps and self._steps_cap < controls.n_steps:
            controls = replace(controls, n_steps=self._steps_cap)
        if self.options.roll_seed:
            controls = replace(controls, seed=derive_seed(controls.seed, "roll", number) % 2**31)
        return controls

    def learn(self, made: Made) -> None:
        """Fewer steps at once where they did not fit, one more a block where they do."""
        affordable = affordable_steps(made)
        fits = affordable >= made.controls.n_steps
        self._steps_cap = min(affordable, self._steps_cap + 1) if fits else affordable
