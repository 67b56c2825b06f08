"""What cuts cost in quality: streams that are planned anew every few frames, against uncut ones.

    python tools/measure_commit.py --data CORPUS --json FILE

Clips from silence, to the prompts of held-out pieces. After `commit` frames of every block the rest
is thrown away and another block is made from there, under the same controls; 0 keeps whole blocks.
A picture is drawn beside the JSON.
"""

import argparse
import json
import sys
from collections.abc import Sequence
from itertools import count
from pathlib import Path

import matplotlib.pyplot as plt
import torch

from lmd.errors import LmdError
from lmd.evaluation.clips import PromptedStreamer, Waves
from lmd.evaluation.metrics import gaussian
from lmd.evaluation.plan import Options
from lmd.evaluation.run import Evaluation
from lmd.evaluation.summary import row_of
from lmd.machine import machine_dict
from lmd.outputs import check_outputs, write_json
from lmd.stream.controls import Controls
from lmd.stream.streamer import Streamer

SHOWN = {"fd_infinite": "FD∞", "key_share": "key share", "joins": "joins", "clicks": "clicks"}


def committed(
    streamer: Streamer, prompts: Sequence[str], controls: Controls, n_samples: int, commit: int
) -> tuple[Waves, list[int]]:
    """Streams side by side, cut every `commit` frames; and the samples where they were cut."""
    many = PromptedStreamer(streamer, prompts)
    state, waves, joins = many.start(batch=len(prompts)), [], []
    for _ in count():
        block, following = many.step(state, controls)
        if commit:
            following = many.rewind(state, block, state.n_frames + commit)
        waves.append(block.wave[..., : following.n_samples - state.n_samples].mean(1))
        state = following
        joins.append(state.n_frames * many.codec.samples_per_frame)
        if state.n_samples >= n_samples:
            return torch.cat(waves, dim=-1)[:, :n_samples], [j for j in joins if j < n_samples]


def measure(args: argparse.Namespace) -> dict:
    """A row for every commit."""
    evaluation = Evaluation(Options(data=args.data, parts=args.parts, quick=True))
    instrument, n_seeds = evaluation.instrument(args.kind), args.seeds
    reference = gaussian(evaluation.reference_points)
    truths, rows = [evaluation.truth(seed) for seed in range(n_seeds)], {}
    for commit in args.commit:
        seeds = []
        for seed in range(n_seeds):
            prompts = [clip.row.caption for clip in evaluation.clips(seed)]
            controls = instrument.controls("", seed=seed)
            made = (instrument.streamer, prompts, controls, evaluation.n_samples, commit)
            waves, joins = committed(*made)
            seeds.append(evaluation.metrics.measure(waves, joins))
            print(f"commit {commit}, seed {seed}: {len(joins)} joins", file=sys.stderr)
        row = row_of(seeds, truths, reference)
        rows[str(commit)] = {name: row[name] for name in (*SHOWN, "family", "clips", "windows")}
    return {
        "rows": rows,
        "kind": args.kind,
        "sha256": instrument.sha256,
        "n_steps": controls.n_steps,
        "block_frames": controls.block_frames,
        "seeds": n_seeds,
        "machine": machine_dict(),
    }


def plot(result: dict, path: Path) -> None:
    """Each measure over the frames that are committed, with intervals over seeds (95 %)."""
    figure, axes = plt.subplots(1, len(SHOWN), figsize=(11, 2.8), layout="constrained")
    names = [key if key != "0" else "all" for key in result["rows"]]
    for ax, (name, label) in zip(axes, SHOWN.items(), strict=True):
        found = [row[name] for row in result["rows"].values()]
        middle = [x["mean"] for x in found]
        errors = [[x["mean"] - x["low"] for x in found], [x["high"] - x["mean"] for x in found]]
        ax.errorbar(names, middle, errors, fmt="o", capsize=3)
        ax.set(title=label, xlabel="frames committed")
    figure.savefig(path, dpi=110)


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, write JSON and a picture."""
    parser = argparse.ArgumentParser(prog="python tools/measure_commit.py", description=__doc__)
    parser.add_argument("--data", type=Path, required=True, help="a built corpus")
    parser.add_argument("--parts", type=Path, default=Path("outputs/evaluation/parts"))
    parser.add_argument("--kind", default="arc")
    parser.add_argument("--commit", type=int, nargs="+", default=[0, 48, 24, 12, 6, 3])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--json", type=Path, required=True)
    args = parser.parse_args(argv)
    try:
        check_outputs(json=args.json)
        result = measure(args)
    except LmdError as error:
        print(f"measure_commit: {error}", file=sys.stderr)
        return 2
    write_json(args.json, result)
    plot(result, args.json.with_suffix(".png"))
    print(json.dumps(result["rows"], indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())
