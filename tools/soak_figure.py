"""An hour of music as a picture."""

from typing import Any

import matplotlib.pyplot as plt
from matplotlib.figure import Figure

HOUR = {
    "rss_mb": "memory, MB",
    "cpu_ms_p50": "CPU ms a block",
    "level_db": "level, dB",
    "centroid_hz": "centroid, Hz",
}


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
