"""Whether a codec suits some music: its format, and how much of the sound it keeps."""

import warnings
from pathlib import Path

import numpy as np
import torch
import torchaudio
from torch import Tensor

from lmd.codec.base import Codec
from lmd.corpus.manifest import Corpus
from lmd.errors import LmdError

CHECKED_WINDOWS, CHECKED_S = 4, 5.0  # what a codec is measured on before it encodes
GOOD_DB, POOR_DB = 1.5, 2.0  # the shipped codec on music of its own kind; audibly worse


def check_fit(codec: Codec, corpus: Corpus) -> None:
    """Refuse a codec for another sample rate or another number of channels.

    Raises:
        LmdError: they differ.
    """
    found = (corpus.sample_rate, corpus.channels)
    wanted = (codec.sample_rate, codec.channels)
    if found != wanted:
        raise LmdError(
            "a corpus at {} Hz with {} channels".format(*found),
            "{} Hz with {} channels, as the codec takes".format(*wanted),
            "Build it with --sample-rate {} --channels {}.".format(*wanted),
        )


@torch.inference_mode()
def codec_error_db(codec: Codec, corpus: Corpus) -> float:
    """How far some of a corpus is from itself after the codec: mean over 80 mel bands, decibels.

    Args:
        codec: what encodes, on the CPU.
        corpus: windows from the middle of some sounds are taken.
    """
    mel, hop, errors = _mel_bands(codec.sample_rate), codec.samples_per_frame, []
    for index in np.linspace(0, len(corpus) - 1, min(CHECKED_WINDOWS, len(corpus))).astype(int):
        n_samples = corpus.rows[index].n_samples
        n = min(n_samples, round(CHECKED_S * codec.sample_rate)) // hop * hop
        wave = torch.from_numpy(corpus.wave(index, (n_samples - n) // 2, n))[None]
        output = codec.decode(codec.encode(wave))
        true, found = (_levels_db(w.mean(1)[0], mel) for w in (wave, output))
        floor = true.max() - 60
        errors.append(float((true.clamp_min(floor) - found.clamp_min(floor)).abs().mean()))
    return float(np.mean(errors))


def _levels_db(wave: Tensor, mel: Tensor) -> Tensor:
    """Levels of mel bands `[band, step]`, a full-scale sine at 0 dB."""
    window = torch.hann_window(2048)
    spectrum = torch.stft(wave, 2048, 512, window=window, return_complex=True)
    return 10 * torch.log10(mel @ (spectrum.abs().square() * (2 / window.sum()) ** 2) + 1e-12)


def _mel_bands(sample_rate: int) -> Tensor:
    """80 of Slaney's mel bands from 30 Hz up `[band, bin]`; those between two bins are left out."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        bands = torchaudio.functional.melscale_fbanks(
            1025, 30.0, sample_rate / 2, 80, sample_rate, mel_scale="slaney"
        )
    bands = bands[:, bands.any(0)]
    return (bands / bands.sum(0)).T


def expectation(error_db: float, corpus: Path) -> str:
    """What an error of the codec means, and what to do about it."""
    line = f"this codec on this music: {error_db:.2f} dB of log-mel error"
    if error_db < POOR_DB:
        return f"{line}; {GOOD_DB:g} is what the shipped one has on music of its own kind"
    return (
        f"{line}, {error_db / GOOD_DB:.1f} times that of the shipped one on music of its own kind. "
        "Expect dull or rough sound, whatever is trained on these latents. A codec for this music: "
        f"python -m lmd train codec --data {corpus}; then encode with --codec and that one."
    )
