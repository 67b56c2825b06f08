"""The tagger: which instruments, which pitch classes, how fast; its embedding measures distances.

A convolutional network of half a million weights, fitted by `tools/train_tagger.py` on the corpus's
own truth. It sees what this corpus varies and nothing else: distances are comparable inside this
project only.
"""

import math
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Float
from torch import Tensor, nn

from lmd.checkpoint import Header, load_tensors
from lmd.config import TaggerConfig
from lmd.data.codec_fit import Mono, mel_matrix, power
from lmd.errors import LmdError
from lmd.model.weights import build_loaded

HOP = 1024  # samples of a feature frame, two mel frames in it
N_MELS = 64
LOW_PITCH, N_SEMITONES = 36, 60  # C2 … B6
N_BANDS = 2 * N_MELS + N_SEMITONES
DEPTH_DB = 80.0  # what lies further under a window's loudest band does not count
QUIET_DB = -60.0  # a window whose loudest band lies under this is silence
LAGS = (12, 100)  # half-frames (23 ms at 22,050 Hz) over which a rhythm may repeat
LOW_BPM, HIGH_BPM, N_TEMPI = 40.0, 160.0, 32

Levels = Float[Tensor, "band step"]  # decibels
Windows = Float[Tensor, "window band frame"]  # decibels


@dataclass(frozen=True)
class Tags:
    """What the tagger makes of some windows."""

    embedding: Float[Tensor, "window size"]  # the space in which distances are measured
    family: Float[Tensor, "window family"]  # probabilities over `TaggerConfig.families`
    pitch_classes: Float[Tensor, "window 12"]  # probability that each sounds for a twentieth of it
    tempo: Float[Tensor, "window tempo"]  # probabilities over `TEMPI_BPM`


TEMPI_BPM: Float[Tensor, " tempo"] = LOW_BPM * (HIGH_BPM / LOW_BPM) ** (
    (torch.arange(N_TEMPI) + 0.5) / N_TEMPI
)


@cache
def filters(sample_rate: int) -> tuple[Float[Tensor, "mel bin"], Float[Tensor, "tone fine_bin"]]:
    """Weights of the bins of 2048 samples in every mel band, of 4096 in every semitone band.

    A semitone's are a bump around the pitch, a third of one wide or, where bins are wider, one bin.
    """
    hz = torch.arange(2049).clamp_min(1) * (sample_rate / 4096)
    pitch = 69 + 12 * torch.log2(hz / 440)
    wanted = torch.arange(LOW_PITCH, LOW_PITCH + N_SEMITONES)
    width = (12 / math.log(2) * (sample_rate / 4096) / hz).clamp_min(1 / 3)
    weights = torch.exp(-0.5 * ((pitch[:, None] - wanted) / width[:, None]).square())
    return mel_matrix(1025, sample_rate, N_MELS).T.contiguous(), (weights / weights.sum(0)).T


