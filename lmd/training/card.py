"""Model cards, all from one template, made of a run's own records."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pandas as pd
from jinja2 import Template

from lmd.checkpoint import read_header
from lmd.config import REGIMES
from lmd.training.draws import Shares
from lmd.training.options import TrainOptions

NOTICE = (
    "The weights know what they were trained on, as the table says, and nothing else. Who may use "
    "them depends on who may use that music, and the weights that they started from. This card "
    "holds no evaluation; `python -m lmd evaluate` makes one."
)
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
    """Markdown about a file of weights.

    Args:
        weights: the file.
        about: one sentence: what they are.
        facts: rows of the table, behind size and hash.
        texts: what stands below it.
        notice: about their use.

    Raises:
        LmdError: `weights` is not a checkpoint of this project.
    """
    header, megabytes = read_header(weights), weights.stat().st_size / 1e6
    shown = {"weights": weights, "about": about, "facts": facts, "texts": texts, "notice": notice}
    return TEMPLATE.render(header=header, megabytes=megabytes, **shown)


def training_card(out: Path, weights: Path, options: TrainOptions) -> str:
    """The card of the weights that the run in `out` made."""
    log, notes = run_log(out), read_header(weights).notes
    starts = [path.name.removeprefix("from-") for path in sorted((out / "logs").glob("from-*"))]
    starts_at = ", ".join(str(int(step)) for step in starts)
    minutes = f"{log['seconds'].max() / 60:.1f} min, started or resumed at steps {starts_at}"
    facts = {**run_facts(weights), "steps": notes["steps"], "wall time": minutes}
    losses = f"Mean training loss ({loss_of(options)}) along the run:"
    table = log.assign(minutes=log["seconds"] / 60).groupby(log.index * 8 // max(1, len(log)))
    table = table.agg(
        first=("step", "min"),
        last=("step", "max"),
        minutes=("minutes", "max"),
        loss=("loss", "mean"),
    )
    shown = table.to_markdown(index=False, floatfmt=("g", "g", ".1f", ".4f"))
    return card(weights, about(options), facts, losses, shown)


def run_facts(weights: Path) -> dict[str, str]:
    """What weights say of their making, as rows of a card."""
    header = read_header(weights)
    notes, sizes = header.notes, header.config
    dit = sizes.dit
    names = {"init": "started from", "base": "discriminator from"}
    facts = {text: origin_text(notes[name]) for name, text in names.items() if name in notes}
    machine = notes["hardware"]
    return {
        "sizes": f"preset `{sizes.name}`: width {dit.width}, depth {dit.depth}, "
        f"{dit.n_heads} heads, {dit.latent_dim} latent channels",
        **facts,
        "seed": notes["seed"],
        "hardware": f"{machine['cpu']}, {machine['n_cores']} cores, {machine['gpu'] or 'no GPU'}, "
        f"torch {machine['torch']}",
        "data": data_text(notes),
        "command": f"`{notes['command']}`",
    }


def origin_text(origin: Mapping[str, Any]) -> str:
    """Another file of weights; see `lmd.training.run.origin_of`."""
    made = f", made by `{origin['command']}`" if origin.get("command") else ""
    return f"`{origin['file']}` ({origin['sha256'][:12]}…){made}"


def data_text(notes: Mapping[str, Any]) -> str:
    """What weights learned from."""
    data = notes["data"]
    corpus = str(data["latent_settings"].get("corpus", "unknown"))[:12]
    return f"{data['renditions']} renditions, {data['hours']} h, corpus `{corpus}`"


def about(options: TrainOptions) -> str:
    """One sentence: what a run's weights are."""
    if options.stage == "base":
        return "The bidirectional base: predicts the velocity of every frame of a window."
    if options.stage == "finetune":
        where = among(options.finetune.regimes)
        return f"The live model: continues clean context block by block, {where}."
    o = options.distill
    return (
        f"The live model, distilled: names, without guidance, the block that {o.n_steps} steps of "
        f"its teacher at guidance {o.cfg_scale:g} end at, {among(o.regimes)}."
    )


def among(shares: Shares) -> str:
    """Which regimes are taught, as words of a sentence."""
    names = [regime for regime, share in shares if share > 0]
    if set(names) == set(REGIMES):
        return "in all three regimes"
    return f"in the regime{'s' * (len(names) > 1)} {' and '.join(names)}"


def loss_of(options: TrainOptions) -> str:
    """What a run's loss is."""
    if options.stage != "distill":
        return "mean squared error"
    of = "clean blocks" if options.distill.loss_on == "block" else "velocities"
    return f"mean squared error of {of}"


def run_log(out: Path) -> pd.DataFrame:
    """Losses and timings of all of a run's steps; a step that was run twice counts once."""
    files = sorted((out / "logs").glob("from-*/metrics.csv"))
    parts = [pd.read_csv(path) for path in files]
    seconds = 0.0
    for part in parts:
        if "seconds" in part:
            part["seconds"] += seconds
            seconds = part["seconds"].max()
    log = pd.concat(parts, ignore_index=True)
    return log.drop_duplicates("step", keep="last").sort_values("step", ignore_index=True)
