"""Transformer blocks laid out for this processor's matrix products, for playing on the CPU.

At the 49 tokens of a streamed block a plain product spends a good part of its time rearranging the
weights it reads. oneDNN keeps them rearranged, and adds, multiplies and activates while it writes
its results; PyTorch reaches it through the operators that its own compiler uses. Where they are
missing, the plain blocks stay.
"""

import math
import time
from typing import Any

import torch
from torch import Tensor, nn

from lmd.dit import Block, KeyValue, LiveModel
from lmd.operations import Rotation
from lmd.shapes import Tokens, Visibility

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


class PackedLinear(nn.Module):
    """A linear layer for inference on the CPU; results agree with `nn.Linear` within rounding.

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
    """One transformer block, see `lmd.dit.Block`, of packed layers.

    Args:
        block: the plain block; its layers are taken out of it one by one, so that memory does not
            double, and it is of no use afterwards.
        n_tokens: how many tokens a pass usually has.
    """

    def __init__(self, block: Block, n_tokens: int) -> None:
        super().__init__()
        half = block.ff.to_gated.out_features // 2
        self.value = PackedLinear(block.ff.to_gated, n_tokens, slice(0, half))
        self.gate = PackedLinear(block.ff.to_gated, n_tokens, slice(half, None))
        del block.ff.to_gated
        parents = [m for m in block.modules() if not isinstance(m, nn.Linear)]
        for parent in parents:  # hold names, not layers: a held layer keeps its plain weights
            for name in [n for n, child in parent.named_children() if isinstance(child, nn.Linear)]:
                setattr(parent, name, PackedLinear(getattr(parent, name), n_tokens))
        self.block = block

    def forward(
        self,
        x: Tokens,
        rotation: Rotation,
        text: KeyValue,
        visible: Visibility | None = None,
        past: KeyValue | None = None,
    ) -> tuple[Tokens, KeyValue]:
        """Hidden states in and out, with this layer's fresh keys and values."""
        b = self.block
        seen, fresh = b.self_attn.heads(b.pre_norm(x), rotation, visible, past)
        x = b.self_attn.to_out.plus(seen, x)
        x = b.cross_attn.to_out.plus(b.cross_attn.heads(b.cross_norm(x), text), x)
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


@torch.no_grad()
def packing_pays(model: LiveModel, n_tokens: int = 49) -> bool:
    """Whether one block's products are faster packed here, tried for a fraction of a second.

    They are in half precision and for large weights; small ones in float32 may be better off plain.
    """
    if model.dit.project_in.weight.device.type != "cpu" or not can_pack(model.dit.dtype):
        return False
    plain = [m for m in model.dit.blocks[0].modules() if isinstance(m, nn.Linear)]
    packed = [PackedLinear(layer, n_tokens) for layer in plain]
    inputs = [torch.ones(n_tokens, m.in_features, dtype=model.dit.dtype) for m in plain]
    best_s = [math.inf, math.inf]
    for _ in range(9):  # in turns, so that a busy moment hits both
        for which, layers in enumerate((plain, packed)):
            began = time.perf_counter()
            for layer, x in zip(layers, inputs, strict=True):
                layer(x)
            best_s[which] = min(best_s[which], time.perf_counter() - began)
    return best_s[1] < best_s[0]


def pack(model: LiveModel, n_tokens: int = 49) -> LiveModel:
    """Repack the transformer's blocks for playing on the CPU, in place, one by one.

    A packed model can be played but not trained; its state dict holds the plain weights. Where
    packing is impossible the model stays as it is.

    Args:
        model: to be played.
        n_tokens: how many tokens a pass usually has (block and global token).

    Returns:
        The same model.
    """
    blocks = model.dit.blocks
    if model.dit.project_in.weight.device.type == "cpu" and can_pack(model.dit.dtype):
        for index in range(len(blocks)):
            blocks[index] = PackedBlock(blocks[index], n_tokens)
    return model


def is_packed(model: LiveModel) -> bool:
    """Whether `pack` has done its work on this model."""
    return any(isinstance(block, PackedBlock) for block in model.dit.blocks)
