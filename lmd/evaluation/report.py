"""The results of an evaluation as JSON, tables and figures; no number in them is typed by hand."""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.figure import Figure

from lmd.checkpoint import write_atomic
from lmd.evaluation.aims import aims, difference, name_of
from lmd.evaluation.generation import BY_EULER, FEW_STEPS, methods_of
from lmd.machine import hardware
from lmd.show import plot_bands, plot_intervals

ANCHOR_WORDS = {
    "real": "real music",
    "codec": "real music through the codec: the floor",
    "shuffled": "its latent frames in random order: the ceiling of FD",
    "other prompts": "real music, another piece's prompt: the ceiling of KL",
}
COLUMNS = {
    "fd": "FD",
    "fd_infinite": "FD∞",
    "kl": "KL",
    "family": "family %",
    "tempo": "tempo %",
    "key_share": "in key %",
    "key_clarity": "key clarity",
    "consonance": "consonance",
    "joins": "joins",
    "clicks": "clicks",
}
PERCENT = ("family", "tempo", "key_share")
RANGES = dict.fromkeys(("kl", "joins", "clicks"), (0.0,))
RANGES |= dict.fromkeys(PERCENT, (0.0, 1.0))
DRIFT_WORDS = {
    "distance": "distance from real",
    "loudness_lufs": "loudness, LU",
    "centroid_hz": "centroid, Hz",
    "key_clarity": "key clarity",
}

# FD-OpenL3 of arXiv 2605.22717, Table 1 (47 s clips, Song Describer), by method, steps, primed.
PAPER_FD = (
    (("ED+AF", 8, False), ("ED", 50, False), (35.88, 61.06)),
    (("BC+AF", 2, False), ("BC", 50, False), (47.26, 64.87)),
    (("ED+AF", 8, True), ("ED", 50, True), (29.00, 35.35)),
    (("BC+AF", 2, True), ("BC", 50, True), (35.45, 47.13)),
    (("ED", 50, True), ("ED", 50, False), (35.35, 61.06)),
    (("BC", 50, True), ("BC", 50, False), (47.13, 64.87)),
    (("ED", 50, False), ("BC", 50, False), (61.06, 64.87)),
    (("ED+AF", 8, False), ("BC+AF", 2, False), (35.88, 47.26)),
)


def write_report(result: dict[str, Any], out: Path) -> str:
    """Write `evaluation.json`, `.md` and figures into a folder.

    Returns:
        The Markdown.
    """
    out.mkdir(parents=True, exist_ok=True)
    result = result | {"aims": aims(result)}
    text = json.dumps(_finite(result), indent=1, allow_nan=False)
    write_atomic(out / "evaluation.json", (text + "\n").encode())
    markdown = report(result)
    write_atomic(out / "evaluation.md", (markdown + "\n").encode())
    for name, figure in figures(result).items():
        figure.savefig(out / f"{name}.png", dpi=80)
        plt.close(figure)
    return markdown


