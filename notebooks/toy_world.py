"""A world with a known answer: rotating phases with noise, and a small model that drifts in it.

Each "sound" is two complex numbers that turn at speeds named by a prompt while noise pulls them
about: z' = r e^(iw) z + sqrt(1 - r^2) noise. Every block has the same Gaussian distribution, known
in closed form, so the distance of what a model plays from what it should play needs no reference
set. A model that was fine-tuned for a short while loses the loudness of the world block by block;
ARC-Forcing teaches it to correct its own mistakes:

    python notebooks/toy_world.py --seeds 3 --out outputs/toy_world

Taught in notebook 03_arc_forcing.
"""

import argparse
import copy
import json
import math
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm

from lmd.arc.discriminator import Discriminator, HeadConfig
from lmd.arc.losses import (
    GanLoss,
    Prompts,
    RolloutPlan,
    derangement,
    discriminator_loss,
    frozen,
    generator_loss,
    rollout,
)
from lmd.arc.module import Network, make_pair, plan_update
from lmd.arc.options import ArcRun
from lmd.config import DiTConfig, to_dict
from lmd.evaluation.metrics import Gaussian, frechet, gaussian
from lmd.model.live_model import LiveModel
from lmd.rng import derive_seed, generator, normal
from lmd.shapes import Latents
from lmd.stream.block import BlockPlan, LiveDenoiser
from lmd.training.draws import BatchIndices, StepPlan
from lmd.training.losses import flow_loss, outpaint_loss

SPEEDS = torch.tensor([[0.3, 0.9], [0.5, -0.6], [-0.4, 0.7], [0.8, 0.2]])  # radians per frame
MEMORY = 0.97  # r: what is left of a frame in the next one
CONTEXT, BLOCK = 8, 4  # frames
SECONDS = 5.0  # the length that models are conditioned on; it means nothing here
SIZES = DiTConfig(
    latent_dim=4, width=32, depth=2, n_heads=2, text_dim=8, global_dim=8, timestep_features=32
)


@dataclass(frozen=True)
class ToySettings:
    """One experiment: three trainings, each in seconds."""

    n_base: int = 900  # steps of the bidirectional base, at the rollout's length
    n_finetune: int = 1200  # steps of the live model
    n_updates: int = 340  # of ARC-Forcing, both networks
    n_warmup: int = 80  # of these, first, for the discriminator alone
    batch: int = 16
    n_blocks: int = 6  # of a rollout
    n_steps: int = 4  # calls per block, in training and in play
    plays_out: bool = False  # whether blocks of a rollout are walked to their end
    lr_generator: float = 2e-4
    lr_discriminator: float = 2e-3
    contrastive: float = 1.0
    smoothness: float = 0.015  # weight of R1 and R2
    ema: float = 0.98
    n_streams: int = 256  # played to measure
    n_played: int = 20  # blocks

    @property
    def arc(self) -> ArcRun:
        """The same in the words of the real stage."""
        return ArcRun(
            n_updates=self.n_updates,
            context_frames=CONTEXT,
            window_frames=CONTEXT + BLOCK,
            frame_rate_hz=(CONTEXT + BLOCK) / SECONDS,
            regimes="block-causal",
            block_frames=str(BLOCK),
            blocks=str(self.n_blocks),
            steps=str(self.n_steps),
            plays_out=self.plays_out,
            from_silence=0.0,
            context_dropout_part=0.0,
            text_dropout=0.0,
            log_snr=(-4.0, 3.0),
            contrastive=self.contrastive,
            r1=self.smoothness,
            r2=self.smoothness,
            warmup=self.n_warmup,
            last_block="blocks.1",
        )


HEAD = HeadConfig((32, 32, 48, 64), n_blocks=0)  # of the discriminator
SHORT = ToySettings(n_updates=250)  # enough to halve the drift


@dataclass(frozen=True)
class Sounds:
    """Samples of the world: unit variance per channel, and which prompt each was made under."""

    latents: Latents
    kinds: Tensor  # [batch], row of SPEEDS

    @property
    def asked(self) -> Prompts:
        """The prompts as the models take them."""
        return ask(self.kinds)


def ask(kinds: Tensor) -> Prompts:
    """Prompt embeddings of kinds: one fixed random token each."""
    prompts = normal((len(SPEEDS), 1, SIZES.text_dim), 0, "toy prompt")
    return Prompts(prompts[kinds], torch.zeros(len(kinds), dtype=torch.bool))


def world(n_sounds: int, n_frames: int, g: torch.Generator) -> Sounds:
    """Draw from the world: `[n_sounds, 4, n_frames]`, real parts first."""
    kinds = torch.randint(len(SPEEDS), (n_sounds,), generator=g)
    noise = torch.randn(n_sounds, 2, 2, n_frames, generator=g)
    level = [noise[..., 0]]
    for frame in range(1, n_frames):
        level.append(MEMORY * level[-1] + math.sqrt(1 - MEMORY**2) * noise[..., frame])
    real, imag = torch.stack(level, dim=-1).unbind(1)
    angle = SPEEDS[kinds][:, :, None] * torch.arange(n_frames)
    turned = (
        real * angle.cos() - imag * angle.sin(),
        real * angle.sin() + imag * angle.cos(),
    )
    return Sounds(torch.cat(turned, dim=1), kinds)


