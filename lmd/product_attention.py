"""Attention as matrix products with a backward pass of its own, for half precision on the CPU.

Processors with matrix instructions carry these products out several times faster than the library's
fused kernel does backwards. A module of its own, because what a compiler has to leave alone imports
that compiler.
"""

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.autograd.function import once_differentiable

from lmd.shapes import Heads, SeenHeads, Visibility

CHUNK_SCORES = 1 << 21  # attention scores computed at once: what a core's cache still holds

Matrices = Float[Tensor, "batch_head _ _"]


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
def attend_by_products(q: Heads, k: SeenHeads, v: SeenHeads, visible: Visibility | None) -> Heads:
    """`lmd.operations.attend`, for training in half precision on the CPU."""
    return _AttendByProducts.apply(q, k, v, visible)


def _chunks(scores: Tensor) -> list[slice]:
    """Rows of a batch, as many at once as `CHUNK_SCORES` allows."""
    n = max(1, CHUNK_SCORES // scores[0].numel())
    return [slice(begin, begin + n) for begin in range(0, len(scores), n)]


def _matrices(x: Heads) -> Matrices:
    """Batch and head as one dimension, without a copy."""
    return x.view(-1, *x.shape[2:])
