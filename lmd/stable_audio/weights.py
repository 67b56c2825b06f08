"""Weights of a stable-audio-tools model under our names."""

import json
import pickle
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from lmd.codec.oobleck import OobleckCodec, build_reference
from lmd.config import ControlChannel, DiTConfig
from lmd.errors import LmdError
from lmd.model.live_model import LiveModel
from lmd.model.weights import build_loaded, check_names_and_shapes
from lmd.stable_audio.config import CONFIG_FILE, StableAudioConfig, parse_config

WEIGHT_FILES = ("model.safetensors", "model.ckpt")
INPUT_ADD = "model.dit.to_input_add.weight"

# Their layers are numbered: a half's blocks' parts in order, and those of a residual unit.
PARTS = {
    "encoder": ("res_unit1", "res_unit2", "res_unit3", "snake1", "conv1"),
    "decoder": ("snake1", "conv_t1", "res_unit1", "res_unit2", "res_unit3"),
}
UNIT = ("snake1", "conv1", "snake2", "conv2")
# Names of weights of the transformer and of the embedding of seconds, ours to theirs.
RENAMES = (
    ("dit.blocks.", "transformer.layers."),
    (".pre_norm.weight", ".pre_norm.gamma"),
    (".cross_norm.weight", ".cross_attend_norm.gamma"),
    (".ff_norm.weight", ".ff_norm.gamma"),
    (".ff.to_gated.", ".ff.ff.0.proj."),
    (".ff.to_out.", ".ff.ff.2."),
    ("dit.project_", "transformer.project_"),
    ("dit.rope.", "transformer.rotary_pos_emb."),
    ("dit.to_input_add.", "to_input_add_embed."),
    ("dit.timestep_features", "timestep_features.weight"),
    ("dit.", ""),
    ("seconds.weights", "embedder.embedding.0.weights"),
    ("seconds.to_embed.", "embedder.embedding.1."),
)


@dataclass(frozen=True)
class StableAudio:
    """A loaded checkpoint.

    Attributes:
        codec_weights: the autoencoder's, under diffusers' names; empty where the file has none.
        unmatched: keys of the file that were left out; empty unless loaded leniently.
        fresh: our weights that the file does not have (`to_input_add` of a stock model, set to
            zero: the context is ignored until it is trained).
    """

    config: StableAudioConfig
    model: LiveModel
    codec_weights: Mapping[str, Tensor]
    unmatched: tuple[str, ...]
    fresh: tuple[str, ...]

    @property
    def codec(self) -> OobleckCodec:
        """The autoencoder.

        Raises:
            LmdError: the checkpoint has none.
        """
        return OobleckCodec.from_tensors(self.config.preset.codec, self.codec_weights)


