"""Rotary position embedding: keys and queries are turned by their frame's position.

Source: RoFormer (arXiv 2104.09864); half of every head is turned, as in Stable Audio Open.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn

from lmd.machine import making_tables
from lmd.shapes import Positions


class Rotation(NamedTuple):
    """Cosines and sines of the rotary embedding at some positions, `[token, rope_dim / 2]`."""

    cos: Tensor
    sin: Tensor


class RotaryEmbedding(nn.Module):
    """Rotary position embedding of the first `rope_dim` dimensions of every head."""

    def __init__(self, dim: int, base: float) -> None:
        super().__init__()
        with making_tables():
            step = torch.arange(0, dim, 2)
        self.register_buffer("inv_freq", base ** (-step.float() / dim))

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


def rotate(x: Tensor, rotation: Rotation) -> Tensor:
    """Turn dimension pairs (i, i + rope_dim / 2) of `[..., token, dim]` by their position's angle.

    Computed in float32.
    """
    half = rotation.cos.shape[-1]
    left, right, rest = x[..., :half].float(), x[..., half : 2 * half].float(), x[..., 2 * half :]
    turned = left * rotation.cos - right * rotation.sin, right * rotation.cos + left * rotation.sin
    return torch.cat([part.to(x.dtype) for part in (*turned, rest)], dim=-1)
