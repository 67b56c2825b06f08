"""The next block from clean context: one window's work, cached, in three regimes.

`full` is the naive baseline: every step runs the whole window. `enc-dec` encodes the context once
per block, then every step runs block and global token alone. `block-causal` keeps the encoded
context; the first step of a block also encodes the block that was finished before it.

Source: Live Music Diffusion Models (arXiv 2605.22717), caching and streaming.
Taught in notebook 02_outpaint.
"""

from dataclasses import dataclass, replace
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

from lmd.config import ControlChannel, Regime, check_block
from lmd.model.dit import NONE, Condition, LiveModel, frame_positions
from lmd.model.kv_cache import ContextCache, Memory
from lmd.model.masks import attention_mask, fused_step_mask
from lmd.shapes import BlockLatents, FrameControls, Latents
from lmd.stream.samplers import add_noise


@runtime_checkable
class BlockSession(Protocol):
    """The denoising of one block: call it once a step; `memory` is for the next block."""

    memory: Memory | None

    def __call__(self, noisy: BlockLatents, t: float) -> BlockLatents:
        """Velocity of the target block at noise level t."""
        ...


@dataclass(frozen=True)
class BlockPlan:
    """How a block is to be made.

    Attributes:
        regime: who sees whom.
        block_frames: length of the block; divides the context.
        context_noise: for `full` only, the noise that the baseline mixes into its context.
    """

    regime: Regime
    block_frames: int
    context_noise: Latents | None = None


@runtime_checkable
class Denoiser(Protocol):
    """What the streamer asks of a model; a closed form will do."""

    latent_dim: int
    device: torch.device

    def condition(self, prompt_tokens: Tensor, seconds: float) -> Condition:
        """Prompt embeddings and window length to a condition."""
        ...

    def null_condition(self, condition: Condition) -> Condition:
        """The unguided branch's condition."""
        ...

    def open_block(
        self, context: Latents, condition: Condition, plan: BlockPlan, memory: Memory | None
    ) -> BlockSession:
        """Begin a block after `context`; `memory` comes from the block before, or is None."""
        ...


class LiveDenoiser:
    """A `LiveModel` as a `Denoiser`."""

    def __init__(self, model: LiveModel) -> None:
        self.model = model
        self.latent_dim = model.config.latent_dim

    @property
    def device(self) -> torch.device:
        """Where the model is now."""
        return self.model.dit.project_in.weight.device

    def condition(self, prompt_tokens: Tensor, seconds: float) -> Condition:
        """See `LiveModel.condition`."""
        return self.model.condition(prompt_tokens, seconds)

    def null_condition(self, condition: Condition) -> Condition:
        """See `LiveModel.null_condition`."""
        return self.model.null_condition(condition)

    def open_block(
        self,
        context: Latents,
        condition: Condition,
        plan: BlockPlan,
        memory: Memory | None = None,
        controls: FrameControls | None = None,
    ) -> BlockSession:
        """Begin a block.

        Args:
            context: clean latents `[batch, latent, context frame]`.
            condition: of the same batch.
            plan: regime and block length.
            memory: of the previous block, made with the same condition; None computes the text's
                keys anew. A memory without context (or None) rebuilds the context's keys.
            controls: further frame-wise controls over context and block, if the model has any.

        Raises:
            LmdError: a block length that does not divide the context.
        """
        check_block(context.shape[-1], plan.block_frames)
        if plan.regime == "full":
            return _FullSession(self.model, context, condition, plan, controls)
        if memory is None:
            memory = Memory(tuple(self.model.dit.text_key_values(condition.tokens)))
        if plan.regime == "enc-dec" or memory.context is None:
            memory = replace(memory, context=self._prefill(context, memory, plan, controls))
            return _CachedSession(self.model, context, condition, plan, memory, None, controls)
        finished = context[..., -plan.block_frames :]
        return _CachedSession(self.model, context, condition, plan, memory, finished, controls)

    def _prefill(
        self, context: Latents, memory: Memory, plan: BlockPlan, controls: FrameControls | None
    ) -> ContextCache:
        """Encode the whole context in one pass: positions 1 ... s, no global token."""
        dit, n_frames = self.model.dit, context.shape[-1]
        frame_controls = None if controls is None else controls[..., :n_frames]
        x = dit.embed_context(context, torch.ones_like(context[:, :1]), frame_controls)
        attn_mask = None
        if plan.regime == "block-causal":
            attn_mask = attention_mask(plan.regime, n_frames, plan.block_frames)[
                :n_frames, :n_frames
            ]
        positions = frame_positions(n_frames)[:-1]
        _, fresh = dit.trunk(x, positions, list(memory.text), attn_mask, read=NONE)
        return ContextCache.of(fresh, dit.rope)


