"""The border between waves and latents: what every codec offers, and how a stream is decoded.

The streamer and the notebooks know nothing of a codec but this protocol, so the spectral codec of
`small` and Stable Audio's autoencoder are interchangeable.
"""

import math
from dataclasses import dataclass, replace
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
        """Latents of a wave whose length is a whole number of frames."""
        ...

    def decode(self, latents: Latents) -> Wave:
        """The wave of some latents, `samples_per_frame` samples a frame."""
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
        """The samples that are certain now (`lookahead_frames` late) and the next state.

        With `last` the stream ends behind these latents, and the rest of the samples comes, too.
        With a `guess` the rest comes as if the stream ended behind that; the next state knows
        nothing of it.
        """
        ...


@dataclass(frozen=True)
class DecodeState:
    """What a streamed decode carries from block to block; a value, never changed in place.

    Attributes:
        latents: the most recent latents, those still to be heard last.
        n_waiting: how many of them have not been emitted yet (the look-ahead of an exact boundary).
        n_unseen: how many of them `running` has not decoded yet (after a rewind).
        overhang: samples guessed past the last block's end, to be faded out (fading boundary).
        running: the codec's own streaming state, where it has one.
    """

    latents: Latents | None = None
    n_waiting: int = 0
    overhang: Wave | None = None
    running: Any = None
    n_unseen: int = 0

    def waiting_for(self, latents: Latents) -> "DecodeState":
        """The same with some more latents that wait to be decoded together with the next."""
        past = latents[..., :0] if self.latents is None else self.latents
        n = latents.shape[-1]
        return replace(
            self,
            latents=torch.cat([past, latents], dim=-1),
            n_waiting=self.n_waiting + n,
            n_unseen=self.n_unseen + n,
        )


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
        unseen = joined[..., past.shape[-1] - state.n_unseen :]
        decoded, running = _decode_running(codec, state, unseen, guess)
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


def _decode_running(
    codec: "StreamingCodec", state: DecodeState, latents: Latents, guess: BlockLatents
) -> tuple[Wave, Any]:
    """Decode with the codec's own streaming state; a new one is fed the latents before it."""
    running = state.running
    if running is None:
        running = codec.stream_start()
        n_seen = 0 if state.latents is None else state.latents.shape[-1] - state.n_unseen
        if n_seen:
            _, running = codec.stream_decode(running, state.latents[..., :n_seen])
    return codec.stream_decode(running, latents, guess=guess if guess.shape[-1] else None)


def equal_power_fade(n_samples: int, like: Tensor) -> tuple[Tensor, Tensor]:
    """Gains (in, out) with in² + out² = 1 over `n_samples` samples."""
    angle = (torch.arange(n_samples, dtype=like.dtype, device=like.device) + 0.5) / n_samples
    return torch.sin(angle * math.pi / 2), torch.cos(angle * math.pi / 2)
