"""`lmd train codec`: train the spectral codec."""

import hashlib
import shlex
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from lightning.pytorch.callbacks import Callback

from lmd.checkpoint import load_codec, read_header
from lmd.codec.spectral import SpectralCodec
from lmd.config import SpectralCodecConfig, preset
from lmd.corpus.manifest import Corpus
from lmd.errors import LmdError
from lmd.machine import machine_dict, tune_allocator
from lmd.rng import derive_seed
from lmd.training.codec.losses import WINDOWS
from lmd.training.codec.module import CodecRun, CodecTraining, CodecWindows, start_from_components
from lmd.training.options import check_options, command_words
from lmd.training.record import RunFolder, recorded
from lmd.training.trainer import checkpoints, choose_precision

Options = CodecRun  # the flags


def main(options: CodecRun, callbacks: Sequence[Callback] = ()) -> int:
    """Train and export.

    Raises:
        LmdError: options or a corpus that do not fit, a run that was started with other options.
    """
    check_options(options)
    tune_allocator()
    if options.threads:
        torch.set_num_threads(options.threads)
    module = build(options)
    corpus, encoder = module.windows.corpus, options.encoder
    sounds = "\n".join(row.sha256 for row in corpus.rows)
    known = {
        "encoder_from": read_header(encoder).sha256 if encoder else None,
        "corpus": hashlib.sha256(sounds.encode()).hexdigest(),
    }
    notes = notes_of(module.options, corpus)
    folder = RunFolder(module.options, known, "codec", module.codec.config, notes)
    folder.train(module, callbacks)
    return 0


def build(options: CodecRun) -> CodecTraining:
    """The module of a run, ready to start or to go on.

    One that goes on keeps the step from which its discriminator joins in, unless a flag names it.
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
    codec = load_codec(options.encoder)
    if codec.config != config:
        expected = f"those of preset {options.preset}"
        raise LmdError(f"{options.encoder} of other sizes", expected, "Use another.")
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
    more = {"adversarial_from": start, "precision": choose_precision(options.precision)}
    return replace(options, encoder_steps=encoder_steps, **more)


def notes_of(options: CodecRun, corpus: Corpus) -> dict[str, Any]:
    """What the weights file says about its making."""
    names = ("encoder_steps", "adversarial_from", "batch", "frames", "learning_rate", "noise")
    numbers = {name: getattr(options, name) for name in (*names, "slowness", "seed")}
    return {
        "command": shlex.join(command_words(options)),
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
