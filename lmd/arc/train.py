"""`lmd train arc`: adversarial post-training of a live model on its own rollouts.

    python -m lmd train arc --init data/pretrained/finetuned.safetensors \
        --base data/pretrained/base.safetensors --data data/latents --out runs/arc

The base becomes the discriminator; train it at the rollout's length first (`train base` does).
"""

import time
from collections.abc import Sequence
from pathlib import Path

import torch
from lightning.pytorch.callbacks import Callback

from lmd.arc.card import arc_card, cost_table
from lmd.arc.discriminator import Discriminator
from lmd.arc.module import ArcTraining
from lmd.arc.options import ArcRun, Options
from lmd.checkpoint import build_model
from lmd.config import Preset, preset
from lmd.machine import tune_allocator
from lmd.model.live_model import LiveModel
from lmd.model.text import build_text_encoder
from lmd.outputs import write_atomic
from lmd.rng import derive_seed
from lmd.training.record import RunRecord, matching_codec
from lmd.training.run import known_of, load_into, notes_of, open_run
from lmd.training.trainer import Export, fit
from lmd.training.windows import WindowSource

__all__ = ["Options", "main"]


def main(options: Options, callbacks: Sequence[Callback] = ()) -> int:
    """Train; returns 0 when the weights are written.

    Args:
        options: the command's.
        callbacks: what else happens on the way.

    Raises:
        LmdError: bad options, data or weights; a loss that is not finite.
    """
    tune_allocator()
    options, source = open_run(options)
    options, sizes = options.resolved(), preset(options.preset)
    module = build_module(options, source, sizes)
    codec = matching_codec(options, source.shards.settings.get("codec"))
    record = RunRecord(options, known_of(options, source.shards), codec)
    notes = notes_of("arc", options, source.shards)
    export = Export(options.out / "arc.safetensors", sizes, notes)
    start = time.time()
    trainer = fit(module, [record, export, *callbacks])
    export.export(trainer, module)  # a run that was complete before has not done it now
    if trainer.is_global_zero:
        card = arc_card(options.out, export.path, options.arc)
        write_atomic(options.out / "arc.md", card.encode())
        print(cost_table(options.out))
        print(f"{export.path} after {trainer.global_step} updates, {time.time() - start:.0f} s")
    return 0


def build_module(run: ArcRun, source: WindowSource, sizes: Preset) -> ArcTraining:
    """Both networks from their files.

    Raises:
        LmdError: files that are missing, of another kind or size.
    """
    base = load_start(run.discriminator, sizes, "base")
    torch.manual_seed(derive_seed(run.seed, "score head"))
    discriminator = Discriminator(base, run.arc.last_block, run.arc.head)
    generator = load_start(run.init, sizes, "finetuned", "arc")
    return ArcTraining(generator, discriminator, build_text_encoder(sizes.text), source, run)


def load_start(path: Path, sizes: Preset, *kinds: str) -> LiveModel:
    """A model to start from, of one of these kinds and of exactly these sizes."""
    model = build_model(sizes)
    load_into(model, path, sizes, *kinds)
    return model
