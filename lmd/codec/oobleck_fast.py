"""The Oobleck networks for inference: weight norm folded, Snake in place, decoding as a stream.

Arrays are `[batch, channel, 1, position]` in channels-last memory, so that a 1-D convolution is a
2-D one, joining in time is one copy, and a transposed convolution (kernel twice its stride) is an
ordinary one of two taps whose output channels are read as positions, without moving anything.

Every decoder layer is a pure step: `step(x, state, last)` takes the next positions and what the
layer must remember, and returns the outputs that are now certain with the new memory. A layer
that looks p positions ahead is p positions late; `last` ends the stream with the zeros that the
whole decode is padded with. Decoding everything at once is one step with `last`, so streamed and
whole decodes are the same code.
"""

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Float
from torch import Tensor, nn

Signal = Float[Tensor, "batch _ 1 _"]  # batch, channel, 1, position
State = Any  # what one layer remembers: a tensor, or a tuple of states

PIECE_ELEMENTS = 1 << 19  # activations of one piece: 2 MiB in float32, what a core's cache holds
SHORT = 512  # positions below which a convolution spends its time on rearranging its weights


def to_signal(x: Float[Tensor, "batch channel position"]) -> Signal:
    """`[batch, channel, position]` to the channels-last layout used here."""
    return x[:, :, None].contiguous(memory_format=torch.channels_last)


def empty_signal(like: Tensor, batch: int, channels: int, n: int) -> Signal:
    """Uninitialised memory in the layout used here."""
    storage = torch.empty(batch, 1, n, channels, dtype=like.dtype, device=like.device)
    return storage.permute(0, 3, 1, 2)


def zero_signal(like: Tensor, batch: int, channels: int, n: int) -> Signal:
    """Zeros in the layout used here."""
    return empty_signal(like, batch, channels, n).zero_()


def folded_weight(conv: nn.Module) -> Tensor:
    """Weight norm carried out: g · v / ‖v‖, the norm over all but the first dimension."""
    norm = conv.weight_v.flatten(1).norm(dim=1).view(-1, 1, 1)
    return (conv.weight_g * conv.weight_v / norm).detach()


class Snake(nn.Module):
    """x + sin²(αx) / β per channel, α and 1/β computed beforehand from diffusers' logarithms."""

    def __init__(self, snake: nn.Module, dtype: torch.dtype) -> None:
        super().__init__()
        alpha, beta = (p.detach().exp()[..., None] for p in (snake.alpha, snake.beta))
        self.register_buffer("alpha", alpha.to(dtype))  # [1, channel, 1, 1]
        self.register_buffer("inverse_beta", (beta + 1e-9).reciprocal().to(dtype))

    def forward(self, x: Signal, out: Signal | None = None) -> Signal:
        """Apply, writing into `out` if given."""
        y = torch.mul(x, self.alpha).sin_()
        y = y.mul_(y)
        return torch.addcmul(x, y, self.inverse_beta, out=out)


class Conv(nn.Module):
    """A stride-1 convolution without padding.

    Args:
        weight: `[out, in, tap]`.
        bias: `[out]` or None.
        dtype: that it computes in.
        dilation: between taps.
    """

    def __init__(
        self, weight: Tensor, bias: Tensor | None, dtype: torch.dtype, dilation: int = 1
    ) -> None:
        super().__init__()
        self.register_buffer("weight", to_signal(weight).to(dtype))
        self.register_buffer("bias", None if bias is None else bias.detach().to(dtype))
        self.dilation = dilation

    @classmethod
    def of(cls, conv: nn.Conv1d, dtype: torch.dtype) -> "Conv":
        """From a weight-normed layer."""
        return cls(folded_weight(conv), conv.bias, dtype, conv.dilation[0])

    @property
    def reach(self) -> int:
        """How many positions shorter the output is than the input."""
        return (self.weight.shape[-1] - 1) * self.dilation

    def forward(self, x: Signal) -> Signal:
        """Convolve; nothing comes out of an input that is too short."""
        n = x.shape[-1] - self.reach
        if n <= 0:
            return empty_signal(x, x.shape[0], self.weight.shape[0], 0)
        poor = x.dtype == torch.float16 or n < SHORT or self.reach == 0
        if x.device.type == "cpu" and len(x) == 1 and poor:
            return self._by_taps(x, n)
        return F.conv2d(x, self.weight, self.bias, dilation=(1, self.dilation))

    def _by_taps(self, x: Signal, n: int) -> Signal:
        """One matrix product per tap, straight from and into the layout used here.

        Where the library's convolution is poor (float16 without matrix instructions, short
        inputs, single taps) this runs at the speed of the matrix product.
        """
        rows, taps = x[0, :, 0].T, self.weight.permute(3, 1, 0, 2)[..., 0]  # [tap, in, out]
        out = rows[:n] @ taps[0] if self.bias is None else torch.addmm(self.bias, rows[:n], taps[0])
        for index, tap in enumerate(taps[1:], start=1):
            begin = index * self.dilation
            torch.addmm(out, rows[begin : begin + n], tap, out=out)
        return out.T[None, :, None]


