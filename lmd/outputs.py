"""Files that commands write: checked before the work, never one over the other."""

import json
import os
import tempfile
from itertools import combinations
from pathlib import Path
from typing import Any

from lmd.errors import LmdError

PROBE_BYTES = 65_536


def check_outputs(**paths: Path | None) -> None:
    """Refuse what could not be written after the work, or would overwrite what it should not.

    Args:
        paths: by the name of their flag; what is called `json` may replace nothing but JSON.

    Raises:
        LmdError: two names of one file; a folder that is missing, full or not to be written into;
            something that is no file; another file where JSON is to be written.
    """
    given = {f"--{name}": path for name, path in paths.items() if path is not None}
    for (one, a), (other, b) in combinations(given.items(), 2):
        if a.resolve() == b.resolve() or (a.exists() and b.exists() and a.samefile(b)):
            raise LmdError(f"{one} and {other} both {str(a)!r}", "two files", "Rename one.")
    for flag, path in given.items():
        _check_place(flag, path)
        if flag == "--json" and path.exists() and not _is_json(path):
            raise LmdError(
                f"{flag} {path}, which holds something else", "a new file or JSON", "Rename it."
            )


def write_json(path: Path, values: Any) -> None:
    """Write values to a file, whole or not at all.

    Raises:
        LmdError: it cannot be written (the disk has filled up meanwhile).
    """
    try:
        with tempfile.NamedTemporaryFile("w", dir=path.parent, delete=False) as file:
            file.write(json.dumps(values, indent=2) + "\n")
        os.chmod(file.name, 0o644)
        os.replace(file.name, path)
    except OSError as error:
        raise LmdError(f"{path} ({error.strerror})", "a file that can be written", "") from error


def _check_place(flag: str, path: Path) -> None:
    """Write a little next to it, as the work would."""
    if path.exists() and not path.is_file():
        raise LmdError(f"{flag} {path}, which is no file", "the name of a file", "Name one.")
    try:
        with tempfile.TemporaryFile(dir=path.parent) as file:
            file.write(bytes(PROBE_BYTES))
        if path.exists():
            path.open("ab").close()
    except OSError as error:
        raise LmdError(
            f"{flag} {path} ({error.strerror})",
            "a folder that exists, can be written and has room",
            "Choose another one.",
        ) from error


def _is_json(path: Path) -> bool:
    """Whether a file holds JSON, or nothing yet."""
    try:
        text = path.read_text(encoding="utf-8")
        return not text or isinstance(json.loads(text), dict | list)
    except (OSError, ValueError, RecursionError):
        return False
