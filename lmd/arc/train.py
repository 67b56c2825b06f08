"""`python -m lmd train arc`: adversarial post-training of a live model on its own rollouts.

    python -m lmd train arc --init data/pretrained/finetuned.safetensors \
        --base data/pretrained/base.safetensors --data data/latents --out runs/arc

The base becomes the discriminator; train it at the rollout's length first (`train base` does).
"""

import argparse
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import Callback

from lmd.arc.card import arc_card, cost_table, save_curves
from lmd.arc.discriminator import Discriminator, HeadConfig
from lmd.arc.losses import LossWeights
from lmd.arc.module import ArcRun, ArcTraining
from lmd.arc.plan import ArcOptions
from lmd.checkpoint import build_model, write_atomic
from lmd.config import REGIMES, Preset, check_block, preset
from lmd.data.shards import LatentShards
from lmd.errors import LmdError
from lmd.machine import tune_allocator
from lmd.model.live_model import LiveModel
from lmd.model.text import build_text_encoder
from lmd.rng import derive_seed
from lmd.training.begun import NoteOptions
from lmd.training.limits import check_words
from lmd.training.module import check_parts
from lmd.training.run import (
    check_heard,
    command_of,
    configure_run,
    describe_run,
    load_into,
    notes_of,
    open_latents,
    origin_of,
    run_options,
)
from lmd.training.trainer import Export, RunOptions, build_trainer, go_on


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the command's arguments."""
    add = parser.add_argument
    configure_run(parser, Path("runs/arc"), checkpoint_every=50)
    add("--init", type=Path, default=Path("data/pretrained/finetuned.safetensors"))
    add("--base", type=Path, default=Path("data/pretrained/base.safetensors"))
    add("--updates", type=int, default=1000, help="of both networks together")
    add("--warmup", type=int, default=100, help="first updates, of the discriminator alone")
    add("--blocks", default="8", help="blocks of a rollout; several lengths: 2,4,8")
    add("--block-frames", default="48", help="block length; several: 48,24")
    add("--steps", default="8,4,2", help="step counts that inference will use")
    add("--sampler", choices=("pingpong", "dpmpp", "euler"), default=ArcOptions.sampler)
    add("--plays-out", action="store_true", help="blocks do not end with the call that learns")
    add("--regimes", default="block-causal,enc-dec")
    add("--lr-generator", type=float, default=ArcRun.lr_generator)
    add("--lr-discriminator", type=float, default=ArcRun.lr_discriminator)
    add("--contrastive", type=float, default=1.0, help="weight; 0 turns the term off")
    add("--r1", type=float, default=0.01, help="smoothness around real music")
    add("--r2", type=float, default=0.01, help="smoothness around rollouts")
    add("--text-dropout", type=float, default=ArcOptions.text_dropout)
    words = "share of rollouts from silence"
    add("--from-silence", type=float, default=ArcOptions.context_dropout_all, help=words)
    add("--last-block", default=ArcOptions.last_block, help="of the base, in the discriminator")
    add("--ema", type=float, default=ArcRun.ema, help="decay of the averaged weights")
    parser.set_defaults(strategy="ddp")  # two networks in turn are not split


def numbers(text: str, name: str) -> tuple[tuple[int, float], ...]:
    """`8,4,2` as equally shared options.

    Raises:
        LmdError: something that is not a positive whole number.
    """
    words = [word.strip() for word in text.split(",")]
    if not all(word.isdigit() and int(word) > 0 for word in words):
        raise LmdError(f"{name} {text!r}", "positive whole numbers with commas", "E.g. 8,4,2.")
    return tuple((int(word), 1.0) for word in words)


