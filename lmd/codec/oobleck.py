"""Stable Audio's autoencoder as a codec: diffusers' weights and names, faster arithmetic.

The reference is diffusers' `AutoencoderOobleck`; `oobleck_fast` computes the same function.
Source: Stable Audio Open (arXiv 2407.14358).
"""

import re
import warnings
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from lmd.codec.oobleck_fast import (
    State,
    decoder_stages,
    encoder_stages,
    step_stages,
    to_signal,
)
from lmd.config import OobleckConfig
from lmd.errors import LmdError
from lmd.model.weights import build_loaded
from lmd.shapes import BlockLatents, Latents, Wave

RESIDUAL_REACH = 3 * (1 + 3 + 9)  # positions that a block's three units see on either side
CHUNK_FRAMES = 64  # a long wave or latent sequence goes through in chunks of this many frames
N_WIDE = 3  # the encoder's last stages, whose weights are too large to be read once per piece


@dataclass(frozen=True)
class StreamDecodeState:
    """What a streamed decode remembers; a value, never changed in place.

    Attributes:
        layers: every layer's memory; None before the first step.
        held: samples that are certain but not yet a whole frame.
        n_frames: latent frames taken so far.
        n_emitted: samples handed out so far.
    """

    layers: tuple[State, ...] | None = None
    held: Wave | None = None
    n_frames: int = 0
    n_emitted: int = 0


