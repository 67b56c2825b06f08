"""What an ARC run's own logs say: cost by rollout length, curves, a model card."""

from pathlib import Path

import pandas as pd

from lmd.arc.options import ArcOptions, ArcRun
from lmd.training.card import among, card, curve_table, run_facts, run_log

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


def costs(out: Path) -> pd.DataFrame:
    """Median seconds and highest memory of an update, by network and rollout length."""
    log = arc_log(out)
    log["trains"] = log["is_generator"].astype(int).map(WHO)
    columns = {"updates": ("step", "count"), "calls": ("calls", "mean")}
    columns |= {"seconds": ("update_s", "median"), "memory_gb": ("memory_gb", "max")}
    return log.groupby(["trains", "rollout_frames"]).agg(**columns).reset_index()


def cost_table(out: Path) -> str:
    """`costs` as Markdown."""
    return costs(out).to_markdown(index=False, floatfmt=("g", "g", "g", ".1f", ".2f", ".2f"))


def about(options: ArcOptions) -> str:
    """One sentence: what a run's weights are."""
    *most, last = [str(n) for n, _ in options.n_steps]
    counts = f"{', '.join(most)} or {last}" if most else last
    steps = "step" if counts == "1" else "steps"
    return (
        f"The live model after ARC-Forcing: plays in {counts} {steps}, without guidance, "
        f"{among(options.regimes)}."
    )


def arc_card(out: Path, weights: Path, options: ArcRun) -> str:
    """Markdown about the weights that the run in `out` made."""
    log, facts = arc_log(out), run_facts(weights)
    log["minutes"] = log["update_s"].cumsum() / 60
    facts["updates"] = f"{facts.pop('steps')}, both networks together"
    columns = ["discriminator/pair", "discriminator/contrastive", "generator/pair", "accuracy"]
    curves = curve_table(log, *[name for name in columns if name in log])
    return card(weights, about(options.arc), facts, curves, cost_table(out))
