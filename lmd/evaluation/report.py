"""The results of an evaluation as JSON, tables and figures; no number in them is typed by hand."""

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import pandas as pd
from jinja2 import StrictUndefined, Template
from matplotlib.figure import Figure

from lmd.evaluation.plan import BY_EULER, FEW_STEPS, METHODS, WITH_EULER
from lmd.outputs import write_atomic, write_json

Result = Mapping[str, Any]
Row = Mapping[str, Any]
ANCHOR_WORDS = {
    "real": "real music",
    "codec": "real music through the codec: the floor",
    "shuffled": "its latent frames in random order: the ceiling of FD",
    "other prompts": "real music, another piece's prompt: the ceiling of KL",
}
# A result's name of a measure: its column, and what a value can be, in units of the column.
COLUMNS = {
    "fd": ("FD", 1, ()),
    "fd_infinite": ("FD∞", 1, ()),
    "kl": ("KL", 1, (0.0,)),
    "family": ("family %", 100, (0.0, 100.0)),
    "tempo": ("tempo %", 100, (0.0, 100.0)),
    "key_share": ("in key %", 100, (0.0, 100.0)),
    "key_clarity": ("key clarity", 1, ()),
    "consonance": ("consonance", 1, ()),
    "joins": ("boundaries", 1, (0.0,)),
    "clicks": ("clicks", 1, (0.0,)),
}
DRIFT_WORDS = {
    "distance": "distance from real",
    "loudness_lufs": "loudness, LU",
    "centroid_hz": "centroid, Hz",
    "key_clarity": "key clarity",
}


def write_report(result: Result, out: Path) -> str:
    """Write `evaluation.json`, `.md` and figures into a folder; the Markdown comes back."""
    write_result(out / "evaluation.json", result)
    markdown = report(result)
    write_atomic(out / "evaluation.md", (markdown + "\n").encode())
    drawn = {"distance": _distances(result)}
    if result["drift"]:
        drawn["drift"] = _drifts(result["drift"])
    for name, figure in drawn.items():
        figure.savefig(out / f"evaluation_{name}.png", dpi=80)
        plt.close(figure)
    return markdown


def write_result(path: Path, result: Result) -> None:
    """As plain JSON: what is not finite becomes null."""
    write_json(path, json.loads(json.dumps(result), parse_constant=lambda _: None))


def report(result: Result) -> str:
    """Everything as Markdown. A result without `engine` and `dtype` was played by PyTorch."""
    result = {"engine": "torch", "dtype": "float32", **result}
    template = Path(__file__).with_name("evaluation.md.j2").read_text()
    used = {
        f"{row['weights']} {row['sha256'][:8]} with cfg_scale {row['cfg_scale']:g}"
        for row in result["rows"]
    }
    return Template(template, undefined=StrictUndefined, trim_blocks=True).render(
        **result,
        few_steps=FEW_STEPS,
        by_euler=any(row["method"].endswith(BY_EULER) for row in result["rows"]),
        weights="; ".join(sorted(used)),
        quality=quality_table(result),
        drift_table=drift_table(result),
        command=_command(result),
    )


def table(rows: Iterable[Row]) -> str:
    """Rows as a Markdown table; what a row does not have stays empty."""
    frame = pd.DataFrame(rows, dtype=object).fillna("")
    return frame.to_markdown(index=False, disable_numparse=True)


def name_of(row: Row) -> str:
    """What a line is called in a sentence."""
    return f"{row['method']}, {row['n_steps']} steps{', primed' if row['primed'] else ''}"


def _named_lines(anchors: Mapping[str, Row], rows: Sequence[Row]) -> Iterable[tuple[dict, Row]]:
    """The first cells of a table's lines, anchors first, and what was measured of each."""
    for name, anchor in anchors.items():
        yield {" ": f"*{ANCHOR_WORDS[name]}*", "steps": ""}, anchor
    for row in rows:
        yield {" ": f"**{row['method']}**", "steps": row["n_steps"]}, row


def quality_table(result: Result) -> str:
    """Every measure of anchors and methods."""
    begins = {True: "real music", False: "silence", None: ""}
    return table(
        cells
        | {"begins with": begins[row.get("primed")]}
        | {words: format_interval(row[n], k, *ends) for n, (words, k, ends) in COLUMNS.items()}
        for cells, row in _named_lines(result["anchors"], result["rows"])
    )


def drift_table(result: Result) -> str:
    """Levels of long streams, and their slopes, which anchors are too short for."""
    rows = []
    for cells, row in _named_lines(result["drift_anchors"], result["drift"]):
        cells["distance from real"] = format_interval(row["distance"]["level"])
        if cells["steps"]:
            cells["seconds"] = f"{row['times_s'][-1] + row['times_s'][0]:.0f}"
            cells["streams"] = row["streams"]
            for name, words in DRIFT_WORDS.items():
                change = row[name]["slope_per_minute"]
                mark = "**" if change["low"] > 0 or change["high"] < 0 else ""
                cells[f"{words}, a minute"] = f"{mark}{format_interval(change)}{mark}"
        rows.append(cells)
    return table(rows)


