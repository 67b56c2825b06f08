"""What a checkpoint holds, and the passes that playing is made of.

Every pass is one call of `run`: some frames and the global token go through the transformer, and
see one another and cached keys as a mask allows. `encode_context` makes the context's keys, `step`
denoises the block against them, `fused_step` does so while it takes the block just finished into
the cache (block-causal), `window` computes everything anew. `lmd.graph` runs the same `run` as an
exported graph.

Source: Live Music Diffusion Models (arXiv 2605.22717). Taught in notebook 02_outpaint.
"""

import math
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lmd.config import ControlChannel, DiTConfig, Regime
from lmd.model.dit import Condition, DiT, frame_positions
from lmd.model.kv_cache import ContextCache, KeyValue, KeyValues
from lmd.model.masks import context_mask, fused_step_mask
from lmd.model.rotary import RotaryEmbedding
from lmd.shapes import (
    AttentionMask,
    BlockLatents,
    FrameControls,
    FrameMask,
    Latents,
    NoiseLevel,
    Positions,
    Tokens,
)


class SecondsEmbedder(nn.Module):
    """A length in seconds as one token (Stable Audio's number conditioner)."""

    def __init__(self, dim: int, max_seconds: float = 256.0) -> None:
        super().__init__()
        self.max_seconds = max_seconds
        self.weights = nn.Parameter(torch.randn(128))
        self.to_embed = nn.Linear(257, dim)

    def forward(self, seconds: Tensor) -> Tensor:
        """`[batch]` seconds, clamped to 0 ... max_seconds, to `[batch, dim]`."""
        x = (seconds.float().clamp(0.0, self.max_seconds) / self.max_seconds)[:, None]
        angle = 2 * math.pi * x * self.weights.float()
        features = torch.cat([x, angle.sin(), angle.cos()], dim=-1)
        return self.to_embed(features.to(self.to_embed.weight.dtype))