class OobleckCodec(nn.Module):
    """Waves to latents and back, float32 at the border, `dtype` inside.

    Args:
        reference: the network, its weights loaded (`reference_network`).
        config: its sizes.
        dtype: float32, bfloat16 (fast where the processor multiplies bfloat16 matrices, or on
            CUDA) or float16. Weights are folded in float32 and then rounded.
    """

    def __init__(
        self,
        reference: nn.Module,
        config: OobleckConfig,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        super().__init__()
        self.config, self.dtype = config, dtype
        self.sample_rate, self.channels = config.sample_rate, config.audio_channels
        self.latent_dim, self.samples_per_frame = config.latent_dim, config.samples_per_frame
        self.lookback_frames, self.lookahead_frames = decoder_reach_frames(config)
        self.decoder = decoder_stages(reference.decoder, dtype)
        self.encoder = encoder_stages(reference.encoder, dtype)

    @property
    def device(self) -> torch.device:
        """Where it computes; waves and latents may come from anywhere."""
        return self.decoder[0].layers[0].conv.weight.device

    def let_encoder_go(self) -> "OobleckCodec":
        """Free the encoder's weights, half of all, in place: a stream from silence needs none."""
        self.encoder = nn.ModuleList()
        return self

    @classmethod
    def from_tensors(
        cls,
        config: OobleckConfig,
        tensors: Mapping[str, Tensor],
        source: str = "these tensors",
        dtype: torch.dtype = torch.float32,
    ) -> "OobleckCodec":
        """A codec from weights with diffusers' names.

        Raises:
            LmdError: lists weights that are missing, unknown or of another shape.
        """
        return cls(reference_network(config, tensors, source), config, dtype)

    @torch.no_grad()
    def encode(self, wave: Wave, generator: torch.Generator | None = None) -> Latents:
        """Latents of a wave: the mean of the bottleneck, or a sample if a generator is given.

        mean + (softplus(scale) + 1e-4) · noise

        Args:
            wave: `[batch, channel, sample]`, a whole number of frames.
            generator: draws the noise; None takes the mean.

        Raises:
            LmdError: not a whole number of frames, other channels, or values that are not finite.
        """
        mean, scale = self.encode_parameters(wave).chunk(2, dim=1)
        if generator is not None:
            noise = torch.randn(mean.shape, generator=generator).to(mean)
            mean = mean + (nn.functional.softplus(scale) + 1e-4) * noise
        return mean

    @torch.no_grad()
    def encode_parameters(self, wave: Wave) -> Latents:
        """What the encoder says before the bottleneck: means, then scales."""
        self._check_wave(wave)
        x = to_signal(wave.to(self.device, self.dtype))
        narrow, wide = self.encoder[:-N_WIDE], self.encoder[-N_WIDE:]
        states = [tuple(s.start(len(x)) for s in part) for part in (narrow, wide)]
        outputs, n = [], CHUNK_FRAMES * self.samples_per_frame
        for begin in range(0, x.shape[-1], n):
            last = begin + n >= x.shape[-1]
            y, states[0] = step_stages(narrow, x[..., begin : begin + n], states[0], last)
            memories = []
            for stage, memory in zip(wide, states[1], strict=True):
                y, memory = stage.step(y, memory, last)
                memories.append(memory)
            states[1] = tuple(memories)
            outputs.append(y)
        return torch.cat(outputs, dim=-1)[:, :, 0].float().contiguous()

    @torch.no_grad()
    def decode(self, latents: Latents) -> Wave:
        """The wave of some latents, `samples_per_frame` samples a frame.

        Raises:
            LmdError: another number of latent channels, or no frames.
        """
        state, waves = self.stream_start(), []
        for begin in range(0, max(1, latents.shape[-1]), CHUNK_FRAMES):
            last = begin + CHUNK_FRAMES >= latents.shape[-1]
            chunk = latents[..., begin : begin + CHUNK_FRAMES]
            wave, state = self.stream_decode(state, chunk, last)
            waves.append(wave)
        return torch.cat(waves, dim=-1)

    def stream_start(self) -> StreamDecodeState:
        """The streaming state before the first latent."""
        return StreamDecodeState()

    @torch.no_grad()
    def stream_decode(
        self,
        state: StreamDecodeState,
        latents: Latents,
        last: bool = False,
        guess: BlockLatents | None = None,
    ) -> tuple[Wave, StreamDecodeState]:
        """Decode the next frames of a stream, computing nothing twice.

        The samples equal those of one decode of the whole stream. They come `lookahead_frames`
        frames late, so the first calls return less than they are given; `last` returns the rest.

        Args:
            state: what the previous call returned; `stream_start()` to begin.
            latents: `[batch, latent, frame]`, at least one frame.
            last: the stream ends here.
            guess: what might follow: return the rest as if the stream ended behind it; the next
                state knows nothing of that.

        Returns:
            The samples that are certain now (whole frames) and the next state.

        Raises:
            LmdError: another number of latent channels, no frames, or another batch size than
                before; the state is untouched.
        """
        if guess is not None:
            wave, state = self.stream_decode(state, latents)
            rest, _ = self.stream_decode(state, guess, last=True)
            return torch.cat([wave, rest], dim=-1), state
        self._check_latents(latents, state)
        layers = state.layers or tuple(stage.start(len(latents)) for stage in self.decoder)
        x = to_signal(latents.to(self.device, self.dtype))
        y, layers = step_stages(self.decoder, x, layers, last)
        wave = y[:, :, 0].float()
        if state.held is not None:
            wave = torch.cat([state.held, wave], dim=-1)
        n_frames = state.n_frames + latents.shape[-1]
        n_certain = n_frames if last else max(0, n_frames - self.lookahead_frames)
        n = n_certain * self.samples_per_frame - state.n_emitted
        held = wave[..., n:].clone()
        return wave[..., :n].contiguous(), StreamDecodeState(
            layers, held, n_frames, state.n_emitted + n
        )

    def _check_wave(self, wave: Wave) -> None:
        if not self.encoder:
            raise LmdError(
                "a codec whose encoder was let go", "a whole codec", "Load the codec again."
            )
        _, channels, n = wave.shape
        if channels != self.channels or n == 0 or n % self.samples_per_frame:
            raise LmdError(
                f"a wave of {channels} channels and {n} samples",
                f"{self.channels} channels and a multiple of {self.samples_per_frame} samples",
                "Convert the channels and pad or cut the end.",
            )
        if not torch.isfinite(wave).all():
            raise LmdError("audio with NaN or infinite samples", "finite ones", "Repair the file.")

    def _check_latents(self, latents: Latents, state: StreamDecodeState) -> None:
        batch, channels, n = latents.shape
        if channels != self.latent_dim or n == 0:
            raise LmdError(
                f"latents of {channels} channels and {n} frames",
                f"{self.latent_dim} channels and at least one frame",
                "Use the codec that the model was trained with.",
            )
        if state.held is not None and len(state.held) != batch:
            raise LmdError(
                f"a batch of {batch} in a stream of {len(state.held)}",
                "the batch size that the stream began with",
                "Begin a new stream with StreamDecodeState().",
            )


def decoder_reach_frames(config: OobleckConfig) -> tuple[int, int]:
    """How many latent frames before and after a frame its samples depend on.

    Every layer widens the interval of positions that it needs; from the output back to the input.
    """
    first, last = 0 - 3, config.samples_per_frame - 1 + 3  # the last convolution has seven taps
    for stride in config.strides:  # the block next to the output first
        first, last = first - RESIDUAL_REACH, last + RESIDUAL_REACH
        first = (first + stride // 2) // stride - 1
        last = (last + stride // 2) // stride
    return -(first - 3), last + 3


def build_reference(config: OobleckConfig) -> nn.Module:
    """Diffusers' autoencoder of that size with fresh weights.

    Raises:
        LmdError: sizes that do not fit together.
    """
    from diffusers import AutoencoderOobleck
    from diffusers.models.autoencoders.autoencoder_oobleck import weight_norm

    if len(config.strides) != len(config.c_mults) or any(s < 2 or s % 2 for s in config.strides):
        raise LmdError(
            f"strides {config.strides} with channel multiples {config.c_mults}",
            "as many of the one as of the other, all strides even",
            "Check the autoencoder's config.",
        )
    with warnings.catch_warnings():  # diffusers uses torch's older weight norm
        warnings.filterwarnings("ignore", message=".*weight_norm.*", category=FutureWarning)
        network = AutoencoderOobleck(
            encoder_hidden_size=config.channels,
            downsampling_ratios=list(config.strides),
            channel_multiples=list(config.c_mults),
            decoder_channels=config.channels,
            decoder_input_channels=config.latent_dim,
            audio_channels=config.audio_channels,
            sampling_rate=config.sample_rate,
        )
        if 2 * config.latent_dim != config.channels:  # diffusers takes the two to be equal
            width = config.channels * config.c_mults[-1]
            end = nn.Conv1d(width, 2 * config.latent_dim, kernel_size=3, padding=1)
            network.encoder.conv2 = weight_norm(end)
    for layer in network.modules():
        if hasattr(layer, "weight_g"):
            del layer.weight  # a second copy of all weights, made anew in every forward pass
    return network.eval().requires_grad_(False)


def reference_network(
    config: OobleckConfig, tensors: Mapping[str, Tensor], source: str = "these tensors"
) -> nn.Module:
    """Diffusers' autoencoder with the given weights.

    Raises:
        LmdError: lists weights that are missing, unknown or of another shape.
    """
    return build_loaded(lambda: build_reference(config), tensors, source)


def random_codec(
    config: OobleckConfig, seed: int = 0, dtype: torch.dtype = torch.float32
) -> OobleckCodec:
    """A codec with random weights: for measuring speed, and for tests."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return OobleckCodec(build_reference(config), config, dtype)


def decoder_flops_per_frame(config: OobleckConfig) -> int:
    """Floating-point operations (two per multiply-add) of decoding one frame, convolutions only."""
    widths = [config.channels * m for m in (1, *config.c_mults)]
    total = 7 * config.latent_dim * widths[-1]
    positions = 1
    for index in reversed(range(len(config.strides))):
        total += positions * widths[index + 1] * widths[index] * 2 * config.strides[index]
        positions *= config.strides[index]
        total += positions * 3 * (7 + 1) * widths[index] ** 2
    return 2 * (total + positions * 7 * widths[0] * config.audio_channels)


STAGES = {"encoder": ("res_unit1", "res_unit2", "res_unit3", "snake1", "conv1")}
STAGES["decoder"] = ("snake1", "conv_t1", "res_unit1", "res_unit2", "res_unit3")
UNIT = ("snake1", "conv1", "snake2", "conv2")


def from_stable_audio(name: str, config: OobleckConfig) -> str | None:
    """Diffusers' name of a weight that stable-audio-tools calls `name` ("decoder.layers.1.…").

    None if it is not one of this autoencoder's. Shapes agree, but for Snake's vectors: `[channel]`
    there, `[1, channel, 1]` here.
    """
    match = re.fullmatch(r"(encoder|decoder)\.layers\.(\d+)((?:\.layers\.\d+)*)\.(\w+)", name)
    if not match:
        return None
    side, outer, parameter = match[1], int(match[2]), match[4]
    inner = [int(part) for part in re.findall(r"\d+", match[3])]
    n = len(config.strides)
    ends = {0: "conv1", n + 1: "snake1", n + 2: "conv2"}
    if outer in ends and not inner:
        return f"{side}.{ends[outer]}.{parameter}"
    if 1 <= outer <= n and 1 <= len(inner) <= 2 and inner[0] < 5 and max(inner[1:], default=0) < 4:
        parts = [STAGES[side][inner[0]], *(UNIT[i] for i in inner[1:])]
        return f"{side}.block.{outer - 1}.{'.'.join(parts)}.{parameter}"
    return None
