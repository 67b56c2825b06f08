"""Fit the recogniser on a built corpus: `python -m lmd train recogniser`.

The truth is known exactly: the manifest names the instruments and the tempo, and the scores, played
again in thought (`Corpus.notes`), say which pitch classes sound when.
"""

import argparse
import hashlib
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor
from tqdm import tqdm

from lmd.checkpoint import load_codec, read_header, save_checkpoint, write_atomic
from lmd.codec.base import Codec
from lmd.config import RecogniserConfig
from lmd.corpus.instruments import FAMILIES
from lmd.corpus.manifest import MANIFEST, Corpus, Row
from lmd.corpus.scores import DEFAULT_CACHE
from lmd.data.places import check_file_free
from lmd.errors import LmdError
from lmd.evaluation.tagger import (
    HOP,
    TEMPI_BPM,
    Heard,
    Recogniser,
    band_levels,
    load_recogniser,
)
from lmd.evaluation.tagger_card import card, hearing, pieces
from lmd.machine import machine_dict, tune_allocator
from lmd.rng import derive_seed, generator, normal

VERSION = 1  # of the features on disk
STEP_DB, BOTTOM_DB = 0.5, -110.0  # levels are kept in bytes
SOUNDING = 0.05  # a pitch class is there if it sounds for this share of a window
TEMPO_SPREAD = 0.04  # natural log; the standard deviation of the tempo's soft label


@dataclass(frozen=True)
class FitPlan:
    """How the recogniser is fitted.

    Attributes:
        steps, batch: optimiser steps, and windows in each.
        learning_rate: highest, after a warm-up of a twentieth; falls to 0 as a cosine.
        noise_db: standard deviation of noise added to every level.
        seed: of weights and windows.
    """

    steps: int = 1800
    batch: int = 32
    learning_rate: float = 2e-3
    noise_db: float = 1.5
    seed: int = 0


@dataclass(frozen=True)
class Truth:
    """What is known about each feature frame of a corpus, pieces one after another.

    Attributes:
        levels: bytes `[frame, band]`.
        sounding: whether each pitch class (C = 0) sounds, `[frame, 12]`.
        first: first frame of each piece, and the end.
        rows: the manifest.
    """

    levels: np.ndarray
    sounding: np.ndarray
    first: np.ndarray
    rows: list[Row]

    def windows(self, starts: np.ndarray, n_steps: int) -> tuple[Tensor, Tensor]:
        """Levels in dB `[window, band, step]` and pitch classes that sound `[window, 12]`."""
        inside = starts[:, None] + np.arange(n_steps)
        levels = torch.from_numpy(self.levels[inside].astype(np.float32) * STEP_DB + BOTTOM_DB)
        sounding = self.sounding[inside].mean(1) > SOUNDING
        return levels.transpose(1, 2), torch.from_numpy(sounding.astype(np.float32))


def sounding_classes(notes: np.ndarray, sample_rate: int, n_frames: int) -> np.ndarray:
    """Which pitch classes the notes let sound in each frame, bool `[frame, 12]`.

    Args:
        notes: rows (onset_s, gate_s, pitch, …), as `Corpus.notes` gives them.
        sample_rate: Hz.
        n_frames: how many frames there are.
    """
    sounding = np.zeros((n_frames, 12), bool)
    for onset_s, gate_s, pitch, *_ in notes:
        start = int(onset_s * sample_rate / HOP)
        end = max(start + 1, round((onset_s + gate_s) * sample_rate / HOP))
        sounding[start:end, int(pitch) % 12] = True
    return sounding


