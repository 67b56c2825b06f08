"""Given audio that a stream goes on from: as it comes from files and libraries, made one kind."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from lmd.codec.base import Codec
from lmd.errors import LmdError
from lmd.shapes import Wave

FULL_SCALE = {torch.int16: 2**15, torch.int32: 2**31}
LOUDEST = 10  # times full scale, 20 dB over: integers made float, not music
FADE_S = 0.02


def as_wave(audio: Tensor | np.ndarray | Sequence[Any], codec: Codec, device: torch.device) -> Wave:
    """Audio as the codec takes it: float32 within about -1 ... 1 on that device.

    Args:
        audio: `[batch, channel, sample]`, `[channel, sample]` or, for a mono codec, `[sample]`;
            floats, or int16 or int32, which are scaled; a tensor, an array or lists.
        codec: which will encode it.
        device: where to.

    Raises:
        LmdError: audio of another kind or shape, shorter than a frame, or not finite.
    """
    try:
        wave = audio if isinstance(audio, Tensor) else torch.as_tensor(_native(audio))
    except (TypeError, ValueError, RuntimeError) as error:
        raise LmdError(f"no audio ({error})", "a tensor or an array", "Give one.") from error
    found = f"audio of shape {tuple(wave.shape)}"
    if not wave.is_floating_point() and wave.dtype not in FULL_SCALE:
        kinds = "floats within -1 ... 1, int16 or int32"
        raise LmdError(f"audio of {wave.dtype}", kinds, "Convert it.")
    if wave.ndim == 1:
        wave = wave[None]
    if wave.ndim == 2:
        wave = wave[None]
    if wave.ndim != 3 or not len(wave) or wave.shape[1] != codec.channels:
        raise LmdError(
            found,
            f"[batch, {codec.channels}, sample] or [{codec.channels}, sample]",
            "Mix it to that many channels; transpose [sample, channel].",
        )
    if wave.shape[-1] < codec.samples_per_frame:
        raise LmdError(found, f"at least {codec.samples_per_frame} samples", "Give longer audio.")
    wave = wave.detach().to(device, torch.float32) / FULL_SCALE.get(wave.dtype, 1)
    if not torch.isfinite(wave.masked_fill(wave.abs() > LOUDEST, torch.inf)).all():
        raise LmdError(
            f"{found} with NaN, infinity or more than {LOUDEST} times full scale",
            "finite samples within -1 ... 1",
            "Clean or scale the audio.",
        )
    return wave


def past_the_end(wave: Wave, sample_rate: int) -> Float[Tensor, "batch channel faded"]:
    """What fades out while a stream begins: the end of the given audio, played backwards.

    It begins with the sample that was heard last, so there is no step, whatever phases the codec
    gives to its own continuation.
    """
    return wave[..., -round(FADE_S * sample_rate) :].flip(-1)


def _native(audio: np.ndarray | Sequence[Any]) -> np.ndarray:
    """An array in this machine's order of bytes, contiguous."""
    array = np.asarray(audio)
    return np.ascontiguousarray(array, dtype=array.dtype.newbyteorder("="))
