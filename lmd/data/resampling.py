"""Sound in another format: to one channel, to another rate; also rates that nobody else has."""

import math

import torch
import torchaudio.functional as audio
from torch import Tensor

CANCELLED = 1e-3  # of the channels' energy; a mean with less is no mix of them
MANY_PHASES = 1000  # torchaudio's kernel has the square of it in numbers
ZEROS, ROLLOFF = 6, 0.99  # torchaudio's: zero crossings on either side, share of the band kept
BLOCK = 2**16  # samples made at once


def to_mono(wave: Tensor) -> Tensor:
    """The mean of the channels, or the louder one where they cancel each other out.

    Args:
        wave: `[channel, sample]`.

    Returns:
        `[1, sample]`.
    """
    mean, energies = wave.mean(0, keepdim=True), wave.square().mean(1)
    if mean.square().mean() < CANCELLED * energies.mean():
        return wave[energies.argmax()][None]
    return mean


def resampled(wave: Tensor, rate: int, wanted: int) -> Tensor:
    """A wave at another rate, `ceil(samples * wanted / rate)` samples long.

    torchaudio makes a kernel for every phase that a sample can have between two others. Where the
    rates have hardly a divisor in common (44,101 Hz), that is gigabytes.

    Args:
        wave: `[channel, sample]`.
        rate: of the wave, Hz.
        wanted: Hz.
    """
    if max(rate, wanted) // math.gcd(rate, wanted) <= MANY_PHASES:
        return audio.resample(wave, rate, wanted)
    return resampled_at_any_rate(wave, rate, wanted)


def resampled_at_any_rate(wave: Tensor, rate: int, wanted: int) -> Tensor:
    """The same sums (a sinc under Hann's window), but weights are made for each sample anew."""
    n_samples = math.ceil(wave.shape[-1] * wanted / rate)
    scale = ROLLOFF * min(rate, wanted) / rate
    width = math.ceil(ZEROS / scale)
    around = torch.arange(-width, width + 1)
    wave = torch.nn.functional.pad(wave, (width, width + 1))
    parts = []
    for start in range(0, n_samples, BLOCK):
        place = torch.arange(start, min(start + BLOCK, n_samples)) * rate  # in 1 / wanted samples
        after = (place % wanted / wanted)[:, None]
        t = ((around - after) * scale).clamp(-ZEROS, ZEROS)
        weights = torch.sinc(t) * torch.cos(t * math.pi / ZEROS / 2).square() * scale
        heard = wave[:, (place // wanted)[:, None] + around + width]
        parts.append((heard * weights).sum(-1))
    return torch.cat(parts, dim=-1)
