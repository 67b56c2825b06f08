"""`python -m lmd interpolate`: weights on the straight line between those of two files.

    python -m lmd interpolate runs/distill/finetuned.safetensors runs/arc/arc.safetensors \
        --share 0.25 --out runs/between/arc.safetensors

Training that goes past its aim leads through better weights than it ends with. Where the second
file was trained on from the first, what lies between them plays as well, mostly.

Source: interpolation between weights before and after fine-tuning (arXiv 2109.01903).
"""

import argparse
import shlex
from pathlib import Path

from lmd.checkpoint import (
    MODEL_KINDS,
    codec_hash_of,
    load_tensors,
    read_header,
    save_checkpoint,
    write_atomic,
)
from lmd.errors import LmdError
from lmd.training.card import card, data_text, origin_text
from lmd.training.run import origin_of


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the command's arguments."""
    parser.add_argument("first", type=Path, help="weights of a model: share 0")
    parser.add_argument("second", type=Path, help="others of the same sizes: share 1")
    parser.add_argument("--share", type=float, default=0.5, help="of the second, 0 ... 1")
    parser.add_argument("--out", type=Path, required=True, help="file to write, with a card")


def main(args: argparse.Namespace) -> int:
    """Write weights and card; print where."""
    interpolate(args.first, args.second, args.share, args.out)
    text = args.out.with_suffix(".md")
    write_atomic(text, card_of(args.out, args.second.with_suffix(".md")).encode())
    print(f"{args.out}, {text}")
    return 0


def interpolate(first: Path, second: Path, share: float, out: Path) -> None:
    """Write `(1 - share) first + share second`, of the second file's kind, as float16.

    Raises:
        LmdError: a share outside 0 ... 1, models of other sizes or codecs, a name that is no
            weights file's, a file or card that is there already.
    """
    if not 0 <= share <= 1:
        raise LmdError(f"--share {share:g}", "0 to 1", "Extrapolation is not offered.")
    if out.suffix != ".safetensors":
        raise LmdError(f"--out {out}", "a name that ends in .safetensors", "Name another --out.")
    there = [str(path) for path in (out, out.with_suffix(".md")) if path.exists()]
    if there:
        raise LmdError(", ".join(there), "files that are not there yet", "Name another --out.")
    start, start_header = load_tensors(first, *MODEL_KINDS)
    end, header = load_tensors(second, *MODEL_KINDS)
    todo = "Give weights of which one was trained on from the other."
    if start_header.config != header.config or start.keys() != end.keys():
        raise LmdError(f"models of other sizes in {first} and {second}", "two of one preset", todo)
    learned = {codec_hash_of(found.notes): found.notes for found in (start_header, header)}
    learned.pop(None, None)
    if len(learned) > 1:
        found = f"{first} and {second}, which learned latents of {len(learned)} codecs"
        raise LmdError(found, "two that learned the same", todo)
    words = ["python", "-m", "lmd", "interpolate", str(first), str(second)]
    words += ["--share", f"{share:g}", "--out", str(out)]
    notes = {
        "command": shlex.join(words),
        "share": share,
        "first": origin_of(first),
        "second": origin_of(second),
    }
    if learned:
        (said,) = learned.values()
        notes["data"] = said["data"]  # it names the codec
    between = {name: start[name].float().lerp(end[name].float(), share) for name in end}
    save_checkpoint(
        out, between, kind=header.kind, config=header.config, notes=notes, stored="float16"
    )


def card_of(weights: Path, second_card: Path) -> str:
    """Markdown about interpolated weights, with the second file's own card if it is there."""
    header = read_header(weights)
    notes = header.notes
    facts = {
        "sizes": f"preset `{header.config.name}`",
        "first": origin_text(notes["first"]),
        "second": origin_text(notes["second"]),
        "command": f"`{notes['command']}`",
    }
    if "data" in notes:
        facts["data"] = data_text(notes)
    about = (
        f"On the straight line between the weights of two files, {notes['share']:.0%} of the way."
    )
    texts = []
    if second_card.is_file():
        _, _, text = second_card.read_text(encoding="utf-8").partition("\n")
        texts = ["## The second of them", text.strip()]
    return card(weights, about, facts, *texts)
