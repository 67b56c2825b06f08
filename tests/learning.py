"""What tests of the transformer's inner operations share."""

import torch
import torch.nn.functional as F


def numbers(*shape, seed=0, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def gradients(work, *inputs):
    """The output, and the inputs' gradients of a fixed random projection of it."""
    inputs = [x.clone().requires_grad_(True) for x in inputs]
    out = work(*inputs)
    weight = numbers(*out.shape, seed=9).to(out.dtype)
    return [out.detach(), *torch.autograd.grad((out * weight).sum(), inputs)]


def plain_rotate(x, turn):
    half = turn.cos.shape[-1]
    left, right, rest = x.split([half, half, x.shape[-1] - 2 * half], dim=-1)
    pairs = [left * turn.cos - right * turn.sin, right * turn.cos + left * turn.sin]
    return torch.cat([*pairs, rest], dim=-1)


def plain_gate(x):
    value, gate = x.chunk(2, dim=-1)
    return value * F.silu(gate)
