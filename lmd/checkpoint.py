"""Weights on disk: safetensors files that carry their own config, written atomically.

All that a file says about itself stands in one metadata entry, as JSON with sorted keys, so equal
content gives equal bytes. The SHA-256 of the content is checked whenever weights are loaded.
"""

import hashlib
import json
import os
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, cast, get_args

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from lmd.codec.base import Codec
from lmd.config import (
    DiTConfig,
    OobleckConfig,
    Preset,
    SpectralCodecConfig,
    TaggerConfig,
    from_dict,
    to_dict,
)
from lmd.errors import LmdError
from lmd.model.dit import LiveModel
from lmd.model.text import TextEncoder, build_text_encoder
from lmd.model.weights import load_strict

KINDS = ("codec", "base", "finetuned", "arc", "tagger")
Config = Preset | DiTConfig | SpectralCodecConfig | OobleckConfig | TaggerConfig
MODEL_KINDS = ("base", "finetuned", "arc")
CONFIG_TYPES = {cls.__name__: cls for cls in get_args(Config)}
CONFIG_TYPES["RecogniserConfig"] = TaggerConfig  # its name in older files
RENAMED = {"recogniser": "tagger"}  # kinds in older files
METADATA_KEY = "lmd"  # one key, because safetensors writes several in no fixed order
FORMAT = 1
ENCODER = "encoder."  # both codecs call it so; the latents' mean and scale lie in it too
DECODER_SIZES = ("width", "depth", "step_width", "step_depth", "horizon_frames")


@dataclass(frozen=True)
class Header:
    """What a checkpoint says about itself.

    Attributes:
        kind: what it is for: one of `KINDS`.
        config: sizes; a whole `Preset` for models, so that codec and text encoder are known too.
        notes: free JSON values: steps, data, scores, seeds.
        sha256: digest of the tensors as stored.
        stored: "float32" or "float16" (matrices only; vectors always stay float32).
    """

    kind: str
    config: Config
    notes: dict[str, Any]
    sha256: str
    stored: str


@dataclass(frozen=True)
class Bundle:
    """A model and what it needs to be heard."""

    preset: Preset
    model: LiveModel
    codec: Codec
    text: TextEncoder


def write_atomic(path: str | Path, content: bytes) -> None:
    """Write a file so that a reader, or a crash, finds the old one or the new one, never half."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor, temporary = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


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
    if (kind == "codec") != isinstance(config, SpectralCodecConfig | OobleckConfig):
        raise LmdError(
            f"a {type(config).__name__} for kind {kind!r}",
            "a Preset for models, a codec's config for codecs",
            "Pass the other config or another kind.",
        )
    packed = {name: _pack(name, tensor, stored) for name, tensor in sorted(tensors.items())}
    digest = content_sha256(packed)
    header = {
        "format": FORMAT,
        "kind": kind,
        "config_type": type(config).__name__,
        "config": to_dict(config),
        "notes": dict(notes or {}),
        "sha256": digest,
        "stored": stored,
    }
    write_atomic(path, save(packed, {METADATA_KEY: json.dumps(header, sort_keys=True)}))
    return digest


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


def content_sha256(tensors: Mapping[str, Tensor]) -> str:
    """A digest of names, types, shapes and values, in the order of the names."""
    digest = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name}|{tensor.dtype}|{tuple(tensor.shape)}|".encode())
        digest.update(tensor.contiguous().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


def read_header(path: str | Path) -> Header:
    """What a checkpoint says about itself; the weights are not read.

    Raises:
        LmdError: no such file, not a safetensors file or a truncated one, or not one of ours.
    """
    with _opened(path) as file:
        return _parse_header(Path(path), file.metadata())


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
        header = _parse_header(path, file.metadata())
        check_kind(header.kind, kinds or KINDS, f"{path} of ")
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    if content_sha256(tensors) != header.sha256:
        raise LmdError(
            f"{path} whose content is not what was written",
            f"SHA-256 {header.sha256[:12]}…",
            "Fetch or make the file again.",
        )
    floats = {k: v.float() if v.is_floating_point() else v for k, v in tensors.items()}
    return floats, header


def _opened(path: str | Path) -> Any:
    """An open safetensors file."""
    path = Path(path)
    if not path.is_file():
        raise LmdError(
            f"no file {path}", "a checkpoint", "Check the path, or train one (python -m lmd train)."
        )
    if path.suffix != ".safetensors":
        raise LmdError(
            f"{path.name}, a {path.suffix or 'nameless'} file",
            "a .safetensors file",
            "Read another project's checkpoint with lmd.foreign.load_foreign.",
        )
    try:
        return safe_open(path, "pt")
    except (SafetensorError, OSError) as error:
        raise LmdError(
            f"{path}, which cannot be read ({error}; {path.stat().st_size} bytes)",
            "a whole safetensors file",
            "It was cut off or is something else: fetch or make it again.",
        ) from error


def _parse_header(path: Path, metadata: Mapping[str, str] | None) -> Header:
    """The header in a file's metadata."""
    if not metadata or METADATA_KEY not in metadata:
        raise LmdError(
            f"{path} without this project's header",
            "a file written by lmd.checkpoint.save_checkpoint",
            "Read another project's checkpoint with lmd.foreign.load_foreign.",
        )
    try:
        fields = json.loads(metadata[METADATA_KEY])
        if fields["format"] != FORMAT or fields["config_type"] not in CONFIG_TYPES:
            raise LmdError(
                f"{path} of format {fields['format']} with a {fields['config_type']}",
                f"format {FORMAT} with one of {sorted(CONFIG_TYPES)}",
                "It was written by another version: update, or make it again.",
            )
        config = from_dict(CONFIG_TYPES[fields["config_type"]], fields["config"])
        kind = RENAMED.get(fields["kind"], fields["kind"])
        return Header(kind, config, fields["notes"], fields["sha256"], fields["stored"])
    except (json.JSONDecodeError, KeyError, TypeError) as error:
        raise LmdError(
            f"{path} whose {METADATA_KEY!r} entry is not ours ({error!r})",
            "a header as lmd.checkpoint.save_checkpoint writes it",
            "It was damaged or is something else: fetch or make it again.",
        ) from error


