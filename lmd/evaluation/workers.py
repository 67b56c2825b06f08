"""Several processes that make the parts of an evaluation; what they leave on disk is put together
afterwards by one that finds everything there.
"""

import contextlib
import gc
import os
import sys
from collections.abc import Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from operator import methodcaller

import torch
from tqdm import tqdm

from lmd.evaluation.generation import Budget
from lmd.evaluation.run import HELD_OUT, Evaluation, OutOfTime, Sources
from lmd.evaluation.units import Unit

Job = methodcaller  # of `Evaluation`, with its arguments: it can be sent to another process


def jobs_of(unit: Unit, budget: Budget) -> list[Job]:
    """What a unit consists of, seed by seed."""
    asked = (unit.method, unit.n_steps, unit.primed, unit.sha256)
    if unit.kind == "fade":
        return [Job("fade", unit.method, unit.sha256)]
    if unit.kind == "drift":
        streams = (unit.method, unit.sha256, unit.n_steps)
        return [Job("drift_of_seed", *streams, seed) for seed in range(budget.drift_seeds)]
    n_seeds = budget.seeds_of(unit.method, unit.n_steps, unit.primed)
    return [Job("row_of_seed", *asked, seed) for seed in range(n_seeds)]


def make_parts(
    sources: Sources,
    budget: Budget,
    cfg_scale: float,
    units: Sequence[Unit],
    n_workers: int,
    until_s: float,
) -> None:
    """Make everything that `units` and their anchors need, in processes of one thread each.

    Args:
        sources: where things are.
        budget: how much is made.
        cfg_scale: guidance, see `Evaluation`.
        units: what is wanted.
        n_workers: processes.
        until_s: on the monotonic clock; nothing of `units` is begun later.
    """
    first = [Job("embed_held_out", split) for split in HELD_OUT]
    first += [Job("anchors_of", seed) for seed in range(budget.n_seeds)]
    first += [Job("real", seed) for seed in range(budget.n_seeds)]
    then = [Job("drift_anchors_of", seed) for seed in range(budget.drift_seeds)]
    then += [job for unit in units for job in jobs_of(unit, budget)]
    with ProcessPoolExecutor(
        n_workers,
        mp_context=get_context("spawn"),
        initializer=_open,
        initargs=(sources, budget, cfg_scale),
    ) as pool:
        for jobs, limit_s, desc in ((first, float("inf"), "anchors"), (then, until_s, "parts")):
            made: Iterable[object] = pool.map(_do, [(job, limit_s) for job in jobs])
            for _ in tqdm(made, total=len(jobs), desc=desc, mininterval=2):
                pass


_mine: list[Evaluation] = []  # of this process


def _open(sources: Sources, budget: Budget, cfg_scale: float) -> None:
    gc.freeze()  # what was imported; the process then ends seconds sooner
    torch.set_num_threads(1)
    sys.stderr = open(os.devnull, "w")  # noqa: SIM115  # bars of several processes would mix
    _mine.append(Evaluation(sources, budget, cfg_scale))


def _do(job: tuple[Job, float]) -> None:
    """Leave the job's parts on disk, or leave it alone when the time is over."""
    make, until_s = job
    evaluation = _mine[0]
    evaluation.parts.until_s = until_s
    with contextlib.suppress(OutOfTime):
        make(evaluation)
