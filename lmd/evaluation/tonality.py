"""Is it tonal? Pitch classes from spectral peaks, and how well they fit a key and each other.

These are measures of sound, not of a score: overtones count as pitches (the third partial of every
note is its fifth), so no value means much alone. Each is read against that of held-out music.
"""

from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from lmd.corpus.analysis import MODES, PITCH_NAMES, key_strengths
from lmd.training.codec.metrics import Mono, power

N_FFT = 4096
LOW_HZ, HIGH_HZ = 80.0, 2000.0
PEAK_DB, FRAME_DB = 30.0, 50.0  # under the frame's highest peak; under the loudest frame
SCALES = {"major": (0, 2, 4, 5, 7, 9, 11), "minor": (0, 2, 3, 5, 7, 8, 11)}  # harmonic minor
CONSONANT = (3, 4, 5)  # interval classes: thirds and sixths, fourths and fifths

Chroma = Float[Tensor, "12 step"]


@dataclass(frozen=True)
class Tonality:
    """What the pitch classes of a piece have to do with each other."""

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
