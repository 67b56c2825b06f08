"""`python -m lmd train arc`: adversarial post-training of a live model on its own rollouts.

    python -m lmd train arc --init data/pretrained/finetuned.safetensors \
        --base data/pretrained/base.safetensors --data data/latents --out runs/arc

The base becomes the discriminator; train it at the rollout's length first (`train base` does).
"""

import argparse
import shlex
import time
import warnings
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import Callback, TQDMProgressBar
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger

from lmd.arc.card import arc_card, cost_table
from lmd.arc.discriminator import Discriminator, HeadConfig
from lmd.arc.forcing import LossWeights
from lmd.arc.module import ArcRun, ArcTraining
from lmd.arc.plan import ArcOptions
from lmd.checkpoint import build_model, load_tensors, read_header, save_checkpoint, write_atomic
from lmd.config import REGIMES, Preset, check_block, preset
from lmd.data.shards import LatentShards
from lmd.dit import LiveModel
from lmd.errors import LmdError
from lmd.machine import machine_dict, tune_allocator
from lmd.rng import derive_seed
from lmd.text import build_text_encoder
from lmd.training.run import remember_options, run_options
from lmd.training.trainer import (
    PRECISIONS,
    AtomicCheckpointIO,
    Remember,
    RunOptions,
    checkpoints,
    choose_precision,
    choose_strategy,
)
from lmd.training.windows import LatentSource
from lmd.weights import load_strict


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the command's arguments."""
    add = parser.add_argument
    add("--preset", default="small", help="tiny, small or paper")
    add("--init", type=Path, default=Path("data/pretrained/finetuned.safetensors"))
    add("--base", type=Path, default=Path("data/pretrained/base.safetensors"))
    add("--data", type=Path, default=Path("data/latents"), help="what `lmd data encode` wrote")
    add("--out", type=Path, default=Path("runs/arc"), help="folder of the run; goes on there")
    add("--updates", type=int, default=1000, help="of both networks together")
    add("--warmup", type=int, default=100, help="first updates, of the discriminator alone")
    add("--batch", type=int, default=8, help="windows per update over all processes")
    add("--accumulate", type=int, default=1, help="parts that a process splits its rows into")
    add("--blocks", default="8", help="blocks of a rollout; several lengths: 2,4,8")
    add("--block-frames", default="48", help="block length; several: 48,24")
    add("--steps", default="8,4,2", help="step counts that inference will use")
    add("--regimes", default="block-causal,enc-dec")
    add("--lr-generator", type=float, default=ArcRun.lr_generator)
    add("--lr-discriminator", type=float, default=ArcRun.lr_discriminator)
    add("--contrastive", type=float, default=1.0, help="weight; 0 turns the term off")
    add("--r1", type=float, default=0.01, help="smoothness around real music")
    add("--r2", type=float, default=0.01, help="smoothness around rollouts")
    add("--text-dropout", type=float, default=ArcOptions.text_dropout)
    add("--last-block", default=ArcOptions.last_block, help="of the base, in the discriminator")
    add("--ema", type=float, default=ArcRun.ema, help="decay of the averaged weights")
    add("--seed", type=int, default=0)
    add("--devices", type=int, default=1, help="processes on each machine")
    add("--num-nodes", type=int, default=1, help="machines (torchrun or SLURM)")
    add("--accelerator", choices=("auto", "cpu", "gpu"), default="auto")
    add("--precision", choices=("auto", "32", "bf16"), default="auto")
    add("--checkpointing", action="store_true", help="less memory, a third more compute")
    add("--checkpoint-every", type=int, default=50, help="updates")
    add("--no-progress", action="store_true")
    parser.set_defaults(strategy="ddp")


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
        LmdError: counts below one, an unknown regime, lengths that do not fit.
    """
    counts = {"--updates": args.updates, "--batch": args.batch, "--accumulate": args.accumulate}
    for name, value in counts.items():
        if value < 1:
            raise LmdError(f"{name} {value}", "1 or more", "Correct the number.")
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
        text_dropout=args.text_dropout,
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


class ExportArc(Callback):
    """The averaged generator as `arc.safetensors` in the run's folder, at every checkpoint."""

    def __init__(self, out: Path, every: int, sizes: Preset, notes: dict[str, Any]) -> None:
        self.path, self.every, self.sizes, self.notes = out / "arc.safetensors", every, sizes, notes
        self.exported = -1

    def on_train_batch_end(self, trainer: L.Trainer, module: ArcTraining, *args: Any) -> None:
        """Every `every` updates."""
        if trainer.global_step % self.every == 0:
            self.export(trainer, module)

    def on_train_end(self, trainer: L.Trainer, module: ArcTraining) -> None:
        """The final weights."""
        self.export(trainer, module)

    def export(self, trainer: L.Trainer, module: ArcTraining) -> None:
        """Write them, float16 (the first process does)."""
        update = trainer.global_step
        if update == self.exported or not trainer.is_global_zero:
            return
        self.exported = update
        notes = {**self.notes, "steps": update}
        weights = module.ema.state_dict()
        save_checkpoint(
            self.path, weights, kind="arc", config=self.sizes, notes=notes, stored="float16"
        )


