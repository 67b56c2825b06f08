"""The border between waves and latents: what every codec offers, and how a stream is decoded.

The streamer and the notebooks know nothing of a codec but this protocol, so the spectral codec of
`small` and Stable Audio's autoencoder are interchangeable.
"""

import math
from dataclasses import dataclass
from typing import Any, Literal, Protocol, runtime_checkable

import torch
from torch import Tensor

from lmd.errors import LmdError
from lmd.shapes import BlockLatents, Latents, Wave

Boundary = Literal["exact", "fade"]


@runtime_checkable
class Codec(Protocol):
    """Waves to latents and back.

    A latent frame covers `samples_per_frame` samples. Samples of frames [a, b) depend on no latents
    outside [a - lookback_frames, b + lookahead_frames).
    """

    sample_rate: int  # Hz
    channels: int  # audio channels
    latent_dim: int
    samples_per_frame: int
    lookback_frames: int
    lookahead_frames: int

    def encode(self, wave: Wave) -> Latents:
        """Latents of a wave whose length is a whole number of frames; refuses any other."""
        ...

    def decode(self, latents: Latents) -> Wave:
        """The wave of some latents, `samples_per_frame` samples a frame; refuses what is none."""
        ...


@runtime_checkable
class StreamingCodec(Codec, Protocol):
    """A codec that can go on decoding without computing anything twice.

    The streaming state is a value: `None`, numbers, tensors, tuples and dataclasses of these.
    """

    def stream_start(self) -> Any:
        """The streaming state before the first latent."""
        ...

    def stream_decode(
        self, state: Any, latents: Latents, last: bool = False, guess: BlockLatents | None = None
    ) -> tuple[Wave, Any]:
        """Decode the next frames of a stream, exactly as one decode of the whole would.

        Args:
            state: what the previous call returned; `stream_start()` to begin.
            latents: the next ones.
            last: the stream ends behind them: return the rest of the samples, too.
            guess: what might follow: return the rest as if the stream ended behind it. The next
                state knows nothing of that.

        Returns:
            The samples that are certain now (`lookahead_frames` late), and the next state.
        """
        ...


@dataclass(frozen=True)
class DecodeState:
    """What a streamed decode carries from block to block; a value, never changed in place.

    Attributes:
        latents: the most recent latents, those still to be heard last.
        n_waiting: how many of them have not been emitted yet (the look-ahead of an exact boundary).
        overhang: samples guessed past the last block's end, to be faded out (fading boundary).
        running: the codec's own streaming state, where it has one.
    """

    latents: Latents | None = None
    n_waiting: int = 0
    overhang: Wave | None = None
    running: Any = None


def decode_block(
    codec: Codec, state: DecodeState, latents: Latents, boundary: Boundary, fade_s: float = 0.02
) -> tuple[Wave, DecodeState]:
    """Decode one more block of a stream.

    `exact`: the samples equal those of one decode of the whole stream; they come
    `codec.lookahead_frames` late, so the first wave is that much shorter than its block.
    `fade`: the block is handed out at once; its first `fade_s` seconds are cross-faded, with equal
    power, from what the previous decode guessed past its end.

    Args:
        codec: any codec.
        state: what the previous call returned; `DecodeState()` to begin.
        latents: the new block `[batch, latent, frame]`.
        boundary: how blocks are joined.
        fade_s: length of the cross-fade in seconds.

    Returns:
        The samples that can be heard now and the state for the next block.

    Raises:
        LmdError: an unknown boundary.
    """
    if boundary not in ("exact", "fade"):
        raise LmdError(f"boundary {boundary!r}", "'exact' or 'fade'", "Pick one of these.")
    hop, n_fade = codec.samples_per_frame, round(fade_s * codec.sample_rate)
    n_ready = state.n_waiting + latents.shape[-1]
    n_emit = max(0, n_ready - codec.lookahead_frames) if boundary == "exact" else n_ready
    past = latents[..., :0] if state.latents is None else state.latents
    joined = torch.cat([past, latents], dim=-1)
    n_guess = math.ceil(n_fade / hop) if boundary == "fade" else 0
    guess = joined[..., -1:].expand(*joined.shape[:-1], n_guess)
    overhang, running = state.overhang, None
    if isinstance(codec, StreamingCodec):
        running = state.running
        if running is None:  # a new one is fed the latents before it
            running = codec.stream_start()
            if past.shape[-1]:
                _, running = codec.stream_decode(running, past)
        decoded, running = codec.stream_decode(running, latents, guess=guess if n_guess else None)
        end = decoded.shape[-1] - n_guess * hop
    else:
        decoded = codec.decode(torch.cat([joined, guess], dim=-1))
        end = (past.shape[-1] - state.n_waiting + n_emit) * hop
    wave = decoded[..., end - n_emit * hop : end].clone()
    if n_emit:
        if overhang is not None:
            n = min(overhang.shape[-1], wave.shape[-1])
            fade_in, fade_out = equal_power_fade(n, wave)
            wave[..., :n] = wave[..., :n] * fade_in + overhang[..., :n] * fade_out
        overhang = decoded[..., end : end + n_fade].clone() if boundary == "fade" else None
    keep = min(joined.shape[-1], codec.lookback_frames + n_ready - n_emit)
    tail = joined[..., joined.shape[-1] - keep :].clone()
    return wave, DecodeState(tail, n_ready - n_emit, overhang, running)


def check_wave(codec: Codec, wave: Wave) -> None:
    """Refuse a wave of other channels, of no whole number of frames, or with samples that are none.

    Raises:
        LmdError: it is one of these.
    """
    channels, n = wave.shape[1:]
    if channels != codec.channels or n == 0 or n % codec.samples_per_frame:
        raise LmdError(
            f"a wave of {channels} channels and {n} samples",
            f"{codec.channels} channels and a multiple of {codec.samples_per_frame} samples",
            "Convert the channels and pad or cut the end.",
        )
    if not torch.isfinite(wave).all():
        raise LmdError("samples that are not finite (NaN)", "finite ones", "Check the source.")


def check_latents(codec: Codec, latents: Latents, least: int) -> None:
    """Refuse latents of other channels, of fewer than `least` frames, or that are not finite.

    Raises:
        LmdError: they are one of these.
    """
    channels, n = latents.shape[1:]
    if channels != codec.latent_dim or n < least:
        raise LmdError(
            f"latents of {channels} channels and {n} frames",
            f"{codec.latent_dim} channels and at least {least} frames",
            "Use the codec that made them.",
        )
    if not torch.isfinite(latents).all():
        raise LmdError("latents that are not finite", "finite latents", "Check the model.")


def equal_power_fade(n_samples: int, like: Tensor) -> tuple[Tensor, Tensor]:
    """Gains (in, out) with in² + out² = 1 over `n_samples` samples."""
    angle = (torch.arange(n_samples, dtype=like.dtype, device=like.device) + 0.5) / n_samples
    return torch.sin(angle * math.pi / 2), torch.cos(angle * math.pi / 2)
