"""The codec of `small`: magnitudes in, learnable latents, an inverse STFT that invents the phase.

The encoder sees log magnitudes only, so latents say what sounds, not where its waves stand. The
decoder, in the Vocos family, predicts magnitudes and phase advances (`phase`) per STFT step.
"""

import math
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Float
from torch import Tensor, nn

from lmd.codec import phase
from lmd.codec.base import check_latents, check_wave
from lmd.codec.spectral_decoder import DB_SCALE, Advances, Decibels, Past, SpectralDecoder
from lmd.config import SpectralCodecConfig
from lmd.errors import LmdError
from lmd.machine import making_tables
from lmd.shapes import BlockLatents, Latents, Wave


def stft(wave: Float[Tensor, "batch sample"], n_fft: int, hop: int) -> phase.Spectrum:
    """Spectrum with a full-scale sine at 1, one step per hop, phases relative to mid-window.

    The wave is padded with zeros by `(n_fft - hop) / 2` at both ends, so `n` hops give `n` steps.
    """
    window = torch.hann_window(n_fft, device=wave.device, dtype=wave.dtype)
    pad = (n_fft - hop) // 2
    spectrum = torch.stft(
        F.pad(wave, (pad, pad)), n_fft, hop, window=window, center=False, return_complex=True
    )
    return spectrum * (2 / window.sum()) * _middle_signs(n_fft, wave.device)


def inverse_stft(spectrum: phase.Spectrum, n_fft: int, hop: int) -> Float[Tensor, "batch sample"]:
    """The wave of a spectrum as `stft` makes it: windowed overlap-add, `hop` samples a step.

    The sum is divided by what squared windows add up to in the middle of a stream, at the ends too,
    so that a sample depends on nothing but its steps. `hop` has to divide `n_fft`.
    """
    window = torch.hann_window(n_fft, device=spectrum.device)
    scaled = spectrum * _middle_signs(n_fft, spectrum.device)
    grains = torch.fft.irfft(scaled.transpose(1, 2), n=n_fft) * window
    n_rows, n_steps = grains.shape[:2]
    hops = grains.unflatten(-1, (-1, hop)).unbind(2)
    wave = grains.new_zeros(n_rows, n_steps + len(hops) - 1, hop)
    for later, part in enumerate(hops):
        wave[:, later : later + n_steps] += part
    gain = window.sum() / 2 / (window.square().sum() / hop)
    pad = (n_fft - hop) // 2
    return wave.flatten(1)[:, pad : pad + n_steps * hop] * gain


