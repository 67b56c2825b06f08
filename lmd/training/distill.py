"""Distillation: learn where a guided sampler ends, from anywhere on its way there.

The teacher is the fine-tuned model, guided, sampling with many steps. The student looks at some
states of that way, without guidance, and has to name its end at once: a few steps of the student
then go where many of the teacher went. The states lie on the teacher's trajectory itself, or on
the straight path between its two ends, where a student of few steps really comes along.

Sources: the warm-up on trajectories in the code of Live Music Diffusion Models (arXiv 2605.22717);
straight paths between noise and what it became as in rectified flow (arXiv 2209.03003); guidance
taught along with it as in arXiv 2210.03142.
"""

from dataclasses import replace
from typing import NamedTuple

import torch
from einops import rearrange
from jaxtyping import Float
from torch import Tensor

from lmd.model.dit import Condition
from lmd.model.live_model import LiveModel
from lmd.model.masks import attention_mask
from lmd.shapes import BlockLatents, Latents, Tokens
from lmd.stream.block import BlockPlan, LiveDenoiser, both_branches
from lmd.stream.samplers import Guidance, dpmpp_2m, schedule
from lmd.training.draws import (
    BatchIndices,
    DistillOptions,
    LossOn,
    PerItem,
    context_dropout,
    draw_kept,
    draw_timesteps,
)
from lmd.training.losses import Packing, drop_text, pack_copies, packed_velocity
from lmd.training.options import TrainOptions


def distill_loss(
    model: LiveModel,
    teacher: LiveModel,
    clean: Latents,
    noise: BlockLatents,
    prompt: Tokens,
    seconds: float,
    options: TrainOptions,
    rows: BatchIndices,
) -> PerItem:
    """The loss of every row of a step, with everything else that the step draws.

    `clean` are windows of the step's length, whose last block is not looked at; `noise` is that of
    `lmd.training.options.step_noise`; `prompt` is that before dropout, `seconds` the length that
    both models are conditioned on.
    """
    plan, distill = options.plan(rows.step), options.distill
    kept = draw_kept(rows, "text dropout", options.text_dropout)
    context = context_dropout(clean, options.finetune, rows, plan.block_frames)
    context = context[..., : plan.context_frames]
    block = BlockPlan(plan.regime, plan.block_frames)
    asked = drop_text(teacher.condition(prompt, seconds), kept)
    trajectory = teacher_trajectory(teacher, context, noise, asked, block, distill)
    if distill.states == "straight":
        trajectory = trajectory.straight()
    timesteps = draw_timesteps(distill, options.seed, rows.step)
    condition = drop_text(model.condition(prompt, seconds), kept)
    return trajectory_loss(model, context, trajectory, timesteps, condition, block, distill.loss_on)


class Trajectory(NamedTuple):
    """A guided sampler's way from noise to a block."""

    states: Float[Tensor, "batch step latent length"]  # before each call; noise first
    end: BlockLatents

    def straight(self) -> "Trajectory":
        """The straight path from its noise to its end, at the same noise levels."""
        noise, end = self.states[:, :1], self.end[:, None]
        times = torch.tensor(schedule(self.states.shape[1])[:-1]).to(end)
        return Trajectory(end + times[:, None, None] * (noise - end), self.end)


@torch.no_grad()
def teacher_trajectory(
    teacher: LiveModel,
    context: Latents,
    noise: BlockLatents,
    condition: Condition,
    plan: BlockPlan,
    options: DistillOptions,
) -> Trajectory:
    """The next block as the streamer makes it: DPM++, both branches of guidance, cached context."""
    both = both_branches(condition, teacher.null_condition(condition))
    session = LiveDenoiser(teacher).open_block(context.repeat(2, 1, 1), both, plan)
    states: list[Tensor] = []

    def velocities(noisy: Latents, t: float) -> Guidance:
        states.append(noisy)
        return Guidance(*session(noisy.repeat(2, 1, 1), t).chunk(2))

    end = dpmpp_2m(velocities, noise, schedule(options.n_steps), options.cfg_scale)
    return Trajectory(torch.stack(states, dim=1), end)


def packed_like_streaming(plan: BlockPlan, context_frames: int, n_targets: int) -> Packing:
    """One context and several states of the block behind it; context frames see what they do live.

    In enc-dec the context sees itself whole, in block-causal only what came before.
    """
    packing = pack_copies(n_targets, plan.block_frames, context_frames)
    attn_mask = packing.attn_mask.clone()
    live = attention_mask(plan.regime, context_frames, plan.block_frames)
    attn_mask[:context_frames, :context_frames] = live[:context_frames, :context_frames]
    return replace(packing, attn_mask=attn_mask)


def trajectory_loss(
    student: LiveModel,
    context: Latents,
    trajectory: Trajectory,
    timesteps: list[int],
    condition: Condition,
    plan: BlockPlan,
    loss_on: LossOn,
) -> PerItem:
    """`|state - t v(state, t) - end|²`: the clean block that the student names, against the end.

    On the velocity it is that over t², `|v(state, t) - (state - end) / t|²`: what is wrong late on
    the way then counts as much as what is wrong at its start. The context is clean latents, and
    `timesteps` says which states of the trajectory are looked at.
    """
    states = trajectory.states[:, timesteps]
    times = torch.tensor(schedule(trajectory.states.shape[1]))[timesteps].to(states)
    t = times.expand(len(states), -1)
    packing = packed_like_streaming(plan, context.shape[-1], len(timesteps))
    velocity = packed_velocity(student, context, states, t, condition, packing)
    level = rearrange(t, "b step -> b step 1 1")
    error = states - level * velocity - trajectory.end[:, None]
    if loss_on == "velocity":
        error = error / level
    return error.square().mean(dim=(1, 2, 3))
