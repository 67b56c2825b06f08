"""One step of a stream that must not stop, and must not be louder than full scale."""

import math
from dataclasses import dataclass

import torch

from lmd.codec.base import equal_power_fade
from lmd.errors import LmdError
from lmd.shapes import Wave
from lmd.stream.controls import Controls
from lmd.stream.streamer import Block, Streamer, StreamState

FADE_IN_S = 0.02
RELEASE_DB_PER_S = 5.0  # of the limiter: slow, so that a deep note's peaks are not each cut anew


@dataclass(frozen=True)
class Guarded:
    """A stream's state with what is needed to survive a bad or a loud block."""

    state: StreamState  # before the next block
    last_wave: Wave | None = None  # what was played for the last good block
    n_faults: int = 0  # bad blocks in a row up to now
    gain_db: float = 0.0  # of the limiter, after its last sample


@dataclass(frozen=True)
class PlayedBlock:
    """What is played for one block."""

    wave: Wave  # [1, channel, sample], float32 on the CPU
    block: Block | None  # as made, or None if it could not be used
    fault: str | None = None  # why not, in one line
    limited_db: float = 0.0  # by how much the limiter turned it down, at most

    @property
    def level_db(self) -> float:
        """RMS level in dB under full scale; −120 for silence, and where there is no sample."""
        power = float(self.wave.square().mean()) if self.wave.numel() else 0.0
        return 10 * math.log10(max(power, 1e-12))


def limit(wave: Wave, gain_db: float, sample_rate: int) -> tuple[Wave, float]:
    """Turn down what is above full scale; what is not stays as it is, bit for bit.

    The gain is G[i] = min(G[i−1] + release, −20·log10 |x[i]|, 0) in dB, the same for all channels:
    down at once, up by `RELEASE_DB_PER_S`. `gain_db` is G before the first sample, so that cuts do
    not matter. Returns the wave within −1…1, and G at its last sample.
    """
    peaks = wave.abs().amax(dim=(0, 1)).double()
    if not len(peaks) or (gain_db == 0 and float(peaks.max()) <= 1):
        return wave, gain_db
    rise = torch.arange(1, len(peaks) + 1, dtype=torch.float64) * RELEASE_DB_PER_S / sample_rate
    lowest = (-20 * peaks.clamp(min=1).log10() - rise).cummin(dim=0).values
    gains_db = (lowest.clamp(max=gain_db) + rise).clamp(max=0)
    gains = (10 ** (gains_db / 20)).float()  # exactly 1 where nothing is to be done
    return (wave * gains).clamp(-1, 1), float(gains_db[-1])


def guarded_step(
    streamer: Streamer,
    guarded: Guarded,
    controls: Controls,
    fault: str | None = None,
    limited: bool = True,
) -> tuple[PlayedBlock, Guarded]:
    """The next block, or in place of a bad one the last good block faded to silence.

    After a bad block the stream goes on from the state before it; after two in a row from silence,
    since that state may itself be the reason. The first good block afterwards is faded in.

    Args:
        streamer, guarded: `Guarded(streamer.start())`, or from the step before.
        controls: already validated.
        fault: take the block for bad, for this reason (to play a take again).
        limited: whether `limit` holds the wave within full scale.
    """
    if fault is None:
        try:
            block, state = streamer.step(guarded.state, controls)
        except LmdError as error:
            fault = str(error)
        else:
            if torch.isfinite(block.latents).all() and torch.isfinite(block.wave).all():
                return _good(streamer, guarded, block, state, limited)
            fault = f"block {block.index} holds numbers that are not finite"
    return _replaced(streamer, guarded, controls, fault)


def _good(
    streamer: Streamer, guarded: Guarded, block: Block, state: StreamState, limited: bool
) -> tuple[PlayedBlock, Guarded]:
    """The block within full scale, faded in after a bad one."""
    rate = streamer.codec.sample_rate
    wave, gain_db, limited_db = block.wave.detach().float().cpu(), guarded.gain_db, 0.0
    if limited and wave.numel():
        limited_db = 20 * math.log10(max(float(wave.abs().max()), 1.0))
        wave, gain_db = limit(wave, gain_db, rate)
    played = wave
    if guarded.n_faults:
        n = min(round(FADE_IN_S * rate), wave.shape[-1])
        fade_in, _ = equal_power_fade(n, wave)
        played = torch.cat([wave[..., :n] * fade_in, wave[..., n:]], dim=-1)
    return PlayedBlock(played, block, None, limited_db), Guarded(state, wave, 0, gain_db)


def _replaced(
    streamer: Streamer, guarded: Guarded, controls: Controls, fault: str
) -> tuple[PlayedBlock, Guarded]:
    """The last good block backwards, fading out, or silence; as long as the block that was due.

    Backwards it begins with the sample that was heard last, so there is no click.
    """
    codec = streamer.codec
    wave = torch.zeros(1, codec.channels, controls.block_frames * codec.samples_per_frame)
    if guarded.last_wave is not None and not guarded.n_faults:
        n = min(wave.shape[-1], guarded.last_wave.shape[-1])
        _, fade_out = equal_power_fade(n, wave)
        wave[..., :n] = guarded.last_wave.flip(-1)[..., :n] * fade_out
    state = streamer.start() if guarded.n_faults else guarded.state
    after = Guarded(state, guarded.last_wave, guarded.n_faults + 1)
    return PlayedBlock(wave, None, fault), after
