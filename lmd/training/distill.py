"""Warm-up for few steps: learn where a guided sampler ends, from anywhere on its way there.

The teacher is the fine-tuned model, guided, walking many steps. The student looks at one point of
that walk, without guidance, and has to name its end at once: a few steps of the student then go
where many steps of the teacher went, for a sixteenth of the calls. ARC-Forcing starts from it.

The point lies on the walk itself, or on the chord, the straight line between its two ends: that is
where a student who takes few steps really comes along.

Sources: the warm-up on trajectories in the code of Live Music Diffusion Models (arXiv 2605.22717);
chords between noise and what it became as in rectified flow (arXiv 2209.03003); guidance taught
along with it as in arXiv 2210.03142.
"""

from dataclasses import dataclass, replace
from typing import Literal, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from lmd.config import Regime
from lmd.errors import LmdError
from lmd.model.dit import Condition
from lmd.model.live_model import LiveModel
from lmd.model.masks import attention_mask
from lmd.rng import generator
from lmd.shapes import BlockLatents, Latents
from lmd.stream.block import BlockPlan, LiveDenoiser, both_branches
from lmd.stream.samplers import Guidance, dpmpp_2m, schedule
from lmd.training.draws import PerItem
from lmd.training.losses import Packing, pack_copies, packed_velocity

PointsOn = Literal["walk", "chord"]
LossOn = Literal["block", "velocity"]


@dataclass(frozen=True)
class DistillOptions:
    """What a warm-up step draws, besides blocks and dropout, which are the fine-tune's.

    Sources: trajectories of DPM++ and the plain squared error are those of arXiv 2605.22717's code
    (50 steps there, guidance 7, points of the walk). Ours: the steps and the guidance that this
    size plays best with, and several points in one pass, since most of a pass is context. Chords:
    arXiv 2209.03003; what they change is in docs/log.md.
    """

    n_steps: int = 8  # of the teacher
    cfg_scale: float = 1.5  # of the teacher
    n_points: int = 4  # of a walk, that the student looks at in one pass
    regimes: tuple[tuple[Regime, float], ...] = (("block-causal", 0.6), ("enc-dec", 0.4))
    points_on: PointsOn = "chord"
    loss_on: LossOn = "block"

    def __post_init__(self) -> None:
        if not 1 <= self.n_points <= self.n_steps:
            raise LmdError(
                f"{self.n_points} points of a walk of {self.n_steps} steps",
                f"1 to {self.n_steps}",
                "Lower n_points, or raise n_steps.",
            )


class Walk(NamedTuple):
    """A guided sampler's way from noise to a block.

    Attributes:
        states: what it held before each call, `[batch, step, latent, frame]`; noise first.
        end: the block, `[batch, latent, frame]`.
    """

    states: Float[Tensor, "batch step latent length"]
    end: BlockLatents

    def chord(self) -> "Walk":
        """The straight line from its noise to its end, at its noise levels."""
        noise, end = self.states[:, :1], self.end[:, None]
        times = torch.tensor(schedule(self.states.shape[1])[:-1]).to(end)
        return Walk(end + times[:, None, None] * (noise - end), self.end)


@torch.no_grad()
def walk(
    teacher: LiveModel,
    context: Latents,
    noise: BlockLatents,
    condition: Condition,
    plan: BlockPlan,
    options: DistillOptions,
) -> Walk:
    """The next block as the streamer makes it: DPM++, both branches of guidance, cached context."""
    both = both_branches(condition, teacher.null_condition(condition))
    session = LiveDenoiser(teacher).open_block(context.repeat(2, 1, 1), both, plan)
    states: list[Tensor] = []

    def velocities(noisy: Latents, t: float) -> Guidance:
        states.append(noisy)
        return Guidance(*session(noisy.repeat(2, 1, 1), t).chunk(2))

    end = dpmpp_2m(velocities, noise, schedule(options.n_steps), options.cfg_scale)
    return Walk(torch.stack(states, dim=1), end)


def draw_points(options: DistillOptions, seed: int, step: int) -> list[int]:
    """Which points of the walk a step looks at; the same for all rows."""
    order = torch.randperm(options.n_steps, generator=generator(seed, "points of a walk", step))
    return sorted(order[: options.n_points].tolist())


def packed_like_streaming(plan: BlockPlan, context_frames: int, n_points: int) -> Packing:
    """One context and several states of the block behind it; context frames see what they do live.

    In enc-dec the context sees itself whole, in block-causal only what came before.
    """
    packing = pack_copies(n_points, plan.block_frames, context_frames)
    attn_mask = packing.attn_mask.clone()
    live = attention_mask(plan.regime, context_frames, plan.block_frames)
    attn_mask[:context_frames, :context_frames] = live[:context_frames, :context_frames]
    return replace(packing, attn_mask=attn_mask)


def trajectory_loss(
    student: LiveModel,
    context: Latents,
    walked: Walk,
    points: list[int],
    condition: Condition,
    plan: BlockPlan,
    loss_on: LossOn,
) -> PerItem:
    """`|state - t v(state, t) - end|²`: the clean block that the student names, against the end.

    On the velocity it is that over t², `|v(state, t) - (state - end) / t|²`: what is wrong late on
    the way, where a block gets its edges, then counts as much as what is wrong at its start.

    Args:
        student: learns; no guidance.
        context: clean latents in front of the block.
        walked: the teacher's way from that context.
        points: which of its states are looked at.
        condition: prompt and length, as the teacher had them.
        plan: regime and block length.
        loss_on: what is compared.

    Returns:
        One mean squared error per row.
    """
    states = walked.states[:, points]
    times = torch.tensor(schedule(walked.states.shape[1]))[points].to(states)
    t = times.expand(len(states), -1)
    packing = packed_like_streaming(plan, context.shape[-1], len(points))
    velocity = packed_velocity(student, context, states, t, condition, packing)
    error = states - t[..., None, None] * velocity - walked.end[:, None]
    if loss_on == "velocity":
        error = error / t[..., None, None]
    return error.square().mean(dim=(1, 2, 3))