def distribution(n_frames: int) -> Gaussian:
    """The exact one of a channel over some frames, with the turning undone: r^|i - j|."""
    frame = np.arange(n_frames)
    return Gaussian(np.zeros(n_frames), MEMORY ** np.abs(frame[:, None] - frame[None, :]))


def still(sounds: Sounds) -> Latents:
    """Undo the turning: every channel of every sound then has the same distribution."""
    angle = SPEEDS[sounds.kinds][:, :, None] * torch.arange(sounds.latents.shape[-1])
    real, imag = sounds.latents.chunk(2, dim=1)
    turned = (real * angle.cos() + imag * angle.sin(), imag * angle.cos() - real * angle.sin())
    return torch.cat(turned, dim=1)


def drift(sounds: Sounds) -> list[float]:
    """Distance of every block after the context from what it should be.

    The Wasserstein distance (root of the Fréchet distance) between the fitted Gaussian of each
    block with the block before it, so that boundaries and speeds count too, and the exact one.
    """
    rest, distances = still(sounds), []
    for start in range(CONTEXT, rest.shape[-1], BLOCK):
        window = rest[..., start - BLOCK : start + BLOCK].flatten(0, 1)
        distances.append(math.sqrt(frechet(gaussian(window.numpy()), distribution(2 * BLOCK))))
    return distances


@torch.no_grad()
def play(model: LiveModel, settings: ToySettings, seed: int, n_steps: int = 0) -> Sounds:
    """Let a model continue real contexts for `settings.n_played` blocks."""
    start = world(settings.n_streams, CONTEXT, generator(seed, "toy play"))
    n_steps = n_steps or settings.n_steps
    seeds = tuple(derive_seed(seed, "toy stream", i) for i in range(settings.n_streams))
    plan = RolloutPlan(
        BlockPlan("block-causal", BLOCK), n_steps, (n_steps,) * settings.n_played, seeds
    )
    condition = start.asked.for_model(model, SECONDS)
    played = rollout(LiveDenoiser(model), start.latents, condition, plan, with_grad=False)
    return Sounds(played, start.kinds)


def teach(
    model: LiveModel,
    n_steps: int,
    n_frames: int,
    seed: int,
    block: bool,
    lr: float = 2e-3,
    batch: int = 16,
) -> LiveModel:
    """Stage 1 in this world: the base (every frame), or the live model (a block after context)."""
    adam = torch.optim.AdamW(model.parameters(), lr, weight_decay=0.0, fused=True)
    rate = torch.optim.lr_scheduler.LambdaLR(adam, lambda k: min(1.0, 2 - 2 * k / n_steps))
    plan = StepPlan("block-causal", n_frames, BLOCK)
    for step in range(n_steps):
        g = generator(seed, "toy step", int(block), step)
        sounds = world(batch, n_frames, g)
        t, noise = torch.rand(batch, generator=g), torch.randn(sounds.latents.shape, generator=g)
        condition = sounds.asked.for_model(model, SECONDS)
        if block:
            losses = outpaint_loss(model, sounds.latents, noise, t, condition, plan)
        else:
            losses = flow_loss(model, sounds.latents, noise, t, condition)
        descend(adam, losses.mean(), model)
        rate.step()
    return model


def descend(adam: torch.optim.Optimizer, loss: Tensor, model: nn.Module) -> None:
    """One clipped step."""
    adam.zero_grad()
    loss.backward()
    nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    adam.step()


def prepare(settings: ToySettings, seed: int) -> tuple[LiveModel, LiveModel]:
    """A base at the rollout's length, and the live model made from it.

    Copies: experiments that differ in ARC-Forcing alone begin with the same two, taught once.
    """
    taught = _taught(settings.n_base, settings.n_finetune, settings.n_blocks, seed)
    return copy.deepcopy(taught)


@lru_cache(maxsize=4)
def _taught(n_base: int, n_finetune: int, n_blocks: int, seed: int) -> tuple[LiveModel, LiveModel]:
    torch.manual_seed(derive_seed(seed, "toy weights"))
    base = teach(LiveModel(SIZES), n_base, CONTEXT + n_blocks * BLOCK, seed, block=False)
    live = teach(copy.deepcopy(base), n_finetune, CONTEXT + BLOCK, seed, block=True, lr=1e-3)
    return base, live