def read_weights(path: str | Path) -> dict[str, Tensor]:
    """The tensors in another project's file; pickles are read without running anything.

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


def load_stable_audio(folder: str | Path, strict: bool = True) -> StableAudio:
    """Load a folder with stable-audio-tools' config and weights, in float32.

    Args:
        folder: holds `model_config.json` and `model.safetensors` or `model.ckpt`.
        strict: refuse keys that belong nowhere; otherwise they are listed in `unmatched`.

    Raises:
        LmdError: files missing or unreadable, another kind of model, weights that are missing, of
            another shape, or (strict) unknown.
    """
    folder = Path(folder)
    weights = next((folder / n for n in WEIGHT_FILES if (folder / n).is_file()), None)
    if weights is None or not (folder / CONFIG_FILE).is_file():
        held = sorted(path.name for path in folder.iterdir()) if folder.is_dir() else "no folder"
        wanted = f"{CONFIG_FILE} and {' or '.join(WEIGHT_FILES)}"
        raise LmdError(f"{folder} holding {held}", wanted, "Check the path.")
    try:
        raw = json.loads((folder / CONFIG_FILE).read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise LmdError(f"{CONFIG_FILE} that is not JSON ({error})", "JSON", "Repair it.") from error
    return _translate(parse_config(raw), _plain(read_weights(weights)), str(weights), strict)


def _translate(
    config: StableAudioConfig, tensors: Mapping[str, Tensor], source: str, strict: bool
) -> StableAudio:
    """Their tensors as a model and a codec of ours."""
    config = replace(config, dit=_completed(config.dit, tensors))
    both = nn.Module()  # so that one refusal lists everything
    with torch.device("meta"):
        both.model = LiveModel(config.dit, config.text.max_seconds)
        both.codec = build_reference(config.codec) if config.codec else None
    own = both.state_dict()
    names = {stable_audio_name(name, config): name for name in own}
    ours = {names[name]: tensor for name, tensor in tensors.items() if name in names}
    for name, tensor in ours.items():
        if name.endswith((".alpha", ".beta")):  # vectors there
            ours[name] = tensor.reshape(1, -1, 1)
    unknown = {
        name: tensor
        for name, tensor in tensors.items()
        if name not in names and not (name.endswith("_norm.beta") and not tensor.any())
    }  # a layer norm's beta is a buffer of zeros
    fresh = () if INPUT_ADD in ours else (INPUT_ADD,)
    ours.setdefault(INPUT_ADD, own[INPUT_ADD])
    check_names_and_shapes(both, ours | (unknown if strict else {}), source)
    ours |= {name: torch.zeros(own[name].shape) for name in fresh}
    model, codec = (
        {name.removeprefix(part): ours[name] for name in ours if name.startswith(part)}
        for part in ("model.", "codec.")
    )
    loaded = build_loaded(lambda: LiveModel(config.dit, config.text.max_seconds), model, source)
    left_zero = tuple(name.removeprefix("model.") for name in fresh)
    return StableAudio(config, loaded, codec, tuple(sorted(unknown)), left_zero)


def _plain(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Float32, without Lightning's `diffusion.`; self-attention's `to_q` and `to_kv` joined."""
    plain = {
        name.removeprefix("diffusion."): tensor.float() if tensor.is_floating_point() else tensor
        for name, tensor in tensors.items()
    }
    for name in list(plain):
        other = name.replace(".to_q.", ".to_kv.")
        if name.endswith("self_attn.to_q.weight") and other in plain:
            both = (plain.pop(name), plain.pop(other))
            plain[name.replace(".to_q.", ".to_qkv.")] = torch.cat(both)
    return plain


def stable_audio_name(own: str, config: StableAudioConfig) -> str:
    """Their name of one of our weights: `model.…` of `LiveModel`, `codec.…` as diffusers has it."""
    part, own = own.split(".", 1)
    if part == "codec":
        return f"pretransform.model.{_codec_name(own, config)}"
    seconds = f"conditioner.conditioners.{config.seconds_id}."
    place = seconds if own.startswith("seconds.") else "model.model."
    for ours, theirs in RENAMES:
        own = own.replace(ours, theirs)
    return place + own


def _codec_name(own: str, config: StableAudioConfig) -> str:
    """`decoder.block.1.res_unit2.conv1.bias` is `decoder.layers.2.layers.3.layers.1.bias`."""
    side, *parts, parameter = own.split(".")
    if parts[0] == "block":
        _, index, part, *inner = parts
        numbers = [int(index) + 1, PARTS[side].index(part), *map(UNIT.index, inner)]
    else:
        n = len(config.codec.strides) if config.codec else 0
        numbers = [{"conv1": 0, "snake1": n + 1, "conv2": n + 2}[parts[0]]]
    return ".".join([side, *(f"layers.{number}" for number in numbers), parameter])


def _completed(config: DiTConfig, tensors: Mapping[str, Tensor]) -> DiTConfig:
    """What only the weights say: further input-add channels, and the rotary base."""
    controls: tuple[ControlChannel, ...] = ()
    added = tensors.get("model.model.to_input_add_embed.weight")
    if added is not None and added.ndim == 2:
        n_further = added.shape[-1] - 1 - config.latent_dim
        controls = (ControlChannel("further", n_further),) if n_further > 0 else ()
    base = config.rope_base
    inv_freq = tensors.get("model.model.transformer.rotary_pos_emb.inv_freq")
    if inv_freq is not None and inv_freq.ndim == 1 and len(inv_freq) > 1:
        base = float((inv_freq[0] / inv_freq[1]).double() ** len(inv_freq))
    return replace(config, controls=controls, rope_base=base)
