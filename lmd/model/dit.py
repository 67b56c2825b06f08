"""The diffusion transformer: Stable Audio Open's, with the path for clean context added.

Noisy target frames enter through `project_in`; clean context enters through one bias-free
projection, `to_input_add`, of [keep_mask, context, further controls]. The noise level enters only
through one global token that sits last and keeps rotary position 0, so whoever does not see that
token does not depend on t.

Source: Live Music Diffusion Models (arXiv 2605.22717); Stable Audio Open (arXiv 2407.14358).
Taught in notebook 02_outpaint.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from lmd.config import DiTConfig
from lmd.operations import Rotation, attend, gated, linear, normalised, rotate
from lmd.shapes import (
    AttentionMask,
    FrameControls,
    FrameMask,
    Heads,
    Latents,
    NoiseLevel,
    Positions,
    ReadTokens,
    Tokens,
)

ALL, NONE = slice(None), slice(0, 0)  # of a pass's tokens


class KeyValue(NamedTuple):
    """Keys (normalised, not yet rotated) and values of some tokens in one layer."""

    key: Heads
    value: Heads


@dataclass(frozen=True)
class Condition:
    """What is asked for.

    Attributes:
        tokens: cross-attention sequence, prompt tokens then one seconds token.
        global_cond: the part that joins the noise level in the global token.
    """

    tokens: Tokens
    global_cond: Tensor  # [batch, global_dim]

    def repeat(self, n: int) -> "Condition":
        """The same condition for a batch `n` times as large."""
        return Condition(self.tokens.repeat(n, 1, 1), self.global_cond.repeat(n, 1))


class RotaryEmbedding(nn.Module):
    """Rotary position embedding of the first `rope_dim` dimensions of every head."""

    def __init__(self, dim: int, base: float) -> None:
        super().__init__()
        self.register_buffer("inv_freq", base ** (-torch.arange(0, dim, 2).float() / dim))

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "RotaryEmbedding":
        """Move with the model but stay float32: bfloat16 turns far positions 0.1 rad off."""
        exact = self.inv_freq
        super()._apply(fn, recurse)
        if not (exact.is_meta or self.inv_freq.is_meta):
            self.inv_freq = exact.to(self.inv_freq.device)
        return self

    def forward(self, positions: Positions) -> Rotation:
        """Cosines and sines in float32, whatever the precision of the model."""
        angle = positions.to(self.inv_freq.device).float()[:, None] * self.inv_freq.float()
        return Rotation(angle.cos(), angle.sin())


class LayerNorm(nn.LayerNorm):
    """PyTorch's over one dimension, learning by way of `lmd.operations`."""

    def forward(self, x: Tensor) -> Tensor:
        """Tokens or heads in and out."""
        return normalised(x, self.weight, self.bias, self.eps)


class Linear(nn.Linear):
    """PyTorch's with a bias, learning by way of `lmd.operations`."""

    def forward(self, x: Tensor) -> Tensor:
        """Rows in and out."""
        return linear(x, self.weight, self.bias)


def split_heads(x: Tokens, n_heads: int) -> Heads:
    """`[batch, token, head * dim]` to `[batch, head, token, dim]`."""
    return x.unflatten(-1, (n_heads, -1)).transpose(1, 2)


def join_heads(x: Heads) -> Tokens:
    """`[batch, head, token, dim]` to `[batch, token, head * dim]`."""
    return x.transpose(1, 2).flatten(2)


