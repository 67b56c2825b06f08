"""Stage 1: what the model is taught, as pure functions.

The base learns the velocity of every frame (`flow_loss`). The fine-tune learns that of a block
after clean context, in all regimes and block lengths (`outpaint_loss`). Where a regime allows it,
one pass teaches several blocks (`packed_loss`): the context is encoded once, and each noised block
has its own noise level and global token. `stage_loss` is a whole training step; what it draws
stands in `lmd.training.draws`.

Source: Live Music Diffusion Models (arXiv 2605.22717), fine-tuning; Block Diffusion
(arXiv 2503.09573) for all blocks in one pass. Taught in notebook 02_outpaint.
"""

from dataclasses import dataclass

import torch
from einops import rearrange
from jaxtyping import Bool, Float
from torch import Tensor

from lmd.config import check_block
from lmd.model.dit import Condition
from lmd.model.live_model import LiveModel
from lmd.model.masks import all_blocks_mask, attention_mask
from lmd.shapes import AttentionMask, Latents, NoiseLevel, Positions
from lmd.stream.samplers import add_noise, velocity_of
from lmd.training.draws import (
    BatchIndices,
    PerBlock,
    PerItem,
    StepPlan,
    context_dropout,
    draw_kept,
    draw_levels,
    plan_step,
)
from lmd.training.options import TrainOptions

Blocks = Float[Tensor, "batch block latent length"]  # several noised blocks of one window


def stage_loss(
    model: LiveModel,
    clean: Latents,
    noise: Tensor,
    condition: Condition,
    options: TrainOptions,
    rows: BatchIndices,
) -> PerItem:
    """The loss of every row of a step of the base or the fine-tune, with all that the step draws.

    `clean` are windows of the step's length, `noise` is that of `lmd.training.draws.step_noise`,
    `condition` that before dropout.
    """
    plan = plan_step(options, rows.step)
    condition = drop_text(condition, draw_kept(rows, "text dropout", options.text_dropout))
    shifted_for = plan.n_frames if plan.regime != "block-causal" else options.window_frames
    t = draw_levels(rows, plan.n_targets, shifted_for).to(clean.device)
    if plan.regime is None:
        return flow_loss(model, clean, noise, t[:, 0], condition)
    s, o = plan.context_frames, plan.block_frames
    shares = options.context_dropout_all, options.context_dropout_part
    clean = context_dropout(clean, rows, o, s, *shares)
    if plan.regime == "full":
        return outpaint_loss(model, clean, noise, t[:, 0], condition, plan)
    pack = pack_blocks if plan.regime == "block-causal" else pack_copies
    return packed_loss(model, clean, noise, t, condition, pack(plan.n_targets, o, s)).mean(dim=1)


def drop_text(condition: Condition, kept: PerItem | Bool[Tensor, " batch"]) -> Condition:
    """Zero the text and seconds tokens of rows that are not kept; the global part stays."""
    kept = kept.to(condition.tokens)
    return Condition(condition.tokens * kept[:, None, None], condition.global_cond)


def flow_loss(
    model: LiveModel, clean: Latents, noise: Latents, t: NoiseLevel, condition: Condition
) -> PerItem:
    """The base's loss, on every frame: `|model((1-t) clean + t noise, t) - (noise - clean)|²`."""
    velocity = model(add_noise(clean, noise, t), t, condition)
    return (velocity - velocity_of(clean, noise)).square().mean(dim=(1, 2))


def outpaint_loss(
    model: LiveModel,
    clean: Latents,
    noise: Latents,
    t: NoiseLevel,
    condition: Condition,
    plan: StepPlan,
) -> PerItem:
    """The loss of one block after clean context, on the block's frames only.

    `clean` holds both, `[batch, latent, frame]`, and `noise` has that shape; what falls on the
    context reaches the naive baseline only. Of `plan`, regime and block length count.
    """
    s = clean.shape[-1] - plan.block_frames
    keep_mask = torch.zeros_like(clean[:, :1])
    keep_mask[..., :s] = 1
    velocity = model(
        add_noise(clean, noise, t),
        t,
        condition,
        context=clean,
        keep_mask=keep_mask,
        attn_mask=attention_mask(plan.regime, s, plan.block_frames),
        route=plan.regime != "full",
    )
    return (velocity - velocity_of(clean, noise))[..., s:].square().mean(dim=(1, 2))


