"""The diffusion transformer: Stable Audio Open's, with a path for clean context added.

Noisy target frames enter through `project_in` (A); clean context enters through one bias-free
projection, `to_input_add` (B), of [keep mask, context, further controls]. The noise level enters
only through one global token that sits last and keeps rotary position 0, so whoever does not see
that token does not depend on t.

Source: Live Music Diffusion Models (arXiv 2605.22717); Stable Audio Open (arXiv 2407.14358).
Taught in notebook 02_outpaint.
"""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from lmd.config import DiTConfig
from lmd.model.kv_cache import KeyValue, KeyValues
from lmd.model.rotary import RotaryEmbedding, Rotation, rotate
from lmd.shapes import (
    AttentionMask,
    FrameControls,
    FrameMask,
    Heads,
    Latents,
    OutputTokens,
    Positions,
    SeenHeads,
    Tokens,
)

ALL, NONE = slice(None), slice(0, 0)  # of a pass's tokens


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


def attend(q: Heads, k: SeenHeads, v: SeenHeads, attn_mask: AttentionMask | None = None) -> Heads:
    """`softmax(q k^T / sqrt(dim)) v`; the mask is True where a query sees a key (None: all).

    Training in bfloat16 on a CPU computes it as written: backwards, PyTorch's own function takes
    two to four times as long there.
    """
    if q.requires_grad and q.dtype == torch.bfloat16 and q.device.type == "cpu":
        scores = (q * q.shape[-1] ** -0.5) @ k.transpose(-1, -2)
        if attn_mask is not None:
            scores += q.new_zeros(attn_mask.shape).masked_fill_(~attn_mask, -math.inf)
        return scores.softmax(dim=-1) @ v
    return F.scaled_dot_product_attention(q, k, v, attn_mask=attn_mask)


def split_heads(x: Tokens, n_heads: int) -> Heads:
    """`[batch, token, head * dim]` to `[batch, head, token, dim]`."""
    return rearrange(x, "b n (h d) -> b h n d", h=n_heads)


def join_heads(x: Heads) -> Tokens:
    """`[batch, head, token, dim]` to `[batch, token, head * dim]`."""
    return rearrange(x, "b h n d -> b n (h d)")


class SelfAttention(nn.Module):
    """Self-attention with normalised, rotated queries and keys, over cached and fresh tokens."""

    def __init__(self, config: DiTConfig) -> None:
        super().__init__()
        self.n_heads = config.n_heads
        self.to_qkv = nn.Linear(config.width, 3 * config.width, bias=False)
        self.q_norm = nn.LayerNorm(config.head_dim, eps=1e-6)
        self.k_norm = nn.LayerNorm(config.head_dim, eps=1e-6)
        self.to_out = nn.Linear(config.width, config.width, bias=False)

    def query_key_value(self, x: Tokens) -> tuple[Heads, KeyValue]:
        """Queries, not yet normalised, and the fresh, unrotated keys and values."""
        q, k, v = (split_heads(part, self.n_heads) for part in self.to_qkv(x).chunk(3, dim=-1))
        return q, KeyValue(self.k_norm(k), v)

    def forward(
        self,
        x: Tokens,
        rotation: Rotation,
        attn_mask: AttentionMask | None,
        past: KeyValue | None,
        output_slice: slice = ALL,
    ) -> tuple[OutputTokens, KeyValue]:
        """Attend; `past` holds rotated keys. Returns the output and the fresh, unrotated keys."""
        q, fresh = self.query_key_value(x)
        at_output = Rotation(rotation.cos[output_slice], rotation.sin[output_slice])
        q = rotate(self.q_norm(q[:, :, output_slice]), at_output)
        k, v = rotate(fresh.key, rotation), fresh.value
        if past is not None:
            k, v = torch.cat([past.key, k], dim=2), torch.cat([past.value, v], dim=2)
        attn_mask = None if attn_mask is None else attn_mask[output_slice]
        return self.to_out(join_heads(attend(q, k, v, attn_mask))), fresh


class CrossAttention(nn.Module):
    """Attention to the text; its keys and values depend on the prompt alone."""

    def __init__(self, config: DiTConfig) -> None:
        super().__init__()
        self.n_heads = config.n_heads
        self.to_q = nn.Linear(config.width, config.width, bias=False)
        self.to_kv = nn.Linear(config.width, 2 * config.width, bias=False)
        self.q_norm = nn.LayerNorm(config.head_dim, eps=1e-6)
        self.k_norm = nn.LayerNorm(config.head_dim, eps=1e-6)
        self.to_out = nn.Linear(config.width, config.width, bias=False)

    def key_value(self, text: Tokens) -> KeyValue:
        """Keys and values of the embedded text."""
        k, v = (split_heads(part, self.n_heads) for part in self.to_kv(text).chunk(2, dim=-1))
        return KeyValue(self.k_norm(k), v)

    def forward(self, x: Tokens, text: KeyValue) -> Tokens:
        """Attend to all text tokens."""
        q = self.q_norm(split_heads(self.to_q(x), self.n_heads))
        return self.to_out(join_heads(attend(q, text.key, text.value)))


class FeedForward(nn.Module):
    """Gated feed-forward: `(x W) * silu(x V)`, projected back."""

    def __init__(self, config: DiTConfig) -> None:
        super().__init__()
        self.to_gated = nn.Linear(config.width, 2 * config.ff_mult * config.width)
        self.to_out = nn.Linear(config.ff_mult * config.width, config.width)

    def forward(self, x: Tokens) -> Tokens:
        """`[batch, token, width]` in and out."""
        value, gate = self.to_gated(x).chunk(2, dim=-1)
        return self.to_out(value * F.silu(gate))


