"""Measures of music: how far from the real, how it drifts, where blocks meet, is it tonal?

Pure functions over embeddings, probabilities and waves. Taught in notebook 05_evaluate.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float
from scipy import stats
from torch import Tensor

from lmd.corpus.analysis import MODES, PITCH_NAMES, key_strengths
from lmd.data.codec_fit import Mono, mel_matrix, power
from lmd.errors import LmdError

Embeddings = Float[np.ndarray, "sample size"]
Probabilities = Float[np.ndarray, "clip label"]
Chroma = Float[Tensor, "12 step"]
TOLERANCE = 1e-6  # of negative eigenvalues, relative to the largest
N_FFT = 4096  # of pitches
LOW_HZ, HIGH_HZ = 80.0, 2000.0
PEAK_DB, FRAME_DB = 30.0, 50.0  # under the frame's highest peak; under the loudest frame
SCALES = {"major": (0, 2, 4, 5, 7, 9, 11), "minor": (0, 2, 3, 5, 7, 8, 11)}  # harmonic minor
CONSONANT = (3, 4, 5)  # interval classes: thirds and sixths, fourths and fifths


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
    """Fit mean and covariance (divided by n − 1) in float64 to two or more finite embeddings."""
    x = np.asarray(embeddings, dtype=np.float64)
    if len(x) < 2 or not np.isfinite(x).all():
        found = f"{len(x)} embeddings, {int((~np.isfinite(x)).sum())} values not finite"
        todo = "Generate more, or look for NaN in the audio."
        raise LmdError(found, "at least 2, all finite", todo)
    return Gaussian(x.mean(0), np.atleast_2d(np.cov(x, rowvar=False)))


def frechet(a: Gaussian, b: Gaussian) -> float:
    """Fréchet distance of two Gaussians, |μa − μb|² + tr(A + B − 2 (A B)^½), a squared distance.

    The trace of the root is taken from the eigenvalues of A^½ B A^½, which is symmetric. What is
    no covariance (not symmetric, negative by more than rounding) is refused.
    """
    for covariance in (a.covariance, b.covariance):
        lowest, found = np.linalg.eigvalsh(covariance)[0], ""
        if not np.allclose(covariance, covariance.T, rtol=1e-9, atol=1e-12):
            found = "a covariance that is not symmetric"
        elif lowest < -TOLERANCE * abs(np.trace(covariance)):
            found = f"a covariance with the eigenvalue {lowest:.3g}"
        if found:
            raise LmdError(found, "symmetric, none below zero", "Fit it with gaussian().")
    values, vectors = np.linalg.eigh(a.covariance)
    root = (vectors * np.sqrt(values.clip(0))) @ vectors.T
    shared = np.sqrt(np.linalg.eigvalsh(root @ b.covariance @ root).clip(0))
    gap = a.mean - b.mean
    trace = np.trace(a.covariance) + np.trace(b.covariance) - 2 * shared.sum()
    return float(gap @ gap + max(trace, 0.0))


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

    The interval is Student's over the streams' slopes, so nothing is assumed about the noise within
    a stream. Fewer than three times, or shapes that do not fit, are refused.
    """
    t, y = np.asarray(times_s, np.float64), np.asarray(values, np.float64)
    if y.ndim != 2 or y.shape[1] != len(t) or len(t) < 3:
        found = f"values {y.shape} at {len(t)} times"
        raise LmdError(found, "[stream, time], at least 3 times", "Run longer.")
    offset = t - t.mean()
    return mean_interval(y @ offset / (offset @ offset))