def arc_run(args: argparse.Namespace, sizes: Preset) -> ArcRun:
    """The run that the words describe.

    Raises:
        LmdError: numbers out of their limits, an unknown regime, lengths that do not fit, or no
            update in which the generator learns.
    """
    check_words(args)
    check_parts(args.batch, args.devices * args.num_nodes * args.accumulate)
    if args.updates < args.warmup + 2:
        raise LmdError(
            f"--updates {args.updates} with --warmup {args.warmup}",
            f"{args.warmup + 2} or more: behind the warm-up, every second one trains the generator",
            "Raise --updates, or lower --warmup.",
        )
    regimes = tuple(word.strip() for word in args.regimes.split(","))
    if not set(regimes) <= set(REGIMES):
        raise LmdError(f"--regimes {args.regimes!r}", f"some of {REGIMES}", "Correct the names.")
    lengths = numbers(args.block_frames, "--block-frames")
    for block_frames, _ in lengths:
        check_block(sizes.window.context_frames, block_frames)
    options = ArcOptions(
        context_frames=sizes.window.context_frames,
        window_frames=sizes.window.window_frames,
        frame_rate_hz=sizes.frame_rate_hz,
        regimes=tuple((regime, 1.0) for regime in regimes),
        block_lengths=lengths,
        n_blocks=numbers(args.blocks, "--blocks"),
        n_steps=numbers(args.steps, "--steps"),
        sampler=args.sampler,
        plays_out=args.plays_out,
        text_dropout=args.text_dropout,
        context_dropout_all=args.from_silence,
        weights=LossWeights(args.contrastive, args.r1, args.r2),
        n_warmup=args.warmup,
        last_block=args.last_block,
        head=HeadConfig.of(sizes.dit.width),
    )
    return ArcRun(
        n_updates=args.updates,
        batch=args.batch,
        accumulate=args.accumulate,
        seed=args.seed,
        lr_generator=args.lr_generator,
        lr_discriminator=args.lr_discriminator,
        ema=args.ema,
        checkpointing=args.checkpointing,
        arc=options,
    )


def fit(module: ArcTraining, where: RunOptions, callbacks: Sequence[Callback] = ()) -> L.Trainer:
    """Train, going on where the run's folder left off; the module clips and accumulates itself."""
    width = module.generator.config.width
    trainer = build_trainer(where, width, module.run.n_updates, callbacks)
    return go_on(trainer, module, where.out)


def load_start(path: Path, sizes: Preset, *kinds: str) -> LiveModel:
    """A model to start from, of one of these kinds and of exactly these sizes."""
    model = build_model(sizes)
    load_into(model, path, sizes, *kinds)
    return model


def arc_notes(args: argparse.Namespace, data: LatentShards) -> dict[str, Any]:
    """What the weights file says about its making."""
    parser = argparse.ArgumentParser()
    configure(parser)
    notes = notes_of(command_of("arc", args, parser), args, data)
    for name, path in (("init", args.init), ("base", args.base)):
        notes[name] = origin_of(path)
    return notes


def build_module(args: argparse.Namespace, run: ArcRun, sizes: Preset) -> ArcTraining:
    """Both networks from their files.

    Raises:
        LmdError: files that are missing, of another kind or size; latents of another width.
    """
    source = open_latents(args.data, sizes, args.seed)
    base = load_start(args.base, sizes, "base")
    torch.manual_seed(derive_seed(args.seed, "score head"))
    judge = Discriminator(base, run.arc.last_block, run.arc.head)
    player = load_start(args.init, sizes, "finetuned", "arc")
    return ArcTraining(player, judge, build_text_encoder(sizes.text), source, run)


def main(args: argparse.Namespace) -> int:
    """Train; returns 0 when the weights are written."""
    tune_allocator()
    sizes = preset(args.preset)
    run, where = arc_run(args, sizes), run_options(args)
    module = build_module(args, run, sizes)
    check_heard(args, module.source.shards)
    described = describe_run(where.out, run, args, module.source.shards)
    where = replace(where, precision=described["precision"])
    notes = arc_notes(args, module.source.shards)
    export = Export(where.out / "arc.safetensors", where.checkpoint_every, sizes, notes)
    start = time.time()
    trainer = fit(module, where, (NoteOptions(where.out, described), export))
    export.export(trainer, module)  # a run that was complete before has not done it now
    if trainer.is_global_zero:
        card = arc_card(where.out, export.path, run.arc)
        write_atomic(where.out / "arc.md", card.encode())
        save_curves(where.out)
        print(cost_table(where.out))
        print(f"{export.path} after {trainer.global_step} updates, {time.time() - start:.0f} s")
    return 0
