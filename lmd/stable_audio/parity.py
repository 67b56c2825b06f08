"""`lmd parity FOLDER`: does a checkpoint compute here what it computes at home?

The folder holds a stable-audio-tools model and `expected.safetensors`, inputs and outputs by name;
every output is computed again.
"""

import json
import math
import re
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import pandas as pd
import torch
import tyro
from torch import Tensor

from lmd.errors import LmdError
from lmd.model.dit import Condition
from lmd.outputs import check_outputs, write_json
from lmd.stable_audio.weights import StableAudio, load_stable_audio, read_weights

EXPECTED_FILE = "expected.safetensors"
TOLERANCE = 1e-4  # on the largest absolute difference
Tensors = Mapping[str, Tensor]
GUIDED = re.compile(r"velocity_cfg(\d+(?:\.\d+)?)")


def velocity(loaded: StableAudio, given: Tensors, cfg_scale: float = 1.0) -> Tensor:
    """The transformer's output, guided if `cfg_scale` is not 1: v∅ + s · (v - v∅)."""
    condition = Condition(given["cross_attn_cond"], given["global_cond"])
    guided = loaded.model(given["latents"], given["t"], condition)
    if cfg_scale == 1:
        return guided
    free = loaded.model(given["latents"], given["t"], loaded.model.null_condition(condition))
    return free + cfg_scale * (guided - free)


PASS = ("latents", "t", "cross_attn_cond", "global_cond")  # what the transformer reads
Compute = Callable[[StableAudio, Tensors], Tensor]
OUTPUTS: dict[str, tuple[tuple[str, ...], Compute | None]] = {
    "velocity": (PASS, velocity),
    "seconds_embed": (("seconds",), lambda loaded, given: loaded.model.seconds(given["seconds"])),
    "encoder_out": (("wave",), lambda loaded, given: loaded.codec.encode_parameters(given["wave"])),
    "decoder_out": (
        ("vae_latents",),
        lambda loaded, given: loaded.codec.decode(given["vae_latents"]),
    ),
}
INPUTS = sorted({name for needs, _ in OUTPUTS.values() for name in needs})


@torch.no_grad()
def compare(loaded: StableAudio, expected: Tensors) -> list[dict[str, Any]]:
    """Compute every output again: one row for each, with the largest absolute difference.

    The difference is None where it is no number, or where the shapes differ.

    Raises:
        LmdError: unknown names, inputs missing, or no outputs at all.
    """
    rows = []
    for name in sorted(set(expected) - set(INPUTS)):
        needs, compute = OUTPUTS.get(name, ((), None))
        if guided := GUIDED.fullmatch(name):
            needs, compute = PASS, partial(velocity, cfg_scale=float(guided[1]))
        lacking = [need for need in needs if need not in expected]
        if compute is None or lacking:
            raise LmdError(
                f"{name!r} in {EXPECTED_FILE}" + (f" without {lacking}" if lacking else ""),
                f"inputs {INPUTS} and outputs {[*OUTPUTS, 'velocity_cfgN']}",
                "Rename it, leave it out, or add its inputs.",
            )
        wanted, computed = expected[name], compute(loaded, expected)
        same = computed.shape == wanted.shape
        diff = float((computed - wanted).abs().max()) if same else math.inf
        rows.append(
            {
                "name": name,
                "shape": tuple(wanted.shape),
                "max_abs_expected": float(wanted.nan_to_num().abs().max()),
                "max_abs_diff": diff if math.isfinite(diff) else None,
                "ok": diff <= TOLERANCE,
            }
        )
    if not rows:
        raise LmdError(f"{EXPECTED_FILE} without outputs", "at least one", "Write the file again.")
    return rows


@dataclass(frozen=True)
class Options:
    """Flags of `lmd parity`.

    Attributes:
        folder: with model_config.json, the weights and expected.safetensors.
        json: write the figures there (-: print them).
        lenient: list unknown keys and go on.
    """

    folder: Annotated[Path, tyro.conf.Positional]
    json: str = ""
    lenient: bool = False


def main(options: Options) -> int:
    """Print the table; 0 if every output agrees within the tolerance, else 1."""
    check_outputs(json=options.json or None)
    loaded = load_stable_audio(options.folder, strict=not options.lenient)
    if not (options.folder / EXPECTED_FILE).is_file():
        raise LmdError(f"no {EXPECTED_FILE} in {options.folder}", "one", "Check the path.")
    rows = compare(loaded, read_weights(options.folder / EXPECTED_FILE))
    report = {
        "folder": options.folder.name,
        "tolerance": TOLERANCE,
        "rows": rows,
        "unmatched": loaded.unmatched,
        "fresh": loaded.fresh,
        "ok": all(row["ok"] for row in rows),
    }
    if options.json == "-":
        print(json.dumps(report, indent=1))
    else:
        print(pd.DataFrame(rows).to_markdown(index=False, floatfmt=".3g"))
        for title, names in (("left out", loaded.unmatched), ("not in the file", loaded.fresh)):
            if names:
                print(f"{title}: {', '.join(names)}")
    if options.json not in ("", "-"):
        write_json(options.json, report)
    if failed := [row["name"] for row in rows if not row["ok"]]:
        print(f"differs by more than {TOLERANCE:g}: {', '.join(failed)}", file=sys.stderr)
    return int(not report["ok"])
