"""`python -m lmd evaluate`: measure what the weights play, beside real music.

    python -m lmd evaluate --quick
    python -m lmd evaluate --out outputs/published

Every finished part is kept under --parts: a run that was stopped goes on where it was, and weights
that arrive later add their rows. What is missing is named, not invented.
"""

import gc
import os
import sys
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict
from multiprocessing import get_context
from typing import Any

import torch
from tqdm import tqdm

from lmd.corpus.manifest import Corpus
from lmd.errors import LmdError
from lmd.evaluation.metrics import gaussian
from lmd.evaluation.parts import ANCHORS, HELD_OUT, LONG_ANCHORS, VERSION, Evaluation
from lmd.evaluation.plan import BIN_S, Options, Unit, units_of
from lmd.evaluation.report import write_report
from lmd.evaluation.summary import anchor_rows, drift_row
from lmd.machine import machine_dict, tune_allocator
from lmd.outputs import check_apart, check_folder, check_outputs


def main(options: Options) -> int:
    """Measure everything there are weights for; write JSON, tables and figures."""
    for name in ("threads", "workers"):
        if (value := getattr(options, name)) is not None and value < 1:
            raise LmdError(f"--{name} {value}", "at least 1", "Raise it.")
    check_apart(out=options.out, parts=options.parts)
    check_folder(options.parts)
    check_outputs(json=options.out / "evaluation.json", json_key="rows", make_folders=True)
    if options.threads:
        torch.set_num_threads(options.threads)
    tune_allocator()
    print(write_report(evaluate(Evaluation(options)), options.out))
    return 0


def evaluate(evaluation: Evaluation) -> dict[str, Any]:
    """Everything as plain values, ready for JSON; what was left out is in `not_measured`."""
    options, budget = evaluation.options, evaluation.budget
    seeds, long_seeds = range(budget.n_seeds), range(budget.drift_seeds)
    methods = options.chosen_methods
    present = [method for method in methods if evaluation.sha256(method.weights)]
    kinds = sorted({method.weights for method in methods if method not in present})
    absent = [f"{kind}: no such weights" for kind in kinds]
    absent += [f"{m.name}: not asked for" for m in budget.methods if m not in methods]
    units = [unit for method in present for unit in units_of(method, budget)]
    if options.workers > 1:
        make_parts(evaluation, units)
    shown = tqdm(ANCHORS, desc="real music", mininterval=2)
    anchors = {name: [evaluation.anchor(name, seed) for seed in seeds] for name in shown}
    truths, reference = [evaluation.truth(k) for k in seeds], gaussian(evaluation.reference_points)
    long_anchors = {
        name: drift_row([evaluation.anchor(name, k, is_long=True) for k in long_seeds], BIN_S)
        for name in tqdm(LONG_ANCHORS, desc="real streams", mininterval=2)
    }
    lines = [(unit.kind, evaluation.line(unit)) for unit in tqdm(units, desc="rows and streams")]
    used = {index for seed in seeds for index in evaluation.chosen(budget.n_clips, seed)}
    corpus, header = Corpus(options.data), evaluation.tagger_header
    return {
        "budget": {"name": options.budget_name, **asdict(budget)},
        "version": VERSION,
        "machine": machine_dict(),
        "tagger": {
            "sha256": header.sha256,
            "embedding": evaluation.tagger.config.embedding,
            "scores": header.notes.get("scores", {}),
        },
        "random_weights": bool(options.random),
        "reference_windows": len(evaluation.reference_points),
        "prompts": {
            "renditions": len(used),
            "pieces": len({evaluation.corpus.rows[index].piece_id for index in used}),
        },
        "corpus_hours": corpus.duration_s / 3600,
        "corpus_asked_hours": corpus.settings().get("hours"),
        "clip_s": evaluation.n_samples / evaluation.codec.sample_rate,
        "anchors": anchor_rows(anchors, truths, reference),
        "drift_anchors": long_anchors,
        "made_on": sorted(evaluation.made_on),
        "rows": [line for kind, line in lines if kind != "drift"],
        "drift": [line for kind, line in lines if kind == "drift"],
        "not_measured": absent,
    }


Job = tuple[str, tuple[Any, ...]]  # a method of `Evaluation` and its arguments
_mine: list[Evaluation] = []  # of this process


def make_parts(evaluation: Evaluation, units: list[Unit]) -> None:
    """Leave all parts of units and anchors on disk, by processes of one thread each."""
    options, budget = evaluation.options, evaluation.budget
    first: list[Job] = [("held_out", (split,)) for split in HELD_OUT]  # others build on these
    then: list[Job] = [("anchor", (n, k)) for n in ANCHORS for k in range(budget.n_seeds)]
    then += [("anchor", (n, k, True)) for n in LONG_ANCHORS for k in range(budget.drift_seeds)]
    then += [("part", (unit, k)) for unit in units for k in range(unit.n_seeds(budget))]
    spawn = get_context("spawn")
    with ProcessPoolExecutor(options.workers, spawn, _open, (options,)) as pool:
        for jobs in (first, then):
            list(tqdm(pool.map(_do, jobs), total=len(jobs), desc="parts", mininterval=2))


def _open(options: Options) -> None:
    gc.freeze()  # what was imported; the process then ends seconds sooner
    torch.set_num_threads(1)
    sys.stderr = open(os.devnull, "w")  # noqa: SIM115  # bars of several processes would mix
    _mine.append(Evaluation(options))


def _do(job: Job) -> None:
    name, arguments = job
    getattr(_mine[0], name)(*arguments)
