"""Randomness as a function of (seed, purpose, step), never of history."""

import hashlib

import torch
from torch import Tensor


def derive_seed(seed: int, purpose: str, *step: int | str) -> int:
    """A 63-bit seed that depends on nothing but its arguments."""
    key = "/".join([str(seed), purpose, *map(str, step)]).encode()
    return int.from_bytes(hashlib.blake2b(key, digest_size=8).digest(), "little") >> 1


def generator(seed: int, purpose: str, *step: int | str) -> torch.Generator:
    """A CPU generator for one use of randomness, e.g. `generator(seed, "noise", block, step)`."""
    return torch.Generator().manual_seed(derive_seed(seed, purpose, *step))


def normal(shape: tuple[int, ...], seed: int, purpose: str, *step: int | str) -> Tensor:
    """Standard normal float32 numbers, drawn on the CPU so that every device sees the same ones."""
    return torch.randn(shape, generator=generator(seed, purpose, *step))
