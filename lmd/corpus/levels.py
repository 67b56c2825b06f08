"""Loudness and peaks: everything enters the corpus equally loud and below full scale."""

import math

import numpy as np
from scipy.ndimage import minimum_filter1d, uniform_filter1d
from scipy.signal import lfilter

TARGET_LUFS = -20.0  # ITU-R BS.1770, over the whole file
CEILING = 0.95  # highest sample value after the limiter
_LOOKAHEAD_S = 0.005


def loudness_lufs(wave: np.ndarray, sample_rate: int) -> float:
    """Integrated loudness of `[channel, sample]` in LUFS; -inf for silence.

    K-weighting, blocks of 0.4 s every 0.1 s, gates at -70 LUFS and 10 LU under the mean.
    torchaudio's `loudness` computes the same, but clips its filters' output to ±1 (0.6 dB wrong on
    a loud piano) and takes five times as long; a test compares the two where it does not clip.

    Source: ITU-R BS.1770-4.
    """
    return gated_lufs(block_powers(wave, sample_rate))


def block_powers(wave: np.ndarray, sample_rate: int) -> np.ndarray:
    """K-weighted power of each block of 0.4 s, every 0.1 s, of `[channel, sample]`: `[block]`."""
    step, n = round(0.1 * sample_rate), wave.shape[-1]
    if n < 4 * step:
        return np.zeros(0)
    power = np.zeros(n // step)
    for channel in wave:
        weighted = lfilter(*_high_pass(sample_rate), lfilter(*_shelf(sample_rate), channel))
        squares = np.square(weighted[: n // step * step]).reshape(-1, step)
        power += squares.mean(axis=1)
    return np.convolve(power, np.full(4, 0.25), mode="valid")


def gated_lufs(blocks: np.ndarray) -> float:
    """Loudness of all blocks of a sound `[block]` in LUFS; -inf if none passes the gate."""
    blocks = blocks[_lufs(blocks) > -70]
    if not len(blocks):
        return -math.inf
    blocks = blocks[_lufs(blocks) > _lufs(blocks.mean()) - 10]
    return float(_lufs(blocks.mean()))


def _lufs(power: np.ndarray) -> np.ndarray:
    """K-weighted power as loudness."""
    return -0.691 + 10 * np.log10(np.maximum(power, 1e-12))


def _shelf(sample_rate: int) -> tuple[list[float], list[float]]:
    """The head's +4 dB shelf from 1.5 kHz up, as biquad coefficients (b, a)."""
    a, w = 10 ** (4.0 / 40), 2 * math.pi * 1500.0 / sample_rate
    alpha, cos, root = math.sin(w) / 2 * math.sqrt(2.0), math.cos(w), math.sqrt(a)
    b = [(a + 1) + (a - 1) * cos + 2 * root * alpha, -2 * ((a - 1) + (a + 1) * cos)]
    b.append((a + 1) + (a - 1) * cos - 2 * root * alpha)
    d = [(a + 1) - (a - 1) * cos + 2 * root * alpha, 2 * ((a - 1) - (a + 1) * cos)]
    d.append((a + 1) - (a - 1) * cos - 2 * root * alpha)
    return [a * value for value in b], d


def _high_pass(sample_rate: int) -> tuple[list[float], list[float]]:
    """The 38 Hz high-pass (Q = 1/2), as biquad coefficients (b, a)."""
    w = 2 * math.pi * 38.0 / sample_rate
    alpha, cos = math.sin(w), math.cos(w)
    return [(1 + cos) / 2, -(1 + cos), (1 + cos) / 2], [1 + alpha, -2 * cos, 1 - alpha]


def gain_of(value_lufs: float) -> float:
    """The factor from a loudness to the target; 1 for silence."""
    return float(10 ** ((TARGET_LUFS - value_lufs) / 20)) if math.isfinite(value_lufs) else 1.0


def limit(wave: np.ndarray, sample_rate: int, ceiling: float = CEILING) -> np.ndarray:
    """Turn peaks down to the ceiling, smoothly, 5 ms before and after; the rest is untouched.

    The wave is float32 `[channel, sample]`, the ceiling the highest absolute value that is left.
    """
    peak = np.abs(wave).max(axis=0)
    if not peak.size or peak.max() <= ceiling:
        return wave.copy()
    width = 2 * max(1, round(_LOOKAHEAD_S * sample_rate)) + 1
    gain = np.minimum(1.0, ceiling / np.maximum(peak, 1e-9))
    gain = uniform_filter1d(minimum_filter1d(gain, width), width)  # mean of minima <= each gain
    return np.clip(wave * gain.astype(np.float32), -ceiling, ceiling)