class SelfAttention(nn.Module):
    """Self-attention with normalised, rotated queries and keys, over cached and fresh tokens."""

    def __init__(self, config: DiTConfig) -> None:
        super().__init__()
        self.n_heads = config.n_heads
        self.to_qkv = nn.Linear(config.width, 3 * config.width, bias=False)
        self.q_norm = LayerNorm(config.head_dim, eps=1e-6)
        self.k_norm = LayerNorm(config.head_dim, eps=1e-6)
        self.to_out = nn.Linear(config.width, config.width, bias=False)

    def forward(
        self,
        x: Tokens,
        rotation: Rotation,
        attn_mask: AttentionMask | None,
        past: KeyValue | None,
        read: slice = ALL,
    ) -> tuple[ReadTokens, KeyValue]:
        """Attend; `past` holds rotated keys. Returns the output and the fresh, unrotated keys."""
        seen, fresh = self.heads(x, rotation, attn_mask, past, read)
        return self.to_out(seen), fresh

    def heads(
        self,
        x: Tokens,
        rotation: Rotation,
        attn_mask: AttentionMask | None,
        past: KeyValue | None,
        read: slice = ALL,
    ) -> tuple[ReadTokens, KeyValue]:
        """What the heads of the tokens `read` see, side by side, before the output projection."""
        q, fresh = self.query_key_value(x)
        q = rotate(self.q_norm(q[:, :, read]), Rotation(rotation.cos[read], rotation.sin[read]))
        k, v = rotate(fresh.key, rotation), fresh.value
        if past is not None:
            k, v = torch.cat([past.key, k], dim=2), torch.cat([past.value, v], dim=2)
        attn_mask = None if attn_mask is None else attn_mask[read]
        return join_heads(attend(q, k, v, attn_mask)), fresh

    def query_key_value(self, x: Tokens) -> tuple[Heads, KeyValue]:
        """Queries, not yet normalised, and the fresh, unrotated keys and values."""
        q, k, v = (split_heads(part, self.n_heads) for part in self.to_qkv(x).chunk(3, dim=-1))
        return q, KeyValue(self.k_norm(k), v)


class CrossAttention(nn.Module):
    """Attention to the text; its keys and values depend on the prompt alone."""

    def __init__(self, config: DiTConfig) -> None:
        super().__init__()
        self.n_heads = config.n_heads
        self.to_q = nn.Linear(config.width, config.width, bias=False)
        self.to_kv = nn.Linear(config.width, 2 * config.width, bias=False)
        self.q_norm = LayerNorm(config.head_dim, eps=1e-6)
        self.k_norm = LayerNorm(config.head_dim, eps=1e-6)
        self.to_out = nn.Linear(config.width, config.width, bias=False)

    def key_value(self, text: Tokens) -> KeyValue:
        """Keys and values of the embedded text."""
        k, v = (split_heads(part, self.n_heads) for part in self.to_kv(text).chunk(2, dim=-1))
        return KeyValue(self.k_norm(k), v)

    def forward(self, x: Tokens, text: KeyValue) -> Tokens:
        """Attend to all text tokens."""
        return self.to_out(self.heads(x, text))

    def heads(self, x: Tokens, text: KeyValue) -> Tokens:
        """What the heads see, side by side, before the output projection."""
        q = self.q_norm(split_heads(self.to_q(x), self.n_heads))
        return join_heads(attend(q, text.key, text.value))


class FeedForward(nn.Module):
    """Gated feed-forward: `(x W) * silu(x V)`, projected back."""

    def __init__(self, config: DiTConfig) -> None:
        super().__init__()
        self.to_gated = Linear(config.width, 2 * config.ff_mult * config.width)
        self.to_out = Linear(config.ff_mult * config.width, config.width)

    def forward(self, x: Tokens) -> Tokens:
        """`[batch, token, width]` in and out."""
        return self.to_out(gated(self.to_gated(x)))


class Block(nn.Module):
    """One pre-norm transformer block."""

    def __init__(self, config: DiTConfig) -> None:
        super().__init__()
        self.pre_norm = LayerNorm(config.width, bias=False)
        self.self_attn = SelfAttention(config)
        self.cross_norm = LayerNorm(config.width, bias=False)
        self.cross_attn = CrossAttention(config)
        self.ff_norm = LayerNorm(config.width, bias=False)
        self.ff = FeedForward(config)
        for branch in (self.self_attn, self.cross_attn, self.ff):
            for parameter in branch.to_out.parameters():
                nn.init.zeros_(parameter)

    def forward(
        self,
        x: Tokens,
        rotation: Rotation,
        text: KeyValue,
        attn_mask: AttentionMask | None = None,
        past: KeyValue | None = None,
        read: slice = ALL,
    ) -> tuple[ReadTokens, KeyValue]:
        """Hidden states in, those of the tokens `read` out, with every fresh key and value."""
        h = self.pre_norm(x)
        if read == NONE:
            return x[:, read], self.self_attn.query_key_value(h)[1]
        attended, fresh = self.self_attn(h, rotation, attn_mask, past, read)
        x = x[:, read] + attended
        x = x + self.cross_attn(self.cross_norm(x), text)
        return x + self.ff(self.ff_norm(x)), fresh


