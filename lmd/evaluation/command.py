"""`python -m lmd evaluate`: measure what the weights play, beside real music.

    python -m lmd evaluate --quick
    python -m lmd evaluate --out outputs/published
    python -m lmd evaluate --minutes 30    what can be had in that time, the telling rows first
    python -m lmd evaluate --extend outputs/published/evaluation.json    only what is not there

Every finished unit is kept under --parts: a run that was stopped goes on where it was, and weights
that arrive later add their rows. What is missing is named, not invented.
"""

import argparse
import math
import time
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from lmd.corpus.manifest import Corpus
from lmd.data.places import check_folder_free
from lmd.errors import LmdError
from lmd.evaluation.earlier import Earlier
from lmd.evaluation.generation import (
    ALL_METHODS,
    BRIEF,
    FULL,
    QUICK,
    SMOKE,
    WITH_EULER,
    Budget,
    Method,
    methods_of,
)
from lmd.evaluation.report import write_report
from lmd.evaluation.rows import anchor_rows, drift_rows, levels_of
from lmd.evaluation.run import BIN_S, VERSION, Evaluation, OutOfTime, Sources
from lmd.evaluation.units import Table, Unit, planned
from lmd.evaluation.workers import make_parts
from lmd.machine import machine_dict, tune_allocator
from lmd.pretrained import CFG_SCALE

BUDGETS = {"full": FULL, "quick": QUICK, "brief": BRIEF, "smoke": SMOKE}


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the command's arguments."""
    add = parser.add_argument
    add("--weights", type=Path, default=Path("data/pretrained"), help="folder of the weights")
    add("--data", type=Path, default=Path("data/corpus"), help="a built corpus")
    add("--recogniser", type=Path, help="the listener's file (default: beside the weights)")
    add("--out", type=Path, default=Path("outputs/evaluation"), help="where the results go")
    add("--parts", type=Path, default=Path("outputs/evaluation/parts"), help="finished units")
    much = parser.add_mutually_exclusive_group()
    words = "how much is generated"
    much.add_argument("--budget", choices=sorted(BUDGETS), default="full", help=words)
    words = "the same as --budget quick: minutes, not hours"
    much.add_argument("--quick", action="store_const", const="quick", dest="budget", help=words)
    add("--methods", nargs="+", choices=[m.name for m in ALL_METHODS], help="only these")
    add(
        "--cfg-scale",
        type=float,
        default=CFG_SCALE,
        help="guidance of weights that are not ARC-Forced",
    )
    add("--drift-seconds", type=float, metavar="S", help="length of the long streams")
    add("--drift-steps", type=int, nargs="+", metavar="N", help="their model calls per block")
    add("--minutes", type=float, help="begin nothing that is not there after these")
    add("--extend", type=Path, metavar="JSON", help="an earlier result, whose rows are kept")
    add("--random", default="", metavar="PRESET", help="random weights: tests the machinery")
    add("--threads", type=int, help="of torch")
    add("--workers", type=int, default=1, help="processes that make the music that is measured")
    add("--no-timings", action="store_true", help="measure the music alone")
    add("--device", default="auto", help="where music is made: cpu, cuda, mps or auto")


def main(args: argparse.Namespace) -> int:
    """Measure everything there are weights for; write JSON, tables and figures."""
    if args.threads is not None and args.threads < 1:
        raise LmdError(f"--threads {args.threads}", "at least 1", "Raise it.")
    if args.workers < 1:
        raise LmdError(f"--workers {args.workers}", "at least 1", "Raise it.")
    if args.minutes is not None and not args.minutes >= 0:
        raise LmdError(f"--minutes {args.minutes}", "0 or more", "Raise it.")
    for folder in (args.out, args.parts):
        check_folder_free(folder)
    if args.threads:
        torch.set_num_threads(args.threads)
    tune_allocator()
    sources = Sources(
        weights=args.weights,
        data=args.data,
        recogniser=args.recogniser or args.weights / "recogniser.safetensors",
        parts=args.parts,
        random=args.random,
        device=args.device,
    )
    budget = with_long_streams(BUDGETS[args.budget], args.drift_seconds, args.drift_steps)
    earlier = Earlier.read(args.extend, budget) if args.extend else None
    evaluation = Evaluation(sources, budget, args.cfg_scale)
    chosen = chosen_methods(args.methods, budget)
    timed = not args.no_timings
    measured = evaluate(evaluation, chosen, args.minutes, earlier, args.workers, timed)
    result = {"budget": {"name": args.budget, **asdict(budget)}, **measured}
    print(write_report(result, args.out))
    return 0


def chosen_methods(names: list[str] | None, budget: Budget) -> list[Method]:
    """The methods with these names, of those that the budget has rows for; None: all.

    Raises:
        LmdError: one that it has no rows for.
    """
    there = methods_of(budget.euler_steps)
    extra = sorted(set(names or ()) - {method.name for method in there})
    if extra:
        known = ", ".join(method.name for method in there)
        raise LmdError(f"--methods {extra[0]}", f"of {known}", "Other budgets have its rows: full.")
    return [method for method in there if not names or method.name in names]


def with_long_streams(budget: Budget, seconds: float | None, steps: list[int] | None) -> Budget:
    """The budget with other long streams; None: as they are.

    Raises:
        LmdError: streams too short for a slope, or a number of steps that is none.
    """
    if seconds is not None and not 3 * BIN_S <= seconds < math.inf:
        found, least = f"--drift-seconds {seconds:g}", f"{3 * BIN_S:g} or more"
        raise LmdError(found, f"{least}: three bins of {BIN_S:g} s", "Make them longer.")
    if steps is not None and min(steps) < 1:
        raise LmdError(f"--drift-steps {min(steps)}", "1 or more", "Raise it.")
    return replace(
        budget,
        drift_s=seconds or budget.drift_s,
        drift_steps=tuple(steps) if steps else budget.drift_steps,
    )


