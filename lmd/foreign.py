"""Checkpoints of stable-audio-tools, converted once at the border.

A folder holds `model_config.json` and `model.safetensors` (or `model.ckpt`); names, shapes and
conventions become ours here and nowhere else.
"""

import json
import pickle
import re
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from lmd.codec.oobleck import OobleckCodec, build_reference, from_stable_audio
from lmd.config import ControlChannel, DiTConfig
from lmd.errors import LmdError
from lmd.foreign_config import ForeignConfig, parse_config
from lmd.model.live_model import LiveModel
from lmd.model.weights import load_strict

CONFIG_FILE = "model_config.json"
WEIGHT_FILES = ("model.safetensors", "model.ckpt")
INPUT_ADD = "model.dit.to_input_add.weight"
PRETRANSFORM = "pretransform.model."
TRANSFORMER = "model.model."

# Names inside one transformer layer, theirs to ours; the rest of a name is the same.
LAYER = {
    "pre_norm.gamma": "pre_norm.weight",
    "cross_attend_norm.gamma": "cross_norm.weight",
    "ff_norm.gamma": "ff_norm.weight",
    "ff.ff.0.proj.weight": "ff.to_gated.weight",
    "ff.ff.0.proj.bias": "ff.to_gated.bias",
    "ff.ff.2.weight": "ff.to_out.weight",
    "ff.ff.2.bias": "ff.to_out.bias",
    "self_attn.to_qkv.weight": "self_attn.to_qkv.weight",
    "cross_attn.to_q.weight": "cross_attn.to_q.weight",
    "cross_attn.to_kv.weight": "cross_attn.to_kv.weight",
}
for _attention in ("self_attn", "cross_attn"):
    for _part in ("to_out.weight", *(f"{n}_norm.{p}" for n in "qk" for p in ("weight", "bias"))):
        LAYER[f"{_attention}.{_part}"] = f"{_attention}.{_part}"

# Names outside the layers.
OUTSIDE = {
    "timestep_features.weight": "timestep_features",
    "to_input_add_embed.weight": "to_input_add.weight",
    "transformer.project_in.weight": "project_in.weight",
    "transformer.project_out.weight": "project_out.weight",
    "transformer.rotary_pos_emb.inv_freq": "rope.inv_freq",
}
for _name in ("preprocess_conv.weight", "postprocess_conv.weight"):
    OUTSIDE[_name] = _name
for _name in ("to_timestep_embed", "to_cond_embed", "to_global_embed"):
    for _index in (0, 2):
        OUTSIDE[f"{_name}.{_index}.weight"] = f"{_name}.{_index}.weight"
for _index in (0, 2):
    OUTSIDE[f"to_timestep_embed.{_index}.bias"] = f"to_timestep_embed.{_index}.bias"

SECONDS = {
    "embedder.embedding.0.weights": "model.seconds.weights",
    "embedder.embedding.1.weight": "model.seconds.to_embed.weight",
    "embedder.embedding.1.bias": "model.seconds.to_embed.bias",
}


@dataclass(frozen=True)
class Foreign:
    """A foreign checkpoint, loaded.

    Attributes:
        unmatched: keys of the file that were left out; empty unless loaded leniently.
        fresh: our weights that the file does not have (`to_input_add` of a stock model, set to
            zero: the context is ignored until it is trained).
        codec_weights: the codec's, under diffusers' names; empty where the file has no codec.
    """

    config: ForeignConfig
    model: LiveModel
    codec: OobleckCodec | None
    unmatched: tuple[str, ...]
    fresh: tuple[str, ...]
    codec_weights: Mapping[str, Tensor]


def read_weights(path: str | Path) -> dict[str, Tensor]:
    """The tensors in a foreign file; pickles are read without running anything.

    Raises:
        LmdError: a truncated file, a pickle that would run code, or one without tensors.
    """
    path = Path(path)
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        with warnings.catch_warnings():  # an unusual pickle protocol: whatever it holds is checked
            warnings.simplefilter("ignore", UserWarning)
            held = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise LmdError(
            f"{path}, a pickle with more in it than tensors, which could run code",
            "tensors and plain values only",
            "Do not load it; ask its author for a .safetensors file.",
        ) from error
    except (SafetensorError, OSError, EOFError, RuntimeError, ValueError) as error:
        reason = str(error).partition("\n")[0] or type(error).__name__
        raise LmdError(
            f"{path}, which cannot be read ({reason})",
            "a whole .safetensors or .ckpt file",
            "It was cut off or is something else: fetch it again.",
        ) from error
    held = held.get("state_dict", held) if isinstance(held, dict) else held
    if not isinstance(held, dict) or not all(isinstance(v, Tensor) for v in held.values()):
        raise LmdError(f"{path} without a state_dict", "named tensors", "Pick another file.")
    return held


