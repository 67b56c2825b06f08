"""`lmd train base|finetune|distill`: open data and model, train, describe what was made."""

import shlex
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.callbacks import Callback

from lmd.checkpoint import (
    MODEL_KINDS,
    Header,
    build_model,
    codec_hash_of,
    load_tensors,
    read_header,
)
from lmd.config import DiTConfig, Preset, TextConfig, preset, to_dict
from lmd.data.encode import encoder_sha256
from lmd.errors import LmdError
from lmd.machine import check_compiler, machine_dict, tune_allocator
from lmd.model.live_model import LiveModel
from lmd.model.text import build_text_encoder
from lmd.model.weights import load_strict
from lmd.rng import derive_seed
from lmd.stable_audio.weights import load_stable_audio
from lmd.training.card import training_card
from lmd.training.draws import check_parts
from lmd.training.lora import add_lora
from lmd.training.losses import init_context_projection
from lmd.training.module import LiveTraining
from lmd.training.options import RunOptions, Stage, TrainOptions, check_options, command_words
from lmd.training.record import RunFolder, changes, recorded
from lmd.training.samples import Samples
from lmd.training.trainer import choose_precision
from lmd.training.windows import LatentSource

SAMPLE_EVERY = 500  # steps


def train(options: TrainOptions, callbacks: Sequence[Callback] = ()) -> int:
    """Train, export, describe.

    Raises:
        LmdError: bad options, data or weights; a loss that is not finite.
    """
    source, folder = open_run(options, "base" if options.stage == "base" else "finetuned")
    options, sizes = folder.options, folder.config
    if options.compile:
        check_compiler()
    every = sample_every(options, folder.codec)
    samples = [Samples(every, folder.codec)] if every else []

    model = start_model(options.stage, sizes, options.init, options.seed)
    if options.lora:
        model = add_lora(model, options.lora)
    module = LiveTraining(model, build_text_encoder(sizes.text), source, sizes, options)
    if options.compile:  # at every length; else what runs compiled depends on where a run began
        limits = torch._dynamo.config
        limits.recompile_limit = limits.accumulated_recompile_limit
        model.dit.compile_blocks()

    folder.train(module, [*samples, *callbacks], training_card)
    return 0


def open_run(options: Any, kind: str) -> tuple[LatentSource, RunFolder]:
    """Check options and latents; the precision that was left open is now that of the run.

    Raises:
        LmdError: numbers that mean nothing, latents of another width, weights that learned the
            latents of another codec, a folder with a run that was started with other options.
    """
    tune_allocator()
    check_options(options)
    check_parts(options.batch, options.n_processes * options.accumulate)
    sizes = preset(options.preset)
    if getattr(options, "lora", 0) > sizes.dit.width:
        raise LmdError(
            f"--lora {options.lora}", f"0 to {sizes.dit.width}, the model's width", "Lower it."
        )
    source = LatentSource(options.data, options.seed)
    data = source.shards
    if data.latent_dim != sizes.dit.latent_dim:
        raise LmdError(
            f"latents of {data.latent_dim} channels in {options.data}",
            f"{sizes.dit.latent_dim}, as preset {sizes.name} has",
            "Encode with that preset's codec, or choose the other preset.",
        )
    latents = {name: value for name, value in data.settings.items() if name != "silence"}
    mixes = [e.duration_s for e in data.entries if e.split == "train" and e.voice < 0]
    notes: dict[str, Any] = {
        "seed": options.seed,
        "data": {
            "hours": round(sum(mixes) / 3600, 2),
            "renditions": len(mixes),
            "latent_settings": latents,
        },
        "hardware": machine_dict(),
    }
    known: dict[str, Any] = {"latents": latents}
    for name, path in options.starts().items():
        known[f"{name}_from"] = str(path) if path else None
        if path and path.is_file():
            header = read_header(path)
            check_encoder(f"--{name} {path}", header, options.data, latents.get("codec"))
            known[f"{name}_from"] = header.sha256
            origin = {"file": path.name, "sha256": header.sha256}
            notes[name] = origin | {"command": header.notes.get("command")}
    if options.precision == "auto":
        precision = choose_precision(recorded(options.out).get("precision", "auto"))
        options = replace(options, precision=precision)
    notes["command"] = shlex.join(command_words(options))
    codec = matching_codec(options, latents.get("codec"))
    return source, RunFolder(options, known, kind, sizes, notes, codec)


