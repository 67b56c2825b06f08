"""Distillation: learn where a guided sampler ends, from anywhere on a straight path there.

The teacher is the fine-tuned model, guided, sampling with many steps. The student looks at some
points of the straight path between the noise and the block that the teacher made of it, where a
student of few steps comes along, and has to name that block at once, without guidance: a few of its
steps then go where many of the teacher went.

Sources: the warm-up on trajectories in the code of Live Music Diffusion Models (arXiv 2605.22717);
straight paths between noise and what it became as in rectified flow (arXiv 2209.03003); guidance
taught along with it as in arXiv 2210.03142.
"""

from dataclasses import replace

import torch
from einops import rearrange

from lmd.model.dit import Condition
from lmd.model.live_model import LiveModel
from lmd.model.masks import attention_mask
from lmd.shapes import BlockLatents, Latents, Tokens
from lmd.stream.block import BlockPlan, LiveDenoiser, both_branches
from lmd.stream.samplers import Guidance, dpmpp_2m, schedule
from lmd.training.draws import (
    BatchIndices,
    PerItem,
    context_dropout,
    draw_kept,
    draw_timesteps,
    plan_step,
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
    `lmd.training.draws.step_noise`; `prompt` is that before dropout, `seconds` the length that both
    models are conditioned on.
    """
    plan = plan_step(options, rows.step)
    kept = draw_kept(rows, "text dropout", options.text_dropout)
    shares = options.context_dropout_all, options.context_dropout_part
    context = context_dropout(clean, rows, plan.block_frames, plan.context_frames, *shares)
    context = context[..., : plan.context_frames]
    block, levels = BlockPlan(plan.regime, plan.block_frames), schedule(options.teacher_steps)
    asked = drop_text(teacher.condition(prompt, seconds), kept)
    end = teacher_block(teacher, context, noise, asked, block, levels, options.cfg_scale)
    seen = [levels[k] for k in draw_timesteps(options, rows.step)]
    condition = drop_text(model.condition(prompt, seconds), kept)
    return trajectory_loss(model, context, noise, end, seen, condition, block)


@torch.no_grad()
def teacher_block(
    teacher: LiveModel,
    context: Latents,
    noise: BlockLatents,
    condition: Condition,
    plan: BlockPlan,
    levels: tuple[float, ...],
    cfg_scale: float,
) -> BlockLatents:
    """The next block as the streamer makes it: DPM++, both branches of guidance, cached context."""
    both = both_branches(condition, teacher.null_condition(condition))
    session = LiveDenoiser(teacher).open_block(context.repeat(2, 1, 1), both, plan)

    def velocities(noisy: Latents, t: float) -> Guidance:
        return Guidance(*session(noisy.repeat(2, 1, 1), t).chunk(2))

    return dpmpp_2m(velocities, noise, levels, cfg_scale)


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
    noise: BlockLatents,
    end: BlockLatents,
    levels: list[float],
    condition: Condition,
    plan: BlockPlan,
) -> PerItem:
    """`|state - t v(state, t) - end|²`: the clean block that the student names, against the end.

    The states lie between noise and end at these levels t: `state = end + t (noise - end)`.
    """
    t = torch.tensor(levels).to(end).expand(len(end), -1)
    level = rearrange(t, "b step -> b step 1 1")
    states = end[:, None] + level * (noise - end)[:, None]
    packing = packed_like_streaming(plan, context.shape[-1], len(levels))
    velocity = packed_velocity(student, context, states, t, condition, packing)
    return (states - level * velocity - end[:, None]).square().mean(dim=(1, 2, 3))
