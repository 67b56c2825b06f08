"""Windows of latents for training: which one comes at step k, position j, is arithmetic."""

import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TypedDict

import lightning as L
import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from lmd.corpus.scores import Split
from lmd.data.shards import LatentShards
from lmd.errors import LmdError
from lmd.rng import derive_seed


class LatentBatch(TypedDict):
    """A batch of windows.

    latents: float32 `[batch, latent, frame]`, at unit scale.
    caption: one text per window.
    seconds: float32 `[batch]`, the length of the sound that the window was cut from.
    start_frame: int64 `[batch]`, the window's first frame in that sound.
    identity: name, voice (-1 = mix) and frames of each window, for messages and logs.
    """

    latents: Float[Tensor, "batch latent frame"]
    caption: list[str]
    seconds: Float[Tensor, " batch"]
    start_frame: Tensor
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
        said = []
        for (entry, _), position in zip(picks, positions, strict=True):
            captions = self.entries[entry].captions
            number = derive_seed(self.seed, "caption", step, position)
            said.append(captions[number % len(captions)])
        return {**self.gather(picks), "caption": said}

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
            seconds=torch.tensor([entry.duration_s for entry in chosen], dtype=torch.float32),
            start_frame=torch.tensor([start for _, start in picks]),
            identity=[
                f"{entry.name}/{'mix' if entry.voice < 0 else entry.voice}@{start}"
                for entry, (_, start) in zip(chosen, picks, strict=True)
            ],
        )


class _Steps(IterableDataset):
    """One batch per step; each worker makes every n-th, so the loader hands them out in order."""

    def __init__(
        self, windows: LatentWindows, positions: range, first: int = 0, last: float = math.inf
    ) -> None:
        self.windows, self.positions, self.first, self.last = windows, positions, first, last

    def __iter__(self) -> Iterator[LatentBatch]:
        worker = get_worker_info()
        step, stride = self.first, 1
        if worker is not None:
            step, stride = step + worker.id, worker.num_workers
        while step < self.last:
            yield self.windows.batch(step, self.positions)
            step += stride


class LatentDataModule(L.LightningDataModule):
    """Batches of latent windows for any number of processes and workers.

    The global batch of step k holds positions 0 … global_batch − 1; process r of n takes the
    r-th n-th of them. What each holds depends on (seed, k, position) alone, so a run that resumes
    at step k, or on other machines, sees the same windows. The training stream has no end and no
    length: stop it with `Trainer(max_steps=…)`.

    Args:
        folder: encoded latents.
        window_frames: 240 for a window of the engine, 768 for the long length of ARC.
        global_batch: windows of a batch over all processes; they must divide it.
        seed: of the order.
        n_workers: loader processes; 0 = in the training process.
        first_step: the first batch; None = the one after the trainer's finished steps, so
            that a resumed run goes on where it was (with one optimiser; else give the number).
        kinds: "mix", "stem" or both.
        lead_frames: windows may begin so many frames before the sound (silence).
        n_validation_batches: fixed batches from validation pieces.
    """

    def __init__(
        self,
        folder: Path | str,
        window_frames: int = 240,
        global_batch: int = 16,
        seed: int = 0,
        n_workers: int = 0,
        first_step: int | None = None,
        kinds: Sequence[str] = ("mix",),
        lead_frames: int = 0,
        n_validation_batches: int = 8,
    ) -> None:
        super().__init__()
        self.folder, self.window_frames, self.global_batch = (
            Path(folder),
            window_frames,
            global_batch,
        )
        self.seed, self.n_workers, self.first_step = seed, n_workers, first_step
        self.kinds, self.lead_frames = tuple(kinds), lead_frames
        self.n_validation_batches = n_validation_batches

    def windows(self, split: Split) -> LatentWindows:
        """The numbered windows of a split."""
        return LatentWindows(
            self.folder, split, self.window_frames, self.seed, self.kinds, self.lead_frames
        )

    def train_dataloader(self) -> DataLoader:
        """Training batches from `first_step` on, without end."""
        first = self._next_step() if self.first_step is None else self.first_step
        steps = _Steps(self.windows("train"), self._positions(), first)
        keep = self.n_workers > 0
        return DataLoader(
            steps, batch_size=None, num_workers=self.n_workers, persistent_workers=keep
        )

    def val_dataloader(self) -> DataLoader:
        """The same validation batches every time."""
        windows = self.windows("validation")
        steps = _Steps(windows, self._positions(), 0, self.n_validation_batches)
        return DataLoader(steps, batch_size=None)

    def _positions(self) -> range:
        """The positions of the global batch that this process takes."""
        rank, n_processes = 0, 1
        if self.trainer is not None:
            rank, n_processes = self.trainer.global_rank, self.trainer.world_size
        if self.global_batch % n_processes:
            raise LmdError(
                f"a global batch of {self.global_batch} for {n_processes} processes",
                "a multiple of the number of processes",
                "Change the batch or the number of devices.",
            )
        share = self.global_batch // n_processes
        return range(rank * share, (rank + 1) * share)

    def _next_step(self) -> int:
        """The number of batches that went into the attached trainer's finished steps."""
        if self.trainer is None:
            return 0
        return self.trainer.global_step * self.trainer.accumulate_grad_batches
