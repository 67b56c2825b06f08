"""`lmd train base|finetune|distill`: open data and model, train, describe what was made."""

import math
import shlex
import time
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
from lmd.data.shards import LatentShards
from lmd.errors import LmdError
from lmd.machine import check_compiler, machine_dict, tune_allocator
from lmd.model.live_model import LiveModel
from lmd.model.text import build_text_encoder
from lmd.model.weights import load_strict
from lmd.outputs import write_atomic
from lmd.rng import derive_seed
from lmd.stable_audio.weights import load_stable_audio
from lmd.training.card import training_card
from lmd.training.lora import add_lora
from lmd.training.losses import init_context_projection
from lmd.training.module import LiveTraining
from lmd.training.options import (
    RunOptions,
    Stage,
    TrainOptions,
    check_options,
    check_parts,
    command_words,
)
from lmd.training.record import RunRecord, matching_codec, recorded
from lmd.training.samples import Samples
from lmd.training.trainer import Export, choose_precision, fit
from lmd.training.windows import LatentSource

SAMPLE_EVERY = 500  # steps
ROPE_TOLERANCE = 1e-3  # relative; a base that was worked out from float32 frequencies


def train(options: TrainOptions, callbacks: Sequence[Callback] = ()) -> int:
    """Train, export, describe.

    Args:
        options: the command's.
        callbacks: what else happens on the way.

    Raises:
        LmdError: bad options, data or weights; a loss that is not finite.
    """
    tune_allocator()
    options, source = open_run(options)
    sizes, latents = preset(options.preset), source.shards.settings
    if options.compile:
        check_compiler()
    codec = matching_codec(options, latents.get("codec"))
    record = RunRecord(options, known_of(options, source.shards), codec)
    every = sample_every(options, codec)
    samples = [Samples(every, codec)] if every else []

    model = start_model(options.stage, sizes, options.init, options.seed)
    if options.lora:
        model = add_lora(model, options.lora)
    module = LiveTraining(model, build_text_encoder(sizes.text), source, sizes, options)
    if options.compile:
        compile_all(model)

    weights = options.out / ("base" if options.stage == "base" else "finetuned")
    notes = notes_of(options.stage, options, source.shards)
    export = Export(weights.with_suffix(".safetensors"), sizes, notes)
    start = time.time()
    trainer = fit(module, [record, export, *samples, *callbacks])
    export.export(trainer, module)  # a run that was complete before has not done it now
    if trainer.is_global_zero:
        card = training_card(options.out, export.path, options)
        write_atomic(weights.with_suffix(".md"), card.encode())
        print(f"{export.path} after {trainer.global_step} steps, {time.time() - start:.0f} s")
    return 0


def open_run(options: Any) -> tuple[Any, LatentSource]:
    """Checked options, with the precision that the run has; and its latents.

    Raises:
        LmdError: numbers that mean nothing, latents of another width, weights that learned the
            latents of another codec.
    """
    check_options(options)
    check_parts(options.batch, options.n_processes * options.accumulate)
    sizes = preset(options.preset)
    if getattr(options, "lora", 0) > sizes.dit.width:
        raise LmdError(
            f"--lora {options.lora}", f"0 to {sizes.dit.width}, the model's width", "Lower it."
        )
    source = LatentSource(options.data, options.seed)
    if source.shards.latent_dim != sizes.dit.latent_dim:
        raise LmdError(
            f"latents of {source.shards.latent_dim} channels in {options.data}",
            f"{sizes.dit.latent_dim}, as preset {sizes.name} has",
            "Encode with that preset's codec, or choose the other preset.",
        )
    check_encoder(options, source.shards.settings.get("codec"))
    precision = options.precision
    if precision == "auto":
        precision = choose_precision(recorded(options.out).get("precision", "auto"))
    return replace(options, precision=precision), source


def check_encoder(options: RunOptions, ours: str | None) -> None:
    """Refuse weights that learned latents of another encoder than these, where both are known.

    Raises:
        LmdError: names both encoders.
    """
    for name, path in options.starts().items():
        theirs = codec_hash_of(read_header(path).notes) if path and path.is_file() else None
        if ours and theirs and ours != theirs:
            raise LmdError(
                f"--{name} {path}, which learned latents of the codec {theirs[:12]}",
                f"weights that learned those in {options.data}, of {ours[:12]}",
                "Encode with the codec of the weights (data encode --codec), or train from the "
                "base on: latents of two codecs have nothing in common.",
            )


