"""Units of an evaluation: each is made once, kept on disk, and put into rows."""

import hashlib
import json
import math
import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from lmd.checkpoint import load_codec, read_header
from lmd.codec.base import Codec
from lmd.corpus.manifest import MANIFEST, Corpus
from lmd.corpus.scores import Split
from lmd.errors import LmdError
from lmd.evaluation.clip_metrics import OTHER, Judge, Measured, Waves, drift, others_in
from lmd.evaluation.generation import (
    Budget,
    Clip,
    Method,
    choose_rows,
    controls_for,
    cut_clips,
    decoded,
    fade_prompts,
    generate,
    long_stream,
    measure_speed,
    of_one_family,
)
from lmd.evaluation.metrics import Gaussian, gaussian, mean_interval
from lmd.evaluation.other_listeners import open_listeners
from lmd.evaluation.rows import Reference, Truths, row_of
from lmd.evaluation.tagger import load_recogniser
from lmd.machine import hardware, machine_dict
from lmd.pretrained import CFG_SCALE, Instrument, open_instrument
from lmd.stream.controls import Controls

PARTS = 3  # version of what is generated and how it is measured
VERSION = 4  # of how lines are made of that
HELD_OUT: tuple[Split, ...] = ("validation", "test")
MADE_ON = "made_on"  # in a part: the hardware
BIN_S = 10.0
FADE_BLOCKS = 12
FADES = 4
CONTEXT_FRAMES = 192  # that a primed stream hears first
SPEED_REPEATS = 3
TIMINGS = ("ttff_ms", "dit_ms", "decode_ms", "rtf")


class OutOfTime(Exception):
    """A unit was not begun, for the time that was given is over."""


class Parts:
    """Finished units on disk, under a key of everything that they depend on.

    Attributes:
        until_s: no unit is begun after this moment of `time.monotonic`.
        made_on: the hardware of the units that were asked for.
    """

    def __init__(self, folder: Path, key: Mapping[str, Any]) -> None:
        self.until_s, self.made_on = math.inf, set[str]()
        text = json.dumps(key, sort_keys=True)
        self.folder = folder / hashlib.sha256(text.encode()).hexdigest()[:12]
        self.folder.mkdir(parents=True, exist_ok=True)
        (self.folder / "key.json").write_text(text + "\n")

    def arrays(
        self, name: str, make: Callable[[], Mapping[str, np.ndarray]]
    ) -> dict[str, np.ndarray]:
        """The unit of that name, made now if it is not there.

        Raises:
            OutOfTime: it is not there, and there is no time left to make it.
        """
        path = self.folder / f"{name}.npz"
        if not path.is_file():
            if time.monotonic() > self.until_s:
                raise OutOfTime(name)
            unfinished = path.with_suffix(f".part-{os.getpid()}.npz")  # others may make it, too
            np.savez(unfinished, **make(), **{MADE_ON: np.array(hardware(machine_dict()))})
            unfinished.replace(path)
        with np.load(path) as file:
            kept = dict(file)
        self.made_on.add(str(kept.pop(MADE_ON)))
        return kept


@dataclass(frozen=True)
class Sources:
    """Where an evaluation finds things.

    Attributes:
        weights: folder of the weights.
        data: a built corpus.
        recogniser: file of the listener.
        parts: where finished units are kept.
        random: a preset's name: random weights of it are measured (a test of the machinery).
        device: where music is made; it is measured on the CPU.
    """

    weights: Path
    data: Path
    recogniser: Path
    parts: Path
    random: str = ""
    device: str = "auto"


