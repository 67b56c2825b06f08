"""Fit the tagger, whose embedding `lmd evaluate` measures distances in, on a built corpus.

    python tools/train_tagger.py --steps 1500 --data data/corpus

The truth is known exactly: the manifest names the instruments and the tempo, and the scores
(`Corpus.notes`) say which pitch classes sound when.
"""

import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
import torch.nn.functional as F
import tyro
from einops import rearrange
from jaxtyping import Float
from torch import Tensor
from tqdm import tqdm

from lmd.checkpoint import load_codec, read_header, save_checkpoint
from lmd.codec.base import Codec
from lmd.config import TaggerConfig
from lmd.corpus.instruments import FAMILIES
from lmd.corpus.manifest import Corpus, Row
from lmd.corpus.scores import DEFAULT_CACHE
from lmd.errors import LmdError
from lmd.evaluation.clips import NEAR, through_codec
from lmd.evaluation.tagger import HOP, TEMPI_BPM, Tagger, band_levels, load_tagger, tempo_bpm
from lmd.machine import machine_dict, tune_allocator
from lmd.outputs import check_outputs, write_atomic
from lmd.rng import derive_seed, generator, normal
from lmd.training.card import card

STEP_DB, BOTTOM_DB = 0.5, -110.0  # levels are kept in bytes
SOUNDING = 0.05  # a pitch class is there if it sounds for this share of a window
ABOUT = (
    "The network that distances are measured with: 2 × 64 mel bands and 60 semitones of five "
    "seconds in; instrument family, pitch classes and tempo out; an embedding in between. Fitted "
    "on this project's corpus alone, whose truth is known. It knows these timbres and no others, "
    "so its distances are of use only inside this project."
)
NOTICE = (
    "Data: a corpus that `python -m lmd data build` rendered from scores, which say what sounds "
    "when. The weights know what that corpus sounds like and nothing else."
)
TEMPO_SPREAD = 0.04  # natural log; the standard deviation of the tempo's soft label


@dataclass(frozen=True)
class Options:
    """How the tagger is fitted."""

    data: Path = Path("data/corpus")  # a built corpus
    cache: Path = DEFAULT_CACHE  # parsed scores
    out: Path = Path("data/pretrained/tagger.safetensors")  # where the weights go
    codec: Path | None = None  # also measure it after this codec
    steps: int = 1800  # optimiser steps
    batch: int = 32  # windows a step
    seed: int = 0  # of weights and windows
    # highest, after a warm-up of a twentieth; falls to 0 as a cosine
    learning_rate: float = 2e-3
    noise_db: float = 1.5  # standard deviation of noise added to every level
    threads: int | None = None  # of torch
    measure: bool = False  # do not fit, measure --out again


def main(words: Sequence[str] | None = None) -> int:
    """Fit, measure on held-out pieces, save with a model card beside it."""
    try:
        run(tyro.cli(Options, args=words, description=__doc__))
    except LmdError as error:
        print(f"train_tagger: {error}", file=sys.stderr)
        return 2
    return 0


def run(options: Options) -> None:
    """What `main` does; what does not fit is raised."""
    if options.steps < 1 or options.batch < 1 or (options.threads or 1) < 1:
        raise LmdError("--steps, --batch or --threads below 1", "at least 1", "Raise them.")
    check_outputs(out=options.out, make_folders=True)
    if options.threads:
        torch.set_num_threads(options.threads)
    tune_allocator()
    if options.measure:
        tagger, header = load_tagger(options.out)
        notes = dict(header.notes)
    else:
        tagger, notes = fit(options)
    codecs: dict[str, Codec | None] = {"as rendered": None}
    if options.codec:
        name = f"after the codec {read_header(options.codec).sha256[:8]}"
        codecs[name] = load_codec(options.codec)
    notes["scores"] = {name: measure(tagger, options, codec) for name, codec in codecs.items()}
    state, config = tagger.state_dict(), tagger.config
    save_checkpoint(options.out, state, kind="tagger", config=config, notes=notes, stored="float16")
    text = tagger_card(options.out)
    write_atomic(options.out.with_suffix(".md"), text.encode())
    print(text)


# --- what is known of a corpus ------------------------------------------------------------------


@dataclass(frozen=True)
class Truth:
    """What is known about each feature frame of a corpus, pieces one after another."""

    levels: np.ndarray  # bytes `[frame, band]`
    sounding: np.ndarray  # whether each pitch class (C = 0) sounds, `[frame, 12]`
    first: np.ndarray  # first frame of each piece, and the end
    rows: list[Row]  # the manifest


