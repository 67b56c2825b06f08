"""`python -m lmd evaluate`: measure what the weights play, beside real music.

    python -m lmd evaluate --quick
    python -m lmd evaluate --out outputs/published

Every finished part is kept under --parts: a run that was stopped goes on where it was, and weights
that arrive later add their rows. What is missing is named, not invented.
"""

import gc
import hashlib
import json
import math
import os
import sys
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict
from functools import cache, cached_property, partial
from multiprocessing import get_context
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from lmd.checkpoint import load_codec, read_header
from lmd.corpus.manifest import MANIFEST, Corpus
from lmd.corpus.scores import Split
from lmd.errors import LmdError
from lmd.evaluation.clips import (
    Clip,
    Waves,
    choose_rows,
    cut_clips,
    generate,
    of_one_family,
    through_codec,
)
from lmd.evaluation.metrics import Gaussian, gaussian
from lmd.evaluation.plan import BIN_S, Options, Unit, units_of
from lmd.evaluation.report import write_report
from lmd.evaluation.summary import ClipMetrics, Measures, Truth, anchor_rows, drift_row, row_of
from lmd.evaluation.tagger import load_tagger
from lmd.machine import hardware, machine_dict, tune_allocator
from lmd.outputs import check_apart, check_folder, check_outputs
from lmd.pretrained import Instrument, open_instrument

VERSION = 5  # of what is generated, how it is measured and how lines are made of that
ANCHORS = ("real", "context", "codec", "shuffled")
LONG_ANCHORS = ("real", "codec", "shuffled")
MADE_ON = "made_on"  # in a part: the hardware
CONTEXT_FRAMES = 192  # that a primed stream continues
REBUILD = "Evaluate with a rendered corpus: python -m lmd data build --hours H"


def main(options: Options) -> int:
    """Measure everything there are weights for; write JSON, tables and figures."""
    for name in ("threads", "workers"):
        if (value := getattr(options, name)) is not None and value < 1:
            raise LmdError(f"--{name} {value}", "at least 1", "Raise it.")
    check_apart(out=options.out, parts=options.parts)
    check_folder(options.parts)
    check_outputs(json=options.out / "evaluation.json", json_key="rows", make_folders=True)
    if options.threads:
        torch.set_num_threads(options.threads)
    tune_allocator()
    print(write_report(evaluate(Evaluation(options)), options.out))
    return 0


