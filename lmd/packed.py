"""Transformer blocks laid out for this processor's matrix products, for playing on the CPU.

At the 13 to 97 tokens of a streamed block a plain product spends a good part of its time
rearranging the weights it reads. Three layouts keep them rearranged, and add and multiply while
they write their results: panels (`lmd.panels`, float32) and tiles (`lmd.tiles`, bfloat16, where the
processor has AMX), which need a compiler, and oneDNN's, which PyTorch reaches through operators of
its own compiler. Where all are missing, plain blocks stay.
"""

import math
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from lmd.errors import LmdError
from lmd.machine import trim_memory
from lmd.model.dit import ALL, NONE, Block, KeyValue, LiveModel
from lmd.operations import Rotation
from lmd.panel_attention import cross_attention, self_attention
from lmd.panels import PanelLinear, can_use_panels
from lmd.shapes import AttentionMask, ReadTokens, Tokens
from lmd.tiles import TileLinear, can_use_tiles

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
LayOut = Callable[..., nn.Module]  # (linear, rows=…) to a `PackedLinear`, `PanelLinear` …


class PackedLinear(nn.Module):
    """A linear layer in oneDNN's layout, for inference; agrees with `nn.Linear` within rounding.

    It stays on the CPU and in its precision, and cannot be copied: load the weights again instead.

    Args:
        linear: the plain layer.
        n_tokens: how many tokens a pass usually has.
        rows: which of its outputs; None: all.
    """

    def __init__(self, linear: nn.Linear, n_tokens: int, rows: slice | None = None) -> None:
        super().__init__()
        rows = slice(None) if rows is None else rows
        weight = linear.weight.detach()[rows]
        self.out_features, self.in_features = weight.shape
        self.packed = torch.ops.mkldnn._reorder_linear_weight(weight.contiguous(), n_tokens)
        self.bias = None if linear.bias is None else linear.bias.detach()[rows].contiguous()

    def forward(self, x: Tensor, activation: str = "none") -> Tensor:
        """`f(x W^T + b)`, f one of oneDNN's activations, e.g. `swish`, which is SiLU."""
        y = torch.ops.mkldnn._linear_pointwise(
            x.reshape(-1, self.in_features), self.packed, self.bias, activation, [], ""
        )
        return y.view(*x.shape[:-1], self.out_features)

    def plus(self, x: Tensor, other: Tensor) -> Tensor:
        """`x W^T + b + other`."""
        return self._with(x, other, "add")

    def times(self, x: Tensor, other: Tensor) -> Tensor:
        """`(x W^T + b) * other`."""
        return self._with(x, other, "mul")

    def _save_to_state_dict(
        self, destination: dict[str, Any], prefix: str, keep_vars: bool
    ) -> None:
        """The plain layer's weights."""
        destination[prefix + "weight"] = self.packed.to_dense()
        if self.bias is not None:
            destination[prefix + "bias"] = self.bias

    def _with(self, x: Tensor, other: Tensor, operation: str) -> Tensor:
        flat, beside = x.reshape(-1, self.in_features), other.reshape(-1, self.out_features)
        linear = torch.ops.mkldnn._linear_pointwise.binary
        return linear(flat, beside, self.packed, self.bias, operation).view(other.shape)


class PackedBlock(nn.Module):
    """One transformer block, see `lmd.model.dit.Block`, of packed layers.

    Args:
        block: the plain block; its layers are taken out of it one by one, so that memory does not
            double, and it is of no use afterwards.
        lay_out: packs a layer, or some rows of it.
    """

    def __init__(self, block: Block, lay_out: LayOut) -> None:
        super().__init__()
        half = block.ff.to_gated.out_features // 2
        self.value = lay_out(block.ff.to_gated, rows=slice(0, half))
        self.gate = lay_out(block.ff.to_gated, rows=slice(half, None))
        del block.ff.to_gated
        parents = [m for m in block.modules() if not isinstance(m, nn.Linear)]
        for parent in parents:  # hold names, not layers: a held layer keeps its plain weights
            for name in [n for n, child in parent.named_children() if isinstance(child, nn.Linear)]:
                setattr(parent, name, lay_out(getattr(parent, name)))
        self.block = block

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
        b = self.block
        h = b.pre_norm(x)
        if read == NONE:
            return x[:, read], b.self_attn.query_key_value(h)[1]
        seen, fresh = self_attention(b.self_attn, h, rotation, attn_mask, past)
        x = b.self_attn.to_out.plus(seen[:, read], x[:, read])
        x = b.cross_attn.to_out.plus(cross_attention(b.cross_attn, b.cross_norm(x), text), x)
        h = b.ff_norm(x)
        return b.ff.to_out.plus(self.value.times(h, self.gate(h, "swish")), x), fresh

    def state_dict(
        self, *, destination: Any = None, prefix: str = "", keep_vars: bool = False
    ) -> dict[str, Any]:
        """The plain block's weights under its names, unpacked."""
        destination = self.block.state_dict(
            destination=destination, prefix=prefix, keep_vars=keep_vars
        )
        value, gate = self.value.state_dict(), self.gate.state_dict()
        for name in value:
            destination[f"{prefix}ff.to_gated.{name}"] = torch.cat([value[name], gate[name]])
        return destination

    @property
    def cross_attn(self) -> nn.Module:
        """For the text's keys and values."""
        return self.block.cross_attn


