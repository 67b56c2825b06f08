"""Measures of music: how far from the real, how it drifts, what happens where blocks meet.

Pure functions over embeddings, probabilities and waves. Everything that is estimated comes with an
interval. Taught in notebook 05_evaluate.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float
from scipy import stats
from torch import Tensor

from lmd.errors import LmdError
from lmd.training.codec.losses import mel_matrix
from lmd.training.codec.metrics import Mono, power

Embeddings = Float[np.ndarray, "sample size"]
Probabilities = Float[np.ndarray, "clip label"]
TOLERANCE = 1e-6  # of negative eigenvalues, relative to the largest


@dataclass(frozen=True)
class Gaussian:
    """Mean `[size]` and covariance `[size, size]` of embeddings, float64."""

    mean: np.ndarray
    covariance: np.ndarray


@dataclass(frozen=True)
class Interval:
    """An estimate with its 95 % interval; `n` independent values went into it."""

    mean: float
    low: float
    high: float
    n: int

    @property
    def excludes_zero(self) -> bool:
        """Whether 0 lies outside."""
        return self.low > 0 or self.high < 0


def gaussian(embeddings: Embeddings) -> Gaussian:
    """Fit mean and covariance (divided by n − 1) in float64.

    Raises:
        LmdError: fewer than two embeddings, or any that is not finite.
    """
    x = np.asarray(embeddings, dtype=np.float64)
    if len(x) < 2 or not np.isfinite(x).all():
        found = f"{len(x)} embeddings, {int((~np.isfinite(x)).sum())} values not finite"
        todo = "Generate more, or look for NaN in the audio."
        raise LmdError(found, "at least 2, all finite", todo)
    return Gaussian(x.mean(0), np.atleast_2d(np.cov(x, rowvar=False)))


def frechet(a: Gaussian, b: Gaussian) -> float:
    """Fréchet distance of two Gaussians, |μa − μb|² + tr(A + B − 2 (A B)^½), a squared distance.

    The trace of the root is taken from the eigenvalues of A^½ B A^½, which is symmetric, so no
    imaginary part can arise.

    Raises:
        LmdError: covariances that are not symmetric, or negative by more than rounding.
    """
    for covariance in (a.covariance, b.covariance):
        if not np.allclose(covariance, covariance.T, rtol=1e-9, atol=1e-12):
            raise LmdError("a covariance that is not symmetric", "one that is", "Use gaussian().")
    values, vectors = np.linalg.eigh(a.covariance)
    root = (vectors * np.sqrt(_not_negative(values, a))) @ vectors.T
    inner = root @ b.covariance @ root
    eigenvalues = _not_negative(np.linalg.eigvalsh((inner + inner.T) / 2), a, b)
    gap = a.mean - b.mean
    trace = np.trace(a.covariance) + np.trace(b.covariance) - 2 * np.sqrt(eigenvalues).sum()
    return float(gap @ gap + max(trace, 0.0))


def _not_negative(values: np.ndarray, *of: Gaussian) -> np.ndarray:
    """Eigenvalues with rounding below zero removed; more than rounding is refused."""
    scale = float(np.prod([np.trace(g.covariance) for g in of]))
    if values.min() < -TOLERANCE * max(scale, 1e-300):
        found = f"an eigenvalue of {values.min():.3g} where the trace is {scale:.3g}"
        raise LmdError(found, "none below zero", "Fit the covariance in float64 with gaussian().")
    return values.clip(0)


def typicality(embeddings: Embeddings, reference: Gaussian) -> Float[np.ndarray, " sample"]:
    """How far each embedding lies from real music: mean squared Mahalanobis distance per dimension.

    (x − μ)ᵀ (Σ + λI)⁻¹ (x − μ) / size, with λ a thousandth of Σ's mean eigenvalue. Real music has 1
    on average; unlike the Fréchet distance it is defined for a single window.
    """
    size = len(reference.mean)
    ridge = 1e-3 * np.trace(reference.covariance) / size * np.eye(size)
    gap = np.asarray(embeddings, np.float64) - reference.mean
    solved = np.linalg.solve(reference.covariance + ridge, gap.T).T
    return (gap * solved).sum(1) / size


def kl_divergence(true: Probabilities, found: Probabilities) -> float:
    """Mean over clips of Σ true · log(true / found), nats; both are kept above 1e-6."""
    p, q = (np.clip(np.asarray(x, np.float64), 1e-6, None) for x in (true, found))
    return float(stats.entropy(p, q, axis=1).mean())


def mean_interval(values: np.ndarray | Sequence[float]) -> Interval:
    """Student's interval of a mean of what is finite: of one value infinite, of none nan."""
    x = np.asarray(values, np.float64)
    x = x[np.isfinite(x)]
    if not len(x):
        return Interval(math.nan, math.nan, math.nan, 0)
    half = float(stats.t.ppf(0.975, len(x) - 1) * stats.sem(x)) if len(x) > 1 else math.inf
    mean = float(x.mean())
    return Interval(mean, mean - half, mean + half, len(x))