class Evaluation:
    """What every line needs, and the lines. Parts are made once and kept on disk.

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
        if unknown := {rows[k].family for k in of_one_family(rows)} - set(self.families):
            found = f"{options.data} with test pieces played by {', '.join(sorted(unknown))}"
            expected = f"families that the tagger knows: {', '.join(self.families)}"
            raise LmdError(found, expected, f"{REBUILD}.")
        codec_path = options.weights / "codec.safetensors"
        if options.random:
            self.codec = open_instrument(f"random:{options.random}:0", device="cpu").streamer.codec
        else:
            self.codec = load_codec(codec_path)
        rate, hop = self.codec.sample_rate, self.codec.samples_per_frame
        self.metrics = ClipMetrics(self.tagger, rate)
        if self.corpus.sample_rate != rate:
            found = f"a corpus at {self.corpus.sample_rate} Hz"
            raise LmdError(found, f"{rate} Hz, the codec's", f"{REBUILD} --sample-rate {rate}.")
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

    def kept(self, name: str, make: Callable[[], Measures]) -> Measures:
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

    def measured(self, name: str, make: Callable[[], Waves], is_long: bool) -> Measures:
        """The part that has the measures of some clips or long streams."""

        def measure() -> Measures:
            if is_long:
                return self.metrics.over_time(make(), self.other_pieces, BIN_S)
            return self.metrics.measure(make(), self.boundaries)

        return self.kept(name, measure)

    def sha256(self, kind: str) -> str:
        """That of the weights of a kind; "" where there are none."""
        if self.options.random:
            return f"random-{self.options.random}"
        path = self.options.weights / f"{kind}.safetensors"
        return read_header(path).sha256 if path.is_file() else ""

    def instrument(self, kind: str) -> Instrument:
        """The weights of a kind, one kind in memory at a time."""
        options = self.options
        source = f"random:{options.random}:0" if options.random else f"{options.weights}:{kind}"
        if source not in self._opened:
            how = {"dtype": options.dtype, "engine": options.chosen_engine}
            self._opened = {source: open_instrument(source, device=options.device, **how)}
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

        def embed() -> Measures:
            corpus, found = Corpus(self.options.data, split), []
            for index in tqdm(of_one_family(corpus.rows), desc=f"{split} pieces", mininterval=2):
                row = corpus.rows[index]
                n = min(row.n_samples, round(self.budget.reference_s * row.sample_rate))
                wave = corpus.wave(index, (row.n_samples - n) // 2, n)
                found.append(self.metrics.tags(torch.from_numpy(wave).mean(0)).embedding.numpy())
            if not found:
                raise LmdError(f"no {split} piece played by one family", "some", f"{REBUILD}.")
            return {"embedding": np.concatenate(found)}

        return self.kept(f"reference-{split}", embed)["embedding"]

    @cached_property
    def reference_points(self) -> np.ndarray:
        """All held-out music of one family each, as the prompts are: both splits together."""
        return np.concatenate([self.held_out("validation"), self.held_out("test")])

    @cached_property
    def other_pieces(self) -> Gaussian:
        """Held-out music of other pieces than the prompts', which long streams are held against.

        They are compared a window at a time: real music must not be in its own reference.
        """
        return gaussian(self.held_out("validation"))

    def anchor(self, name: str, seed: int, is_long: bool = False) -> Measures:
        """One of `ANCHORS`, or of `LONG_ANCHORS`: context and continuation as a long stream."""

        def waves() -> Waves:
            clips = self.clips(seed)
            found = torch.stack([c.context if name == "context" else c.real for c in clips])
            if is_long:
                found = torch.cat([torch.stack([c.context for c in clips]), found], dim=1)
            if name in ("codec", "shuffled"):
                return through_codec(self.codec, found, seed if name == "shuffled" else None)
            return found

        return self.measured(f"{'drift-' * is_long}{name}-{seed}", waves, is_long)

    # --- generated music ---------------------------------------------------------------------

    def part(self, unit: Unit, seed: int) -> Measures:
        """The measures of what a unit plays in one seed."""
        method, budget, is_long = unit.method, self.budget, unit.kind == "drift"
        controls = unit.controls(budget, seed, self.options.cfg_scale)

        def waves() -> Waves:
            streamer = self.instrument(method.weights).streamer
            if is_long:
                rows = [self.corpus.rows[k] for k in self.chosen(budget.drift_clips, seed)]
                n_samples = round(budget.drift_s * self.codec.sample_rate)
                block = budget.block_frames * self.codec.samples_per_frame
                n_blocks = math.ceil(n_samples / block) + 1  # the decoder holds frames back
                prompts = [row.caption for row in rows]
                return generate(streamer, prompts, controls, n_blocks)[:, :n_samples]
            clips = self.clips(seed)
            contexts = [clip.context for clip in clips] if unit.kind == "primed" else []
            prompts = [clip.row.caption for clip in clips]
            return generate(streamer, prompts, controls, budget.n_blocks, contexts)

        engine, dtype = self.options.chosen_engine, self.options.dtype
        how = f"{controls.n_steps}-{controls.sampler}-cfg{controls.cfg_scale:g}"
        how += f"-{engine}-{dtype}" * ((engine, dtype) != ("torch", "float32"))
        size = f"-{budget.drift_s:g}s-{budget.drift_clips}" * is_long
        name = f"{method.name}-{self.sha256(method.weights)[:8]}-{how}-{unit.kind}{size}-{seed}"
        return self.measured(name, waves, is_long)

    def line(self, unit: Unit) -> dict[str, Any]:
        """A unit's line, without timings."""
        seeds, method = range(unit.n_seeds(self.budget)), unit.method
        parts = [self.part(unit, seed) for seed in seeds]
        line: dict[str, Any] = {"method": method.name, "n_steps": unit.n_steps}
        if unit.kind == "drift":
            return line | drift_row(parts, BIN_S)
        line |= {
            "weights": method.weights,
            "sha256": self.sha256(method.weights),
            "sampler": method.sampler,
            "cfg_scale": unit.controls(self.budget, 0, self.options.cfg_scale).cfg_scale,
            "primed": unit.kind == "primed",
        }
        return line | row_of(parts, [self.truth(k) for k in seeds], gaussian(self.reference_points))


