"""How a minute of streamed music changes: loudness, brightness, distance from the data.

Taught in notebook 03_arc_forcing.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from einops import rearrange

from lmd.corpus.analysis import brightness_hz
from lmd.data.latents import LatentWindows
from lmd.data.shards import LatentShards
from lmd.evaluation.metrics import Gaussian, frechet, gaussian
from lmd.shapes import Latents, Wave
from lmd.stream.controls import Controls
from lmd.stream.streamer import Streamer

PIECE_S = 5.0


@dataclass(frozen=True)
class Drift:
    """One number per `PIECE_S` of a stream."""

    times_s: list[float]  # middles of the pieces
    level_db: list[float]  # RMS of all streams together, under full scale
    brightness_hz: list[float]  # spectral centroid, mean over streams
    distance: list[float]  # root of the Fréchet distance of latent frames from the data's

    @property
    def growth(self) -> float:
        """Distance of the last quarter over that of the first: 1 = no drift."""
        n = max(1, len(self.distance) // 4)
        return float(np.mean(self.distance[-n:]) / np.mean(self.distance[:n]))

    @property
    def mean_distance(self) -> float:
        """Over the whole stream."""
        return float(np.mean(self.distance))


def frame_statistics(latents: Latents) -> Gaussian:
    """Mean and covariance of single frames, all items together."""
    return gaussian(rearrange(latents, "item d frame -> (item frame) d").double().numpy())


def data_windows(shards: LatentShards, n_windows: int, n_frames: int, seed: int = 0) -> Latents:
    """Windows of the corpus, the same for a seed."""
    return LatentWindows(shards, "train", n_frames, seed).batch(0, range(n_windows))["latents"]


def drift_of(latents: Latents, wave: Wave, sample_rate: int, reference: Gaussian) -> Drift:
    """Cut streams and the latents that they are decoded from into pieces of 5 s; measure each.

    The reference is `frame_statistics` of the data.
    """
    n_pieces = max(1, int(wave.shape[-1] / sample_rate / PIECE_S))
    frames, samples = latents.shape[-1] // n_pieces, wave.shape[-1] // n_pieces
    pieces = wave[..., : n_pieces * samples].float().split(samples, -1)
    seen = latents[..., : n_pieces * frames].split(frames, -1)
    powers = [max(float(piece.square().mean()), 1e-12) for piece in pieces]
    return Drift(
        [(k + 0.5) * samples / sample_rate for k in range(n_pieces)],
        [10 * math.log10(power) for power in powers],
        [float(np.mean([brightness_hz(w.numpy(), sample_rate) for w in each])) for each in pieces],
        [math.sqrt(frechet(frame_statistics(each), reference)) for each in seen],
    )


def play_streams(
    streamer: Streamer, prompts: Sequence[str], seconds: float, controls: Controls
) -> tuple[Latents, Wave]:
    """One stream from silence per prompt, otherwise under the same controls."""
    rate, streams = streamer.codec.sample_rate / streamer.codec.samples_per_frame, []
    n_blocks = math.ceil(seconds * rate / controls.block_frames)
    for number, prompt in enumerate(prompts):
        asked = replace(controls, prompt=prompt, seed=controls.seed + number)
        streams.append(list(streamer.stream(asked, n_blocks=n_blocks)))
    latents = [torch.cat([block.latents for block in blocks], dim=-1) for blocks in streams]
    waves = [torch.cat([block.wave for block in blocks], dim=-1) for blocks in streams]
    return torch.cat(latents), torch.cat(waves)
