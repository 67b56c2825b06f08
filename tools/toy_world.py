"""How much ARC-Forcing lessens the drift in `lmd.arc.toy_world`, over several seeds.

python tools/toy_world.py --seeds 3 --out outputs/toy_world
"""

import argparse
import copy
import json
import sys
import time
from pathlib import Path
from typing import Any

from tqdm import tqdm

from lmd.arc import toy_world as toy
from lmd.config import to_dict
from lmd.rng import generator


def experiment(seed: int, settings: toy.ToySettings, progress: bool = False) -> dict[str, Any]:
    """Everything once: drift of the fine-tuned model, of the same after ARC-Forcing, of the world.

    Returns:
        JSON-ready: distances per block, their ratio at the last block, curves, seconds.
    """
    began = time.perf_counter()
    base, live = toy.prepare(settings, seed)
    before = toy.drift(toy.play(live, settings, seed))
    prepared = time.perf_counter()
    curves: dict[str, list[float]] = {"accuracy": [], "generator": [], "discriminator": []}
    average = copy.deepcopy(live)
    discriminator = toy.make_discriminator(base, settings, seed)
    updates = toy.arc_updates(live, average, discriminator, settings, seed)
    bar = tqdm(updates, f"seed {seed}", settings.n_updates, disable=not progress)
    for _, trains, loss in bar:
        curves["accuracy"].append(loss.accuracy.item())
        curves[trains].append(loss.pair.item())
    after = toy.drift(toy.play(average, settings, seed))
    n_frames = toy.CONTEXT + settings.n_played * toy.BLOCK
    real = toy.world(settings.n_streams, n_frames, generator(seed, "toy real"))
    return {
        "seed": seed,
        "before": before,
        "after": after,
        "world": toy.drift(real),
        "factor": before[-1] / after[-1],
        "curves": curves,
        "prepare_s": prepared - began,
        "arc_s": time.perf_counter() - prepared,
    }


def draw(results: list[dict[str, Any]], path: Path) -> None:
    """Distances over blocks, all seeds, as a PNG."""
    from lmd.show import plot_losses

    named = {
        f"{name}, seed {result['seed']}": result[key]
        for result in results
        for key, name in (("before", "fine-tuned"), ("after", "after ARC"), ("world", "the world"))
    }
    ax = plot_losses(named)
    ax.legend(frameon=False, loc="center left", bbox_to_anchor=(1, 0.5))
    ax.set(xlabel="block", ylabel="distance from the exact distribution", ylim=(0, None))
    ax.figure.savefig(path, dpi=100)


def main(words: list[str] | None = None) -> int:
    """Run the seeds, write `toy_world.json` and `toy_world.png`, print a line per seed."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--short", action="store_true", help="fewer updates: minutes a seed")
    parser.add_argument("--out", type=Path, default=Path("outputs/toy_world"))
    args = parser.parse_args(words)
    settings, results = toy.SHORT if args.short else toy.ToySettings(), []
    args.out.mkdir(parents=True, exist_ok=True)
    for seed in range(args.seeds):
        results.append(experiment(seed, settings, progress=True))
        result = results[-1]
        print(
            f"seed {seed}: distance at block {settings.n_played} {result['before'][-1]:.3f} -> "
            f"{result['after'][-1]:.3f}, {result['factor']:.1f} times less; the world itself, "
            f"measured alike, {result['world'][-1]:.3f}"
        )
    report = {"settings": to_dict(settings), "results": results}
    (args.out / "toy_world.json").write_text(json.dumps(report, indent=1) + "\n")
    draw(results, args.out / "toy_world.png")
    return 0


if __name__ == "__main__":
    sys.exit(main())
