"""What a training run is: one dataclass for each command, parsed by tyro, handed on to the end."""

import math
from collections.abc import Iterator
from dataclasses import MISSING, dataclass, field, fields, is_dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar, get_type_hints

import tyro
from torch import Tensor

from lmd.errors import LmdError
from lmd.outputs import check_folder
from lmd.training.draws import (
    BaseOptions,
    BatchIndices,
    DistillOptions,
    FinetuneOptions,
    Hidden,
    NoiseOptions,
    StepPlan,
    base_plan,
    distill_plan,
    draw_noise,
    finetune_plan,
)

Stage = Literal["base", "finetune", "distill"]
Strategy = Literal["ddp", "fsdp"]
Steps = Annotated[int, tyro.conf.arg(name="steps")]
T = TypeVar("T")
Flags = Annotated[T, tyro.conf.arg(name="")]  # its fields are flags of the command


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


@dataclass(frozen=True)
class TrainOptions(RunOptions):
    """A run of the base, the fine-tune or the distillation.

    Sources: betas, weight decay and clipping are those of arXiv 2605.22717's base pre-training and
    ARC configs; the learning rate is higher because the model is 26 times smaller; warm-up,
    constant rate and linear cool-down follow arXiv 2405.18392; text dropout for guidance:
    arXiv 2207.12598. The moving average is what is shipped.

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
    noise: Flags[NoiseOptions] = field(default_factory=NoiseOptions)
    base: Hidden[BaseOptions] = field(default_factory=BaseOptions)
    finetune: Hidden[FinetuneOptions] = field(default_factory=FinetuneOptions)
    distill: Hidden[DistillOptions] = field(default_factory=DistillOptions)

    def plan(self, step: int) -> StepPlan:
        """What step `step` does."""
        if self.stage == "base":
            return base_plan(self.base, self.seed, step)
        if self.stage == "distill":
            return distill_plan(self.distill, self.finetune, self.seed, step)
        return finetune_plan(self.finetune, self.seed, step)

    def n_rows(self, plan: StepPlan) -> int:
        """Rows of the global batch; a long window takes the place of several short ones."""
        if self.stage != "base" or plan.n_frames <= self.base.window_frames:
            return self.batch
        fitting = max(1, self.batch * self.base.window_frames // plan.n_frames)
        return 1 << (fitting.bit_length() - 1)  # a power of two divides among processes

    def lr_factor(self, step: int) -> float:
        """Warm-up, constant, linear cool-down to a twentieth."""
        left = (self.n_steps - step) / max(1.0, self.cooldown_share * self.n_steps)
        return min(1.0, (step + 1) / max(1, self.warmup_steps), max(0.05, left))


@dataclass(frozen=True)
class BaseRun(TrainOptions):
    """`lmd train base`."""

    stage: Hidden[Stage] = "base"
    n_steps: Steps = 4000
    out: Path = field(default=Path("runs/base"), kw_only=True)
    base: Flags[BaseOptions] = field(default_factory=BaseOptions)


@dataclass(frozen=True)
class FinetuneRun(TrainOptions):
    """`lmd train finetune`."""

    stage: Hidden[Stage] = "finetune"
    n_steps: Steps = 2000
    lr: float = 2e-4
    lora: int = 0
    out: Path = field(default=Path("runs/finetune"), kw_only=True)
    finetune: Flags[FinetuneOptions] = field(default_factory=FinetuneOptions)


@dataclass(frozen=True)
class DistillRun(TrainOptions):
    """`lmd train distill`."""

    stage: Hidden[Stage] = "distill"
    n_steps: Steps = 1000
    lr: float = 1e-4
    out: Path = field(default=Path("runs/distill"), kw_only=True)
    init: Path | None = field(default=Path("data/pretrained/finetuned.safetensors"), kw_only=True)
    noise: Hidden[NoiseOptions] = field(default_factory=NoiseOptions)
    distill: Flags[DistillOptions] = field(default_factory=DistillOptions)


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


def check_options(options: Any) -> None:
    """Refuse numbers that mean nothing, or more than a machine can hold; and a bad `--out`.

    Raises:
        LmdError: names the flag and what it may be; see `check_folder`.
    """
    for flag, value, _ in flags_of(options):
        low, high = LIMITS.get(flag, (-math.inf, math.inf))
        if isinstance(value, int | float) and not low <= value <= high:
            raise LmdError(f"--{flag} {value:g}", f"{low:g} to {high:g}", "Correct the number.")
    check_folder(options.out)


def flags_of(options: Any) -> Iterator[tuple[str, Any, Any]]:
    """Every flag of a command with its value and its default."""
    hints = get_type_hints(type(options), include_extras=True)
    for each in fields(options):
        marks, value = getattr(hints[each.name], "__metadata__", ()), getattr(options, each.name)
        if tyro.conf.Fixed in marks:
            continue
        if is_dataclass(value):
            yield from flags_of(value)
            continue
        names = [mark.name for mark in marks if getattr(mark, "name", None)]
        default = each.default_factory() if each.default is MISSING else each.default
        yield (names or [each.name])[0].replace("_", "-"), value, default


def command_words(name: str, options: Any) -> list[str]:
    """The command that gives these options, defaults left out."""
    words = ["python", "-m", "lmd", "train", name]
    for flag, value, default in flags_of(options):
        if value != default:
            words += [f"--{flag}", *([] if isinstance(value, bool) else [str(value)])]
    return words


def check_parts(batch: int, n_parts: int) -> None:
    """Refuse a global batch that does not divide among the parts of a step."""
    if batch % n_parts:
        raise LmdError(
            f"a global batch of {batch} rows for {n_parts} parts",
            "a multiple (parts are processes × accumulation)",
            "Change --batch, --devices or --accumulate.",
        )


def shard_rows(options: TrainOptions, step: int, shard: int, n_shards: int) -> BatchIndices:
    """The rows of one part (process, accumulation) of a step's global batch, split evenly.

    Where a step has fewer rows than parts, a part that gets none computes the first one with
    weight 0, so that all processes do the same work.
    """
    check_parts(options.batch, n_shards)
    n = options.n_rows(options.plan(step))
    own = range(shard * n // n_shards, (shard + 1) * n // n_shards)
    weight = len(own) * n_shards / n
    return BatchIndices(options.seed, step, tuple(own) or (0,), n, weight)


def step_noise(options: TrainOptions, rows: BatchIndices, n_channels: int) -> Tensor:
    """The noise of a step's rows, drawn on the CPU: `[row, latent, frame]`, of a window or a block,
    or `[row, target, latent, frame]` where blocks are taught in packs.
    """
    plan = options.plan(rows.step)
    if options.stage == "distill":
        return draw_noise(rows, n_channels, plan.block_frames)
    if plan.regime in (None, "full"):
        return draw_noise(rows, n_channels, plan.n_frames)
    return draw_noise(rows, plan.n_targets, n_channels, plan.block_frames)
