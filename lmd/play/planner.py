"""What is planned next, and when: a block at the end, or a cut where a change is to be heard."""

import math
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from lmd.errors import LmdError
from lmd.play.control_queue import Change, ControlQueue
from lmd.play.guard import Guarded
from lmd.play.pace import HEADROOM, NEXT_BLOCK, REST_S, EngineOptions, Ledger, Made, Pacer
from lmd.play.play_queue import FADE_S
from lmd.play.sinks import Sink
from lmd.play.timeline import Plan, Timeline
from lmd.stream.controls import Controls
from lmd.stream.state import StreamState
from lmd.stream.streamer import Streamer


@dataclass(frozen=True)
class Planned:
    """A block that was planned, and what it carries."""

    plan: Plan
    made: Made
    asked: Controls  # what it was to be made with, before the pace had its say
    changes: list[Change]  # which it is the first to carry
    is_late: bool = False  # these were to be heard at once, and there was no time for a cut


class Planner:
    """Keeps a timeline ahead of a sink.

    Args:
        streamer, sink: what makes the blocks and what plays them.
        control_queue: what is asked for.
        options: how far ahead, and how soon a change is heard.
        ledger: what blocks have cost.
        start: where the stream begins; None: silence.
    """

    def __init__(
        self,
        streamer: Streamer,
        sink: Sink,
        control_queue: ControlQueue,
        options: EngineOptions,
        ledger: Ledger,
        start: StreamState | None = None,
    ) -> None:
        self.streamer, self.sink, self.control_queue = streamer, sink, control_queue
        self.ledger, self.rate = ledger, streamer.codec.sample_rate
        self.pacer = Pacer(options, ledger, streamer.codec.samples_per_frame / self.rate)
        self.timeline = Timeline(streamer, Guarded(streamer.start() if start is None else start))
        self.n_blocks = 0
        self._known_at = 0  # the sample from which the plan knows what was asked last
        self._later: list[tuple[int, dict[str, Any]]] = []  # changes by the sample they are for
        self._cut_after_s = self._rest_until_s = -math.inf  # by the sink's clock

    def begin(self) -> None:
        """Encode the texts that will be played, before the music starts."""
        self.control_queue.encode_first([changes for _, changes in self._later])

    def change_at(self, second: float, changes: dict[str, Any]) -> None:
        """Ask for other controls from that second of the stream on (`LmdError`: impossible)."""
        if not 0 < second < math.inf:
            raise LmdError(f"a change at {second} s", "a time after the beginning", "Set it so.")
        self.control_queue.check(changes)
        self._later.append((round(second * self.rate), changes))
        self._later.sort(key=lambda later: later[0])

    def settle(self, queued_s: float) -> tuple[list[Plan], np.ndarray]:
        """What has been heard since the last time (see `Timeline.settle`)."""
        end = 0 if math.isinf(queued_s) else self.heard(queued_s)
        end = min(end, self.pacer.options.limit_s * self.rate)
        if self._later:  # where nobody hears it, all is heard at once: up to there it is final
            end = min(end, self._later[0][0])
        return self.timeline.settle(round(end))

    def heard(self, queued_s: float) -> int:
        """The sample of the stream that is being heard."""
        return self.timeline.n_samples - round(queued_s * self.rate)

    @property
    def is_complete(self) -> bool:
        """Whether all that was asked for is planned."""
        return self.timeline.n_samples >= self.pacer.options.limit_s * self.rate

    def step(self, queued_s: float) -> Planned | float:
        """Plan what is due, or say how many seconds nothing will be."""
        if self._is_later_due(queued_s):
            sample, changes = self._later.pop(0)
            self.control_queue.ask(self.sink.clock.now(), **changes)
            return self._cut(queued_s, sample)
        cut_in_s = self._cut_in_s(queued_s)
        if cut_in_s <= 0:
            return self._cut(queued_s)
        if self.is_complete:
            return min(cut_in_s, queued_s)
        controls = self.pacer.effective(self.control_queue.asked(), self.n_blocks)
        rest_s = self._rest_until_s - self.sink.clock.now()
        due_in_s = self.pacer.due_in_s(controls, queued_s, rest_s)
        return self._append() if due_in_s <= 0 else min(cut_in_s, due_in_s)

    def _is_later_due(self, queued_s: float) -> bool:
        """Whether a change that was asked for a sample has to be made now."""
        if not self._later or math.isinf(queued_s) or not self.n_blocks:
            return False
        lead = round(self._lead_s() * self.rate) if queued_s else 0
        return self.heard(queued_s) + lead >= self._later[0][0]

    def _cut_in_s(self, queued_s: float) -> float:
        """Seconds until the plan must be cut; infinite if there is no reason to, or no use."""
        options = self.pacer.options
        if not 0 < queued_s < math.inf:
            return math.inf
        wait_s = self._cut_after_s - self.sink.clock.now()
        if options.answer == "at once" and self.control_queue.waiting() - NEXT_BLOCK:
            return wait_s
        if options.commit_frames and not self.is_complete:
            end = self._known_at + options.commit_frames * self.streamer.codec.samples_per_frame
            left_s = (end - self.heard(queued_s)) / self.rate - self._lead_s()
            return max(wait_s, left_s)
        return math.inf

    def _lead_s(self) -> float:
        """How long before a sample's turn its cut must begin."""
        controls = self.pacer.answering(self.control_queue.asked(), self.streamer)
        return self.ledger.planning_s(controls) + self.sink.lead_s

    def _cut(self, queued_s: float, sample: int = 0) -> Planned:
        """Plan anew from `sample`, or from a moment after what is heard if that is later.

        If that is not planned yet, a block is appended.
        """
        began_s, timeline = self.sink.clock.now(), self.timeline
        if queued_s > 0:
            sample = max(sample, self.heard(queued_s) + round(self._lead_s() * self.rate))
        self._known_at = min(sample, timeline.n_samples)
        if timeline.n_samples - sample < FADE_S * self.rate:  # planned too short for a cut
            planned = self._append()
            return replace(planned, is_late=queued_s > 0 and bool(planned.changes))
        asked, changes = self.control_queue.take()
        waiting = [asked, *(plan.controls for plan in timeline.thrown_away_at(sample))]
        drop = max(controls.drop_context_frames for controls in waiting)  # it was not heard yet
        asked = replace(asked, drop_context_frames=drop)
        controls = self.pacer.effective(asked, self.n_blocks)
        try:
            plan = timeline.cut(sample, self.pacer.answering(controls, self.streamer))
        except LmdError:  # in a block that had a fault
            self.control_queue.give_back(asked, changes)
            return self._append()
        if plan.played.fault is None:
            self.sink.replace(sample, plan.samples)
        now_s = self.sink.clock.now()
        self._cut_after_s = began_s + (now_s - began_s) / HEADROOM
        self._rest_until_s = now_s + REST_S
        return self._planned(plan, began_s, queued_s, asked, changes)

    def _append(self) -> Planned:
        """Plan one block more."""
        began_s = self.sink.clock.now()
        asked, changes = self.control_queue.take()
        plan = self.timeline.append(self.pacer.effective(asked, self.n_blocks))
        queued_s = self.sink.queued_s()
        self.sink.write(plan.samples)
        return self._planned(plan, began_s, queued_s, asked, changes)

    def _planned(
        self,
        plan: Plan,
        began_s: float,
        queued_s: float,
        asked: Controls,
        changes: list[Change],
    ) -> Planned:
        """What is known of a block now."""
        played, block = plan.played, plan.played.block
        own_from = block.own_from if block else 0
        made = Made(
            number=self.n_blocks,
            first_sample=plan.start_sample,
            n_samples=plan.samples.shape[-1],
            own_sample=max(plan.start_sample, plan.first_sample + own_from),
            length_s=self.pacer.block_s(plan.controls),
            controls=plan.controls,
            made_s=self.sink.clock.now() - began_s,
            dit_ms=block.dit_ms if block else 0.0,
            decode_ms=block.decode_ms if block else 0.0,
            queued_s=queued_s,
            level_db=played.level_db,
            limited_db=played.limited_db,
            fault=played.fault,
            is_cut=plan.cut_frame is not None,
        )
        self.n_blocks += 1
        if played.fault is not None:
            self.control_queue.give_back(asked, changes)
            changes = []
        return Planned(plan, made, asked, changes)
