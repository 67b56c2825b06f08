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
    """A batch of windows.

    latents: float32 `[batch, latent, frame]`, at unit scale.
    caption: one text per window.
    identity: name, voice (-1 = mix) and frames of each window, for messages and logs.
    """

    latents: Float[Tensor, "batch latent frame"]
    caption: list[str]
    identity: list[str]


class LatentWindows:
    """Every window of some latents, numbered; and the window of (seed, step, position).

    Args:
        folder: encoded latents.
        split: which pieces.
        window_frames: latent frames of a window.
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
            raise LmdError(
                f"no {split} latents of {' or '.join(kinds)} in {self.shards.folder}",
                "at least one",
                "Encode a larger corpus, or encode with --stems.",
            )
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
        """The windows of a step: a pure function of (seed, step, positions).

        A sound shorter than the window is followed by silence. Of several captions one is drawn.

        Args:
            step: global step, counted from 0.
            positions: places in the global batch.
        """
        picks = [self.pick(step, position) for position in positions]
        texts = []
        for (entry, _), position in zip(picks, positions, strict=True):
            captions = self.entries[entry].captions
            number = derive_seed(self.seed, "caption", step, position)
            texts.append(captions[number % len(captions)])
        return {**self.gather(picks), "caption": texts}

    def gather(self, picks: Sequence[tuple[int, int]]) -> LatentBatch:
        """The windows that begin at the given (entry, first frame) pairs."""
        shape = (len(picks), self.window_frames, self.shards.latent_dim)
        frames = np.empty(shape, np.float16)
        for row, (entry, start) in enumerate(picks):
            frames[row] = self.shards.frames(self.entries[entry], start, self.window_frames)
        chosen = [self.entries[entry] for entry, _ in picks]
        # By NumPy: in a reading thread, torch would start a second team of threads, and with more
        # threads than cores all of them wait asleep, which makes training steps a third slower.
        latents = np.ascontiguousarray(frames.swapaxes(1, 2), np.float32)
        return LatentBatch(
            latents=torch.from_numpy(latents),
            caption=[entry.caption for entry in chosen],
            identity=[
                f"{entry.name}/{'mix' if entry.voice < 0 else entry.voice}@{start}"
                for entry, (_, start) in zip(chosen, picks, strict=True)
            ],
        )
