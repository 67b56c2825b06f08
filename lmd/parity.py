"""Does a foreign checkpoint compute here what it computes at home?

`python -m lmd parity FOLDER`: the folder holds a stable-audio-tools model and
`expected.safetensors`, inputs and outputs by name; every output is computed again.
"""

import argparse
import json
import math
import re
import sys
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor

from lmd.codec.oobleck import OobleckCodec
from lmd.errors import LmdError
from lmd.foreign import Foreign, load_foreign, read_weights
from lmd.model.dit import Condition

EXPECTED_FILE = "expected.safetensors"
TOLERANCE = 1e-4  # on the largest absolute difference
INPUTS = ("latents", "t", "cross_attn_cond", "global_cond", "seconds", "wave", "vae_latents")
GUIDED = re.compile(r"velocity_cfg(\d+(?:\.\d+)?)")


@dataclass(frozen=True)
class Row:
    """One output: how far ours is from the expected one, and how large that is."""

    name: str
    shape: tuple[int, ...]
    max_abs_diff: float
    max_abs_expected: float
    ok: bool


def velocity(foreign: Foreign, given: Mapping[str, Tensor], cfg_scale: float = 1.0) -> Tensor:
    """The transformer's output, guided if `cfg_scale` is not 1: v∅ + s · (v - v∅)."""
    condition = Condition(given["cross_attn_cond"], given["global_cond"])
    guided = foreign.model(given["latents"], given["t"], condition)
    if cfg_scale == 1:
        return guided
    null = foreign.model.null_condition(condition)
    free = foreign.model(given["latents"], given["t"], null)
    return free + cfg_scale * (guided - free)


def recipe(name: str) -> tuple[tuple[str, ...], Callable[[Foreign, Mapping[str, Tensor]], Tensor]]:
    """The inputs that an output needs, and how it is computed.

    Raises:
        LmdError: an output of that name is not known.
    """
    dit = INPUTS[:4]
    if name == "velocity":
        return dit, velocity
    if guided := GUIDED.fullmatch(name):
        return dit, lambda foreign, given: velocity(foreign, given, float(guided[1]))
    known = {
        "seconds_embed": (("seconds",), lambda f, given: f.model.seconds(given["seconds"])),
        "encoder_out": (("wave",), lambda f, given: _codec(f).encode_parameters(given["wave"])),
        "decoder_out": (("vae_latents",), lambda f, given: _codec(f).decode(given["vae_latents"])),
    }
    if name not in known:
        outputs = ["velocity", "velocity_cfgN", *known]
        raise LmdError(
            f"a tensor {name!r} in {EXPECTED_FILE}",
            f"inputs {list(INPUTS)} and outputs {outputs}",
            "Rename it or leave it out.",
        )
    return known[name]


def _codec(foreign: Foreign) -> OobleckCodec:
    if foreign.codec is None:
        raise LmdError("no autoencoder in the config", "a pretransform", "Leave its outputs out.")
    return foreign.codec


@torch.no_grad()
def compare(foreign: Foreign, expected: Mapping[str, Tensor]) -> list[Row]:
    """Compute every output again and compare.

    Args:
        foreign: a loaded checkpoint.
        expected: inputs and outputs by name.

    Returns:
        One row for each output, in the order of their names.

    Raises:
        LmdError: unknown names, inputs missing, or no outputs at all.
    """
    outputs = {name: recipe(name) for name in sorted(set(expected) - set(INPUTS))}
    lacking = {need for needs, _ in outputs.values() for need in needs} - set(expected)
    if lacking or not outputs:
        raise LmdError(
            f"{EXPECTED_FILE} with outputs {list(outputs)} and without inputs {sorted(lacking)}",
            "at least one output, with its inputs",
            "Write the file again with both.",
        )
    return [
        _row(name, compute(foreign, expected), expected[name])
        for name, (_, compute) in outputs.items()
    ]


def _row(name: str, computed: Tensor, expected: Tensor) -> Row:
    """Another shape counts as an infinite difference."""
    same = computed.shape == expected.shape
    diff = float((computed - expected).abs().max()) if same else math.inf
    largest = float(expected.abs().max())
    return Row(name, tuple(expected.shape), diff, largest, diff <= TOLERANCE)


def table(rows: list[Row]) -> str:
    """The rows as aligned text."""
    lines = [f"{'output':16} {'shape':>14} {'max |expected|':>15} {'max |diff|':>11}"]
    for row in rows:
        shape = "x".join(map(str, row.shape))
        verdict = "" if row.ok else f"  more than {TOLERANCE:g}"
        lines.append(
            f"{row.name:16} {shape:>14} {row.max_abs_expected:15.4g} {row.max_abs_diff:11.2e}"
            + verdict
        )
    return "\n".join(lines)


def report(foreign: Foreign, rows: list[Row], folder: Path) -> str:
    """The rows and what was left out, as JSON; a difference that is no number becomes null."""
    told = [{k: _finite(v) for k, v in asdict(row).items()} for row in rows]
    content = {
        "folder": folder.name,
        "tolerance": TOLERANCE,
        "rows": told,
        "unmatched": foreign.unmatched,
        "fresh": foreign.fresh,
        "ok": all(row.ok for row in rows),
    }
    return json.dumps(content, indent=1, allow_nan=False)


def _finite(value: object) -> object:
    """None for a number that JSON cannot say."""
    return None if isinstance(value, float) and not math.isfinite(value) else value


def configure(parser: argparse.ArgumentParser) -> None:
    """Arguments of `python -m lmd parity`."""
    parser.add_argument("folder", type=Path, help="model_config.json, model and expected tensors")
    parser.add_argument("--json", metavar="FILE", help="write the figures there (-: print them)")
    parser.add_argument("--lenient", action="store_true", help="list unknown keys and go on")


def main(args: argparse.Namespace) -> int:
    """Print the table; 0 if every output agrees within the tolerance, else 1."""
    foreign = load_foreign(args.folder, strict=not args.lenient)
    if not (args.folder / EXPECTED_FILE).is_file():
        raise LmdError(f"no {EXPECTED_FILE} in {args.folder}", "one", "Check the path.")
    rows = compare(foreign, read_weights(args.folder / EXPECTED_FILE))
    shown = report(foreign, rows, args.folder)
    if args.json == "-":
        print(shown)
    else:
        print(table(rows))
        for title, names in (("left out", foreign.unmatched), ("not in the file", foreign.fresh)):
            if names:
                print(f"{title}: {', '.join(names)}")
        if args.json:
            Path(args.json).write_text(shown + "\n")
    failed = [row.name for row in rows if not row.ok]
    if failed:
        print(f"differs: {', '.join(failed)}", file=sys.stderr)
    return 1 if failed else 0
