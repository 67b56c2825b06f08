"""Something to play on: shipped weights where there are some, random ones where there are none."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from lmd.checkpoint import (
    MODEL_KINDS,
    Bundle,
    build_model,
    load_bundle,
    load_codec,
    read_header,
)
from lmd.codec.base import Codec
from lmd.codec.oobleck import random_codec
from lmd.codec.spectral import SpectralCodec, decode_in_panels
from lmd.config import OobleckConfig, Preset, preset
from lmd.errors import LmdError
from lmd.machine import pick_device
from lmd.model.text import Prompt, build_text_encoder
from lmd.packed import pack, usual_layout
from lmd.panels import can_use_panels
from lmd.rng import derive_seed, normal
from lmd.shapes import Latents, Wave
from lmd.stream.controls import Controls
from lmd.stream.streamer import Streamer

SHIPPED = Path(__file__).parent.parent / "data" / "pretrained"
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
BEST_FIRST = ("arc", "finetuned", "base")  # as measured (docs/log.md)
CFG_SCALE = 1.5  # that weights without ARC-Forcing play best with (docs/log.md)
TRAINED_BY_REGRESSION = {"sampler": "dpmpp", "n_steps": 16, "cfg_scale": CFG_SCALE}
PLAYED_BEST: dict[str | None, dict[str, Any]] = {
    "finetuned": TRAINED_BY_REGRESSION,
    "base": TRAINED_BY_REGRESSION,
    "arc": {"sampler": "dpmpp", "n_steps": 4},  # no guidance: it was trained without
}


@dataclass(frozen=True)
class Instrument:
    """A streamer and where it comes from.

    Attributes:
        streamer: ready to play.
        preset: its sizes.
        source: opens the same instrument again (`open_instrument(source)`).
        is_trained: False for random weights, which make noise, not music.
    """

    streamer: Streamer
    preset: Preset
    source: str
    is_trained: bool

    def controls(self, prompt: Prompt, **changes: Any) -> Controls:
        """What these weights sound best with; anything may be changed by name.

        Weights without adversarial post-training predict means: a sampler that jumps to the clean
        end at every step flattens their music to a drone, so they get a deterministic sampler,
        more steps and guidance.
        """
        return Controls(**{"prompt": prompt, **PLAYED_BEST.get(self.kind, {}), **changes})

    @property
    def kind(self) -> str | None:
        """`arc`, `finetuned` or `base`; None for random weights."""
        return _place(self.source)[1] if self.is_trained else None

    @property
    def sha256(self) -> str | None:
        """Digest of the weights that play, as on their card; None for random ones."""
        if not self.is_trained:
            return None
        folder, kind = _place(self.source)
        return read_header(folder / f"{kind}.safetensors").sha256

    @property
    def description(self) -> str:
        """One line for a person."""
        if self.is_trained:
            return f"{self.source} ({self.preset.name})"
        return (
            f"{self.preset.name} with random weights: noise, not music ({self.source}). "
            'Weights come from "All stages by hand" in docs/training.md.'
        )


class QuietCodec:
    """A codec with random weights, turned down: what comes out of them may be deafening.

    Args:
        model: the codec; its level is measured once on standard normal latents.
    """

    level = 0.1  # RMS, −20 dB under full scale

    def __init__(self, model: Codec) -> None:
        self.model = model
        self.sample_rate, self.channels = model.sample_rate, model.channels
        self.latent_dim, self.samples_per_frame = model.latent_dim, model.samples_per_frame
        self.lookback_frames, self.lookahead_frames = model.lookback_frames, model.lookahead_frames
        with torch.no_grad():
            noise = model.decode(normal((1, model.latent_dim, 48), 0, "loudness"))
        self.gain = self.level / max(float(noise.square().mean().sqrt()), 1e-6)

    @property
    def device(self) -> torch.device:
        """The codec's own."""
        return self.model.device

    def encode(self, wave: Wave) -> Latents:
        """The codec's own."""
        return self.model.encode(wave)

    def decode(self, latents: Latents) -> Wave:
        """The codec's own, turned down."""
        return self.model.decode(latents) * self.gain


