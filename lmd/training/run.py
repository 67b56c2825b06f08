"""`python -m lmd train base|finetune|distill`: from command-line words to a described model."""

import argparse
import dataclasses
import math
import shlex
import time
from pathlib import Path
from typing import Any, NamedTuple, get_args

import torch
from lightning.pytorch.callbacks import Callback

from lmd.checkpoint import (
    MODEL_KINDS,
    Header,
    build_model,
    codec_hash_of,
    load_strict,
    load_tensors,
    read_header,
    write_atomic,
)
from lmd.config import DiTConfig, Preset, TextConfig, preset, to_dict
from lmd.data.encode import encoder_sha256
from lmd.data.shards import LatentShards
from lmd.errors import LmdError
from lmd.foreign import load_foreign
from lmd.machine import check_compiler, machine_dict, tune_allocator
from lmd.model.dit import LiveModel
from lmd.model.text import build_text_encoder
from lmd.rng import derive_seed
from lmd.training.begun import NoteOptions, begun_as, compare
from lmd.training.card import model_card
from lmd.training.distill import DistillOptions, LossOn, PointsOn
from lmd.training.draws import (
    BaseOptions,
    FinetuneOptions,
    LevelDistribution,
    NoiseOptions,
)
from lmd.training.limits import check_words
from lmd.training.lora import add_lora
from lmd.training.losses import init_context_projection
from lmd.training.module import LiveTraining, Stage, TrainOptions, check_parts
from lmd.training.samples import Samples
from lmd.training.trainer import Export, RunOptions, choose_precision, fit
from lmd.training.windows import LatentSource


class Start(NamedTuple):
    """What a stage takes where the command line is silent."""

    n_steps: int
    lr: float
    init: Path | None = None


STARTS: dict[Stage, Start] = {
    "base": Start(4000, 5e-4),
    "finetune": Start(2000, 2e-4),
    "distill": Start(1000, 1e-4, Path("data/pretrained/finetuned.safetensors")),
}


SAMPLE_EVERY = 500
LONG_RUN = 2000  # steps after which compiling two lengths has paid even where it gains 5 %
ROPE_TOLERANCE = 1e-3  # relative; a foreign file's base is worked out from its float32 frequencies


def configure(parser: argparse.ArgumentParser, stage: Stage) -> None:
    """Add the arguments of a stage; most are those of all."""
    is_base, start = stage == "base", STARTS[stage]
    add = parser.add_argument
    configure_run(parser, Path(f"runs/{stage}"), checkpoint_every=200)
    add("--steps", type=int, default=start.n_steps)
    add("--lr", type=float, default=start.lr)
    add("--warmup", type=int, default=100, help="steps of rising learning rate")
    add("--ema", type=float, default=0.999, help="decay of the averaged weights that are shipped")
    add("--strategy", choices=("ddp", "fsdp"), default="ddp", help="copy or split the weights")
    add(
        "--sample-every",
        type=int,
        help="steps between sounds and pictures of them; 0 = none; if left open, "
        f"{SAMPLE_EVERY} where the codec is of the preset",
    )
    add("--codec", type=Path, default=Path("data/pretrained/codec.safetensors"))
    add(
        "--init",
        type=Path,
        default=start.init,
        help="weights, or a Stable Audio folder, to begin with",
    )
    add(
        "--compile",
        action=argparse.BooleanOptionalAction,
        help="torch.compile: a slow start at every new length, then faster steps; if left open, "
        f"long base runs of one process on CPU do ({LONG_RUN} steps, and a C++ compiler)",
    )
    add("--text-dropout", type=float, default=0.1)
    if stage == "distill":
        add("--teacher-steps", type=int, default=DistillOptions.n_steps, help="calls of its walk")
        add("--cfg-scale", type=float, default=DistillOptions.cfg_scale, help="its guidance")
        add("--points", type=int, default=DistillOptions.n_points, help="of a walk in one pass")
        on = DistillOptions.points_on
        add("--points-on", choices=get_args(PointsOn), default=on, help="the walk or its chord")
        on = DistillOptions.loss_on
        add("--loss-on", choices=get_args(LossOn), default=on, help="what is compared")
        return
    distributions = get_args(LevelDistribution)
    add("--noise", choices=distributions, default="uniform", help="how noise levels are drawn")
    if is_base:
        add("--long-share", type=float, default=0.1, help="share of steps on 768 frames")
    else:
        share = FinetuneOptions.short_context
        add("--short-context", type=float, default=share, help="share of steps that remember less")
        add("--lora", type=int, default=0, metavar="RANK", help="train low-rank updates only")


