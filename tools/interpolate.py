"""Weights on the straight line between those of two files, with a card.

    python tools/interpolate.py runs/distill/finetuned.safetensors runs/arc/arc.safetensors \
        --share 0.25 --out runs/between/arc.safetensors

Training that goes past its aim leads through better weights than it ends with. Where the second
file was trained on from the first, what lies between them plays as well, mostly.

Source: interpolation between weights before and after fine-tuning (arXiv 2109.01903).
"""

import shlex
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import tyro

from lmd.checkpoint import (
    MODEL_KINDS,
    Header,
    codec_hash_of,
    load_tensors,
    read_header,
    save_checkpoint,
)
from lmd.errors import LmdError
from lmd.outputs import write_atomic


@dataclass(frozen=True)
class Options:
    """Flags of the command.

    Attributes:
        first: weights of a model: share 0.
        second: others of the same sizes: share 1.
        out: file to write, with a card beside it.
        share: of the second, 0 to 1.
    """

    first: Annotated[Path, tyro.conf.Positional]
    second: Annotated[Path, tyro.conf.Positional]
    out: Path
    share: float = 0.5


def interpolate(options: Options) -> None:
    """Write `(1 - share) first + share second`, of the second file's kind, as float16.

    Raises:
        LmdError: a share outside 0 to 1, models of other sizes or codecs, a name that is no
            weights file's, a file or card that is there already.
    """
    share, out = options.share, options.out
    if not 0 <= share <= 1:
        raise LmdError(f"--share {share:g}", "0 to 1", "Extrapolation is not offered.")
    if out.suffix != ".safetensors":
        raise LmdError(f"--out {out}", "a name that ends in .safetensors", "Name another --out.")
    if there := [str(path) for path in (out, out.with_suffix(".md")) if path.exists()]:
        raise LmdError(", ".join(there), "files that are not there yet", "Name another --out.")
    start, start_header = load_tensors(options.first, *MODEL_KINDS)
    end, header = load_tensors(options.second, *MODEL_KINDS)
    files, todo = f"{options.first} and {options.second}", "One is to be trained on from the other."
    if start_header.config != header.config or start.keys() != end.keys():
        raise LmdError(f"models of other sizes in {files}", "two of one preset", todo)
    learned = {codec_hash_of(each.notes): each.notes for each in (start_header, header)}
    learned.pop(None, None)
    if len(learned) > 1:
        found = f"{files}, which learned latents of {len(learned)} codecs"
        raise LmdError(found, "two that learned the same", todo)
    words = ["python", "tools/interpolate.py", str(options.first), str(options.second)]
    notes: dict[str, Any] = {
        "command": shlex.join([*words, "--share", f"{share:g}", "--out", str(out)]),
        "share": share,
        "first": _origin(options.first, start_header),
        "second": _origin(options.second, header),
    }
    for known in learned.values():
        notes["data"] = known["data"]  # it names the codec
    between = {name: start[name].lerp(end[name], share) for name in end}
    save_checkpoint(
        out, between, kind=header.kind, config=header.config, notes=notes, stored="float16"
    )


def _origin(path: Path, header: Header) -> dict[str, Any]:
    return {"file": path.name, "sha256": header.sha256, "command": header.notes.get("command")}


def card_of(weights: Path, second_card: Path) -> str:
    """Markdown about interpolated weights, with the second file's own card if it is there."""
    header = read_header(weights)
    notes = header.notes
    facts = {
        "file": f"`{weights.name}`, {weights.stat().st_size / 1e6:.1f} MB, {header.stored}",
        "SHA-256": f"`{header.sha256}`",
        "sizes": f"preset `{header.config.name}`",
    }
    for which in ("first", "second"):
        origin = notes[which]
        made = f", made by `{origin['command']}`" if origin["command"] else ""
        facts[which] = f"`{origin['file']}` ({origin['sha256'][:12]}…){made}"
    if data := notes.get("data"):
        corpus = str(data["latent_settings"].get("corpus", "unknown"))[:12]
        facts["data"] = f"{data['renditions']} sounds, {data['hours']} h, corpus `{corpus}`"
    facts["command"] = f"`{notes['command']}`"
    head = f"# {weights.stem}\n\nOn the straight line between two files of weights, "
    rows = "\n".join(f"| {name} | {fact} |" for name, fact in facts.items())
    text = f"{head}{notes['share']:.0%} of the way.\n\n| | |\n|---|---|\n{rows}\n"
    if not second_card.is_file():
        return text
    _, _, of_second = second_card.read_text(encoding="utf-8").partition("\n")
    return f"{text}\n## The second of them\n{of_second}"


def main(words: Sequence[str] | None = None) -> int:
    """Write weights and card; print where."""
    options = tyro.cli(Options, args=words, description=__doc__)
    card = options.out.with_suffix(".md")
    try:
        interpolate(options)
        write_atomic(card, card_of(options.out, options.second.with_suffix(".md")).encode())
    except (LmdError, OSError) as error:
        print(f"interpolate: {error}", file=sys.stderr)
        return 2
    print(f"{options.out}, {card}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
