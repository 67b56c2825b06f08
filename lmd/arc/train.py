"""`lmd train arc`: adversarial post-training of a live model on its own rollouts.

    python -m lmd train arc --init data/pretrained/finetuned.safetensors \
        --base data/pretrained/base.safetensors --data data/latents --out runs/arc

The base becomes the discriminator; train it at the rollout's length first (`train base` does).
"""

from collections.abc import Sequence

import torch
from lightning.pytorch.callbacks import Callback

from lmd.arc.card import arc_card
from lmd.arc.discriminator import Discriminator
from lmd.arc.module import ArcTraining
from lmd.arc.options import ArcRun
from lmd.config import Preset
from lmd.model.text import build_text_encoder
from lmd.rng import derive_seed
from lmd.training.run import load_start, open_run
from lmd.training.windows import WindowSource

Options = ArcRun  # the flags


def main(options: ArcRun, callbacks: Sequence[Callback] = ()) -> int:
    """Train, export, describe.

    Raises:
        LmdError: bad options, data or weights; a loss that is not finite.
    """
    run = open_run(options.resolved())
    module = build_module(run.options, run.source, run.sizes)
    run.fit(module, "arc", "arc", arc_card, callbacks)
    return 0


def build_module(run: ArcRun, source: WindowSource, sizes: Preset) -> ArcTraining:
    """Both networks from their files."""
    base, _ = load_start(run.discriminator, sizes, "base")
    torch.manual_seed(derive_seed(run.seed, "score head"))
    discriminator = Discriminator(base, run.arc.last_block, run.arc.head)
    generator, _ = load_start(run.init, sizes, "finetuned", "arc")
    return ArcTraining(generator, discriminator, build_text_encoder(sizes.text), source, run)
