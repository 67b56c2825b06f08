"""A stream as it is planned: what is final, and what may still be changed.

Much is planned ahead, and little of it is final: what has been heard. `append` plans another block
at the end; `cut` throws away what is planned from a sample on and plans a block from there.
Playing and playing a take again are these two calls in the same order.

Taught in notebook 04_play.
"""

from dataclasses import dataclass, replace

import numpy as np
import torch

from lmd.errors import LmdError
from lmd.play.guard import Guarded, PlayedBlock, guarded_step, limit
from lmd.play.play_queue import FADE_S, crossfaded
from lmd.stream.controls import Controls
from lmd.stream.streamer import Streamer


@dataclass(frozen=True)
class Plan:
    """One block in its place."""

    before: Guarded  # what it was made from
    played: PlayedBlock  # what came of it
    controls: Controls
    first_sample: int  # of its wave, in the stream
    start_sample: int  # from where it is to be heard: the cut, or the first sample
    cut_frame: int | None = None  # where it was cut in
    n_threads: int = 1  # of torch

    @property
    def samples(self) -> np.ndarray:
        """What is to be heard of it, `[channel, sample]`."""
        return self.played.wave[0, :, self.start_sample - self.first_sample :].numpy()

    @property
    def first_frame(self) -> int:
        """The number of its first frame."""
        return self.before.state.n_frames

    def frame_at(self, sample: int, samples_per_frame: int) -> int:
        """The frame that is heard at a sample of the stream."""
        offset = self.first_sample - self.before.state.n_samples  # of blocks that were replaced
        return (sample - offset) // samples_per_frame


class Timeline:
    """What is planned of one stream.

    Args:
        streamer: makes the blocks.
        start: where the stream begins.
        limited: whether a limiter holds the wave within full scale.
    """

    def __init__(self, streamer: Streamer, start: Guarded, limited: bool = True) -> None:
        self.streamer, self._after, self._limited = streamer, start, limited
        self._plans: list[Plan] = []  # that a cut may go back into
        self._unsettled: list[Plan] = []  # of which nothing is final
        self._samples = np.zeros((streamer.codec.channels, 0), dtype=np.float32)
        self.n_settled = 0  # samples that are final
        self._rate = streamer.codec.sample_rate
        self._n_fade = round(FADE_S * self._rate)

    @property
    def n_samples(self) -> int:
        """How many samples are planned, from the stream's beginning."""
        return self.n_settled + self._samples.shape[-1]

    def append(self, controls: Controls, fault: str | None = None) -> Plan:
        """Plan one block more.

        Args:
            controls: for this block.
            fault: take the block for bad, for this reason (see `guarded_step`).
        """
        before, end = self._after, self.n_samples
        played, self._after = guarded_step(self.streamer, before, controls, fault, self._limited)
        plan = Plan(before, played, controls, end, end, None, torch.get_num_threads())
        return self._keep(plan)

    def cut(self, sample: int, controls: Controls) -> Plan:
        """Plan anew from a sample on; what was planned from there is thrown away.

        The frame that is heard at that sample is the first of the new block. The two are joined by
        a cross-fade that begins at the sample.

        Returns:
            The new plan. If the block had a fault, everything is as it was.

        Raises:
            LmdError: a sample that was heard already or that is not planned, or one in a block
                that could not be used.
        """
        number, frame = self._origin(sample)
        origin = self._plans[number]
        state = self.streamer.rewind(origin.before.state, origin.played.block, frame)
        n_again = state.n_samples - origin.before.state.n_samples  # samples of it that stay
        _, gain_db = limit(
            origin.played.block.wave[..., :n_again], origin.before.gain_db, self._rate
        )
        before = replace(origin.before, state=state, n_faults=0, gain_db=gain_db)
        played, after = guarded_step(self.streamer, before, controls, None, self._limited)
        first = origin.first_sample + n_again
        plan = Plan(before, played, controls, first, sample, frame, torch.get_num_threads())
        if played.fault is None:
            thrown, self._after = self.thrown_away_at(sample), after
            del self._plans[number + (frame > origin.first_frame) :]
            self._unsettled = self._unsettled[: len(self._unsettled) - len(thrown)]
            self._keep(plan)
        return plan

    def thrown_away_at(self, sample: int) -> list[Plan]:
        """The plans of which nothing would be heard after a cut at that sample."""
        faded = sample + self._n_fade
        return [plan for plan in self._unsettled if plan.start_sample >= faded]

    def settle(self, sample: int) -> tuple[list[Plan], np.ndarray]:
        """What is final now that everything before `sample` has been heard.

        Returns:
            The plans that begin before it and were not returned yet, and the samples
            `[channel, sample]` since the last call.
        """
        n = max(0, min(sample, self.n_samples) - self.n_settled)
        final, self._samples = self._samples[:, :n], self._samples[:, n:]
        self.n_settled += n
        starts = [plan.start_sample < self.n_settled for plan in self._unsettled]
        n_begun = max((number for number, begun in enumerate(starts, 1) if begun), default=0)
        begun, self._unsettled = self._unsettled[:n_begun], self._unsettled[n_begun:]
        hop = self.streamer.codec.samples_per_frame
        while len(self._plans) > 1 and self._plans[1].first_frame <= self._plans[1].frame_at(
            self.n_settled, hop
        ):
            del self._plans[0]
        return begun, final

    def _origin(self, sample: int) -> tuple[int, int]:
        """Which plan a cut at a sample goes back into, and the first frame that is made anew."""
        if not self.n_settled <= sample < self.n_samples:
            raise LmdError(
                f"a cut at sample {sample}",
                f"{self.n_settled} to {self.n_samples}, what is planned and not heard",
                "Cut there, or wait for the next block.",
            )
        hop = self.streamer.codec.samples_per_frame
        for number in reversed(range(len(self._plans))):
            plan = self._plans[number]
            frame = plan.frame_at(sample, hop)
            if plan.first_frame <= frame:
                break
        if plan.played.block is None or frame < plan.first_frame:
            raise LmdError(f"a cut at sample {sample}, in a bad block", "a good one", "Wait.")
        return number, frame

    def _keep(self, plan: Plan) -> Plan:
        self._plans.append(plan)
        self._unsettled.append(plan)
        planned = self._samples[:, : plan.start_sample - self.n_settled]
        replaced = self._samples[:, planned.shape[-1] :]
        samples = crossfaded(replaced[:, : self._n_fade], plan.samples)
        self._samples = np.concatenate([planned, samples], axis=-1)
        return plan
