"""What a training step computes between its matrix products, in bfloat16 on the CPU.

Norms, rotation, gates and the gradients of biases only move memory, yet on processors with matrix
instructions they take longer than the products do: a library goes over the same numbers several
times, and so do the loops that a compiler makes of the formulas. `stepkernel.cpp` reads what it
needs once. It is compiled the first time it is needed (see `lmd.panels`); where there is no
compiler, and with LMD_STEP_KERNEL=0 or LMD_PANELS=0, the plain formulas stay. Sums are float32 and
do not depend on the number of threads.

Each is an operation of its own for PyTorch, so that `torch.compile` goes on across it. They are
differentiated once, backwards.
"""

import ctypes
import sys
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from lmd.errors import LmdError
from lmd.panels import NUMBER, POINTER, SIZE, SWITCH, compiled, switched_off, why_not

SOURCE = Path(__file__).with_name("stepkernel.cpp")
SWITCHES = ("LMD_STEP_KERNEL", SWITCH)


class _Heads(ctypes.Structure):
    """`Heads` in the source."""

    _fields_ = tuple(
        (name, ctypes.c_long) for name in ("n_batch", "n_heads", "n_tokens", "dim", "stride")
    )


def suits(*widths: int) -> bool:
    """Whether the kernel runs here and takes rows of these widths: whole registers."""
    return can_use_step_kernel() and all(width % lanes() == 0 for width in widths)


@torch.library.custom_op("lmd::normalise", mutates_args=(), device_types="cpu")
def normalise(x: Tensor, weight: Tensor, bias: Tensor | None, eps: float) -> Tensor:
    """`F.layer_norm` over the last dimension of tokens or of heads."""
    shift = torch.zeros_like(weight) if bias is None else bias
    weight, shift = (_given(part, torch.float32, x.shape[-1:]) for part in (weight, shift))
    x, heads = _as_heads(x)
    y = x.new_empty(x.shape)
    kernel().step_normalise(
        ctypes.byref(heads), *_at(x, weight, shift), eps, y.data_ptr(), torch.get_num_threads()
    )
    return y


