"""Keys and values that outlive a call: the text's, and the context's in both cached regimes.

Keys are stored normalised but not rotated, so that a sliding window never leaves the positions the
model was trained on and nothing is rotated twice; the rotated copy for the present window is kept
beside them. Values are values: nothing here is changed in place.

Source: Live Music Diffusion Models (arXiv 2605.22717), caching. Taught in notebook 02_outpaint.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from lmd.model.rotary import RotaryEmbedding, rotate
from lmd.shapes import Heads, LayerHeads


class KeyValue(NamedTuple):
    """Keys (normalised) and values of some tokens in one layer."""

    key: Heads
    value: Heads


class KeyValues(NamedTuple):
    """Keys and values of some tokens in all layers, `[layer, batch, head, token, dim]`."""

    keys: LayerHeads
    values: LayerHeads

    @classmethod
    def stack(cls, layers: "Sequence[KeyValue] | KeyValues") -> "KeyValues":
        """One tensor of keys and one of values; what is stacked already stays as it is."""
        if isinstance(layers, KeyValues):
            return layers
        return cls(torch.stack([kv.key for kv in layers]), torch.stack([kv.value for kv in layers]))

    def layer(self, index: int) -> KeyValue:
        """Those of one layer."""
        return KeyValue(self.keys[index], self.values[index])

    def frames(self, first: int, end: int) -> "KeyValues":
        """Those of the tokens `first ... end - 1`."""
        return KeyValues(self.keys[..., first:end, :], self.values[..., first:end, :])


@dataclass(frozen=True)
class ContextCache:
    """What the context of one window contributes to attention.

    Attributes:
        layers: unrotated keys and values, `[layer, batch, head, context frame, dim]`.
        rotated: the keys at positions 1 ... context_frames.
    """

    layers: KeyValues
    rotated: LayerHeads

    @classmethod
    def of(cls, layers: KeyValues, rope: RotaryEmbedding) -> "ContextCache":
        """These keys and values as the context of the present window, without a gradient."""
        keys, values = (part.detach().contiguous() for part in layers)
        rotation = rope(torch.arange(1, keys.shape[-2] + 1))
        return cls(KeyValues(keys, values), rotate(keys, rotation))

    @property
    def n_frames(self) -> int:
        """Length of the context."""
        return self.rotated.shape[-2]

    def past(self) -> KeyValues:
        """Rotated keys and values, as the transformer takes them."""
        return KeyValues(self.rotated, self.layers.values)

    def past_shifted(self, by_frames: int, rope: RotaryEmbedding) -> KeyValues:
        """The same, seen from a window that has moved on by `by_frames`."""
        keys, values = self.layers
        rotation = rope(torch.arange(1, keys.shape[-2] + 1) - by_frames)
        return KeyValues(rotate(keys, rotation), values)

    def absorb(self, fresh: KeyValues, rope: RotaryEmbedding) -> "ContextCache":
        """Take in `fresh` and drop as many of the oldest frames: constant shape."""
        n = fresh.keys.shape[-2]
        slid = (
            torch.cat([old[..., n:, :], new], dim=-2)
            for old, new in zip(self.layers, fresh, strict=True)
        )
        return ContextCache.of(KeyValues(*slid), rope)


@dataclass(frozen=True)
class Memory:
    """What a stream carries from block to block inside the transformer.

    Attributes:
        text: keys and values of the prompt (both guidance branches).
        context: the context's; None where it must be rebuilt from the latent window.
    """

    text: KeyValues
    context: ContextCache | None = None

    @property
    def n_bytes(self) -> int:
        """Size of everything held."""
        return sum(tensor.nbytes for tensor in self.tensors().values())

    def tensors(self) -> dict[str, Tensor]:
        """Every tensor by name, for a file."""
        named = {"text.keys": self.text.keys, "text.values": self.text.values}
        if self.context is not None:
            keys, values = self.context.layers
            rotated = self.context.rotated
            named |= {"context.keys": keys, "context.values": values, "context.rotated": rotated}
        return named

    @classmethod
    def from_tensors(cls, named: dict[str, Tensor]) -> "Memory":
        """The memory that `tensors` described."""
        text = KeyValues(named["text.keys"], named["text.values"])
        if "context.keys" not in named:
            return cls(text)
        layers = KeyValues(named["context.keys"], named["context.values"])
        return cls(text, ContextCache(layers, named["context.rotated"]))
