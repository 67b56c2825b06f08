"""Prints whether the step kernel's operations, in one compiled program, learn what they do alone.

A process of its own: the tests' shape checks cannot be compiled.
"""

import torch
from torch import Tensor

from lmd.operations import Rotation, gated, linear, normalised, rotate


def block(x: Tensor, weight: Tensor, wide: Tensor, bias: Tensor, angle: Tensor) -> Tensor:
    """All of them, one after another."""
    with torch.autocast("cpu", torch.bfloat16):
        h = normalised(x.unflatten(-1, (3, 64)).transpose(1, 2), weight, None, 1e-5)
        h = rotate(h, Rotation(angle.cos(), angle.sin())).transpose(1, 2).flatten(2)
        return gated(linear(h, wide, bias))


def learnt(work, *inputs: Tensor) -> list[Tensor]:
    """The output, and the inputs' gradients of its sum of squares."""
    out = work(*inputs)
    return [out, *torch.autograd.grad(out.float().square().sum(), inputs[:4])]


if __name__ == "__main__":
    generator = torch.Generator().manual_seed(0)
    shapes = ((2, 5, 192), (64,), (64, 192), (64,), (5, 16))
    inputs = [torch.randn(shape, generator=generator) for shape in shapes]
    inputs[0] = inputs[0].bfloat16()
    for tensor in inputs[:4]:
        tensor.requires_grad_()
    whole = torch.compile(block, backend="aot_eager", fullgraph=True)
    pairs = zip(learnt(whole, *inputs), learnt(block, *inputs), strict=True)
    print(all(torch.equal(*pair) for pair in pairs))
