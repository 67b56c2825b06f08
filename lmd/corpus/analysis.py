"""What is measured of a rendition: key and mode, density, brightness."""

import numpy as np

PITCH_NAMES = ("C", "D♭", "D", "E♭", "E", "F", "F♯", "G", "A♭", "A", "B♭", "B")
MODES = ("major", "minor")
# Probe-tone ratings of the scale degrees: Krumhansl & Kessler, Psychological Review 89, 1982.
_MAJOR = np.array([6.35, 2.23, 3.48, 2.33, 4.38, 4.09, 2.52, 5.19, 2.39, 3.66, 2.29, 2.88])
_MINOR = np.array([6.33, 2.68, 3.52, 5.38, 2.60, 3.53, 2.54, 4.75, 3.98, 2.69, 3.34, 3.17])


def find_key(pitches: np.ndarray, durations: np.ndarray) -> tuple[str, str]:
    """Tonic and mode whose profile fits MIDI `pitches` and `durations` best, both `[note]`."""
    weights = np.bincount(pitches.astype(int) % 12, weights=durations, minlength=12)
    strengths = key_strengths(weights)
    best = max(
        (float(strengths[row, tonic]), -tonic, mode)
        for row, mode in enumerate(MODES)
        for tonic in range(12)
    )
    return PITCH_NAMES[-best[1]], best[2]


def key_strengths(weights: np.ndarray) -> np.ndarray:
    """Correlation of pitch-class weights `[12]` with the profile of every key.

    Returns:
        `[2, 12]`: major and minor on every tonic, C first; zeros if all weights are equal.
    """
    if not np.ptp(weights) > 0:
        return np.zeros((2, 12))
    return np.array(
        [
            [np.corrcoef(np.roll(profile, tonic), weights)[0, 1] for tonic in range(12)]
            for profile in (_MAJOR, _MINOR)
        ]
    )


def onset_density(onsets_s: np.ndarray, duration_s: float) -> float:
    """Distinct onsets a second; notes within 50 ms of each other count once."""
    ordered = np.sort(onsets_s)
    n_distinct = 1 + int((np.diff(ordered) > 0.05).sum()) if len(ordered) else 0
    return n_distinct / duration_s


def brightness_hz(wave: np.ndarray, sample_rate: int) -> float:
    """Spectral centroid of `[channel, sample]` in Hz: the mean frequency by magnitude."""
    size = 2048
    mono = wave.mean(axis=0)
    frames = mono[: len(mono) // size * size].reshape(-1, size)[::4]
    if not len(frames):
        return 0.0
    magnitude = np.abs(np.fft.rfft(frames * np.hanning(size).astype(np.float32), axis=1))
    energy = (magnitude**2).sum(axis=0, dtype=np.float64)
    amplitude = magnitude.sum(axis=0, dtype=np.float64)
    if not energy.sum() > 0:
        return 0.0
    return float((np.fft.rfftfreq(size, 1 / sample_rate) * amplitude).sum() / amplitude.sum())