def _middle_signs(n_fft: int, device: torch.device) -> Float[Tensor, "bin 1"]:
    """(-1)^k moves the time zero of a transform from the window's start to its middle."""
    return (1.0 - 2.0 * (torch.arange(n_fft // 2 + 1, device=device) % 2))[:, None]


def band_matrix(n_bins: int, n_linear: int, n_bands: int) -> Float[Tensor, "bin band"]:
    """Weights that average powers of bins into bands: single bins first, then triangles."""
    upper = torch.logspace(
        math.log10(n_linear), math.log10(n_bins - 2), n_bands - n_linear, dtype=torch.float64
    )
    centres = torch.cat([torch.arange(n_linear, dtype=torch.float64), upper])
    edges = torch.cat([torch.tensor([-1.0]), centres, torch.tensor([float(n_bins)])])
    low = torch.minimum(edges[:-2], centres - 1)
    high = torch.maximum(edges[2:], centres + 1)
    bins = torch.arange(n_bins, dtype=torch.float64)[:, None]
    rising, falling = (bins - low) / (centres - low), (high - bins) / (high - centres)
    weights = torch.minimum(rising, falling).clamp_min(0).square()
    return (weights / weights.sum(0)).float()


def decibels(power: Tensor, floor_db: float) -> Tensor:
    """10·log10 of a power with a soft floor: zero power is exactly `floor_db`."""
    return 10 * torch.log10(power + 10 ** (floor_db / 10))


class SpectralEncoder(nn.Module):
    """Waves to latents of zero mean and unit scale; each frame from its own STFT steps alone.

    A linear map (principal components at first) plus a small network on the stacked band levels.
    """

    def __init__(self, config: SpectralCodecConfig) -> None:
        super().__init__()
        self.config = config
        n_features = config.n_bands * config.hops_per_frame
        with making_tables():
            bands = band_matrix(config.n_fft // 2 + 1, config.n_linear, config.n_bands)
        self.register_buffer("bands", bands, persistent=False)
        self.register_buffer("feature_mean", torch.full((n_features,), config.floor_db))
        self.register_buffer("latent_mean", torch.zeros(config.latent_dim))
        self.register_buffer("latent_std", torch.ones(config.latent_dim))
        self.linear = nn.Linear(n_features, config.latent_dim)
        self.layers = nn.Sequential(
            nn.Linear(n_features, config.encoder_width),
            nn.GELU(),
            nn.Linear(config.encoder_width, config.encoder_width),
            nn.GELU(),
            nn.Linear(config.encoder_width, config.latent_dim),
        )

    def features(self, wave: Wave) -> Float[Tensor, "batch frame feature"]:
        """Band levels in decibels, the steps of one latent frame side by side."""
        config = self.config
        power = stft(wave[:, 0], config.n_fft, config.hop).abs().square()
        floor = 10 ** (config.floor_db / 10)
        with torch.autocast(wave.device.type, enabled=False):  # powers span eight decades
            levels = 10 * torch.log10((power + floor).transpose(1, 2) @ self.bands)
        return levels.reshape(len(wave), -1, config.hops_per_frame * config.n_bands)

    def from_features(self, features: Float[Tensor, "batch frame feature"]) -> Latents:
        """Normalised latents of band levels."""
        raw = self.raw_latents(features)
        return rearrange((raw - self.latent_mean) / self.latent_std, "b n c -> b c n")

    def raw_latents(
        self, features: Float[Tensor, "batch frame feature"]
    ) -> Float[Tensor, "batch frame latent"]:
        """Latents before they are normalised."""
        x = (features - self.feature_mean) / DB_SCALE
        return self.linear(x) + self.layers(x)

    def forward(self, wave: Wave) -> Latents:
        """Normalised latents of a wave of whole frames."""
        return self.from_features(self.features(wave))


@dataclass(frozen=True)
class SpectralStream:
    """Where a streamed decode is; a value (`lmd.codec.base.StreamingCodec`).

    Attributes:
        layers: what the decoder's convolutions will see again; `()` at the beginning.
        level: decibels of the last step.
        magnitude, in_time, in_frequency, onset: of the steps that a phase may still count from.
        spectrum: of the steps whose grains reach into samples to come.
    """

    layers: tuple[Past, ...] = ()
    level: Tensor | None = None
    magnitude: Tensor | None = None
    in_time: Tensor | None = None
    in_frequency: Tensor | None = None
    onset: Tensor | None = None
    spectrum: Tensor | None = None


def appended(past: Tensor | None, new: Tensor) -> Tensor:
    """Steps behind steps, in the memory layout of the new ones (sums over bins depend on it)."""
    return new if past is None else torch.cat([past.mT, new.mT], dim=1).mT


def _latest(steps: Tensor, n: int, n_guessed: int) -> Tensor:
    """The last `n` steps before those that are only guessed."""
    end = steps.shape[-1] - n_guessed
    return steps[..., max(0, end - n) : end]


class SpectralCodec(nn.Module):
    """The codec of `small` (protocol `lmd.codec.base.Codec`).

    Look-ahead: three frames for the decoder's convolutions and one for the inverse STFT, whose
    grains of `n_fft` samples reach into the frame before. Look-back: the same on the other side,
    and `horizon_frames`, the furthest onset that a phase counts from.

    Raises:
        LmdError: sizes for more than one channel.
    """

    def __init__(self, config: SpectralCodecConfig) -> None:
        super().__init__()
        if config.channels != 1:
            raise LmdError(
                f"a spectral codec of {config.channels} channels",
                "1",
                "Mix down, or use the other codec (`paper`), which is stereo.",
            )
        self.config = config
        self.sample_rate, self.channels = config.sample_rate, config.channels
        self.latent_dim, self.samples_per_frame = config.latent_dim, config.samples_per_frame
        self.encoder, self.decoder = SpectralEncoder(config), SpectralDecoder(config)
        per_frame, (back, ahead) = config.hops_per_frame, self.decoder.reach_steps()
        overlap = math.ceil((config.n_fft - config.hop) / 2 / config.samples_per_frame)
        self.lookahead_frames = math.ceil(ahead / per_frame) + overlap
        self.n_before = overlap * per_frame  # steps whose grains reach into samples after them
        self.n_waiting = self.lookahead_frames * per_frame - ahead
        # one step more: an onset is a rise over the step before
        self.lookback_frames = math.ceil(back / per_frame) + overlap + config.horizon_frames + 1
        with making_tables():
            turn = phase.bin_turn(config.n_fft // 2 + 1, config.n_fft, config.hop)
        self.register_buffer("hop_turn", turn, persistent=False)

    @property
    def device(self) -> torch.device:
        """Where it computes; waves and latents may come from anywhere."""
        return self.hop_turn.device

    @torch.no_grad()
    def encode(self, wave: Wave) -> Latents:
        """Latents of a wave; see `Codec`."""
        check_wave(self, wave)
        return self.encoder(wave.to(self.device, torch.float32))

    @torch.no_grad()
    def decode(self, latents: Latents) -> Wave:
        """The wave of some latents; see `Codec`."""
        return self.stream_decode(SpectralStream(), latents, last=True)[0]

    def stream_start(self) -> SpectralStream:
        """The streaming state before the first latent."""
        return SpectralStream()

    @torch.no_grad()
    def stream_decode(
        self,
        state: SpectralStream,
        latents: Latents,
        last: bool = False,
        guess: BlockLatents | None = None,
    ) -> tuple[Wave, SpectralStream]:
        """Decode the next frames, computing nothing twice; see `StreamingCodec`."""
        n_guessed = 0
        if guess is not None:
            n_guessed, last = guess.shape[-1], True
            latents = torch.cat([latents, guess], dim=-1)
        check_latents(self, latents, least=0)
        latents = latents.to(self.device, torch.float32)
        if not latents.shape[-1] and not (last and state.layers):  # and nothing held back
            return latents.new_zeros(len(latents), self.channels, 0), state
        advances, layers, n_certain = self.decoder.step(latents, state.layers, last, n_guessed)
        state = replace(state, layers=layers)
        if not advances[0].shape[-1]:  # still within the look-ahead
            return latents.new_zeros(len(latents), self.channels, 0), state
        wave, following = self._sound(state, advances, last, n_certain)
        return wave[:, None], following if n_certain else state

    def synthesize(
        self, level: Decibels, in_time: phase.Spectrum, in_frequency: phase.Spectrum
    ) -> Float[Tensor, "batch sample"]:
        """The wave of predicted levels and advances; gradients reach the levels alone."""
        advances = (level, in_time, in_frequency)
        return self._sound(SpectralStream(), advances, last=True, n_certain=level.shape[-1])[0]

    def _sound(
        self, state: SpectralStream, advances: Advances, last: bool, n_certain: int
    ) -> tuple[Float[Tensor, "batch sample"], SpectralStream]:
        """The samples that some more steps make certain, and the state after `n_certain` steps."""
        config, n = self.config, advances[0].shape[-1]
        loud = amplitude(advances[0], config.floor_db)
        with torch.no_grad():
            levels = appended(state.level, advances[0])
            onset = onset_strength(levels, config.floor_db)[..., levels.shape[-1] - n :]
            if state.onset is not None:
                onset = torch.cat([state.onset, onset], dim=-1)
            magnitude = appended(state.magnitude, loud)
            in_time = appended(state.in_time, advances[1])
            in_frequency = appended(state.in_frequency, advances[2])
            horizon = config.horizon_frames * config.hops_per_frame
            start = phase.restarts(onset, horizon)
            known = None if state.spectrum is None else state.spectrum[..., -1:]
            n_past = magnitude.shape[-1] - n
            unit = phase.integrate(
                magnitude, in_time, in_frequency, start, self.hop_turn, n_past, known
            )
        wave, steps = self._overlap_add(state.spectrum, loud * unit, last)
        n_guessed = n - n_certain
        kept = horizon + 1  # the last step's own horizon
        following = SpectralStream(
            state.layers,
            _latest(levels, 1, n_guessed),
            *(_latest(t, kept, n_guessed) for t in (magnitude, in_time, in_frequency, onset)),
            _latest(steps, self.n_before + self.n_waiting, n_guessed),
        )
        return wave, following

    def _overlap_add(
        self, past: Tensor | None, new: phase.Spectrum, last: bool
    ) -> tuple[Float[Tensor, "batch sample"], Tensor]:
        """The inverse STFT as far as it is certain, and the steps that it was made of."""
        n_before, hop = self.n_before, self.config.hop
        if past is None:
            past = torch.zeros_like(new[..., :1]).expand(*new.shape[:-1], n_before)
        steps = torch.cat([past, new], dim=-1)
        end = max(0, steps.shape[-1] - (0 if last else self.n_waiting))
        return inverse_stft(steps, self.config.n_fft, hop)[:, n_before * hop : end * hop], steps


def amplitude(level: Decibels, floor_db: float) -> phase.Magnitude:
    """Magnitudes whose `decibels` are `level`: at the floor or under it they are zero."""
    floor = 10 ** (floor_db / 10)
    return (10 ** (level.clamp(floor_db, 20.0) / 10) - floor).clamp_min(1e-14).sqrt()


def onset_strength(level: Decibels, floor_db: float) -> Float[Tensor, "batch step"]:
    """Mean rise in decibels over the step before, per step; the first step counts as silent."""
    level = level.clamp_min(floor_db)
    rise = (level[..., 1:] - level[..., :-1]).clamp_min(0).mean(1)
    return F.pad(rise, (1, 0))
