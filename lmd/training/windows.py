"""Where training windows come from, read ahead; and what a short run begins with in a notebook."""

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple, Protocol, TypeVar

import torch
import torch.nn.functional as F
from torch.utils.data import IterableDataset

from lmd.checkpoint import build_model, load_model, read_header
from lmd.config import Preset
from lmd.corpus.scores import Split
from lmd.data.latents import LatentWindows
from lmd.data.shards import INDEX, LatentShards
from lmd.model.live_model import LiveModel
from lmd.rng import derive_seed, normal
from lmd.shapes import Latents
from lmd.training.losses import init_context_projection

LEAD_FRAMES = 24  # windows may begin a second before the sound, so that beginnings are learned
SMOOTH_FRAMES = 9  # of the stand-in curves
Item = TypeVar("Item")


class Windows(NamedTuple):
    """Rows of a batch: latents `[row, latent, frame]`, their captions, and where they are from."""

    latents: Latents
    prompts: list[str]
    names: list[str]


class WindowSource(Protocol):
    """Where batches come from; the answer depends on the arguments alone."""

    def windows(self, step: int, positions: Sequence[int], n_frames: int) -> Windows:
        """The rows at these positions of the global batch of a step."""
        ...


class LatentSource:
    """Encoded latents as a `WindowSource`, for any window length."""

    def __init__(self, folder: Path | str, seed: int, split: Split = "train") -> None:
        self.shards, self.seed, self.split = LatentShards(folder), seed, split
        self._by_length: dict[int, LatentWindows] = {}

    def windows(self, step: int, positions: Sequence[int], n_frames: int) -> Windows:
        """See `WindowSource`."""
        if n_frames not in self._by_length:
            self._by_length[n_frames] = LatentWindows(
                self.shards, self.split, n_frames, self.seed, lead_frames=LEAD_FRAMES
            )
        batch = self._by_length[n_frames].batch(step, positions)
        return Windows(batch["latents"], batch["caption"], batch["identity"])


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


class Items(IterableDataset):
    """What a generator function gives, as a `DataLoader` takes it; `n` items of a whole run."""

    def __init__(self, make: Callable[[], Iterator[Any]], n: int) -> None:
        self.make, self.n = make, n

    def __len__(self) -> int:
        return self.n

    def __iter__(self) -> Iterator[Any]:
        return self.make()


def read_ahead(items: Iterator[Item]) -> Iterator[Item]:
    """The same items in the same order; a thread makes the next one while the caller has this one.

    The thread ends with the iterator. What making an item raised comes when it is asked for.
    """
    end = object()
    with ThreadPoolExecutor(1, "read-ahead") as reader:
        coming = reader.submit(next, items, end)
        while (item := coming.result()) is not end:
            coming = reader.submit(next, items, end)
            yield item


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
