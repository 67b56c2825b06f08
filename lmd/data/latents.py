"""Windows of latents for training: which one comes at step k, position j, is arithmetic."""

from collections.abc import Sequence
from pathlib import Path
from typing import TypedDict

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from lmd.corpus.scores import Split
from lmd.data.shards import LatentShards
from lmd.errors import LmdError
from lmd.rng import derive_seed


class LatentBatch(TypedDict):
    """A batch of windows."""

    latents: Float[Tensor, "batch latent frame"]  # float32, at unit scale
    caption: list[str]  # one text per window
    identity: list[str]  # name, voice and first frame of each window, for messages and logs


class LatentWindows:
    """Every window of some latents, numbered; and the window of (seed, step, position).

    Args:
        folder: encoded latents.
        split: which pieces.
        window_frames: length of a window.
        seed: of the order.
        kinds: "mix", "stem" or both.
        lead_frames: windows may begin so many frames before the sound (silence).

    Raises:
        LmdError: no entry of that split and kind.
    """

    def __init__(
        self,
        folder: Path | str | LatentShards,
        split: Split = "train",
        window_frames: int = 240,
        seed: int = 0,
        kinds: Sequence[str] = ("mix",),
        lead_frames: int = 0,
    ) -> None:
        self.shards = folder if isinstance(folder, LatentShards) else LatentShards(folder)
        self.window_frames, self.seed, self.lead_frames = window_frames, seed, lead_frames
        self.entries = [
            entry
            for entry in self.shards.entries
            if entry.split == split and ("mix" if entry.voice < 0 else "stem") in kinds
        ]
        if not self.entries:
            found = f"no {split} latents of {' or '.join(kinds)} in {self.shards.folder}"
            raise LmdError(found, "at least one", "Encode a larger corpus, or encode with --stems.")
        n_frames = np.array([entry.n_frames for entry in self.entries])
        starts = np.maximum(n_frames + lead_frames - window_frames, 0) + 1
        self._first = np.concatenate([[0], np.cumsum(starts)])  # first window of each entry

    def __len__(self) -> int:
        """How many different windows there are."""
        return int(self._first[-1])

    def pick(self, step: int, position: int) -> tuple[int, int]:
        """Entry and first frame of the window at a step and position: uniform over all windows."""
        number = derive_seed(self.seed, "window", step, position) % len(self)
        entry = int(np.searchsorted(self._first, number, side="right")) - 1
        return entry, int(number - self._first[entry]) - self.lead_frames

    def batch(self, step: int, positions: Sequence[int]) -> LatentBatch:
        """The windows at some positions of a step's batch: a pure function of them, step and seed.

        A sound shorter than the window is followed by silence. Of several captions one is drawn.
        """
        picks = [self.pick(step, position) for position in positions]
        shape = (len(picks), self.window_frames, self.shards.latent_dim)
        frames, texts, identity = np.empty(shape, np.float16), [], []
        for row, ((number, start), position) in enumerate(zip(picks, positions, strict=True)):
            entry = self.entries[number]
            frames[row] = self.shards.frames(entry, start, self.window_frames)
            drawn = derive_seed(self.seed, "caption", step, position)
            texts.append(entry.captions[drawn % len(entry.captions)])
            identity.append(f"{entry.name}/{'mix' if entry.voice < 0 else entry.voice}@{start}")
        # By NumPy: in a reading thread, torch would start a second team of threads, and with more
        # threads than cores all of them wait asleep, which makes training steps a third slower.
        latents = np.ascontiguousarray(frames.swapaxes(1, 2), np.float32)
        return LatentBatch(latents=torch.from_numpy(latents), caption=texts, identity=identity)
