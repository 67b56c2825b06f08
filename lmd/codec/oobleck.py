"""Stable Audio's autoencoder as a codec: diffusers' network, fed step by step.

`AutoencoderOobleck` pads every convolution with zeros. Here the same layers are left without
padding: the zeros come in at the beginning and the end of a stream, and each layer keeps the
positions that it will read again. Snake maps zero to zero, so the zeros may stand before it. A
whole decode is one such stream, so streamed and whole decodes are the same code.

Source: Stable Audio Open (arXiv 2407.14358).
"""

import warnings
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.utils import remove_weight_norm

from lmd.codec.base import check_latents, check_wave
from lmd.config import OobleckConfig
from lmd.errors import LmdError
from lmd.model.weights import build_loaded
from lmd.shapes import BlockLatents, Latents, Wave

Signal = Float[Tensor, "batch _ _"]  # batch, channel, position
Memory = tuple[Signal | None, ...]  # what each layer will read again; None before its first input

RESIDUAL_REACH = 3 * (1 + 3 + 9)  # positions that a block's three units see on either side
CHUNK_FRAMES = 64  # a long wave or latent sequence goes through in chunks of this many frames
PIECE_ELEMENTS = 1 << 19  # a layer's activations at a time: 2 MiB in float32, which a cache holds


