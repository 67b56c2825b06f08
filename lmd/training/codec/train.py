"""Train the spectral codec: `python -m lmd train codec`; measure one: `--evaluate FILE`."""

import argparse
import hashlib
import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, cast

import lightning as L
import torch
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from tqdm import tqdm

from lmd.checkpoint import load_codec, read_header, save_checkpoint, write_atomic
from lmd.codec.spectral import SpectralCodec, decode_in_panels
from lmd.config import SpectralCodecConfig, preset, to_dict
from lmd.corpus.manifest import Corpus
from lmd.errors import LmdError
from lmd.machine import machine_dict, pick_device, tune_allocator
from lmd.rng import derive_seed
from lmd.training.begun import NoteOptions, begun_as, compare
from lmd.training.codec.card import codec_card
from lmd.training.codec.losses import WINDOWS
from lmd.training.codec.metrics import evaluate, markdown_table
from lmd.training.codec.module import CodecPlan, CodecTraining, CodecWindows, start_from_components
from lmd.training.limits import check_words
from lmd.training.trainer import AtomicCheckpointIO

Precision = Literal["32-true", "bf16-mixed"]
LAST = "last.ckpt"


class Keep(Callback):
    """Progress, checkpoints and exported weights; stops the run at its last step."""

    def __init__(
        self, out: Path, every: int, notes: dict[str, Any], stop_at: int | None = None
    ) -> None:
        self.out, self.every, self.notes, self.stop_at = out, every, notes, stop_at
        self.bar: tqdm | None = None
        self.earlier_s, self.began_s = 0.0, time.monotonic()

    @property
    def wall_s(self) -> float:
        """Seconds spent, all starts of the run together."""
        return self.earlier_s + time.monotonic() - self.began_s

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint keeps of this: the time spent."""
        return {"wall_s": self.wall_s}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Count on from there."""
        self.earlier_s = state_dict["wall_s"]

    def on_train_start(self, trainer: L.Trainer, module: CodecTraining) -> None:
        """Open the progress bar where the run stands; a run that is complete stops here."""
        self.bar = tqdm(
            total=module.plan.steps, initial=int(module.step), desc="codec", mininterval=5
        )
        trainer.should_stop = int(module.step) >= module.plan.steps

    def on_train_batch_end(self, trainer: L.Trainer, module: CodecTraining, *args: Any) -> None:
        """Count; save now and then."""
        step = int(module.step)
        losses = {name: f"{value:.3g}" for name, value in module.latest.items()}
        self.bar.update()
        self.bar.set_postfix(losses, refresh=False)
        last = step in (module.plan.steps, self.stop_at)
        trainer.should_stop = last
        if step % self.every == 0 or last:
            trainer.save_checkpoint(self.out / LAST)
            self.export(module)

    def on_train_end(self, trainer: L.Trainer, module: CodecTraining) -> None:
        """Close the progress bar."""
        self.bar.close()

    def export(self, module: CodecTraining) -> None:
        """The codec as float16 safetensors."""
        save_checkpoint(
            self.out / "codec.safetensors",
            module.codec.state_dict(),
            kind="codec",
            config=module.codec.config,
            notes={
                **self.notes,
                "steps": int(module.step),
                "plan": module.plan.__dict__,
                "wall_s": round(self.wall_s),
            },
            stored="float16",
        )


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the command's arguments."""
    add = parser.add_argument
    add("--preset", default="small", help="tiny or small")
    add("--data", type=Path, default=Path("data/corpus"), help="a built corpus")
    add("--out", type=Path, default=Path("outputs/codec"), help="logs, checkpoint, weights")
    add("--steps", type=int, default=20_000, help="in all; a run that stopped goes on")
    add("--encoder-steps", type=int, default=2000, help="of these, the first train the encoder")
    add("--encoder", type=Path, help="take encoder and decoder from this file; encoder fixed")
    add("--adversarial-from", type=int, help="step; default: half of what follows the encoder")
    add("--batch", type=int, default=12, help="windows a step")
    add("--frames", type=int, default=32, help="latent frames a window")
    add("--learning-rate", type=float, default=1e-3)
    add("--noise", type=float, default=0.25, help="added to latents of unit scale")
    add("--seed", type=int, default=0)
    add("--precision", choices=("32-true", "bf16-mixed"), default="32-true")
    add("--device", default="auto")
    add("--threads", type=int, help="CPU threads")
    add("--checkpoint-every", type=int, default=200, help="steps")
    add("--evaluate", type=Path, metavar="FILE", help="measure this codec instead of training")
    add("--json", type=Path, help="where the measures go")
    add("--card", type=Path, help="where a model card with them goes")
    add("--learner", type=Path, metavar="RUN", help="for the card: a base's run on its latents")
    add("--hours", type=float, default=0.5, help="held-out music to measure on")


def main(args: argparse.Namespace) -> int:
    """Train, or measure.

    Raises:
        LmdError: numbers out of their limits, a plan or a corpus that does not fit, a run that was
            begun with other options.
    """
    check_words(args)
    tune_allocator()
    if args.threads:
        torch.set_num_threads(args.threads)
    if args.evaluate:
        return measure(args)
    module = build(args)
    described = compare(args.out, begun_as(args.out), describe_run(args, module))
    trainer = build_trainer(args, callbacks=[NoteOptions(args.out, described)])
    last = args.out / LAST
    trainer.fit(module, ckpt_path=last if last.exists() else None, weights_only=False)
    print(f"{int(module.step)} steps; weights in {args.out / 'codec.safetensors'}")
    return 0