def read_truth(corpus: Corpus, cache: Path = DEFAULT_CACHE) -> Truth:
    """Features and truth of a corpus; kept beside the parsed scores for the next time.

    Raises:
        LmdError: own music, of which there is no score.
    """
    key = hashlib.sha256((corpus.folder / MANIFEST).read_bytes()).hexdigest()[:16]
    names = ",".join(row.name for row in corpus.rows)
    key += "-" + hashlib.sha256(names.encode()).hexdigest()[:8]
    path = cache.parent / f"recogniser-{VERSION}-{key}.npz"
    if path.is_file():
        with np.load(path) as kept:
            return Truth(kept["levels"], kept["sounding"], kept["first"], corpus.rows)
    levels, sounding = [], []
    for index, row in enumerate(tqdm(corpus.rows, desc="levels", mininterval=2)):
        wave = torch.from_numpy(corpus.wave(index)).mean(0)
        found = (band_levels(wave, row.sample_rate) - BOTTOM_DB) / STEP_DB
        levels.append(found.round().clamp(0, 255).to(torch.uint8).numpy().T)
        notes = corpus.notes(index, cache)
        sounding.append(sounding_classes(notes, row.sample_rate, found.shape[1]))
    first = np.concatenate([[0], np.cumsum([len(part) for part in levels])])
    truth = Truth(np.concatenate(levels), np.concatenate(sounding), first, corpus.rows)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".part.npz")
    np.savez(partial, levels=truth.levels, sounding=truth.sounding, first=first)
    partial.replace(path)
    return truth


def tempo_labels(bpm: Float[Tensor, " window"]) -> Float[Tensor, "window tempo"]:
    """A bump over `TEMPI_BPM` around each tempo."""
    distance = (TEMPI_BPM.log() - bpm[:, None].log()) / TEMPO_SPREAD
    return (-0.5 * distance.square()).softmax(1)


def draw_batch(truth: Truth, plan: FitPlan, step: int, n_steps: int) -> tuple[Tensor, ...]:
    """Windows of a step with noise, and their family, pitch classes and tempo."""
    source = generator(plan.seed, "recogniser windows", step)
    lengths = torch.from_numpy(np.diff(truth.first))
    room = (lengths - n_steps).clamp_min(0).double()
    piece = torch.multinomial(room, plan.batch, replacement=True, generator=source)
    place = torch.rand(plan.batch, generator=source, dtype=torch.float64)
    starts = torch.from_numpy(truth.first)[piece] + (place * (room[piece] + 1)).long()
    levels, pitch = truth.windows(starts.numpy(), n_steps)
    levels = levels + plan.noise_db * normal(tuple(levels.shape), plan.seed, "band noise", step)
    rows = [truth.rows[i] for i in piece.tolist()]
    family = torch.tensor([list(FAMILIES).index(row.family) for row in rows])
    return levels, family, pitch, tempo_labels(torch.tensor([row.tempo_bpm for row in rows]))


def fit(truth: Truth, plan: FitPlan, config: RecogniserConfig) -> tuple[Recogniser, list[float]]:
    """The recogniser after all steps, and the loss at each."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(derive_seed(plan.seed, "recogniser"))
        model = Recogniser(config)
    optimiser = torch.optim.AdamW(model.parameters(), lr=plan.learning_rate, weight_decay=0.02)
    warm = max(1, plan.steps // 20)
    rate = torch.optim.lr_scheduler.LambdaLR(
        optimiser,
        lambda k: min(1, (k + 1) / warm) * 0.5 * (1 + np.cos(np.pi * min(1, k / plan.steps))),
    )
    losses, bar = [], tqdm(range(plan.steps), desc="recogniser", mininterval=2)
    for step in bar:
        levels, family, pitch, tempo = draw_batch(truth, plan, step, config.window_steps)
        _, family_logits, pitch_logits, tempo_logits = model(levels)
        loss = (
            F.cross_entropy(family_logits, family, label_smoothing=0.05)
            + 2 * F.binary_cross_entropy_with_logits(pitch_logits, pitch)
            + 0.5 * F.cross_entropy(tempo_logits, tempo)
        )
        optimiser.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimiser.step()
        rate.step()
        losses.append(float(loss.detach()))
        bar.set_postfix(loss=f"{np.mean(losses[-50:]):.3f}", refresh=False)
    return model.eval(), losses


def pitch_scores(model: Recogniser, truth: Truth) -> dict[str, float]:
    """F1 of the pitch classes over side-by-side windows, and that of always saying all twelve."""
    n, right = model.config.window_steps, np.zeros(3)
    everything = np.zeros(3)
    for first, end in zip(truth.first[:-1], truth.first[1:], strict=True):
        starts = np.arange(first, end - n + 1, n)
        if not len(starts):
            continue
        levels, sounding = truth.windows(starts, n)
        true, said = sounding.bool(), model.hear(levels).pitch_classes > 0.5
        right += [int((said & true).sum()), int(said.sum()), int(true.sum())]
        everything += [int(true.sum()), true.numel(), int(true.sum())]
    return {
        "pitch_f1": float(2 * right[0] / (right[1] + right[2])),
        "pitch_f1_all": float(2 * everything[0] / (everything[1] + everything[2])),
    }


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the command's arguments."""
    pretrained = Path("data/pretrained")
    parser.add_argument("--data", type=Path, default=Path("data/corpus"), help="a built corpus")
    parser.add_argument("--cache", type=Path, default=DEFAULT_CACHE, help="parsed scores")
    parser.add_argument("--out", type=Path, default=pretrained / "recogniser.safetensors")
    parser.add_argument("--codec", type=Path, help="also measure its hearing after this codec")
    parser.add_argument("--steps", type=int, default=FitPlan.steps, help="optimiser steps")
    parser.add_argument("--batch", type=int, default=FitPlan.batch, help="windows a step")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, help="of torch")
    parser.add_argument("--measure", action="store_true", help="do not fit, measure --out again")