@torch.library.custom_op("lmd::unnormalise", mutates_args=(), device_types="cpu")
def unnormalise(
    gradient: Tensor, x: Tensor, weight: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of `normalise`: of `x`, `weight` and `bias`."""
    gradient = _given(gradient, torch.bfloat16, x.shape)
    weight = _given(weight, torch.float32, x.shape[-1:])
    x, heads = _as_heads(x)
    to_x, sums = _like_heads(x), weight.new_empty(2, len(weight))
    kernel().step_unnormalise(
        ctypes.byref(heads),
        *_at(x, gradient, weight),
        eps,
        *_at(to_x, sums),
        torch.get_num_threads(),
    )
    return to_x, sums[0].clone(), sums[1].clone()


@torch.library.custom_op("lmd::rotate", mutates_args=(), device_types="cpu")
def rotate(x: Tensor, cos: Tensor, sin: Tensor, backwards: bool) -> Tensor:
    """Dimension pairs of `[batch, head, token, dim]` turned by their token's angle, or back."""
    n_tokens, dim = x.shape[-2:]
    half = min(cos.shape[-1], dim // 2)
    x = _given(x, torch.bfloat16, x.shape, half)
    cos, sin = (_given(part, torch.float32, (n_tokens, half)) for part in (cos, sin))
    y = torch.empty_like(x)
    sizes = (x.shape[:-2].numel(), n_tokens, dim, half, backwards)
    kernel().step_rotate(*_at(x, cos, sin), *sizes, y.data_ptr(), torch.get_num_threads())
    return y


@torch.library.custom_op("lmd::gate", mutates_args=(), device_types="cpu")
def gate(x: Tensor) -> Tensor:
    """`value * silu(gate)` of `[value, gate]` along the last dimension."""
    width = x.shape[-1] // 2
    x = _given(x, torch.bfloat16, (*x.shape[:-1], 2 * width), width)
    y, n_rows = x.new_empty(*x.shape[:-1], width), x.shape[:-1].numel()
    kernel().step_gate(x.data_ptr(), n_rows, width, y.data_ptr(), torch.get_num_threads())
    return y


@torch.library.custom_op("lmd::ungate", mutates_args=(), device_types="cpu")
def ungate(gradient: Tensor, x: Tensor) -> Tensor:
    """The gradient of `gate`."""
    width = x.shape[-1] // 2
    x = _given(x, torch.bfloat16, (*x.shape[:-1], 2 * width), width)
    gradient = _given(gradient, torch.bfloat16, (*x.shape[:-1], width))
    to_x, n_rows, n_threads = torch.empty_like(x), x.shape[:-1].numel(), torch.get_num_threads()
    kernel().step_ungate(*_at(x, gradient), n_rows, width, to_x.data_ptr(), n_threads)
    return to_x


@torch.library.custom_op("lmd::sum_rows", mutates_args=(), device_types="cpu")
def sum_rows(x: Tensor) -> Tensor:
    """Of every column of `[row, column]`, in float32."""
    n_rows, width = x.shape
    x = _given(x, torch.bfloat16, x.shape, width)
    sums = x.new_empty(width, dtype=torch.float32)
    kernel().step_sum(x.data_ptr(), n_rows, width, sums.data_ptr(), torch.get_num_threads())
    return sums


def take(x: Tensor, tokens: Tensor) -> Tensor:
    """`x[:, :, tokens]` of `[batch, head, token, dim]`."""
    x, tokens = _given(x, torch.bfloat16, x.shape), _tokens_of(tokens, x.shape[2])
    y = x.new_empty(*x.shape[:2], len(tokens), x.shape[-1])
    sizes = (x.shape[:2].numel(), x.shape[2], len(tokens), x.shape[3])
    kernel().step_take(*_at(x, tokens), *sizes, y.data_ptr(), torch.get_num_threads())
    return y


def put(parts: Sequence[Tensor], tokens: Sequence[Tensor], n_tokens: int) -> Tensor:
    """`take` undone: tokens `[batch, head, n_tokens, dim]`, what was taken of each added up."""
    n_batch, n_heads, _, dim = parts[0].shape
    tokens = [_tokens_of(some, n_tokens) for some in tokens]
    parts = [
        _given(part, torch.bfloat16, (n_batch, n_heads, len(some), dim), dim)
        for part, some in zip(parts, tokens, strict=True)
    ]
    y = parts[0].new_empty(n_batch, n_heads, n_tokens, dim)
    pointers, counts = ctypes.c_void_p * len(parts), ctypes.c_long * len(parts)
    kernel().step_put(
        pointers(*_at(*parts)),
        pointers(*_at(*tokens)),
        counts(*(len(some) for some in tokens)),
        len(parts),
        *(n_batch * n_heads, n_tokens, dim),
        y.data_ptr(),
        torch.get_num_threads(),
    )
    return y


def _check(x: Tensor, dtype: torch.dtype, shape: Sequence[int], *widths: int) -> None:
    """The kernel reads what it is pointed at, so that is looked at before."""
    if x.dtype != dtype or x.shape != tuple(shape) or any(width % lanes() for width in widths):
        raise LmdError(
            f"{x.dtype} of shape {tuple(x.shape)} for the kernel of a training step",
            f"{dtype} of shape {tuple(shape)}, widths that {lanes()} divides",
            "Convert the model and what goes into it together, or set LMD_STEP_KERNEL=0.",
        )


def _given(x: Tensor, dtype: torch.dtype, shape: Sequence[int], *widths: int) -> Tensor:
    """Checked, and in one piece."""
    _check(x, dtype, shape, *widths)
    return x.contiguous()


def _tokens_of(tokens: Tensor, n_tokens: int) -> Tensor:
    """Places of tokens, each among `n_tokens`."""
    tokens = _given(tokens, torch.int64, (len(tokens),))
    if len(tokens) and not 0 <= tokens.min() <= tokens.max() < n_tokens:
        raise LmdError(
            f"tokens {tokens.min()} to {tokens.max()}",
            f"some of 0 to {n_tokens - 1}",
            "Take and put tokens that there are.",
        )
    return tokens


def _at(*tensors: Tensor) -> list[int]:
    return [tensor.data_ptr() for tensor in tensors]


def _as_heads(x: Tensor) -> tuple[Tensor, _Heads]:
    """Tokens, or heads that lie side by side in their tokens' rows, as the kernel reads them."""
    head = x[:, None] if x.dim() == 3 else x
    n_batch, n_heads, n_tokens, dim = head.shape
    _check(x, torch.bfloat16, x.shape, dim)
    stride = head.stride(2)
    expected = (n_tokens * stride, dim, stride, 1)
    if n_heads == 1:
        expected = (expected[0], head.stride(1), *expected[2:])
    if head.stride() != expected or stride < n_heads * dim:
        x, stride = _like_heads(x).copy_(x), n_heads * dim
    return x, _Heads(n_batch, n_heads, n_tokens, dim, stride)


def _like_heads(x: Tensor) -> Tensor:
    """Empty, of that shape, every token's heads side by side."""
    if x.dim() == 3:
        return x.new_empty(x.shape)
    return x.new_empty(x.shape[0], x.shape[2], x.shape[1], x.shape[3]).transpose(1, 2)


@normalise.register_fake
def _(x: Tensor, weight: Tensor, bias: Tensor | None, eps: float) -> Tensor:
    return x.new_empty(x.shape)


@unnormalise.register_fake
def _(gradient: Tensor, x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    return _like_heads(x), torch.empty_like(weight), torch.empty_like(weight)


@rotate.register_fake
def _(x: Tensor, cos: Tensor, sin: Tensor, backwards: bool) -> Tensor:
    return x.new_empty(x.shape)


@gate.register_fake
def _(x: Tensor) -> Tensor:
    return x.new_empty(*x.shape[:-1], x.shape[-1] // 2)


@ungate.register_fake
def _(gradient: Tensor, x: Tensor) -> Tensor:
    return x.new_empty(x.shape)


@sum_rows.register_fake
def _(x: Tensor) -> Tensor:
    return x.new_empty(x.shape[-1], dtype=torch.float32)


def _keep_norm(ctx: Any, inputs: tuple, output: Tensor) -> None:
    x, weight, bias, ctx.eps = inputs
    ctx.has_bias = bias is not None
    ctx.save_for_backward(x, weight)


def _norm_backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
    to_x, to_weight, to_bias = unnormalise(gradient, *ctx.saved_tensors, ctx.eps)
    return to_x, to_weight, to_bias if ctx.has_bias else None, None


def _keep_angles(ctx: Any, inputs: tuple, output: Tensor) -> None:
    _, cos, sin, ctx.backwards = inputs
    ctx.save_for_backward(cos, sin)


def _rotate_backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
    return rotate(gradient, *ctx.saved_tensors, not ctx.backwards), None, None, None


def _keep_input(ctx: Any, inputs: tuple, output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _gate_backward(ctx: Any, gradient: Tensor) -> Tensor:
    return ungate(gradient, *ctx.saved_tensors)


normalise.register_autograd(_norm_backward, setup_context=_keep_norm)
rotate.register_autograd(_rotate_backward, setup_context=_keep_angles)
gate.register_autograd(_gate_backward, setup_context=_keep_input)


@torch.compiler.assume_constant_result
def lanes() -> int:
    """How many numbers a register holds."""
    return kernel().step_lanes()


@torch.compiler.assume_constant_result
def can_use_step_kernel() -> bool:
    """Whether the kernel runs here (compiled if it was not yet)."""
    return why_no_step_kernel() == ""


@cache
def why_no_step_kernel() -> str:
    """What stands in the way of the kernel, for a person; "" if nothing does."""
    if off := switched_off(*SWITCHES):
        return off
    if not sys.platform.startswith("linux"):
        return f"{sys.platform}: torch's own operations are used"
    return why_not(_computes_rightly)


@cache
def kernel() -> ctypes.CDLL:
    """The compiled kernel.

    Raises:
        OSError: as `lmd.panels.kernel`.
        subprocess.SubprocessError: the compiler failed; `stderr` says why.
    """
    library = ctypes.CDLL(str(compiled(SOURCE)))
    number = ctypes.c_float
    library.step_normalise.argtypes = [POINTER] * 4 + [number, POINTER, NUMBER]
    library.step_unnormalise.argtypes = [POINTER] * 4 + [number, POINTER, POINTER, NUMBER]
    library.step_rotate.argtypes = [POINTER] * 3 + [SIZE] * 4 + [NUMBER, POINTER, NUMBER]
    library.step_gate.argtypes = [POINTER, SIZE, SIZE, POINTER, NUMBER]
    library.step_ungate.argtypes = [POINTER, POINTER, SIZE, SIZE, POINTER, NUMBER]
    library.step_sum.argtypes = [POINTER, SIZE, SIZE, POINTER, NUMBER]
    library.step_take.argtypes = [POINTER] * 2 + [SIZE] * 4 + [POINTER, NUMBER]
    library.step_put.argtypes = [POINTER] * 3 + [SIZE] * 4 + [POINTER, NUMBER]
    library.step_lanes.restype = NUMBER
    return library


def _computes_rightly() -> bool:
    """Whether everything agrees with torch's formulas, forwards and backwards."""
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    x, g, (weight, bias), angle = normal(2, 5, 64), normal(2, 5, 64), normal(2, 64), normal(5, 16)
    x, g = x.bfloat16(), g.bfloat16()
    tokens = torch.tensor([1, 4, 1])
    exact = [part.double().requires_grad_() for part in (x, weight, bias)]
    norm = F.layer_norm(exact[0], (64,), *exact[1:], 1e-5)
    value, share = exact[0].chunk(2, dim=-1)
    gated = value * F.silu(share)
    left, right, rest = x.double().split([16, 16, 32], dim=-1)
    cos, sin = angle.cos(), angle.sin()
    turned = torch.cat([left * cos - right * sin, right * cos + left * sin, rest], dim=-1)
    added = torch.zeros(2, 1, 5, 64).index_add(2, tokens, x[:, None, tokens].float())
    pairs = [
        (normalise(x, weight, bias, 1e-5), norm),
        *zip(
            unnormalise(g, x, weight, 1e-5),
            torch.autograd.grad(norm, exact, g.double(), retain_graph=True),
            strict=True,
        ),
        (gate(x), gated),
        (ungate(g[..., :32], x), torch.autograd.grad(gated, exact[0], g[..., :32].double())[0]),
        (rotate(x, cos, sin, False), turned),
        (rotate(rotate(x, cos, sin, False), cos, sin, True), x),
        (sum_rows(x[0]), x[0].double().sum(0)),
        (put([take(x[:, None], tokens)], [tokens], 5), added),
    ]
    return all(
        torch.allclose(ours.double(), theirs.double(), atol=0.02, rtol=0.02)
        for ours, theirs in pairs
    )