def check_kind(kind: str, kinds: tuple[str, ...], what: str = "") -> None:
    """Refuse a kind that is not among `kinds`."""
    if kind not in kinds:
        raise LmdError(f"{what}kind {kind!r}", f"one of {list(kinds)}", "Pick another file.")


def load_model(path: str | Path) -> LiveModel:
    """The transformer in a file, in float32, ready for inference.

    Raises:
        LmdError: see `load_tensors` and `load_strict`.
    """
    tensors, header = load_tensors(path, *MODEL_KINDS)
    model = build_model(header.config)
    load_strict(model, tensors, str(path))
    return model.eval()


def build_model(config: Config) -> LiveModel:
    """A model of that size with fresh weights."""
    if isinstance(config, Preset):
        return LiveModel(config.dit, config.text.max_seconds)
    return LiveModel(cast(DiTConfig, config))


def load_codec(path: str | Path, dtype: torch.dtype = torch.float32) -> Codec:
    """The codec in a file, ready for inference.

    Args:
        path: of a checkpoint.
        dtype: in which Stable Audio's autoencoder computes; the spectral one does in float32.

    Raises:
        LmdError: see `load_tensors` and `load_strict`.
    """
    tensors, header = load_tensors(path, "codec")
    return _build_codec(header.config, tensors, path, dtype)


def _build_codec(
    config: Config, tensors: Mapping[str, Tensor], path: str | Path, dtype: torch.dtype
) -> Codec:
    """The codec that these weights are of."""
    if isinstance(config, OobleckConfig):
        from lmd.codec.oobleck import OobleckCodec

        return OobleckCodec.from_tensors(config, tensors, str(path), dtype)
    from lmd.codec.spectral import SpectralCodec

    codec = SpectralCodec(cast(SpectralCodecConfig, config))
    load_strict(codec, tensors, str(path))
    return codec.eval()


def encoder_digest(config: Config, tensors: Mapping[str, Tensor]) -> str:
    """A digest of all that a codec's latents depend on, and of nothing else.

    SHA-256 of the encoder's tensors (names, shapes, values in float32; for the spectral codec the
    latents' mean and scale are among them) and of the sizes that encoding reads, such as the
    window of the transform. Another decoder leaves it as it is.
    """
    encoder = {name: tensor for name, tensor in tensors.items() if name.startswith(ENCODER)}
    sizes = to_dict(config)
    if isinstance(config, SpectralCodecConfig):
        sizes = {name: size for name, size in sizes.items() if name not in DECODER_SIZES}
    text = json.dumps([sizes, content_sha256(encoder)], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


def codec_hash_of(notes: Mapping[str, Any]) -> str | None:
    """The digest of the encoder whose latents a model learned, if its file says that."""
    data = notes.get("data")
    return data.get("latent_settings", {}).get("codec") if isinstance(data, dict) else None


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
    preset, heard = header.config, codec_hash_of(header.notes)
    fits = isinstance(preset, Preset) and read_header(codec_path).config == preset.codec
    if fits:
        tensors, codec_header = load_tensors(codec_path, "codec")
        fits = heard is None or heard == encoder_digest(codec_header.config, tensors)
    if not fits:
        raise LmdError(
            f"{path} made for another codec than {codec_path}",
            "a model and the codec whose latents it learned",
            "Put the two that were trained together into one folder.",
        )
    codec = _build_codec(codec_header.config, tensors, codec_path, dtype)
    return Bundle(preset, load_model(path).to(dtype), codec, build_text_encoder(preset.text))
