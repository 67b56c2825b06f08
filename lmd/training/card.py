"""Model cards, all from one template, made of a run's own records."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pandas as pd
from jinja2 import Template

from lmd.checkpoint import read_header
from lmd.training.options import TrainOptions

NOTICE = (
    "The weights know what they were trained on, as the table says, and nothing else. Who may use "
    "them depends on who may use that music, and the weights that they started from. This card "
    "holds no evaluation; `python -m lmd evaluate` makes one."
)
ABOUT = {
    "base": "The bidirectional base: predicts the velocity of every frame of a window.",
    "finetune": "The live model: continues clean context block by block, in all three regimes.",
    "distill": "The live model, distilled: names, without guidance, the block that "
    "{o.teacher_steps} steps of its teacher at guidance {o.cfg_scale:g} end at, in the regimes "
    "block-causal and enc-dec.",
}
TEMPLATE = Template(
    """\
# {{ weights.stem }}

{{ about }}

| | |
|---|---|
| file | `{{ weights.name }}`, {{ "%.1f" | format(megabytes) }} MB, {{ header.stored }} |
| SHA-256 of the tensors | `{{ header.sha256 }}` |
{% for what, value in facts.items() -%}
| {{ what }} | {{ value }} |
{% endfor %}
{% for text in texts -%}
{{ text }}

{% endfor -%}
{{ notice }}
""",
    keep_trailing_newline=True,
)


def card(
    weights: Path, about: str, facts: Mapping[str, Any], *texts: str, notice: str = NOTICE
) -> str:
    """Markdown about a file of weights: a sentence, a table of facts, more texts, a notice.

    Raises:
        LmdError: `weights` is not a checkpoint of this project.
    """
    header, megabytes = read_header(weights), weights.stat().st_size / 1e6
    shown = {"weights": weights, "about": about, "facts": facts, "texts": texts, "notice": notice}
    return TEMPLATE.render(header=header, megabytes=megabytes, **shown)


def training_card(weights: Path, options: TrainOptions) -> str:
    """The card of the weights that a run made."""
    log, logs = run_log(options.out), sorted((options.out / "logs").glob("from-*"))
    log["minutes"] = log["seconds"] / 60
    starts = [path.name.removeprefix("from-") for path in logs]
    starts_at = ", ".join(str(int(step)) for step in starts)
    minutes = f"{log['minutes'].max():.1f} min, started or resumed at steps {starts_at}"
    facts = {**run_facts(weights), "wall time": minutes}
    of = " of clean blocks" if options.stage == "distill" else ""
    losses = f"Mean training loss (mean squared error{of}) along the run:"
    about = ABOUT[options.stage].format(o=options)
    return card(weights, about, facts, losses, curve_table(log, "loss"))


def curve_table(log: pd.DataFrame, *columns: str) -> str:
    """Means of columns over eight parts of a run, as Markdown; `minutes` have gone by at a row."""
    ends = {"first": ("step", "min"), "last": ("step", "max"), "minutes": ("minutes", "max")}
    means = {name: (name, "mean") for name in columns}
    table = log.groupby(log.index * 8 // max(1, len(log))).agg(**ends, **means)
    shown = ("g", "g", ".1f", *[".4f"] * len(means))
    return table.to_markdown(index=False, floatfmt=shown, missingval="–")


def run_facts(weights: Path) -> dict[str, str]:
    """What weights say of their making, as rows of a card."""
    header = read_header(weights)
    notes, sizes = header.notes, header.config
    dit, data = sizes.dit, notes["data"]
    facts = {
        "sizes": f"preset `{sizes.name}`: width {dit.width}, depth {dit.depth}, "
        f"{dit.n_heads} heads, {dit.latent_dim} latent channels",
    }
    for name, text in {"init": "started from", "base": "discriminator from"}.items():
        if origin := notes.get(name):
            made = f", made by `{origin['command']}`" if origin.get("command") else ""
            facts[text] = f"`{origin['file']}` ({origin['sha256'][:12]}…){made}"
    corpus = str(data["latent_settings"].get("corpus", "unknown"))[:12]
    return {
        **facts,
        "seed": notes["seed"],
        "hardware": machine_text(notes["hardware"]),
        "data": f"{data['renditions']} sounds, {data['hours']} h, corpus `{corpus}`",
        "command": f"`{notes['command']}`",
        "steps": notes["steps"],
    }


def machine_text(machine: Mapping[str, Any]) -> str:
    """A machine, as weights remember it."""
    gpu = machine["gpu"] or "no GPU"
    return f"{machine['cpu']}, {machine['n_cores']} cores, {gpu}, torch {machine['torch']}"


def run_log(out: Path) -> pd.DataFrame:
    """Losses and timings of all of a run's steps; a step that was run twice counts once."""
    parts = [pd.read_csv(path) for path in sorted((out / "logs").glob("from-*/metrics.csv"))]
    seconds = 0.0
    for part in parts:
        if "seconds" in part:
            part["seconds"] += seconds
            seconds = part["seconds"].max()
    log = pd.concat(parts, ignore_index=True)
    return log.drop_duplicates("step", keep="last").sort_values("step", ignore_index=True)
