"""Long measurements as pictures: latency over block lengths, an hour of music."""

from typing import Any

import matplotlib.pyplot as plt
from matplotlib.figure import Figure

ALLOWED_MS = 150  # that a change may take beyond one block

HOUR = {
    "rss_mb": "memory, MB",
    "cpu_ms_p50": "CPU ms a block",
    "level_db": "level, dB",
    "centroid_hz": "centroid, Hz",
}


def plot_latency(result: dict[str, Any]) -> Figure:
    """Draw slider-to-sound latency over the block's length, both in ms, from `soak latency`."""
    rows = list(result["blocks"].values())
    lengths = [row["block_ms"] for row in rows]
    figure, ax = plt.subplots(figsize=(6, 3.4), layout="constrained")
    limits = [length + ALLOWED_MS for length in lengths]
    ax.plot(lengths, limits, "--", color="0.6", label=f"one block + {ALLOWED_MS} ms")
    for name, color in (("p95_ms", "C1"), ("p50_ms", "C0")):
        label = f"{name[1:3]} % of the changes are heard by"
        ax.plot(lengths, [row[name] for row in rows], "o-", color=color, label=label)
    for length, frames in zip(lengths, result["blocks"], strict=True):
        ax.annotate(frames, (length, 0), (0, 3), textcoords="offset points", ha="center")
    ax.set(ylim=(0, None), xlabel="a block lasts, ms (above: its frames)", ylabel="ms")
    ax.set_title("from the slider to the sound")
    ax.legend(frameon=False, fontsize=8)
    return figure


def plot_flat(result: dict[str, Any]) -> Figure:
    """Draw memory, cost, loudness and brightness over the minutes of music, from `soak flat`."""
    parts = result["parts"]
    minutes = [part["minutes"] for part in parts]
    figure, axes = plt.subplots(
        len(HOUR), 1, figsize=(6, 5), sharex=True, layout="constrained", squeeze=True
    )
    for ax, (name, label) in zip(axes, HOUR.items(), strict=True):
        values = [part[name] for part in parts]
        ax.plot(minutes, values, "o-")
        middle = sum(values) / len(values)
        shown = [*values, 0.8 * middle, 1.2 * middle]  # noise does not fill the axis
        ax.set_ylim(min(shown), max(shown))
        ax.set_ylabel(label, fontsize=8)
    axes[-1].set_xlabel("minutes of music")
    axes[0].set_title("without a pause")
    return figure
