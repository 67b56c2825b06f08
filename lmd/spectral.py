"""The codec of `small`: magnitudes in, learnable latents, an inverse STFT that invents the phase.

The encoder sees log magnitudes only, so latents say what sounds, not where its waves stand. The
decoder, in the Vocos family, predicts magnitudes and phase advances (`lmd.phase`) per STFT step.
"""

import math

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from lmd import phase
from lmd.config import SpectralCodecConfig
from lmd.errors import LmdError
from lmd.shapes import Latents, Wave

Decibels = Float[Tensor, "batch bin step"]
DB_SCALE = 20.0  # network units per decibel are 1 / DB_SCALE
KERNEL = 7
TILE = 64  # rows of a matrix product while decoding


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
    so that a sample depends on nothing but its steps.
    """
    window = torch.hann_window(n_fft, device=spectrum.device)
    scaled = spectrum * _middle_signs(n_fft, spectrum.device)
    grains = torch.fft.irfft(scaled, n=n_fft, dim=1) * window[:, None]
    n_steps = spectrum.shape[-1]
    length = (n_steps - 1) * hop + n_fft
    wave = F.fold(grains, (1, length), (1, n_fft), stride=(1, hop))[:, 0, 0]
    gain = window.sum() / 2 / (window.square().sum() / hop)
    pad = (n_fft - hop) // 2
    return wave[:, pad : pad + n_steps * hop] * gain


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

    def raw_latents(
        self, features: Float[Tensor, "batch frame feature"]
    ) -> Float[Tensor, "batch frame latent"]:
        """Latents before they are normalised."""
        x = (features - self.feature_mean) / DB_SCALE
        return self.linear(x) + self.layers(x)

    def forward(self, wave: Wave) -> Latents:
        """Normalised latents of a wave of whole frames."""
        raw = self.raw_latents(self.features(wave))
        return ((raw - self.latent_mean) / self.latent_std).transpose(1, 2)


def same_linear(
    layer: nn.Linear, x: Float[Tensor, "*rows inputs"]
) -> Float[Tensor, "*rows outputs"]:
    """A linear layer whose rows do not depend, not even in rounding, on how many there are.

    Matrix products of other sizes round otherwise, and phases that are integrated for a second
    make that audible. So without gradients rows are taken `TILE` at a time.
    """
    if torch.is_grad_enabled():
        return layer(x)
    rows = x.reshape(-1, x.shape[-1])
    padded = F.pad(rows, (0, 0, 0, -len(rows) % TILE))
    out = x.new_empty(len(padded), layer.out_features)
    for tile, part in zip(padded.split(TILE), out.split(TILE), strict=True):
        torch.addmm(layer.bias, tile, layer.weight.T, out=part)
    return out[: len(rows)].reshape(*x.shape[:-1], -1)


def same_depthwise(
    layer: nn.Conv1d, x: Float[Tensor, "batch padded width"]
) -> Float[Tensor, "batch frame width"]:
    """A depthwise convolution over padded frames, tap by tap, for the same reason."""
    if torch.is_grad_enabled():
        return layer(x.transpose(1, 2)).transpose(1, 2)
    n = x.shape[1] - KERNEL + 1
    out = layer.bias.expand(len(x), n, -1)
    for tap in range(KERNEL):
        out = torch.addcmul(out, x[:, tap : tap + n], layer.weight[:, 0, tap])
    return out


class ConvBlock(nn.Module):
    """ConvNeXt in one dimension: depthwise convolution, then a network per frame, added on.

    Args:
        width: channels.
        n_ahead: frames after the present one that the convolution sees; the rest lies before it.
    """

    def __init__(self, width: int, n_ahead: int) -> None:
        super().__init__()
        self.pad = (KERNEL - 1 - n_ahead, n_ahead)
        self.depthwise = nn.Conv1d(width, width, KERNEL, groups=width)
        self.norm = nn.LayerNorm(width)
        self.expand = nn.Linear(width, 2 * width)
        self.contract = nn.Linear(2 * width, width)
        self.scale = nn.Parameter(torch.full((width,), 0.3))

    def forward(self, x: Float[Tensor, "batch frame width"]) -> Float[Tensor, "batch frame width"]:
        """The same shape."""
        y = same_depthwise(self.depthwise, F.pad(x, (0, 0, *self.pad)))
        y = F.gelu(same_linear(self.expand, self.norm(y)))
        return x + self.scale * same_linear(self.contract, y)


class SpectralDecoder(nn.Module):
    """Latents to magnitudes and phase advances.

    Blocks at the latent rate, then at the STFT rate. One frame of look-ahead each for the first
    convolution, the first block, and four steps at the STFT rate.
    """

    def __init__(self, config: SpectralCodecConfig) -> None:
        super().__init__()
        self.config = config
        n_bins = config.n_fft // 2 + 1
        self.enter = nn.Conv1d(config.latent_dim, config.width, 3, padding=1)
        self.blocks = nn.Sequential(
            *(ConvBlock(config.width, int(i == 0)) for i in range(config.depth))
        )
        self.split = nn.Linear(config.width, config.hops_per_frame * config.step_width)
        steps_ahead = [config.hops_per_frame // 2 if i < 2 else 0 for i in range(config.step_depth)]
        self.step_blocks = nn.Sequential(*(ConvBlock(config.step_width, n) for n in steps_ahead))
        self.norm = nn.LayerNorm(config.step_width)
        self.level = nn.Linear(config.step_width, n_bins)
        self.advance = nn.Linear(config.step_width, 4 * n_bins)

    @property
    def lookback_frames(self) -> int:
        """Frames before a frame that its magnitudes and advances depend on."""
        at_frames = 1 + sum(block.pad[0] for block in self.blocks)
        at_steps = sum(block.pad[0] for block in self.step_blocks)
        return at_frames + math.ceil(at_steps / self.config.hops_per_frame)

    @property
    def lookahead_frames(self) -> int:
        """Frames after a frame that its magnitudes and advances depend on."""
        at_frames = 1 + sum(block.pad[1] for block in self.blocks)
        at_steps = sum(block.pad[1] for block in self.step_blocks)
        return at_frames + math.ceil(at_steps / self.config.hops_per_frame)

    def forward(self, latents: Latents) -> tuple[Decibels, phase.Spectrum, phase.Spectrum]:
        """Levels in decibels, advances in time and to the next bin: all `[batch, bin, step]`."""
        x = self.blocks(self._enter(latents))
        x = same_linear(self.split, x).reshape(len(x), -1, self.config.step_width)
        x = self.norm(self.step_blocks(x))
        level = same_linear(self.level, x).transpose(1, 2).float() * DB_SCALE
        in_time, in_frequency = torch.view_as_complex(
            same_linear(self.advance, x).float().unflatten(-1, (2, -1, 2)).contiguous()
        ).unbind(2)
        return level, in_time.transpose(1, 2), in_frequency.transpose(1, 2)

    def _enter(self, latents: Latents) -> Float[Tensor, "batch frame width"]:
        """The first convolution, as one linear map of three frames."""
        if torch.is_grad_enabled():
            return self.enter(latents).transpose(1, 2)
        x = F.pad(latents, (1, 1)).unfold(-1, 3, 1).transpose(1, 2).flatten(2)
        weights = nn.Linear(x.shape[-1], self.config.width, device="meta")
        weights.weight = nn.Parameter(self.enter.weight.flatten(1), requires_grad=False)
        weights.bias = self.enter.bias
        return same_linear(weights, x)


class SpectralCodec(nn.Module):
    """The codec of `small` (protocol `lmd.codec.Codec`).

    Look-ahead: three frames for the decoder's convolutions and one for the inverse STFT, whose
    grains of `n_fft` samples reach into the frame before. Look-back: the same on the other side,
    and `horizon_frames`, the furthest onset that a phase counts from.
    """

    def __init__(self, config: SpectralCodecConfig) -> None:
        super().__init__()
        self.config = config
        self.sample_rate, self.channels = config.sample_rate, config.channels
        self.latent_dim, self.samples_per_frame = config.latent_dim, config.samples_per_frame
        self.encoder, self.decoder = SpectralEncoder(config), SpectralDecoder(config)
        overlap = math.ceil((config.n_fft - config.hop) / 2 / config.samples_per_frame)
        self.lookahead_frames = self.decoder.lookahead_frames + overlap
        # one step more: an onset is a rise over the step before
        self.lookback_frames = self.decoder.lookback_frames + overlap + config.horizon_frames + 1
        turn = phase.bin_turn(config.n_fft // 2 + 1, config.n_fft, config.hop)
        self.register_buffer("hop_turn", turn, persistent=False)

    @torch.no_grad()
    def encode(self, wave: Wave) -> Latents:
        """Latents of a wave, one frame per `samples_per_frame` samples.

        Raises:
            LmdError: another number of channels, a length that is not a whole number of frames,
                or samples that are not finite.
        """
        hop = self.samples_per_frame
        if wave.shape[1] != self.channels:
            raise LmdError(
                f"a wave of {wave.shape[1]} channels", f"{self.channels}", "Mix it down first."
            )
        if wave.shape[-1] == 0 or wave.shape[-1] % hop:
            raise LmdError(
                f"a wave of {wave.shape[-1]} samples",
                f"a positive multiple of {hop} (one latent frame)",
                "Cut it, or pad it with zeros.",
            )
        if not torch.isfinite(wave).all():
            raise LmdError("samples that are not finite", "finite samples", "Check the source.")
        return self.encoder(wave.float())

    @torch.no_grad()
    def decode(self, latents: Latents) -> Wave:
        """The wave of some latents.

        Raises:
            LmdError: another number of latent channels, or values that are not finite.
        """
        if latents.shape[1] != self.latent_dim:
            raise LmdError(
                f"latents of {latents.shape[1]} channels",
                f"{self.latent_dim}",
                "Use the codec that made them.",
            )
        if not torch.isfinite(latents).all():
            raise LmdError("latents that are not finite", "finite latents", "Check the model.")
        if not latents.shape[-1]:
            return latents.new_zeros(len(latents), self.channels, 0)
        return self.synthesize(*self.decoder(latents.float()))[:, None]

    def synthesize(
        self, level: Decibels, in_time: phase.Spectrum, in_frequency: phase.Spectrum
    ) -> Float[Tensor, "batch sample"]:
        """The wave of predicted levels and advances; gradients reach the levels alone."""
        config = self.config
        magnitude = amplitude(level, config.floor_db)
        with torch.no_grad():
            horizon = config.horizon_frames * config.hops_per_frame
            start = phase.restarts(onset_strength(level, config.floor_db), horizon)
            spectrum = phase.integrate(magnitude, in_time, in_frequency, start, self.hop_turn)
            unit = spectrum / magnitude.clamp_min(1e-12)
        return inverse_stft(magnitude * unit, config.n_fft, config.hop)


def amplitude(level: Decibels, floor_db: float) -> phase.Magnitude:
    """Magnitudes whose `decibels` are `level`: at the floor or under it they are zero."""
    floor = 10 ** (floor_db / 10)
    return (10 ** (level.clamp(floor_db, 20.0) / 10) - floor).clamp_min(1e-14).sqrt()


def onset_strength(level: Decibels, floor_db: float) -> Float[Tensor, "batch step"]:
    """Mean rise in decibels over the step before, per step; the first step counts as silent."""
    level = level.clamp_min(floor_db)
    rise = (level[..., 1:] - level[..., :-1]).clamp_min(0).mean(1)
    return F.pad(rise, (1, 0))
