"""What the spectral codec is trained on: levels, phase advances, a small discriminator.

Sources: Vocos (arXiv 2306.00814) for the inverse-STFT generator with a multi-resolution
discriminator, least squares for the adversarial part, L1 for the features.
"""

import math

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from lmd.codec.phase import Magnitude, Spectrum
from lmd.data.codec_fit import mel_matrix

LN10_OVER_10 = math.log(10) / 10
WINDOWS = (512, 1024, 2048)  # samples, at which synthesised waves are compared and scored
Scalar = Float[Tensor, ""]


def bin_weights(n_bins: int, sample_rate: int) -> Float[Tensor, " bin"]:
    """One over the equivalent rectangular bandwidth at each bin, mean 1: as hearing has it."""
    hz = torch.linspace(0, sample_rate / 2, n_bins)
    weights = 1 / (24.7 * (4.37 * hz / 1000 + 1))
    return weights / weights.mean()


def mel_levels(power: Float[Tensor, "batch bin step"], mel: Tensor, floor_db: float) -> Tensor:
    """Band levels `[batch, mel, step]` in decibels with a soft floor."""
    return torch.log(mel.T @ power + 10 ** (floor_db / 10)) / LN10_OVER_10


def level_loss(
    level: Tensor, power: Tensor, mel: Tensor, weights: Tensor, floor_db: float
) -> tuple[Scalar, Scalar]:
    """Mean absolute error in decibels: weighted by `bin_weights` over bins, and over mel bands.

    `level` is predicted, in decibels, the floor included; `power` is the true `|STFT|²`.
    """
    floored = power + 10 ** (floor_db / 10)
    with torch.autocast(level.device.type, enabled=False):  # powers span eight decades
        target, band_target = torch.log(floored), torch.log(mel.T @ floored)
        bands = torch.log(mel.T @ torch.exp(level * LN10_OVER_10))
    per_bin = (level - target / LN10_OVER_10).abs().mean((0, 2))
    return (per_bin * weights).mean(), (bands - band_target).abs().mean() / LN10_OVER_10


def advance_loss(predicted: Spectrum, true: Spectrum, magnitude: Magnitude) -> Scalar:
    """Mean squared distance of advances, loud bins counting more (root of the magnitude).

    Its optimum is the mean of the unit numbers possible, whose modulus says how sure one can be.
    """
    weights = magnitude.sqrt()
    weights = weights / weights.mean((1, 2), keepdim=True).clamp_min(1e-9)
    error = torch.view_as_real(predicted - true).square().sum(-1)
    return (error * weights * (true.abs() > 0.5)).mean()


def multi_resolution_loss(
    wave: Float[Tensor, "batch sample"], target: Float[Tensor, "batch sample"], sample_rate: int
) -> Scalar:
    """Mean over window sizes of the L1 distance of mel levels, in decibels."""
    total = wave.new_zeros(())
    for n_fft in WINDOWS:
        mel = mel_matrix(n_fft // 2 + 1, sample_rate, n_mels=n_fft // 16).to(wave.device)
        levels = [mel_levels(_power(w, n_fft), mel, -80.0) for w in (wave, target)]
        total = total + (levels[0] - levels[1]).abs().mean()
    return total / len(WINDOWS)


def _power(wave: Tensor, n_fft: int) -> Tensor:
    """Power with a full-scale sine at 1, a quarter window per hop, no padding."""
    window = torch.hann_window(n_fft, device=wave.device)
    spectrum = torch.stft(wave, n_fft, n_fft // 4, window=window, center=False, return_complex=True)
    return torch.view_as_real(spectrum).square().sum(-1) * (2 / window.sum()) ** 2


class Discriminator(nn.Module):
    """Small 2-D convolutions over log magnitudes at several window sizes."""

    def __init__(self, width: int = 24) -> None:
        super().__init__()
        self.stacks = nn.ModuleList(_stack(width) for _ in WINDOWS)

    def forward(self, wave: Float[Tensor, "batch sample"]) -> list[list[Tensor]]:
        """Per window size, every layer's output; the last is the score map."""
        outputs = []
        for n_fft, stack in zip(WINDOWS, self.stacks, strict=True):
            level = torch.log(_power(wave, n_fft) + 1e-8) / LN10_OVER_10
            x, layers = (level[:, None] + 50) / 20, []
            for layer in stack:
                x = layer(x)
                layers.append(x)
                x = F.leaky_relu(x, 0.1)
            outputs.append(layers)
        return outputs


def _stack(width: int) -> nn.ModuleList:
    """Layers of one window size: frequency is halved three times, time once."""
    norm = nn.utils.parametrizations.weight_norm
    strides = ((2, 1), (2, 1), (2, 2), (1, 1))
    layers = [
        norm(nn.Conv2d(1 if i == 0 else width, width, (5, 3), stride, padding=(2, 1)))
        for i, stride in enumerate(strides)
    ]
    return nn.ModuleList([*layers, norm(nn.Conv2d(width, 1, 3, padding=1))])


def discriminator_loss(real: list[list[Tensor]], fake: list[list[Tensor]]) -> Scalar:
    """Least squares: real maps to 1, fake to 0."""
    pairs = zip(real, fake, strict=True)
    return sum((1 - r[-1]).square().mean() + f[-1].square().mean() for r, f in pairs) / len(real)


def generator_loss(real: list[list[Tensor]], fake: list[list[Tensor]]) -> tuple[Scalar, Scalar]:
    """Adversarial (fakes scored 1) and feature-matching (relative L1 of the layers) losses."""
    adversarial = sum((1 - f[-1]).square().mean() for f in fake) / len(fake)
    distances = [
        (a.detach() - b).abs().mean() / a.detach().abs().mean().clamp_min(1e-6)
        for r, f in zip(real, fake, strict=True)
        for a, b in zip(r[:-1], f[:-1], strict=True)
    ]
    return adversarial, sum(distances) / len(distances)
