"""Sounds and pictures of a run: what the averaged weights play at some of its steps."""

from pathlib import Path
from typing import Any

import lightning as L
import soundfile
import torch
from lightning.pytorch.callbacks import Callback
from matplotlib.figure import Figure
from torch import Tensor

from lmd.checkpoint import build_model, load_codec
from lmd.codec.base import Codec
from lmd.model.weights import load_strict
from lmd.rng import normal
from lmd.shapes import Latents, Wave
from lmd.stream.controls import Controls
from lmd.stream.samplers import Guidance, dpmpp_2m, schedule
from lmd.stream.streamer import Streamer
from lmd.training.module import LiveTraining

N_STEPS = 16  # of the sampler
STREAM_BLOCKS = 5


@torch.no_grad()
def play_weights(
    weights: dict[str, Tensor], module: LiveTraining, codec: Codec, prompt: str
) -> Wave:
    """What `exported` weights of a run play on the CPU: a window of the base, or a stream."""
    sizes, options = module.preset, module.options
    model = build_model(sizes).eval()
    load_strict(model, weights, "the averaged weights")
    if options.stage != "base":
        streamer = Streamer(model, codec, module.text, sizes.window)
        controls = Controls(prompt=prompt, seed=options.seed)
        blocks = streamer.stream(controls, n_blocks=STREAM_BLOCKS)
        return torch.cat([block.wave for block in blocks], dim=-1)
    n_frames = options.window_frames
    condition = model.condition(module.text.encode([prompt]), n_frames / sizes.frame_rate_hz)

    def velocities(noisy: Latents, t: float) -> Guidance:
        return Guidance(model(noisy, torch.full((1,), t), condition))

    noise = normal((1, model.config.latent_dim, n_frames), options.seed, "sample")
    return codec.decode(dpmpp_2m(velocities, noise, schedule(N_STEPS)))


class Samples(Callback):
    """Write `samples/step-….wav` and `.png` every `every` steps, from one fixed prompt."""

    def __init__(self, every: int, codec: Path) -> None:
        self.every, self.codec, self.done = every, load_codec(codec), 0

    def on_train_batch_end(self, trainer: L.Trainer, module: LiveTraining, *args: Any) -> None:
        """All processes gather the weights, the first one plays them."""
        step = trainer.global_step
        if step == self.done or step % self.every:
            return
        self.done, weights, options = step, module.exported(), module.options
        if not trainer.is_global_zero:
            return
        from lmd.show import specplot  # slow to import

        prompt = module.source.windows(0, [0], options.window_frames).prompts[0]
        wave, rate = play_weights(weights, module, self.codec, prompt), self.codec.sample_rate
        path = options.out / "samples" / f"step-{step:07d}.wav"
        path.parent.mkdir(parents=True, exist_ok=True)
        soundfile.write(path, wave[0].T.clamp(-1, 1).numpy(), rate)
        figure = Figure(figsize=(9, 2.6), layout="constrained")
        specplot(wave[0], rate, figure.subplots()).set_title(prompt, fontsize=8)
        figure.savefig(path.with_suffix(".png"), dpi=80)
