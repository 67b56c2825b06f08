"""`python -m lmd convert`: a foreign checkpoint as files of ours.

    python -m lmd convert stable-audio-open-small --out runs/sao

Afterwards `data encode --codec runs/sao/codec.safetensors` and
`train finetune --preset paper --init runs/sao/base.safetensors` go on as with any other base.
"""

import argparse
from dataclasses import replace
from pathlib import Path

from lmd.checkpoint import save_checkpoint
from lmd.config import PRESETS, Preset
from lmd.errors import LmdError
from lmd.foreign import INPUT_ADD, Foreign, load_foreign


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the command's arguments."""
    parser.add_argument(
        "folder", type=Path, help="model_config.json and model.safetensors or .ckpt"
    )
    parser.add_argument("--out", type=Path, required=True, help="folder to write to")


def main(args: argparse.Namespace) -> int:
    """Write the weights; print where."""
    for path in convert_folder(args.folder, args.out):
        print(f"{path}, {path.stat().st_size / 1e6:.1f} MB")
    return 0


def convert_folder(folder: Path, out: Path) -> list[Path]:
    """Write `base.safetensors` (or `finetuned.safetensors`, if it hears context) and the codec.

    Args:
        folder: see `lmd.foreign.load_foreign`.
        out: where to; existing files are not replaced.

    Returns:
        The files that were written.

    Raises:
        LmdError: no codec in the checkpoint, files that are there already, or what `load_foreign`
            refuses.
    """
    foreign = load_foreign(folder)
    if foreign.config.codec is None:
        raise LmdError(f"{folder} without an autoencoder", "one with its own", "Pick another.")
    kind = "base" if INPUT_ADD in foreign.fresh else "finetuned"
    paths = [out / f"{kind}.safetensors", out / "codec.safetensors"]
    there = [str(path) for path in paths if path.exists()]
    if there:
        raise LmdError(", ".join(there), "files that are not there yet", "Name another --out.")
    notes = {"converted_from": folder.name}
    save_checkpoint(
        paths[0], foreign.model.state_dict(), kind=kind, config=preset_of(foreign), notes=notes
    )
    save_checkpoint(
        paths[1], foreign.codec_weights, kind="codec", config=foreign.config.codec, notes=notes
    )
    return paths


def preset_of(foreign: Foreign) -> Preset:
    """`paper`, with the sizes that the checkpoint has."""
    paper, sizes = PRESETS["paper"], foreign.config
    assert sizes.codec is not None
    return replace(paper, dit=sizes.dit, codec=sizes.codec, text=sizes.text)