class DiT(nn.Module):
    """The transformer and its doors: text, global token, noisy target, clean context, output."""

    def __init__(self, config: DiTConfig) -> None:
        super().__init__()
        self.config = config
        self.checkpointing = False  # trade compute for memory in training
        self.replays_graphs = False  # blocks compiled to CUDA graphs
        d, c = config.width, config.latent_dim
        self.timestep_features = nn.Parameter(torch.randn(config.timestep_features // 2, 1))
        self.to_timestep_embed = nn.Sequential(
            nn.Linear(config.timestep_features, d), nn.SiLU(), nn.Linear(d, d)
        )
        self.to_cond_embed = _silu_mlp(config.text_dim, d)
        self.to_global_embed = _silu_mlp(config.global_dim, d)
        self.preprocess_conv = nn.Conv1d(c, c, 1, bias=False)
        self.postprocess_conv = nn.Conv1d(c, c, 1, bias=False)
        nn.init.zeros_(self.preprocess_conv.weight)
        nn.init.zeros_(self.postprocess_conv.weight)
        self.project_in = nn.Linear(c, d, bias=False)
        self.project_out = nn.Linear(d, c, bias=False)
        n_added = 1 + c + sum(control.channels for control in config.controls)
        self.to_input_add = nn.Linear(n_added, d, bias=False)
        self.rope = RotaryEmbedding(config.rope_dim, config.rope_base)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.depth))

    @property
    def dtype(self) -> torch.dtype:
        """Precision of the weights."""
        return self.project_in.weight.dtype

    def compile_blocks(self, mode: str = "default") -> None:
        """Let `torch.compile` make one program of every block: seconds of warm-up per shape."""
        for block in self.blocks:
            block.compile(dynamic=False, mode=mode)
        self.replays_graphs = mode == "reduce-overhead"

    def text_key_values(self, tokens: Tokens) -> list[KeyValue]:
        """Per layer, the keys and values of a prompt: computed once for all steps of all blocks."""
        text = self.to_cond_embed(tokens.to(self.dtype))
        return [block.cross_attn.key_value(text) for block in self.blocks]

    def global_token(self, t: Tensor, global_cond: Tensor) -> Tokens:
        """One token per noise level, `t` of shape [batch] or [batch, token]."""
        t = t.view(t.shape[0], -1, 1).float()
        angle = 2 * math.pi * t * self.timestep_features.float().T
        features = torch.cat([angle.cos(), angle.sin()], dim=-1).to(self.dtype)
        moment = self.to_timestep_embed(features)
        return moment + self.to_global_embed(global_cond.to(self.dtype))[:, None]

    def embed_target(self, noisy: Latents) -> Tokens:
        """Noisy latents to hidden states."""
        noisy = noisy.to(self.dtype)
        return self.project_in((noisy + self.preprocess_conv(noisy)).transpose(1, 2))

    def embed_context(
        self, context: Latents, keep_mask: FrameMask, controls: FrameControls | None = None
    ) -> Tokens:
        """What is added frame by frame: keep mask, known latents, further controls (or none)."""
        parts = [keep_mask, context * keep_mask]
        if self.config.controls:
            n = sum(control.channels for control in self.config.controls)
            parts.append(
                controls
                if controls is not None
                else context.new_zeros(1, n, 1).expand(context.shape[0], n, context.shape[2])
            )
        return self.to_input_add(torch.cat(parts, dim=1).to(self.dtype).transpose(1, 2))

    def trunk(
        self,
        x: Tokens,
        positions: Positions,
        text: list[KeyValue],
        attn_mask: AttentionMask | None = None,
        past: list[KeyValue] | None = None,
        read: slice = ALL,
    ) -> tuple[ReadTokens, list[KeyValue]]:
        """All blocks.

        Args:
            x: `[batch, token, width]`.
            positions: rotary, one per token.
            text: per layer, see `text_key_values`.
            attn_mask: which keys a token sees, the past's first; None: all.
            past: per layer, rotated keys and values of tokens before these.
            read: whose hidden states are wanted. Of the others the last block computes keys and
                values alone: nothing else of theirs is ever used.

        Returns:
            Hidden states of the tokens `read`, and every layer's keys and values of all tokens.
        """
        if self.replays_graphs:  # which overwrites what the call before returned
            torch.compiler.cudagraph_mark_step_begin()
        rotation, fresh = self.rope(positions), []
        attn_mask = None if attn_mask is None else attn_mask.to(x.device)
        for index, block in enumerate(self.blocks):
            seen = None if past is None else past[index]
            out = read if index == len(self.blocks) - 1 else ALL
            if self.checkpointing and torch.is_grad_enabled():
                x, kv = checkpoint(
                    block, x, rotation, text[index], attn_mask, seen, out, use_reentrant=False
                )
            else:
                x, kv = block(x, rotation, text[index], attn_mask, seen, out)
            fresh.append(kv)
        return x, fresh

    def head(self, x: Tokens) -> Latents:
        """Hidden states of frames to velocity, in float32."""
        y = self.project_out(x).transpose(1, 2)
        return (y + self.postprocess_conv(y)).float()

    def embed(
        self,
        noisy: Latents,
        context: Latents | None,
        keep_mask: FrameMask | None,
        controls: FrameControls | None = None,
        route: bool = True,
    ) -> Tokens:
        """Frames to hidden states: `A noisy` on the target, `B [mask, clean]` on the context.

        With `route=False` (the naive baseline) the noised context enters as well, as in ordinary
        outpainting.
        """
        if context is None or keep_mask is None:
            return self.embed_target(noisy)
        routed = noisy * (1 - keep_mask) if route else noisy
        return self.embed_target(routed) + self.embed_context(context, keep_mask, controls)