def configure_run(parser: argparse.ArgumentParser, out: Path, checkpoint_every: int) -> None:
    """Add the arguments of any training run: sizes, data, folder, processes."""
    add = parser.add_argument
    add("--preset", default="small", help="tiny, small or paper")
    add("--data", type=Path, default=Path("data/latents"), help="what `lmd data encode` wrote")
    add("--out", type=Path, default=out, help="folder of the run; goes on there")
    add("--batch", type=int, default=8, help="windows per step over all processes")
    add("--accumulate", type=int, default=1, help="parts that a process splits its rows into")
    add("--seed", type=int, default=0)
    add("--devices", type=int, default=1, help="processes on each machine")
    add("--num-nodes", type=int, default=1, help="machines (torchrun or SLURM)")
    add("--accelerator", choices=("auto", "cpu", "gpu"), default="auto")
    add("--precision", choices=("auto", "32", "bf16"), default="auto")
    add("--checkpointing", action="store_true", help="less memory, a third more compute")
    add("--checkpoint-every", type=int, default=checkpoint_every, help="steps")
    add("--no-progress", action="store_true")


def train_options(stage: Stage, args: argparse.Namespace) -> TrainOptions:
    """The run that the words describe.

    Raises:
        LmdError: see `check_words` and `check_parts`.
    """
    check_words(args)
    check_parts(args.batch, args.devices * args.num_nodes * args.accumulate)
    noise, distill = NoiseOptions(getattr(args, "noise", "uniform")), DistillOptions()
    if stage == "distill":
        distill = DistillOptions(
            args.teacher_steps,
            args.cfg_scale,
            args.points,
            points_on=args.points_on,
            loss_on=args.loss_on,
        )
    base = BaseOptions(text_dropout=args.text_dropout, noise=noise)
    finetune = FinetuneOptions(text_dropout=args.text_dropout, noise=noise)
    if stage == "finetune":
        finetune = dataclasses.replace(finetune, short_context=args.short_context)
    if stage == "base":
        base = dataclasses.replace(base, long_share=args.long_share)
    return TrainOptions(
        stage=stage,
        n_steps=args.steps,
        batch=args.batch,
        accumulate=args.accumulate,
        seed=args.seed,
        lr=args.lr,
        warmup_steps=args.warmup,
        ema=args.ema,
        checkpointing=args.checkpointing,
        base=base,
        finetune=finetune,
        distill=distill,
    )


def start_model(stage: Stage, sizes: Preset, init: Path | None, seed: int) -> LiveModel:
    """Fresh weights from the seed, or those of a file or of a foreign folder of the same sizes.

    A base that is to be fine-tuned gets its context door opened, see `init_context_projection`.

    Raises:
        LmdError: weights of another size; a base that is to be distilled.
    """
    torch.manual_seed(derive_seed(seed, "weights"))
    model = build_model(sizes)
    if init is None:
        return model
    if init.is_dir():
        foreign = load_foreign(init)
        check_sizes(foreign.config.dit, foreign.config.text, sizes, init)
        load_strict(model, foreign.model.state_dict(), str(init))
        opens = bool(foreign.fresh)
    else:
        opens = load_into(model, init, sizes, *MODEL_KINDS).kind == "base"
    if opens and stage == "distill":
        expected = "a live model, which continues context"
        raise LmdError(f"a base in {init}", expected, "Fine-tune it first: train finetune.")
    return init_context_projection(model) if opens and stage == "finetune" else model


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
    told = [
        f"text.{name} {found[name]}, not {wanted[name]}"
        for name in ("encoder", "n_tokens", "max_seconds")
        if found[name] != wanted[name]
    ]
    if not math.isclose(dit.rope_base, sizes.dit.rope_base, rel_tol=ROPE_TOLERANCE):
        told.append(f"rope_base {dit.rope_base:g}, not {sizes.dit.rope_base:g}")
    if told:
        raise LmdError(
            f"{path} with {'; '.join(told)}",
            f"weights for preset {sizes.name}",
            "Choose the preset that they were made for, or other weights.",
        )


