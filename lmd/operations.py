"""The transformer's inner operations, with backward passes that move less memory.

Each is an ordinary formula; written as one step for autograd it costs no concatenation and no
zero-filled gradient of a slice. A compiler (`torch.compile`) gets the plain formulas: it fuses them
itself. Training in bfloat16 on the CPU goes through `lmd.step_kernel`, compiled or not.
"""

from types import ModuleType
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor
from torch.autograd.function import once_differentiable

from lmd.shapes import AttentionMask, Heads, SeenHeads, Tokens

HALF = (torch.bfloat16, torch.float16)

GatedTokens = Float[Tensor, "batch token half"]


class Rotation(NamedTuple):
    """Cosines and sines of the rotary embedding at some positions, `[token, rope_dim / 2]`."""

    cos: Tensor
    sin: Tensor

    @property
    def backwards(self) -> "Rotation":
        """The rotation that undoes this one."""
        return Rotation(self.cos, -self.sin)


def normalised(x: Tensor, weight: Tensor, bias: Tensor | None, eps: float) -> Tensor:
    """`F.layer_norm` over the last dimension of tokens or heads."""
    kernel = _kernel_for(x, x.shape[-1])
    if kernel is not None and x.dim() in (3, 4) and weight.dtype == torch.float32:
        return kernel.normalise(x, weight, bias, eps)
    return F.layer_norm(x, weight.shape, weight, bias, eps)


def rotate(x: Heads, rotation: Rotation) -> Heads:
    """Turn dimension pairs (i, i + rope_dim / 2) of `x` by their position's angle, in float32."""
    kernel = _kernel_for(x, x.shape[-1], rotation.cos.shape[-1])
    if kernel is not None and rotation.cos.dtype == torch.float32:
        return kernel.rotate(x, *rotation, False)
    if torch.compiler.is_compiling():
        half = rotation.cos.shape[-1]
        turned = [part.to(x.dtype) for part in _turned_pairs(x, rotation)]
        return torch.cat([*turned, x[..., 2 * half :]], dim=-1)
    return _Rotate.apply(x, *rotation) if torch.is_grad_enabled() else _turned(x, rotation)


def gated(x: Tokens) -> GatedTokens:
    """`value * silu(gate)` of `[value, gate]` along the last dimension."""
    kernel = _kernel_for(x, x.shape[-1] // 2)
    if kernel is not None:
        return kernel.gate(x)
    if torch.is_grad_enabled() and not torch.compiler.is_compiling():
        return _Gated.apply(x)
    value, gate = x.chunk(2, dim=-1)
    return value * F.silu(gate)


def linear(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """`F.linear`."""
    learns = weight.requires_grad and bias.requires_grad and x.dim() > 1
    if learns and torch.is_autocast_enabled("cpu") and _kernel_for(x, len(bias)) is not None:
        return _Linear.apply(x, weight.to(x.dtype), bias)
    return F.linear(x, weight, bias)


def attend(q: Heads, k: SeenHeads, v: SeenHeads, attn_mask: AttentionMask | None = None) -> Heads:
    """`softmax(q k^T / sqrt(head_dim)) v`; `attn_mask` says which keys a query sees (None: all)."""
    learns = torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad)
    if learns and q.device.type == "cpu" and q.dtype in HALF:
        if torch.compiler.is_compiling() and attn_mask is None:
            scores = (q * q.shape[-1] ** -0.5) @ k.transpose(-1, -2)
            return scores.softmax(dim=-1) @ v
        from lmd.product_attention import attend_by_products  # with PyTorch's compiler: 2 s

        return attend_by_products(q, k, v, attn_mask)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=attn_mask)


def _kernel_for(x: Tensor, *widths: int) -> ModuleType | None:
    """`lmd.step_kernel` if it takes this: a training step in bfloat16 on the CPU."""
    if x.dtype != torch.bfloat16 or x.device.type != "cpu" or not torch.is_grad_enabled():
        return None
    from lmd import step_kernel  # with PyTorch's compiler: 2 s

    return step_kernel if step_kernel.suits(*widths) else None


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


class _Linear(torch.autograd.Function):
    """A linear layer whose bias's gradient is summed by the kernel."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        return F.linear(x, weight, bias.to(x.dtype))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        from lmd import step_kernel

        x, weight = ctx.saved_tensors
        rows = gradient.flatten(0, -2)
        return gradient @ weight, rows.T @ x.flatten(0, -2), step_kernel.sum_rows(rows)
