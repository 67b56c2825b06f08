"""Takes: what was played, written line by line while it plays, and read to play it again.

A take is a file of JSON lines. The first says with which weights; then one for every block whose
controls differ from those of the block before, one for every cut, fault and underrun, and now and
then one that counts blocks and samples. What was planned and never heard does not stand in it. The
last line also holds the SHA-256 of the samples; if it is missing (the power went), the take still
plays, up to the last line that there is.
"""

import dataclasses
import hashlib
import json
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from lmd.config import from_dict
from lmd.errors import LmdError
from lmd.machine import n_cores
from lmd.model.text import describe
from lmd.model.weights import fingerprint
from lmd.play.control_queue import with_changes
from lmd.play.guard import Guarded
from lmd.play.timeline import Plan, Timeline
from lmd.stream.controls import Controls
from lmd.stream.state import StreamState
from lmd.stream.streamer import Streamer

FORMAT = "lmd-take-2"
OLD_FORMAT = "lmd-take-1"  # without cuts
COUNT_EVERY = 8  # blocks
MAX_BLOCKS = 2_000_000  # a day of the shortest blocks
OLD_NAMES = {"forget_frames": "drop_context_frames", "seam": "boundary"}  # in takes of before


@dataclass(frozen=True)
class TakeHeader:
    """With what a take was played."""

    model_sha256: str  # of all weights, by name
    codec_sha256: str
    text: str  # the text encoder's class and size
    source: str  # where the weights came from, for `lmd.pretrained.open_instrument`
    sample_rate: int
    channels: int
    n_threads: int  # of torch (sums may differ in the last bit with another number)
    torch_version: str  # for the same reason
    format: str = FORMAT
    limited: bool = False  # whether a limiter held the wave within full scale
    start: str = ""  # a saved state beside the take that the stream began from; "": silence


@dataclass
class Take:
    """A take as read from its file."""

    path: Path
    header: TakeHeader
    # by the block that first had them; block 0 always has some
    changes: dict[int, Controls] = field(default_factory=dict)
    starts: dict[int, int] = field(default_factory=dict)  # the first sample of these blocks
    lines: dict[int, int] = field(default_factory=dict)  # where in the file they stand
    cuts: dict[int, int] = field(default_factory=dict)  # the first sample of blocks that cut in
    faults: dict[int, str] = field(default_factory=dict)  # blocks that were not finite, and why
    threads: dict[int, int] = field(default_factory=dict)  # torch threads, from that block on
    # (block, sample) at which the sink had run dry
    underruns: list[tuple[int, int]] = field(default_factory=list)
    n_blocks: int = 0
    n_samples: int = 0
    sha256: str | None = None  # of all samples, float32 little-endian; None if it broke off

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
        self.hexdigest = self._hash.hexdigest

    def update(self, samples: np.ndarray) -> None:
        """Add `[channel, sample]`."""
        self._hash.update(np.ascontiguousarray(samples.T.astype("<f4", copy=False)).tobytes())


def header_of(streamer: Streamer, source: str) -> TakeHeader:
    """The first line of a take played by that streamer; hashing its weights takes a moment."""
    return TakeHeader(
        model_sha256=fingerprint(streamer.denoiser),
        codec_sha256=fingerprint(streamer.codec),
        text=describe(streamer.text),
        source=source,
        sample_rate=streamer.codec.sample_rate,
        channels=streamer.codec.channels,
        n_threads=torch.get_num_threads(),
        torch_version=str(torch.__version__),
        limited=True,
    )


