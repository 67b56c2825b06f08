"""A model card out of a run's own records: nothing in it is typed by hand."""

from pathlib import Path
from typing import Any

import pandas as pd

from lmd.checkpoint import Header, read_header
from lmd.config import REGIMES
from lmd.training.draws import Shares
from lmd.training.module import TrainOptions


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
        part["seconds"] += seconds
        seconds = part["seconds"].max()
    log = pd.concat(parts, ignore_index=True)
    return log.drop_duplicates("step", keep="last").sort_values("step", ignore_index=True)


def model_card(out: Path, weights: Path, options: TrainOptions) -> str:
    """Markdown about the weights that the run in `out` made.

    Args:
        out: the run's folder.
        weights: what it exported.
        options: of the run.

    Raises:
        LmdError: `weights` is not a checkpoint of this project.
    """
    header, log = read_header(weights), run_log(out)
    notes, preset = header.notes, header.config
    dit = preset.dit
    return "\n".join(
        [
            f"# {weights.stem}",
            "",
            about(options),
            "",
            "| | |",
            "|---|---|",
            *file_rows(header, weights),
            f"| sizes | preset `{preset.name}`: width {dit.width}, depth {dit.depth}, "
            f"{dit.n_heads} heads, {dit.latent_dim} latent channels |",
            *start_rows(notes),
            f"| steps | {notes['steps']} |",
            f"| seed | {notes['seed']} |",
            f"| wall time | {log['seconds'].max() / 60:.1f} min, "
            f"begun or resumed at steps {_starts(out)} |",
            hardware_row(notes),
            data_row(notes),
            f"| command | `{notes['command']}` |",
            "",
            f"Mean training loss ({loss_of(options)}) along the run:",
            "",
            *_losses(log),
            "",
            *NOTICE,
        ]
    )


NOTICE = (
    "Data: `python -m lmd data build` renders scores of music21's corpus with the General MIDI "
    "soundfont that ships in pretty_midi, unless another corpus is named; this one's hash stands "
    "above (see data/README.md). Weights: the licence of this repository. They know what that "
    "corpus sounds like and nothing else.",
    "",
    "Measured by `python -m lmd data build --hours 24`, then `python -m lmd evaluate`: "
    "`outputs/published/evaluation.md` holds what that found of the shipped weights.",
    "",
)


def file_rows(header: Header, weights: Path) -> list[str]:
    """Size and hash of a file of weights, as rows of a Markdown table."""
    return [
        f"| file | `{weights.name}`, {weights.stat().st_size / 1e6:.1f} MB, {header.stored} |",
        f"| SHA-256 of the tensors | `{header.sha256}` |",
    ]


def start_rows(notes: dict[str, Any]) -> list[str]:
    """Which weights a run started from, as a row of a Markdown table; none where it had none."""
    return [origin_row("started from", notes["init"])] if "init" in notes else []


def origin_row(what: str, origin: dict[str, Any]) -> str:
    """Another file of weights, as a row of a Markdown table; see `lmd.training.run.origin_of`."""
    made = f", made by `{origin['command']}`" if origin.get("command") else ""
    return f"| {what} | `{origin['file']}` ({origin['sha256'][:12]}…){made} |"


def hardware_row(notes: dict[str, Any]) -> str:
    """What a run ran on, as a row of a Markdown table."""
    machine = notes["hardware"]
    where = f"{machine['cpu']}, {machine['n_cores']} cores, {machine['gpu'] or 'no GPU'}"
    return f"| hardware | {where}, torch {machine['torch']} |"


def data_row(notes: dict[str, Any]) -> str:
    """What a run learned from, as a row of a Markdown table."""
    data = notes["data"]
    corpus = str(data["latent_settings"].get("corpus", "unknown"))[:12]
    return f"| data | {data['renditions']} renditions, {data['hours']} h, corpus `{corpus}` |"


def _starts(out: Path) -> str:
    """The steps at which the run was begun or resumed."""
    folders = sorted((out / "logs").glob("from-*"))
    return ", ".join(str(int(folder.name.removeprefix("from-"))) for folder in folders)


def _losses(log: pd.DataFrame) -> list[str]:
    """A table of the mean loss over eighths of the run."""
    lines = ["| steps | minutes | loss |", "|---|---|---|"]
    parts: list[Any] = [p for _, p in log.groupby(log.index * 8 // max(1, len(log)))]
    for part in parts:
        first, last = int(part["step"].min()), int(part["step"].max())
        minutes = part["seconds"].max() / 60
        lines.append(f"| {first} – {last} | {minutes:.1f} | {part['loss'].mean():.4f} |")
    return lines
