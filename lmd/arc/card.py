"""What an ARC run's own logs say: cost by rollout length, curves, a model card."""

import math
from pathlib import Path
from typing import Any

import pandas as pd
from matplotlib.figure import Figure

from lmd.arc.plan import CONDITIONS, ArcOptions
from lmd.checkpoint import read_header
from lmd.training.card import NOTICE, among, data_row, file_rows, hardware_row, start_rows

WHO = {0: "discriminator", 1: "generator"}


def arc_log(out: Path) -> pd.DataFrame:
    """One row per update, in order; an update that was run twice counts once.

    The logger repeats a network's last losses while the other is trained; here they are empty then.
    """
    files = sorted((out / "logs").glob("from-*/metrics.csv"))
    log = pd.concat([pd.read_csv(path) for path in files], ignore_index=True)
    log = log.drop_duplicates("step", keep="last").sort_values("step", ignore_index=True)
    for number, who in WHO.items():
        own = [name for name in log.columns if name.startswith(f"{who}/")]
        log.loc[log["is_generator"] != number, own] = float("nan")
    return log


def costs(out: Path) -> pd.DataFrame:
    """Median seconds and highest memory of an update, by network and rollout length."""
    log = arc_log(out)
    table = (
        log.groupby(["is_generator", "rollout_frames"])
        .agg(
            updates=("step", "count"),
            calls=("calls", "mean"),
            seconds=("update_s", "median"),
            memory_gb=("memory_gb", "max"),
        )
        .reset_index()
    )
    table["trains"] = table.pop("is_generator").astype(int).map(WHO)
    return table


def cost_table(out: Path) -> str:
    """`costs` as Markdown."""
    lines = [
        "| trains | rollout frames | updates | calls | median s per update | memory GB |",
        "|---|---|---|---|---|---|",
    ]
    for row in costs(out).itertuples():
        lines.append(
            f"| {row.trains} | {row.rollout_frames:.0f} | {row.updates} | {row.calls:.1f} "
            f"| {row.seconds:.2f} | {row.memory_gb:.2f} |"
        )
    return "\n".join(lines)


def curve_table(out: Path, n_parts: int = 8) -> str:
    """Mean losses and accuracy over equal parts of the run, as Markdown."""
    log = arc_log(out)
    columns = ["discriminator/pair", "discriminator/contrastive", "generator/pair", "accuracy"]
    lines = [
        "| updates | minutes | pair loss, D | contrastive, D | pair loss, G | accuracy |",
        "|---|---|---|---|---|---|",
    ]
    log["minutes"] = log["update_s"].cumsum() / 60
    for _, part in log.groupby(log.index * n_parts // max(1, len(log))):
        means: list[Any] = [part[name].mean() if name in part else None for name in columns]
        told = " | ".join("–" if m is None or pd.isna(m) else f"{m:.3f}" for m in means)
        first, last = int(part["step"].min()), int(part["step"].max())
        lines.append(f"| {first} – {last} | {part['minutes'].max():.1f} | {told} |")
    return "\n".join(lines)


def save_curves(out: Path) -> Path:
    """Draw the run in `out`: losses and accuracy over updates, each network's where it trained.

    Returns:
        The picture, `curves.png` in that folder.
    """
    log = arc_log(out)
    figure = Figure(figsize=(9, 2.8), layout="constrained")
    losses, shares = figure.subplots(1, 2)
    for name in ("discriminator/pair", "discriminator/contrastive", "generator/pair"):
        if name in log:
            curve = log[["step", name]].dropna()
            losses.plot(curve["step"], curve[name], ".-", markersize=3, linewidth=0.8, label=name)
    losses.axhline(math.log(2), color="grey", linestyle=":", label="log 2: cannot tell")
    losses.set(xlabel="update", ylabel="loss", yscale="log")
    judged = log[log["is_generator"] == 0]
    shares.plot(judged["step"], judged["accuracy"], ".-", markersize=3, linewidth=0.8)
    shares.axhline(0.5, color="grey", linestyle=":")
    shares.set(xlabel="update", ylabel="pairs told apart", ylim=(0, 1.02))
    figure.legend(loc="outside upper center", ncols=4, frameon=False, fontsize=8)
    path = out / "curves.png"
    figure.savefig(path, dpi=100)
    return path


def about(options: ArcOptions) -> str:
    """One sentence: what a run's weights are."""
    *most, last = [str(n) for n, _ in options.n_steps]
    told = f"{', '.join(most)} or {last}" if most else last
    steps = "step" if told == "1" else "steps"
    return (
        f"The live model after ARC-Forcing: plays in {told} {steps}, without guidance, "
        f"{among(options.regimes)}."
    )


def arc_card(out: Path, weights: Path, options: ArcOptions) -> str:
    """Markdown about the weights that the run in `out` made; nothing in it is typed by hand.

    Args:
        out: the run's folder.
        weights: what it exported.
        options: of the run's updates.

    Raises:
        LmdError: `weights` is not a checkpoint of this project.
    """
    header = read_header(weights)
    notes = header.notes
    base = notes["base"]
    return "\n".join(
        [
            f"# {weights.stem}",
            "",
            about(options),
            "",
            "| | |",
            "|---|---|",
            *file_rows(header, weights),
            f"| sizes | preset `{header.config.name}` |",
            *start_rows(notes),
            f"| discriminator from | `{base['file']}` ({base['sha256'][:12]}…) |",
            f"| updates | {notes['steps']}, both networks together |",
            f"| contrasted conditions | {', '.join(CONDITIONS)} |",
            f"| seed | {notes['seed']} |",
            hardware_row(notes),
            data_row(notes),
            f"| command | `{notes['command']}` |",
            "",
            curve_table(out),
            "",
            cost_table(out),
            "",
            *NOTICE,
        ]
    )