class Block(nn.Module):
    """One pre-norm transformer block."""

    def __init__(self, config: DiTConfig) -> None:
        super().__init__()
        self.pre_norm = nn.LayerNorm(config.width, bias=False)
        self.self_attn = SelfAttention(config)
        self.cross_norm = nn.LayerNorm(config.width, bias=False)
        self.cross_attn = CrossAttention(config)
        self.ff_norm = nn.LayerNorm(config.width, bias=False)
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
        output_slice: slice = ALL,
    ) -> tuple[OutputTokens, KeyValue]:
        """Hidden states in, those of `output_slice` out, with every fresh key and value."""
        h = self.pre_norm(x)
        if output_slice == NONE:
            return x[:, output_slice], self.self_attn.query_key_value(h)[1]
        attended, fresh = self.self_attn(h, rotation, attn_mask, past, output_slice)
        x = x[:, output_slice] + attended
        x = x + self.cross_attn(self.cross_norm(x), text)
        return x + self.ff(self.ff_norm(x)), fresh


class DiT(nn.Module):
    """The transformer and its projections: text, global token, noisy target, clean context."""

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
        self.to_input_add = nn.Linear(1 + c + config.n_controls, d, bias=False)
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

    def text_key_values(self, tokens: Tokens) -> KeyValues:
        """The keys and values of a prompt: computed once for all steps of all blocks."""
        text = self.to_cond_embed(tokens.to(self.dtype))
        return KeyValues.stack([block.cross_attn.key_value(text) for block in self.blocks])

    def global_token(self, t: Tensor, global_cond: Tensor) -> Tokens:
        """One token per noise level, `t` of shape [batch] or [batch, token]."""
        t = t.view(t.shape[0], -1, 1).float()
        angle = 2 * math.pi * t * self.timestep_features.float().T
        features = torch.cat([angle.cos(), angle.sin()], dim=-1).to(self.dtype)
        moment = self.to_timestep_embed(features)
        return moment + self.to_global_embed(global_cond.to(self.dtype))[:, None]

    def embed_target(self, noisy: Latents) -> Tokens:
        """Noisy latents to hidden states, `A noisy`."""
        noisy = noisy.to(self.dtype)
        return self.project_in(rearrange(noisy + self.preprocess_conv(noisy), "b c n -> b n c"))

    def embed_context(
        self, context: Latents, keep_mask: FrameMask, controls: FrameControls | None = None
    ) -> Tokens:
        """What is added frame by frame: `B [keep mask, known latents, further controls]`."""
        parts = [keep_mask, context * keep_mask]
        if self.config.n_controls and controls is None:
            controls = context.new_zeros(len(context), self.config.n_controls, context.shape[-1])
        if self.config.n_controls:
            parts.append(controls)
        added = torch.cat(parts, dim=1).to(self.dtype)
        return self.to_input_add(rearrange(added, "b c n -> b n c"))

    def embed(
        self,
        noisy: Latents,
        known: Latents | None,
        keep_mask: FrameMask | None,
        controls: FrameControls | None = None,
    ) -> Tokens:
        """Frames to hidden states: `A noisy + B [keep mask, known]`.

        Who calls it routes: with `noisy` zero on the context, clean frames enter through B alone.
        """
        x = self.embed_target(noisy)
        if known is None and controls is None:
            return x
        if known is None:
            known, keep_mask = torch.zeros_like(noisy), torch.zeros_like(noisy[:, :1])
        return x + self.embed_context(known, keep_mask, controls)

    def trunk(
        self,
        x: Tokens,
        positions: Positions,
        text: KeyValues,
        attn_mask: AttentionMask | None = None,
        past: KeyValues | None = None,
        output_slice: slice = ALL,
    ) -> tuple[OutputTokens, list[KeyValue]]:
        """All blocks.

        Args:
            x: `[batch, token, width]`.
            positions: rotary, one per token.
            text: see `text_key_values`.
            attn_mask: which keys a token sees, the past's first; None: all.
            past: rotated keys and values of tokens before these.
            output_slice: whose hidden states are wanted. Of the others the last block computes
                keys and values alone: nothing else of theirs is ever used.

        Returns:
            Hidden states of `output_slice`, and every layer's keys and values of all tokens.
        """
        if self.replays_graphs:  # which overwrites what the call before returned
            torch.compiler.cudagraph_mark_step_begin()
        rotation, fresh = self.rope(positions), []
        attn_mask = None if attn_mask is None else attn_mask.to(x.device)
        for index, block in enumerate(self.blocks):
            seen = None if past is None else past.layer(index)
            out = output_slice if index == len(self.blocks) - 1 else ALL
            inputs = (x, rotation, text.layer(index), attn_mask, seen, out)
            if self.checkpointing and torch.is_grad_enabled():
                x, kv = checkpoint(block, *inputs, use_reentrant=False)
            else:
                x, kv = block(*inputs)
            fresh.append(kv)
        return x, fresh

    def head(self, x: Tokens) -> Latents:
        """Hidden states of frames to velocity, in float32."""
        y = rearrange(self.project_out(x), "b n c -> b c n")
        return (y + self.postprocess_conv(y)).float()


def frame_positions(n_frames: int, first: int = 1) -> Positions:
    """Rotary positions of `n_frames` frames and of the global token behind them (always 0)."""
    return torch.cat([torch.arange(first, first + n_frames), torch.zeros(1, dtype=torch.long)])


def _silu_mlp(n_in: int, n_out: int) -> nn.Sequential:
    """Two bias-free linear layers with a SiLU between."""
    return nn.Sequential(
        nn.Linear(n_in, n_out, bias=False), nn.SiLU(), nn.Linear(n_out, n_out, bias=False)
    )