def open_latents(folder: Path, sizes: Preset, seed: int) -> LatentSource:
    """Encoded latents of the preset's width.

    Raises:
        LmdError: no latents there, or those of another codec.
    """
    source = LatentSource(folder, seed)
    if source.shards.latent_dim != sizes.dit.latent_dim:
        raise LmdError(
            f"latents of {source.shards.latent_dim} channels in {folder}",
            f"{sizes.dit.latent_dim}, as preset {sizes.name} has",
            "Encode with that preset's codec, or choose the other preset.",
        )
    return source


def run_options(args: argparse.Namespace) -> RunOptions:
    """Where and on what."""
    return RunOptions(
        out=args.out,
        devices=args.devices,
        num_nodes=args.num_nodes,
        strategy=args.strategy,
        precision=args.precision,
        checkpoint_every=args.checkpoint_every,
        accelerator=args.accelerator,
        progress=not args.no_progress,
    )


def compiles() -> bool:
    """Whether a trial of `torch.compile` comes out here: compiler, headers, everything."""
    try:
        check_compiler()
        torch.compile(torch.sin)(torch.zeros(8))
    except (LmdError, RuntimeError):
        return False
    return True


def choose_compile(stage: Stage, args: argparse.Namespace, before: dict[str, Any]) -> bool:
    """Whether to compile: what the words say, else as the run was begun, else where it pays.

    It pays in a long run of the base, which has two window lengths. A fine-tune has dozens, and
    each would cost its start. Several processes and GPUs have not been tried: there the words
    decide.

    Raises:
        LmdError: it is asked for on a machine without a compiler.
    """
    if args.compile:
        check_compiler()
    if args.compile is not None or before:
        return before.get("compile", False) if args.compile is None else args.compile
    is_alone = args.devices * args.num_nodes == 1 and not torch.cuda.is_available()
    return stage == "base" and args.steps >= LONG_RUN and is_alone and compiles()


def choose_samples(args: argparse.Namespace, sizes: Preset, heard: str | None = None) -> int:
    """How often a run plays something: as told, else now and then if it can be heard; 0: never.

    Args:
        args: the command's words.
        sizes: the preset.
        heard: the encoder whose latents the run learns (`encoder_sha256`), where that is known.

    Raises:
        LmdError: sounds are asked for, and the codec is another than that of the latents.
    """
    every = args.sample_every
    if every == 0 or (every is None and not args.codec.is_file()):
        return 0
    fits = read_header(args.codec).config == sizes.codec
    fits = fits and (heard is None or heard == encoder_sha256(args.codec))
    if every and not fits:
        raise LmdError(
            f"{args.codec}, another codec than that of the latents",
            "the codec that they were encoded with",
            "Name it with --codec, or leave sounds out: --sample-every 0.",
        )
    return every or (SAMPLE_EVERY if fits else 0)


def describe_run(
    out: Path,
    options: Any,
    args: argparse.Namespace,
    data: LatentShards,
    compiled: bool = False,
) -> dict[str, Any]:
    """What the run is, to be written when it begins; compared with what it was begun as.

    Args:
        out: the run's folder.
        options: of the run.
        args: the command's words.
        data: the latents.
        compiled: see `choose_compile`.

    Returns:
        Among others `precision`: as the run was begun, where the words leave it open.

    Raises:
        LmdError: see `compare`.
    """
    before, width = begun_as(out), preset(args.preset).dit.width
    precision = args.precision if args.precision != "auto" else before.get("precision", "auto")
    known = {
        "preset": args.preset,
        "precision": choose_precision(precision, width, args.devices * args.num_nodes),
        "compile": compiled,
        "lora": getattr(args, "lora", 0),
        **started_from(args),
        "latents": {k: v for k, v in data.settings.items() if k != "silence"},
        **to_dict(options),
    }
    return compare(out, before, known)


def check_heard(args: argparse.Namespace, data: LatentShards) -> None:
    """Refuse weights that learned the latents of another encoder than these, where both are known.

    Raises:
        LmdError: names both encoders.
    """
    ours = data.settings.get("codec")
    for name, path in begun_with(args).items():
        theirs = codec_hash_of(read_header(path).notes) if path and path.is_file() else None
        if ours and theirs and ours != theirs:
            raise LmdError(
                f"--{name} {path}, which learned latents of the codec {theirs[:12]}",
                f"weights that learned those in {args.data}, of {ours[:12]}",
                "Encode with the codec of the weights (data encode --codec), or train from the "
                "base on: latents of two codecs have nothing in common.",
            )


