"""Whether a codec suits some music: its format, and how much of the sound it keeps."""

import warnings
from pathlib import Path

import numpy as np
import torch
import torchaudio
from jaxtyping import Float
from torch import Tensor

from lmd.codec.base import Codec
from lmd.corpus.manifest import Corpus
from lmd.errors import LmdError

Mono = Float[Tensor, " sample"]
PEAK_DB = 60.0  # what lies further under the peak is not compared
CHECKED_WINDOWS, CHECKED_S = 4, 5.0  # what a codec is measured on before it encodes
GOOD_DB, POOR_DB = 1.5, 2.0  # the shipped codec on music of its own kind; audibly worse


def check_fit(codec: Codec, corpus: Corpus) -> None:
    """Refuse a codec for another sample rate or another number of channels.

    Raises:
        LmdError: they differ.
    """
    rate, channels = codec.sample_rate, codec.channels
    if (corpus.sample_rate, corpus.channels) != (rate, channels):
        found = f"a corpus at {corpus.sample_rate} Hz with {corpus.channels} channels"
        todo = f"Build it with --sample-rate {rate} --channels {channels}."
        raise LmdError(found, f"{rate} Hz with {channels} channels, as the codec takes", todo)


@torch.inference_mode()
def codec_error_db(codec: Codec, corpus: Corpus) -> float:
    """How far the middle of some sounds is from itself after the codec (on the CPU), decibels."""
    hop, errors = codec.samples_per_frame, []
    for index in np.linspace(0, len(corpus) - 1, min(CHECKED_WINDOWS, len(corpus))).astype(int):
        n_samples = corpus.rows[index].n_samples
        n = min(n_samples, round(CHECKED_S * codec.sample_rate)) // hop * hop
        wave = torch.from_numpy(corpus.wave(index, (n_samples - n) // 2, n))[None]
        output = codec.decode(codec.encode(wave))
        errors.append(log_mel_db(output.mean(1)[0], wave.mean(1)[0], codec.sample_rate))
    return float(np.mean(errors))


def mel_matrix(
    n_bins: int, sample_rate: int, n_mels: int = 80, low_hz: float = 30.0
) -> Float[Tensor, "bin mel"]:
    """Slaney's mel bands with weights that sum to 1, so that a band is an average power.

    Bands narrower than a bin would be empty; each takes its nearest bin instead.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # empty bands are filled below
        bands = torchaudio.functional.melscale_fbanks(
            n_bins, low_hz, sample_rate / 2, n_mels, sample_rate, mel_scale="slaney"
        )
    empty = (bands.sum(0) == 0).nonzero()[:, 0].tolist()
    for band in empty:
        left = next((i for i in range(band, -1, -1) if bands[:, i].any()), None)
        centre = int(bands[:, left].argmax()) if left is not None else 0
        bands[centre, band] = 1.0
    return bands / bands.sum(0)


def power(wave: Mono, n_fft: int, hop: int) -> Float[Tensor, "bin step"]:
    """Power spectrogram with a Hann window, a full-scale sine at 1."""
    window = torch.hann_window(n_fft, dtype=wave.dtype)
    spectrum = torch.stft(wave, n_fft, hop, window=window, return_complex=True)
    return spectrum.abs().square() * (2 / window.sum()) ** 2


def log_mel_db(output: Mono, target: Mono, sample_rate: int) -> float:
    """Mean absolute difference of 80 mel bands in decibels, 60 dB deep."""
    mel = mel_matrix(1025, sample_rate).T
    found, true = (10 * torch.log10(mel @ power(w, 2048, 512) + 1e-12) for w in (output, target))
    floor = true.max() - PEAK_DB
    return float((found.clamp_min(floor) - true.clamp_min(floor)).abs().mean())


def expectation(error_db: float, corpus: Path) -> str:
    """What an error of the codec means, and what to do about it."""
    line = f"this codec on this music: {error_db:.2f} dB of log-mel error; the shipped one has "
    line += f"{GOOD_DB:g} on music of its own kind"
    if error_db < POOR_DB:
        return line
    return (
        f"{line}. Expect dull or rough sound, whatever is trained on these latents. Train a codec "
        f"for this music (lmd train codec --data {corpus}) and encode with --codec and that one."
    )