def open_instrument(
    source: str = "best",
    *,
    preset_name: str = "small",
    device: str = "auto",
    dtype: str | None = None,
) -> Instrument:
    """Load an instrument.

    Args:
        source: `best` (the best shipped weights of that preset, else random ones), a shipped kind
            (`arc`, `finetuned`, `base`), `FOLDER:KIND`, or `random:PRESET:SEED` (with
            `:codec` behind it for random weights in front of the shipped codec). Behind each of
            them may stand `@bfloat16`.
        preset_name: for `best` only.
        device: where it computes; `auto`: on a CUDA GPU if there is one.
        dtype: of the transformer and of Stable Audio's autoencoder: `float32`, or `bfloat16`, which
            halves weights and cache once they are loaded, and is faster with large models where
            the processor multiplies it (slower elsewhere); None: as `source` says, else float32.
            The default codec computes in float32.

    Raises:
        LmdError: no such source, device or precision, or files that are missing or do not fit.
    """
    place, (weights, precision) = pick_device(device), _split(source)
    precision = precision if dtype is None else dtype
    if precision not in DTYPES:
        raise LmdError(f"dtype {precision!r}", f"one of {', '.join(DTYPES)}", "Pick one of these.")
    if weights == "best":
        weights = _best(preset(preset_name))
    source = weights if precision == "float32" else f"{weights}@{precision}"
    if weights.startswith("random:"):
        return _instrument(_random(weights, DTYPES[precision]), source, place, is_trained=False)
    folder, kind = _place(weights)
    if kind not in MODEL_KINDS:
        raise LmdError(
            f"source {weights!r}",
            f"best, {', '.join(BEST_FIRST)}, FOLDER:KIND or random:PRESET:SEED, "
            "with or without @bfloat16 behind it",
            "Pick one of these.",
        )
    bundle = load_bundle(folder, kind, DTYPES[precision])
    return _instrument(bundle, source, place, is_trained=True)


def precision_of(source: str) -> str:
    """The precision that a source names, one of `DTYPES`."""
    return _split(source)[1]


def _split(source: str) -> tuple[str, str]:
    """The weights and the precision that a source names."""
    weights, at, precision = source.rpartition("@")
    return (weights, precision) if at and precision in DTYPES else (source, "float32")


def _place(source: str) -> tuple[Path, str]:
    """Folder and kind of `FOLDER:KIND`, or of a shipped kind."""
    folder, _, kind = _split(source)[0].rpartition(":")
    return Path(folder) if folder else SHIPPED, kind


def _instrument(parts: Bundle, source: str, device: torch.device, is_trained: bool) -> Instrument:
    """The parts put together on their device; on a CPU laid out for it where that is possible.

    The layout is a function of machine and precision, not of a trial: equal seeds, equal samples.
    """
    codec = parts.codec.model if isinstance(parts.codec, QuietCodec) else parts.codec
    parts.model.to(device)
    codec.to(device)
    if device.type == "cpu":
        pack(parts.model, layout=usual_layout(parts.model.dit.dtype))
        if can_use_panels():
            decode_in_panels(codec)
    streamer = Streamer(parts.model, parts.codec, parts.text, parts.preset.window)
    return Instrument(streamer, parts.preset, source, is_trained)


def _best(wanted: Preset) -> str:
    """The source of the best weights there are for a preset."""
    codec_path = SHIPPED / "codec.safetensors"
    fits = codec_path.is_file() and read_header(codec_path).config == wanted.codec
    for kind in BEST_FIRST:
        path = SHIPPED / f"{kind}.safetensors"
        if fits and path.is_file() and read_header(path).config == wanted:
            return kind
    return f"random:{wanted.name}:0" + (":codec" if fits else "")


def _random(source: str, dtype: torch.dtype) -> Bundle:
    """Fresh weights, a function of the preset and the seed."""
    parts = source.split(":")
    well_formed = len(parts) in (3, 4) and parts[2].isdecimal() and parts[3:] in ([], ["codec"])
    if not well_formed:
        raise LmdError(
            f"source {source!r}",
            "random:PRESET:SEED, with or without @bfloat16 behind it",
            "E.g. random:tiny:0.",
        )
    chosen = preset(parts[1])
    shipped = SHIPPED / "codec.safetensors"
    if parts[3:] and read_header(shipped).config != chosen.codec:
        raise LmdError(
            f"source {source!r}: the shipped codec is not the preset's",
            "a preset with that codec (small)",
            f"Drop the end: random:{parts[1]}:{parts[2]}.",
        )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(derive_seed(int(parts[2]), "weights"))
        model = build_model(chosen).eval()
        _leave_no_zeros(model)
        own = load_codec(shipped, dtype) if parts[3:] else _random_codec(chosen, dtype)
    return Bundle(chosen, model.to(dtype), own, build_text_encoder(chosen.text))


def _leave_no_zeros(model: nn.Module) -> None:
    """Draw the matrices that begin as zeros, so that every control can be heard."""
    for parameter in model.parameters():
        if parameter.ndim == 2 and not bool(parameter.any()):
            parameter.data = torch.randn(parameter.shape) * parameter.shape[-1] ** -0.5


def _random_codec(chosen: Preset, dtype: torch.dtype) -> Codec:
    if isinstance(chosen.codec, OobleckConfig):
        return QuietCodec(random_codec(chosen.codec, dtype=dtype))
    return QuietCodec(SpectralCodec(chosen.codec).eval())