def evaluate(evaluation: Evaluation) -> dict[str, Any]:
    """Everything as plain values, ready for JSON; what was left out is in `not_measured`."""
    options, budget, corpus = evaluation.options, evaluation.budget, Corpus(evaluation.options.data)
    seeds, methods = range(budget.n_seeds), options.chosen_methods
    present = [method for method in methods if evaluation.sha256(method.weights)]
    kinds = sorted({method.weights for method in methods if method not in present})
    absent = [f"{kind}: no such weights" for kind in kinds]
    absent += [f"{m.name}: not asked for" for m in budget.methods if m not in methods]
    units = [unit for method in present for unit in units_of(method, budget)]
    if options.workers > 1:
        make_parts(evaluation, units)
    shown = tqdm(ANCHORS, desc="real music", mininterval=2)
    anchors = {name: [evaluation.anchor(name, seed) for seed in seeds] for name in shown}
    truths, reference = [evaluation.truth(k) for k in seeds], gaussian(evaluation.reference_points)
    long_anchors = {
        name: [evaluation.anchor(name, k, is_long=True) for k in range(budget.drift_seeds)]
        for name in tqdm(LONG_ANCHORS, desc="real streams", mininterval=2)
    }
    lines = [(unit.kind, evaluation.line(unit)) for unit in tqdm(units, desc="rows and streams")]
    used = {index for seed in seeds for index in evaluation.chosen(budget.n_clips, seed)}
    return {
        "budget": asdict(budget),
        "version": VERSION,
        "machine": machine_dict(),
        "engine": options.chosen_engine,
        "dtype": options.dtype,
        "tagger": {
            "sha256": evaluation.tagger_header.sha256,
            "embedding": evaluation.tagger.config.embedding,
        },
        "random_weights": bool(options.random),
        "reference_windows": len(evaluation.reference_points),
        "prompts": {
            "renditions": len(used),
            "pieces": len({evaluation.corpus.rows[index].piece_id for index in used}),
        },
        "corpus_hours": corpus.duration_s / 3600,
        "corpus_asked_hours": corpus.settings().get("hours"),
        "clip_s": evaluation.n_samples / evaluation.codec.sample_rate,
        "anchors": anchor_rows(anchors, truths, reference),
        "drift_anchors": {name: drift_row(parts, BIN_S) for name, parts in long_anchors.items()},
        "made_on": sorted(evaluation.made_on),
        "rows": [line for kind, line in lines if kind != "drift"],
        "drift": [line for kind, line in lines if kind == "drift"],
        "not_measured": absent,
    }


def make_parts(evaluation: Evaluation, units: list[Unit]) -> None:
    """Leave all parts of units and anchors on disk, by processes of one thread each."""
    options, budget = evaluation.options, evaluation.budget
    first = [("held_out", "validation"), ("held_out", "test")]  # others need them
    then = [("anchor", name, k) for name in ANCHORS for k in range(budget.n_seeds)]
    then += [("anchor", name, k, True) for name in LONG_ANCHORS for k in range(budget.drift_seeds)]
    then += [("part", unit, k) for unit in units for k in range(unit.n_seeds(budget))]
    for kind in {unit.method.weights for unit in units}:
        evaluation.instrument(kind)  # graphs that are not there yet are exported once
    with ProcessPoolExecutor(options.workers, get_context("spawn")) as pool:
        for jobs in (first, then):
            made = pool.map(partial(_make, options), jobs)
            list(tqdm(made, total=len(jobs), desc="parts", mininterval=2))


def _make(options: Options, job: tuple[Any, ...]) -> None:
    """Call the method of this process's evaluation that a job names."""
    name, *arguments = job
    getattr(_evaluation(options), name)(*arguments)


@cache
def _evaluation(options: Options) -> Evaluation:
    gc.freeze()  # what was imported; the process then ends seconds sooner
    torch.set_num_threads(1)
    sys.stderr = open(os.devnull, "w")  # noqa: SIM115  # bars of several processes would mix
    return Evaluation(options)
