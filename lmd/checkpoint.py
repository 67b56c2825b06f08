"""Weights on disk: safetensors files that carry their own config, written atomically.

All that a file says about itself stands in one metadata entry, as JSON with sorted keys, so equal
content gives equal bytes. The SHA-256 of weights and config is checked whenever weights are loaded;
types and sizes in the entry are checked whenever it is read.
"""

import hashlib
import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from lmd.codec.base import Codec
from lmd.codec.oobleck import OobleckCodec
from lmd.codec.spectral import SpectralCodec
from lmd.config import (
    OobleckConfig,
    Preset,
    SpectralCodecConfig,
    TaggerConfig,
    from_dict,
    to_dict,
)
from lmd.errors import LmdError
from lmd.model.live_model import LiveModel
from lmd.model.text import TextEncoder, build_text_encoder
from lmd.model.weights import build_loaded, tensors_sha256
from lmd.outputs import write_atomic

Config = Preset | SpectralCodecConfig | OobleckConfig | TaggerConfig
MODEL_KINDS = ("base", "finetuned", "arc")
CONFIG_OF: dict[str, Any] = {
    "codec": SpectralCodecConfig | OobleckConfig,
    **dict.fromkeys(MODEL_KINDS, Preset),
    "tagger": TaggerConfig,
}
KINDS = tuple(CONFIG_OF)
RENAMED = {"recogniser": "tagger"}  # as older files say
ENCODER = "encoder."  # both codecs call it so; the latents' mean and scale lie in it too
DECODER_SIZES = ("width", "depth", "step_width", "step_depth", "horizon_frames")
METADATA_KEY = "lmd"  # one key, because safetensors writes several in no fixed order


@dataclass(frozen=True)
class Header:
    """What a checkpoint says about itself, as it stands in the file.

    Attributes:
        format: 2; in format 1 the digest does not cover kind and config.
        kind: what it is for: one of `KINDS`.
        config_type: the class of `config`.
        config: sizes; a whole `Preset` for models, so that codec and text encoder are known too.
        notes: free JSON values: steps, data, scores, seeds.
        sha256: digest of the tensors as stored and of the config.
        stored: float16 are matrices only; vectors always stay float32.
    """

    format: Literal[1, 2]
    kind: str
    config_type: str
    config: Config
    notes: dict
    sha256: str
    stored: Literal["float32", "float16"]


@dataclass(frozen=True)
class Bundle:
    """A model and what turns prompts into its input and its output into sound."""

    preset: Preset
    model: LiveModel
    codec: Codec
    text: TextEncoder


def save_checkpoint(
    path: str | Path,
    tensors: Mapping[str, Tensor],
    *,
    kind: str,
    config: Config,
    notes: Mapping[str, Any] | None = None,
    stored: Literal["float32", "float16"] = "float32",
) -> str:
    """Write weights with their config to one safetensors file, atomically.

    Args:
        path: where to; parent folders are made.
        tensors: a state dict.
        kind: one of `KINDS`.
        config: a `Preset` for models, their own config for codecs and the tagger.
        notes: anything JSON can hold that a reader should know.
        stored: "float16" halves the file: tensors with two or more dimensions are rounded.

    Returns:
        The content's SHA-256.

    Raises:
        LmdError: an unknown kind, a config that does not fit it, weights that are not finite or
            too large for float16.
    """
    check_kind(kind, KINDS)
    _check_config(kind, config)
    packed = {name: _pack(name, tensor, stored) for name, tensor in sorted(tensors.items())}
    header = {
        "format": 2,
        "kind": kind,
        "config_type": type(config).__name__,
        "config": to_dict(config),
        "notes": dict(notes or {}),
        "stored": stored,
    }
    header["sha256"] = tensors_sha256(packed, _covered(header))
    write_atomic(path, save(packed, {METADATA_KEY: json.dumps(header, sort_keys=True)}))
    return header["sha256"]