def started_from(args: argparse.Namespace) -> dict[str, str | None]:
    """What a run is begun with, by option: SHA-256 of the weights in a file, or a folder's name."""
    found: dict[str, str | None] = {}
    for name, path in begun_with(args).items():
        begun = str(path) if path else None
        found[f"{name}_from"] = read_header(path).sha256 if path and path.is_file() else begun
    return found


def begun_with(args: argparse.Namespace) -> dict[str, Path | None]:
    """The weights that a stage may begin with, by option; None: none are."""
    return {name: getattr(args, name) for name in ("init", "base") if hasattr(args, name)}


def command_of(stage: str, args: argparse.Namespace, parser: argparse.ArgumentParser) -> str:
    """The command that gives these arguments, the parser's defaults left out."""
    words = ["python", "-m", "lmd", "train", stage]
    for name, value in vars(args).items():
        if value != parser.get_default(name):
            flag = f"{'no-' if value is False else ''}{name.replace('_', '-')}"
            words += [f"--{flag}"] + ([] if isinstance(value, bool) else [str(value)])
    return shlex.join(words)


def notes_of(command: str, args: argparse.Namespace, data: LatentShards) -> dict[str, Any]:
    """What a weights file says about its making."""
    mixes = [e.duration_s for e in data.entries if e.split == "train" and e.voice < 0]
    return {
        "command": command,
        "seed": args.seed,
        "data": {
            "hours": round(sum(mixes) / 3600, 2),
            "renditions": len(mixes),
            "latent_settings": {k: v for k, v in data.settings.items() if k != "silence"},
        },
        "hardware": machine_dict(),
    }


def compile_all(model: LiveModel) -> None:
    """Compile at every length; else which steps run compiled would depend on where a run began."""
    limits = torch._dynamo.config
    limits.recompile_limit = limits.accumulated_recompile_limit
    model.dit.compile_blocks()


def origin_of(path: Path) -> dict[str, Any]:
    """What a weights file says of the file that it was begun with."""
    header = read_header(path)
    return {"file": path.name, "sha256": header.sha256, "command": header.notes.get("command")}


def train(stage: Stage, args: argparse.Namespace) -> int:
    """Train, export, describe.

    Raises:
        LmdError: bad options, data or weights; a loss that is not finite.
    """
    tune_allocator()
    options, run, sizes = train_options(stage, args), run_options(args), preset(args.preset)
    source = open_latents(args.data, sizes, args.seed)
    check_heard(args, source.shards)
    compiled = choose_compile(stage, args, begun_as(run.out))
    described = describe_run(run.out, options, args, source.shards, compiled)
    run = dataclasses.replace(run, precision=described["precision"])
    sample_every = choose_samples(args, sizes, source.shards.settings.get("codec"))
    model = start_model(stage, sizes, args.init, args.seed)
    if getattr(args, "lora", 0):
        model = add_lora(model, args.lora)
    text = build_text_encoder(sizes.text)
    module = LiveTraining(model, text, source, sizes, options)
    if compiled:
        compile_all(model)
    parser = argparse.ArgumentParser()
    configure(parser, stage)
    notes = notes_of(command_of(stage, args, parser), args, source.shards)
    if args.init is not None and args.init.is_file():
        notes["init"] = origin_of(args.init)
    path = run.out / ("base.safetensors" if stage == "base" else "finetuned.safetensors")
    export = Export(path, run.checkpoint_every, sizes, notes)
    callbacks: list[Callback] = [NoteOptions(run.out, described), export]
    if sample_every:
        callbacks.append(Samples(run.out / "samples", sample_every, args.codec))
    start = time.time()
    trainer = fit(module, run, callbacks)
    export.export(trainer, module)  # a run that was complete before has not done it now
    if trainer.is_global_zero:
        card = model_card(run.out, path, options)
        write_atomic(path.with_suffix(".md"), card.encode())
        print(f"{path} after {trainer.global_step} steps, {time.time() - start:.0f} s")
    return 0
