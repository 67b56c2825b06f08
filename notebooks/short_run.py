"""What a short training in a notebook learns from and begins with: what is at hand.

Used by notebook 02_outpaint.
"""

from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import torch
import torch.nn.functional as F

from lmd.checkpoint import build_model, load_model, read_header
from lmd.config import Preset
from lmd.corpus.scores import Split
from lmd.data.shards import INDEX
from lmd.model.live_model import LiveModel
from lmd.rng import derive_seed, normal
from lmd.training.losses import init_context_projection
from lmd.training.windows import LatentSource, Windows, WindowSource

SMOOTH_FRAMES = 9  # of the stand-in curves


class StandInSource:
    """Smooth random curves of unit power: something to learn from where there is no music."""

    def __init__(self, latent_dim: int, seed: int) -> None:
        self.latent_dim, self.seed = latent_dim, seed

    def windows(self, step: int, positions: Sequence[int], n_frames: int) -> Windows:
        """See `WindowSource`."""
        shape = (self.latent_dim, n_frames + SMOOTH_FRAMES - 1)
        steps = torch.stack([normal(shape, self.seed, "stand-in", step, p) for p in positions])
        curves = F.avg_pool1d(steps, SMOOTH_FRAMES, 1) * SMOOTH_FRAMES**0.5
        names = [f"stand-in {step}.{p}" for p in positions]
        return Windows(curves, ["a smooth random curve"] * len(names), names)


def open_windows(
    folder: Path | str, sizes: Preset, seed: int, split: Split = "train"
) -> tuple[WindowSource, str]:
    """Encoded music if the folder has some of the preset's width, else stand-ins; and which.

    A corpus too small to have that split gives what it has, and the line says so.
    """
    if (Path(folder) / INDEX).is_file():
        source = LatentSource(folder, seed, split)
        if source.shards.latent_dim == sizes.dit.latent_dim:
            counts = Counter(entry.split for entry in source.shards.entries)
            line = f"{counts[split]} {split} sounds in {Path(folder).name}"
            if not counts[split]:  # a corpus of minutes has pieces of one split only
                (used, n), *_ = counts.most_common()
                source, line = LatentSource(folder, seed, used), f"{line}, so {n} of {used}"
            return source, line
    line = f"smooth random curves, not music (no latents of preset {sizes.name} in {folder})"
    return StandInSource(sizes.dit.latent_dim, derive_seed(seed, split)), line


def open_start(folder: Path | str, sizes: Preset, seed: int) -> tuple[LiveModel, str]:
    """The shipped base of that preset, ready for context, else fresh weights; and which."""
    path = Path(folder) / "base.safetensors"
    if path.is_file() and read_header(path).config == sizes:
        steps = read_header(path).notes.get("steps")  # converted or interpolated weights have none
        about = f"the shipped base, {steps} steps" if steps else "a base that was not trained here"
        return init_context_projection(load_model(path)), about
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(derive_seed(seed, "weights"))
        return build_model(sizes).eval(), f"fresh weights (no base of preset {sizes.name})"