def format_interval(
    interval: Mapping[str, float],
    scale: float = 1.0,
    least: float = -math.inf,
    most: float = math.inf,
) -> str:
    """`1.23 (1.10 – 1.36)`, cut to what is possible (after scaling)."""
    mean, low, high = (interval[end] * scale for end in ("mean", "low", "high"))
    if not math.isfinite(mean):
        return "–"
    low, high = max(least, low), min(most, high)
    if not math.isfinite(low) or low == high:
        return _number(mean)
    return f"{_number(mean)} ({_number(low)} – {_number(high)})"


def _number(value: float) -> str:
    """Three significant digits."""
    digits = max(0, 2 - math.floor(math.log10(abs(value)))) if value else 0
    return f"{value:.{min(digits, 4)}f}" if math.isfinite(value) else "–"


def _command(result: Result) -> str:
    """What measures all this again."""
    budget, methods = result["budget"], {row["method"]: row for row in result["rows"]}
    words = ["python -m lmd evaluate --budget", budget["name"], "--drift-steps"]
    words += [*map(str, budget["drift_steps"]), f"--drift-seconds {budget['drift_s']:g}"]
    guided = {row["cfg_scale"] for row in methods.values() if row["weights"] != "arc"}
    words += [f"--cfg-scale {scale:g}" for scale in guided]
    words += [f"--engine {result['engine']} --dtype {result['dtype']}"]
    if len(methods) < len(METHODS + WITH_EULER if budget["euler_steps"] else METHODS):
        words += ["--methods", *methods]
    if result["random_weights"]:
        words += ["--random", *{row["sha256"].removeprefix("random-") for row in methods.values()}]
    return " ".join(words)


def _distances(result: Result) -> Figure:
    """Every method's distance with its interval; Euler's rows are too many for a picture."""
    anchors = result["anchors"]
    rows = [row for row in result["rows"] if not row["method"].endswith(BY_EULER)]
    names = [name_of(row) for row in rows] or ["real music"]
    estimates = pd.DataFrame([row["fd"] for row in rows] or [anchors["real"]["fd"]])
    ends = estimates[["low", "high"]].replace([-math.inf, math.inf], math.nan)
    size = {"figsize": (7, 0.7 + 0.24 * len(names)), "layout": "constrained"}
    figure, ax = plt.subplots(**size)
    ax.hlines(names, ends["low"], ends["high"], color="C0", alpha=0.4, lw=3)
    ax.plot(estimates["mean"], names, "o", color="C0", markersize=4)
    levels = {"real": "real music", "codec": "codec floor", "shuffled": "frames shuffled"}
    for number, (name, words) in enumerate(levels.items(), start=1):
        ax.axvline(anchors[name]["fd"]["mean"], color=f"C{number}", ls="--", lw=1, label=words)
    ax.tick_params("y", labelsize=8)
    ax.set(ylim=(len(names) - 0.5, -0.5), xlim=(0, None))
    ax.set_xlabel("Fréchet distance from held-out music (lower is nearer)")
    ax.legend(frameon=False, fontsize=8)
    return figure


def _drifts(rows: Sequence[Row]) -> Figure:
    """A row of pictures for each number of steps, the same axis for each measure."""
    steps = list(dict.fromkeys(row["n_steps"] for row in rows))
    size = {"figsize": (12, 0.6 + 2.1 * len(steps)), "layout": "constrained"}
    figure, axes = plt.subplots(
        len(steps), len(DRIFT_WORDS), sharex=True, sharey="col", squeeze=False, **size
    )
    for row in rows:
        line = axes[steps.index(row["n_steps"])]
        line[0].set_ylabel(f"{row['n_steps']} steps")
        for ax, name in zip(line, DRIFT_WORDS, strict=True):
            curve = pd.DataFrame(row[name]["curve"]).replace([-math.inf, math.inf], math.nan)
            (drawn,) = ax.plot(row["times_s"], curve["mean"], label=row["method"])
            band = {"color": drawn.get_color(), "alpha": 0.15, "lw": 0}
            ax.fill_between(row["times_s"], curve["low"], curve["high"], **band)
    for top, bottom, words in zip(axes[0], axes[-1], DRIFT_WORDS.values(), strict=True):
        top.set_title(words)
        bottom.set_xlabel("seconds")
    figure.legend(*axes[0][0].get_legend_handles_labels(), loc="outside right center")
    return figure