def band_levels(wave: Mono, sample_rate: int) -> Levels:
    """Levels of 2 × 64 mel bands and 60 semitones, `[188, n_samples // HOP]`; `LmdError` if short.

    A full-scale sine has about 0 dB at its pitch.
    """
    if len(wave) < 4096:
        raise LmdError(f"{len(wave)} samples", "at least 4096", "Give longer audio.")
    n, (mels, semitones) = len(wave) // HOP, filters(sample_rate)
    mel = mels @ power(wave, 2048, HOP // 2)[:, : 2 * n]
    halves = rearrange(mel, "mel (step half) -> (half mel) step", half=2)
    tones = semitones @ power(wave, 4096, HOP)[:, :n]
    return 10 * torch.log10(torch.cat([halves, tones]) + 1e-12)


def cut(levels: Levels, window_steps: int, hop_steps: int | None = None) -> Windows:
    """Windows, one every `hop_steps` (default: side by side); less than one is an `LmdError`."""
    if levels.shape[1] < window_steps:
        found = f"{levels.shape[1]} feature frames"
        raise LmdError(found, f"at least {window_steps}", "Give longer audio.")
    windows = levels.unfold(1, window_steps, hop_steps or window_steps)
    return rearrange(windows, "band window step -> window band step")


def rhythm(levels: Windows) -> Float[Tensor, "window lag"]:
    """Autocorrelation of the mel bands' mean rise, over `LAGS`; 1 at lag 0; silence gives 0."""
    mel = rearrange(
        levels[:, : 2 * N_MELS], "window (half mel) step -> window mel (step half)", half=2
    )
    rise = (mel[..., 1:] - mel[..., :-1]).clamp_min(0).mean(1)
    rise = rise - rise.mean(1, keepdim=True)
    spectrum = torch.fft.rfft(rise, 2 * rise.shape[1])
    correlation = torch.fft.irfft(spectrum.abs().square())
    return correlation[:, LAGS[0] : LAGS[1]] / correlation[:, :1].clamp_min(1e-6)


class Residual(nn.Module):
    """x + 1×1(GELU(convolution over time(norm(x))))."""

    def __init__(self, width: int, dilation: int) -> None:
        super().__init__()
        self.norm = nn.GroupNorm(8, width)
        self.time = nn.Conv1d(width, width, 5, padding=2 * dilation, dilation=dilation)
        self.mix = nn.Conv1d(width, width, 1)

    def forward(self, x: Tensor) -> Tensor:
        """`[window, width, step]` of the same shape."""
        return x + self.mix(F.gelu(self.time(self.norm(x))))


class Tagger(nn.Module):
    """Levels of a window -> an embedding -> family, pitch classes, tempo."""

    def __init__(self, config: TaggerConfig) -> None:
        super().__init__()
        self.config = config
        width = config.width
        self.enter = nn.Conv1d(N_BANDS, width, 1)
        self.fine = Residual(width, 1)
        self.halve = nn.Conv1d(width, width, 4, 2, 1)
        self.coarse = nn.Sequential(*(Residual(width, d) for d in (1, 2, 4)))
        self.norm = nn.LayerNorm(2 * width)
        self.embed = nn.Linear(2 * width + LAGS[1] - LAGS[0], config.embedding)
        self.heads = nn.Linear(config.embedding, len(config.families) + 12 + N_TEMPI)

    def forward(self, levels: Windows) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Embedding and the logits of family, pitch classes, tempo; loudness does not matter."""
        loudest = levels.amax((1, 2), keepdim=True).clamp_min(QUIET_DB)
        depth = (levels - loudest).clamp_min(-DEPTH_DB)
        x = self.coarse(self.halve(self.fine(self.enter(depth / 20 + 2))))
        pooled = self.norm(torch.cat([x.mean(2), x.std(2)], 1))
        embedding = self.embed(torch.cat([pooled, rhythm(depth)], 1))
        n = len(self.config.families)
        logits = self.heads(F.gelu(embedding)).split([n, 12, N_TEMPI], 1)
        return embedding, *logits

    @torch.no_grad()
    def tag_wave(self, wave: Mono, overlap: int = 1) -> Tags:
        """What is in a piece at the tagger's rate, window by window; `LmdError` if too short.

        With an overlap of 1, windows lie side by side; with 2, there is one every half window.
        """
        n = self.config.window_steps
        windows = cut(band_levels(wave, self.config.sample_rate), n, n // overlap)
        embedding, family, pitch, tempo = self(windows)
        return Tags(embedding, family.softmax(1), pitch.sigmoid(), tempo.softmax(1))

    def check_rate(self, sample_rate: int) -> None:
        """Refuse music at another sample rate than the tagger was fitted at."""
        if sample_rate != self.config.sample_rate:
            expected = f"{self.config.sample_rate} Hz, at which the tagger was fitted"
            todo = "Fit another: python tools/train_tagger.py."
            raise LmdError(f"music at {sample_rate} Hz", expected, todo)


def tempo_bpm(tempo: Float[Tensor, "window tempo"]) -> float:
    """A piece's tempo: the peak of its windows' mean log probability, with its neighbours."""
    probability = tempo.clamp_min(1e-6).log().mean(0).softmax(0)
    peak = int(probability.argmax())
    near = slice(max(0, peak - 2), peak + 3)
    share = probability[near] / probability[near].sum()
    return float(torch.exp((share * TEMPI_BPM[near].log()).sum()))


def load_tagger(path: Path | str) -> tuple[Tagger, Header]:
    """The tagger in a file and what the file says about it."""
    tensors, header = load_tensors(path, "tagger")
    model = build_loaded(lambda: Tagger(header.config), tensors, str(path))
    return model.requires_grad_(False), header
