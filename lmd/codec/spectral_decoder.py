"""The network that decodes spectral latents, in steps: levels and phase advances, nothing twice."""

import torch
import torch.nn.functional as F
from einops import rearrange
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
    x: Float[Tensor, "*rows inputs"],
    weight: Float[Tensor, "outputs inputs"],
    bias: Float[Tensor, " outputs"],
) -> Float[Tensor, "*rows outputs"]:
    """A linear layer whose rows do not depend, not even in rounding, on how many there are.

    Matrix products of other sizes round otherwise, and phases that are integrated for a second
    make that audible. So without gradients rows are taken `TILE` at a time.
    """
    if torch.is_grad_enabled() or torch.compiler.is_exporting():
        return F.linear(x, weight, bias)
    rows = x.reshape(-1, x.shape[-1])
    padded = F.pad(rows, (0, 0, 0, -len(rows) % TILE))
    out = x.new_empty(len(padded), len(weight))
    for tile, part in zip(padded.split(TILE), out.split(TILE), strict=True):
        torch.addmm(bias, tile, weight.T, out=part)
    return out[: len(rows)].reshape(*x.shape[:-1], len(weight))


def same_depthwise(
    layer: nn.Conv1d, x: Float[Tensor, "batch padded width"]
) -> Float[Tensor, "batch frame width"]:
    """A depthwise convolution over padded frames, tap by tap, for the same reason."""
    if torch.is_grad_enabled() or torch.compiler.is_exporting():
        return layer(x.transpose(1, 2)).transpose(1, 2)
    n = max(0, x.shape[1] - KERNEL + 1)
    out = layer.bias.repeat(len(x), n, 1)
    taps = layer.weight[:, 0].T.contiguous()  # strided ones would not be multiplied eight at a time
    for first in range(0, n, CACHED):
        part = out[:, first : first + CACHED]
        for tap, weights in enumerate(taps, first):
            part.addcmul_(x[:, tap : tap + part.shape[1]], weights)
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

    def forward(self, past: Past, x: Steps, end: Past) -> tuple[Steps, Past]:
        """The frames that are certain now, and all that the convolution saw.

        Args:
            past: the frames before `x` that it sees again.
            x: the next frames.
            end: as many zeros as the stream is short of at its end, else none.
        """
        seen = torch.cat([past, x, end.expand(-1, -1, x.shape[-1])], dim=1)
        y = same_depthwise(self.depthwise, seen)
        skipped = seen[:, self.pad[0] : self.pad[0] + y.shape[1]]
        y = F.gelu(same_linear(self.norm(y), self.expand.weight, self.expand.bias))
        y = same_linear(y, self.contract.weight, self.contract.bias)
        return skipped + self.scale * y, seen


