"""What an evaluation consists of, and in which order it is made."""

from dataclasses import dataclass
from typing import Literal

from lmd.evaluation.generation import FEW_STEPS, WITH_EULER, Budget, Method

Kind = Literal["silence", "primed", "drift", "fade"]
Table = Literal["rows", "drift", "fades"]
KINDS: dict[Kind, str] = {
    "silence": "from silence",
    "primed": "primed",
    "drift": "long streams",
    "fade": "fading prompts",
}


def unit_name(method: str, n_steps: int, kind: Kind) -> str:
    """What a unit is called in a sentence."""
    return f"{method}, {n_steps} steps, {KINDS[kind]}"


@dataclass(frozen=True)
class Unit:
    """A row of the table, or long streams, or fading prompts, of a method at some steps."""

    method: Method
    sha256: str
    n_steps: int
    kind: Kind

    def __str__(self) -> str:
        return unit_name(self.method.name, self.n_steps, self.kind)

    @property
    def primed(self) -> bool:
        """Whether it goes on from real music."""
        return self.kind == "primed"

    @property
    def table(self) -> Table:
        """Of which of the result's lists it is a line."""
        return "drift" if self.kind == "drift" else "fades" if self.kind == "fade" else "rows"


def planned(present: list[tuple[Method, str]], budget: Budget) -> list[Unit]:
    """What to measure, the most telling first.

    Few steps from silence, then fades and long streams, then from real music, then Euler's method,
    then many steps; the naive method, which is slow, last of each.
    """
    units: list[tuple[tuple[int, bool, bool], Unit]] = []
    begins: tuple[Kind, ...] = ("silence", "primed") if budget.primed else ("silence",)
    for method, sha256 in present:
        if method in WITH_EULER:
            few = [Unit(method, sha256, n_steps, "silence") for n_steps in budget.euler_steps]
            units += [((4, False, False), each) for each in few]
            continue
        is_naive = method.name == "naive"
        for n_steps in budget.naive_steps if is_naive else budget.steps:
            for kind in begins:
                primed, slow = kind == "primed", n_steps > FEW_STEPS
                place = (5 if slow else 3 if primed else 0, is_naive, primed)
                units.append((place, Unit(method, sha256, n_steps, kind)))
        if not is_naive:
            fade = Unit(method, sha256, budget.drift_steps[0], "fade")
            streams = [Unit(method, sha256, n_steps, "drift") for n_steps in budget.drift_steps]
            units += [((1, False, False), fade), *(((2, False, False), each) for each in streams)]
    return [unit for _, unit in sorted(units, key=lambda pair: pair[0])]