def boundary_ratio(wave: Mono, boundaries: Sequence[int], sample_rate: int) -> float:
    """Spectral flux around block boundaries over that everywhere else; 1 = they are not heard.

    Flux is the mean rise of 40 mel bands, 80 dB deep, from one step of 256 samples to the next.
    Around = steps whose window of 1024 samples reaches the boundary. nan where nothing moves.
    """
    level = 10 * torch.log10(mel_matrix(513, sample_rate, 40).T @ power(wave, 1024, 256) + 1e-12)
    level = level.clamp_min(float(level.max()) - 80)
    rise = torch.nn.functional.pad((level[:, 1:] - level[:, :-1]).clamp_min(0).mean(0), (1, 0))
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


@dataclass(frozen=True)
class Tonality:
    """What the pitch classes of a piece have to do with each other.

    Measured in sound, where overtones count as pitches: read each against that of held-out music.
    """

    key: str  # e.g. "A minor": the best of 24 by correlation with probe-tone profiles
    key_clarity: float  # that correlation, at most 1
    key_share: float  # of the pitch-class amplitude in that key's seven notes (noise: 7/12)
    # of all pairs of pitch classes that sound at once, weighted by both amplitudes: the share at a
    # third, fourth, fifth or sixth (noise: 6/11); nan where no two sound together
    consonance: float
    classes_at_once: float  # mean over sounding frames of exp(entropy)


def peak_chroma(wave: Mono, sample_rate: int) -> Chroma:
    """Amplitude of the spectral peaks per pitch class (C = 0), frames of 4096 every 2048 samples.

    A peak is a bin above both neighbours; its frequency is the vertex of the parabola through the
    three levels. Peaks from 80 to 2,000 Hz and at most 30 dB under the frame's highest count;
    frames more than 50 dB under the loudest are silent.
    """
    level = power(wave, N_FFT, N_FFT // 2).clamp_min(1e-20).log()
    left, middle, right = level[:-2], level[1:-1], level[2:]
    bend = (left - 2 * middle + right).clamp_max(-1e-9)
    shift = (0.5 * (left - right) / bend).clamp(-0.5, 0.5)
    bins = torch.arange(1, len(level) - 1)[:, None] + shift
    hz = bins * sample_rate / N_FFT
    top = middle.amax(0)
    decibel = np.log(10) / 10
    is_peak = (middle > left) & (middle >= right) & (hz >= LOW_HZ) & (hz <= HIGH_HZ)
    is_peak &= (middle > top - PEAK_DB * decibel) & (top > top.max() - FRAME_DB * decibel)
    is_peak &= middle > np.log(1e-10)  # digital silence has no pitch
    classes = (torch.round(69 + 12 * torch.log2(hz.clamp_min(1) / 440)).long()) % 12
    step = torch.arange(level.shape[1]).expand_as(classes)
    where = (classes[is_peak], step[is_peak])
    chroma = torch.zeros(12, level.shape[1])
    return chroma.index_put_(where, (middle[is_peak] / 2).exp(), accumulate=True)


def tonality(chroma: Chroma) -> Tonality | None:
    """The measures of a piece; None if nothing sounds."""
    profile = chroma.sum(1).double().numpy()
    if not profile.sum() > 0:
        return None
    strengths = key_strengths(profile)
    row, tonic = np.unravel_index(int(strengths.argmax()), strengths.shape)
    scale = [(tonic + degree) % 12 for degree in SCALES[MODES[row]]]
    together = (chroma.double() @ chroma.double().T).fill_diagonal_(0)
    distance = (torch.arange(12)[:, None] - torch.arange(12)).abs()
    is_consonant = torch.isin(torch.minimum(distance, 12 - distance), torch.tensor(CONSONANT))
    loud = chroma[:, chroma.sum(0) > 0]
    share = loud / loud.sum(0)
    return Tonality(
        key=f"{PITCH_NAMES[tonic]} {MODES[row]}",
        key_clarity=float(strengths[row, tonic]),
        key_share=float(profile[scale].sum() / profile.sum()),
        consonance=float(together[is_consonant].sum() / together.sum()),  # 0 / 0 is nan
        classes_at_once=float(torch.exp(-torch.xlogy(share, share).sum(0)).mean()),
    )
