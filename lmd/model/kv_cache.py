"""Keys and values that outlive a call: the text's, and the context's in both regimes.

Keys are stored normalised but not rotated, so that a sliding window never leaves the positions the
model was trained on and nothing is rotated twice; the rotated copy for the present window is kept
beside them. Values are values: nothing here is changed in place.

Source: Live Music Diffusion Models (arXiv 2605.22717), caching. Taught in notebook 02_outpaint.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from lmd.model.dit import KeyValue, RotaryEmbedding
from lmd.operations import rotate
from lmd.shapes import Heads, SeenHeads


@dataclass(frozen=True)
class ContextCache:
    """What the context of one window contributes to attention, layer by layer.

    Attributes:
        layers: unrotated keys and values, `[batch, head, context frame, dim]`.
        rotated: the keys at positions 1 ... context_frames.
    """

    layers: tuple[KeyValue, ...]
    rotated: tuple[Heads, ...]

    @classmethod
    def of(cls, layers: list[KeyValue], rope: RotaryEmbedding) -> "ContextCache":
        """Cache copies of these keys and values as the context of the present window.

        Copies, because a compiled model writes into the same memory at its next call.
        """
        return cls._placed([KeyValue(_own(kv.key), _own(kv.value)) for kv in layers], rope)

    @classmethod
    def _placed(cls, layers: list[KeyValue], rope: RotaryEmbedding) -> "ContextCache":
        """These very keys and values, as the context of the present window."""
        rotation = rope(torch.arange(1, layers[0].key.shape[2] + 1))
        return cls(tuple(layers), tuple(rotate(kv.key, rotation) for kv in layers))

    def past(self) -> list[KeyValue]:
        """Rotated keys and values, as the transformer's layers take them."""
        return [KeyValue(key, kv.value) for key, kv in zip(self.rotated, self.layers, strict=True)]

    def past_shifted(self, by_frames: int, rope: RotaryEmbedding) -> list[KeyValue]:
        """The same, seen from a window that has moved on by `by_frames`."""
        first = 1 - by_frames
        rotation = rope(torch.arange(first, first + self.layers[0].key.shape[2]))
        return [KeyValue(rotate(kv.key, rotation), kv.value) for kv in self.layers]

    def absorb(self, fresh: list[KeyValue], n_frames: int, rope: RotaryEmbedding) -> "ContextCache":
        """Drop the oldest `n_frames`, take in the first `n_frames` of `fresh`: constant shape."""
        layers = [
            KeyValue(*(_slid(*pair, n_frames) for pair in zip(old, new, strict=True)))
            for old, new in zip(self.layers, fresh, strict=True)
        ]
        return ContextCache._placed(layers, rope)


def _own(heads: Heads) -> Heads:
    """A copy in memory of its own, without a gradient."""
    return heads.detach().clone(memory_format=torch.contiguous_format)


def _slid(old: Heads, new: SeenHeads, n_frames: int) -> Heads:
    """`old` without its first `n_frames`, then those of `new`, without a gradient."""
    return torch.cat([old[:, :, n_frames:], new[:, :, :n_frames]], dim=2).detach()


@dataclass(frozen=True)
class Memory:
    """What a stream carries from block to block inside the transformer.

    Attributes:
        text: per layer, keys and values of the prompt (both guidance branches).
        context: the context's; None where it must be rebuilt from the latent window.
    """

    text: tuple[KeyValue, ...]
    context: ContextCache | None = None

    @property
    def n_bytes(self) -> int:
        """Size of everything held."""
        return sum(tensor.nbytes for tensor in self.tensors().values())

    def tensors(self) -> dict[str, Tensor]:
        """Every tensor by name, for a file."""
        named = {}
        for i, kv in enumerate(self.text):
            named[f"text.{i}.key"], named[f"text.{i}.value"] = kv
        if self.context is not None:
            for i, (kv, key) in enumerate(
                zip(self.context.layers, self.context.rotated, strict=True)
            ):
                named[f"context.{i}.key"], named[f"context.{i}.value"] = kv
                named[f"context.{i}.rotated"] = key
        return named

    @classmethod
    def from_tensors(cls, named: dict[str, Tensor]) -> "Memory":
        """The memory that `tensors` described."""

        def layers(part: str) -> tuple[KeyValue, ...]:
            n = sum(name.startswith(f"{part}.") and name.endswith(".key") for name in named)
            return tuple(
                KeyValue(named[f"{part}.{i}.key"], named[f"{part}.{i}.value"]) for i in range(n)
            )

        context = layers("context")
        rotated = tuple(named[f"context.{i}.rotated"] for i in range(len(context)))
        return cls(layers("text"), ContextCache(context, rotated) if context else None)