def known_of(options: RunOptions, data: LatentShards) -> dict[str, Any]:
    """What a run begins with and learns from: SHA-256 of weights, settings of the latents."""
    known: dict[str, Any] = {"latents": {k: v for k, v in data.settings.items() if k != "silence"}}
    for name, path in options.starts().items():
        named = str(path) if path else None
        known[f"{name}_from"] = read_header(path).sha256 if path and path.is_file() else named
    return known


def sample_every(options: TrainOptions, codec: Path | None) -> int:
    """How often a run plays something: as asked, else now and then if it can be; 0: never.

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
    model = build_model(sizes)
    if init is None:
        return model
    if init.is_dir():
        loaded = load_stable_audio(init)
        check_sizes(loaded.config.dit, loaded.config.text, sizes, init)
        load_strict(model, loaded.model.state_dict(), str(init))
        is_base = bool(loaded.fresh)
    else:
        is_base = load_into(model, init, sizes, *MODEL_KINDS).kind == "base"
    if is_base and stage == "distill":
        expected = "a live model, which continues context"
        raise LmdError(f"a base in {init}", expected, "Fine-tune it first: train finetune.")
    return init_context_projection(model) if is_base and stage == "finetune" else model


def load_into(model: LiveModel, path: Path, sizes: Preset, *kinds: str) -> Header:
    """Weights of one of these kinds and of these sizes; what the file says about itself.

    Raises:
        LmdError: no such file, or one of another kind, or of other sizes.
    """
    tensors, header = load_tensors(path, *kinds)
    if isinstance(header.config, Preset):
        check_sizes(header.config.dit, header.config.text, sizes, path)
    load_strict(model, tensors, str(path))
    return header


def check_sizes(dit: DiTConfig, text: TextConfig, sizes: Preset, path: Path) -> None:
    """Refuse weights that a run would read in another sense than they were trained in.

    Shapes do not show that: the longest length, the text encoder and the rotary base have none.
    Controls and widths do show, and are listed one by one when the weights are loaded.

    Raises:
        LmdError: names what differs.
    """
    found, wanted = to_dict(text), to_dict(sizes.text)
    differing = [
        f"text.{name} {found[name]}, not {wanted[name]}"
        for name in ("encoder", "n_tokens", "max_seconds")
        if found[name] != wanted[name]
    ]
    if not math.isclose(dit.rope_base, sizes.dit.rope_base, rel_tol=ROPE_TOLERANCE):
        differing.append(f"rope_base {dit.rope_base:g}, not {sizes.dit.rope_base:g}")
    if differing:
        raise LmdError(
            f"{path} with {'; '.join(differing)}",
            f"weights for preset {sizes.name}",
            "Choose the preset that they were made for, or other weights.",
        )


def compile_all(model: LiveModel) -> None:
    """Compile at every length; else which steps run compiled would depend on where a run began."""
    limits = torch._dynamo.config
    limits.recompile_limit = limits.accumulated_recompile_limit
    model.dit.compile_blocks()


def notes_of(name: str, options: RunOptions, data: LatentShards) -> dict[str, Any]:
    """What a weights file says about its making."""
    mixes = [e.duration_s for e in data.entries if e.split == "train" and e.voice < 0]
    notes: dict[str, Any] = {
        "command": shlex.join(command_words(name, options)),
        "seed": options.seed,
        "data": {
            "hours": round(sum(mixes) / 3600, 2),
            "renditions": len(mixes),
            "latent_settings": {k: v for k, v in data.settings.items() if k != "silence"},
        },
        "hardware": machine_dict(),
    }
    for start, path in options.starts().items():
        if path is not None and path.is_file():
            notes[start] = origin_of(path)
    return notes


def origin_of(path: Path) -> dict[str, Any]:
    """What a weights file says of the file that it was started with."""
    header = read_header(path)
    return {"file": path.name, "sha256": header.sha256, "command": header.notes.get("command")}
