"""What is compared, how much of it is made, and in which order.

Source of the protocol: Live Music Diffusion Models (arXiv 2605.22717), at this project's scale.
"""

import math
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Literal

import tyro

from lmd.config import Regime
from lmd.errors import LmdError
from lmd.machine import pick_device
from lmd.pretrained import CFG_SCALE
from lmd.rng import derive_seed
from lmd.stream.controls import Controls
from lmd.stream.samplers import SamplerName

Kind = Literal["silence", "primed", "drift"]  # from silence, from real music, long streams
BIN_S = 10.0  # of long streams
FEW_STEPS = 8  # model calls per block up to which the criteria are applied


@dataclass(frozen=True)
class Method:
    """A way to make music: which weights, which regime, which sampler."""

    name: str
    weights: str
    regime: Regime
    sampler: SamplerName = "dpmpp"


METHODS = (
    Method("naive", "finetuned", "full"),
    Method("ED", "finetuned", "enc-dec"),
    Method("BC", "finetuned", "block-causal"),
    Method("ED+AF", "arc", "enc-dec"),
    Method("BC+AF", "arc", "block-causal"),
)
# The paper plays what is not ARC-Forced with Euler's method: both sides with it show what
# ARC-Forcing is worth to somebody who has no solver of second order.
BY_EULER = "-Euler"  # ends these methods' names
WITH_EULER = tuple(replace(m, name=m.name + BY_EULER, sampler="euler") for m in METHODS[1:])


@dataclass(frozen=True)
class Budget:
    """How much is generated."""

    name: str = "full"
    n_clips: int = 16  # prompts of a seed, each from another held-out rendition
    n_blocks: int = 5  # of a clip
    n_seeds: int = 16  # with other prompts and noise: of what the criteria look at
    other_seeds: int = 3  # of every other line
    steps: tuple[int, ...] = (50, 8, 4, 2)  # model calls per block, most first
    naive_steps: tuple[int, ...] = (50, 8, 4, 2)  # the naive method costs five times as much
    euler_steps: tuple[int, ...] = (8, 4, 2)  # of `WITH_EULER`, from silence alone
    primed: bool = True  # clips that go on from real music too
    drift_s: float = 300.0  # length of the long streams
    drift_clips: int = 4  # per seed
    drift_steps: tuple[int, ...] = (8, 4, 2)
    drift_seeds: int = 3  # each with other prompts
    reference_s: float = 60.0  # of every held-out piece, in the middle
    block_frames: int = 48

    @property
    def methods(self) -> tuple[Method, ...]:
        """Those that it has rows for."""
        return METHODS + WITH_EULER if self.euler_steps else METHODS


BUDGETS = {
    "full": Budget(),
    "quick": Budget("quick", 16, 4, 3, 3, (8, 4, 2), (2,), (), False, 120.0, 4, (8, 4, 2), 3, 20.0),
    "brief": Budget("brief", 8, 4, 3, 3, (8, 2), (2,), (), False, 40.0, 1, (8,), 3, 20.0),
    "smoke": Budget("smoke", 2, 3, 2, 2, (1,), (1,), (1,), False, 30.0, 1, (1,), 2, 10.0),
}


