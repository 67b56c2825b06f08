"""What a run of ARC-Forcing is: its numbers, and the flags of `lmd train arc`.

Source: Live Music Diffusion Models (arXiv 2605.22717), ARC-Forcing; ARC (arXiv 2505.08175).
"""

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated

import tyro

from lmd.arc.discriminator import PATCH_FRAMES, HeadConfig
from lmd.arc.losses import LossWeights
from lmd.config import REGIMES, Regime, check_block, preset
from lmd.errors import LmdError
from lmd.stream.samplers import LOG_SNR_END, LOG_SNR_START, SamplerName
from lmd.training.draws import ContextOptions, Hidden
from lmd.training.options import RunOptions

MOST = 1000  # steps of a block, blocks of a rollout, frames of a block


@dataclass(frozen=True)
class ArcOptions(ContextOptions):
    """What updates draw. Shares need not sum to one.

    Sources: context dropout, noise levels of the discriminator, contrastive weight and head are
    those of arXiv 2605.22717's configs. Ours: several step counts (their noise levels are nested),
    both regimes, shorter rollouts.
    """

    context_dropout_all: float = 0.25
    context_dropout_part: float = 0.1
    window_frames: int = 240  # the length that the model is conditioned on while it streams
    frame_rate_hz: float = 22_050 / 1024
    regimes: tuple[tuple[Regime, float], ...] = (("block-causal", 0.5), ("enc-dec", 0.5))
    block_lengths: tuple[tuple[int, float], ...] = ((48, 1.0),)
    n_blocks: tuple[tuple[int, float], ...] = ((8, 1.0),)  # of a rollout
    n_steps: tuple[tuple[int, float], ...] = ((8, 0.4), (4, 0.3), (2, 0.3))
    sampler: SamplerName = "pingpong"
    plays_out: bool = False  # see RolloutPlan; False in arXiv 2605.22717
    text_dropout: float = 0.1  # once per rollout, for both networks alike
    log_snr: tuple[float, float] = (LOG_SNR_START, LOG_SNR_END)  # what the discriminator sees
    weights: LossWeights = field(default_factory=LossWeights)
    n_warmup: int = 100  # first updates, of the discriminator alone
    last_block: str = "blocks.3"  # of the base, in the discriminator
    head: HeadConfig = field(default_factory=HeadConfig)

    def __post_init__(self) -> None:
        for o, _ in self.block_lengths:
            check_block(self.context_frames, o)
            for n, _ in self.n_blocks:
                if n < 1 or (n * o) % PATCH_FRAMES:
                    raise LmdError(
                        f"a rollout of {n} blocks of {o} frames",
                        f"a positive multiple of {PATCH_FRAMES} frames",
                        "Choose other block lengths or numbers of blocks.",
                    )


