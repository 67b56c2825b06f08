"""The clips that are measured: held-out excerpts, and what is played to their prompts."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor
from tqdm import tqdm

from lmd.codec.base import Codec
from lmd.corpus.captions import TEMPO_WORDS
from lmd.corpus.manifest import Corpus, Row
from lmd.errors import LmdError
from lmd.model.dit import Condition
from lmd.model.text import Prompt, mix
from lmd.rng import generator
from lmd.stream.block import both_branches
from lmd.stream.controls import Controls
from lmd.stream.streamer import Streamer

Waves = Float[Tensor, "clip sample"]
NEAR = 0.08  # a tempo within this share of the true one is right


@dataclass(frozen=True)
class Clip:
    """A prompt, the truth behind it, and the music around it."""

    row: Row  # the held-out rendition
    context: Float[Tensor, " before"]  # what a primed stream continues
    real: Float[Tensor, " after"]  # how it really goes on

    @property
    def names_bpm(self) -> bool:
        """Whether the caption gives the tempo as a number."""
        return "BPM" in self.row.caption

    @property
    def tempo_range(self) -> tuple[float, float]:
        """What the caption asks for, BPM: around a number, or what a word stands for; else nan."""
        low = high = self.row.tempo_bpm
        if not self.names_bpm:
            found, start = [], 0.0
            for end, words in TEMPO_WORDS:
                found += [(len(w), start, end) for w in words if w in self.row.caption]
                start = end
            # the longest: "very slow" holds "slow"
            _, low, high = max(found, default=(0, math.nan, math.nan))
        return low / (1 + NEAR), high * (1 + NEAR)


def of_one_family(rows: Sequence[Row]) -> list[int]:
    """The rows that one family of instruments plays."""
    return [index for index, row in enumerate(rows) if row.family != "mixed"]


def choose_rows(rows: Sequence[Row], n: int, shortest_s: float, seed: int) -> list[int]:
    """Rows of one family each that are long enough: `n` for each seed, or all if there are fewer.

    They are dealt out in one random order, so that seeds share none until all were dealt. Fewer
    than two are refused.
    """
    suited = [k for k in of_one_family(rows) if rows[k].duration_s >= shortest_s]
    if len(suited) < 2:
        found = f"{len(suited)} held-out pieces of one family and {shortest_s:.0f} s"
        raise LmdError(found, "at least 2", "Build more hours: lmd data build --hours H.")
    order = torch.randperm(len(suited), generator=generator(0, "evaluated rows")).tolist()
    n = min(n, len(suited))
    return [suited[order[(seed * n + k) % len(suited)]] for k in range(n)]


def cut_clips(
    corpus: Corpus, chosen: Sequence[int], context_samples: int, n_samples: int, seed: int
) -> list[Clip]:
    """Excerpts of some pieces; the place depends on the seed."""
    clips = []
    for index in chosen:
        row = corpus.rows[index]
        room = row.n_samples - context_samples - n_samples
        place = torch.rand((), generator=generator(seed, "excerpt", row.name))
        start = int(place * (room + 1))
        wave = torch.from_numpy(corpus.wave(index, start, context_samples + n_samples)).mean(0)
        clips.append(Clip(row, wave[:context_samples], wave[context_samples:]))
    return clips


class PromptedStreamer(Streamer):
    """An instrument's streams side by side, one per prompt; all other controls are shared."""

    def __init__(self, one: Streamer, prompts: Sequence[Prompt]) -> None:
        super().__init__(one.denoiser, one.codec, one.text, one.window)
        self.prompts = prompts

    def _condition(self, controls: Controls, batch: int) -> Condition:
        """One row per stream, the unguided branch behind them where guidance is on."""
        tokens = torch.cat([mix(self.text, prompt) for prompt in self.prompts])
        condition = self.denoiser.condition(tokens, self.window_s)
        if not controls.is_guided:
            return condition
        return both_branches(condition, self.denoiser.null_condition(condition))


def generate(
    streamer: Streamer,
    prompts: Sequence[Prompt],
    controls: Controls,
    n_blocks: int,
    contexts: Sequence[Float[Tensor, " before"]] = (),
) -> Waves:
    """Mono clips, one per prompt, from silence or from each prompt's context."""
    many = PromptedStreamer(streamer, prompts)
    if contexts:
        context = torch.stack(list(contexts))[:, None]
        state = many.start(context=context.expand(-1, many.codec.channels, -1))
    else:
        state = many.start(batch=len(prompts))
    blocks = many.stream(controls, n_blocks=n_blocks, state=state)
    shown = tqdm(blocks, total=n_blocks, desc="blocks", mininterval=2, delay=5, leave=False)
    return torch.cat([block.wave.mean(1) for block in shown], dim=-1)


@torch.no_grad()
def through_codec(codec: Codec, waves: Waves, shuffle_seed: int | None = None) -> Waves:
    """Encoded and decoded; with a seed, each clip's frames in random order between."""
    n = waves.shape[1] // codec.samples_per_frame * codec.samples_per_frame
    out = []
    for row, wave in enumerate(waves[:, None, :n]):
        latents = codec.encode(wave[None].expand(-1, codec.channels, -1))
        if shuffle_seed is not None:
            source = generator(shuffle_seed, "frames", row)
            latents = latents[..., torch.randperm(latents.shape[-1], generator=source)]
        out.append(codec.decode(latents).mean(1)[0])
    return torch.stack(out)