class Evaluation:
    """One evaluation: what every line needs, and the lines.

    Args:
        sources: where things are.
        budget: how much is made.
        cfg_scale: guidance of the weights that are not ARC-Forced.

    Raises:
        LmdError: something is missing, or does not fit.
    """

    def __init__(self, sources: Sources, budget: Budget, cfg_scale: float = CFG_SCALE) -> None:
        self.sources, self.budget, self.cfg_scale = sources, budget, cfg_scale
        self.listener, self.listener_header = load_recogniser(sources.recogniser)
        self.corpus = Corpus(self.sources.data, "test")
        self._check_families()
        self.codec = self._codec()
        listeners, self.listener_words = open_listeners()
        self.judge = Judge(self.listener, self.codec.sample_rate, listeners)
        if self.corpus.sample_rate != self.codec.sample_rate:
            raise LmdError(
                f"a corpus at {self.corpus.sample_rate} Hz",
                f"{self.codec.sample_rate} Hz, the codec's rate",
                f"Build it again with --sample-rate {self.codec.sample_rate}.",
            )
        hop = self.codec.samples_per_frame
        block = budget.block_frames * hop
        self.n_samples = budget.n_blocks * block - self.codec.lookahead_frames * hop
        self.joins = [k * block for k in range(1, budget.n_blocks)]
        self.context_samples = CONTEXT_FRAMES * hop
        self.shortest_s = (self.context_samples + self.n_samples) / self.codec.sample_rate
        self.parts = Parts(self.sources.parts, self._key())
        self._instrument: tuple[str, Instrument] | None = None

    def _check_families(self) -> None:
        """Refuse pieces of which the listener cannot say whether it hears what was asked for."""
        rows, known = self.corpus.rows, self.listener.config.families
        unknown = {rows[index].family for index in of_one_family(rows)} - set(known)
        if unknown:
            raise LmdError(
                f"{self.sources.data} with test pieces played by {', '.join(sorted(unknown))}",
                f"families that the listener knows: {', '.join(known)}",
                "Evaluate with a rendered corpus: python -m lmd data build --hours H.",
            )

    def _codec(self) -> Codec:
        """The codec whose floor is measured."""
        if self.sources.random:
            return open_instrument(f"random:{self.sources.random}:0", device="cpu").streamer.codec
        return load_codec(self.sources.weights / "codec.safetensors")

    def _key(self) -> dict[str, Any]:
        codec = (
            self.sources.random or read_header(self.sources.weights / "codec.safetensors").sha256
        )
        manifest = hashlib.sha256((self.sources.data / MANIFEST).read_bytes()).hexdigest()
        return {
            "version": PARTS,
            "clips": self.budget.n_clips,
            "blocks": [self.budget.n_blocks, self.budget.block_frames],
            "reference_s": self.budget.reference_s,
            "codec": codec,
            "recogniser": self.listener_header.sha256,
            "corpus": manifest,
            "listeners": sorted(self.judge.listeners),
        }

    def source(self, kind: str) -> tuple[str, str]:
        """How to open the weights of a kind, and their SHA-256; ("", "") where there are none."""
        if self.sources.random:
            return f"random:{self.sources.random}:0", f"random-{self.sources.random}"
        path = self.sources.weights / f"{kind}.safetensors"
        if not path.is_file():
            return "", ""
        return f"{self.sources.weights}:{kind}", read_header(path).sha256

    def instrument(self, kind: str) -> Instrument:
        """The weights of a kind, one kind in memory at a time."""
        source, _ = self.source(kind)
        if self._instrument is None or self._instrument[0] != source:
            self._instrument = (source, open_instrument(source, device=self.sources.device))
        return self._instrument[1]

    def chosen(self, n: int, seed: int) -> list[int]:
        """The held-out rows that a seed's prompts come from."""
        return choose_rows(self.corpus.rows, n, self.shortest_s, seed)

    def clips(self, seed: int) -> list[Clip]:
        """The prompts, contexts and continuations of a seed."""
        chosen = self.chosen(self.budget.n_clips, seed)
        return cut_clips(self.corpus, chosen, self.context_samples, self.n_samples, seed)

    def prompts(self) -> dict[str, int]:
        """How many renditions the prompts of all seeds come from, and of how many pieces."""
        seeds = range(self.budget.n_seeds)
        used = {index for seed in seeds for index in self.chosen(self.budget.n_clips, seed)}
        pieces = {self.corpus.rows[index].piece_id for index in used}
        return {"renditions": len(used), "pieces": len(pieces)}

    @cached_property
    def truths(self) -> list[Truths]:
        """What is known about the clips of each seed, real music's measures among it."""
        found = []
        for seed in range(self.budget.n_seeds):
            clips, real = self.clips(seed), self.real(seed)
            rows = [clip.row for clip in clips]
            found.append(
                Truths(
                    family=np.array([self.listener.config.families.index(r.family) for r in rows]),
                    tempo_range=np.array([clip.tempo_range for clip in clips]),
                    names_bpm=np.array([clip.names_bpm for clip in clips]),
                    real=real,
                    texts={
                        name: listener.read([row.caption for row in rows])
                        for name, listener in self.judge.listeners.items()
                        if listener.read is not None
                    },
                )
            )
        return found

    def real(self, seed: int) -> Measured:
        """How the pieces of a seed's clips really go on."""
        return self.measured(f"real-{seed}", lambda: real_waves(self.clips(seed)))

    def measured(self, name: str, make: Callable[[], torch.Tensor]) -> Measured:
        """All measures of the waves that `make` returns; kept on disk."""
        return Measured.from_arrays(
            self.parts.arrays(name, lambda: self.judge.measure(make(), self.joins).arrays())
        )

    @cached_property
    def reference(self) -> Reference:
        """All held-out music of one family each, as the prompts are: both splits together."""
        halves = [self.embed_held_out(split) for split in HELD_OUT]
        kept = {name: np.concatenate([half[name] for half in halves]) for name in halves[0]}
        others = {name: gaussian(points) for name, points in others_in(kept).items()}
        points = kept["embedding"]
        return Reference(gaussian(points), len(points), others)

    @cached_property
    def other_pieces(self) -> Gaussian:
        """Held-out music of other pieces than the prompts': what long streams are held against, a
        window at a time, for real music must not be compared with a cloud that it is in."""
        return gaussian(self.embed_held_out("validation")["embedding"])

    def embed_held_out(self, split: Split) -> dict[str, np.ndarray]:
        """The embeddings of a split's music, the recogniser's and other listeners'."""

        def embed() -> dict[str, np.ndarray]:
            found: dict[str, list[np.ndarray]] = {"embedding": []}
            distances = {n: x for n, x in self.judge.listeners.items() if x.kind == "distance"}
            corpus = Corpus(self.sources.data, split)
            chosen = of_one_family(corpus.rows)
            if not chosen:
                raise LmdError(
                    f"no {split} piece played by one family",
                    "some, to be compared with",
                    "Build more hours: python -m lmd data build --hours H.",
                )
            for index in tqdm(chosen, desc=f"{split} pieces", mininterval=2):
                row = corpus.rows[index]
                n = min(row.n_samples, round(self.budget.reference_s * row.sample_rate))
                start = (row.n_samples - n) // 2
                wave = torch.from_numpy(corpus.wave(index, start, n)).mean(0)
                found["embedding"].append(self.judge.embed(wave)[0])
                for name, listener in distances.items():
                    heard = listener.hear(wave, row.sample_rate)
                    found.setdefault(f"{OTHER}{name}", []).append(heard)
            return {name: np.concatenate(parts) for name, parts in found.items()}

        return self.parts.arrays(f"reference-{split}", embed)

    def anchors(self) -> dict[str, list[Measured]]:
        """Real music's own context, the codec's floor, and frames in random order; per seed."""
        shown = tqdm(range(self.budget.n_seeds), desc="real music", mininterval=2)
        seeds = [self.anchors_of(seed) for seed in shown]
        return {name: [one[name] for one in seeds] for name in seeds[0]}

    def anchors_of(self, seed: int) -> dict[str, Measured]:
        """`anchors` of one seed."""
        clips = self.clips(seed)
        waves = {
            "context": lambda: torch.stack([clip.context for clip in clips]),
            "codec": lambda: decoded(self.codec, real_waves(clips)),
            "shuffled": lambda: decoded(self.codec, real_waves(clips), seed),
        }
        return {name: self.measured(f"{name}-{seed}", make) for name, make in waves.items()}

    def line(self, method: Method, n_steps: int, primed: bool, sha256: str) -> dict[str, Any]:
        """What a line of the table is called: all that its measures depend on."""
        controls = controls_for(method, n_steps, self.budget, 0, self.cfg_scale)
        return {
            "method": method.name,
            "weights": method.weights,
            "sha256": sha256,
            "n_steps": n_steps,
            "sampler": method.sampler,
            "cfg_scale": controls.cfg_scale,
            "primed": primed,
        }

    def row(self, method: Method, n_steps: int, primed: bool, sha256: str) -> dict[str, Any]:
        """One line of the table, without its timings."""
        n_seeds = self.budget.seeds_of(method, n_steps, primed)
        seeds = [self.row_of_seed(method, n_steps, primed, sha256, k) for k in range(n_seeds)]
        line = self.line(method, n_steps, primed, sha256)
        return {**line, **row_of(seeds, self.truths[:n_seeds], self.reference)}

    def row_of_seed(
        self, method: Method, n_steps: int, primed: bool, sha256: str, seed: int
    ) -> Measured:
        """The clips of one seed that go into a line of the table."""
        controls = controls_for(method, n_steps, self.budget, seed, self.cfg_scale)

        def play() -> Waves:
            streamer = self.instrument(method.weights).streamer
            return generate(streamer, self.clips(seed), controls, self.budget.n_blocks, primed)

        begins = "primed" if primed else "silence"
        return self.measured(f"{part_name(method, sha256, controls)}-{begins}-{seed}", play)

    def speed(self, method: Method, n_steps: int) -> dict[str, Any]:
        """Timings of a method, one stream alone, with intervals over repetitions; never kept.

        Raises:
            OutOfTime: there is no time left to take them.
        """
        controls = controls_for(method, n_steps, self.budget, 0, self.cfg_scale)

        if time.monotonic() > self.parts.until_s:
            raise OutOfTime(f"timings of {method.name}")
        streamer, n = self.instrument(method.weights).streamer, self.budget.speed_blocks
        found = [measure_speed(streamer, controls, n) for _ in range(SPEED_REPEATS)]
        return {
            "evaluations": int(found[0]["evaluations"]),
            "load": max(one["load"] for one in found),
            **{each: asdict(mean_interval([one[each] for one in found])) for each in TIMINGS},
        }

    def drift(self, method: Method, sha256: str, n_steps: int) -> list[dict[str, np.ndarray]]:
        """Long streams of a method, measured every ten seconds, per seed."""
        seeds = range(self.budget.drift_seeds)
        return [self.drift_of_seed(method, sha256, n_steps, seed) for seed in seeds]

    def drift_of_seed(
        self, method: Method, sha256: str, n_steps: int, seed: int
    ) -> dict[str, np.ndarray]:
        """The long streams of one seed."""
        budget = self.budget
        controls = controls_for(method, n_steps, budget, seed, self.cfg_scale)
        prompts = [self.corpus.rows[i].caption for i in self.chosen(budget.drift_clips, seed)]

        def follow() -> dict[str, np.ndarray]:
            streamer = self.instrument(method.weights).streamer
            waves = long_stream(streamer, prompts, controls, budget.drift_s)
            return drift(self.judge, waves, self.other_pieces, BIN_S)

        name = f"drift-{part_name(method, sha256, controls)}"
        size = f"{budget.drift_s:g}s-{budget.drift_clips}"
        return self.parts.arrays(f"{name}-{size}-{seed}", follow)

    def drift_anchors(self) -> dict[str, list[dict[str, np.ndarray]]]:
        """What long streams are read against, measured as they are: real music before and through
        the codec, and frames in random order; per seed."""
        shown = tqdm(range(self.budget.drift_seeds), desc="real streams", mininterval=2)
        seeds = [self.drift_anchors_of(seed) for seed in shown]
        return {name: [one[name] for one in seeds] for name in seeds[0]}

    def drift_anchors_of(self, seed: int) -> dict[str, dict[str, np.ndarray]]:
        """`drift_anchors` of one seed."""
        waves = torch.stack([torch.cat([c.context, c.real]) for c in self.clips(seed)])
        makes = {
            "real": lambda: waves,
            "codec": lambda: decoded(self.codec, waves),
            "shuffled": lambda: decoded(self.codec, waves, seed),
        }

        def follow(make: Callable[[], Waves]) -> dict[str, np.ndarray]:
            return drift(self.judge, make(), self.other_pieces, BIN_S)

        return {
            name: self.parts.arrays(f"drift-{name}-{seed}", partial(follow, make))
            for name, make in makes.items()
        }

    def fade(self, method: Method, sha256: str) -> dict[str, Any]:
        """How the recogniser's belief goes from the first prompt's family to the second's."""
        pairs = pairs_of(self.clips(0))[:FADES]
        n_steps = self.budget.drift_steps[0]
        controls = controls_for(method, n_steps, self.budget, 0, self.cfg_scale)

        def follow() -> dict[str, np.ndarray]:
            captions = [(a.row.caption, b.row.caption) for a, b in pairs]
            streamer = self.instrument(method.weights).streamer
            waves, weights = fade_prompts(streamer, captions, controls, FADE_BLOCKS)
            beliefs = []
            for wave, pair in zip(waves, pairs, strict=True):
                family = self.judge.families_over_time(wave)
                index = [self.listener.config.families.index(clip.row.family) for clip in pair]
                beliefs.append(family[:, index])
            return {"belief": np.array(beliefs), "weights": np.array(weights)}

        name = f"fade-{part_name(method, sha256, controls)}"
        kept = self.parts.arrays(name, follow)
        block_s = self.budget.block_frames * self.codec.samples_per_frame / self.codec.sample_rate
        return {
            "method": method.name,
            "n_steps": controls.n_steps,
            "pairs": [[clip.row.family for clip in pair] for pair in pairs],
            "block_s": block_s,
            "window_s": self.judge.window_s,
            **{key: value.tolist() for key, value in kept.items()},
        }


def part_name(method: Method, sha256: str, controls: Controls) -> str:
    """Of a unit: everything about the playing that its measures depend on."""
    how = f"{controls.n_steps}-{controls.sampler}-cfg{controls.cfg_scale:g}"
    return f"{method.name}-{sha256[:8]}-{how}"


def pairs_of(clips: Sequence[Clip]) -> list[tuple[Clip, Clip]]:
    """Each clip with the next that is free and of another family."""
    pairs, free = [], list(clips)
    while free:
        first = free.pop(0)
        second = next((clip for clip in free if clip.row.family != first.row.family), None)
        if second is not None:
            free.remove(second)
            pairs.append((first, second))
    return pairs


def real_waves(clips: list[Clip]) -> Waves:
    """How the clips really go on."""
    return torch.stack([clip.real for clip in clips])
