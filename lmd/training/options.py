"""What a training run is: one dataclass for each command, whose fields are its flags."""

import math
from collections.abc import Iterator
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar, get_type_hints

import tyro

from lmd.config import Regime, check_block
from lmd.errors import LmdError
from lmd.outputs import check_folder

Stage = Literal["base", "finetune", "distill"]
Strategy = Literal["ddp", "fsdp"]
Shares = tuple[tuple[Regime, float], ...]
Lengths = tuple[tuple[int, float], ...]  # in frames, and their shares
T = TypeVar("T")
Hidden = Annotated[T, tyro.conf.Fixed, tyro.conf.Suppress]  # a field that is no flag
Steps = Annotated[int, tyro.conf.arg(name="steps")]


@dataclass(frozen=True, kw_only=True)
class RunOptions:
    """What every training command is asked.

    Attributes:
        out: the run's folder: checkpoints, logs, weights; a run goes on there.
        preset: tiny, small or paper.
        data: what `lmd data encode` wrote.
        init: weights, or a Stable Audio folder, to begin with.
        codec: the codec of these latents; it is copied beside the weights.
        batch: windows per step over all processes.
        accumulate: parts that a process splits its rows into.
        seed: of everything random.
        devices: processes on each machine.
        num_nodes: machines; the same command on each, with torchrun or SLURM.
        strategy: processes copy the weights (ddp) or split them (fsdp).
        accelerator: what to compute on.
        precision: of the products; auto: bf16 where the hardware multiplies it.
        checkpointing: less memory, a third more compute.
        checkpoint_every: steps from one checkpoint to the next.
        no_progress: no progress bar.
    """

    out: Path = Path("runs/run")
    preset: str = "small"
    data: Path = Path("data/latents")
    init: Path | None = None
    codec: Path = Path("data/pretrained/codec.safetensors")
    batch: int = 8
    accumulate: int = 1
    seed: int = 0
    devices: int = 1
    num_nodes: int = 1
    strategy: Hidden[Strategy] = "ddp"
    accelerator: Literal["auto", "cpu", "gpu"] = "auto"
    precision: Literal["auto", "32", "bf16"] = "auto"
    checkpointing: bool = False
    checkpoint_every: int = 200
    no_progress: bool = False

    @property
    def n_processes(self) -> int:
        """On all machines."""
        return self.devices * self.num_nodes

    def starts(self) -> dict[str, Path | None]:
        """The weights that a run may begin with, by option."""
        return {"init": self.init}

    def check(self) -> None:
        """Refuse what does not fit together."""


@dataclass(frozen=True)
class TrainOptions(RunOptions):
    """A run of the base, the fine-tune or the distillation; shares need not sum to one.

    Sources: betas, weight decay, clipping, context dropout and the distillation's teacher are those
    of arXiv 2605.22717 (which has 50 steps and guidance 7 there); the learning rate is higher
    because the model is 26 times smaller; warm-up, constant rate and linear cool-down follow
    arXiv 2405.18392; text dropout for guidance: arXiv 2207.12598. Ours: the shares of regimes and
    block lengths, since one checkpoint is to play all; several targets per pass.

    Attributes:
        n_steps: optimizer steps; a run may be made longer.
        lr: learning rate.
        warmup_steps: steps of rising learning rate.
        ema: decay of the averaged weights that are shipped.
        text_dropout: share of rows taught without their prompt.
        sample_every: steps between sounds of the run and pictures of them; 0: none; by default
            500 where the codec is that of the latents.
        compile: torch.compile: a slow start at every new length, then faster steps.
        lora: rank of low-rank updates; 0 trains all weights.
        long_share: share of steps on 768 frames; ours, keeps three quarters of the compute short.
        short_context: share of steps whose context is 1 … n − 1 blocks, all alike: a stream with a
            shorter memory (`WindowConfig`).
        teacher_steps: sampler steps of the teacher.
        cfg_scale: its guidance.
        n_timesteps: how many of its noise levels the student looks at in one pass.
    """

    stage: Hidden[Stage]
    n_steps: Steps
    lr: float = 5e-4
    warmup_steps: Annotated[int, tyro.conf.arg(name="warmup")] = 100
    cooldown_share: Hidden[float] = 0.2
    betas: Hidden[tuple[float, float]] = (0.9, 0.95)
    weight_decay: Hidden[float] = 0.01
    clip_norm: Hidden[float] = 1.0
    ema: float = 0.999
    text_dropout: float = 0.1
    strategy: Strategy = field(default="ddp", kw_only=True)
    sample_every: int | None = None
    compile: bool = False
    lora: Hidden[int] = 0
    window_frames: Hidden[int] = 240  # of the base
    long_frames: Hidden[int] = 768  # 192 + 12 · 48: what the discriminator of ARC-Forcing sees
    long_share: Hidden[float] = 0.1
    context_frames: Hidden[int] = 192
    context_dropout_all: Hidden[float] = 0.2  # share of rows that lose all of their context
    context_dropout_part: Hidden[float] = 0.3  # its oldest blocks
    regimes: Hidden[Shares] = (("block-causal", 0.6), ("enc-dec", 0.3), ("full", 0.1))
    block_lengths: Hidden[Lengths] = ((48, 0.4), (24, 0.3), (16, 0.15), (12, 0.15))
    short_context: Hidden[float] = 0.25
    target_frames: Hidden[int] = 240  # block-causal: taught in one pass
    enc_dec_frames: Hidden[int] = 192  # enc-dec: the same, as noised copies of one block
    teacher_steps: Hidden[int] = 8
    cfg_scale: Hidden[float] = 1.5
    n_timesteps: Hidden[int] = 4

    def check(self) -> None:
        """See `RunOptions.check`."""
        for block_frames, _ in self.block_lengths:
            for n_frames in (self.context_frames, self.target_frames, self.enc_dec_frames):
                check_block(n_frames, block_frames)
        if not 1 <= self.n_timesteps <= self.teacher_steps:
            raise LmdError(
                f"{self.n_timesteps} timesteps of a trajectory of {self.teacher_steps} steps",
                f"1 to {self.teacher_steps}",
                "Lower --timesteps, or raise --teacher-steps.",
            )

    def lr_factor(self, step: int) -> float:
        """Warm-up, constant, linear cool-down to a twentieth."""
        left = (self.n_steps - step) / max(1.0, self.cooldown_share * self.n_steps)
        return min(1.0, (step + 1) / max(1, self.warmup_steps), max(0.05, left))