def describe_run(args: argparse.Namespace, module: CodecTraining) -> dict[str, Any]:
    """What the run is: plan, sizes, what it learns from and starts from."""
    sounds = "\n".join(row.sha256 for row in module.windows.corpus.rows)
    return {
        "preset": args.preset,
        "precision": args.precision,
        "encoder_from": read_header(args.encoder).sha256 if args.encoder else None,
        "corpus": hashlib.sha256(sounds.encode()).hexdigest(),
        **to_dict(module.plan),
    }


def measure(args: argparse.Namespace) -> int:
    """Measure a codec, laid out as instruments play it, on held-out pieces.

    Prints a table, writes figures and model card.
    """
    header, corpus = read_header(args.evaluate), Corpus(args.data, "test")
    codec = load_codec(args.evaluate)
    decode_in_panels(codec)
    result = evaluate(codec, corpus, args.hours)
    result |= {"sha256": header.sha256, "data": args.data.name, "machine": machine_dict()}
    result["hours"] = corpus.settings().get("hours")
    print(markdown_table(result))
    if args.json:
        write_atomic(args.json, (json.dumps(result, indent=1) + "\n").encode())
    if args.card:
        card = codec_card(args.evaluate, result, args.learner)
        write_atomic(args.card, card.encode())
    return 0


def build(args: argparse.Namespace) -> CodecTraining:
    """The module of a run, ready to start or to go on.

    One that goes on keeps the step from which its discriminator joins in, unless the words name it.

    Raises:
        LmdError: a preset without a spectral codec; a plan that does not add up.
    """
    config = preset(args.preset).codec
    if not isinstance(config, SpectralCodecConfig):
        raise LmdError(f"preset {args.preset!r}", "tiny or small", "It has no spectral codec.")
    encoder_steps = 0 if args.encoder else args.encoder_steps
    if encoder_steps >= args.steps:
        raise LmdError(
            f"--encoder-steps {encoder_steps} of --steps {args.steps}",
            "fewer: the decoder is trained in those that follow",
            "Change one of them.",
        )
    half = encoder_steps + (args.steps - encoder_steps) // 2
    begun = begun_as(args.out).get("adversarial_from", half)
    adversarial_from = begun if args.adversarial_from is None else args.adversarial_from
    plan = CodecPlan(
        steps=args.steps,
        encoder_steps=encoder_steps,
        adversarial_from=adversarial_from,
        batch=args.batch,
        frames=args.frames,
        learning_rate=args.learning_rate,
        noise=args.noise,
        seed=args.seed,
    )
    judged = plan.frames * config.samples_per_frame - config.n_fft  # samples without the edges
    if adversarial_from < args.steps and judged < max(WINDOWS):
        fewest = -(-(max(WINDOWS) + config.n_fft) // config.samples_per_frame)
        raise LmdError(
            f"--frames {args.frames} for a discriminator with windows of {max(WINDOWS)} samples",
            f"{fewest} or more",
            "Raise --frames, or do without it: --adversarial-from as --steps.",
        )
    windows = CodecWindows(Corpus(args.data, "train"), config, plan)
    torch.manual_seed(derive_seed(plan.seed, "codec weights"))
    if args.encoder:
        codec = cast(SpectralCodec, load_codec(args.encoder))
        if codec.config != config:
            raise LmdError(
                f"{args.encoder} of other sizes", f"those of preset {args.preset}", "Use another."
            )
    else:
        codec = SpectralCodec(config)
        if not (args.out / LAST).exists():
            start_from_components(codec, windows)
    return CodecTraining(codec, plan, windows)


def build_trainer(
    args: argparse.Namespace, stop_at: int | None = None, callbacks: Sequence[Callback] = ()
) -> L.Trainer:
    """Lightning's Trainer: logs, precision, atomic checkpoints.

    Args:
        args: the command's.
        stop_at: stop after this step, as an interrupted run would, its plan unchanged.
        callbacks: what else happens on the way.
    """
    device = pick_device(args.device)
    n_runs = len(list((args.out / "logs").glob("run-*")))
    logs = {"save_dir": args.out, "name": "logs", "version": f"run-{n_runs:03d}"}
    corpus = Corpus(args.data, "train")
    notes = {
        "data": {
            "name": args.data.name,
            "renditions": len(corpus),
            "hours": round(corpus.duration_s / 3600, 2),
            "settings": corpus.settings(),
        },
        "encoder_from": args.encoder.name if args.encoder else "",
        "machine": machine_dict(),
    }
    return L.Trainer(
        accelerator={"cuda": "gpu"}.get(device.type, device.type),
        devices=1,
        precision=cast(Precision, args.precision),
        max_epochs=-1,  # `Keep` stops it
        logger=[CSVLogger(**logs, flush_logs_every_n_steps=10), TensorBoardLogger(**logs)],
        log_every_n_steps=1,
        callbacks=[Keep(args.out, args.checkpoint_every, notes, stop_at), *callbacks],
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=False,
        plugins=[AtomicCheckpointIO()],
    )
