"""A take as a picture: what changed when, over the sound that it made."""

import matplotlib.pyplot as plt
from matplotlib.figure import Figure

from lmd.play.control_queue import NAMES
from lmd.play.takes import Take
from lmd.show import Samples, specplot


def plot_take(take: Take, wave: Samples) -> Figure:
    """Draw a take: the spectrogram of its samples, and what changed when (lines, labels)."""
    figure, (top, bottom) = plt.subplots(
        2, 1, figsize=(10, 4.6), sharex=True, height_ratios=(3, 2), layout="constrained"
    )
    rate, values = take.header.sample_rate, list(take.changes.values())
    starts_s = {block: sample / rate for block, sample in take.starts.items()}
    specplot(wave, rate, top)
    top.set(xlabel="", title="a take: sound, and the controls that made it")
    moving = [n for n in NAMES if n == "prompt" or len({getattr(v, n) for v in values}) > 1]
    place = {"xytext": (3, 0), "textcoords": "offset points", "va": "center"}
    style = {"fontsize": 7, "parse_math": False, "annotation_clip": True}
    for row, name in enumerate(moving):
        heard: object = None
        for block in sorted(take.changes):
            if (value := getattr(take.changes[block], name)) != heard:
                bottom.plot(starts_s[block], row, "|", color="C0", markersize=9)
                bottom.annotate(_label(value), (starts_s[block], row), **place, **style)
                top.axvline(starts_s[block], color="white", alpha=0.5, lw=0.6, ls="--")
            heard = value
    bottom.set_yticks(range(len(moving)), moving)
    bottom.set(xlabel="seconds", ylim=(-0.6, max(0.6, len(moving) - 0.4)))
    bottom.invert_yaxis()
    for block, sample in take.underruns:
        top.axvline(starts_s.get(block, sample / rate), color="C1")
    return figure


def _label(value: object, longest: int = 28) -> str:
    """A control's value in a few characters."""
    if isinstance(value, tuple):
        value = " + ".join(f"{weight:.2f} {text}" for text, weight in value)
    text = f"{value:g}" if isinstance(value, float) else str(value)
    return text if len(text) <= longest else text[: longest - 1] + "…"