def arc_updates(
    live: LiveModel,
    average: LiveModel,
    discriminator: Discriminator,
    settings: ToySettings,
    seed: int,
) -> Iterator[tuple[int, Network, GanLoss]]:
    """ARC-Forcing in this world; yields update, whose turn it was, loss.

    Args:
        live: learns.
        average: a copy of it, which follows slowly; the one to play afterwards.
        discriminator: learns.
        settings: of the experiment.
        seed: of everything random.
    """
    options = settings.arc
    betas = (0.0, 0.95)  # without momentum the two chase each other less
    adams = {
        "generator": torch.optim.AdamW(live.parameters(), settings.lr_generator, betas, fused=True),
        "discriminator": torch.optim.AdamW(
            discriminator.parameters(), settings.lr_discriminator, betas, fused=True
        ),
    }
    for update in range(settings.n_updates):
        plan = plan_update(options, seed, update)
        g = generator(seed, "toy arc", update)
        sounds = world(settings.batch, plan.n_frames, g)
        wrong = ask(sounds.kinds[derangement(settings.batch, g)])
        rows = BatchIndices(seed, update, tuple(range(settings.batch)), settings.batch)
        pair = make_pair(live, sounds.latents, sounds.asked, wrong, rows, plan, options)
        if plan.trains == "generator":
            with frozen(discriminator):
                loss = generator_loss(discriminator, pair)
                descend(adams["generator"], loss.loss, live)
            with torch.no_grad():
                for slow, fast in zip(average.parameters(), live.parameters(), strict=True):
                    slow.lerp_(fast, 1 - settings.ema)
        else:
            loss = discriminator_loss(
                discriminator, pair, options.contrastive, options.r1, options.r2
            )
            descend(adams["discriminator"], loss.loss, discriminator)
        yield update, plan.trains, loss


def make_discriminator(base: LiveModel, settings: ToySettings, seed: int) -> Discriminator:
    """The base's trunk with a fresh head."""
    torch.manual_seed(derive_seed(seed, "toy head"))
    return Discriminator(base, settings.arc.last_block, HEAD)


def experiment(seed: int, settings: ToySettings, progress: bool = False) -> dict[str, Any]:
    """Everything once: drift of the fine-tuned model, of the same after ARC-Forcing, of the world.

    Returns:
        JSON-ready: distances per block, their ratio at the last block, curves, seconds.
    """
    began = time.perf_counter()
    base, live = prepare(settings, seed)
    before = drift(play(live, settings, seed))
    prepared = time.perf_counter()
    curves: dict[str, list[float]] = {"accuracy": [], "generator": [], "discriminator": []}
    average = copy.deepcopy(live)
    discriminator = make_discriminator(base, settings, seed)
    updates = arc_updates(live, average, discriminator, settings, seed)
    bar = tqdm(updates, f"seed {seed}", settings.n_updates, disable=not progress)
    for _, trains, loss in bar:
        curves["accuracy"].append(loss.accuracy.item())
        curves[trains].append(loss.pair.item())
    after = drift(play(average, settings, seed))
    n_frames = CONTEXT + settings.n_played * BLOCK
    real = world(settings.n_streams, n_frames, generator(seed, "toy real"))
    return {
        "seed": seed,
        "before": before,
        "after": after,
        "world": drift(real),
        "factor": before[-1] / after[-1],
        "curves": curves,
        "prepare_s": prepared - began,
        "arc_s": time.perf_counter() - prepared,
    }


def draw(results: list[dict[str, Any]], path: Path) -> None:
    """Distances over blocks, all seeds, as a PNG."""
    from lmd.show import plot_losses

    named = {
        f"{name}, seed {result['seed']}": result[key]
        for result in results
        for key, name in (("before", "fine-tuned"), ("after", "after ARC"), ("world", "the world"))
    }
    ax = plot_losses(named)
    ax.legend(frameon=False, loc="center left", bbox_to_anchor=(1, 0.5))
    ax.set(xlabel="block", ylabel="distance from the exact distribution", ylim=(0, None))
    ax.figure.savefig(path, dpi=100)


def main(words: list[str] | None = None) -> int:
    """Run the seeds, write `toy_world.json` and `toy_world.png`, print a line per seed."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--short", action="store_true", help="fewer updates: minutes a seed")
    parser.add_argument("--out", type=Path, default=Path("outputs/toy_world"))
    args = parser.parse_args(words)
    settings, results = SHORT if args.short else ToySettings(), []
    args.out.mkdir(parents=True, exist_ok=True)
    for seed in range(args.seeds):
        results.append(experiment(seed, settings, progress=True))
        result = results[-1]
        print(
            f"seed {seed}: distance at block {settings.n_played} {result['before'][-1]:.3f} -> "
            f"{result['after'][-1]:.3f}, {result['factor']:.1f} times less; the world itself, "
            f"measured alike, {result['world'][-1]:.3f}"
        )
    report = {"settings": to_dict(settings), "results": results}
    (args.out / "toy_world.json").write_text(json.dumps(report, indent=1) + "\n")
    draw(results, args.out / "toy_world.png")
    return 0


if __name__ == "__main__":
    sys.exit(main())