@dataclass(frozen=True)
class Options:
    """What is measured; what does not fit is refused as soon as it is asked for."""

    weights: Path = Path("data/pretrained")  # folder of the weights
    data: Path = Path("data/corpus")  # a built corpus
    # the tagger's file (default: beside the weights)
    tagger: Annotated[Path | None, tyro.conf.arg(aliases=["--recogniser"])] = None
    out: Path = Path("outputs/evaluation")  # where the results go
    parts: Path = Path("outputs/evaluation/parts")  # where finished parts are kept
    budget: Literal["full", "quick", "brief", "smoke"] = "full"  # how much is generated
    quick: bool = False  # the same as --budget quick: minutes, not hours
    methods: tuple[str, ...] = ()  # only these
    cfg_scale: float = CFG_SCALE  # guidance of weights that are not ARC-Forced
    drift_seconds: float | None = None  # length of the long streams
    drift_steps: tuple[int, ...] = ()  # their model calls per block
    random: str = ""  # a preset's name: random weights of it, which tests the machinery
    threads: int | None = None  # of torch
    workers: int = 1  # processes that make the music that is measured
    device: str = "auto"  # where music is made: cpu, cuda, mps or auto; measured on the CPU
    # what makes it: PyTorch or exported graphs; auto: graphs for weights on a CPU
    engine: Literal["auto", "torch", "graph"] = "auto"
    # in which the transformer computes; int8 with graphs only
    dtype: Literal["float32", "bfloat16", "int8"] = "float32"

    @property
    def sizes(self) -> Budget:
        """The budget, with the long streams that were asked for."""
        if self.quick and self.budget not in ("full", "quick"):
            raise LmdError(f"--quick and --budget {self.budget}", "one of them", "Drop the other.")
        budget = BUDGETS["quick" if self.quick else self.budget]
        seconds = budget.drift_s if self.drift_seconds is None else self.drift_seconds
        if not 3 * BIN_S <= seconds < math.inf:
            expected = f"{3 * BIN_S:g} or more: three bins of {BIN_S:g} s"
            raise LmdError(f"--drift-seconds {seconds:g}", expected, "Make them longer.")
        if min(self.drift_steps, default=1) < 1:
            raise LmdError(f"--drift-steps {min(self.drift_steps)}", "1 or more", "Raise it.")
        return replace(budget, drift_s=seconds, drift_steps=self.drift_steps or budget.drift_steps)

    @property
    def chosen_methods(self) -> list[Method]:
        """Those that were asked for; none named: all that the budget has rows for."""
        there = {method.name: method for method in self.sizes.methods}
        if unknown := ", ".join(name for name in self.methods if name not in there):
            expected, todo = f"of {', '.join(there)}", "Other budgets have its rows: full."
            raise LmdError(f"--methods {unknown}", expected, todo)
        return [there[name] for name in there if not self.methods or name in self.methods]

    @property
    def chosen_engine(self) -> str:
        """`torch` or `graph`: what `auto` stands for, as in `open_instrument`."""
        on_cpu = pick_device(self.device).type == "cpu"
        usual = "graph" if on_cpu and not self.random else "torch"
        return usual if self.engine == "auto" else self.engine


@dataclass(frozen=True)
class Unit:
    """A line of a table: clips or long streams of a method at some steps."""

    method: Method
    n_steps: int
    kind: Kind = "silence"

    def n_seeds(self, budget: Budget) -> int:
        """How often it is repeated."""
        if self.kind == "drift":
            return budget.drift_seeds
        is_slow = self.method.regime == "full" or self.n_steps > FEW_STEPS
        return budget.other_seeds if is_slow or self.kind == "primed" else budget.n_seeds

    def controls(self, budget: Budget, seed: int, cfg_scale: float) -> Controls:
        """How it plays. ARC-Forced weights take no guidance; the others take `cfg_scale`."""
        return Controls(
            prompt="one per stream",
            cfg_scale=1.0 if self.method.weights == "arc" else cfg_scale,
            n_steps=self.n_steps,
            sampler=self.method.sampler,
            block_frames=budget.block_frames,
            regime=self.method.regime,
            seed=derive_seed(seed, "evaluation") % 2**31,
        )


def units_of(method: Method, budget: Budget) -> list[Unit]:
    """What is measured of a method: its rows, then long streams."""
    if method in WITH_EULER:
        return [Unit(method, n_steps) for n_steps in budget.euler_steps]
    is_naive = method.name == "naive"
    kinds: tuple[Kind, ...] = ("silence", "primed") if budget.primed else ("silence",)
    steps = budget.naive_steps if is_naive else budget.steps
    long = [] if is_naive else [Unit(method, n_steps, "drift") for n_steps in budget.drift_steps]
    return [Unit(method, n_steps, kind) for kind in kinds for n_steps in steps] + long
