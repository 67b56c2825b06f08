"""Pictures and sounds for notebooks.

Every function takes plain arrays or tensors and returns what it drew on, so that a notebook can
title, save or extend it.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import torch
from IPython.display import Audio
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor

from lmd.errors import LmdError

Samples = Tensor | np.ndarray
RANGE_DB = 80.0  # of a spectrogram, under its loudest bin


def _array(values: Samples) -> np.ndarray:
    """Plain numbers, without a batch dimension of one."""
    array = values.detach().cpu().float().numpy() if isinstance(values, Tensor) else values
    array = np.asarray(array)
    return array[0] if array.ndim == 3 and len(array) == 1 else array


def _channels(wave: Samples) -> np.ndarray:
    """A wave of shape [sample], [channel, sample] or [1, channel, sample] as [channel, sample]."""
    array = np.atleast_2d(_array(wave))
    if array.ndim != 2 or array.shape[0] > array.shape[1] or not array.size:
        raise LmdError(
            f"a wave of shape {tuple(np.shape(wave))}",
            "[sample], [channel, sample] or [1, channel, sample], not empty",
            "Pick one item of the batch.",
        )
    return array


def play(wave: Samples, sample_rate: int) -> Audio:
    """A player for a notebook cell; loudness is left as it is (samples are clipped to −1…1)."""
    return Audio(np.clip(_channels(wave), -1, 1), rate=sample_rate, normalize=False)


def specplot(wave: Samples, sample_rate: int, ax: Axes | None = None) -> Axes:
    """Draw a spectrogram: seconds, hertz from 40 on a logarithmic scale, 80 dB; mono mix."""
    ax = plt.subplots(figsize=(9, 2.6), layout="constrained")[1] if ax is None else ax
    n_fft, hop = 1024, 256
    mono, window = torch.from_numpy(_channels(wave).mean(axis=0)), torch.hann_window(n_fft)
    stft = torch.stft(mono, n_fft, hop, window=window, return_complex=True, pad_mode="constant")
    level_db = 20 * stft.abs().clamp_min(1e-12).log10().numpy()
    times_s = np.arange(level_db.shape[1]) * hop / sample_rate
    freqs_hz = np.fft.rfftfreq(n_fft, 1 / sample_rate)
    peak_db = max(level_db.max(), -180)
    look = {"cmap": "magma", "vmin": peak_db - RANGE_DB, "vmax": peak_db}
    ax.pcolormesh(times_s, freqs_hz, level_db, shading="nearest", rasterized=True, **look)
    ax.set(yscale="log", ylim=(40, sample_rate / 2), xlabel="seconds", ylabel="Hz")
    return ax


def plot_losses(
    losses: Mapping[str, Sequence[float]], ax: Axes | None = None, smooth: int = 1
) -> Axes:
    """Draw named loss curves over steps; `smooth` > 1 adds a moving average of that many steps."""
    ax = plt.subplots(figsize=(7, 2.8), layout="constrained")[1] if ax is None else ax
    for name, values in losses.items():
        curve = np.asarray(values, dtype=float)
        faint = smooth > 1 and curve.size >= smooth
        (line,) = ax.plot(curve, alpha=0.25 if faint else 1.0, label=None if faint else name)
        if faint:
            mean = np.convolve(curve, np.ones(smooth) / smooth, mode="valid")
            steps = np.arange(smooth - 1, curve.size)
            ax.plot(steps, mean, color=line.get_color(), label=name)
    ax.set(xlabel="step", ylabel="loss")
    ax.legend(frameon=False)
    return ax


def plot_masks(masks: Mapping[str, Any], height: float = 2.8) -> Figure:
    """Draw masks `[query, key]` side by side: dark = the query sees the key."""
    figure, axes = plt.subplots(
        1, len(masks), figsize=(height * len(masks), height), squeeze=False, layout="constrained"
    )
    for ax, (name, mask) in zip(axes[0], masks.items(), strict=True):
        ax.imshow(np.asarray(mask, dtype=float), cmap="Greys", vmin=0, vmax=1, aspect="equal")
        ax.set(title=name, xlabel="key", ylabel="query")
    return figure


def piano_roll(notes: np.ndarray, voices: Sequence[str] = (), ax: Axes | None = None) -> Axes:
    """Draw notes as bars over seconds and MIDI pitch, one colour per voice.

    Args:
        notes: rows (onset_s, gate_s, pitch, voice, …), as `note_times` gives them.
        voices: their names, for the legend.
        ax: where to draw; None = a new figure.
    """
    ax = plt.subplots(figsize=(9, 3), layout="constrained")[1] if ax is None else ax
    for voice in sorted({int(v) for v in notes[:, 3]}):
        rows = notes[notes[:, 3] == voice]
        name = voices[voice] if voice < len(voices) else f"voice {voice + 1}"
        ax.barh(rows[:, 2], rows[:, 1], 0.8, rows[:, 0], color=f"C{voice}", label=name)
    ax.set(xlabel="seconds", ylabel="MIDI pitch")
    ax.legend(frameon=False, ncols=4, fontsize="small")
    return ax


def latentplot(latents: Samples, frame_rate_hz: float, ax: Axes | None = None) -> Axes:
    """Draw latents `[latent, frame]` or `[1, latent, frame]` as an image over seconds."""
    ax = plt.subplots(figsize=(9, 2.6), layout="constrained")[1] if ax is None else ax
    array = _array(latents)
    span = (0, array.shape[-1] / frame_rate_hz, 0, array.shape[0])
    ax.imshow(
        array, aspect="auto", origin="lower", extent=span, cmap="RdBu_r", vmin=-3, vmax=3,
        interpolation="nearest",
    )  # fmt: skip
    ax.set(xlabel="seconds", ylabel="latent")
    return ax