class StreamedLayer(nn.Module):
    """A layer that takes a signal step by step, half its reach late.

    Args:
        layer: of diffusers' network.
        conv: the convolution in it that reads more than one position; it loses its padding.
    """

    def __init__(self, layer: nn.Module, conv: nn.Conv1d | nn.ConvTranspose1d) -> None:
        super().__init__()
        self.layer, self.n_in, self.n_out = layer, conv.in_channels, conv.out_channels
        stride, pad = conv.stride[0], conv.padding[0]
        if isinstance(conv, nn.ConvTranspose1d):
            # `stride` outputs from every input and the one before it, some dropped at both ends
            self.stride, self.reach, self.n_zeros, self.n_dropped = 1, 1, 1, pad
            elements, conv.padding = self.n_out * stride, conv.stride
        else:
            self.stride, self.n_zeros, self.n_dropped = stride, pad, 0
            self.reach = (conv.kernel_size[0] - 1) * conv.dilation[0]
            elements, conv.padding = max(self.n_out, self.n_in * stride), (0,)
        self.n_piece = max(1, PIECE_ELEMENTS // elements)

    def step(self, x: Signal, past: Signal | None, last: bool) -> tuple[Signal, Signal | None]:
        """The outputs that are certain now, and the inputs that will be read again."""
        if not x.shape[-1] and not last:
            return x.new_zeros(len(x), self.n_out, 0), past
        zeros = x.new_zeros(len(x), self.n_in, self.n_zeros)
        before, after = zeros if past is None else past, zeros if last else zeros[..., :0]
        joined = torch.cat([before, x, after], dim=-1)
        n = (joined.shape[-1] - self.reach - 1) // self.stride + 1
        if n <= 0:
            return x.new_zeros(len(x), self.n_out, 0), joined
        length = (self.n_piece - 1) * self.stride + self.reach + 1
        begins = range(0, n * self.stride, self.n_piece * self.stride)
        y = torch.cat([self.layer(joined[..., b : b + length]) for b in begins], dim=-1)
        end = y.shape[-1] - (self.n_dropped if last else 0)
        begin = self.n_dropped if past is None else 0
        return y[..., begin:end], joined[..., n * self.stride :].clone()


def streamed(half: nn.Module) -> nn.ModuleList:
    """The layers of diffusers' encoder or decoder, which loses its padding, in their order."""
    of_blocks = [part for block in half.block for part in block.children()]
    layers, snake = [], []
    for part in [half.conv1, *of_blocks, half.snake1, half.conv2]:
        if isinstance(part, type(half.snake1)):
            snake = [part]
            continue
        conv = getattr(part, "conv1", part)  # a residual unit's, or a convolution by itself
        layers.append(StreamedLayer(nn.Sequential(*snake, part), conv))
        snake = []
    return nn.ModuleList(layers)


def step_layers(
    layers: nn.ModuleList, x: Signal, past: Memory, last: bool, n_chunk: int
) -> tuple[Signal, Memory]:
    """One step of all layers, `n_chunk` positions of a long signal at a time.

    `past` is what the step before returned, `()` to begin.
    """
    memory, outputs = list(past) or [None] * len(layers), []
    chunks = x.split(n_chunk, dim=-1)
    for number, chunk in enumerate(chunks, start=1):
        y, ends = chunk, last and number == len(chunks)
        for index, layer in enumerate(layers):
            y, memory[index] = layer.step(y, memory[index], ends)
        outputs.append(y)
    return torch.cat(outputs, dim=-1), tuple(memory)


@dataclass(frozen=True)
class StreamDecodeState:
    """What a streamed decode remembers; a value, never changed in place.

    Attributes:
        layers: what every layer will read again; `()` before the first step.
        held: samples that are certain but not yet a whole frame.
        n_frames: latent frames taken so far.
    """

    layers: Memory = ()
    held: Wave | None = None
    n_frames: int = 0


class OobleckCodec(nn.Module):
    """Waves to latents and back, float32 at the border, `dtype` inside.

    Args:
        reference: the network, its weights loaded; its parts are changed and used.
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
        self.decoder = streamed(folded(reference.decoder, dtype))
        self.encoder = streamed(folded(reference.encoder, dtype))

    @property
    def device(self) -> torch.device:
        """Where it computes; waves and latents may come from anywhere."""
        return next(self.decoder.parameters()).device

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
        return cls(build_loaded(lambda: build_reference(config), tensors, source), config, dtype)

    def encode(self, wave: Wave) -> Latents:
        """Latents of a wave, the means of the bottleneck; see `Codec`."""
        return self.encode_parameters(wave).chunk(2, dim=1)[0]

    @torch.no_grad()
    def encode_parameters(self, wave: Wave) -> Latents:
        """What the encoder says before the bottleneck: means, then scales.

        Raises:
            LmdError: see `check_wave`; or the encoder was let go.
        """
        if not self.encoder:
            raise LmdError(
                "a codec whose encoder was let go", "a whole codec", "Load the codec again."
            )
        check_wave(self, wave)
        x, n_chunk = wave.to(self.device, self.dtype), CHUNK_FRAMES * self.samples_per_frame
        return step_layers(self.encoder, x, (), last=True, n_chunk=n_chunk)[0].float()

    @torch.no_grad()
    def decode(self, latents: Latents) -> Wave:
        """The wave of some latents; see `Codec`."""
        return self.stream_decode(self.stream_start(), latents, last=True)[0]

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
        """Decode the next frames, computing nothing twice; see `StreamingCodec`."""
        if guess is not None:
            wave, state = self.stream_decode(state, latents)
            rest, _ = self.stream_decode(state, guess, last=True)
            return torch.cat([wave, rest], dim=-1), state
        check_latents(self, latents, least=1)
        if state.held is not None and len(state.held) != len(latents):
            raise LmdError(
                f"a batch of {len(latents)} in a stream of {len(state.held)}",
                "the batch size that the stream began with",
                "Begin a new stream with stream_start().",
            )
        x = latents.to(self.device, self.dtype)
        y, layers = step_layers(self.decoder, x, state.layers, last, CHUNK_FRAMES)
        wave = y.float() if state.held is None else torch.cat([state.held, y.float()], dim=-1)
        n_frames = state.n_frames + latents.shape[-1]
        n_emitted = max(0, state.n_frames - self.lookahead_frames)
        n_certain = n_frames if last else max(0, n_frames - self.lookahead_frames)
        n = (n_certain - n_emitted) * self.samples_per_frame
        return wave[..., :n], StreamDecodeState(layers, wave[..., n:].clone(), n_frames)


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


def folded(network: nn.Module, dtype: torch.dtype) -> nn.Module:
    """The network with its weight norm carried out, in another precision."""
    for layer in network.modules():
        if hasattr(layer, "weight_g"):
            layer.weight = None  # which is what `remove_weight_norm` replaces
            remove_weight_norm(layer)
    return network.requires_grad_(False).to(dtype)


def random_codec(
    config: OobleckConfig, seed: int = 0, dtype: torch.dtype = torch.float32
) -> OobleckCodec:
    """A codec with random weights: for measuring speed, and for tests."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return OobleckCodec(build_reference(config), config, dtype)