def sounding_classes(notes: np.ndarray, sample_rate: int, n_frames: int) -> np.ndarray:
    """Which pitch classes `Corpus.notes` let sound in each frame, bool `[frame, 12]`."""
    sounding = np.zeros((n_frames, 12), bool)
    for onset_s, gate_s, pitch, *_ in notes:
        start = int(onset_s * sample_rate / HOP)
        end = max(start + 1, round((onset_s + gate_s) * sample_rate / HOP))
        sounding[start:end, int(pitch) % 12] = True
    return sounding


def read_truth(corpus: Corpus, cache: Path) -> Truth:
    """Features and truth of a corpus; own music, of which there is no score, is refused."""
    levels, sounding = [], []
    for index, row in enumerate(tqdm(corpus.rows, desc="levels", mininterval=2)):
        wave = torch.from_numpy(corpus.wave(index)).mean(0)
        found = (band_levels(wave, row.sample_rate) - BOTTOM_DB) / STEP_DB
        levels.append(found.round().clamp(0, 255).to(torch.uint8).numpy().T)
        notes = corpus.notes(index, cache)
        sounding.append(sounding_classes(notes, row.sample_rate, found.shape[1]))
    first = np.cumsum([0, *map(len, levels)])
    return Truth(np.concatenate(levels), np.concatenate(sounding), first, corpus.rows)


# --- fitting ------------------------------------------------------------------------------------


def tempo_labels(bpm: Float[Tensor, " window"]) -> Float[Tensor, "window tempo"]:
    """A bump over `TEMPI_BPM` around each tempo."""
    distance = (TEMPI_BPM.log() - bpm[:, None].log()) / TEMPO_SPREAD
    return (-0.5 * distance.square()).softmax(1)


def draw_batch(truth: Truth, options: Options, step: int, n_steps: int) -> tuple[Tensor, ...]:
    """Windows of a step with noise, and their family, pitch classes and tempo."""
    seed = options.seed
    source = generator(seed, "recogniser windows", step)
    lengths = torch.from_numpy(np.diff(truth.first))
    room = (lengths - n_steps).clamp_min(0).double()
    piece = torch.multinomial(room, options.batch, replacement=True, generator=source)
    place = torch.rand(options.batch, generator=source, dtype=torch.float64)
    starts = torch.from_numpy(truth.first)[piece] + (place * (room[piece] + 1)).long()
    inside = starts.numpy()[:, None] + np.arange(n_steps)
    levels = torch.from_numpy(truth.levels[inside].astype(np.float32) * STEP_DB + BOTTOM_DB)
    levels = rearrange(levels, "window step band -> window band step")
    pitch = torch.from_numpy(truth.sounding[inside].mean(1) > SOUNDING).float()
    levels = levels + options.noise_db * normal(tuple(levels.shape), seed, "band noise", step)
    rows = [truth.rows[i] for i in piece.tolist()]
    family = torch.tensor([list(FAMILIES).index(row.family) for row in rows])
    return levels, family, pitch, tempo_labels(torch.tensor([row.tempo_bpm for row in rows]))


