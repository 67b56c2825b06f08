"""Training of the spectral codec: three stages, which follow from the step alone.

First the encoder with its decoder's levels; then, encoder frozen and its statistics measured, the
whole decoder; then the same with a discriminator. Step k depends on (options, k) alone.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, ClassVar, Literal

import lightning as L
import torch
import tyro
from torch import Tensor, nn

from lmd.codec import phase
from lmd.codec.spectral import DB_SCALE, SpectralCodec, stft
from lmd.config import SpectralCodecConfig
from lmd.corpus.manifest import Corpus
from lmd.errors import LmdError
from lmd.rng import generator, normal
from lmd.training.codec.losses import (
    Discriminator,
    advance_loss,
    bin_weights,
    discriminator_loss,
    generator_loss,
    level_loss,
    mel_matrix,
    multi_resolution_loss,
)
from lmd.training.options import Hidden, RunOptions, Steps
from lmd.training.trainer import check_finite

STATISTICS_BATCHES = 100  # that the latents' mean and scale are measured on
ADVERSARIAL_ROWS = 4  # windows of a batch that are synthesised and scored; it is the dear part


@dataclass(frozen=True, kw_only=True)
class CodecRun(RunOptions):
    """A training of the codec.

    Attributes:
        out: the run's folder: checkpoints, logs, weights; a run goes on there.
        data: a built corpus.
        n_steps: optimizer steps; a run may be made longer.
        encoder_steps: of these, the first that train the encoder; 0 = it comes from a checkpoint.
        adversarial_from: step from which the discriminator joins in; by default half of what
            follows the encoder.
        encoder: take encoder and decoder from this file; the encoder stays as it is.
        batch: windows a step.
        frames: latent frames a window.
        learning_rate: peak; warm-up over 100 steps, cosine to a twentieth at the last. The
            discriminator has a third of the peak throughout.
        slowness: weight of the mean squared change of a latent from frame to frame.
        noise: standard deviation added to latents of unit scale before decoding.
        threads: that torch uses; 0: its own choice.
    """

    stage: ClassVar[str] = "codec"
    out: Path = Path("outputs/codec")
    data: Path = Path("data/corpus")
    n_steps: Steps = 20_000
    encoder_steps: int = 2000
    adversarial_from: int | None = None
    encoder: Path | None = None
    batch: int = 12
    frames: int = 32
    learning_rate: float = 1e-3
    slowness: Hidden[float] = 0.4
    noise: float = 0.25
    threads: int = 0
    accelerator: Annotated[Literal["auto", "cpu", "gpu"], tyro.conf.arg(aliases=["--device"])] = (
        "auto"
    )
    precision: Literal["auto", "32", "bf16"] = "32"
    init: Hidden[Path | None] = None
    codec: Hidden[Path | None] = None
    accumulate: Hidden[int] = 1
    devices: Hidden[int] = 1
    num_nodes: Hidden[int] = 1
    checkpointing: Hidden[bool] = False


class CodecWindows:
    """Batches of waves `[batch, 1, sample]`; the one of step k depends on (seed, k) alone."""

    def __init__(self, corpus: Corpus, config: SpectralCodecConfig, options: CodecRun) -> None:
        if corpus.sample_rate != config.sample_rate or corpus.channels != config.channels:
            raise LmdError(
                f"a corpus of {corpus.sample_rate} Hz and {corpus.channels} channels",
                f"{config.sample_rate} Hz and {config.channels}",
                "Build the corpus for this preset.",
            )
        self.corpus, self.options, self.first_step = corpus, options, 0
        self.n_samples = options.frames * config.samples_per_frame

    def batch(self, step: int, vary_gain: bool = True) -> Tensor:
        """The batch of one step, with a random gain of -9 to +3 dB per window if wanted."""
        waves = []
        for j in range(self.options.batch):
            numbers = torch.rand(3, generator=generator(self.options.seed, "codec window", step, j))
            index = int(numbers[0] * len(self.corpus))
            n_starts = max(1, self.corpus.rows[index].n_samples - self.n_samples)
            wave = self.corpus.wave(index, int(numbers[1] * n_starts), self.n_samples)
            gain = 10 ** ((12 * float(numbers[2]) - 9) / 20) if vary_gain else 1.0
            waves.append(torch.from_numpy(wave) * gain)
        return torch.stack(waves)

    def __iter__(self) -> Iterator[Tensor]:
        return (self.batch(step) for step in range(self.first_step, self.options.n_steps))


class CodecTraining(L.LightningModule):
    """One codec, its discriminator, and the three stages of a `CodecRun`."""

    def __init__(self, codec: SpectralCodec, options: CodecRun, windows: CodecWindows) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.codec, self.options, self.windows = codec, options, windows
        self.discriminator = Discriminator()
        self.last_checkpoint = "none yet"
        config = codec.config
        n_bins = config.n_fft // 2 + 1
        self.register_buffer("step", torch.tensor(0))
        self.register_buffer("mel", mel_matrix(n_bins, config.sample_rate), persistent=False)
        self.register_buffer("weights", bin_weights(n_bins, config.sample_rate), persistent=False)

    def configure_optimizers(self) -> list[torch.optim.Optimizer]:
        """Two AdamW: codec, discriminator."""
        pairs = (self.codec, (0.9, 0.98)), (self.discriminator, (0.8, 0.98))
        adam = partial(torch.optim.AdamW, lr=1e-3, weight_decay=0.01, fused=True)
        return [adam(network.parameters(), betas=betas) for network, betas in pairs]

    def train_dataloader(self) -> CodecWindows:
        """Batches from the step that comes next."""
        self.windows.first_step = int(self.step)
        return self.windows

    def training_step(self, wave: Tensor, batch_index: int) -> None:
        """One step of the stage that the step number says."""
        step = int(self.step)
        if step == self.options.encoder_steps and step:
            measure_statistics(self.codec, self.windows)
        rates = (learning_rate(self.options, step), self.options.learning_rate / 3)
        for optimizer, rate in zip(self.optimizers(), rates, strict=True):
            for group in optimizer.param_groups:
                group["lr"] = rate
        in_encoder = step < self.options.encoder_steps
        losses = self._encoder_losses(wave) if in_encoder else self._decoder_losses(wave)
        found = {name: value.item() for name, value in losses.items()}
        for name, value in found.items():
            advice = "Start again from the last checkpoint with a smaller --learning-rate."
            check_finite(name, value, f"step {step}", advice)
        optimizer = self.optimizers()[0]
        optimizer.zero_grad()
        self.manual_backward(losses["loss"])
        nn.utils.clip_grad_norm_(self.codec.parameters(), 1.0)
        optimizer.step()
        self.step += 1
        for logger in self.loggers:
            logger.log_metrics(found, step=step)
        self.log("loss", found["loss"], prog_bar=True, logger=False, batch_size=len(wave))

    def exported(self) -> dict[str, Tensor]:
        """The codec's weights."""
        return self.codec.state_dict()

    def _encoder_losses(self, wave: Tensor) -> dict[str, Tensor]:
        """Encoder and levels; latents normalised by the batch's own statistics."""
        encoder = self.codec.encoder
        raw = encoder.raw_latents(encoder.features(wave))
        mean, std = raw.mean((0, 1)), raw.std((0, 1)).clamp_min(1e-3)
        latents = (raw - mean) / std
        level, _, _ = self.codec.decoder(self._noised(latents).transpose(1, 2))
        power = self._spectrum(wave).abs().square()
        bins, mel = level_loss(level, power, self.mel, self.weights, self.codec.config.floor_db)
        change = latents.diff(dim=1).square().mean()
        loss = (bins + mel) / 10 + self.options.slowness * change
        return {"loss": loss, "bin_db": bins, "mel_db": mel, "change": change}

    def _noised(self, latents: Tensor) -> Tensor:
        """Latents with this step's noise, so that a model's small errors will not matter."""
        noise = normal(tuple(latents.shape), self.options.seed, "codec noise", int(self.step))
        return latents + self.options.noise * noise.to(latents)

    def _decoder_losses(self, wave: Tensor) -> dict[str, Tensor]:
        """Levels and advances; with the discriminator also the synthesised wave."""
        config = self.codec.config
        with torch.no_grad():
            latents = self.codec.encoder(wave)
            spectrum = self._spectrum(wave)
            true = phase.advances(spectrum, config.n_fft, config.hop)
            magnitude = spectrum.abs()
        level, *predicted = self.codec.decoder(self._noised(latents))
        bins, mel = level_loss(level, magnitude.square(), self.mel, self.weights, config.floor_db)
        in_time, in_frequency = (
            advance_loss(p, t, magnitude) for p, t in zip(predicted, true, strict=True)
        )
        losses = {"bin_db": bins, "mel_db": mel, "in_time": in_time, "in_frequency": in_frequency}
        loss = (bins + mel) / 10 + in_time + in_frequency
        if int(self.step) >= self.options.adversarial_from:
            some = slice(0, ADVERSARIAL_ROWS)
            made = self.codec.synthesize(level[some], *(p[some] for p in predicted))
            edge = config.n_fft // 2
            extra = self._adversarial_losses(made[:, edge:-edge], wave[some, 0, edge:-edge])
            losses |= extra
            loss = loss + extra["wave_db"] / 10 + extra["fooled"] / 10 + extra["features"]
        return {"loss": loss, **losses}

    def _adversarial_losses(self, made: Tensor, wave: Tensor) -> dict[str, Tensor]:
        """A step of the discriminator, then its loss for the synthesised wave."""
        score = discriminator_loss(self.discriminator(wave), self.discriminator(made.detach()))
        optimizer = self.optimizers(use_pl_optimizer=False)[1]  # not counted as a step of the run
        optimizer.zero_grad()
        self.manual_backward(score)
        optimizer.step()
        self.discriminator.requires_grad_(False)
        fooled, features = generator_loss(self.discriminator(wave), self.discriminator(made))
        self.discriminator.requires_grad_(True)
        wave_db = multi_resolution_loss(made, wave, self.codec.sample_rate)
        return {"discriminator": score, "fooled": fooled, "features": features, "wave_db": wave_db}

    def _spectrum(self, wave: Tensor) -> Tensor:
        return stft(wave[:, 0], self.codec.config.n_fft, self.codec.config.hop)


