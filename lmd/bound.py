"""What a machine allows: its own matrix products and memory reading, and the passes they bound."""

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch

from lmd.config import Preset
from lmd.machine import now_s
from lmd.packed import layouts


@dataclass(frozen=True)
class Rates:
    """What the machine can do: matrix products and reading."""

    product_flops: float  # floating-point operations per second in the model's precision
    read_bytes: float  # bytes per second


def machine_rates(chosen: Preset, dtype: torch.dtype, device: torch.device) -> Rates:
    """This machine's best matrix product of the model's widths, and its reading speed."""
    width, wide = chosen.dit.width, 2 * chosen.dit.ff_mult * chosen.dit.width
    best = 0.0
    for n_rows in (chosen.window.window_frames + 1, 1024):
        a = torch.randn(n_rows, width, device=device).to(dtype)
        layer = torch.nn.Linear(width, wide, bias=False, device=device).to(dtype)
        layers = [layer]
        if device.type == "cpu":
            layers += [lay_out(layer) for lay_out in layouts(dtype, n_rows).values()]
        for way in layers:
            with torch.no_grad():
                seconds = fastest(lambda a=a, way=way: way(a), device)
            best = max(best, 2 * n_rows * width * wide / seconds)
    buffer = torch.zeros(2**26, device=device)
    seconds = fastest(lambda: buffer.sum(), device)
    return Rates(best, buffer.nbytes / seconds)


def fastest(work: Callable[[], object], device: torch.device, n: int = 7) -> float:
    """The shortest of a few timings, in seconds."""
    seconds = []
    for _ in range(n + 2):
        began = time.perf_counter()
        work()
        seconds.append(now_s(device) - began)
    return min(seconds[2:])


class Pass(NamedTuple):
    """A transformer pass: its tokens, and of how many only keys and values are kept."""

    n_tokens: int
    n_kept: int = 0


def passes_of(regime: str, context: int, block: int, n_steps: int) -> list[Pass]:
    """The transformer passes of a block, once a stream is under way."""
    if regime == "full":
        return [Pass(context + block + 1)] * n_steps
    step = Pass(block + 1)
    if regime == "enc-dec":
        return [Pass(context, n_kept=context)] + [step] * n_steps
    return [Pass(2 * block + 1, n_kept=block + 1)] + [step] * (n_steps - 1)


def bound_ms(
    passes: list[Pass], rates: Rates, n_weights: int, n_spared: int, n_bytes: int
) -> float:
    """What passes take if nothing but products or reading holds them up.

    Args:
        passes: of a block.
        rates: of the machine.
        n_weights: that a token meets.
        n_spared: of these, those of the last block that a kept token does not meet.
        n_bytes: of one weight.
    """
    total_s = 0.0
    for n_tokens, n_kept in passes:
        products = n_weights * n_tokens - n_spared * n_kept
        read = n_weights - n_spared * (n_kept == n_tokens)
        total_s += max(2 * products / rates.product_flops, read * n_bytes / rates.read_bytes)
    return 1e3 * total_s