class StreamConv(nn.Module):
    """Snake (or none), then a convolution with `reach / 2` zeros on either side."""

    def __init__(self, snake: nn.Module | None, conv: nn.Conv1d, dtype: torch.dtype) -> None:
        super().__init__()
        self.snake = None if snake is None else Snake(snake, dtype)
        self.conv = Conv.of(conv, dtype)

    def start(self, batch: int) -> State:
        """The zeros before the first position."""
        return zero_signal(self.conv.weight, batch, self.conv.weight.shape[1], self.conv.reach // 2)

    def step(self, x: Signal, state: State, last: bool) -> tuple[Signal, State]:
        """The next positions, half a reach late."""
        joined = join_activated(state, x, self.snake, self.conv.reach // 2 if last else 0)
        return self.conv(joined), tail(joined, self.conv.reach)


class StreamResidual(nn.Module):
    """x + conv1(snake(conv7(snake(x)))), the inner convolution dilated."""

    def __init__(self, unit: nn.Module, dtype: torch.dtype) -> None:
        super().__init__()
        self.snake, self.conv = Snake(unit.snake1, dtype), Conv.of(unit.conv1, dtype)
        self.snake_out, self.conv_out = Snake(unit.snake2, dtype), Conv.of(unit.conv2, dtype)

    def start(self, batch: int) -> State:
        """Zeros for the convolution; nothing waits to be added."""
        channels = self.conv.weight.shape[1]
        zeros = zero_signal(self.conv.weight, batch, channels, self.conv.reach // 2)
        return zeros, empty_signal(self.conv.weight, batch, channels, 0)

    def step(self, x: Signal, state: State, last: bool) -> tuple[Signal, State]:
        """The next positions, half a reach late; the skipped ones wait for their partners."""
        before, waiting = state
        joined = join_activated(before, x, self.snake, self.conv.reach // 2 if last else 0)
        inner = self.conv(joined)
        n = inner.shape[-1]
        y = self.conv_out(self.snake_out(inner, out=inner))
        n_old = min(n, waiting.shape[-1])
        y[..., :n_old] += waiting[..., :n_old]
        y[..., n_old:] += x[..., : n - n_old]
        left = torch.cat([waiting[..., n_old:], x[..., n - n_old :]], dim=-1)
        return y, (tail(joined, self.conv.reach), left)


class StreamUpsample(nn.Module):
    """Snake, then a transposed convolution whose kernel is twice its (even) stride.

    Output chunk i, `stride` positions long, is the first half of the kernel on input i plus the
    second half on input i - 1: a convolution of two taps with `stride` times the channels.
    """

    def __init__(self, snake: nn.Module, conv: nn.ConvTranspose1d, dtype: torch.dtype) -> None:
        super().__init__()
        self.snake, self.stride = Snake(snake, dtype), conv.stride[0]
        weight = rearrange(
            folded_weight(conv), "i o (half s) -> (s o) i half", half=2, s=self.stride
        ).flip(2)  # previous, this
        self.conv = Conv(weight, conv.bias.repeat(self.stride), dtype)

    def start(self, batch: int) -> State:
        """One zero before the first input, and how many outputs are padding to be dropped."""
        return zero_signal(self.conv.weight, batch, self.conv.weight.shape[1], 1), self.stride // 2

    def step(self, x: Signal, state: State, last: bool) -> tuple[Signal, State]:
        """`stride` positions for every input, half a stride late."""
        before, n_drop = state
        joined = join_activated(before, x, self.snake, 1 if last else 0)
        y = self.conv(joined)
        y = rearrange(y, "b (s c) 1 n -> b c 1 (n s)", s=self.stride)
        end = y.shape[-1] - (self.stride // 2 if last else 0)
        dropped = min(n_drop, end)
        return y[..., dropped:end], (tail(joined, 1), n_drop - dropped)


class StreamDownsample(nn.Module):
    """Snake, then a strided convolution whose kernel is twice its (even) stride.

    Read as `stride` times the channels at one `stride`-th of the rate, it has two taps.
    """

    def __init__(self, snake: nn.Module, conv: nn.Conv1d, dtype: torch.dtype) -> None:
        super().__init__()
        self.snake, self.stride = Snake(snake, dtype), conv.stride[0]
        weight = rearrange(folded_weight(conv), "o i (half s) -> o (s i) half", s=self.stride)
        self.conv = Conv(weight, conv.bias, dtype)

    def start(self, batch: int) -> State:
        """The zeros before the first position."""
        channels = self.conv.weight.shape[1] // self.stride
        return zero_signal(self.conv.weight, batch, channels, self.stride // 2)

    def step(self, x: Signal, state: State, last: bool) -> tuple[Signal, State]:
        """One position for every `stride`, half a stride late."""
        joined = join_activated(state, x, self.snake, self.stride // 2 if last else 0)
        batch, channels, n = joined.shape[0], joined.shape[1], joined.shape[-1] // self.stride
        whole = joined[..., : n * self.stride].permute(0, 2, 3, 1)
        blocks = whole.reshape(batch, 1, n, self.stride * channels).permute(0, 3, 1, 2)
        used = max(0, n - 1) * self.stride
        return self.conv(blocks), tail(joined, joined.shape[-1] - used)


def join_activated(before: Signal, x: Signal, snake: Snake | None, n_zeros: int) -> Signal:
    """`before`, snake(x) and zeros in one piece of memory."""
    batch, channels, n_before = before.shape[0], before.shape[1], before.shape[-1]
    end = n_before + x.shape[-1]
    joined = empty_signal(before, batch, channels, end + n_zeros)
    joined[..., :n_before] = before
    if snake is None:
        joined[..., n_before:end] = x
    elif x.shape[-1]:
        snake(x, out=joined[..., n_before:end])
    joined[..., end:] = 0
    return joined


def tail(x: Signal, n: int) -> Signal:
    """A copy of the last `n` positions, or of all there are."""
    return x[..., max(0, x.shape[-1] - n) :].clone(memory_format=torch.channels_last)


class Stage(nn.Module):
    """Layers that run together on one piece of the signal.

    Args:
        layers: in order.
        elements: output activations per input position, from which the piece length follows.
    """

    def __init__(self, layers: Sequence[nn.Module], elements: int) -> None:
        super().__init__()
        self.layers, self.elements = nn.ModuleList(layers), elements

    def start(self, batch: int) -> State:
        """Every layer's start."""
        return tuple(layer.start(batch) for layer in self.layers)

    def step(self, x: Signal, state: State, last: bool) -> tuple[Signal, State]:
        """Every layer's step."""
        new = []
        for layer, old in zip(self.layers, state, strict=True):
            x, memory = layer.step(x, old, last)
            new.append(memory)
        return x, tuple(new)


def step_stages(
    stages: Sequence[Stage], x: Signal, states: Sequence[State], last: bool
) -> tuple[Signal, tuple[State, ...]]:
    """Run stages depth first, each on pieces short enough to stay in the processor's cache.

    The first stages have large weights and short signals and see everything at once; the last
    ones have small weights and long signals and are run piece by piece.
    """
    if not stages:
        return x, ()
    stage, memory, after = stages[0], states[0], tuple(states[1:])
    n = max(1, PIECE_ELEMENTS // (stage.elements * x.shape[0]))
    n_pieces = max(1, math.ceil(x.shape[-1] / n))
    outputs = []
    for index in range(n_pieces):
        piece, ends = x[..., index * n : (index + 1) * n], last and index == n_pieces - 1
        y, memory = stage.step(piece, memory, ends)
        y, after = step_stages(stages[1:], y, after, ends)
        outputs.append(y)
    return (outputs[0] if n_pieces == 1 else torch.cat(outputs, dim=-1)), (memory, *after)


def decoder_stages(decoder: nn.Module, dtype: torch.dtype) -> nn.ModuleList:
    """Diffusers' Oobleck decoder as stages: the first convolution, each block, the last one."""
    first = StreamConv(None, decoder.conv1, dtype)
    stages = [Stage([first], first.conv.weight.shape[0])]
    for block in decoder.block:
        up = StreamUpsample(block.snake1, block.conv_t1, dtype)
        units = (block.res_unit1, block.res_unit2, block.res_unit3)
        layers = [up, *(StreamResidual(unit, dtype) for unit in units)]
        stages.append(Stage(layers, up.conv.weight.shape[0]))
    stages[-1].layers.append(StreamConv(decoder.snake1, decoder.conv2, dtype))
    return nn.ModuleList(stages)


def encoder_stages(encoder: nn.Module, dtype: torch.dtype) -> nn.ModuleList:
    """Diffusers' Oobleck encoder as stages: the first convolution, each block, the last one."""
    first = StreamConv(None, encoder.conv1, dtype)
    stages = [Stage([first], first.conv.weight.shape[0])]
    for block in encoder.block:
        units = (block.res_unit1, block.res_unit2, block.res_unit3)
        layers = [StreamResidual(unit, dtype) for unit in units]
        down = StreamDownsample(block.snake1, block.conv1, dtype)
        stages.append(Stage([*layers, down], layers[0].conv.weight.shape[0]))
    end = StreamConv(encoder.snake1, encoder.conv2, dtype)
    return nn.ModuleList([*stages, Stage([end], end.conv.weight.shape[1])])
