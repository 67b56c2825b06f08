"""The network that decodes spectral latents, in steps: levels and phase advances, nothing twice."""

import math

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from lmd.codec import phase
from lmd.config import SpectralCodecConfig
from lmd.shapes import Latents

Decibels = Float[Tensor, "batch bin step"]
Advances = tuple[Decibels, phase.Spectrum, phase.Spectrum]  # levels, in time, to the next bin
Steps = Float[Tensor, "batch _ width"]
Past = Float[Tensor, "batch _ _"]  # the frames that a convolution will see again
DB_SCALE = 20.0  # network units per decibel are 1 / DB_SCALE
KERNEL = 7
TILE = 64  # rows of a matrix product while decoding
CACHED = 128  # frames that stay in the cache while all taps of a convolution pass over them


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
    return out[: len(rows)].reshape(*x.shape[:-1], layer.out_features)


def same_depthwise(
    layer: nn.Conv1d, x: Float[Tensor, "batch padded width"]
) -> Float[Tensor, "batch frame width"]:
    """A depthwise convolution over padded frames, tap by tap, for the same reason."""
    if torch.is_grad_enabled():
        return layer(x.transpose(1, 2)).transpose(1, 2)
    n = max(0, x.shape[1] - KERNEL + 1)
    out = layer.bias.repeat(len(x), n, 1)
    taps = layer.weight[:, 0].T.contiguous()  # strided ones would not be multiplied eight at a time
    for first in range(0, n, CACHED):
        part = out[:, first : first + CACHED]
        for tap, weights in enumerate(taps, first):
            part.addcmul_(x[:, tap : tap + part.shape[1]], weights)
    return out


def joined(past: Tensor, x: Tensor, n_ahead: int, last: bool) -> Tensor:
    """What a convolution sees: its past, what is new, and zeros where the stream ends."""
    end = x.new_zeros(len(x), n_ahead if last else 0, x.shape[2])
    return torch.cat([past, x, end], dim=1)


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

    def step(self, x: Steps, past: Past, last: bool, n_certain: int) -> tuple[Steps, Past, int]:
        """The frames that can be told now, the past of the next step, how many stay as they are.

        Args:
            x: the next frames; the first `n_certain` will not change, the others are guesses.
            past: what the step before kept.
            last: nothing comes after `x`.
            n_certain: see `x`.
        """
        seen = joined(past, x, self.pad[1], last)
        y = same_depthwise(self.depthwise, seen)
        n, n_known = y.shape[1], past.shape[1] + n_certain
        y = F.gelu(same_linear(self.expand, self.norm(y)))
        y = seen[:, self.pad[0] : self.pad[0] + n] + self.scale * same_linear(self.contract, y)
        n_certain = max(0, n_known - KERNEL + 1)
        return y, seen[:, n_certain:n_known], n_certain


class SpectralDecoder(nn.Module):
    """Latents to magnitudes and phase advances.

    Blocks at the latent rate, then at the STFT rate. One frame of look-ahead each for the first
    convolution, the first block, and four steps at the STFT rate.

    It decodes in steps: every convolution keeps the frames that it will see again, and gives out
    what is certain. A whole decode is one step that is the last, so both are the same code.
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
        return math.ceil(self.lookahead_steps / self.config.hops_per_frame)

    @property
    def lookahead_steps(self) -> int:
        """So many steps later than their latents are levels and advances certain."""
        at_frames = 1 + sum(block.pad[1] for block in self.blocks)
        at_steps = sum(block.pad[1] for block in self.step_blocks)
        return at_frames * self.config.hops_per_frame + at_steps

    def forward(self, latents: Latents) -> Advances:
        """Levels in decibels, advances in time and to the next bin: all `[batch, bin, step]`."""
        return self.step(latents, (), last=True)[0]

    def step(
        self, latents: Latents, past: tuple[Past, ...], last: bool, n_guessed: int = 0
    ) -> tuple[Advances, tuple[Past, ...], int]:
        """The next steps of a stream of latents, as far as they can be told.

        Args:
            latents: the next ones.
            past: what the step before returned; `()` to begin.
            last: nothing comes after these latents.
            n_guessed: so many of the latents, at their end, will be others when they come.

        Returns:
            What `forward` returns, for the steps that can be told now; the next `past`, which knows
            nothing of guesses; and how many of the steps no guess has touched.
        """
        enter, *pasts = past or self._silence(latents)
        n_known = enter.shape[1] + latents.shape[-1] - n_guessed
        seen = joined(enter, latents.transpose(1, 2), 1, last)
        x, n_certain = self._enter(seen), max(0, n_known - 2)
        kept = [seen[:, n_certain:n_known]]
        n_blocks = len(self.blocks)
        for block, before in zip(self.blocks, pasts[:n_blocks], strict=True):
            x, after, n_certain = block.step(x, before, last, n_certain)
            kept.append(after)
        x = same_linear(self.split, x)
        x = x.reshape(len(x), x.shape[1] * self.config.hops_per_frame, self.config.step_width)
        n_certain *= self.config.hops_per_frame
        for block, before in zip(self.step_blocks, pasts[n_blocks:], strict=True):
            x, after, n_certain = block.step(x, before, last, n_certain)
            kept.append(after)
        return self._advances(self.norm(x)), tuple(kept), n_certain

    def _silence(self, latents: Latents) -> list[Past]:
        """What the convolutions see before the first frame."""
        blocks = [*self.blocks, *self.step_blocks]
        sizes = [(1, latents.shape[1]), *((b.pad[0], b.norm.weight.numel()) for b in blocks)]
        return [latents.new_zeros(len(latents), *size) for size in sizes]

    def _advances(self, x: Steps) -> Advances:
        level = same_linear(self.level, x).transpose(1, 2).float() * DB_SCALE
        in_time, in_frequency = torch.view_as_complex(
            same_linear(self.advance, x).float().unflatten(-1, (2, -1, 2)).contiguous()
        ).unbind(2)
        return level, in_time.transpose(1, 2), in_frequency.transpose(1, 2)

    def _enter(self, seen: Past) -> Steps:
        """The first convolution, as one linear map of three frames."""
        if torch.is_grad_enabled():
            return F.conv1d(seen.transpose(1, 2), self.enter.weight, self.enter.bias).transpose(
                1, 2
            )
        n = max(0, seen.shape[1] - 2)
        x = torch.stack([seen[:, tap : tap + n] for tap in range(3)], dim=-1).flatten(2)
        weights = nn.Linear(x.shape[-1], self.config.width, device="meta")
        weights.weight = nn.Parameter(self.enter.weight.flatten(1), requires_grad=False)
        weights.bias = self.enter.bias
        return same_linear(weights, x)