def evaluate(
    evaluation: Evaluation,
    methods: list[Method],
    minutes: float | None = None,
    earlier: Earlier | None = None,
    n_workers: int = 1,
    with_timings: bool = True,
) -> dict[str, Any]:
    """Everything as plain values, ready for JSON.

    Args:
        evaluation: where things are and how much is made.
        methods: which methods to measure; those without weights are listed in `not_measured`.
        minutes: what is not there by then and would begin later is listed there too; None: all.
        earlier: results that are kept; None: everything is measured.
        n_workers: processes that make the music and measure it; timings are taken here, afterwards.
        with_timings: False: none are taken, and each is listed in `not_measured`.

    Raises:
        LmdError: `earlier` was measured with another recogniser, corpus or codec.
    """
    until_s = math.inf if minutes is None else time.monotonic() + 60 * minutes
    present = [(m, evaluation.source(m.weights)[1]) for m in methods]
    absent = [
        f"{kind}: no such weights" for kind in sorted({m.weights for m, x in present if not x})
    ]
    absent += [
        f"{m.name}: not asked for"
        for m in methods_of(evaluation.budget.euler_steps)
        if m not in methods
    ]
    units = planned([(m, sha256) for m, sha256 in present if sha256], evaluation.budget)
    if earlier:
        name = earlier.path.name
        absent += [f"{unit}: in {name}, not asked for" for unit in earlier.beyond(units)]
    if n_workers > 1:
        new = [u for u in units if not (earlier and earlier_unit(earlier, evaluation, u))]
        sources, budget, cfg_scale = evaluation.sources, evaluation.budget, evaluation.cfg_scale
        make_parts(sources, budget, cfg_scale, new, n_workers, until_s)
    anchors = anchor_rows(evaluation.anchors(), evaluation.truths, evaluation.reference)
    levels = {name: levels_of(seeds) for name, seeds in evaluation.drift_anchors().items()}
    corpus = Corpus(evaluation.sources.data)
    head = {
        "version": VERSION,
        "machine": machine_dict(),
        "recogniser": {
            "sha256": evaluation.listener_header.sha256,
            "embedding": evaluation.listener.config.embedding,
            "scores": evaluation.listener_header.notes.get("scores", {}),
        },
        "random_weights": bool(evaluation.sources.random),
        "reference_windows": evaluation.reference.windows,
        "prompts": evaluation.prompts(),
        "corpus_hours": corpus.duration_s / 3600,
        "corpus_asked_hours": corpus.settings().get("hours"),
        "clip_s": evaluation.n_samples / evaluation.codec.sample_rate,
        "anchors": anchors,
        "drift_anchors": levels,
        "other_listeners": evaluation.listener_words,
    }
    if earlier:
        earlier.check(head)
    evaluation.parts.until_s = until_s
    found: dict[Table, list[dict[str, Any]]] = {"rows": [], "drift": [], "fades": []}
    speeds: dict[tuple[str, int], dict[str, Any]] = {}
    n_kept = 0
    for unit in tqdm(units, desc="rows and streams"):
        kept = earlier_unit(earlier, evaluation, unit) if earlier else None
        n_kept += kept is not None
        try:
            found[unit.table].append(kept or measure(evaluation, unit))
        except OutOfTime:
            absent.append(f"{unit}: no time left (--minutes {minutes:g})")
            continue
        if unit.table == "rows" and unit.method in WITH_EULER:
            found["rows"][-1]["speed"] = None  # as fast as the others: it calls the model as often
        elif unit.table == "rows":
            how, why = (unit.method.name, unit.n_steps), "not asked for (--no-timings)"
            try:
                if with_timings and how not in speeds:  # primed or not, it is as fast
                    speeds[how] = evaluation.speed(unit.method, unit.n_steps)
            except OutOfTime:
                why = f"no time left (--minutes {minutes:g})"
            if how not in speeds:
                absent.append(f"{unit}, timings: {why}")
            found["rows"][-1]["speed"] = speeds.get(how)
    head["made_on"] = sorted(evaluation.parts.made_on)
    order = [method.name for method in ALL_METHODS]
    found["rows"].sort(key=lambda row: (order.index(row["method"]), row["primed"], -row["n_steps"]))
    extended = {"extended": {"kept": n_kept, "machines": earlier.machines}} if earlier else {}
    return {**head, **found, "not_measured": absent, **extended}


def measure(evaluation: Evaluation, unit: Unit) -> dict[str, Any]:
    """A unit's line, without timings; made now if it is not on disk.

    Raises:
        OutOfTime: it is not there, and there is no time left to make it.
    """
    method, sha256, n_steps = unit.method, unit.sha256, unit.n_steps
    if unit.kind == "drift":
        measured = drift_rows(evaluation.drift(method, sha256, n_steps), BIN_S)
        return {"method": method.name, "n_steps": n_steps, **measured}
    if unit.kind == "fade":
        return evaluation.fade(method, sha256)
    return evaluation.row(method, n_steps, unit.primed, sha256)


def earlier_unit(earlier: Earlier, evaluation: Evaluation, unit: Unit) -> dict[str, Any] | None:
    """A unit's line, without timings, where an earlier evaluation holds it."""
    line = evaluation.line(unit.method, unit.n_steps, unit.primed, unit.sha256)
    if unit.table != "rows":
        return earlier.streams(unit.table, line)
    n_seeds = evaluation.budget.seeds_of(unit.method, unit.n_steps, unit.primed)
    return earlier.row(line, n_seeds)
