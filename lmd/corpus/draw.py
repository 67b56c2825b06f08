"""Draws that depend on nothing but (seed, name, where)."""

from collections.abc import Sequence
from typing import TypeVar

import numpy as np
import torch

from lmd.rng import derive_seed, generator

T = TypeVar("T")


class Draw:
    """Named draws from (seed, purpose, …); every draw has its own generator."""

    def __init__(self, seed: int, *step: int | str) -> None:
        self.seed, self.step = seed, step

    def uniform(self, name: str, low: float, high: float) -> float:
        """A number in [low, high)."""
        u = torch.rand((), generator=generator(self.seed, name, *self.step), dtype=torch.float64)
        return low + (high - low) * float(u)

    def choice(self, name: str, options: Sequence[T], weights: Sequence[float] = ()) -> T:
        """One of the options, with the given weights (equal if there are none)."""
        shares = np.cumsum(weights or [1.0] * len(options))
        index = np.searchsorted(shares, self.uniform(name, 0, float(shares[-1])), side="right")
        return options[min(int(index), len(options) - 1)]

    def normal(self, name: str, n: int) -> np.ndarray:
        """`n` standard normal numbers, float64."""
        source = generator(self.seed, name, *self.step)
        return torch.randn(n, generator=source, dtype=torch.float64).numpy()


class QuickDraw(Draw):
    """The same by the hash alone, for many draws: no generator has to be seeded for each."""

    def uniform(self, name: str, low: float, high: float) -> float:
        """A number in [low, high)."""
        return low + (high - low) * derive_seed(self.seed, name, *self.step) / 2**63
