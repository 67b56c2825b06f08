"""Attention as matrix products with a backward pass of its own, for half precision on the CPU.

Processors with matrix instructions carry these products out several times faster than the library's
fused kernel does backwards. Where queries see the same keys in groups of some size, as the blocks
of a packed training window do, each group's products are of what it sees alone; what is left is
computed under its mask. A block-causal window of five blocks hides two thirds of its pairs.

A module of its own, because what a compiler has to leave alone imports that compiler.
"""

from collections.abc import Iterator, Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor
from torch.autograd.function import once_differentiable

from lmd import step_kernel
from lmd.shapes import AttentionMask, Heads, SeenHeads

CHUNK_SCORES = 1 << 21  # attention scores computed at once: what a core's cache still holds
LEAST_QUERIES = 24  # of a group: products of fewer rows cost more than hidden pairs do

Matrices = Float[Tensor, "batch_head _ _"]
GroupHeads = Float[Tensor, "batch head_group _ head_dim"]  # of a part: groups like further heads
Run = tuple[int, int]  # neighbouring tokens: first, one behind the last
Groups = tuple[tuple[Run, ...], ...]  # each as runs; all of one size


class Part(NamedTuple):
    """Groups of equally many queries and keys, whose products are computed together.

    Attributes:
        queries: of each group; every query is in one group of one part.
        keys: of each group, those that its queries see.
        attn_mask: where a (single) group's queries do not see all of its keys: who sees whom.
    """

    queries: Groups
    keys: Groups
    attn_mask: AttentionMask | None


def parts_of(attn_mask: AttentionMask) -> tuple[Part, ...]:
    """Take a mask apart; groups that have no like and small ones are left together, as one.

    Every query has to see some key.
    """
    bits = np.packbits(attn_mask.numpy())
    return _parts(attn_mask.shape[0], attn_mask.shape[1], bits.tobytes())


@lru_cache(maxsize=64)  # a training's windows are of a few kinds
def _parts(n_queries: int, n_keys: int, bits: bytes) -> tuple[Part, ...]:
    flat = np.unpackbits(np.frombuffer(bits, np.uint8), count=n_queries * n_keys)
    attn_mask = flat.reshape(n_queries, n_keys).astype(bool)
    same: dict[bytes, list[int]] = {}
    for query, row in enumerate(attn_mask):
        same.setdefault(row.tobytes(), []).append(query)
    sizes: dict[tuple[int, int], list[list[int]]] = {}
    for queries in same.values():
        sizes.setdefault((len(queries), int(attn_mask[queries[0]].sum())), []).append(queries)
    parts, left = [], np.zeros(n_queries, bool)
    for (n, _), groups in sizes.items():
        if len(groups) > 1 and n >= LEAST_QUERIES:
            keys = tuple(_runs(np.flatnonzero(attn_mask[queries[0]])) for queries in groups)
            parts.append(Part(tuple(_runs(queries) for queries in groups), keys, None))
        else:
            left[[query for queries in groups for query in queries]] = True
    if left.any():
        seen = attn_mask[left].any(axis=0)
        mask = torch.from_numpy(attn_mask[left][:, seen])
        queries, keys = (_runs(np.flatnonzero(some)) for some in (left, seen))
        parts.append(Part((queries,), (keys,), None if mask.all() else mask))
    return tuple(parts)


def _runs(tokens: Sequence[int] | np.ndarray) -> tuple[Run, ...]:
    """Ascending tokens as runs of neighbours."""
    pieces = np.split(np.asarray(tokens), np.flatnonzero(np.diff(tokens) != 1) + 1)
    return tuple((int(piece[0]), int(piece[-1]) + 1) for piece in pieces)


class _AttendByProducts(torch.autograd.Function):
    """Attention as matrix products, a few rows of the batch at a time."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, attn_mask: Tensor | None) -> Tensor:
        ctx.scale = q.shape[-1] ** -0.5
        hidden = q.new_zeros(())
        if attn_mask is not None:
            hidden = q.new_zeros(attn_mask.shape).masked_fill_(~attn_mask, float("-inf"))
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


class _Take(torch.autograd.Function):
    """The tokens of every part's groups, side by side; a token may be in several."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, parts: Sequence[Groups]) -> tuple[Tensor, ...]:
        ctx.parts, ctx.n_tokens = parts, x.shape[2]
        return tuple(_gather(x, groups) for groups in parts)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        return _put(gradients, ctx.parts, ctx.n_tokens, once=False), None