class _FullSession:
    """The naive baseline: the whole window, noised context and all, at every step."""

    memory: Memory | None = None

    def __init__(
        self,
        model: LiveModel,
        context: Latents,
        condition: Condition,
        plan: BlockPlan,
        controls: FrameControls | None,
    ) -> None:
        self.model, self.condition, self.controls = model, condition, controls
        batch, latent_dim, self.n_context = context.shape
        noise = plan.context_noise
        self.context_noise = torch.zeros_like(context) if noise is None else noise
        self.context = context
        self.keep_mask = context.new_ones(batch, 1, self.n_context + plan.block_frames)
        self.keep_mask[..., self.n_context :] = 0
        blank = context.new_zeros(batch, latent_dim, plan.block_frames)
        self.known = torch.cat([context, blank], dim=-1)

    def __call__(self, noisy: BlockLatents, t: float) -> BlockLatents:
        level = noisy.new_full((noisy.shape[0],), t)
        window = torch.cat([add_noise(self.context, self.context_noise, level), noisy], dim=-1)
        velocity = self.model(
            window,
            level,
            self.condition,
            context=self.known,
            keep_mask=self.keep_mask,
            controls=self.controls,
            route=False,
        )
        return velocity[..., self.n_context :]


class _CachedSession:
    """Both cached regimes: steps over [block, global token] against the context's keys.

    With `finished` (block-causal, a block just made) the first step encodes that block too.
    """

    def __init__(
        self,
        model: LiveModel,
        context: Latents,
        condition: Condition,
        plan: BlockPlan,
        memory: Memory,
        finished: BlockLatents | None,
        controls: FrameControls | None,
    ) -> None:
        self.dit, self.condition, self.memory = model.dit, condition, memory
        self.finished, self.controls = finished, controls
        self.n_context, self.block_frames = context.shape[-1], plan.block_frames
        self.positions = frame_positions(self.block_frames, self.n_context + 1)

    def __call__(self, noisy: BlockLatents, t: float) -> BlockLatents:
        level = noisy.new_full((noisy.shape[0],), t)
        x = torch.cat(
            [self._embed_target(noisy), self.dit.global_token(level, self.condition.global_cond)],
            dim=1,
        )
        if self.finished is not None:
            return self._absorb(x)
        text = list(self.memory.text)
        x, _ = self.dit.trunk(x, self.positions, text, None, self.memory.context.past())
        return self.dit.head(x[:, :-1])

    def _embed_target(self, noisy: BlockLatents) -> Tensor:
        """`A noisy`, and the further controls where the model has them."""
        x = self.dit.embed_target(noisy)
        if self.dit.config.controls and self.controls is not None:
            mask, known = torch.zeros_like(noisy[:, :1]), torch.zeros_like(noisy)
            x = x + self.dit.embed_context(known, mask, self.controls[..., self.n_context :])
        return x

    def _absorb(self, x: Tensor) -> BlockLatents:
        """The fused first step: also encode the finished block, then slide the cache."""
        o, s, rope = self.block_frames, self.n_context, self.dit.rope
        controls = None if self.controls is None else self.controls[..., s - o : s]
        mask = torch.ones_like(self.finished[:, :1])
        x = torch.cat([self.dit.embed_context(self.finished, mask, controls), x], dim=1)
        positions = torch.cat([torch.arange(s - o + 1, s + 1), self.positions])
        cache = self.memory.context
        x, fresh = self.dit.trunk(
            x,
            positions,
            list(self.memory.text),
            fused_step_mask(s // o, o),
            cache.past_shifted(o, rope),
            read=slice(o, 2 * o),
        )
        self.memory = replace(self.memory, context=cache.absorb(fresh, o, rope))
        self.finished = None
        return self.dit.head(x)


def add_controls(model: LiveModel, *controls: ControlChannel) -> LiveModel:
    """The same model with room for further frame-wise controls.

    Their columns in the input-add projection start at zero, so nothing changes until they are
    trained.
    """
    config = replace(model.config, controls=(*model.config.controls, *controls))
    grown = LiveModel(config, model.seconds.max_seconds)
    weights = model.state_dict()
    name = "dit.to_input_add.weight"
    widened = weights[name].new_zeros(grown.state_dict()[name].shape)
    widened[:, : weights[name].shape[1]] = weights[name]
    grown.to(widened).load_state_dict({**weights, name: widened})
    return grown


def both_branches(condition: Condition, null: Condition) -> Condition:
    """Guided and unguided condition in one batch, guided first."""
    return Condition(
        torch.cat([condition.tokens, null.tokens]),
        torch.cat([condition.global_cond, null.global_cond]),
    )
