"""Randomness as a function of (seed, purpose, step), never of history."""

import hashlib

import torch
from torch import Tensor

TILE_FRAMES = 48


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


def frame_noise(
    shape: tuple[int, ...], seed: int, purpose: str, first_frame: int, *step: int | str
) -> Tensor:
    """`normal` for latents `[…, frame]`, where the noise of a frame depends on its number alone.

    So a block that is made again from a few frames later is made from the same noise there.
    Numbers are drawn for `TILE_FRAMES` frames at a time.
    """
    tiles = range(first_frame // TILE_FRAMES, -(-(first_frame + shape[-1]) // TILE_FRAMES))
    whole = (*shape[:-1], TILE_FRAMES)
    noise = torch.cat([normal(whole, seed, purpose, tile, *step) for tile in tiles], dim=-1)
    return noise.narrow(-1, first_frame % TILE_FRAMES, shape[-1]).contiguous()
