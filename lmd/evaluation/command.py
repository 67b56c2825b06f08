"""`python -m lmd evaluate`: measure what the weights play, beside real music.

    python -m lmd evaluate --quick
    python -m lmd evaluate --out outputs/published

Every finished unit is kept under --parts: a run that was stopped goes on where it was, and weights
that arrive later add their rows. Rows whose weights are missing are named, not invented.
"""

import argparse
from dataclasses import asdict
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
    add("--cfg-scale", type=float, default=1.0, help="guidance of weights that are not ARC-Forced")
    add("--random", default="", metavar="PRESET", help="random weights: tests the machinery")
    add("--threads", type=int, help="of torch")


def main(args: argparse.Namespace) -> int:
    """Measure everything there are weights for; write JSON, tables and figures."""
    if args.threads is not None and args.threads < 1:
        raise LmdError(f"--threads {args.threads}", "at least 1", "Raise it.")
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
    result = {"budget": {"name": name, **asdict(BUDGETS[name])}, **evaluate(evaluation, chosen)}
    print(write_report(result, args.out))
    return 0


def evaluate(evaluation: Evaluation, methods: list[Method]) -> dict[str, Any]:
    """Everything as plain values, ready for JSON.

    Args:
        evaluation: where things are and how much is made.
        methods: which methods to measure; those without weights are listed in `not_measured`.
    """
    budget = evaluation.budget
    reference = evaluation.reference
    anchors = anchor_rows(evaluation.anchors(), evaluation.truths, reference)
    present = [(m, evaluation.source(m.weights)[1]) for m in methods]
    absent = [
        f"{kind}: no such weights" for kind in sorted({m.weights for m, x in present if not x})
    ]
    absent += [f"{m.name}: not asked for" for m in METHODS if m not in methods]
    present = [(m, sha256) for m, sha256 in present if sha256]
    rows = [
        evaluation.row(method, n_steps, primed, sha256)
        for method, sha256, n_steps, primed in tqdm(_planned(present, budget), desc="rows")
    ]
    drifting, fading = [], []
    for method, sha256 in tqdm([p for p in present if p[0].name != "naive"], desc="long streams"):
        measured = drift_rows(evaluation.drift(method, sha256), BIN_S)
        drifting.append({"method": method.name, "n_steps": budget.drift_steps, **measured})
        fading.append(evaluation.fade(method, sha256))
    return {
        "machine": machine_dict(),
        "recogniser": {
            "sha256": evaluation.listener_header.sha256,
            "embedding": evaluation.listener.config.embedding,
            "scores": evaluation.listener_header.notes.get("scores", {}),
        },
        "random_weights": bool(evaluation.sources.random),
        "not_measured": absent,
        "reference_windows": reference.windows,
        "clip_s": evaluation.n_samples / evaluation.codec.sample_rate,
        "anchors": anchors,
        "rows": rows,
        "drift": drifting,
        "fades": fading,
        "other_listeners": evaluation.listener_words,
    }


def _planned(
    present: list[tuple[Method, str]], budget: Budget
) -> list[tuple[Method, str, int, bool]]:
    """The lines to measure, weights by weights so that each is read once."""
    return [
        (method, sha256, n_steps, primed)
        for method, sha256 in present
        for n_steps in (budget.naive_steps if method.name == "naive" else budget.steps)
        for primed in ((False, True) if budget.primed else (False,))
    ]
