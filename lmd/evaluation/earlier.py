"""An earlier evaluation's results, taken over for the units that it already holds.

What is taken over was measured with the same weights, sampler, guidance and sizes, and listened to
by the same recogniser beside the same music: the anchors are measured again and have to agree.
Timings belong to a machine and are never taken over.
"""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from lmd.errors import LmdError
from lmd.evaluation.generation import Budget
from lmd.evaluation.units import Kind, Unit, unit_name
from lmd.machine import hardware

ROUNDING = 0.01  # by which two machines' anchors may differ, as a share
TABLES = ("anchors", "rows", "drift", "fades")
SIZES = ("n_clips", "n_blocks", "n_seeds", "block_frames", "reference_s")  # of all lines
STREAMS = ("drift_s", "drift_clips", "drift_seeds")  # of long streams
# Of the anchors: they change with what is listened to and with how it is measured.
LEVELS = (
    "fd",
    "kl",
    "family",
    "tempo",
    "key_share",
    "key_clarity",
    "consonance",
    "joins",
    "clicks",
)


@dataclass(frozen=True)
class Earlier:
    """The results of a file.

    Attributes:
        path: of the file.
        result: what `lmd.evaluation.command.evaluate` returned, with its `budget`.
        budget: that units have to fit.
    """

    path: Path
    result: Mapping[str, Any]
    budget: Budget

    @classmethod
    def read(cls, path: Path, budget: Budget) -> "Earlier":
        """The results in a file `evaluation.json`.

        Raises:
            LmdError: no such file, no evaluation, or one of other sizes.
        """
        todo = "Name the evaluation.json of an earlier run, or leave --extend out."
        try:
            result = json.loads(path.read_text())
            result |= {name: _with_nan(result[name]) for name in TABLES}
            theirs = {name: result["budget"][name] for name in SIZES}
            shared = result["recogniser"]["sha256"], result["reference_windows"], result["machine"]
            levels = [anchor[x]["mean"] for anchor in result["anchors"].values() for x in LEVELS]
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise LmdError(f"{path}: {error!r}", "an evaluation", todo) from error
        if not all(shared) or not all(isinstance(level, float) for level in levels):
            raise LmdError(f"{path} with values that are no numbers", "an evaluation", todo)
        ours = {name: getattr(budget, name) for name in SIZES}
        if theirs != ours:
            raise LmdError(f"{path} with {theirs}", f"{ours}, this budget's sizes", todo)
        return cls(path, result, budget)

    @property
    def machines(self) -> list[str]:
        """What its lines were measured on, those included that it has kept itself."""
        before = self.result.get("extended", {}).get("machines", [])
        now = self.result.get("made_on") or [hardware(self.result["machine"])]
        return list(dict.fromkeys([*before, *now]))

    def check(self, head: Mapping[str, Any]) -> None:
        """Hold what both must share against what was measured now.

        Args:
            head: `version`, `recogniser`, `reference_windows` and `anchors` as measured now.

        Raises:
            LmdError: another recogniser, corpus, codec or way to measure.
        """
        todo = "Measure everything: leave --extend out."
        for theirs, ours, what in (
            (self.result.get("version"), head["version"], "version of the measures"),
            (self.result["recogniser"]["sha256"], head["recogniser"]["sha256"], "recogniser"),
            (self.result["reference_windows"], head["reference_windows"], "reference windows"),
            (sorted(self.result["anchors"]), sorted(head["anchors"]), "anchors"),
        ):
            if theirs != ours:
                raise LmdError(f"{self.path}: {what} {theirs}", str(ours), todo)
        for name, anchor in head["anchors"].items():
            for level in LEVELS:
                theirs = self.result["anchors"][name][level]["mean"]
                ours = anchor[level]["mean"]
                same = abs(theirs - ours) <= ROUNDING * max(abs(theirs), abs(ours))
                if not same and not (math.isnan(theirs) and math.isnan(ours)):
                    found = f"{self.path}: {level} {theirs:.4g} of {name!r}"
                    raise LmdError(found, f"{ours:.4g} within {ROUNDING:.0%}", todo)

    def beyond(self, units: Sequence[Unit]) -> list[str]:
        """What the file holds and `units` do not ask for."""
        kinds: dict[str, list[Kind]] = {
            "rows": ["primed" if row["primed"] else "silence" for row in self.result["rows"]],
            "drift": ["drift"] * len(self.result["drift"]),
            "fades": ["fade"] * len(self.result["fades"]),
        }
        theirs = [
            unit_name(one["method"], one["n_steps"], kind)
            for table, all_kinds in kinds.items()
            for one, kind in zip(self.result[table], all_kinds, strict=True)
        ]
        asked = {str(unit) for unit in units}
        return [name for name in theirs if name not in asked]

    def row(self, wanted: Mapping[str, Any], n_seeds: int) -> dict[str, Any] | None:
        """The line of the table with these values and that many seeds, without its timings."""
        for row in self.result["rows"]:
            if row["fd"]["n"] == n_seeds and _holds(row, wanted):
                return {name: value for name, value in row.items() if name != "speed"}
        return None

    def streams(
        self, kind: Literal["drift", "fades"], wanted: Mapping[str, Any]
    ) -> dict[str, Any] | None:
        """The long streams (`drift`) or fading prompts (`fades`) of a line's weights.

        Args:
            kind: `drift` or `fades`.
            wanted: the values of the line from silence with as many steps.
        """
        sizes = self.result["budget"]
        if kind == "drift" and any(sizes.get(x) != getattr(self.budget, x) for x in STREAMS):
            return None
        if not any(_holds(row, wanted) for row in self.result["rows"]):
            return None
        same = {name: wanted[name] for name in ("method", "n_steps")}
        return next((dict(one) for one in self.result[kind] if _holds(one, same)), None)


def _with_nan(value: Any) -> Any:
    """Plain JSON read back: null stands for what was not finite."""
    if isinstance(value, Mapping):
        return {key: _with_nan(each) for key, each in value.items()}
    if isinstance(value, list):
        return [_with_nan(each) for each in value]
    return math.nan if value is None else value


def _holds(row: Mapping[str, Any], wanted: Mapping[str, Any]) -> bool:
    """Whether all these values are in a row."""
    return all(row.get(name) == value for name, value in wanted.items())