def _pack(name: str, tensor: Tensor, stored: str) -> Tensor:
    """One tensor as it is stored: on the CPU, contiguous, its own memory, finite."""
    tensor = tensor.detach().cpu()
    if tensor.is_floating_point():
        half = stored == "float16" and tensor.ndim >= 2
        tensor = tensor.to(torch.float16 if half else torch.float32)
        if not torch.isfinite(tensor).all():
            raise LmdError(
                f"values in {name!r} that are not finite as {tensor.dtype}",
                "finite weights",
                "Training diverged, or float16 is too narrow: store float32.",
            )
    return tensor.clone(memory_format=torch.contiguous_format)


def _covered(fields: Mapping[str, Any]) -> str:
    """What the SHA-256 of a file covers beside its tensors: in format 1 nothing."""
    names = ("format", "kind", "config_type", "config") if fields["format"] > 1 else ()
    return json.dumps({name: fields[name] for name in names}, sort_keys=True) if names else ""


def read_header(path: str | Path) -> Header:
    """What a checkpoint says about itself; the weights are not read.

    Raises:
        LmdError: no such file, not a safetensors file or a truncated one, not one of ours, or
            one that asks for sizes out of all bounds (`lmd.config.BOUNDS`).
    """
    with _opened(path) as file:
        return _parse(Path(path), file.metadata())[0]


def load_tensors(path: str | Path, *kinds: str) -> tuple[dict[str, Tensor], Header]:
    """The weights in float32 and the header, with the digest checked.

    Args:
        path: a file written by `save_checkpoint`.
        kinds: what it may be; anything if none is named.

    Raises:
        LmdError: as `read_header`, or another kind, or content that is not what was written.
    """
    path = Path(path)
    with _opened(path) as file:
        header, fields = _parse(path, file.metadata())
        check_kind(header.kind, kinds or KINDS, f"{path} of ")
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    if tensors_sha256(tensors, _covered(fields)) != header.sha256:
        raise LmdError(
            f"{path} whose content is not what was written",
            f"SHA-256 {header.sha256[:12]}…",
            "Fetch or make the file again.",
        )
    floats = {k: v.float() if v.is_floating_point() else v for k, v in tensors.items()}
    return floats, header


@contextmanager
def _opened(path: str | Path) -> Iterator[Any]:
    path = Path(path)
    if not path.is_file():
        raise LmdError(
            f"no file {path}", "a checkpoint", "Check the path, or train one (lmd train)."
        )
    if path.suffix != ".safetensors":
        raise LmdError(
            f"{path.name}, a {path.suffix or 'nameless'} file",
            "a .safetensors file",
            "Another project's checkpoint: lmd convert FOLDER.",
        )
    try:
        with safe_open(path, "pt") as file:
            yield file
    except (SafetensorError, OSError) as error:
        raise LmdError(
            f"{path}, which cannot be read ({error}; {path.stat().st_size} bytes)",
            "a whole safetensors file",
            "It was cut off or is something else: fetch or make it again.",
        ) from error


def _parse(path: Path, metadata: Mapping[str, str] | None) -> tuple[Header, dict[str, Any]]:
    """The header in a file's metadata, types and bounds checked, and its fields as stored."""
    if not metadata or METADATA_KEY not in metadata:
        raise LmdError(
            f"{path} without this project's header",
            "a file written by lmd.checkpoint.save_checkpoint",
            "Another project's checkpoint: lmd convert FOLDER.",
        )
    try:
        fields = json.loads(metadata[METADATA_KEY])
        header = from_dict(Header, fields)
    except (ValueError, TypeError, RecursionError) as error:
        raise LmdError(
            f"{path} whose {METADATA_KEY!r} entry is not ours ({error})",
            "a header as lmd.checkpoint.save_checkpoint writes it",
            "It is damaged or something else: fetch or make it again.",
        ) from error
    header = replace(header, kind=RENAMED.get(header.kind, header.kind))
    check_kind(header.kind, KINDS, f"{path} of ")
    _check_config(header.kind, header.config, f"{path}: ")
    return header, fields


def _check_config(kind: str, config: Config, what: str = "") -> None:
    if not isinstance(config, CONFIG_OF[kind]):
        raise LmdError(
            f"{what}a {type(config).__name__} for kind {kind!r}",
            "a Preset for models, a codec's config for codecs",
            "Pass the other config or another kind.",
        )


