"""`lmd convert`: a Stable Audio or LMDM checkpoint as files of ours.

    lmd convert stable-audio-open-small --out runs/sao

Afterwards `data encode --codec runs/sao/codec.safetensors` and
`train finetune --preset paper --init runs/sao/base.safetensors` go on as with any other base.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from lmd.checkpoint import save_checkpoint
from lmd.errors import LmdError
from lmd.stable_audio.weights import load_stable_audio


@dataclass(frozen=True)
class Options:
    """Flags of `lmd convert`.

    Attributes:
        folder: with model_config.json and model.safetensors or model.ckpt.
        out: folder to write to; files there are not replaced.
    """

    folder: Annotated[Path, tyro.conf.Positional]
    out: Path


def main(options: Options) -> int:
    """Write the model and its codec; print where.

    Raises:
        LmdError: no codec in the checkpoint, files that are there already, or what
            `load_stable_audio` refuses.
    """
    loaded, notes = load_stable_audio(options.folder), {"converted_from": options.folder.name}
    preset = loaded.config.preset
    kind = "base" if loaded.fresh else "finetuned"  # without and with a context projection
    paths = [options.out / f"{kind}.safetensors", options.out / "codec.safetensors"]
    if there := [str(path) for path in paths if path.exists()]:
        raise LmdError(", ".join(there), "files that are not there yet", "Name another --out.")
    save_checkpoint(paths[0], loaded.model.state_dict(), kind=kind, config=preset, notes=notes)
    save_checkpoint(paths[1], loaded.codec_weights, kind="codec", config=preset.codec, notes=notes)
    for path in paths:
        print(f"{path}, {path.stat().st_size / 1e6:.1f} MB")
    return 0