def fit(options: Options) -> tuple[Tagger, dict[str, Any]]:
    """The tagger after all steps, and what its file will say about it."""
    corpus = Corpus(options.data, "train")
    truth, began = read_truth(corpus, options.cache), time.perf_counter()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(derive_seed(options.seed, "recogniser"))
        tagger = Tagger(TaggerConfig(tuple(FAMILIES), sample_rate=corpus.sample_rate))
    optimiser = torch.optim.AdamW(tagger.parameters(), lr=options.learning_rate, weight_decay=0.02)
    warm, n_steps = max(1, options.steps // 20), tagger.config.window_steps
    rate = torch.optim.lr_scheduler.LambdaLR(
        optimiser,
        lambda k: min(1, (k + 1) / warm) * 0.5 * (1 + np.cos(np.pi * min(1, k / options.steps))),
    )
    losses, bar = [], tqdm(range(options.steps), desc="tagger", mininterval=2)
    for step in bar:
        levels, family, pitch, tempo = draw_batch(truth, options, step, n_steps)
        _, family_logits, pitch_logits, tempo_logits = tagger(levels)
        loss = (
            F.cross_entropy(family_logits, family, label_smoothing=0.05)
            + 2 * F.binary_cross_entropy_with_logits(pitch_logits, pitch)
            + 0.5 * F.cross_entropy(tempo_logits, tempo)
        )
        optimiser.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(tagger.parameters(), 1.0)
        optimiser.step()
        rate.step()
        losses.append(float(loss.detach()))
        bar.set_postfix(loss=f"{np.mean(losses[-50:]):.3f}", refresh=False)
    sizes = f"--steps {options.steps} --batch {options.batch} --seed {options.seed}"
    return tagger.eval().requires_grad_(False), {
        "plan": {name: vars(options)[name] for name in ("steps", "batch", "learning_rate", "seed")},
        "seconds": round(time.perf_counter() - began, 1),
        "losses": [float(part.mean()) for part in np.array_split(losses, 8) if len(part)],
        "n_weights": sum(p.numel() for p in tagger.parameters()),
        "machine": machine_dict(),
        "data": {"renditions": len(corpus), "hours": round(corpus.duration_s / 3600, 2)},
        "command": f"python tools/train_tagger.py {sizes}",
    }


# --- how well it does ---------------------------------------------------------------------------

SCORES = {
    "pieces": "pieces",
    "windows": "windows of 5 s",
    "family_piece": "family recognised, per piece",
    "family_piece_unmixed": "the same, pieces of one family only",
    "family_window": "family recognised, per window",
    "tempo_piece": "tempo within 8 %, per piece",
    "tempo_piece_octave": "tempo within 8 %, half and double allowed",
    "pitch_f1": "pitch classes, F1 per window",
    "pitch_f1_all": "pitch classes if all twelve were said to sound, F1",
}


def measure(tagger: Tagger, options: Options, codec: Codec | None = None) -> dict[str, float]:
    """`SCORES` over validation and test pieces, as they are or after a codec."""
    pieces, windows, said, true = [], [], [], []
    corpora = [Corpus(options.data, split) for split in ("validation", "test")]
    tagger.check_rate(corpora[0].sample_rate)
    jobs = [(corpus, index) for corpus in corpora for index in range(len(corpus))]
    for corpus, index in tqdm(jobs, desc="held-out pieces", mininterval=2):
        row, wave = corpus.rows[index], torch.from_numpy(corpus.wave(index)).mean(0)
        tags = tagger.tag_wave(wave if codec is None else through_codec(codec, wave[None])[0])
        family = tagger.config.families.index(row.family)
        octaves, limit = abs(np.log2(tempo_bpm(tags.tempo) / row.tempo_bpm)), np.log2(1 + NEAR)
        is_found = int(tags.family.clamp_min(1e-6).log().mean(0).argmax()) == family
        pieces.append(
            {
                "family_piece": is_found,
                "family_piece_unmixed": np.nan if row.family == "mixed" else is_found,
                "tempo_piece": octaves < limit,
                "tempo_piece_octave": octaves < limit or abs(octaves - 1) < limit,
            }
        )
        windows += (tags.family.argmax(1) == family).tolist()
        said.append(tags.pitch_classes.numpy() > 0.5)
        n_frames = len(tags.family) * tagger.config.window_steps
        frames = sounding_classes(corpus.notes(index, options.cache), row.sample_rate, n_frames)
        true.append(frames.reshape(len(tags.family), -1, 12).mean(1) > SOUNDING)
    both = np.concatenate(true)
    return {
        "pieces": len(pieces),
        "windows": len(windows),
        **pd.DataFrame(pieces, dtype=float).mean().to_dict(),
        "family_window": float(np.mean(windows)),
        "pitch_f1": f1(np.concatenate(said), both),
        "pitch_f1_all": f1(np.ones_like(both), both),
    }


def f1(said: np.ndarray, true: np.ndarray) -> float:
    """Harmonic mean of precision and recall over all labels together."""
    return float(2 * (said & true).sum() / (said.sum() + true.sum()))


def tagger_card(path: Path) -> str:
    """Markdown about a tagger out of its own header."""
    header = read_header(path)
    notes, plan = header.notes, header.notes["plan"]
    minutes, machine = notes["seconds"] / 60, notes["machine"]
    facts = {
        "families": ", ".join(header.config.families),
        "embedding": f"{header.config.embedding} numbers",
        "weights": notes["n_weights"],
        "steps × windows": f"{plan['steps']} × {plan['batch']}",
        "wall time": f"{minutes:.1f} min with {machine['n_threads']} thread(s) on {machine['cpu']}",
        "data": f"{notes['data']['renditions']} training renditions, {notes['data']['hours']} h",
        "command": f"`{notes['command']}`",
    }
    scores = pd.DataFrame(notes["scores"]).reindex(SCORES).rename(SCORES)
    scores.index.name = "on pieces it was not fitted on"
    return card(path, ABOUT, facts, scores.to_markdown(floatfmt=".4g"), notice=NOTICE)


if __name__ == "__main__":
    sys.exit(main())