def _finite(value: Any) -> Any:
    """Plain JSON: what is not finite becomes null."""
    if isinstance(value, Mapping):
        return {key: _finite(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(each) for each in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def report(result: Mapping[str, Any]) -> str:
    """Everything as Markdown."""
    missing = result["not_measured"]
    others = "; ".join(f"{name}: {word}" for name, word in result["other_listeners"].items())
    lines = [
        "# Evaluation",
        "",
        *_warning(result),
        _setting(result),
        "",
        *quality_table(result),
        "",
        *_others_table(result),
        *_speed_table(result["rows"]),
        "",
        *_drift_table(result["drift"], result["drift_anchors"]),
        "",
        *_aims_table(result["aims"]),
        "",
        *_order_table(result["rows"]),
        f"Repeated by `{_command(result)}` with the same corpus, here of "
        f"{result['corpus_hours']:.1f} h{_building(result.get('corpus_asked_hours'))}. "
        f"Not measured: {'; '.join(missing) or 'nothing was left out'}. Other listeners: {others}.",
    ]
    return "\n".join(lines)


def _building(asked_hours: float | None) -> str:
    """How such a corpus is built, where it notes what was asked for (somebody's audio does not)."""
    return f" (`python -m lmd data build --hours {asked_hours:g}`)" if asked_hours else ""


def _warning(result: Mapping[str, Any]) -> list[str]:
    if not result["random_weights"]:
        return []
    return ["**Random weights: this run tests the machinery and says nothing about music.**", ""]


def _setting(result: Mapping[str, Any]) -> str:
    """What was done, in words."""
    budget, machine, prompts = result["budget"], result["machine"], result["prompts"]
    real = result["anchors"]["real"]
    fewer = ""
    if budget["other_seeds"] < budget["n_seeds"]:
        fewer = (
            f" ({budget['other_seeds']} for primed streams, for the naive method and for more than "
            f"{FEW_STEPS} steps)"
        )
    return (
        f"Budget `{budget['name']}`: {real['clips']} prompts × {budget['n_seeds']} seeds{fewer}, "
        f"of {prompts['renditions']} renditions of {prompts['pieces']} held-out pieces, clips of "
        f"{result['clip_s']:.1f} s in blocks of {budget['block_frames']} frames. ED is "
        "enc-dec, BC block-causal, AF after distillation and ARC-Forcing; naive computes the whole "
        f"window at every step. {_solvers(result)}"
        "Values are means over seeds with Student's 95 % intervals, wide where seeds are few. "
        f"FD is the Fréchet distance of {real['windows']} windows per seed from "
        f"{result['reference_windows']} of all held-out pieces that one family plays, in the "
        f"embedding of the recogniser {result['recogniser']['sha256'][:8]}, which knows this "
        "corpus and nothing else; compare it within a column only, for with so few windows most of "
        "it is the size of the sample. "
        "FD∞: all seeds together, extrapolated to endless samples (the jackknife over seeds; of "
        "three seeds a wide guess). Seeds draw other prompts, excerpts and noise from the same few "
        "pieces: their intervals say what other draws would give, not what other pieces would. "
        "Real music does not get 0, for prompts are drawn from the test pieces alone; it and what "
        "the codec makes of it are excerpts of music that is in the reference, which no method's "
        "are, so that they come out lower than music from elsewhere would. KL: "
        "families heard in the real piece against those heard in the clip, nats (for real music: "
        "in another excerpt of the piece). Joins, clicks: "
        f"at block boundaries over elsewhere, 1 = not heard. {_guidance(result)}{_kept(result)}"
        f"{_made_on(result)}Machine: {machine['cpu']}, "
        f"{machine['n_threads']} thread(s), torch {machine['torch']}."
    )


def _guidance(result: Mapping[str, Any]) -> str:
    """Which guidance, and which weights."""
    used = {
        f"{row['weights']} {row['sha256'][:8]} with cfg_scale {row['cfg_scale']:g}"
        for row in result["rows"]
    }
    return f"Weights: {'; '.join(sorted(used))} (1 = no guidance). " if used else ""


def _solvers(result: Mapping[str, Any]) -> str:
    """Who plays with what, where there are rows with Euler's method."""
    if not any(row["method"].endswith(BY_EULER) for row in result["rows"]):
        return ""
    return (
        "All play with DPM-Solver++(2M), but for the rows named Euler, which say what its second "
        "order is worth: the paper plays what is not ARC-Forced with Euler's method. "
    )


def _made_on(result: Mapping[str, Any]) -> str:
    """Where music was made, if not only where it was timed."""
    here, found = hardware(result["machine"]), result["made_on"]
    places = [f"{name} (here)" if name == here else name for name in found]
    return f"Music made on: {'; '.join(places)}; timed here. " if set(found) - {here} else ""


def _kept(result: Mapping[str, Any]) -> str:
    """What was measured before, and where."""
    extended = result.get("extended")
    if not extended:
        return ""
    return (
        f"{extended['kept']} of the lines' measures of sound come from earlier runs on "
        f"{', '.join(extended['machines'])}, whose anchors were measured again and agree; "
        "all timings are of one run here. "
    )


def quality_table(result: Mapping[str, Any]) -> list[str]:
    """The lines of the table of quality: anchors first, then methods."""
    lines = [
        f"| | steps | begins with | {' | '.join(COLUMNS.values())} |",
        "|---" * (3 + len(COLUMNS)) + "|",
    ]
    for name, words in ANCHOR_WORDS.items():
        lines.append(f"| *{words}* | | | {_cells(result['anchors'][name])} |")
    for row in result["rows"]:
        begins = "real music" if row["primed"] else "silence"
        lines.append(f"| **{row['method']}** | {row['n_steps']} | {begins} | {_cells(row)} |")
    return lines


def _cells(row: Mapping[str, Any]) -> str:
    return " | ".join(
        told(row[name], 100 if name in PERCENT else 1, *RANGES.get(name, ()))
        if isinstance(row[name], Mapping)
        else _number(row[name])
        for name in COLUMNS
    )


def told(
    interval: Mapping[str, Any],
    scale: float = 1.0,
    least: float = -math.inf,
    most: float = math.inf,
) -> str:
    """An interval in a cell, `1.23 (1.10 – 1.36)`, cut to what is possible (before scaling)."""
    mean = interval["mean"] * scale
    low, high = max(least, interval["low"]) * scale, min(most, interval["high"]) * scale
    if not math.isfinite(mean):
        return "–"
    if not math.isfinite(low) or low == high:
        return _number(mean)
    return f"{_number(mean)} ({_number(low)} – {_number(high)})"


def _number(value: float) -> str:
    """Three significant digits."""
    if not math.isfinite(value):
        return "–"
    digits = max(0, 2 - math.floor(math.log10(abs(value)))) if value else 0
    return f"{value:.{min(digits, 4)}f}"


def _others_table(result: Mapping[str, Any]) -> list[str]:
    """What further listeners say; nothing where there are none."""
    names = list(result["anchors"]["real"]["others"])
    if not names:
        return []
    lines = [f"| | steps | begins with | {' | '.join(names)} |", "|---" * (3 + len(names)) + "|"]
    for name, words in ANCHOR_WORDS.items():
        cells = " | ".join(told(result["anchors"][name]["others"][other]) for other in names)
        lines.append(f"| *{words}* | | | {cells} |")
    for row in result["rows"]:
        begins = "real music" if row["primed"] else "silence"
        cells = " | ".join(told(row["others"][other]) for other in names)
        lines.append(f"| **{row['method']}** | {row['n_steps']} | {begins} | {cells} |")
    return [*lines, ""]


def _speed_table(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    lines = [
        "One stream alone, three times; `load`: processes that wanted the machine's cores "
        "meanwhile (its highest).",
        "",
        "| | steps | model calls per block | first block ms | block ms | decode ms "
        "| × real time | load |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        speed = row["speed"]
        if row["primed"] or speed is None:
            continue
        names = ("ttff_ms", "dit_ms", "decode_ms", "rtf")
        cells = " | ".join([*(told(speed[name]) for name in names), _number(speed["load"])])
        lines.append(f"| {row['method']} | {row['n_steps']} | {speed['evaluations']} | {cells} |")
    return lines


def _drift_table(
    rows: Sequence[Mapping[str, Any]], anchors: Mapping[str, Mapping[str, Any]]
) -> list[str]:
    if not rows:
        return ["No long streams were made."]
    lines = [
        "Long streams: mean distance from real music, then changes per minute with their 95 % "
        "intervals over streams (**bold**: differs from 0). This distance is defined for a single "
        "window, not FD: squared, in units of the covariance of other held-out pieces than the "
        "prompts', per dimension; 1 is what those have on average.",
        "",
        "| | steps | seconds | streams | distance from real | "
        f"{' | '.join(f'{words}, a minute' for words in DRIFT_WORDS.values())} |",
        "|---" * (5 + len(DRIFT_WORDS)) + "|",
    ]
    for name, level in anchors.items():
        blank = " |" * (1 + len(DRIFT_WORDS))
        lines.append(f"| *{ANCHOR_WORDS[name]}* | | | | {told(level['distance']['level'])}{blank}")
    for row in rows:
        cells = []
        for name in DRIFT_WORDS:
            change = row[name]["slope_per_minute"]
            mark = "**" if change["low"] > 0 or change["high"] < 0 else ""
            cells.append(f"{mark}{told(change)}{mark}")
        seconds = row["times_s"][-1] + row["times_s"][0]
        lines.append(
            f"| {row['method']} | {row['n_steps']} | {seconds:.0f} | {row['streams']} "
            f"| {told(row['distance']['level'])} | {' | '.join(cells)} |"
        )
    return lines


def _aims_table(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    words = {True: "yes", False: "no", None: "not measured"}
    lines = ["| aim | found | met |", "|---|---|---|"]
    return lines + [f"| {row['aim']} | {row['found']} | {words[row['met']]} |" for row in rows]


def _order_table(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """Which of two is closer to real music, here and in the paper; pairs that were measured."""
    lines = [
        "| closer to real music? (FD) | in the paper | here, on the seeds that both have | "
        "the same order |",
        "|---|---|---|---|",
    ]
    by_name = {(row["method"], row["n_steps"], row["primed"]): row for row in rows}
    for first, second, theirs in PAPER_FD:
        nearer, farther = (_at_most(by_name, *each) for each in (first, second))
        if nearer is None or farther is None:
            continue
        more = difference(nearer, farther)
        same = "yes" if (more.mean > 0) == (theirs[1] > theirs[0]) else "no"
        if more.low <= 0 <= more.high:
            same = "undecided"
        asked, had = (first[1], second[1]), (nearer["n_steps"], farther["n_steps"])
        steps = "" if asked == had else f" (with {asked[0]} and {asked[1]} steps)"
        lines.append(
            f"| {name_of(nearer)} than {name_of(farther)} "
            f"| {theirs[0]:.3g} against {theirs[1]:.3g}{steps} "
            f"| nearer by {told(asdict(more))} | {same} |"
        )
    return [*lines, ""] if len(lines) > 2 else []


def _at_most(
    by_name: Mapping[tuple, Mapping[str, Any]], method: str, n_steps: int, primed: bool
) -> Mapping[str, Any] | None:
    """The row of a method with the most steps up to `n_steps`."""
    there = [n for name, n, p in by_name if (name, p) == (method, primed) and n <= n_steps]
    return by_name[method, max(there), primed] if there else None


def _command(result: Mapping[str, Any]) -> str:
    """What measures all this again."""
    budget, methods = result["budget"], {row["method"]: row for row in result["rows"]}
    words = ["python -m lmd evaluate --budget", budget["name"], "--drift-steps"]
    words += [*map(str, budget["drift_steps"]), f"--drift-seconds {budget['drift_s']:g}"]
    guided = {row["cfg_scale"] for row in methods.values() if row["weights"] != "arc"}
    words += [f"--cfg-scale {scale:g}" for scale in guided]
    if len(methods) < len(methods_of(budget["euler_steps"])):
        words += ["--methods", *methods]
    if result["random_weights"]:
        words += ["--random", *{row["sha256"].removeprefix("random-") for row in methods.values()}]
    return " ".join(words)


def figures(result: Mapping[str, Any]) -> dict[str, Figure]:
    """Distances of all methods; drift; belief along a fade of prompts."""
    drawn = {"evaluation_distance": _distances(result)}
    if result["drift"]:
        drawn["evaluation_drift"] = _drifts(result["drift"])
    if result["fades"]:
        drawn["evaluation_fade"] = _fades(result["fades"])
    return drawn


def _distances(result: Mapping[str, Any]) -> Figure:
    anchors = result["anchors"]
    # Euler's rows stand in the table; they are too many for a picture.
    shown = [row for row in result["rows"] if not row["method"].endswith(BY_EULER)]
    estimates = {name_of(row): row["fd"] for row in shown}
    estimates = estimates or {"real music": anchors["real"]["fd"]}
    names = {"real": "real music", "codec": "codec floor", "shuffled": "frames shuffled"}
    levels = {words: anchors[name]["fd"]["mean"] for name, words in names.items()}
    ax = plot_intervals(estimates, levels)
    ax.set(xlim=(0, None), xlabel="Fréchet distance from held-out music (lower is nearer)")
    return ax.figure


def _drifts(rows: Sequence[Mapping[str, Any]]) -> Figure:
    """A row of pictures for each number of steps, the same axis for each measure."""
    steps = list(dict.fromkeys(row["n_steps"] for row in rows))
    size = (len(steps), len(DRIFT_WORDS))
    figure, axes = plt.subplots(
        *size,
        figsize=(12, 0.6 + 2.1 * size[0]),
        sharex=True,
        sharey="col",
        squeeze=False,
        layout="constrained",
    )
    for line, n_steps in zip(axes, steps, strict=True):
        line[0].set_ylabel(f"{n_steps} steps")
        for ax, name in zip(line, DRIFT_WORDS, strict=True):
            curves = {
                row["method"]: (row["times_s"], row[name]["curve"])
                for row in rows
                if row["n_steps"] == n_steps
            }
            plot_bands(curves, ax, legend=False)
    for ax, words in zip(axes[0], DRIFT_WORDS.values(), strict=True):
        ax.set_title(words)
    for ax in axes[-1]:
        ax.set_xlabel("seconds")
    figure.legend(*axes[0][0].get_legend_handles_labels(), loc="outside right center")
    return figure


def _fades(rows: Sequence[Mapping[str, Any]]) -> Figure:
    """What the recogniser hears while one prompt gives way to another, a picture per method."""
    figure, axes = plt.subplots(
        1, len(rows), figsize=(4 * len(rows), 2.8), squeeze=False, layout="constrained"
    )
    for ax, row in zip(axes[0], rows, strict=True):
        belief = np.array(row["belief"])  # [pair, window, 2]
        middles = row["window_s"] / 2 * (1 + np.arange(belief.shape[1]))
        curves = {}
        for which, name in enumerate(("first prompt's family", "second prompt's family")):
            mean, error = belief[:, :, which].mean(0), belief[:, :, which].std(0)
            bands = [
                {"mean": m, "low": m - e, "high": m + e} for m, e in zip(mean, error, strict=True)
            ]
            curves[name] = (middles, bands)
        plot_bands(curves, ax, legend=False)
        ax.set(title=row["method"], xlabel="seconds", ylim=(0, 1.02))
        starts = np.arange(len(row["weights"]) + 1) * row["block_s"]
        words = "second prompt's weight"
        ax.stairs(row["weights"], starts, baseline=None, color="grey", ls=":", label=words)
    axes[0][0].set_ylabel("belief (± 1 sd over pairs)")
    shown = axes[0][0].get_legend_handles_labels()
    figure.legend(*shown, loc="outside lower center", ncols=3, frameon=False)
    return figure
