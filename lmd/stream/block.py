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
import torch.nn.functional as F
from torch import Tensor

from lmd.config import Regime, check_block
from lmd.model.dit import Condition
from lmd.model.kv_cache import Memory
from lmd.model.live_model import Passes
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
    """A model's passes as a `Denoiser`."""

    def __init__(self, model: Passes) -> None:
        self.model, self.latent_dim = model, model.latent_dim

    @property
    def device(self) -> torch.device:
        """Where the model is now."""
        return self.model.device

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
        n_frames, o = context.shape[-1], plan.block_frames
        check_block(n_frames, o)
        if plan.regime == "full":
            return FullSession(self.model, context, condition, plan, controls)
        if memory is None:
            memory = Memory(self.model.text_keys(condition.tokens))
        if plan.regime == "block-causal" and memory.context is not None:
            after = None if controls is None else controls[..., n_frames - o :]
            finished = context[..., n_frames - o :]
            return CachedSession(self.model, condition, memory, after, finished)
        before, after = (None, None) if controls is None else controls.tensor_split([n_frames], -1)
        encoded = self.model.encode_context(context, memory.text, plan.regime, o, before)
        return CachedSession(self.model, condition, replace(memory, context=encoded), after)


class FullSession:
    """The naive baseline: the whole window, noised context and all, at every step."""

    memory: Memory | None = None

    def __init__(
        self,
        model: Passes,
        context: Latents,
        condition: Condition,
        plan: BlockPlan,
        controls: FrameControls | None,
    ) -> None:
        self.model, self.condition, self.controls = model, condition, controls
        self.text = model.text_keys(condition.tokens)
        noise = plan.context_noise
        self.context, self.n_context = context, context.shape[-1]
        self.context_noise = torch.zeros_like(context) if noise is None else noise
        self.known = F.pad(context, (0, plan.block_frames))
        self.keep_mask = F.pad(torch.ones_like(context[:, :1]), (0, plan.block_frames))

    def __call__(self, noisy: BlockLatents, t: float) -> BlockLatents:
        """Velocity of the block."""
        level = noisy.new_full((noisy.shape[0],), t)
        window = torch.cat([add_noise(self.context, self.context_noise, level), noisy], dim=-1)
        given = (window, self.known, self.keep_mask, level, self.condition, self.text)
        velocity = self.model.window(*given, self.controls)
        return velocity[..., self.n_context :]


@dataclass
class CachedSession:
    """Both cached regimes: steps over [block, global token] against the context's keys.

    With `finished` (block-causal, a block just made) the first step encodes that block too; the
    controls then begin with its own.
    """

    model: Passes
    condition: Condition
    memory: Memory
    controls: FrameControls | None = None
    finished: BlockLatents | None = None

    def __call__(self, noisy: BlockLatents, t: float) -> BlockLatents:
        """Velocity of the block."""
        level = noisy.new_full((noisy.shape[0],), t)
        shared = (level, self.condition.global_cond, self.memory.text, self.memory.context)
        if self.finished is None:
            return self.model.step(noisy, *shared, self.controls)
        velocity, cache = self.model.fused_step(self.finished, noisy, *shared, self.controls)
        self.memory = replace(self.memory, context=cache)
        if self.controls is not None:
            self.controls = self.controls[..., self.finished.shape[-1] :]
        self.finished = None
        return velocity


def both_branches(condition: Condition, null: Condition) -> Condition:
    """Guided and unguided condition in one batch, guided first."""
    return Condition(
        torch.cat([condition.tokens, null.tokens]),
        torch.cat([condition.global_cond, null.global_cond]),
    )
