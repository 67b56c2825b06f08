"""One step of a stream that must not stop: a block that is not finite is replaced, not played."""

from dataclasses import dataclass, replace

import torch

from lmd.codec.base import equal_power_fade
from lmd.errors import LmdError
from lmd.shapes import Wave
from lmd.stream.controls import Controls
from lmd.stream.streamer import Block, Streamer, StreamState

FADE_IN_S = 0.02


@dataclass(frozen=True)
class Guarded:
    """A stream's state with what is needed to survive a bad block.

    Attributes:
        state: before the next block.
        last_wave: the last good block's samples, or None at the beginning.
        n_faults: bad blocks in a row up to now.
    """

    state: StreamState
    last_wave: Wave | None = None
    n_faults: int = 0


@dataclass(frozen=True)
class Piece:
    """What is played for one block.

    Attributes:
        wave: `[1, channel, sample]`, float32 on the CPU.
        block: the block as made, or None if it could not be used.
        fault: why not, in one line; None for a good block.
    """

    wave: Wave
    block: Block | None
    fault: str | None = None


def guarded_step(
    streamer: Streamer, guarded: Guarded, controls: Controls, fault: str | None = None
) -> tuple[Piece, Guarded]:
    """The next block, or in place of a bad one the last good block faded to silence.

    After a bad block the stream goes on from the state before it; after two in a row from silence,
    since that state may itself be the reason. The first good block afterwards is faded in.

    Args:
        streamer: makes the blocks.
        guarded: from `Guarded(streamer.start())`, or from the step before.
        controls: already validated.
        fault: take the block for bad, for this reason (to play a take again).

    Returns:
        What to play, and the state after it.
    """
    if fault is None:
        try:
            block, state = streamer.step(guarded.state, controls)
        except LmdError as error:
            fault = str(error)
        else:
            if bool(torch.isfinite(block.latents).all() and torch.isfinite(block.wave).all()):
                heard = block.wave.detach().float().cpu()
                wave = _faded_in(heard, streamer) if guarded.n_faults else heard
                return Piece(wave, block), Guarded(state, heard)
            fault = f"block {block.index} holds numbers that are not finite"
    return _replaced(streamer, guarded, controls, fault)


def _replaced(
    streamer: Streamer, guarded: Guarded, controls: Controls, fault: str
) -> tuple[Piece, Guarded]:
    """The last good block backwards, fading out, or silence; as long as the block that was due.

    Backwards it begins with the sample that was heard last, so there is no click.
    """
    codec = streamer.codec
    n_samples = controls.block_frames * codec.samples_per_frame
    wave = torch.zeros(1, codec.channels, n_samples)
    if guarded.last_wave is not None and not guarded.n_faults:
        n = min(n_samples, guarded.last_wave.shape[-1])
        _, fade_out = equal_power_fade(n, wave)
        wave[..., :n] = guarded.last_wave.flip(-1)[..., :n] * fade_out
    n_faults = guarded.n_faults + 1
    state = streamer.start() if n_faults > 1 else guarded.state
    return Piece(wave, None, fault), replace(guarded, state=state, n_faults=n_faults)


def _faded_in(wave: Wave, streamer: Streamer) -> Wave:
    """A copy whose first milliseconds rise from silence."""
    n = min(round(FADE_IN_S * streamer.codec.sample_rate), wave.shape[-1])
    fade_in, _ = equal_power_fade(n, wave)
    faded = wave.clone()
    faded[..., :n] = faded[..., :n] * fade_in
    return faded