@dataclass(frozen=True, kw_only=True)
class ArcRun(RunOptions):
    """A run of ARC-Forcing. Several values with commas are drawn alike: `--blocks 2,4,8`.

    Sources: weight decay, clipping and the moving average are those of arXiv 2605.22717's ARC
    configs. Ours: no momentum (they have 0.9), since in `notebooks/toy_world.py` the two then
    chase each other (see docs/log.md); learning rates, which they have at 1e-6 for a model 26
    times larger, batches ten times larger and 18,000 updates.

    Attributes:
        out: the run's folder: checkpoints, logs, weights; a run goes on there.
        init: the live model, which becomes the generator.
        discriminator: the base, which becomes the discriminator.
        n_updates: of both networks together.
        lr_generator: learning rate.
        lr_discriminator: learning rate.
        ema: decay of the averaged weights.
        checkpoint_every: updates from one checkpoint to the next.
        warmup: first updates, of the discriminator alone.
        blocks: blocks of a rollout.
        block_frames: block length.
        steps: step counts that inference will use.
        sampler: how a block is sampled.
        plays_out: blocks do not end with the call that learns.
        regimes: who sees whom.
        contrastive: weight; 0 turns the term off.
        r1: smoothness around real music.
        r2: smoothness around rollouts.
        text_dropout: share of rollouts without their prompt.
        from_silence: share of rollouts from silence.
        last_block: of the base, in the discriminator.
    """

    out: Path = Path("runs/arc")
    init: Path = Path("data/pretrained/finetuned.safetensors")
    discriminator: Annotated[Path, tyro.conf.arg(name="base")] = Path(
        "data/pretrained/base.safetensors"
    )
    n_updates: Annotated[int, tyro.conf.arg(name="updates")] = 1000
    lr_generator: float = 2e-5
    lr_discriminator: float = 1e-4
    betas: Hidden[tuple[float, float]] = (0.0, 0.95)
    weight_decay: Hidden[float] = 0.01
    clip_norm: Hidden[float] = 1.0
    ema: float = 0.99
    checkpoint_every: int = 50
    winning_accuracy: Hidden[float] = 0.98  # above this for so many updates, it has won
    winning_updates: Hidden[int] = 30
    warmup: int = 100
    blocks: str = "8"
    block_frames: str = "48"
    steps: str = "8,4,2"
    sampler: SamplerName = ArcOptions.sampler
    plays_out: bool = False
    regimes: str = "block-causal,enc-dec"
    contrastive: float = 1.0
    r1: float = 0.01
    r2: float = 0.01
    text_dropout: float = ArcOptions.text_dropout
    from_silence: float = ArcOptions.context_dropout_all
    last_block: str = ArcOptions.last_block
    arc: Hidden[ArcOptions] = field(default_factory=ArcOptions)

    @property
    def n_steps(self) -> int:
        """Optimizer steps of the run: one in each update."""
        return self.n_updates

    def starts(self) -> dict[str, Path | None]:
        """The weights that a run begins with, by option."""
        return {"init": self.init, "base": self.discriminator}

    def resolved(self) -> "ArcRun":
        """The same with `arc` as the flags say.

        Raises:
            LmdError: numbers out of their limits, an unknown regime, lengths that do not fit, or no
                update in which the generator learns.
        """
        if self.n_updates < self.warmup + 2:
            raise LmdError(
                f"--updates {self.n_updates} with --warmup {self.warmup}",
                f"{self.warmup + 2} or more: behind the warm-up, every second one trains the "
                "generator",
                "Raise --updates, or lower --warmup.",
            )
        names = tuple(word.strip() for word in self.regimes.split(","))
        if not set(names) <= set(REGIMES):
            found = f"--regimes {self.regimes!r}"
            raise LmdError(found, f"some of {REGIMES}", "Correct the names.")
        sizes = preset(self.preset)
        arc = ArcOptions(
            context_frames=sizes.window.context_frames,
            window_frames=sizes.window.window_frames,
            frame_rate_hz=sizes.frame_rate_hz,
            regimes=tuple((name, 1.0) for name in names),
            block_lengths=numbers(self.block_frames, "--block-frames"),
            n_blocks=numbers(self.blocks, "--blocks"),
            n_steps=numbers(self.steps, "--steps"),
            sampler=self.sampler,
            plays_out=self.plays_out,
            text_dropout=self.text_dropout,
            context_dropout_all=self.from_silence,
            weights=LossWeights(self.contrastive, self.r1, self.r2),
            n_warmup=self.warmup,
            last_block=self.last_block,
            head=HeadConfig.of(sizes.dit.width),
        )
        return replace(self, arc=arc)


def numbers(text: str, name: str) -> tuple[tuple[int, float], ...]:
    """`8,4,2` as equally shared options.

    Raises:
        LmdError: something that is not a positive whole number, or too large a one.
    """
    words = [word.strip() for word in text.split(",")]
    if not all(word.isdecimal() and 0 < int(word) <= MOST for word in words):
        found = f"{name} {text!r}"
        raise LmdError(found, f"whole numbers from 1 to {MOST} with commas", "E.g. 8,4,2.")
    return tuple((int(word), 1.0) for word in words)