class SecondsEmbedder(nn.Module):
    """A length in seconds as one token (Stable Audio's number conditioner)."""

    def __init__(self, dim: int, max_seconds: float = 256.0) -> None:
        super().__init__()
        self.max_seconds = max_seconds
        self.weights = nn.Parameter(torch.randn(128))
        self.to_embed = nn.Linear(257, dim)

    def forward(self, seconds: Tensor) -> Tensor:
        """`[batch]` seconds, clamped to 0 ... max_seconds, to `[batch, dim]`."""
        x = (seconds.float().clamp(0, self.max_seconds) / self.max_seconds)[:, None]
        angle = 2 * math.pi * x * self.weights.float()
        features = torch.cat([x, angle.sin(), angle.cos()], dim=-1)
        return self.to_embed(features.to(self.to_embed.weight.dtype))


class LiveModel(nn.Module):
    """What a checkpoint holds: the transformer and the embedding of lengths."""

    def __init__(self, config: DiTConfig, max_seconds: float = 256.0) -> None:
        super().__init__()
        self.config = config
        self.dit = DiT(config)
        self.seconds = SecondsEmbedder(config.global_dim, max_seconds)

    def condition(self, prompt_tokens: Tokens, seconds: float | Tensor) -> Condition:
        """Prompt embeddings `[batch, token, text_dim]` and lengths in seconds to a condition."""
        device = self.dit.project_in.weight.device
        length = torch.as_tensor(seconds, dtype=torch.float32, device=device)
        embed = self.seconds(length.reshape(-1).expand(prompt_tokens.shape[0]))
        tokens = torch.cat([prompt_tokens.to(embed), embed[:, None]], dim=1)
        return Condition(tokens, embed)

    @staticmethod
    def null_condition(condition: Condition) -> Condition:
        """The condition of the unguided branch: text and seconds tokens zeroed, global kept."""
        return Condition(torch.zeros_like(condition.tokens), condition.global_cond)

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
        dit = self.dit
        x = dit.embed(noisy, context, keep_mask, controls, route)
        x = torch.cat([x, dit.global_token(t, condition.global_cond)], dim=1)
        positions = frame_positions(noisy.shape[-1], first_position)
        x, _ = dit.trunk(x, positions, dit.text_key_values(condition.tokens), attn_mask)
        return dit.head(x[:, :-1])


def frame_positions(n_frames: int, first: int = 1) -> Positions:
    """Rotary positions of `n_frames` frames and of the global token behind them (always 0)."""
    return torch.cat([torch.arange(first, first + n_frames), torch.zeros(1, dtype=torch.long)])


def _silu_mlp(n_in: int, n_out: int) -> nn.Sequential:
    """Two bias-free linear layers with a SiLU between."""
    return nn.Sequential(
        nn.Linear(n_in, n_out, bias=False), nn.SiLU(), nn.Linear(n_out, n_out, bias=False)
    )
