"""Sounds and pictures of a run, every so often: what the averaged weights play at that step."""

from pathlib import Path
from typing import Any

import lightning as L
import soundfile
import torch
from lightning.pytorch.callbacks import Callback

from lmd.checkpoint import build_model, load_codec
from lmd.codec.base import Codec
from lmd.model.live_model import LiveModel
from lmd.model.weights import load_strict
from lmd.rng import normal
from lmd.shapes import Latents, Wave
from lmd.stream.controls import Controls
from lmd.stream.samplers import Guidance, dpmpp_2m, schedule
from lmd.stream.streamer import Streamer
from lmd.training.module import LiveTraining

N_STEPS = 16  # of the sampler
STREAM_BLOCKS = 5


def averaged_model(module: LiveTraining) -> LiveModel:
    """A whole copy of a run's averaged weights on the CPU; every process has to ask for it."""
    model = build_model(module.preset)
    load_strict(model, module.exported(), "the averaged weights")
    return model.eval()


@torch.no_grad()
def play_module(
    module: LiveTraining, model: LiveModel, codec: Codec, prompt: str, seed: int
) -> Wave:
    """What a run's averaged weights play: a window of the base, or a stream from silence."""
    preset = module.preset
    if module.options.stage != "base":
        streamer = Streamer(model, codec, module.text, preset.window)
        blocks = streamer.stream(Controls(prompt=prompt, seed=seed), n_blocks=STREAM_BLOCKS)
        return torch.cat([block.wave for block in blocks], dim=-1)
    n_frames = module.options.base.window_frames
    condition = model.condition(module.text.encode([prompt]), n_frames / preset.frame_rate_hz)

    def velocities(noisy: Latents, t: float) -> Guidance:
        return Guidance(model(noisy, torch.full((1,), t), condition))

    noise = normal((1, model.config.latent_dim, n_frames), seed, "sample")
    return codec.decode(dpmpp_2m(velocities, noise, schedule(N_STEPS)))


class Samples(Callback):
    """Write `samples/step-….wav` and `.png` every `every` steps, from one fixed prompt."""

    def __init__(self, every: int, codec: Path) -> None:
        self.every, self.codec, self.done = every, load_codec(codec), 0

    def on_train_batch_end(self, trainer: L.Trainer, module: LiveTraining, *args: Any) -> None:
        """The first process plays."""
        step = trainer.global_step
        if step == self.done or step % self.every:
            return
        self.done, model = step, averaged_model(module)
        if not trainer.is_global_zero:
            return
        prompt = module.source.windows(0, [0], module.options.base.window_frames).prompts[0]
        wave = play_module(module, model, self.codec, prompt, module.options.seed)
        path = module.options.out / "samples" / f"step-{step:07d}.wav"
        path.parent.mkdir(parents=True, exist_ok=True)
        soundfile.write(path, wave[0].T.clamp(-1, 1).numpy(), self.codec.sample_rate)
        picture(wave, self.codec.sample_rate, path.with_suffix(".png"), prompt)


def picture(wave: Wave, sample_rate: int, path: Path, title: str) -> None:
    """A spectrogram as PNG."""
    import matplotlib

    matplotlib.use("Agg")
    from lmd.show import specplot

    axes = specplot(wave[0], sample_rate)
    axes.set_title(title, fontsize=8)
    axes.figure.savefig(path, dpi=80)
    matplotlib.pyplot.close(axes.figure)
