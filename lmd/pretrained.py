"""Something to play on: shipped weights where there are some, random ones where there are none."""

import hashlib
import os
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

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
from lmd.codec.spectral import SpectralCodec
from lmd.config import OobleckConfig, Preset, preset
from lmd.errors import LmdError
from lmd.graph import CODEC, FORMAT, MANIFEST, PRECISIONS
from lmd.machine import pick_device
from lmd.model.text import Prompt, build_text_encoder
from lmd.rng import derive_seed, normal
from lmd.shapes import Latents, Wave
from lmd.stream.block import LiveDenoiser
from lmd.stream.controls import Controls
from lmd.stream.streamer import Streamer

SHIPPED = Path(__file__).parent.parent / "data" / "pretrained"
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
ENGINES = ("torch", "graph")
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
        engine: what computes: `torch` or `graph`.
    """

    streamer: Streamer
    preset: Preset
    source: str
    is_trained: bool
    engine: str = "torch"

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
            return f"{self.source} ({self.preset.name}, {self.engine})"
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
    engine: str = "auto",
) -> Instrument:
    """Load an instrument.

    Args:
        source: `best` (the best shipped weights of that preset, else random ones), a shipped kind
            (`arc`, `finetuned`, `base`), `FOLDER:KIND`, `random:PRESET:SEED` (with `:codec` behind
            it for random weights in front of the shipped codec), or a folder that `lmd export`
            wrote. Behind it may stand a precision and an engine: `arc@bfloat16`, `arc@torch`.
        preset_name: for `best` only.
        device: where it computes; `auto`: on a CUDA GPU if there is one.
        dtype: in which the transformer computes: `float32`, `bfloat16` (faster with large models
            where the processor multiplies it, slower elsewhere) or, with graphs, `int8`; None: as
            `source` says, else float32. Stable Audio's autoencoder follows in bfloat16; the
            spectral codec computes in float32.
        engine: `graph` plays exported graphs (see `lmd.graph`), which are made once and kept;
            `torch` plays the model as it is trained. `auto`: as `source` says, else graphs for
            trained weights on a CPU.

    Raises:
        LmdError: no such source, device, precision or engine, or files that are missing or do not
            fit.
    """
    place, (weights, precision, named_engine) = pick_device(device), _split(source)
    precision = precision if dtype is None else dtype
    if weights == "best":
        weights = _best(preset(preset_name))
    is_random, is_exported = weights.startswith("random:"), (Path(weights) / MANIFEST).is_file()
    usual = "graph" if is_exported or (place.type == "cpu" and not is_random) else "torch"
    chosen = named_engine or usual if engine == "auto" else engine
    _check(precision, chosen, place)
    source = weights + f"@{precision}" * (precision != "float32") + f"@{chosen}" * (chosen != usual)
    if is_exported and chosen != "graph":
        raise LmdError(f"engine {chosen!r} for {weights}", "'graph'", "Name the weights instead.")
    if chosen == "graph":
        try:
            folder = Path(weights) if is_exported else _exported(weights)
            return _on_graphs(folder, source, precision)
        except (OSError, ImportError) as error:  # nowhere to keep them, or no runtime for them
            if precision not in DTYPES or "graph" in (engine, named_engine):
                expected = "OpenVINO, and a folder that can be written in LMD_CACHE"
                raise LmdError(str(error), expected, "Or play with engine='torch'.") from error
            print(f"{error}\nPlaying with PyTorch instead.", file=sys.stderr)
            source += "@torch"
    bundle = _bundle(weights, DTYPES[precision])
    codec = bundle.codec.model if isinstance(bundle.codec, QuietCodec) else bundle.codec
    bundle.model.to(place)
    codec.to(place)
    streamer = Streamer(bundle.model, bundle.codec, bundle.text, bundle.preset.window)
    return Instrument(streamer, bundle.preset, source, not is_random)


def precision_of(source: str) -> str:
    """The precision that a source names, one of `PRECISIONS`."""
    return _split(source)[1]


def _check(precision: str, engine: str, device: torch.device) -> None:
    """Refuse what does not exist, or not together."""
    if engine not in ENGINES:
        raise LmdError(f"engine {engine!r}", "auto, torch or graph", "Pick one of these.")
    known = PRECISIONS if engine == "graph" else tuple(DTYPES)
    if precision not in known:
        raise LmdError(
            f"dtype {precision!r} with engine {engine!r}", f"one of {', '.join(known)}", "Pick one."
        )
    if engine == "graph" and device.type != "cpu":
        raise LmdError(
            f"engine 'graph' on {device}", "the CPU, where graphs play", "Use engine='torch' there."
        )


def _split(source: str) -> tuple[str, str, str]:
    """The weights, the precision and the engine (or nothing) that a source names."""
    precision, engine = "float32", ""
    weights, at, last = source.rpartition("@")
    while at and last in (*PRECISIONS, *ENGINES):
        precision, engine = (last, engine) if last in PRECISIONS else (precision, last)
        source = weights
        weights, at, last = source.rpartition("@")
    return source, precision, engine


def _place(source: str) -> tuple[Path, str]:
    """Folder and kind of `FOLDER:KIND`, or of a shipped kind."""
    folder, _, kind = _split(source)[0].rpartition(":")
    return Path(folder) if folder else SHIPPED, kind


def _bundle(weights: str, dtype: torch.dtype) -> Bundle:
    """Model, codec and text encoder of a source."""
    if weights.startswith("random:"):
        return _random(weights, dtype)
    folder, kind = _place(weights)
    if kind not in MODEL_KINDS:
        raise LmdError(
            f"source {weights!r}",
            f"best, {', '.join(BEST_FIRST)}, FOLDER:KIND, random:PRESET:SEED or an exported "
            "folder, with or without @bfloat16, @int8, @torch or @graph behind it",
            "Pick one of these.",
        )
    return load_bundle(folder, kind, dtype)


def _on_graphs(folder: Path, source: str, precision: str) -> Instrument:
    """The instrument that an exported folder is."""
    from lmd.graph.runtime import load_graphs

    chosen, model, codec, weights = load_graphs(folder, precision)
    is_trained = not weights.startswith("random:")
    if codec is None:
        codec = load_codec(folder / CODEC, DTYPES.get(precision, torch.float32))
    codec = codec if is_trained else QuietCodec(codec)
    streamer = Streamer(LiveDenoiser(model), codec, build_text_encoder(chosen.text), chosen.window)
    return Instrument(streamer, chosen, source, is_trained, "graph")


def _exported(weights: str) -> Path:
    """The folder of a source's graphs, exported now if they are not there yet.

    It lies under `LMD_CACHE` (`~/.cache/lmd`) and is named after the weights.
    """
    identity = [FORMAT, torch.__version__, weights]
    if not weights.startswith("random:"):
        folder, kind = _place(weights)
        paths = (folder / f"{kind}.safetensors", folder / "codec.safetensors")
        if kind not in MODEL_KINDS or not all(path.is_file() for path in paths):
            _bundle(weights, torch.float32)  # refuses, and says what is wrong
        identity[2:] = [read_header(path).sha256 for path in paths]
    key = hashlib.sha256("/".join(identity).encode()).hexdigest()[:20]
    out = Path(os.environ.get("LMD_CACHE", Path.home() / ".cache" / "lmd")) / "graphs" / key
    if not (out / MANIFEST).is_file():
        print(f"exporting {weights} once, to play it faster …", file=sys.stderr)
        made = out.with_name(f"{key}.{os.getpid()}")
        made.mkdir(parents=True, exist_ok=True)  # or it is said now that this cannot be
        seconds = export_source(weights, made)["seconds"]
        try:
            made.rename(out)
        except OSError:  # another process was faster
            shutil.rmtree(made)
        print(f"took {seconds:.0f} s; kept in {out}", file=sys.stderr)
    return out


def export_source(source: str, out: Path, block_frames: tuple[int, ...] = ()) -> dict[str, Any]:
    """Write a source's graphs into a folder, which is then a source itself.

    Args:
        source: as for `open_instrument`, but `best` and exported folders.
        out: a new folder, or one that was written so.
        block_frames: block lengths for which static graphs are wanted as well.

    Returns:
        The manifest.

    Raises:
        LmdError: as `open_instrument` and `lmd.graph.export.export`.
    """
    from lmd.graph.export import export

    weights = _split(source)[0]
    bundle = _bundle(weights, torch.float32)
    codec = bundle.codec.model if isinstance(bundle.codec, QuietCodec) else bundle.codec
    codec_file = None if weights.startswith("random:") else _place(weights)[0] / CODEC
    if codec_file is None and not isinstance(codec, SpectralCodec):
        raise LmdError(f"{source} as graphs", "weights with a codec's file", "Use engine='torch'.")
    return export(
        bundle.model, codec, bundle.preset, out,
        block_frames=block_frames, source=weights, codec_file=codec_file,
    )  # fmt: skip


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
        for parameter in model.parameters():
            if parameter.ndim == 2 and not bool(parameter.any()):  # or not every control is heard
                parameter.data = torch.randn(parameter.shape) * parameter.shape[-1] ** -0.5
        if parts[3:]:
            codec = load_codec(shipped, dtype)
        elif isinstance(chosen.codec, OobleckConfig):
            codec = QuietCodec(random_codec(chosen.codec, dtype=dtype))
        else:
            codec = QuietCodec(SpectralCodec(chosen.codec).eval())
    return Bundle(chosen, model.to(dtype), codec, build_text_encoder(chosen.text))