def main(args: argparse.Namespace) -> int:
    """Fit, measure on held-out pieces, save with a model card beside it."""
    if args.steps < 1 or args.batch < 1 or (args.threads or 1) < 1:
        raise LmdError("--steps, --batch or --threads below 1", "at least 1", "Raise them.")
    check_file_free(args.out)
    if args.threads:
        torch.set_num_threads(args.threads)
    tune_allocator()
    if args.measure:
        model, header = load_recogniser(args.out)
        notes = dict(header.notes)
    else:
        model, notes = fit_command(args)
        save(model, notes, args.out)
    notes["scores"] = measure(model, args)
    save(model, notes, args.out)
    text = card(args.out)
    write_atomic(args.out.with_suffix(".md"), text.encode())
    print(text)
    return 0


def save(model: Recogniser, notes: dict[str, Any], path: Path) -> None:
    """Write the weights in float16 with what is known about them."""
    save_checkpoint(
        path,
        model.state_dict(),
        kind="recogniser",
        config=model.config,
        notes=notes,
        stored="float16",
    )


def fit_command(args: argparse.Namespace) -> tuple[Recogniser, dict[str, Any]]:
    """The fitted model and what the file will say about it."""
    corpus = Corpus(args.data, "train")
    truth = read_truth(corpus, args.cache)
    plan = FitPlan(steps=args.steps, batch=args.batch, seed=args.seed)
    began = time.perf_counter()
    config = RecogniserConfig(tuple(FAMILIES), sample_rate=corpus.sample_rate)
    model, losses = fit(truth, plan, config)
    eighth = max(1, len(losses) // 8)
    return model.requires_grad_(False), {
        "plan": asdict(plan),
        "seconds": round(time.perf_counter() - began, 1),
        "losses": [float(np.mean(losses[i : i + eighth])) for i in range(0, len(losses), eighth)],
        "n_weights": sum(p.numel() for p in model.parameters()),
        "machine": machine_dict(),
        "data": {"renditions": len(corpus), "hours": round(corpus.duration_s / 3600, 2)},
        "command": f"python -m lmd train recogniser --steps {args.steps} --batch {args.batch} "
        f"--seed {args.seed}",
    }


def measure(model: Recogniser, args: argparse.Namespace) -> dict[str, dict[str, float]]:
    """Scores on validation and test pieces, and after the codec."""
    codecs: dict[str, Codec | None] = {"as rendered": None}
    if args.codec:
        codecs[f"after the codec {read_header(args.codec).sha256[:8]}"] = load_codec(args.codec)
    corpora = [Corpus(args.data, split) for split in ("validation", "test")]
    scores = {}
    for name, codec in codecs.items():
        heard: list[tuple[Row, Heard]] = []
        for corpus in corpora:
            heard += pieces(model, corpus, codec)
        scores[name] = hearing(heard, model)
    truths = [read_truth(corpus, args.cache) for corpus in corpora]
    counted = [pitch_scores(model, truth) for truth in truths]
    for key in counted[0]:
        scores["as rendered"][key] = float(np.mean([score[key] for score in counted]))
    return scores
