"""The parts of an evaluation: each is made once, kept on disk, and put into lines."""

import hashlib
import json
import os
from collections.abc import Callable, Mapping
from functools import cached_property
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from lmd.checkpoint import load_codec, read_header
from lmd.corpus.manifest import MANIFEST, Corpus
from lmd.corpus.scores import Split
from lmd.errors import LmdError
from lmd.evaluation.clip_metrics import ClipMetrics, Measures
from lmd.evaluation.clips import (
    Clip,
    Waves,
    choose_rows,
    cut_clips,
    generate,
    long_stream,
    of_one_family,
    through_codec,
)
from lmd.evaluation.metrics import Gaussian, gaussian
from lmd.evaluation.plan import BIN_S, Options, Unit
from lmd.evaluation.summary import Truth, drift_row, row_of
from lmd.evaluation.tagger import load_tagger
from lmd.machine import hardware, machine_dict
from lmd.pretrained import Instrument, open_instrument

VERSION = 5  # of what is generated, how it is measured and how lines are made of that
HELD_OUT: tuple[Split, ...] = ("validation", "test")
ANCHORS = ("real", "context", "codec", "shuffled")
LONG_ANCHORS = ("real", "codec", "shuffled")
MADE_ON = "made_on"  # in a part: the hardware
CONTEXT_FRAMES = 192  # that a primed stream continues