def build_trainer(
    run: ArcRun, where: RunOptions, width: int, callbacks: tuple[Callback, ...] = ()
) -> L.Trainer:
    """Lightning's Trainer: logs, atomic checkpoints, precision, processes."""
    n_processes = where.devices * where.num_nodes
    precision = choose_precision(where.precision, width, n_processes)
    found = checkpoints(where.out)
    start = int(found[-1].stem.split("=")[1]) if found else 0
    logs = {"save_dir": where.out, "name": "logs", "version": f"from-{start:07d}"}
    keep = Remember(
        where.out / "checkpoints",
        filename="{step:07d}",
        monitor="step",
        mode="max",
        save_top_k=2,
        every_n_train_steps=where.checkpoint_every,
        save_on_train_epoch_end=False,
    )
    bar = [TQDMProgressBar(refresh_rate=1)] if where.progress else []
    return L.Trainer(
        accelerator=where.accelerator,
        devices=where.devices,
        num_nodes=where.num_nodes,
        strategy=choose_strategy(where, n_processes),
        precision=PRECISIONS[precision],
        max_steps=run.n_updates,
        max_epochs=-1,
        logger=[CSVLogger(**logs, flush_logs_every_n_steps=10), TensorBoardLogger(**logs)],
        log_every_n_steps=1,
        callbacks=[keep, *bar, *callbacks],
        enable_progress_bar=where.progress,
        enable_model_summary=False,
        plugins=[AtomicCheckpointIO()],
        use_distributed_sampler=False,
    )


def fit(module: ArcTraining, where: RunOptions, callbacks: tuple[Callback, ...] = ()) -> L.Trainer:
    """Train, going on from the run's newest checkpoint if it has one."""
    trainer = build_trainer(module.run, where, module.generator.config.width, callbacks)
    found = checkpoints(where.out)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", module=r"lightning\..*")
        warnings.filterwarnings("ignore", category=UserWarning, message=".*LeafSpec.*")
        trainer.fit(module, ckpt_path=str(found[-1]) if found else None, weights_only=False)
    return trainer


def load_start(path: Path, sizes: Preset) -> LiveModel:
    """A model to start from, of exactly these sizes."""
    tensors, _ = load_tensors(path, "base", "finetuned", "arc")
    model = build_model(sizes)
    load_strict(model, tensors, str(path))
    return model


def command_of(args: argparse.Namespace) -> str:
    """The command that gives these arguments, defaults left out."""
    parser = argparse.ArgumentParser()
    configure(parser)
    words = ["python", "-m", "lmd", "train", "arc"]
    for name, value in vars(args).items():
        if value != parser.get_default(name):
            words += [f"--{name.replace('_', '-')}"] + ([] if value is True else [str(value)])
    return shlex.join(words)


def notes_of(args: argparse.Namespace, data: LatentShards) -> dict[str, Any]:
    """What the weights file says about its making."""
    mixes = [e.duration_s for e in data.entries if e.split == "train" and e.voice < 0]
    notes: dict[str, Any] = {
        "command": command_of(args),
        "seed": args.seed,
        "data": {"hours": round(sum(mixes) / 3600, 2), "renditions": len(mixes)},
        "hardware": machine_dict(),
    }
    for name, path in (("init", args.init), ("base", args.base)):
        notes[name] = {"file": path.name, "sha256": read_header(path).sha256}
    return notes


def build_module(args: argparse.Namespace, run: ArcRun, sizes: Preset) -> ArcTraining:
    """Both networks from their files.

    Raises:
        LmdError: files that are missing, of another kind or size; latents of another width.
    """
    source = LatentSource(args.data, args.seed)
    if source.shards.latent_dim != sizes.dit.latent_dim:
        raise LmdError(
            f"latents of {source.shards.latent_dim} channels in {args.data}",
            f"{sizes.dit.latent_dim}, as preset {args.preset} has",
            "Encode with that preset's codec, or choose the other preset.",
        )
    base = load_start(args.base, sizes)
    torch.manual_seed(derive_seed(args.seed, "score head"))
    judge = Discriminator(base, run.arc.last_block, run.arc.head)
    return ArcTraining(
        load_start(args.init, sizes), judge, build_text_encoder(sizes.text), source, run
    )


def main(args: argparse.Namespace) -> int:
    """Train; returns 0 when the weights are written."""
    tune_allocator()
    sizes = preset(args.preset)
    run, where = arc_run(args, sizes), run_options(args)
    remember_options(where.out, run, args)
    module = build_module(args, run, sizes)
    notes = notes_of(args, module.source.shards)
    export = ExportArc(where.out, where.checkpoint_every, sizes, notes)
    start = time.time()
    trainer = fit(module, where, (export,))
    if trainer.is_global_zero:
        write_atomic(where.out / "arc.md", arc_card(where.out, export.path).encode())
        print(cost_table(where.out))
        print(f"{export.path} after {trainer.global_step} updates, {time.time() - start:.0f} s")
    return 0
