"""Takes: what was played, written line by line while it plays, and read to play it again.

A take is a file of JSON lines. The first says with which weights; then one for every block whose
controls differ from those of the block before, one for every fault and underrun, and now and then
one that counts blocks and samples. The last also holds the SHA-256 of the samples; if it is missing
(the power went), the take still plays, up to the last line that there is.
"""

import dataclasses
import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TextIO

import numpy as np
import torch

from lmd.config import from_dict
from lmd.errors import LmdError
from lmd.model.text import describe
from lmd.model.weights import fingerprint
from lmd.play.control_queue import NAMES, with_changes
from lmd.play.guard import Guarded, Piece, guarded_step
from lmd.shapes import Wave
from lmd.stream.controls import Controls
from lmd.stream.streamer import Streamer

FORMAT = "lmd-take-1"
COUNT_EVERY = 8  # blocks


@dataclass(frozen=True)
class TakeHeader:
    """With what a take was played.

    Attributes:
        model_sha256, codec_sha256: of all weights, by name.
        text: the text encoder's class and size.
        source: where the weights came from, for `lmd.pretrained.open_instrument`.
        sample_rate, channels: of the sound.
        n_threads: torch threads (sums may differ in the last bit with another number).
        torch_version: for the same reason.
        format: of the file.
    """

    model_sha256: str
    codec_sha256: str
    text: str
    source: str
    sample_rate: int
    channels: int
    n_threads: int
    torch_version: str
    format: str = FORMAT


@dataclass(frozen=True)
class Take:
    """A take as read from its file.

    Attributes:
        header: the first line.
        changes: controls by the number of the block that first had them; block 0 always has some.
        starts: the first sample of these blocks.
        faults: blocks that were not finite, with the reason.
        underruns: (block, sample) at which the sink had run dry.
        n_blocks, n_samples: how much was played.
        sha256: of all samples, float32 little-endian, sample by sample; None if it broke off.
    """

    header: TakeHeader
    changes: dict[int, Controls]
    starts: dict[int, int]
    faults: dict[int, str] = field(default_factory=dict)
    underruns: tuple[tuple[int, int], ...] = ()
    n_blocks: int = 0
    n_samples: int = 0
    sha256: str | None = None

    def block_starts_s(self) -> dict[int, float]:
        """When the blocks of `changes` begin, in seconds of the stream."""
        rate = self.header.sample_rate
        return {block: sample / rate for block, sample in self.starts.items()}

    def moving(self) -> list[str]:
        """The names of the controls that change during the take, and the prompt."""
        values = list(self.changes.values())
        return [
            name
            for name in NAMES
            if name == "prompt" or any(getattr(v, name) != getattr(values[0], name) for v in values)
        ]

    def controls(self) -> Iterator[Controls]:
        """The controls of every block."""
        present = self.changes[0]
        for number in range(self.n_blocks):
            present = self.changes.get(number, present)
            yield present


class SampleHash:
    """A running SHA-256 of samples, the same however they are cut into blocks."""

    def __init__(self) -> None:
        self._hash = hashlib.sha256()

    def update(self, wave: Wave) -> None:
        """Add `[1, channel, sample]`."""
        interleaved = wave[0].t().contiguous().numpy().astype("<f4", copy=False)
        self._hash.update(np.ascontiguousarray(interleaved).tobytes())

    def hexdigest(self) -> str:
        """The hash so far."""
        return self._hash.hexdigest()


def header_of(streamer: Streamer, source: str) -> TakeHeader:
    """The first line of a take played by that streamer."""
    return TakeHeader(
        model_sha256=fingerprint(streamer.denoiser),
        codec_sha256=fingerprint(streamer.codec),
        text=describe(streamer.text),
        source=source,
        sample_rate=streamer.codec.sample_rate,
        channels=streamer.codec.channels,
        n_threads=torch.get_num_threads(),
        torch_version=str(torch.__version__),
    )