def can_pack(dtype: torch.dtype = torch.float32) -> bool:
    """Whether this build and processor can."""
    if not torch.backends.mkldnn.is_available() or dtype not in DTYPES:
        return False
    x = torch.zeros(1, 8, dtype=dtype)
    try:
        layer = PackedLinear(nn.Linear(8, 8).to(dtype), 1)
        layer.plus(layer.times(x, layer(x, "swish")), x)
    except (AttributeError, RuntimeError):
        return False
    return True


def layouts(dtype: torch.dtype, n_tokens: int) -> dict[str, LayOut]:
    """By name, the ways to lay out a layer of that precision on this machine's CPU.

    Args:
        dtype: of the weights.
        n_tokens: how many tokens a pass usually has (block and global token).
    """
    ways: dict[str, LayOut] = {}
    if dtype == torch.float32 and can_use_panels():
        ways["panels"] = PanelLinear
    if dtype == torch.bfloat16 and can_use_tiles():
        ways["tiles"] = TileLinear
    if can_pack(dtype):
        ways["onednn"] = partial(PackedLinear, n_tokens=n_tokens)
    return ways


def usual_layout(dtype: torch.dtype) -> str:
    """The layout to play with in that precision, where none is tried: a name, or "plain"."""
    if dtype == torch.float32:
        return "panels" if can_use_panels() else "plain"
    return next(iter(layouts(dtype, n_tokens=49)), "plain")


@torch.no_grad()
def fastest_layout(model: LiveModel, n_tokens: int = 49) -> str:
    """Which layout's products are fastest here, tried for a fraction of a second.

    Args:
        model: plain.
        n_tokens: how many tokens a pass usually has.

    Returns:
        A name among `layouts`, or "plain".
    """
    if model.dit.project_in.weight.device.type != "cpu":
        return "plain"
    plain = [m for m in model.dit.blocks[0].modules() if isinstance(m, nn.Linear)]
    tried: dict[str, list[nn.Module]] = {"plain": [*plain]}
    for name, lay_out in layouts(model.dit.dtype, n_tokens).items():
        tried[name] = [lay_out(layer) for layer in plain]
    inputs = [torch.ones(n_tokens, m.in_features, dtype=model.dit.dtype) for m in plain]
    best_s = dict.fromkeys(tried, math.inf)
    for _ in range(9):  # in turns, so that a busy moment hits all
        for name, layers in tried.items():
            began = time.perf_counter()
            for layer, x in zip(layers, inputs, strict=True):
                layer(x)
            best_s[name] = min(best_s[name], time.perf_counter() - began)
    return min(best_s, key=lambda name: best_s[name])


def pack(model: LiveModel, layout: str, n_tokens: int = 49) -> LiveModel:
    """Lay out the transformer's blocks for playing on the CPU, in place, one by one.

    A packed model can be played but not trained; its state dict holds the plain weights. On a GPU,
    and packed already, the model stays as it is.

    Args:
        model: to be played.
        layout: a name among `layouts`, or "plain".
        n_tokens: how many tokens a pass usually has (block and global token).

    Returns:
        The same model.

    Raises:
        LmdError: a layout that this machine's CPU does not have in the model's precision.
    """
    blocks = model.dit.blocks
    if model.dit.project_in.weight.device.type != "cpu" or is_packed(model):
        return model
    ways = layouts(model.dit.dtype, n_tokens)
    if layout not in ("plain", *ways):
        raise LmdError(f"layout {layout!r}", f"plain or one of {list(ways)}", "Pick one of these.")
    if layout != "plain":
        for index in range(len(blocks)):
            blocks[index] = PackedBlock(blocks[index], ways[layout])
            trim_memory()  # the plain weights' memory, before the next block's
    return model


def is_packed(model: LiveModel) -> bool:
    """Whether `pack` has done its work on this model."""
    return any(isinstance(block, PackedBlock) for block in model.dit.blocks)
