"""Whether results can be written where they are to go: asked before the work that makes them."""

import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from lmd.errors import LmdError


def check_folder_free(folder: Path, n_bytes: int = 0) -> None:
    """Refuse a folder that cannot be made or written into; nothing is made yet.

    Args:
        folder: where results are to go.
        n_bytes: about how much will be in it, with what is there already.

    Raises:
        LmdError: a file stands there or above, writing is not allowed, or the disk is too full.
    """
    there = next(path for path in (folder, *folder.absolute().parents) if os.path.lexists(path))
    todo = "Choose another place."
    if not there.is_dir():
        raise LmdError(f"{there}, which is no folder: it is a file", "a folder", todo)
    if not os.access(there, os.W_OK | os.X_OK):
        raise LmdError(f"a folder {there} that may not be written", "one that may", todo)
    free = shutil.disk_usage(there).free
    if free < n_bytes:
        found = f"{free / 1e9:.2f} GB free for {folder}"
        raise LmdError(
            found, f"about {n_bytes / 1e9:.2f} GB", "Free some, or choose another place."
        )


def check_file_free(path: Path) -> None:
    """Refuse a file that cannot be written; nothing is made yet.

    Raises:
        LmdError: a folder stands there, its own folder cannot be made, or writing is not allowed.
    """
    if path.is_dir():
        raise LmdError(f"{path}, which is a folder", "a file to write", "Add a file name.")
    if path.is_file() and not os.access(path, os.W_OK):
        raise LmdError(
            f"a file {path} that may not be written", "one that may", "Choose another place."
        )
    check_folder_free(path.parent)


def check_json_free(path: Path, key: str) -> None:
    """Refuse a place for a JSON report where anything stands but an earlier one, which has `key`.

    Raises:
        LmdError: see `check_file_free`; or something else is there.
    """
    check_file_free(path)
    if path.is_file() and path.stat().st_size:
        try:
            is_report = key in json.loads(path.read_bytes())
        except (ValueError, TypeError, RecursionError):
            is_report = False
        if not is_report:
            raise LmdError(
                f"{path}, which is no earlier report", "a new file", "Choose another --json."
            )


def check_apart(**places: Path) -> None:
    """Refuse two options that name one place.

    Raises:
        LmdError: they do.
    """
    seen: dict[Path, str] = {}
    for name, place in places.items():
        other = seen.setdefault(place.resolve(), name)
        if other != name:
            found = f"{place} for both --{other} and --{name}"
            raise LmdError(found, "two places", "Choose another --" + name + ".")


def named_folder(text: str) -> Path:
    """A folder that a command is to read.

    Raises:
        LmdError: there is no such folder, or no name.
    """
    if not text or not Path(text).is_dir():
        raise LmdError(f"{text!r}", "a folder", "Check the path.")
    return Path(text)


@contextmanager
def writing_to(folder: Path) -> Iterator[None]:
    """Work whose results go to a folder: if the disk is full or read-only, one line says so.

    Raises:
        LmdError: instead of any `OSError`.
    """
    try:
        yield
    except OSError as error:
        raise LmdError(
            f"{error.strerror or error} ({error.filename or folder})",
            f"room and leave to write in {folder}",
            "Make room, then run the same again: it goes on where it stopped.",
        ) from error
