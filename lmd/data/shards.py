"""Latent shards: safetensors files of float16 latents, read through memory maps."""

import hashlib
import json
import math
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from safetensors.torch import save
from torch import Tensor

from lmd.corpus.tables import read_rows, read_settings
from lmd.errors import LmdError
from lmd.outputs import file_sha256, write_atomic

SHARD_FORMAT = 1
INDEX = "index.csv"
SETTINGS = "latents.json"


@dataclass(frozen=True)
class Entry:
    """One encoded sound: a line of the index. What has no comment is as in the manifest's `Row`."""

    name: str
    voice: int  # -1 = the mix, else the stem's number
    shard: str  # file name
    start_frame: int  # in the shard
    n_frames: int
    caption: str
    split: str
    piece_id: str
    composer: str
    family: str
    instruments: str
    tempo_bpm: float
    key: str
    mode: str
    duration_s: float
    also: str = ""  # further captions of the same sound, joined by "|"

    @property
    def captions(self) -> tuple[str, ...]:
        """All of its captions."""
        return (self.caption, *(self.also.split("|") if self.also else ()))


def write_shard(path: Path, latents: list[Tensor], entries: list[Entry]) -> None:
    """Write latents `[frame, latent]`, one per entry, and a side file with entries and checksum.

    Raises:
        LmdError: latents that are not finite, or too large for float16.
    """
    joined = torch.cat([part.to(torch.float16) for part in latents])
    if not torch.isfinite(joined).all():
        names = ", ".join(sorted({entry.name for entry in entries})[:3])
        found = f"latents that are not finite in float16 for {path.name}"
        todo = f"Check the codec's normalisation and the audio of {names}."
        raise LmdError(found, "finite values, at unit scale", todo)
    data = save({"latents": joined.contiguous()}, metadata={"format": str(SHARD_FORMAT)})
    write_atomic(path, data)
    side: dict[str, Any] = {"sha256": hashlib.sha256(data).hexdigest(), "n_bytes": len(data)}
    side["entries"] = [asdict(entry) for entry in entries]
    write_atomic(path.with_suffix(".json"), (json.dumps(side, sort_keys=True) + "\n").encode())


def shard_fault(path: Path, checksum: bool = True) -> str | None:
    """What is wrong with a `.safetensors` file; None if it is whole.

    Without `checksum`, for which every byte is read, only its length is compared.
    """
    try:
        size, side = path.stat().st_size, json.loads(path.with_suffix(".json").read_text())
        n_bytes, digest = side["n_bytes"], side["sha256"]
    except FileNotFoundError:
        return "missing"
    except (ValueError, KeyError, TypeError, RecursionError):
        return "its side file is torn"
    if size != n_bytes:
        return f"{size} bytes instead of {n_bytes}"
    if checksum and file_sha256(path) != digest:
        return "its checksum differs"
    return None


def shard_entries(path: Path) -> list[Entry]:
    """The entries that a shard's side file lists."""
    return [Entry(**e) for e in json.loads(path.with_suffix(".json").read_text())["entries"]]


def map_shard(path: Path, checksum: bool = False) -> Float[np.ndarray, "frame latent"]:
    """A shard's latents as a memory-mapped float16 array `[frame, latent]`.

    Raises:
        LmdError: the file is missing, shorter than it says, or (`checksum`) has other bytes.
    """
    fault = shard_fault(path, checksum)
    if fault:
        todo = "Run lmd data encode again: it encodes torn shards anew."
        raise LmdError(f"shard {path.name}: {fault}", "a whole shard", todo)
    with path.open("rb") as file:
        n_header = int.from_bytes(file.read(8), "little")
        about = json.loads(file.read(n_header))["latents"]
    shape, (start, _) = tuple(about["shape"]), about["data_offsets"]
    return np.memmap(path, np.float16, "r", offset=8 + n_header + start, shape=shape)


class LatentShards:
    """A folder that `lmd data encode --out` wrote, every shard of it whole.

    Raises:
        LmdError: no index there, a torn one, a shard that is missing or damaged, or an entry
            that lies outside its shard.
    """

    def __init__(self, folder: Path | str) -> None:
        self.folder = Path(folder)
        self.entries = read_rows(self.folder / INDEX, Entry, "lmd data encode")
        self.settings = read_settings(self.folder / SETTINGS)
        try:
            self.latent_dim = int(self.settings["latent_dim"])
            self.silence = np.array(self.settings["silence"], np.float16).reshape(self.latent_dim)
        except (KeyError, TypeError, ValueError) as error:
            found = f"{self.folder / SETTINGS} without sizes: {error!r}"
            raise LmdError(found, "latent_dim and silence", "Encode into a new folder.") from error
        names = {entry.shard for entry in self.entries}
        self._maps = {name: map_shard(self.folder / name, checksum=True) for name in names}
        for line, entry in enumerate(self.entries, 2):
            n_frames, width = self._maps[entry.shard].shape
            last = entry.start_frame + entry.n_frames
            is_inside = 0 <= entry.start_frame < last <= n_frames and width == self.latent_dim
            if not (is_inside and 0 < entry.duration_s < math.inf):
                found = f"frames {entry.start_frame} to {last}, {entry.duration_s:g} s"
                expected = f"some of {n_frames} frames of {entry.shard}, {self.latent_dim} wide"
                found = f"{self.folder / INDEX}, line {line}: {found}"
                raise LmdError(found, expected, "Run lmd data encode again.")

    def frames(self, entry: Entry, start: int = 0, n_frames: int | None = None) -> np.ndarray:
        """Frames of one entry, float16 `[frame, latent]`, not copied if they all exist.

        So many from `start` on (None = to the end); before its first and after its last: silence.
        """
        n_frames = entry.n_frames - start if n_frames is None else n_frames
        first, last = max(start, 0), min(start + n_frames, entry.n_frames)
        if entry.shard not in self._maps:  # once in every process
            self._maps[entry.shard] = map_shard(self.folder / entry.shard)
        shard = self._maps[entry.shard]
        known = shard[entry.start_frame + first : entry.start_frame + max(first, last)]
        if len(known) == n_frames:
            return known
        padded = np.tile(self.silence, (n_frames, 1))
        padded[first - start : first - start + len(known)] = known
        return padded

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_maps": {}}  # workers map the files themselves