class Evaluation:
    """What every line needs, and the lines.

    Raises:
        LmdError: something is missing, or does not fit.
    """

    def __init__(self, options: Options) -> None:
        self.options, self.budget = options, options.sizes
        self._opened: dict[str, Instrument] = {}
        path = options.tagger or options.weights / "tagger.safetensors"
        self.tagger, self.tagger_header = load_tagger(path)
        self.families = self.tagger.config.families
        self.corpus = Corpus(options.data, "test")
        rows = self.corpus.rows
        unknown = {rows[index].family for index in of_one_family(rows)} - set(self.families)
        if unknown:
            raise LmdError(
                f"{options.data} with test pieces played by {', '.join(sorted(unknown))}",
                f"families that the tagger knows: {', '.join(self.families)}",
                "Evaluate with a rendered corpus: python -m lmd data build --hours H.",
            )
        codec_path = options.weights / "codec.safetensors"
        if options.random:
            instrument = open_instrument(f"random:{options.random}:0", device="cpu")
            self.codec = instrument.streamer.codec
        else:
            self.codec = load_codec(codec_path)
        rate, hop = self.codec.sample_rate, self.codec.samples_per_frame
        self.metrics = ClipMetrics(self.tagger, rate)
        if self.corpus.sample_rate != rate:
            raise LmdError(
                f"a corpus at {self.corpus.sample_rate} Hz",
                f"{rate} Hz, the codec's rate",
                f"Build it again with --sample-rate {rate}.",
            )
        block = self.budget.block_frames * hop
        self.n_samples = self.budget.n_blocks * block - self.codec.lookahead_frames * hop
        self.boundaries = [k * block for k in range(1, self.budget.n_blocks)]
        self.context_samples = CONTEXT_FRAMES * hop
        key = {
            "version": VERSION,
            "clips": self.budget.n_clips,
            "blocks": [self.budget.n_blocks, self.budget.block_frames],
            "reference_s": self.budget.reference_s,
            "codec": options.random or read_header(codec_path).sha256,
            "tagger": self.tagger_header.sha256,
            "corpus": hashlib.sha256((options.data / MANIFEST).read_bytes()).hexdigest(),
        }
        text = json.dumps(key, sort_keys=True)
        self.parts = options.parts / hashlib.sha256(text.encode()).hexdigest()[:12]
        self.parts.mkdir(parents=True, exist_ok=True)
        (self.parts / "key.json").write_text(text + "\n")
        self.made_on: set[str] = set()  # the hardware of all parts that were asked for

    def kept(self, name: str, make: Callable[[], Mapping[str, Any]]) -> Measures:
        """The part of that name, made now if it is not on disk."""
        path = self.parts / f"{name}.npz"
        if not path.is_file():
            unfinished = path.with_suffix(f".part-{os.getpid()}.npz")  # others may make it, too
            np.savez(unfinished, **make(), **{MADE_ON: np.array(hardware(machine_dict()))})
            unfinished.replace(path)
        with np.load(path) as file:
            arrays = dict(file)
        self.made_on.add(str(arrays.pop(MADE_ON)))
        return arrays

    # --- weights -----------------------------------------------------------------------------

    def sha256(self, kind: str) -> str:
        """That of the weights of a kind; "" where there are none."""
        if self.options.random:
            return f"random-{self.options.random}"
        path = self.options.weights / f"{kind}.safetensors"
        return read_header(path).sha256 if path.is_file() else ""

    def instrument(self, kind: str) -> Instrument:
        """The weights of a kind, one kind in memory at a time."""
        random, weights = self.options.random, self.options.weights
        source = f"random:{random}:0" if random else f"{weights}:{kind}"
        if source not in self._opened:
            self._opened = {source: open_instrument(source, device=self.options.device)}
        return self._opened[source]

    # --- real music --------------------------------------------------------------------------

    def chosen(self, n: int, seed: int) -> list[int]:
        """The held-out rows that a seed's prompts come from."""
        shortest_s = (self.context_samples + self.n_samples) / self.codec.sample_rate
        return choose_rows(self.corpus.rows, n, shortest_s, seed)

    def clips(self, seed: int) -> list[Clip]:
        """The prompts, contexts and continuations of a seed."""
        chosen = self.chosen(self.budget.n_clips, seed)
        return cut_clips(self.corpus, chosen, self.context_samples, self.n_samples, seed)

    def truth(self, seed: int) -> Truth:
        """What is known about the clips of a seed."""
        clips = self.clips(seed)
        return Truth(
            family=np.array([self.families.index(clip.row.family) for clip in clips]),
            tempo_range=np.array([clip.tempo_range for clip in clips]),
            names_bpm=np.array([clip.names_bpm for clip in clips]),
            real_family=self.anchor("real", seed)["family"],
        )

    def held_out(self, split: Split) -> np.ndarray:
        """Embeddings of a split's music `[window, size]`, pieces of one family each."""

        def embed() -> dict[str, np.ndarray]:
            corpus, found = Corpus(self.options.data, split), []
            for index in tqdm(of_one_family(corpus.rows), desc=f"{split} pieces", mininterval=2):
                row = corpus.rows[index]
                n = min(row.n_samples, round(self.budget.reference_s * row.sample_rate))
                wave = corpus.wave(index, (row.n_samples - n) // 2, n)
                found.append(self.metrics.tags(torch.from_numpy(wave).mean(0)).embedding.numpy())
            if not found:
                raise LmdError(
                    f"no {split} piece played by one family",
                    "some, to be compared with",
                    "Build more hours: python -m lmd data build --hours H.",
                )
            return {"embedding": np.concatenate(found)}

        return self.kept(f"reference-{split}", embed)["embedding"]

    @cached_property
    def reference_points(self) -> np.ndarray:
        """All held-out music of one family each, as the prompts are: both splits together."""
        return np.concatenate([self.held_out(split) for split in HELD_OUT])

    @cached_property
    def other_pieces(self) -> Gaussian:
        """Held-out music of other pieces than the prompts', which long streams are held against.

        They are compared a window at a time: real music must not be in its own reference.
        """
        return gaussian(self.held_out("validation"))

    def anchor(self, name: str, seed: int, is_long: bool = False) -> Measures:
        """Real music, its context, what the codec makes of it, and frames in random order.

        Args:
            name: of `ANCHORS`.
            seed: of the clips.
            is_long: measured as long streams are, context and continuation together.
        """

        def measure() -> Measures:
            clips = self.clips(seed)
            waves = torch.stack(
                [clip.context if name == "context" else clip.real for clip in clips]
            )
            if is_long:
                waves = torch.stack([torch.cat([clip.context, clip.real]) for clip in clips])
            if name in ("codec", "shuffled"):
                waves = through_codec(self.codec, waves, seed if name == "shuffled" else None)
            return self._measured(waves, is_long)

        return self.kept(f"{'drift-' * is_long}{name}-{seed}", measure)

    def _measured(self, waves: Waves, is_long: bool) -> Measures:
        if is_long:
            return self.metrics.over_time(waves, self.other_pieces, BIN_S)
        return self.metrics.measure(waves, self.boundaries)

    # --- generated music ---------------------------------------------------------------------

    def part(self, unit: Unit, seed: int) -> Measures:
        """The measures of what a unit plays in one seed."""
        method, budget = unit.method, self.budget
        controls = unit.controls(budget, seed, self.options.cfg_scale)

        def measure() -> Mapping[str, Any]:
            streamer = self.instrument(method.weights).streamer
            if unit.kind == "drift":
                rows = self.chosen(budget.drift_clips, seed)
                prompts = [self.corpus.rows[index].caption for index in rows]
                waves = long_stream(streamer, prompts, controls, budget.drift_s)
                return self._measured(waves, is_long=True)
            clips = self.clips(seed)
            prompts = [clip.row.caption for clip in clips]
            contexts = [clip.context for clip in clips] if unit.kind == "primed" else []
            waves = generate(streamer, prompts, controls, budget.n_blocks, contexts)
            return self._measured(waves, is_long=False)

        how = f"{controls.n_steps}-{controls.sampler}-cfg{controls.cfg_scale:g}"
        size = f"-{budget.drift_s:g}s-{budget.drift_clips}" * (unit.kind == "drift")
        name = f"{method.name}-{self.sha256(method.weights)[:8]}-{how}-{unit.kind}{size}-{seed}"
        return self.kept(name, measure)

    def line(self, unit: Unit) -> dict[str, Any]:
        """A unit's line, without timings."""
        seeds = range(unit.n_seeds(self.budget))
        parts = [self.part(unit, seed) for seed in seeds]
        line: dict[str, Any] = {"method": unit.method.name, "n_steps": unit.n_steps}
        if unit.kind == "drift":
            return line | drift_row(parts, BIN_S)
        controls = unit.controls(self.budget, 0, self.options.cfg_scale)
        line |= {
            "weights": unit.method.weights,
            "sha256": self.sha256(unit.method.weights),
            "sampler": controls.sampler,
            "cfg_scale": controls.cfg_scale,
            "primed": unit.kind == "primed",
        }
        return line | row_of(parts, [self.truth(k) for k in seeds], gaussian(self.reference_points))