def jackknife(whole: float, without: Sequence[float]) -> Interval:
    """What a distance would be with endless samples, from groups of samples that are independent.

    The mean of n · whole − (n − 1) · without, with Student's interval of it: where a straight line
    in 1 / n ends. `whole` is the distance of all groups together, `without` that of all but one,
    for each group; nan with fewer than two groups.

    Source: Efron & Tibshirani, An Introduction to the Bootstrap, 1993, chapter 11.
    """
    n = len(without)
    return mean_interval([n * whole - (n - 1) * each for each in without] if n > 1 else [])


def slope(times_s: np.ndarray, values: Float[np.ndarray, "stream time"]) -> Interval:
    """Change per second, with its 95 % interval: a least-squares line per stream.

    With several streams the interval is Student's over their slopes, so nothing is assumed about
    the noise within a stream; of a single one it is the regression's (independent residuals).

    Raises:
        LmdError: fewer than three times, or shapes that do not fit.
    """
    t, y = np.asarray(times_s, np.float64), np.asarray(values, np.float64)
    if y.ndim != 2 or y.shape[1] != len(t) or len(t) < 3:
        found = f"values {y.shape} at {len(t)} times"
        raise LmdError(found, "[stream, time], at least 3 times", "Run longer.")
    lines = [stats.linregress(t, row) for row in y]
    if len(y) > 1:
        return mean_interval([line.slope for line in lines])
    half = float(stats.t.ppf(0.975, len(t) - 2) * lines[0].stderr)
    mean = float(lines[0].slope)
    return Interval(mean, mean - half, mean + half, 1)


def flux(wave: Mono, sample_rate: int) -> Float[Tensor, " step"]:
    """Mean rise of 40 mel bands in dB from one step of 256 samples to the next, 80 dB deep."""
    level = 10 * torch.log10(mel_matrix(513, sample_rate, 40).T @ power(wave, 1024, 256) + 1e-12)
    level = level.clamp_min(float(level.max()) - 80)
    return torch.nn.functional.pad((level[:, 1:] - level[:, :-1]).clamp_min(0).mean(0), (1, 0))


def boundary_ratio(wave: Mono, boundaries: Sequence[int], sample_rate: int) -> float:
    """Spectral flux around block boundaries over that everywhere else; 1 = they are not heard.

    Around = steps whose window of 1024 samples reaches the boundary. nan where nothing moves.
    """
    rise = flux(wave, sample_rate)
    gaps = torch.arange(len(rise))[:, None] * 256 - torch.tensor(boundaries)
    near = (gaps.abs() <= 512 + 256).any(1)
    if not near.any() or near.all() or not float(rise[~near].mean()) > 0:
        return math.nan
    return float(rise[near].mean() / rise[~near].mean())


def click_ratio(wave: Mono, boundaries: Sequence[int], reach: int = 64) -> float:
    """Peak second difference within `reach` samples of a boundary over that of other stretches.

    Medians of both. A click is a jump that lasts a sample: it shows in the second difference long
    before it shows in the spectrum. nan where nothing moves.
    """
    bend = torch.nn.functional.pad((wave[2:] - 2 * wave[1:-1] + wave[:-2]).abs(), (1, 1))
    stretches = bend[: len(bend) // (2 * reach) * 2 * reach].reshape(-1, 2 * reach).amax(1)
    peaks = [bend[max(0, place - reach) : place + reach].max() for place in boundaries]
    elsewhere = float(stretches.median())
    return float(torch.stack(peaks).median()) / elsewhere if peaks and elsewhere else math.nan