def learning_rate(options: CodecRun, step: int) -> float:
    """Warm-up over 100 steps, then a cosine down to a twentieth at the last step."""
    cosine = 0.5 + 0.5 * math.cos(math.pi * min(1.0, step / max(1, options.n_steps)))
    return options.learning_rate * min(1.0, (step + 1) / 100) * max(0.05, cosine)


@torch.no_grad()
def measure_statistics(codec: SpectralCodec, windows: CodecWindows) -> None:
    """Set the encoder's mean and scale from the first batches; its weights are left alone."""
    encoder = codec.encoder
    batches = (windows.batch(step, vary_gain=False) for step in range(STATISTICS_BATCHES))
    features = (encoder.features(wave.to(encoder.latent_mean.device)) for wave in batches)
    raw = torch.cat([encoder.raw_latents(each).flatten(0, 1) for each in features])
    encoder.latent_mean.copy_(raw.mean(0))
    encoder.latent_std.copy_(raw.std(0).clamp_min(1e-3))


@torch.no_grad()
def start_from_components(codec: SpectralCodec, windows: CodecWindows) -> None:
    """Begin with principal components: the linear encoder's closed form, and mean levels."""
    encoder, config = codec.encoder, codec.config
    batches = [windows.batch(step) for step in range(STATISTICS_BATCHES)]
    features = torch.cat([encoder.features(b).flatten(0, 1) for b in batches])
    mean = features.mean(0)
    centred = (features - mean).double()
    values, vectors = torch.linalg.eigh(centred.T @ centred / len(centred))
    n = config.latent_dim
    scale = values[-n:].clamp_min(1e-6).sqrt()
    encoder.feature_mean.copy_(mean)
    encoder.linear.weight.copy_((vectors[:, -n:] / scale).T * DB_SCALE)
    encoder.linear.bias.zero_()
    encoder.layers[-1].weight.mul_(0.1)
    power = torch.cat([stft(b[:4, 0], config.n_fft, config.hop).abs().square() for b in batches])
    level = torch.log10(power + 10 ** (config.floor_db / 10)).mean((0, 2)) * 10
    codec.decoder.level.bias.copy_(level / DB_SCALE)
