"""`python -m lmd evaluate`: measure what the weights play, beside real music.

    python -m lmd evaluate --quick
    python -m lmd evaluate --out outputs/published
    python -m lmd evaluate --minutes 30    what can be had in that time, the telling rows first

Every finished unit is kept under --parts: a run that was stopped goes on where it was, and weights
that arrive later add their rows. What is missing is named, not invented.
"""

import argparse
import math
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from lmd.errors import LmdError
from lmd.evaluation.generation import FULL, METHODS, QUICK, SMOKE, Budget, Method
from lmd.evaluation.report import write_report
from lmd.evaluation.rows import anchor_rows, drift_rows
from lmd.evaluation.run import BIN_S, Evaluation, Sources
from lmd.machine import machine_dict, tune_allocator

BUDGETS = {"full": FULL, "quick": QUICK, "smoke": SMOKE}


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the command's arguments."""
    add = parser.add_argument
    add("--weights", type=Path, default=Path("data/pretrained"), help="folder of the weights")
    add("--data", type=Path, default=Path("data/corpus"), help="a built corpus")
    add("--recogniser", type=Path, help="the listener's file (default: beside the weights)")
    add("--out", type=Path, default=Path("outputs/evaluation"), help="where the results go")
    add("--parts", type=Path, default=Path("outputs/evaluation/parts"), help="finished units")
    add("--quick", action="store_true", help="the same as --budget quick: minutes, not hours")
    add("--budget", choices=sorted(BUDGETS), default="full", help="how much is generated")
    add("--methods", nargs="+", choices=[m.name for m in METHODS], help="only these")
    add("--cfg-scale", type=float, default=2.0, help="guidance of weights that are not ARC-Forced")
    add("--minutes", type=float, help="begin no further row or stream after these")
    add("--random", default="", metavar="PRESET", help="random weights: tests the machinery")
    add("--threads", type=int, help="of torch")


def main(args: argparse.Namespace) -> int:
    """Measure everything there are weights for; write JSON, tables and figures."""
    if args.threads is not None and args.threads < 1:
        raise LmdError(f"--threads {args.threads}", "at least 1", "Raise it.")
    if args.minutes is not None and not args.minutes >= 0:
        raise LmdError(f"--minutes {args.minutes}", "0 or more", "Raise it.")
    if args.threads:
        torch.set_num_threads(args.threads)
    tune_allocator()
    sources = Sources(
        weights=args.weights,
        data=args.data,
        recogniser=args.recogniser or args.weights / "recogniser.safetensors",
        parts=args.parts,
        random=args.random,
    )
    name = "quick" if args.quick else args.budget
    evaluation = Evaluation(sources, BUDGETS[name], args.cfg_scale)
    chosen = [m for m in METHODS if not args.methods or m.name in args.methods]
    measured = evaluate(evaluation, chosen, args.minutes)
    result = {"budget": {"name": name, **asdict(BUDGETS[name])}, **measured}
    print(write_report(result, args.out))
    return 0


def evaluate(
    evaluation: Evaluation, methods: list[Method], minutes: float | None = None
) -> dict[str, Any]:
    """Everything as plain values, ready for JSON.

    Args:
        evaluation: where things are and how much is made.
        methods: which methods to measure; those without weights are listed in `not_measured`.
        minutes: rows and long streams that would begin later are listed there too; None: all.
    """
    until = math.inf if minutes is None else time.monotonic() + 60 * minutes
    anchors = anchor_rows(evaluation.anchors(), evaluation.truths, evaluation.reference)
    present = [(m, evaluation.source(m.weights)[1]) for m in methods]
    absent = [
        f"{kind}: no such weights" for kind in sorted({m.weights for m, x in present if not x})
    ]
    absent += [f"{m.name}: not asked for" for m in METHODS if m not in methods]
    present = [(m, sha256) for m, sha256 in present if sha256]
    rows, drifting, fading = [], [], []
    for unit in tqdm(planned(present, evaluation.budget), desc="rows and streams"):
        if time.monotonic() > until:
            absent.append(f"{unit}: no time left (--minutes {minutes:g})")
        elif unit.n_steps is None:
            method, n_steps = unit.method, evaluation.budget.drift_steps
            measured = drift_rows(evaluation.drift(method, unit.sha256), BIN_S)
            drifting.append({"method": method.name, "n_steps": n_steps, **measured})
            fading.append(evaluation.fade(method, unit.sha256))
        else:
            rows.append(evaluation.row(unit.method, unit.n_steps, unit.primed, unit.sha256))
    order = [method.name for method in METHODS]
    rows.sort(key=lambda row: (order.index(row["method"]), row["primed"], -row["n_steps"]))
    return {
        "machine": machine_dict(),
        "recogniser": {
            "sha256": evaluation.listener_header.sha256,
            "embedding": evaluation.listener.config.embedding,
            "scores": evaluation.listener_header.notes.get("scores", {}),
        },
        "random_weights": bool(evaluation.sources.random),
        "not_measured": absent,
        "reference_windows": evaluation.reference.windows,
        "clip_s": evaluation.n_samples / evaluation.codec.sample_rate,
        "anchors": anchors,
        "rows": rows,
        "drift": drifting,
        "fades": fading,
        "other_listeners": evaluation.listener_words,
    }


@dataclass(frozen=True)
class Unit:
    """A row of the table, or a method's long streams (`n_steps` is None)."""

    method: Method
    sha256: str
    n_steps: int | None
    primed: bool

    def __str__(self) -> str:
        if self.n_steps is None:
            return f"{self.method.name}, long streams"
        begins = "primed" if self.primed else "from silence"
        return f"{self.method.name}, {self.n_steps} steps, {begins}"


def planned(present: list[tuple[Method, str]], budget: Budget) -> list[Unit]:
    """What to measure, the most telling first.

    Few steps from silence, then long streams, then from real music, then many steps; the naive
    method, which is slow, last of each.
    """
    units = []
    for method, sha256 in present:
        is_naive = method.name == "naive"
        for n_steps in budget.naive_steps if is_naive else budget.steps:
            slow = n_steps > budget.drift_steps
            for primed in (False, True) if budget.primed else (False,):
                place = (3 if slow else 2 if primed else 0, is_naive, primed)
                units.append((place, Unit(method, sha256, n_steps, primed)))
        if not is_naive:
            units.append(((1, False, False), Unit(method, sha256, None, False)))
    return [unit for _, unit in sorted(units, key=lambda pair: pair[0])]