def check_kind(kind: str, kinds: tuple[str, ...], what: str = "") -> None:
    """Refuse a kind that is not among `kinds`."""
    if kind not in kinds:
        raise LmdError(f"{what}kind {kind!r}", f"one of {list(kinds)}", "Pick another file.")


def load_model(path: str | Path) -> LiveModel:
    """The transformer in a file, in float32, ready for inference.

    Raises:
        LmdError: see `load_tensors` and `build_loaded`.
    """
    tensors, header = load_tensors(path, *MODEL_KINDS)
    return build_loaded(lambda: build_model(header.config), tensors, str(path))


def build_model(preset: Preset) -> LiveModel:
    """A model of that size with fresh weights."""
    return LiveModel(preset.dit, preset.text.max_seconds)


def load_codec(path: str | Path, dtype: torch.dtype = torch.float32) -> Codec:
    """The codec in a file, ready for inference; `dtype` is for Stable Audio's autoencoder alone.

    Raises:
        LmdError: see `load_tensors` and `build_loaded`.
    """
    tensors, header = load_tensors(path, "codec")
    return build_codec(header.config, tensors, path, dtype)


def build_codec(
    config: Config,
    tensors: Mapping[str, Tensor],
    path: str | Path,
    dtype: torch.dtype = torch.float32,
) -> Codec:
    """The codec that these weights are of."""
    if isinstance(config, OobleckConfig):
        return OobleckCodec.from_tensors(config, tensors, str(path), dtype)
    return build_loaded(lambda: SpectralCodec(config), tensors, str(path))


def encoder_digest(
    config: SpectralCodecConfig | OobleckConfig, tensors: Mapping[str, Tensor]
) -> str:
    """The SHA-256 of all that a codec's latents depend on; another decoder leaves it as it is.

    Of the encoder's tensors and of the sizes that encoding reads, such as the transform's window.
    """
    encoder = {name: tensor for name, tensor in tensors.items() if name.startswith(ENCODER)}
    sizes = to_dict(config)
    if isinstance(config, SpectralCodecConfig):
        sizes = {name: size for name, size in sizes.items() if name not in DECODER_SIZES}
    text = json.dumps([sizes, tensors_sha256(encoder)], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


def codec_hash_of(notes: Mapping[str, Any]) -> str | None:
    """The digest of the encoder whose latents a model learned, if its file says that."""
    found: Any = notes
    for name in ("data", "latent_settings", "codec"):
        found = found.get(name) if isinstance(found, Mapping) else None
    return found if isinstance(found, str) else None


def load_bundle(
    folder: str | Path, kind: str = "arc", dtype: torch.dtype = torch.float32
) -> Bundle:
    """Model, codec and text encoder from a folder holding `codec.safetensors` and `KIND….`

    Args:
        folder: e.g. `data/pretrained`.
        kind: which model: "base", "finetuned" or "arc".
        dtype: of the model; for the codec see `load_codec`.

    Raises:
        LmdError: a file is missing, or the two do not belong together.
    """
    folder = Path(folder)
    check_kind(kind, MODEL_KINDS)
    path, codec_path = folder / f"{kind}.safetensors", folder / "codec.safetensors"
    header = read_header(path)
    if not codec_path.is_file():
        raise LmdError(
            f"no {codec_path} beside {path.name}",
            "the codec whose latents the model learned",
            f"Copy it there, e.g. data/pretrained/codec.safetensors to {codec_path}.",
        )
    preset, learned = header.config, codec_hash_of(header.notes)
    tensors, codec_header = load_tensors(codec_path, "codec")
    is_its_own = learned is None or learned == encoder_digest(codec_header.config, tensors)
    if codec_header.config != preset.codec or not is_its_own:
        raise LmdError(
            f"{path} made for another codec than {codec_path}",
            "a model and the codec whose latents it learned",
            "Put the two that were trained together into one folder.",
        )
    codec = build_codec(codec_header.config, tensors, codec_path, dtype)
    return Bundle(preset, load_model(path).to(dtype), codec, build_text_encoder(preset.text))