class TakeWriter:
    """Writes a take; every line is on disk before the next block is made.

    Args:
        path: a new file.
        header: from `header_of`.

    Raises:
        LmdError: the file exists, or its folder does not.
    """

    def __init__(self, path: str | Path, header: TakeHeader) -> None:
        self.path = Path(path)
        try:
            self._file: TextIO = self.path.open("x", encoding="utf-8")
        except (FileExistsError, FileNotFoundError) as error:
            raise LmdError(
                f"{self.path} ({error.strerror})", "a new file in a folder that exists", "Rename it"
            ) from error
        self._previous: Controls | None = None
        self._hash, self._n_blocks, self._n_samples = SampleHash(), 0, 0
        self._line(dataclasses.asdict(header))

    def _line(self, values: dict[str, Any]) -> None:
        self._file.write(json.dumps(values, ensure_ascii=False) + "\n")
        self._file.flush()

    def piece(self, piece: Piece, controls: Controls) -> None:
        """Note a block: its controls if they are new, its fault if it had one, its samples."""
        number, sample = self._n_blocks, self._n_samples
        if controls != self._previous:
            before = self._previous
            changed = {
                name: getattr(controls, name)
                for name in NAMES
                if before is None or getattr(controls, name) != getattr(before, name)
            }
            self._line({"block": number, "sample": sample, "controls": changed})
            self._previous = controls
        if piece.fault is not None:
            self._line({"block": number, "sample": sample, "fault": piece.fault})
        self._hash.update(piece.wave)
        self._n_blocks += 1
        self._n_samples += piece.wave.shape[-1]
        if self._n_blocks % COUNT_EVERY == 0:
            self._line(self._count())

    def _count(self) -> dict[str, Any]:
        return {"blocks": self._n_blocks, "samples": self._n_samples}

    def underrun(self) -> None:
        """Note that the sink has run dry."""
        self._line({"block": self._n_blocks, "sample": self._n_samples, "underrun": True})

    def close(self) -> None:
        """Write the last line; a take of no block at all is no take and leaves no file."""
        if self._file.closed:
            return
        if self._n_blocks:
            self._line(self._count() | {"sha256": self._hash.hexdigest()})
        self._file.close()
        if not self._n_blocks:
            self.path.unlink(missing_ok=True)


def read_take(path: str | Path) -> Take:
    """Read a take, whole or broken off.

    Raises:
        LmdError: no such file, not a take, or a line inside it that cannot be read.
    """
    path = Path(path)
    try:
        lines = path.read_text(encoding="utf-8").removesuffix("\n").split("\n")
        header = from_dict(TakeHeader, json.loads(lines[0]))
    except LmdError as error:
        raise LmdError(f"{path} with {error.found}", error.expected, error.todo) from error
    except (OSError, UnicodeDecodeError, IndexError, ValueError, TypeError, AttributeError) as e:
        raise LmdError(f"{path} ({e})", f"a take ({FORMAT})", "Give another file.") from e
    if header.format != FORMAT:
        raise LmdError(f"{path} of format {header.format!r}", FORMAT, "Update lmd, or play anew.")
    return _parse(path, header, lines[1:])


def _parse(path: Path, header: TakeHeader, lines: list[str]) -> Take:
    present, changes = Controls(), {}
    faults: dict[int, str] = {}
    starts: dict[int, int] = {}
    underruns: list[tuple[int, int]] = []
    end: dict[str, Any] = {}
    for number, line in enumerate(lines, start=2):
        try:
            entry = json.loads(line)
            if "controls" in entry:
                present = with_changes(present, entry["controls"])
                changes[int(entry["block"])] = present
                starts[int(entry["block"])] = int(entry["sample"])
            elif "fault" in entry:
                faults[int(entry["block"])] = str(entry["fault"])
            elif "underrun" in entry:
                underruns.append((int(entry["block"]), int(entry["sample"])))
            else:
                end = {key: entry[key] for key in ("blocks", "samples")}
                end["sha256"] = entry.get("sha256")
        except (ValueError, KeyError, TypeError) as error:
            if number == len(lines) + 1 and end.get("sha256") is None:
                break  # the line that was being written when it broke off
            raise LmdError(
                f"{path}, line {number}: {error}", "a line of a take", "Mend it."
            ) from error
    if 0 not in changes:
        raise LmdError(f"{path} without controls for block 0", "a take that played", "Play anew.")
    known = max([*changes, *faults, *(block - 1 for block, _ in underruns)]) + 1
    return Take(
        header,
        changes,
        starts,
        faults,
        tuple(underruns),
        max(int(end.get("blocks", 0)), known),
        int(end.get("samples", 0)),
        end.get("sha256"),
    )


def play_again(take: Take, streamer: Streamer) -> Iterator[Piece]:
    """Every block of a take, once more.

    Raises:
        LmdError: the streamer has other weights than the take was played with, or cannot play the
            controls that stand in it.
    """
    here = header_of(streamer, take.header.source)
    for name in ("model_sha256", "codec_sha256", "text"):
        found, expected = getattr(here, name), getattr(take.header, name)
        if found != expected:
            raise LmdError(
                f"{name} {found[:16]}", f"{expected[:16]}, as in the take", "Load those weights."
            )
    for controls in take.changes.values():
        controls.validate(streamer.window)
    guarded = Guarded(streamer.start())
    for number, controls in enumerate(take.controls()):
        piece, guarded = guarded_step(streamer, guarded, controls, take.faults.get(number))
        yield piece