class Passes:
    """What playing asks of a model, whatever runs it: all of it in terms of `run`.

    An engine (`LiveModel`, `lmd.graph.runtime.GraphModel`) brings `config`, `device`, `rope`,
    `seconds` (`[batch]` seconds to `[batch, global_dim]`), `text_keys` and `run` (see `LiveModel`).
    """

    config: DiTConfig
    rope: RotaryEmbedding

    @property
    def latent_dim(self) -> int:
        """Latent channels."""
        return self.config.latent_dim

    def condition(self, prompt_tokens: Tokens, seconds: float | Tensor) -> Condition:
        """Prompt embeddings `[batch, token, text_dim]` and lengths in seconds to a condition."""
        length = torch.as_tensor(seconds, dtype=torch.float32, device=self.device)
        embed = self.seconds(length.reshape(-1).expand(prompt_tokens.shape[0]))
        tokens = torch.cat([prompt_tokens.to(embed), embed[:, None]], dim=1)
        return Condition(tokens, embed)

    @staticmethod
    def null_condition(condition: Condition) -> Condition:
        """The condition of the unguided branch: text and seconds tokens zeroed, global kept."""
        return Condition(torch.zeros_like(condition.tokens), condition.global_cond)

    def encode_context(
        self,
        context: Latents,
        text: KeyValues,
        regime: Regime,
        block_frames: int,
        controls: FrameControls | None = None,
    ) -> ContextCache:
        """The context's keys and values, at positions 1 ... s; no noise level reaches them.

        Args:
            context: clean latents `[batch, latent, s]`.
            text: from `text_keys`.
            regime: `enc-dec` or `block-causal`.
            block_frames: length of a block (block-causal).
            controls: further frame-wise controls of the context, `[batch, channel, s]`.
        """
        s, blank = context.shape[-1], torch.zeros_like(context)
        unseen = context.new_zeros(len(context), self.config.global_dim)
        _, fresh = self.run(
            blank,
            context,
            torch.ones_like(context[:, :1]),
            unseen[:, 0],
            unseen,
            text,
            None,
            frame_positions(s),
            context_mask(regime, s, block_frames),
            controls,
        )
        return ContextCache.of(KeyValues.stack(fresh).frames(0, s), self.rope)

    def step(
        self,
        noisy: BlockLatents,
        t: NoiseLevel,
        global_cond: Tensor,
        text: KeyValues,
        cache: ContextCache,
        controls: FrameControls | None = None,
    ) -> BlockLatents:
        """Velocity of the block: o + 1 tokens that see the cached context and one another.

        Args:
            noisy: `[batch, latent, o]`.
            t: noise level per item.
            global_cond: the condition's, `[batch, global_dim]`.
            text: from `text_keys`.
            cache: from `encode_context` or `fused_step`.
            controls: further frame-wise controls of the block.
        """
        positions = frame_positions(noisy.shape[-1], cache.n_frames + 1)
        given = (noisy, None, None, t, global_cond, text, cache.past(), positions, None, controls)
        return self.run(*given)[0]

    def fused_step(
        self,
        finished: BlockLatents,
        noisy: BlockLatents,
        t: NoiseLevel,
        global_cond: Tensor,
        text: KeyValues,
        cache: ContextCache,
        controls: FrameControls | None = None,
    ) -> tuple[BlockLatents, ContextCache]:
        """`step`, with the block before it encoded in the same pass and taken into the cache.

        Args:
            finished: the clean block that the cache does not hold yet, `[batch, latent, o]`.
            controls: further frame-wise controls of the finished block and of the new one.

        Returns:
            The velocity, and the cache whose window has moved on by one block.
        """
        o, s = finished.shape[-1], cache.n_frames
        velocity, fresh = self.run(
            F.pad(noisy, (o, 0)),
            F.pad(finished, (0, o)),
            F.pad(torch.ones_like(finished[:, :1]), (0, o)),
            t,
            global_cond,
            text,
            cache.past_shifted(o, self.rope),
            frame_positions(2 * o, s - o + 1),
            fused_step_mask(s // o, o),
            controls,
        )
        return velocity[..., o:], cache.absorb(KeyValues.stack(fresh).frames(0, o), self.rope)

    def window(
        self,
        noisy: Latents,
        known: Latents,
        keep_mask: FrameMask,
        t: NoiseLevel,
        condition: Condition,
        text: KeyValues,
        controls: FrameControls | None = None,
    ) -> Latents:
        """Velocity of a whole window in which everybody sees everybody (the naive baseline).

        Args:
            noisy: context and block, both with noise of level t, `[batch, latent, T]`.
            known: the clean context, zeros behind it.
            keep_mask: 1 on the context.
        """
        positions, g = frame_positions(noisy.shape[-1]), condition.global_cond
        given = (noisy, known, keep_mask, t, g, text, None, positions, None, controls)
        return self.run(*given)[0]


class LiveModel(nn.Module, Passes):
    """The transformer and the embedding of lengths, in PyTorch: what one reads and trains."""

    def __init__(self, config: DiTConfig, max_seconds: float = 256.0) -> None:
        super().__init__()
        self.config = config
        self.dit = DiT(config)
        self.seconds = SecondsEmbedder(config.global_dim, max_seconds)

    @property
    def device(self) -> torch.device:
        """Where the model is now."""
        return self.dit.project_in.weight.device

    @property
    def rope(self) -> RotaryEmbedding:
        """The rotary embedding of positions."""
        return self.dit.rope

    def text_keys(self, tokens: Tokens) -> KeyValues:
        """The keys and values of a condition's tokens: once for all steps of all blocks."""
        return self.dit.text_key_values(tokens)

    def run(
        self,
        noisy: Latents,
        known: Latents | None,
        keep_mask: FrameMask | None,
        t: NoiseLevel,
        global_cond: Tensor,
        text: KeyValues,
        past: KeyValues | None,
        positions: Positions,
        attn_mask: AttentionMask | None,
        controls: FrameControls | None = None,
    ) -> tuple[Latents, list[KeyValue]]:
        """One pass: frames and the global token in, velocities of the frames out.

        Args:
            noisy: `[batch, latent, frame]`; enters as `A noisy`. Zero where a frame is known.
            known: clean latents; enter as `B [keep_mask, known]`. None: no frame is known.
            keep_mask: `[batch, 1, frame]`, 1 = known.
            t: noise level per item, in the global token alone.
            global_cond: the condition's, `[batch, global_dim]`.
            text: from `text_keys`.
            past: rotated keys and values of frames before these; None: there are none.
            positions: rotary, of the frames and the global token.
            attn_mask: `[frame + 1, past + frame + 1]`, True = seen; None: all.
            controls: further frame-wise controls.

        Returns:
            `[batch, latent, frame]` float32, `noise - clean`, and every layer's unrotated keys and
            values of frames and global token.
        """
        dit = self.dit
        x = dit.embed(noisy, known, keep_mask, controls)
        x = torch.cat([x, dit.global_token(t, global_cond)], dim=1)
        x, fresh = dit.trunk(x, positions, text, attn_mask, past)
        return dit.head(x[:, :-1]), fresh

    def forward(
        self,
        noisy: Latents,
        t: NoiseLevel,
        condition: Condition,
        *,
        context: Latents | None = None,
        keep_mask: FrameMask | None = None,
        attn_mask: AttentionMask | None = None,
        controls: FrameControls | None = None,
        first_position: int = 1,
        route: bool = True,
    ) -> Latents:
        """Velocity of every frame, one uncached pass.

        Args:
            noisy: `[batch, latent, frame]`, T frames.
            t: noise level per item, 0 clean ... 1 noise.
            condition: see `condition`.
            context: clean latents over all T frames; read where `keep_mask` is 1.
            keep_mask: `[batch, 1, frame]`, 1 = known. None: the plain bidirectional base.
            attn_mask: `[T + 1, T + 1]` from `lmd.model.masks`; None: everybody sees everybody.
            controls: further frame-wise controls, `[batch, channel, frame]`.
            first_position: rotary position of frame 0.
            route: False feeds the noised context too (the naive baseline).

        Returns:
            `[batch, latent, frame]` float32, `noise - clean`.
        """
        if route and keep_mask is not None:
            noisy = noisy * (1 - keep_mask)
        positions = frame_positions(noisy.shape[-1], first_position)
        text, g = self.text_keys(condition.tokens), condition.global_cond
        given = (noisy, context, keep_mask, t, g, text, None, positions, attn_mask, controls)
        return self.run(*given)[0]


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
