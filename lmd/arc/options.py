"""What a run of ARC-Forcing is: its numbers, which are the flags of `lmd train arc`.

Source: Live Music Diffusion Models (arXiv 2605.22717), ARC-Forcing; ARC (arXiv 2505.08175).
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, ClassVar

import tyro

from lmd.arc.discriminator import PATCH_FRAMES
from lmd.config import REGIMES, check_block
from lmd.errors import LmdError
from lmd.stream.samplers import LOG_SNR_END, LOG_SNR_START, SamplerName
from lmd.training.options import Hidden, RunOptions

MOST = 1000  # steps of a block, blocks of a rollout, frames of a block


@dataclass(frozen=True, kw_only=True)
class ArcRun(RunOptions):
    """A run of ARC-Forcing. Several values with commas are drawn alike: `--blocks 2,4,8`.

    Sources: weight decay, clipping, moving average, context dropout, noise levels of the
    discriminator and contrastive weight are those of arXiv 2605.22717's ARC configs. Ours: several
    step counts (their noise levels are nested), both regimes, shorter rollouts; no momentum (they
    have 0.9), since in `notebooks/toy_world.py` the two networks then chase each other (see
    docs/log.md); learning rates, which they have at 1e-6 for a model 26 times larger, batches ten
    times larger and 18,000 updates.

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
        text_dropout: share of rollouts without their prompt, in both networks alike.
        from_silence: share of rollouts from silence.
        last_block: of the base, in the discriminator.
    """

    stage: ClassVar[str] = "arc"
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
    sampler: SamplerName = "pingpong"
    plays_out: bool = False
    regimes: str = "block-causal,enc-dec"
    contrastive: float = 1.0
    r1: float = 0.01
    r2: float = 0.01
    text_dropout: float = 0.1
    from_silence: float = 0.25
    context_dropout_part: Hidden[float] = 0.1  # share of rollouts without the oldest blocks
    last_block: str = "blocks.3"
    context_frames: Hidden[int] = 192
    window_frames: Hidden[int] = 240  # the length that the model is conditioned on, as in a stream
    frame_rate_hz: Hidden[float] = 22_050 / 1024
    log_snr: Hidden[tuple[float, float]] = (LOG_SNR_START, LOG_SNR_END)  # where it is scored

    def check(self) -> None:
        """See `RunOptions.check`; in some update the generator has to learn."""
        if self.n_updates < self.warmup + 2:
            raise LmdError(
                f"--updates {self.n_updates} with --warmup {self.warmup}",
                f"{self.warmup + 2} or more: behind the warm-up, every second one trains the "
                "generator",
                "Raise --updates, or lower --warmup.",
            )
        names = self.regimes.split(",")
        if not set(names) <= set(REGIMES):
            found = f"--regimes {self.regimes!r}"
            raise LmdError(found, f"some of {REGIMES} with commas", "Correct the names.")
        numbers(self.steps, "--steps")
        for o in numbers(self.block_frames, "--block-frames"):
            check_block(self.context_frames, o)
            for n in numbers(self.blocks, "--blocks"):
                if (n * o) % PATCH_FRAMES:
                    raise LmdError(
                        f"a rollout of {n} blocks of {o} frames",
                        f"a multiple of {PATCH_FRAMES} frames",
                        "Choose other block lengths or numbers of blocks.",
                    )

    @property
    def n_steps(self) -> int:
        """Optimizer steps of the run: one in each update."""
        return self.n_updates

    def starts(self) -> dict[str, Path | None]:
        """The weights that a run begins with, by option."""
        return {"init": self.init, "base": self.discriminator}


def numbers(text: str, name: str = "") -> tuple[int, ...]:
    """`8,4,2` as numbers.

    Raises:
        LmdError: something that is not a positive whole number, or too large a one.
    """
    words = [word.strip() for word in text.split(",")]
    if not all(word.isdecimal() and 0 < int(word) <= MOST for word in words):
        found = f"{name} {text!r}"
        raise LmdError(found, f"whole numbers from 1 to {MOST} with commas", "E.g. 8,4,2.")
    return tuple(map(int, words))
