"""What an ARC run's own logs say: cost by rollout length, curves, a model card."""

from pathlib import Path

import pandas as pd

from lmd.arc.options import ArcRun
from lmd.training.card import card, curve_table, run_facts, run_log

WHO = {0: "discriminator", 1: "generator"}


def arc_log(out: Path) -> pd.DataFrame:
    """One row per update, in order; an update that was run twice counts once.

    The logger repeats a network's last losses while the other is trained; here they are empty then.
    """
    log = run_log(out)
    for number, who in WHO.items():
        own = [name for name in log.columns if name.startswith(f"{who}/")]
        log.loc[log["is_generator"] != number, own] = float("nan")
    return log


def costs(log: pd.DataFrame) -> pd.DataFrame:
    """Median seconds and highest memory of an update, by network and rollout length."""
    log = log.assign(trains=log["is_generator"].astype(int).map(WHO))
    columns = {"updates": ("step", "count"), "calls": ("calls", "mean")}
    columns |= {"seconds": ("update_s", "median"), "memory_gb": ("memory_gb", "max")}
    return log.groupby(["trains", "rollout_frames"]).agg(**columns).reset_index()


def about(options: ArcRun) -> str:
    """One sentence: what a run's weights are."""
    *most, last = options.steps.split(",")
    counts = f"{', '.join(most)} or {last}" if most else last
    regimes = options.regimes.split(",")
    return (
        f"The live model after ARC-Forcing: plays in {counts} step{'s' * (counts != '1')}, without "
        f"guidance, in the regime{'s' * (len(regimes) > 1)} {' and '.join(regimes)}."
    )


def arc_card(weights: Path, options: ArcRun) -> str:
    """Markdown about the weights that a run made."""
    log, facts = arc_log(options.out), run_facts(weights)
    log["minutes"] = log["update_s"].cumsum() / 60
    facts["updates"] = f"{facts.pop('steps')}, both networks together"
    columns = ["discriminator/pair", "discriminator/contrastive", "generator/pair", "accuracy"]
    curves = curve_table(log, *[name for name in columns if name in log])
    shown = ("g", "g", "g", ".1f", ".2f", ".2f")
    table = costs(log).to_markdown(index=False, floatfmt=shown)
    return card(weights, about(options), facts, curves, table)