class TakeWriter:
    """Writes a take; what has been heard is on disk a moment later.

    Raises:
        LmdError: the file exists, or it cannot be written; so every method, on a full disk.
    """

    def __init__(self, path: str | Path, header: TakeHeader) -> None:
        self.path = Path(path)
        try:
            self._file = self.path.open("x", encoding="utf-8")
        except OSError as error:
            found = f"{self.path} ({error.strerror})"
            raise LmdError(found, "a new file in a folder that exists", "Rename it.") from error
        self._previous: Controls | None = None
        self._hash, self._n_blocks, self._n_samples = SampleHash(), 0, 0
        self._n_threads = header.n_threads
        self._line(dataclasses.asdict(header))

    def _line(self, values: dict[str, Any]) -> None:
        try:
            self._file.write(json.dumps(values, ensure_ascii=False) + "\n")
            self._file.flush()
        except OSError as error:
            found = f"{self.path} ({error.strerror})"
            raise LmdError(found, "room on the disk", "Make some.") from error

    def note(self, **what: Any) -> None:
        """Note something before the next block, e.g. `underrun=True`."""
        self._line({"block": self._n_blocks, "sample": self._n_samples, **what})

    def heard(self, plans: Sequence[Plan], samples: np.ndarray) -> None:
        """Note plans whose first sample has been heard, and the samples `[channel, sample]`.

        Of a plan its controls are noted if they are new, its cut and its fault if it had one.
        """
        for plan in plans:
            self._plan(plan)
        self._hash.update(samples)
        self._n_samples += samples.shape[-1]

    def _plan(self, plan: Plan) -> None:
        """One block more."""
        place = {"block": self._n_blocks, "sample": plan.start_sample}
        if plan.n_threads != self._n_threads:
            self._line(place | {"threads": plan.n_threads})
            self._n_threads = plan.n_threads
        if plan.controls != self._previous:
            values = dataclasses.asdict(plan.controls)
            known = dataclasses.asdict(self._previous).items() if self._previous else ()
            changed = {k: v for k, v in values.items() if (k, v) not in known}
            self._line(place | {"controls": changed})
            self._previous = plan.controls
        if plan.cut_frame is not None:
            self._line(place | {"cut": plan.cut_frame})
        if plan.played.fault is not None:
            self._line(place | {"fault": plan.played.fault})
        self._n_blocks += 1
        if self._n_blocks % COUNT_EVERY == 0:
            self._line(self._count())

    def _count(self) -> dict[str, Any]:
        return {"blocks": self._n_blocks, "samples": self._n_samples}

    def close(self) -> None:
        """Write the last line; a take of no block at all is no take and leaves no file."""
        if self._file.closed:
            return
        try:
            if self._n_blocks:
                self._line(self._count() | {"sha256": self._hash.hexdigest()})
        finally:
            with suppress(OSError):
                self._file.close()
            if not self._n_blocks:
                self.path.unlink(missing_ok=True)


def begin_take(
    path: Path, header: TakeHeader, streamer: Streamer, start: StreamState | None = None
) -> TakeWriter:
    """A new take; the state that the stream begins from, if not silence, is saved beside it.

    Raises:
        LmdError: see `TakeWriter` and `Streamer.save_state`.
    """
    beside = path.with_suffix(".safetensors")
    name = "" if start is None else beside.name
    if name and beside.exists():
        raise LmdError(f"{beside} exists", "a new file for the take's beginning", "Rename it.")
    writer = TakeWriter(path, dataclasses.replace(header, start=name))
    if start is not None:
        streamer.save_state(start, beside)
    return writer


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
    except (OSError, ValueError, TypeError, RecursionError) as error:
        raise LmdError(f"{path} ({error})", f"a take ({FORMAT})", "Give another file.") from error
    if header.format not in (FORMAT, OLD_FORMAT):
        raise LmdError(f"{path} of format {header.format!r}", FORMAT, "Update lmd, or play anew.")
    take = Take(path, header)
    for number, line in enumerate(lines[1:], start=2):
        try:
            _take_in(take, number, json.loads(line))
        except (ValueError, TypeError, AttributeError, RecursionError) as error:
            is_half = isinstance(error, json.JSONDecodeError)
            if is_half and number == len(lines) and take.sha256 is None:
                break  # the line that was being written when it broke off
            found, expected = getattr(error, "found", error), "a line of a take"
            raise LmdError(
                f"{path}, line {number}: {found}", getattr(error, "expected", expected), "Mend it."
            ) from error
    if 0 not in take.changes:
        raise LmdError(f"{path} without controls for block 0", "a take that played", "Play anew.")
    noted = [*take.changes, *take.cuts, *take.faults, *(block - 1 for block, _ in take.underruns)]
    take.n_blocks = max(take.n_blocks, max(noted) + 1)
    return take


