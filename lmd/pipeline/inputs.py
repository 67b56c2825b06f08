"""What a notebook's result depends on, as digests that are compared before it would run again."""

import hashlib
import json
import os
from collections.abc import Iterable, Iterator
from pathlib import Path

from lmd.pipeline.notebook import OUTPUT, parameters_of
from lmd.pipeline.plan import PACKAGE, Task
from lmd.pipeline.report import versions

SOURCES = ("*.py", "*.cpp", "*.js", "*.css")  # what of the package can change a result
NO_INPUTS = (OUTPUT, "cache")  # where it writes; what can be made again


def input_key(task: Task, earlier: Iterable[Path], weights: Path) -> str:
    """A digest of cells, parameters, versions, package, shipped weights and earlier outputs.

    Args:
        task: the notebook.
        earlier: the folders that earlier notebooks of the run have written.
        weights: the folder of shipped weights.
    """
    cells = json.loads(task.source.read_text(encoding="utf-8"))["cells"]
    sources = [[cell["cell_type"], "".join(cell["source"])] for cell in cells]
    described = [sources, task.parameters, versions()]
    digest = hashlib.blake2b(json.dumps(described, sort_keys=True).encode(), digest_size=16)
    package = sorted(path for pattern in SOURCES for path in PACKAGE.rglob(pattern))
    left = sorted(path for folder in earlier for path in folder.rglob("*") if path.is_file())
    beside = sorted(task.source.parent.glob("*.py"))
    for path in (*package, *beside, *sorted(weights.glob("*.safetensors")), *left):
        with path.open("rb") as file:
            content = hashlib.file_digest(file, "blake2b").hexdigest()
        digest.update(f"{path.parent.name}/{path.name} {content}\n".encode())
    return digest.hexdigest()


def data_key(task: Task, run: Path, weights: Path) -> str:
    """A digest of the files and folders that parameters name, outside the run and the weights.

    A folder of weights may be named as FOLDER:KIND.

    Music may be gigabytes, so names, sizes and times of change stand for contents. A notebook may
    write there as well (01_data_prep does), so take the digest when it has ended.

    Args:
        task: the notebook; its folder is where relative paths begin.
        run, weights: folders whose contents `input_key` holds already.
    """
    digest = hashlib.blake2b(digest_size=16)
    for name, value in sorted((parameters_of(task.source) | task.parameters).items()):
        if name in NO_INPUTS or not isinstance(value, str) or not value:
            continue
        place = _named(task.source.parent, value)
        if place is None:
            continue
        resolved = place.resolve()
        if any(resolved.is_relative_to(known.resolve()) for known in (run, weights)):
            continue
        for path in _files(resolved):
            about = path.stat()
            digest.update(f"{name} {path} {about.st_size} {about.st_mtime_ns}\n".encode())
    return digest.hexdigest()


def _named(folder: Path, value: str) -> Path | None:
    """What a parameter names, seen from a folder; None: it is a text, or nothing is there yet."""
    for name in (value, value.rpartition(":")[0]):
        if name and os.path.exists(place := os.path.join(folder, name)):
            return Path(place)
    return None


def _files(place: Path) -> Iterator[Path]:
    """A file itself, or all files of a folder, in order."""
    if place.is_file():
        yield place
        return
    yield from sorted(path for path in place.rglob("*") if path.is_file())