def load_foreign(folder: str | Path, strict: bool = True) -> Foreign:
    """Load a folder with stable-audio-tools' config and weights, in float32.

    Lightning's `diffusion.` prefix is removed, split `to_q` and `to_kv` of self-attention are
    joined, `inv_freq` is taken from the file.

    Args:
        folder: holds `model_config.json` and `model.safetensors` or `model.ckpt`.
        strict: refuse keys that belong nowhere; otherwise they are listed in `unmatched`.

    Raises:
        LmdError: files missing or unreadable, another kind of model, weights that are missing, of
            another shape, or (strict) unknown, every one of them listed.
    """
    folder = Path(folder)
    weights = next((folder / n for n in WEIGHT_FILES if (folder / n).is_file()), None)
    if weights is None or not (folder / CONFIG_FILE).is_file():
        held = sorted(path.name for path in folder.iterdir()) if folder.is_dir() else "no folder"
        raise LmdError(
            f"{folder} holding {held}",
            f"{CONFIG_FILE} and {' or '.join(WEIGHT_FILES)}",
            "Check the path.",
        )
    try:
        raw = json.loads((folder / CONFIG_FILE).read_text())
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise LmdError(f"{CONFIG_FILE} that is not JSON ({error})", "JSON", "Repair it.") from error
    return convert(parse_config(raw), read_weights(weights), str(weights), strict)


def convert(
    config: ForeignConfig, tensors: Mapping[str, Tensor], source: str, strict: bool = True
) -> Foreign:
    """Foreign tensors to a model and a codec of ours; see `load_foreign`."""
    tensors = joined_projections(unwrapped(tensors))
    ours, unknown = _sorted_out(tensors, config)
    config = replace(config, dit=_completed(config.dit, ours))
    both = nn.Module()  # so that one refusal lists everything
    with torch.random.fork_rng(devices=[]):  # the initial weights are overwritten
        both.model = LiveModel(config.dit, config.max_seconds)
        both.codec = build_reference(config.codec) if config.codec else None
    fresh = () if INPUT_ADD in ours else (INPUT_ADD,)
    ours.setdefault(INPUT_ADD, torch.zeros_like(both.model.dit.to_input_add.weight))
    load_strict(both, ours | {name: tensors[name] for name in unknown if strict}, source)
    codec = OobleckCodec(both.codec, config.codec) if config.codec else None
    weights = both.codec.state_dict() if config.codec else {}
    return Foreign(config, both.model.eval(), codec, tuple(unknown), fresh, weights)


def unwrapped(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Names without Lightning's `diffusion.` prefix, values in float32."""
    return {
        name.removeprefix("diffusion."): tensor.float() if tensor.is_floating_point() else tensor
        for name, tensor in tensors.items()
    }


def joined_projections(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Self-attention's `to_q` and `to_kv`, where they are stored apart, as one `to_qkv`."""
    joined = dict(tensors)
    for name in tensors:
        stem = name.removesuffix("self_attn.to_q.weight")
        other = f"{stem}self_attn.to_kv.weight"
        if stem != name and other in tensors:
            both = (joined.pop(name), joined.pop(other))
            joined[f"{stem}self_attn.to_qkv.weight"] = torch.cat(both)
    return joined


def transformer_name(name: str) -> str | None:
    """Our name of a transformer weight (without `model.model.`), None if there is none."""
    match = re.fullmatch(r"transformer\.layers\.(\d+)\.(.+)", name)
    if match and match[2] in LAYER:
        return f"model.dit.blocks.{match[1]}.{LAYER[match[2]]}"
    return f"model.dit.{OUTSIDE[name]}" if name in OUTSIDE else None


def _sorted_out(
    tensors: Mapping[str, Tensor], config: ForeignConfig
) -> tuple[dict[str, Tensor], list[str]]:
    """The weights under our names, and the keys that have none."""
    ours, unknown = {}, []
    conditioner = f"conditioner.conditioners.{config.seconds_id}."
    for name, tensor in tensors.items():
        own = None
        if name.startswith(PRETRANSFORM) and config.codec:
            own = from_stable_audio(name.removeprefix(PRETRANSFORM), config.codec)
            own = own and f"codec.{own}"
        elif name.startswith(TRANSFORMER):
            own = transformer_name(name.removeprefix(TRANSFORMER))
        elif name.removeprefix(conditioner) in SECONDS:
            own = SECONDS[name.removeprefix(conditioner)]
        if own is not None:
            snake = own.startswith("codec.") and own.endswith((".alpha", ".beta"))
            ours[own] = tensor.reshape(1, -1, 1) if snake else tensor
        elif not _is_zero_shift(name, tensor):
            unknown.append(name)
    return ours, sorted(unknown)


def _is_zero_shift(name: str, tensor: Tensor) -> bool:
    """Their layer norms keep a shift that is a buffer of zeros; ours have none."""
    return name.endswith("_norm.beta") and not tensor.any()


def _completed(config: DiTConfig, ours: Mapping[str, Tensor]) -> DiTConfig:
    """What only the weights tell: further input-add channels, and the rotary base."""
    controls: tuple[ControlChannel, ...] = ()
    if INPUT_ADD in ours:
        n_further = ours[INPUT_ADD].shape[-1] - 1 - config.latent_dim
        controls = (ControlChannel("foreign", n_further),) if n_further > 0 else ()
    base, inv_freq = config.rope_base, ours.get("model.dit.rope.inv_freq")
    if inv_freq is not None and inv_freq.numel() > 1:
        base = float((inv_freq[0] / inv_freq[1]).double() ** inv_freq.numel())
    return replace(config, controls=controls, rope_base=base)