def _take_in(take: Take, number: int, entry: Any) -> None:
    """One more line of a take."""
    if not isinstance(entry, dict):
        raise LmdError(f"{entry!r}", "names and values in braces", "Mend it.")
    if "blocks" in entry:
        take.n_blocks, take.n_samples = _counts(entry, blocks=MAX_BLOCKS, samples=2**63)
        take.sha256 = entry.get("sha256")
        if not isinstance(take.sha256, str | None):
            raise LmdError(f"sha256 {take.sha256!r}", "a text", "Mend it.")
        return
    block, sample = _counts(entry, block=MAX_BLOCKS, sample=2**63)
    if "controls" in entry:
        before = next(reversed(take.changes.values()), Controls())
        changes = {OLD_NAMES.get(k, k): v for k, v in entry["controls"].items()}
        take.changes[block] = with_changes(before, changes)
        take.starts[block], take.lines[block] = sample, number
    elif "cut" in entry:
        take.cuts[block] = sample
    elif "fault" in entry:
        take.faults[block] = str(entry["fault"])
    elif "threads" in entry:
        (take.threads[block],) = _counts(entry, threads=2**31)
    else:
        take.underruns.append((block, sample))


def _counts(entry: dict[str, Any], **most: int) -> list[int]:
    """These values of a line: whole numbers from 0 to the given ones."""
    for name, limit in most.items():
        value = entry.get(name)
        if type(value) is not int or not 0 <= value <= limit:
            raise LmdError(f"{name} {value!r}", f"a whole number up to {limit}", "Mend it.")
    return [entry[name] for name in most]


@contextmanager
def as_many_threads(n_threads: int) -> Iterator[None]:
    """Torch with so many threads, as far as this machine has them; afterwards as before."""
    before = torch.get_num_threads()
    wanted = min(n_threads, max(before, n_cores()))
    try:
        if wanted != before:
            torch.set_num_threads(wanted)
        yield
    finally:
        if torch.get_num_threads() != before:
            torch.set_num_threads(before)


def play_again(take: Take, streamer: Streamer) -> Iterator[np.ndarray]:
    """The samples of a take, once more: `[channel, sample]`, block by block.

    Raises:
        LmdError: the streamer has other weights than the take was played with, or cannot play the
            controls that stand in it.
    """
    here = header_of(streamer, take.header.source)
    for name in ("sample_rate", "channels", "model_sha256", "codec_sha256", "text"):
        found, expected = str(getattr(take.header, name)), str(getattr(here, name))
        if found != expected:
            raise LmdError(
                f"{take.path} with {name} {found[:16]}",
                f"{expected[:16]}, as this instrument has it",
                "Load what it was played with.",
            )
    for block, controls in take.changes.items():
        try:
            controls.validate(streamer.window)
        except LmdError as error:
            found = f"{take.path}, line {take.lines[block]}: {error.found}"
            raise LmdError(found, error.expected, error.todo) from error
    return _blocks_again(take, streamer)


def _blocks_again(take: Take, streamer: Streamer) -> Iterator[np.ndarray]:
    start = streamer.start()
    if take.header.start:  # a name, no path: it lies beside the take
        start = streamer.load_state(take.path.parent / Path(take.header.start).name)
    timeline = Timeline(streamer, Guarded(start), take.header.limited)
    end = take.n_samples if take.sha256 is not None else math.inf
    finals = [end] * take.n_blocks  # up to where a block is final: no later cut goes before it
    for number in reversed(range(take.n_blocks - 1)):
        finals[number] = min(finals[number + 1], take.cuts.get(number + 1, math.inf))
    with as_many_threads(torch.get_num_threads()):
        for number, controls in enumerate(take.controls()):
            if number in take.threads:
                torch.set_num_threads(min(take.threads[number], torch.get_num_threads()))
            if number in take.cuts:
                try:
                    timeline.cut(take.cuts[number], controls)
                except LmdError as error:
                    found = f"{take.path}, block {number}: {error.found}"
                    raise LmdError(found, error.expected, error.todo) from error
            else:
                timeline.append(controls, take.faults.get(number))
            yield timeline.settle(round(min(timeline.n_samples, finals[number])))[1]