class _Place(torch.autograd.Function):
    """The way back: what was found for every part's queries, in their order."""

    @staticmethod
    def forward(ctx: Any, n_tokens: int, parts: Sequence[Groups], *found: Tensor) -> Tensor:
        ctx.parts = parts
        return _put(found, parts, n_tokens, once=True)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        return None, None, *(_gather(gradient, groups) for groups in ctx.parts)


@torch.compiler.disable
def attend_by_products(
    q: Heads, k: SeenHeads, v: SeenHeads, attn_mask: AttentionMask | None
) -> Heads:
    """`lmd.operations.attend`, for training in half precision on the CPU.

    Every query has to see some key.
    """
    parts = () if attn_mask is None else parts_of(attn_mask)
    if len(parts) < 2 and (not parts or len(parts[0].queries) == 1):  # nothing to part
        return _AttendByProducts.apply(q, k, v, attn_mask)
    queries, keys = [part.queries for part in parts], [part.keys for part in parts]
    taken = (_Take.apply(q, queries), _Take.apply(k, keys), _Take.apply(v, keys))
    found = [
        _AttendByProducts.apply(*qkv, part.attn_mask)
        for part, *qkv in zip(parts, *taken, strict=True)
    ]
    return _Place.apply(q.shape[2], queries, *found)


def _gather(x: Heads, groups: Groups) -> GroupHeads:
    """The tokens of each group."""
    if _suits_kernel(x):
        taken = step_kernel.take(x, _tokens(groups))
        return taken.unflatten(2, (len(groups), -1)).flatten(1, 2)
    n_tokens = sum(end - begin for begin, end in groups[0])
    found = x.new_empty(*x.shape[:2], len(groups), n_tokens, x.shape[-1])
    for tokens, group, place in _places(x, groups):
        found[:, :, group, place] = tokens
    return found.flatten(1, 2)


def _put(found: Sequence[Tensor], parts: Sequence[Groups], n_tokens: int, once: bool) -> Heads:
    """The way back; what was found of a token is added up, unless each was found once."""
    taken = [_by_group(x, groups) for x, groups in zip(found, parts, strict=True)]
    if _suits_kernel(found[0]):
        rows = [values.flatten(2, 3) for values in taken]
        return step_kernel.put(rows, [_tokens(groups) for groups in parts], n_tokens)
    shape = (*taken[0].shape[:2], n_tokens, taken[0].shape[-1])
    total = found[0].new_empty(shape) if once else torch.zeros(shape)  # float32: many are added
    for groups, values in zip(parts, taken, strict=True):
        for tokens, group, place in _places(total, groups):
            own = values[:, :, group, place]
            tokens.copy_(own) if once else tokens.add_(own)
    return total.to(found[0].dtype)


def _suits_kernel(x: Tensor) -> bool:
    return x.dtype == torch.bfloat16 and step_kernel.suits(x.shape[-1])


@lru_cache(maxsize=256)  # several of each of a training's windows
def _tokens(groups: Groups) -> Tensor:
    """Of all groups, one after another."""
    tokens = [token for runs in groups for run in runs for token in range(*run)]
    return torch.tensor(tokens, device="cpu")


def _by_group(x: GroupHeads, groups: Groups) -> Tensor:
    """`[batch, head, group, token, head_dim]`, without a copy."""
    return x.unflatten(1, (-1, len(groups)))


def _places(x: Heads, groups: Groups) -> Iterator[tuple[Tensor, int, slice]]:
    """Of every run: its tokens in `x`, its group, and where in the group they stand."""
    for group, runs in enumerate(groups):
        at = 0
        for begin, end in runs:
            yield x[:, :, begin:end], group, slice(at, at + end - begin)
            at += end - begin


def _chunks(scores: Tensor) -> list[slice]:
    """Rows of a batch, as many at once as `CHUNK_SCORES` allows."""
    n = max(1, CHUNK_SCORES // scores[0].numel())
    return [slice(begin, begin + n) for begin in range(0, len(scores), n)]


def _matrices(x: Heads) -> Matrices:
    """Batch and head as one dimension, without a copy."""
    return x.view(-1, *x.shape[2:])
