"""`lmd export`: weights as graphs that play without PyTorch's model.

lmd export --source arc --out graphs
lmd stream "church organ" --source graphs -o organ.wav
"""

from dataclasses import dataclass
from pathlib import Path

from lmd.pretrained import export_source


@dataclass(frozen=True)
class Options:
    """What to export, and where to."""

    out: Path  # The folder to write.
    source: str = "arc"  # A shipped kind, FOLDER:KIND or random:PRESET:SEED.
    block_frames: tuple[int, ...] = ()  # Also graphs with static shapes for these block lengths.


def main(options: Options) -> int:
    """Export, and say how far each graph is from PyTorch."""
    manifest = export_source(options.source, options.out, options.block_frames)
    for name, graph in manifest["graphs"].items():
        print(f"{name:16} {graph['max_difference']:.1e} of its largest value from PyTorch")
    print(f"{options.out}: {len(manifest['graphs'])} graphs in {manifest['seconds']:.0f} s")
    return 0
