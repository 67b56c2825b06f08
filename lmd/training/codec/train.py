"""`lmd train codec`: train the spectral codec; with `--evaluate FILE`, measure one."""

import hashlib
import shlex
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

import torch
from lightning.pytorch.callbacks import Callback

from lmd.checkpoint import load_codec, read_header
from lmd.codec.spectral import SpectralCodec
from lmd.config import SpectralCodecConfig, preset
from lmd.corpus.manifest import Corpus
from lmd.errors import LmdError
from lmd.machine import machine_dict, tune_allocator
from lmd.outputs import check_outputs, write_atomic, write_json
from lmd.rng import derive_seed
from lmd.training.codec.card import codec_card
from lmd.training.codec.losses import WINDOWS
from lmd.training.codec.metrics import evaluate, markdown_table
from lmd.training.codec.module import CodecRun, CodecTraining, CodecWindows, start_from_components
from lmd.training.options import check_options, command_words
from lmd.training.record import RunRecord, recorded
from lmd.training.trainer import Export, checkpoints, choose_precision, fit


@dataclass(frozen=True, kw_only=True)
class Options(CodecRun):
    """`lmd train codec`.

    Attributes:
        evaluate: measure this codec instead of training.
        json: where the measures go.
        card: where a model card with them goes.
        hours: held-out music to measure on.
    """

    evaluate: Path | None = None
    json: Path | None = None
    card: Path | None = None
    hours: float = 0.5


def main(options: Options, callbacks: Sequence[Callback] = ()) -> int:
    """Train, or measure.

    Raises:
        LmdError: numbers out of their limits, options or a corpus that do not fit, a run that was
            started with other options.
    """
    check_options(options)
    tune_allocator()
    if options.threads:
        torch.set_num_threads(options.threads)
    if options.evaluate:
        return measure(options)
    module = build(options)
    corpus, known = module.windows.corpus, {"encoder_from": None}
    if options.encoder:
        known["encoder_from"] = read_header(options.encoder).sha256
    sounds = "\n".join(row.sha256 for row in corpus.rows)
    known["corpus"] = hashlib.sha256(sounds.encode()).hexdigest()
    record = RunRecord(module.options, known)
    path = options.out / "codec.safetensors"
    export = Export(path, module.codec.config, notes_of(module.options, corpus))
    trainer = fit(module, [record, export, *callbacks])
    export.export(trainer, module)
    print(f"{int(module.step)} steps; weights in {path}")
    return 0


def build(options: CodecRun) -> CodecTraining:
    """The module of a run, ready to start or to go on.

    One that goes on keeps the step from which its discriminator joins in, unless a flag names it.

    Raises:
        LmdError: a preset without a spectral codec; steps that do not add up.
    """
    config = preset(options.preset).codec
    if not isinstance(config, SpectralCodecConfig):
        raise LmdError(f"preset {options.preset!r}", "tiny or small", "It has no spectral codec.")
    options = resolved(options, config)
    windows = CodecWindows(Corpus(options.data, "train"), config, options)
    torch.manual_seed(derive_seed(options.seed, "codec weights"))
    if not options.encoder:
        codec = SpectralCodec(config)
        if not checkpoints(options.out):
            start_from_components(codec, windows)
        return CodecTraining(codec, options, windows)
    codec = cast(SpectralCodec, load_codec(options.encoder))
    if codec.config != config:
        raise LmdError(
            f"{options.encoder} of other sizes", f"those of preset {options.preset}", "Use another."
        )
    return CodecTraining(codec, options, windows)


def resolved(options: CodecRun, config: SpectralCodecConfig) -> CodecRun:
    """The same with what was left open.

    Raises:
        LmdError: steps that do not add up; windows too short for the discriminator.
    """
    encoder_steps = 0 if options.encoder else options.encoder_steps
    if encoder_steps >= options.n_steps:
        raise LmdError(
            f"--encoder-steps {encoder_steps} of --steps {options.n_steps}",
            "fewer: the decoder is trained in those that follow",
            "Change one of them.",
        )
    start = options.adversarial_from
    if start is None:
        half = encoder_steps + (options.n_steps - encoder_steps) // 2
        start = recorded(options.out).get("adversarial_from", half)
    scored = options.frames * config.samples_per_frame - config.n_fft  # samples without the edges
    if start < options.n_steps and scored < max(WINDOWS):
        fewest = -(-(max(WINDOWS) + config.n_fft) // config.samples_per_frame)
        raise LmdError(
            f"--frames {options.frames} for a discriminator with windows of {max(WINDOWS)} samples",
            f"{fewest} or more",
            "Raise --frames, or do without it: --adversarial-from as --steps.",
        )
    precision = choose_precision(options.precision)
    return replace(
        options, encoder_steps=encoder_steps, adversarial_from=start, precision=precision
    )


def notes_of(options: CodecRun, corpus: Corpus) -> dict[str, Any]:
    """What the weights file says about its making."""
    names = ("encoder_steps", "adversarial_from", "batch", "frames", "learning_rate", "noise")
    numbers = {name: getattr(options, name) for name in (*names, "slowness", "seed")}
    return {
        "command": shlex.join(command_words("codec", options)),
        "plan": {"steps": options.n_steps, **numbers},
        "data": {
            "name": options.data.name,
            "renditions": len(corpus),
            "hours": round(corpus.duration_s / 3600, 2),
            "settings": corpus.settings(),
        },
        "encoder_from": options.encoder.name if options.encoder else "",
        "machine": machine_dict(),
    }


def measure(options: Options) -> int:
    """Measure a codec on held-out pieces: print a table, write figures and model card."""
    check_outputs(json=options.json, card=options.card, make_folders=True)
    header, corpus = read_header(options.evaluate), Corpus(options.data, "test")
    codec = load_codec(options.evaluate)
    result = evaluate(codec, corpus, options.hours)
    result |= {"sha256": header.sha256, "data": options.data.name, "machine": machine_dict()}
    print(markdown_table(result))
    if options.json:
        write_json(options.json, result)
    if options.card:
        write_atomic(options.card, codec_card(options.evaluate, result).encode())
    return 0
