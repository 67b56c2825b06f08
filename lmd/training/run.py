"""`lmd train base|finetune|distill`: open data and model, train, describe what was made."""

import math
import shlex
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from lightning import LightningModule
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
from lmd.training.trainer import Export, choose_precision, fit_and_export
from lmd.training.windows import LatentSource

SAMPLE_EVERY = 500  # steps
ROPE_TOLERANCE = 1e-3  # relative; a base that was worked out from float32 frequencies


def train(options: TrainOptions, callbacks: Sequence[Callback] = ()) -> int:
    """Train, export, describe.

    Raises:
        LmdError: bad options, data or weights; a loss that is not finite.
    """
    run = open_run(options)
    options, sizes = run.options, run.sizes
    if options.compile:
        check_compiler()
    every = sample_every(options, run.codec)
    samples = [Samples(every, run.codec)] if every else []

    model = start_model(options.stage, sizes, options.init, options.seed)
    if options.lora:
        model = add_lora(model, options.lora)
    module = LiveTraining(model, build_text_encoder(sizes.text), run.source, sizes, options)
    if options.compile:
        compile_all(model)

    kind = "base" if options.stage == "base" else "finetuned"
    run.fit(module, kind, options.stage, training_card, [*samples, *callbacks])
    return 0


@dataclass(frozen=True)
class Run:
    """A checked command: its options, its latents, their codec where it is at hand."""

    options: Any
    sizes: Preset
    source: LatentSource
    codec: Path | None
    record: RunRecord

    def fit(
        self,
        module: LightningModule,
        kind: str,
        command: str,
        card: Callable[[Path, Path, Any], str],
        callbacks: Sequence[Callback],
    ) -> None:
        """Train a module to weights of that kind; the card is made of folder, file and options."""
        out = self.options.out
        notes = notes_of(command, self.options, self.source.shards)
        export = Export(out / f"{kind}.safetensors", self.sizes, notes)
        describe = partial(card, out, export.path, self.options)
        fit_and_export(module, export, [self.record, *callbacks], describe)


def open_run(options: Any) -> Run:
    """Check options and latents; the precision that was left open is now the run's.

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
    if source.shards.latent_dim != sizes.dit.latent_dim:
        raise LmdError(
            f"latents of {source.shards.latent_dim} channels in {options.data}",
            f"{sizes.dit.latent_dim}, as preset {sizes.name} has",
            "Encode with that preset's codec, or choose the other preset.",
        )
    encoder = source.shards.settings.get("codec")
    check_encoder(options, encoder)
    if options.precision == "auto":
        precision = choose_precision(recorded(options.out).get("precision", "auto"))
        options = replace(options, precision=precision)
    codec = matching_codec(options, encoder)
    record = RunRecord(options, known_of(options, source.shards), codec)
    return Run(options, sizes, source, codec, record)


def check_encoder(options: RunOptions, ours: str | None) -> None:
    """Refuse weights that learned latents of another encoder than these, where both are known."""
    for name, path in options.starts().items():
        theirs = codec_hash_of(read_header(path).notes) if path and path.is_file() else None
        if ours and theirs and ours != theirs:
            raise LmdError(
                f"--{name} {path}, which learned latents of the codec {theirs[:12]}",
                f"weights that learned those in {options.data}, of {ours[:12]}",
                "Encode with the codec of the weights (data encode --codec), or train from the "
                "base on: latents of two codecs have nothing in common.",
            )


def settings_of(data: LatentShards) -> dict[str, Any]:
    """How latents were made, without their silence, which is long."""
    return {name: value for name, value in data.settings.items() if name != "silence"}


def known_of(options: RunOptions, data: LatentShards) -> dict[str, Any]:
    """What a run begins with and learns from: SHA-256 of weights, settings of the latents."""
    known: dict[str, Any] = {"latents": settings_of(data)}
    for name, path in options.starts().items():
        named = str(path) if path else None
        known[f"{name}_from"] = read_header(path).sha256 if path and path.is_file() else named
    return known


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
    if options.sample_every is None:
        return SAMPLE_EVERY if codec else 0
    return options.sample_every


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
    if isinstance(header.config, Preset):
        check_sizes(header.config.dit, header.config.text, sizes, path)
    model = build_model(sizes)
    load_strict(model, tensors, str(path))
    return model, header


def check_sizes(dit: DiTConfig, text: TextConfig, sizes: Preset, path: Path) -> None:
    """Refuse weights that mean something else here, though their shapes do not show it."""
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
            "latent_settings": settings_of(data),
        },
        "hardware": machine_dict(),
    }
    for start, path in options.starts().items():
        if path is not None and path.is_file():
            header = read_header(path)
            origin = {"file": path.name, "sha256": header.sha256}
            notes[start] = origin | {"command": header.notes.get("command")}
    return notes