@dataclass(frozen=True, kw_only=True)
class BaseRun(TrainOptions):
    """`lmd train base`."""

    stage: Hidden[Stage] = "base"
    n_steps: Steps = 4000
    out: Path = Path("runs/base")
    long_share: float = 0.1


@dataclass(frozen=True, kw_only=True)
class FinetuneRun(TrainOptions):
    """`lmd train finetune`."""

    stage: Hidden[Stage] = "finetune"
    n_steps: Steps = 2000
    lr: float = 2e-4
    lora: int = 0
    out: Path = Path("runs/finetune")
    short_context: float = 0.25


@dataclass(frozen=True, kw_only=True)
class DistillRun(TrainOptions):
    """`lmd train distill`."""

    stage: Hidden[Stage] = "distill"
    n_steps: Steps = 1000
    lr: float = 1e-4
    out: Path = Path("runs/distill")
    init: Path | None = Path("data/pretrained/finetuned.safetensors")
    regimes: Hidden[Shares] = (("block-causal", 0.6), ("enc-dec", 0.4))
    teacher_steps: int = 8
    cfg_scale: float = 1.5
    n_timesteps: Annotated[int, tyro.conf.arg(name="timesteps", aliases=["--points"])] = 4


MANY = 65_536  # no run of this project needs as many rows, parts, processes or frames
LIMITS: dict[str, tuple[float, float]] = {
    **dict.fromkeys(("batch", "accumulate", "devices", "num-nodes"), (1, MANY)),
    **dict.fromkeys(("steps", "updates", "checkpoint-every"), (1, 1e9)),
    **dict.fromkeys(("warmup", "encoder-steps", "adversarial-from", "sample-every"), (0, 1e9)),
    **dict.fromkeys(("lr", "lr-generator", "lr-discriminator", "learning-rate"), (1e-12, 10)),
    **dict.fromkeys(("text-dropout", "from-silence", "short-context", "long-share"), (0, 1)),
    **dict.fromkeys(("noise", "contrastive", "r1", "r2", "cfg-scale"), (0, 1000)),
    "ema": (0, 1 - 1e-6),
    "lora": (0, 1024),
    "teacher-steps": (1, 1000),
    "frames": (2, 4096),  # a latent's change from frame to frame is looked at
    "threads": (0, 1024),
}


def check_options(options: RunOptions) -> None:
    """Refuse numbers that mean nothing, or more than a machine can hold; and a bad `--out`.

    Raises:
        LmdError: names the flag and what it may be; see `check_folder`.
    """
    for flag, value, _ in flags_of(options):
        low, high = LIMITS.get(flag, (-math.inf, math.inf))
        if isinstance(value, int | float) and not low <= value <= high:
            raise LmdError(f"--{flag} {value:g}", f"{low:g} to {high:g}", "Correct the number.")
    options.check()
    check_folder(options.out)


def flags_of(options: Any) -> Iterator[tuple[str, Any, Any]]:
    """Every flag of a command with its value and its default."""
    hints = get_type_hints(type(options), include_extras=True)
    for each in fields(options):
        marks = getattr(hints[each.name], "__metadata__", ())
        if tyro.conf.Fixed not in marks:
            names = [mark.name for mark in marks if getattr(mark, "name", None)]
            flag = (names or [each.name])[0].replace("_", "-")
            yield flag, getattr(options, each.name), each.default


def command_words(options: Any) -> list[str]:
    """The command that gives these options, defaults left out."""
    words = ["python", "-m", "lmd", "train", options.stage]
    for flag, value, default in flags_of(options):
        if value != default:
            words += [f"--{flag}", *([] if isinstance(value, bool) else [str(value)])]
    return words
