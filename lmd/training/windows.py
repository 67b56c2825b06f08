"""Where training windows come from, read ahead."""

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple, Protocol, TypeVar

from lmd.corpus.scores import Split
from lmd.data.latents import LatentWindows
from lmd.data.shards import LatentShards
from lmd.shapes import Latents

LEAD_FRAMES = 24  # windows may begin a second before the sound, so that beginnings are learned
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


class Items:
    """What a generator function gives, as Lightning takes it; `n` items of a whole run."""

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
