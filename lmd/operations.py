"""The transformer's inner operations, with backward passes that move less memory.

Each is an ordinary formula; written as one step for autograd it costs no concatenation and no
zero-filled gradient of a slice. In half precision on the CPU attention is computed as plain matrix
products, which processors with matrix instructions carry out several times faster than the
library's fused kernel does backwards. A compiler (`torch.compile`) gets the plain formulas: it
fuses them itself.
"""

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor
from torch.autograd.function import once_differentiable

from lmd.shapes import Heads, SeenHeads, Tokens, Visibility

CHUNK_SCORES = 1 << 21  # attention scores computed at once: what a core's cache still holds
HALF = (torch.bfloat16, torch.float16)

GatedTokens = Float[Tensor, "batch token half"]
Matrices = Float[Tensor, "batch_head _ _"]


class Rotation(NamedTuple):
    """Cosines and sines of the rotary embedding at some positions, `[token, rope_dim / 2]`."""

    cos: Tensor
    sin: Tensor

    @property
    def backwards(self) -> "Rotation":
        """The rotation that undoes this one."""
        return Rotation(self.cos, -self.sin)


def rotate(x: Heads, rotation: Rotation) -> Heads:
    """Turn dimension pairs (i, i + rope_dim / 2) of `x` by their position's angle, in float32."""
    if torch.compiler.is_compiling():
        half = rotation.cos.shape[-1]
        turned = [part.to(x.dtype) for part in _turned_pairs(x, rotation)]
        return torch.cat([*turned, x[..., 2 * half :]], dim=-1)
    return _Rotate.apply(x, *rotation) if torch.is_grad_enabled() else _turned(x, rotation)


def gated(x: Tokens) -> GatedTokens:
    """`value * silu(gate)` of `[value, gate]` along the last dimension."""
    if torch.is_grad_enabled() and not torch.compiler.is_compiling():
        return _Gated.apply(x)
    value, gate = x.chunk(2, dim=-1)
    return value * F.silu(gate)


def attend(q: Heads, k: SeenHeads, v: SeenHeads, visible: Visibility | None = None) -> Heads:
    """`softmax(q k^T / sqrt(head_dim)) v`; `visible` says which keys a query sees (None: all)."""
    learns = torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad)
    if learns and q.device.type == "cpu" and q.dtype in HALF:
        if torch.compiler.is_compiling() and visible is None:
            scores = (q * q.shape[-1] ** -0.5) @ k.transpose(-1, -2)
            return scores.softmax(dim=-1) @ v
        return _attend_by_products(q, k, v, visible)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=visible)


def _turned_pairs(x: Tensor, rotation: Rotation) -> tuple[Tensor, Tensor]:
    """First and second members of the pairs, turned, in float32."""
    cos, sin = rotation
    half = cos.shape[-1]
    left, right = x[..., :half].float(), x[..., half : 2 * half].float()
    return left * cos - right * sin, right * cos + left * sin


def _turned(x: Tensor, rotation: Rotation) -> Tensor:
    """A turned copy."""
    half = rotation.cos.shape[-1]
    turned = x.clone(memory_format=torch.contiguous_format)
    turned[..., :half], turned[..., half : 2 * half] = _turned_pairs(x, rotation)
    return turned


class _Rotate(torch.autograd.Function):
    """A rotation's gradient is turned back."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        ctx.rotation = Rotation(cos, sin)
        return _turned(x, ctx.rotation)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        return _turned(gradient, ctx.rotation.backwards), None, None


class _Gated(torch.autograd.Function):
    """Both halves of the gradient are written where they belong."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        value, gate = x.chunk(2, dim=-1)
        return value * F.silu(gate)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        value, gate = x.chunk(2, dim=-1)
        both = torch.empty_like(x)
        to_value, to_gate = both.chunk(2, dim=-1)
        torch.mul(gradient, F.silu(gate), out=to_value)
        torch.ops.aten.silu_backward.grad_input(gradient * value, gate, grad_input=to_gate)
        return both


class _AttendByProducts(torch.autograd.Function):
    """Attention as matrix products, a few rows of the batch at a time."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, visible: Tensor | None) -> Tensor:
        ctx.scale = q.shape[-1] ** -0.5
        hidden = q.new_zeros(())
        if visible is not None:
            hidden = q.new_zeros(visible.shape).masked_fill_(~visible, float("-inf"))
        q, k, v = q.contiguous(), k.contiguous(), v.contiguous()
        shares, out = q.new_empty(*q.shape[:3], k.shape[2]), torch.empty_like(q)
        for rows in _chunks(shares):
            scores = torch.baddbmm(
                hidden, _matrices(q[rows]), _matrices(k[rows]).transpose(1, 2), alpha=ctx.scale
            )
            torch.softmax(scores, dim=-1, out=_matrices(shares[rows]))
            torch.bmm(_matrices(shares[rows]), _matrices(v[rows]), out=_matrices(out[rows]))
        ctx.save_for_backward(q, k, v, shares)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        q, k, v, shares = ctx.saved_tensors
        gradient = gradient.contiguous()
        to_q, to_k, to_v = torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)
        for rows in _chunks(shares):
            share, arriving = _matrices(shares[rows]), _matrices(gradient[rows])
            torch.bmm(share.transpose(1, 2), arriving, out=_matrices(to_v[rows]))
            to_share = torch.bmm(arriving, _matrices(v[rows]).transpose(1, 2))
            to_score = torch._softmax_backward_data(to_share, share, -1, share.dtype)
            torch.bmm(to_score, _matrices(k[rows]), out=_matrices(to_q[rows]))
            torch.bmm(to_score.transpose(1, 2), _matrices(q[rows]), out=_matrices(to_k[rows]))
        return to_q.mul_(ctx.scale), to_k.mul_(ctx.scale), to_v, None


@torch.compiler.disable
def _attend_by_products(q: Heads, k: SeenHeads, v: SeenHeads, visible: Visibility | None) -> Heads:
    return _AttendByProducts.apply(q, k, v, visible)


def _chunks(scores: Tensor) -> list[slice]:
    """Rows of a batch, as many at once as `CHUNK_SCORES` allows."""
    n = max(1, CHUNK_SCORES // scores[0].numel())
    return [slice(begin, begin + n) for begin in range(0, len(scores), n)]


def _matrices(x: Heads) -> Matrices:
    """Batch and head as one dimension, without a copy."""
    return x.view(-1, *x.shape[2:])
