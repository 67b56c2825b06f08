"""`lmd train arc`: adversarial post-training of a live model on its own rollouts.

    python -m lmd train arc --init data/pretrained/finetuned.safetensors \
        --base data/pretrained/base.safetensors --data data/latents --out runs/arc

The base becomes the discriminator; train it at the rollout's length first (`train base` does).
"""

from collections.abc import Sequence
from dataclasses import replace

import torch
from lightning.pytorch.callbacks import Callback

from lmd.arc.card import arc_card
from lmd.arc.discriminator import Discriminator, HeadConfig
from lmd.arc.module import ArcTraining
from lmd.arc.options import ArcRun
from lmd.config import preset
from lmd.model.text import build_text_encoder
from lmd.rng import derive_seed
from lmd.training.run import load_start, open_run

Options = ArcRun  # the flags


def main(options: ArcRun, callbacks: Sequence[Callback] = ()) -> int:
    """Train, export, describe.

    Raises:
        LmdError: bad options, data or weights; a loss that is not finite.
    """
    sizes = preset(options.preset)
    frames = {"frame_rate_hz": sizes.frame_rate_hz, "window_frames": sizes.window.window_frames}
    options = replace(options, context_frames=sizes.window.context_frames, **frames)
    source, folder = open_run(options, "arc")
    options = folder.options

    base, _ = load_start(options.discriminator, sizes, "base")
    torch.manual_seed(derive_seed(options.seed, "score head"))
    head = HeadConfig.of(sizes.dit.width)
    discriminator = Discriminator(base, options.last_block, head)
    generator, _ = load_start(options.init, sizes, "finetuned", "arc")
    text = build_text_encoder(sizes.text)
    module = ArcTraining(generator, discriminator, text, source, options)
    folder.train(module, callbacks, arc_card)
    return 0