class SpectralDecoder(nn.Module):
    """Latents to magnitudes and phase advances: blocks at the latent rate, then at the STFT rate.

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
        self.graph = None  # `network` as an exported graph, where that plays
        self.norm = nn.LayerNorm(config.step_width)
        self.level = nn.Linear(config.step_width, n_bins)
        self.advance = nn.Linear(config.step_width, 4 * n_bins)

    def reach_steps(self) -> tuple[int, int]:
        """How many steps before and after a step its levels and advances depend on."""
        back, ahead = (
            self.config.hops_per_frame * (1 + sum(block.pad[side] for block in self.blocks))
            + sum(block.pad[side] for block in self.step_blocks)
            for side in (0, 1)
        )
        return back, ahead

    def forward(self, latents: Latents) -> Advances:
        """Levels in decibels, advances in time and to the next bin: all `[batch, bin, step]`."""
        return self.step(latents, (), last=True)[0]

    def step(
        self, latents: Latents, past: tuple[Past, ...], last: bool, n_guessed: int = 0
    ) -> tuple[Advances, tuple[Past, ...], int]:
        """The next steps of a stream of latents, as far as they are certain.

        Args:
            latents: the next ones.
            past: what the step before returned; `()` to begin.
            last: nothing comes after these latents.
            n_guessed: so many of the latents, at their end, will be others when they come.

        Returns:
            What `forward` returns, for the steps that are certain now; the next `past`, which knows
            nothing of guesses; and how many of the steps no guess has touched.
        """
        past = past or self._silence(latents)
        is_full = all(p.shape[1] == reach for p, reach in zip(past, self.reaches, strict=True))
        network = self.graph if self.graph is not None and is_full else self.network
        end = latents.new_zeros(len(latents), int(last), 1)
        level, advance, *seen = network(latents, end, *past)
        kept, n_certain = [], latents.shape[-1] - n_guessed
        for index, (saw, before, reach) in enumerate(zip(seen, past, self.reaches, strict=True)):
            if index == 1 + len(self.blocks):
                n_certain *= self.config.hops_per_frame
            n_known = before.shape[1] + n_certain
            n_certain = max(0, n_known - reach)
            kept.append(saw[:, n_certain:n_known])
        return self._advances(level, advance), tuple(kept), n_certain

    @property
    def reaches(self) -> list[int]:
        """How many frames of its past every convolution sees again, the first one's first."""
        return [2] + [KERNEL - 1] * (len(self.blocks) + len(self.step_blocks))

    def network(self, latents: Latents, end: Past, *past: Past) -> tuple[Tensor, ...]:
        """The network alone: levels, raw advances, and what every convolution saw.

        Args:
            latents: `[batch, latent, frame]`.
            end: zeros `[batch, 1, 1]` where the stream ends here, else `[batch, 0, 1]`.
            past: of every convolution, `[batch, frame, width]`.
        """
        enter, *pasts = past
        last = end.expand(-1, -1, latents.shape[1])
        seen = [torch.cat([enter, rearrange(latents, "b c n -> b n c"), last], dim=1)]
        x = self._enter(seen[0])
        for block, before in zip(self.blocks, pasts, strict=False):
            x, saw = block(before, x, end.repeat(1, block.pad[1], 1))
            seen.append(saw)
        x = same_linear(x, self.split.weight, self.split.bias)
        x = rearrange(x, "b n (hop w) -> b (n hop) w", w=self.config.step_width)
        for block, before in zip(self.step_blocks, pasts[len(self.blocks) :], strict=True):
            x, saw = block(before, x, end.repeat(1, block.pad[1], 1))
            seen.append(saw)
        x = self.norm(x)
        level = same_linear(x, self.level.weight, self.level.bias)
        return level, same_linear(x, self.advance.weight, self.advance.bias), *seen

    def _silence(self, latents: Latents) -> tuple[Past, ...]:
        """What the convolutions see before the first frame."""
        blocks = [*self.blocks, *self.step_blocks]
        sizes = [(1, latents.shape[1]), *((b.pad[0], b.norm.weight.numel()) for b in blocks)]
        return tuple(latents.new_zeros(len(latents), *size) for size in sizes)

    def _advances(self, level: Tensor, advance: Tensor) -> Advances:
        """Decibels, and advances as complex numbers, `[batch, bin, step]`."""
        level = rearrange(level, "b n bin -> b bin n").float() * DB_SCALE
        advance = rearrange(
            advance.float(), "b n (two bin part) -> b n two bin part", two=2, part=2
        )
        in_time, in_frequency = torch.view_as_complex(advance.contiguous()).unbind(2)
        return level, in_time.transpose(1, 2), in_frequency.transpose(1, 2)

    def _enter(self, seen: Past) -> Steps:
        """The first convolution, as one linear map of three frames."""
        weight, bias = self.enter.weight, self.enter.bias
        if torch.is_grad_enabled() or torch.compiler.is_exporting():
            return F.conv1d(seen.transpose(1, 2), weight, bias).transpose(1, 2)
        n = max(0, seen.shape[1] - 2)
        x = torch.stack([seen[:, tap : tap + n] for tap in range(3)], dim=-1).flatten(2)
        return same_linear(x, weight.flatten(1), bias)
