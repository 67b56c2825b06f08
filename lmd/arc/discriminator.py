"""The discriminator of ARC-Forcing: a bidirectional base's trunk with a head that gives scores.

Source: Live Music Diffusion Models (arXiv 2605.22717), discriminator; ARC (arXiv 2505.08175);
ConvNeXt (arXiv 2201.03545). Taught in notebook 03_arc_forcing.
"""

from copy import deepcopy
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from lmd.errors import LmdError
from lmd.model.dit import Condition, frame_positions
from lmd.model.live_model import LiveModel
from lmd.shapes import Latents, NoiseLevel

Scores = Float[Tensor, "batch patch"]  # higher = more like music that somebody made
PATCH_FRAMES = 4  # frames under one score: two convolutions of stride 2


@dataclass(frozen=True)
class HeadConfig:
    """The discriminator's head; there is one more of `channels` than of `strides`."""

    channels: tuple[int, ...] = (128, 128, 256, 512)
    strides: tuple[int, ...] = (1, 2, 2)
    n_blocks: int = 2  # ConvNeXt blocks before each strided convolution

    @classmethod
    def of(cls, width: int) -> "HeadConfig":
        """The paper's head for models at least 256 wide, a narrower one for smaller models."""
        c = min(128, width // 2)
        return cls((c, c, 2 * c, 4 * c))


class ConvNeXtBlock(nn.Module):
    """Depthwise convolution over time, then a per-frame MLP, added to its input; starts as zero."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.depthwise = nn.Conv1d(channels, channels, 7, padding=3, groups=channels)
        self.expand = nn.Conv1d(channels, 4 * channels, 1)
        self.project = nn.Conv1d(4 * channels, channels, 1)
        nn.init.zeros_(self.project.weight)
        nn.init.zeros_(self.project.bias)

    def forward(self, x: Latents) -> Latents:
        """`[batch, channel, frame]` in and out."""
        return x + self.project(F.gelu(self.expand(self.depthwise(x))))


class ScoreHead(nn.Module):
    """Features of frames to one score per `PATCH_FRAMES` frames: score p is about frames 4p...4p+3.

    Every convolution is centred on its patch, so that labels stay where the frames are.
    """

    def __init__(self, width: int, config: HeadConfig) -> None:
        super().__init__()
        first, *rest = config.channels
        self.norm = nn.LayerNorm(width)
        layers: list[nn.Module] = [nn.Conv1d(width, first, 7, padding=3)]
        for n_in, n_out, stride in zip(config.channels[:-1], rest, config.strides, strict=True):
            layers += [ConvNeXtBlock(n_in) for _ in range(config.n_blocks)]
            kernel, pad = (2 * stride, stride // 2) if stride > 1 else (1, 0)
            layers.append(nn.Conv1d(n_in, n_out, kernel, stride, pad))
        self.layers = nn.Sequential(*layers)
        self.to_score = nn.Conv1d(config.channels[-1], 1, 3, padding=1)

    def forward(self, features: Float[Tensor, "batch frame width"]) -> Scores:
        """`[batch, frame, width]` to `[batch, frame / 4]`."""
        return self.to_score(self.layers(self.norm(features).transpose(1, 2)))[:, 0]


class Discriminator(nn.Module):
    """The trunk of a bidirectional base, which sees the whole sequence, and a score head."""

    def __init__(self, base: LiveModel, last_block: str, head: HeadConfig | None = None) -> None:
        """Copy what is needed of `base`, trained at the rollout's length: `blocks.3` keeps four.

        Raises:
            LmdError: the base has no such block.
        """
        super().__init__()
        names = [f"blocks.{i}" for i in range(len(base.dit.blocks))]
        if last_block not in names:
            raise LmdError(f"last block {last_block!r}", f"one of {names}", "Pick one of these.")
        self.base = deepcopy(base)
        del self.base.dit.blocks[names.index(last_block) + 1 :]
        del self.base.dit.project_out, self.base.dit.postprocess_conv, self.base.dit.to_input_add
        self.head = ScoreHead(base.config.width, head or HeadConfig())

    def forward(
        self, noisy: Latents, t: NoiseLevel, condition: Condition, first_frame: int
    ) -> Scores:
        """Score the frames from `first_frame` on; what lies before is seen, not scored.

        Returns:
            `[batch, (frame - first_frame) / 4]`.

        Raises:
            LmdError: a rollout that is not a whole number of patches.
        """
        n_frames = noisy.shape[-1]
        if n_frames <= first_frame or (n_frames - first_frame) % PATCH_FRAMES:
            raise LmdError(
                f"a rollout of {n_frames - first_frame} frames",
                f"a positive multiple of {PATCH_FRAMES}",
                "Choose block_frames × n_blocks accordingly.",
            )
        dit = self.base.dit
        tokens = [dit.embed_target(noisy), dit.global_token(t, condition.global_cond)]
        text, scored = dit.text_key_values(condition.tokens), slice(first_frame, n_frames)
        x, _ = dit.trunk(  # the global token is last: frames keep their places
            torch.cat(tokens, dim=1), frame_positions(n_frames), text, output_slice=scored
        )
        return self.head(x)
