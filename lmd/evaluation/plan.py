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
from lmd.pretrained import CFG_SCALE
from lmd.rng import derive_seed
from lmd.stream.controls import Controls
from lmd.stream.samplers import SamplerName

Kind = Literal["silence", "primed", "drift"]
KINDS: dict[Kind, str] = {"silence": "from silence", "primed": "primed", "drift": "long streams"}
BIN_S = 10.0  # of long streams
FEW_STEPS = 8  # model calls per block up to which the criteria are applied


@dataclass(frozen=True)
class Method:
    """A way to make music: which weights, which regime, which sampler."""

    name: str
    weights: str
    regime: Regime
    sampler: SamplerName


METHODS = (
    Method("naive", "finetuned", "full", "dpmpp"),
    Method("ED", "finetuned", "enc-dec", "dpmpp"),
    Method("BC", "finetuned", "block-causal", "dpmpp"),
    Method("ED+AF", "arc", "enc-dec", "dpmpp"),
    Method("BC+AF", "arc", "block-causal", "dpmpp"),
)
# The paper plays what is not ARC-Forced with Euler's method: both sides with it show what
# ARC-Forcing is worth to somebody who has no solver of second order.
BY_EULER = "-Euler"  # ends these methods' names
WITH_EULER = tuple(
    replace(method, name=method.name + BY_EULER, sampler="euler") for method in METHODS[1:]
)
ALL_METHODS = METHODS + WITH_EULER


@dataclass(frozen=True)
class Budget:
    """How much is generated.

    Attributes:
        n_clips: prompts of a seed, each from another held-out rendition.
        n_blocks: blocks of a clip.
        n_seeds: repetitions, each with other prompts and other noise, of streams from silence in
            few steps, which the criteria look at.
        other_seeds: repetitions of every other line.
        steps: model calls per block, most first.
        naive_steps: those of the naive method (it costs five times as much).
        euler_steps: those of `WITH_EULER`, from silence alone.
        primed: whether clips that go on from real music are made too.
        drift_s, drift_clips, drift_steps: length, number per seed and model calls per block of the
            long streams.
        drift_seeds: repetitions of the long streams, each with other prompts.
        reference_s: how much of every held-out piece forms the reference.
        block_frames: of every block.
    """

    n_clips: int = 16
    n_blocks: int = 5
    n_seeds: int = 16
    other_seeds: int = 3
    steps: tuple[int, ...] = (50, 8, 4, 2)
    naive_steps: tuple[int, ...] = (50, 8, 4, 2)
    euler_steps: tuple[int, ...] = (8, 4, 2)
    primed: bool = True
    drift_s: float = 300.0
    drift_clips: int = 4
    drift_steps: tuple[int, ...] = (8, 4, 2)
    drift_seeds: int = 3
    reference_s: float = 60.0
    block_frames: int = 48

    @property
    def methods(self) -> tuple[Method, ...]:
        """Those that it has rows for."""
        return ALL_METHODS if self.euler_steps else METHODS


BUDGETS = {
    "full": Budget(),
    "quick": Budget(16, 4, 3, 3, (8, 4, 2), (2,), (), False, 120.0, 4, (8, 4, 2), 3, 20.0),
    "brief": Budget(8, 4, 3, 3, (8, 2), (2,), (), False, 40.0, 1, (8,), 3, 20.0),
    "smoke": Budget(2, 3, 2, 2, (1,), (1,), (1,), False, 30.0, 1, (1,), 2, 10.0),
}


@dataclass(frozen=True)
class Options:
    """What is measured.

    Attributes:
        weights: folder of the weights.
        data: a built corpus.
        tagger: the tagger's file (default: beside the weights).
        out: where the results go.
        parts: where finished parts are kept.
        budget: how much is generated.
        quick: the same as --budget quick: minutes, not hours.
        methods: only these.
        cfg_scale: guidance of weights that are not ARC-Forced.
        drift_seconds: length of the long streams.
        drift_steps: their model calls per block.
        random: a preset's name: random weights of it, which tests the machinery.
        threads: of torch.
        workers: processes that make the music that is measured.
        device: where music is made: cpu, cuda, mps or auto; it is measured on the CPU.
    """

    weights: Path = Path("data/pretrained")
    data: Path = Path("data/corpus")
    tagger: Annotated[Path | None, tyro.conf.arg(aliases=["--recogniser"])] = None
    out: Path = Path("outputs/evaluation")
    parts: Path = Path("outputs/evaluation/parts")
    budget: Literal["full", "quick", "brief", "smoke"] = "full"
    quick: bool = False
    methods: tuple[str, ...] = ()
    cfg_scale: float = CFG_SCALE
    drift_seconds: float | None = None
    drift_steps: tuple[int, ...] = ()
    random: str = ""
    threads: int | None = None
    workers: int = 1
    device: str = "auto"

    @property
    def budget_name(self) -> str:
        """Which budget.

        Raises:
            LmdError: two are asked for.
        """
        if self.quick and self.budget not in ("full", "quick"):
            raise LmdError(f"--quick and --budget {self.budget}", "one of them", "Drop the other.")
        return "quick" if self.quick else self.budget

    @property
    def sizes(self) -> Budget:
        """The budget, with the long streams that were asked for.

        Raises:
            LmdError: streams too short for a slope, or a number of steps that is none.
        """
        budget = BUDGETS[self.budget_name]
        seconds = budget.drift_s if self.drift_seconds is None else self.drift_seconds
        if not 3 * BIN_S <= seconds < math.inf:
            expected = f"{3 * BIN_S:g} or more: three bins of {BIN_S:g} s"
            raise LmdError(f"--drift-seconds {seconds:g}", expected, "Make them longer.")
        if min(self.drift_steps, default=1) < 1:
            raise LmdError(f"--drift-steps {min(self.drift_steps)}", "1 or more", "Raise it.")
        return replace(budget, drift_s=seconds, drift_steps=self.drift_steps or budget.drift_steps)

    @property
    def chosen_methods(self) -> list[Method]:
        """Those that were asked for; none named: all that the budget has rows for.

        Raises:
            LmdError: one that it has no rows for.
        """
        there = self.sizes.methods
        known = [method.name for method in there]
        for name in self.methods:
            if name not in known:
                found, expected = f"--methods {name}", f"of {', '.join(known)}"
                raise LmdError(found, expected, "Other budgets have its rows: full.")
        return [method for method in there if not self.methods or method.name in self.methods]


@dataclass(frozen=True)
class Unit:
    """A line of a table: clips or long streams of a method at some steps."""

    method: Method
    n_steps: int
    kind: Kind = "silence"

    def __str__(self) -> str:
        return f"{self.method.name}, {self.n_steps} steps, {KINDS[self.kind]}"

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
    units = [Unit(method, n_steps, kind) for kind in kinds for n_steps in steps]
    if not is_naive:
        units += [Unit(method, n_steps, "drift") for n_steps in budget.drift_steps]
    return units