@dataclass(frozen=True)
class Packing:
    """How clean context and several noised blocks share one pass."""

    n_clean: int  # clean frames, in front
    starts: tuple[int, ...]  # where each noised block begins in the window
    context_frames: int  # how far a block lies behind its global token, as in streaming
    attn_mask: AttentionMask  # over clean frames, noised blocks, one global token per block

    def positions(self, block_frames: int) -> Positions:
        """Rotary positions: frame i at i + 1, a block's global token `context_frames` before it.

        Streaming has its block at s + 1 … s + o and the token at 0: the same distances.
        """
        frames = [torch.arange(start + 1, start + block_frames + 1) for start in self.starts]
        tokens = torch.tensor(self.starts) - self.context_frames
        return torch.cat([torch.arange(1, self.n_clean + 1), *frames, tokens])


def pack_blocks(n_targets: int, block_frames: int, context_frames: int) -> Packing:
    """Block-causal: `n_targets` blocks after a context, each seeing its own blocks before it.

    The first block has a whole context before it, as in a stream. The last block's clean copy is
    seen by nobody and left out.
    """
    n, o = check_block(context_frames, block_frames), block_frames
    n_blocks = n + n_targets
    everything = all_blocks_mask(n_blocks, o, n)
    clean = torch.arange((n_blocks - 1) * o)
    noised_frames = n_blocks * o + torch.arange(n * o, n_blocks * o)
    tokens = 2 * n_blocks * o + torch.arange(n, n_blocks)
    used = torch.cat([clean, noised_frames, tokens])
    starts = tuple(range(context_frames, n_blocks * o, o))
    return Packing(len(clean), starts, context_frames, everything[used][:, used])


def pack_copies(n_targets: int, block_frames: int, context_frames: int) -> Packing:
    """Enc-dec: one context, `n_targets` noised copies of the block behind it."""
    copy = torch.arange(n_targets)
    owner = torch.cat(
        [torch.full((context_frames,), -1), copy.repeat_interleave(block_frames), copy]
    )
    attn_mask = (owner[None, :] == -1) | (owner[:, None] == owner[None, :])
    return Packing(context_frames, (context_frames,) * n_targets, context_frames, attn_mask)


def packed_velocity(
    model: LiveModel,
    clean: Latents,
    noisy: Blocks,
    t: PerBlock,
    condition: Condition,
    packing: Packing,
) -> Blocks:
    """Velocities of several noised blocks in one pass, each with its own noise level `t`.

    Of `clean`, the first `packing.n_clean` frames are the context.
    """
    dit, o = model.dit, noisy.shape[-1]
    context = clean[..., : packing.n_clean]
    x = torch.cat(
        [
            dit.embed_context(context, torch.ones_like(context[:, :1])),
            dit.embed_target(rearrange(noisy, "b block c frame -> b c (block frame)")),
            dit.global_token(t, condition.global_cond),
        ],
        dim=1,
    )
    text = dit.text_key_values(condition.tokens)
    noised_frames = slice(packing.n_clean, x.shape[1] - t.shape[1])
    x, _ = dit.trunk(x, packing.positions(o), text, packing.attn_mask, output_slice=noised_frames)
    return rearrange(dit.head(x), "b c (block frame) -> b block c frame", frame=o)


def packed_loss(
    model: LiveModel,
    clean: Latents,
    noise: Blocks,
    t: PerBlock,
    condition: Condition,
    packing: Packing,
) -> PerBlock:
    """One mean squared error per noised block; see `packed_velocity`."""
    o = noise.shape[-1]
    targets = torch.stack([clean[..., start : start + o] for start in packing.starts], dim=1)
    level = t[..., None, None]
    noisy = (1 - level) * targets + level * noise
    velocity = packed_velocity(model, clean, noisy, t, condition, packing)
    return (velocity - (noise - targets)).square().mean(dim=(2, 3))


def init_context_projection(model: LiveModel) -> LiveModel:
    """Let the context projection B begin with the noisy-latent projection A: `B [mask, x] = A x`.

    A base has never used B; with A's weights it understands clean frames from the first step.
    Ours; the paper starts B at random.
    """
    dit, channels = model.dit, model.config.latent_dim
    with torch.no_grad():
        entering = torch.eye(channels) + dit.preprocess_conv.weight[..., 0]
        dit.to_input_add.weight.zero_()
        dit.to_input_add.weight[:, 1 : 1 + channels] = dit.project_in.weight @ entering
    return model