def check_encoder(start: str, header: Header, data: Path, encoder: str | None) -> None:
    """Refuse weights that learned latents of another encoder than these, where both are known."""
    learned = codec_hash_of(header.notes)
    if encoder and learned and encoder != learned:
        raise LmdError(
            f"{start}, which learned latents of the codec {learned[:12]}",
            f"weights that learned those in {data}, of {encoder[:12]}",
            "Encode with the codec of the weights (data encode --codec), or train from the base "
            "on: latents of two codecs have nothing in common.",
        )


def matching_codec(options: RunOptions, encoder: str | None) -> Path | None:
    """`--codec`, or the one beside the weights that a run begins with, if it made the latents.

    `encoder` is the hash of the encoder that made them, where they say it.
    """
    sizes, starts = preset(options.preset).codec, options.starts().values()
    beside = [path.with_name("codec.safetensors") for path in starts if path is not None]
    there = [path for path in (options.codec, *beside) if path.is_file()]
    fitting = (path for path in there if read_header(path).config == sizes)
    return next((path for path in fitting if encoder in (None, encoder_sha256(path))), None)


def sample_every(options: TrainOptions, codec: Path | None) -> int:
    """Steps from sound to sound of a run; 0: none.

    Raises:
        LmdError: sounds are asked for, and `--codec` is not the codec of the latents.
    """
    if options.sample_every and codec is None:
        read_header(options.codec)  # is it there at all?
        raise LmdError(
            f"{options.codec}, another codec than that of the latents",
            "the codec that they were encoded with",
            "Name it with --codec, or leave sounds out: --sample-every 0.",
        )
    default = SAMPLE_EVERY if codec else 0
    return default if options.sample_every is None else options.sample_every


def start_model(stage: Stage, sizes: Preset, init: Path | None, seed: int) -> LiveModel:
    """Fresh weights from the seed, or those of a file or a Stable Audio folder of that size.

    A base that is to be fine-tuned gets its context projection, see `init_context_projection`.

    Raises:
        LmdError: weights of another size; a base that is to be distilled.
    """
    torch.manual_seed(derive_seed(seed, "weights"))
    if init is None:
        return build_model(sizes)
    if init.is_dir():
        loaded, model = load_stable_audio(init), build_model(sizes)
        check_sizes(loaded.config.dit, loaded.config.text, sizes, init)
        load_strict(model, loaded.model.state_dict(), str(init))
        is_base = bool(loaded.fresh)
    else:
        model, header = load_start(init, sizes, *MODEL_KINDS)
        is_base = header.kind == "base"
    if is_base and stage == "distill":
        expected = "a live model, which continues context"
        raise LmdError(f"a base in {init}", expected, "Fine-tune it first: train finetune.")
    return init_context_projection(model) if is_base and stage == "finetune" else model


def load_start(path: Path, sizes: Preset, *kinds: str) -> tuple[LiveModel, Header]:
    """A model of one of these kinds and of exactly these sizes; what its file says about it.

    Raises:
        LmdError: no such file, or one of another kind, or of other sizes.
    """
    tensors, header = load_tensors(path, *kinds)
    check_sizes(header.config.dit, header.config.text, sizes, path)
    model = build_model(sizes)
    load_strict(model, tensors, str(path))
    return model, header


def check_sizes(dit: DiTConfig, text: TextConfig, sizes: Preset, path: Path) -> None:
    """Refuse weights that mean something else here, though their shapes do not show it."""
    pairs = (text, dit.rope_base), (sizes.text, sizes.dit.rope_base)
    found, wanted = [  # a base may have been worked out from float32 frequencies
        to_dict(words) | {"rope_base": float(f"{base:.3g}")} for words, base in pairs
    ]
    if differing := changes(found, wanted):
        raise LmdError(
            f"{path} with {', '.join(differing)}",
            f"weights for preset {sizes.name}",
            "Choose the preset that they were made for, or other weights.",
        )
