"""Measures against closed forms: Gaussians, chords, lines with known slopes, planted clicks."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from lmd.corpus.analysis import find_key, key_strengths
from lmd.errors import LmdError
from lmd.evaluation.metrics import (
    Gaussian,
    boundary_ratio,
    click_ratio,
    frechet,
    gaussian,
    jackknife,
    kl_divergence,
    mean_interval,
    peak_chroma,
    slope,
    tonality,
    typicality,
)

RATE = 22_050
A440_CLASS = 9


def tones(*pitches: float, seconds: float = 2.0) -> torch.Tensor:
    """Sines of equal amplitude at MIDI pitches."""
    t = torch.arange(round(seconds * RATE)) / RATE
    waves = [torch.sin(2 * math.pi * 440 * 2 ** ((p - 69) / 12) * t) for p in pitches]
    return 0.1 * torch.stack(waves).sum(0)


def rotated(values: list[float], seed: int) -> np.ndarray:
    """A covariance with these eigenvalues in a random orientation."""
    q, _ = np.linalg.qr(np.random.default_rng(seed).normal(size=(len(values),) * 2))
    return (q * values) @ q.T


# --- Fréchet distance ---------------------------------------------------------------------------


@given(st.integers(1, 8), st.integers(0, 10_000))
@settings(max_examples=25, deadline=None)
def test_frechet_distance_of_commuting_gaussians_is_the_closed_form(size: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    a, b, gap = rng.uniform(0.1, 3, size), rng.uniform(0.1, 3, size), rng.normal(size=size)
    turn = np.linalg.qr(rng.normal(size=(size, size)))[0]
    first = Gaussian(np.zeros(size), (turn * a) @ turn.T)
    second = Gaussian(gap, (turn * b) @ turn.T)
    closed = gap @ gap + ((np.sqrt(a) - np.sqrt(b)) ** 2).sum()
    assert frechet(first, second) == pytest.approx(closed, rel=1e-9, abs=1e-12)


def test_frechet_distance_of_2x2_covariances_that_do_not_commute() -> None:
    """For 2 × 2: tr √M = √(tr M + 2 √det M), with M = A B."""
    a, b = rotated([2.0, 0.3], 1), rotated([1.0, 0.1], 2)
    product = a @ b
    root_trace = math.sqrt(np.trace(product) + 2 * math.sqrt(np.linalg.det(product)))
    closed = np.trace(a) + np.trace(b) - 2 * root_trace
    found = frechet(Gaussian(np.zeros(2), a), Gaussian(np.zeros(2), b))
    assert found == pytest.approx(closed, rel=1e-9)


def test_frechet_distance_is_symmetric_and_zero_to_itself_even_when_singular() -> None:
    x = np.random.default_rng(0).normal(size=(10, 32))  # rank 9 of 32
    y = np.random.default_rng(1).normal(size=(12, 32)) + 0.5
    a, b = gaussian(x), gaussian(y)
    assert frechet(a, b) == pytest.approx(frechet(b, a), rel=1e-6)
    assert frechet(a, a) == pytest.approx(0, abs=1e-6)  # measured 0.0
    assert frechet(a, b) > 1


def test_a_covariance_with_a_negative_eigenvalue_is_refused() -> None:
    bad = Gaussian(np.zeros(2), np.diag([1.0, -0.1]))
    good = Gaussian(np.zeros(2), np.eye(2))
    with pytest.raises(LmdError, match="eigenvalue"):
        frechet(bad, good)
    with pytest.raises(LmdError, match="eigenvalue"):
        frechet(good, bad)
    skew = Gaussian(np.zeros(2), np.array([[1.0, 0.5], [0.0, 1.0]]))
    with pytest.raises(LmdError, match="not symmetric"):
        frechet(skew, good)


def test_extrapolation_removes_the_bias_of_a_small_sample() -> None:
    """Samples of the reference itself: truth 0. The interval holds it about as often as it says."""
    size, truth = 16, Gaussian(np.zeros(16), np.eye(16))
    plain, extrapolated = [], []
    for seed in range(40):
        x = np.random.default_rng(seed).normal(size=(200, size))
        groups = range(0, 200, 25)
        without = [frechet(gaussian(np.delete(x, range(k, k + 25), 0)), truth) for k in groups]
        plain.append(frechet(gaussian(x), truth))
        extrapolated.append(jackknife(plain[-1], without))
    means = [found.mean for found in extrapolated]
    assert np.mean(plain) > 0.3
    assert abs(np.mean(means)) < 0.1 * np.mean(plain)
    assert np.mean([found.low <= 0 <= found.high for found in extrapolated]) > 0.8


def test_the_jackknife_is_a_line_to_endless_samples() -> None:
    """Of a + b / n exactly a, with no doubt; of one group nothing is known."""
    n, a, b = 8, 3.0, 40.0
    found = jackknife(a + b / n, [a + b / (n - 1)] * n)
    assert (found.mean, found.low, found.high) == pytest.approx((a, a, a))
    assert math.isnan(jackknife(5.0, [7.0]).mean)


def test_embeddings_that_are_not_finite_are_named() -> None:
    x = np.zeros((5, 3))
    x[2, 1] = np.nan
    with pytest.raises(LmdError, match="1 values not finite"):
        gaussian(x)


def test_typicality_is_one_for_real_music_and_grows_with_the_square_of_the_distance() -> None:
    covariance = rotated([4.0, 1.0, 0.2, 0.05], 3)
    real = Gaussian(np.ones(4), covariance)
    x = np.random.default_rng(0).multivariate_normal(np.ones(4), covariance, 20_000)
    assert typicality(x, real).mean() == pytest.approx(1, abs=0.03)  # measured 0.991
    direction = np.linalg.eigh(covariance)[1][:, -1]
    far = np.stack([np.ones(4) + k * direction for k in (1, 2)])
    near, twice = typicality(far, real)
    assert twice == pytest.approx(4 * near)
    assert near == pytest.approx(1 / 4.0 / 4, rel=0.01)  # 1/eigenvalue/size, but for λ


# --- probabilities, intervals, slopes -----------------------------------------------------------


def test_kl_divergence_of_coins() -> None:
    fair, biased = np.array([[0.5, 0.5]]), np.array([[0.9, 0.1]])
    assert kl_divergence(biased, biased) == pytest.approx(0)
    closed = 0.9 * math.log(0.9 / 0.5) + 0.1 * math.log(0.1 / 0.5)
    assert kl_divergence(biased, fair) == pytest.approx(closed)
    assert kl_divergence(np.array([[1.0, 0.0]]), np.array([[0.0, 1.0]])) == pytest.approx(
        math.log(1e6), rel=1e-3
    )


def test_interval_of_three_seeds_is_students() -> None:
    found = mean_interval([1.0, 2.0, 3.0])
    half = 4.302653 / math.sqrt(3)  # t(0.975, 2) from tables
    assert (found.mean, found.n) == (2.0, 3)
    assert found.high - found.mean == pytest.approx(half, rel=1e-6)
    assert not math.isfinite(mean_interval([1.0]).high)
    assert mean_interval([]).n == 0
    assert mean_interval([1.0, math.nan, 3.0]).n == 2


def test_slope_interval_covers_the_true_slope_19_times_in_20() -> None:
    rng, times, true = np.random.default_rng(0), np.arange(5.0, 305.0, 10.0), 0.02
    covered = 0
    for _ in range(1000):
        spread = rng.normal(0, 1, (5, 1))
        found = slope(times, spread + true * times + rng.normal(0, 2, (5, len(times))))
        covered += found.low <= true <= found.high
    assert 930 <= covered <= 968  # binomial(1000, 0.95) ± 2.6 sd; measured 949


def test_streams_that_wander_together_need_the_interval_between_streams() -> None:
    """Random walks: a regression would call 0 slopes significant; the interval over streams not."""
    rng, times = np.random.default_rng(1), np.arange(0.0, 300.0, 10.0)
    wrong_single = wrong_many = 0
    for _ in range(300):
        walks = rng.normal(size=(6, len(times))).cumsum(1)
        line = stats.linregress(times, walks[0])
        wrong_single += abs(line.slope) > stats.t.ppf(0.975, len(times) - 2) * line.stderr
        wrong_many += slope(times, walks).excludes_zero
    assert wrong_single > 150  # measured 239 of 300
    assert wrong_many < 30  # measured 15 of 300


def test_a_slope_wants_three_times() -> None:
    with pytest.raises(LmdError, match="at least 3 times"):
        slope(np.array([0.0, 1.0]), np.zeros((4, 2)))


# --- pitch, key, consonance ---------------------------------------------------------------------


@pytest.mark.parametrize("pitch", [45, 57, 60, 61.3, 69, 81, 93])
def test_chroma_of_a_pure_tone_is_one_pitch_class(pitch: float) -> None:
    chroma = peak_chroma(tones(pitch), RATE)[:, 2:-2].sum(1)
    assert int(chroma.argmax()) == round(pitch) % 12
    assert float(chroma.max() / chroma.sum()) > 0.999


def test_the_scale_of_a_key_lies_in_it_and_noise_does_not() -> None:
    melody = torch.cat([tones(p, p - 12, seconds=0.5) for p in (60, 62, 64, 65, 67, 69, 71, 72)])
    found = tonality(peak_chroma(melody, RATE))
    assert found.key == "C major"
    assert found.key_share > 0.98  # 0.990: a note that changes inside a frame blurs
    noise = torch.randn(20 * RATE, generator=torch.Generator().manual_seed(0)) * 0.1
    hiss = tonality(peak_chroma(noise, RATE))
    assert hiss.key_share == pytest.approx(7 / 12, abs=0.05)  # 0.60: the best of 24 keys
    assert hiss.consonance == pytest.approx(6 / 11, abs=0.02)
    assert hiss.key_clarity < found.key_clarity


def test_a_triad_is_consonant_and_a_cluster_is_not() -> None:
    triad, cluster = (tonality(peak_chroma(tones(*p), RATE)) for p in ((60, 64, 67), (60, 61, 62)))
    assert triad.consonance > 0.999
    assert cluster.consonance < 1e-3
    assert triad.classes_at_once == pytest.approx(3, abs=0.01)


def test_silence_has_no_tonality() -> None:
    assert tonality(peak_chroma(torch.zeros(RATE), RATE)) is None


def test_key_strengths_choose_the_key_that_find_key_names() -> None:
    pitches, lasting = np.array([60, 62, 64, 65, 67, 69, 71]), np.array([3.0, 1, 2, 1, 2, 1, 1])
    for shift, name in ((0, "C"), (7, "G"), (3, "E♭")):
        weights = np.bincount((pitches + shift) % 12, lasting, 12)
        row, tonic = np.unravel_index(key_strengths(weights).argmax(), (2, 12))
        assert find_key(pitches + shift, lasting) == (name, "major")
        assert (row, tonic) == (0, shift)
    assert not key_strengths(np.ones(12)).any()


# --- block boundaries ------------------------------------------------------------------------


def smooth_noise(seed: int) -> torch.Tensor:
    """20 s of noise under 1 kHz: it moves all the time and has no boundaries."""
    noise = torch.randn(20 * RATE, generator=torch.Generator().manual_seed(seed))
    spectrum = torch.fft.rfft(noise)
    spectrum[20 * 1000 :] = 0
    return 0.1 * torch.fft.irfft(spectrum, len(noise))


BOUNDARIES = [48 * 1024 * k for k in range(1, 9)]


def test_a_wave_without_block_boundaries_has_ratios_of_one() -> None:
    flux_ratios = [boundary_ratio(smooth_noise(s), BOUNDARIES, RATE) for s in range(5)]
    clicks = [click_ratio(smooth_noise(s), BOUNDARIES) for s in range(5)]
    assert np.mean(flux_ratios) == pytest.approx(1, abs=0.1)  # measured 0.99
    assert np.mean(clicks) == pytest.approx(1, abs=0.15)  # measured 1.00


def test_a_click_or_a_change_of_sound_at_the_boundaries_raises_the_ratios() -> None:
    wave = smooth_noise(0)
    clicked, switched = wave.clone(), wave.clone()
    for k, place in enumerate(BOUNDARIES):
        clicked[place] += 0.3
        if k % 2 == 0:
            switched[place : place + 48 * 1024] *= 0.05
    assert boundary_ratio(clicked, BOUNDARIES, RATE) > 5  # measured 14
    assert click_ratio(clicked, BOUNDARIES) > 50  # measured 276
    assert boundary_ratio(switched, BOUNDARIES, RATE) > 5  # measured 10
    elsewhere = [place + 20_000 for place in BOUNDARIES]
    assert (
        boundary_ratio(clicked, elsewhere, RATE) < 0.9
    )  # measured 0.70: the clicks are now elsewhere


def test_boundaries_of_silence_are_not_a_number() -> None:
    assert math.isnan(boundary_ratio(torch.zeros(2 * RATE), [RATE], RATE))
    assert math.isnan(click_ratio(torch.zeros(2 * RATE), [RATE]))
