"""What commands write: asked before the work, never one file over another or over other things."""

import hashlib
import json
import os
import shutil
import tempfile
from functools import lru_cache
from itertools import combinations
from pathlib import Path
from typing import Any

from lmd.errors import LmdError

PROBE_BYTES = 65_536


def check_folder(folder: Path, n_bytes: int = 0) -> None:
    """Refuse a folder that cannot be made, written into or filled; none is made.

    Args:
        folder: where results are to go.
        n_bytes: about how much will be in it; what an earlier run left there counts.

    Raises:
        LmdError: it is, or lies in, something else; it cannot be written; the disk is too full.
    """
    there = next(path for path in (folder, *folder.absolute().parents) if os.path.lexists(path))
    todo = "Choose another place."
    if not there.is_dir():
        raise LmdError(f"{there}, which is no folder", "a folder", todo)
    try:
        with tempfile.TemporaryFile(dir=there) as file:
            file.write(bytes(PROBE_BYTES))
    except OSError as error:
        found = f"{there} ({error.strerror})"
        raise LmdError(found, "a folder that can be written and has room", todo) from error
    if not n_bytes:
        return
    n_bytes -= sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    free = shutil.disk_usage(there).free
    if free < n_bytes:
        found = f"{free / 1e9:.2f} GB free for {folder}"
        raise LmdError(found, f"about {n_bytes / 1e9:.2f} GB more", "Free some. " + todo)


def check_outputs(
    *, make_folders: bool = False, json_key: str = "", **paths: Path | str | None
) -> None:
    """Refuse files that could not be written after the work, or would replace what they should not.

    Args:
        make_folders: whether the command makes their folders.
        json_key: what every earlier JSON file of the command has.
        paths: by the name of their flag; `json` may replace nothing but earlier JSON. None and "-"
            are not written.

    Raises:
        LmdError: see `check_apart` and `check_folder`; or something that is no file, or a file that
            holds something else, is there.
    """
    given = {name: Path(path) for name, path in paths.items() if path not in (None, "-")}
    check_apart(**given)
    for flag, path in given.items():
        if path.exists() and not path.is_file():
            raise LmdError(f"--{flag} {path}, which is no file", "the name of a file", "Name one.")
        if flag == "json" and path.exists() and not _is_json(path, json_key):
            found = f"--json {path}, which holds something else"
            raise LmdError(found, "a new file or an earlier one", "Rename it.")
        if not make_folders and not path.parent.is_dir():
            raise LmdError(f"--{flag} {path}", "a folder that exists", "Make it.")
        check_folder(path.parent)
        if path.exists() and not os.access(path, os.W_OK):
            raise LmdError(f"--{flag} {path}, not to be written", "one that is", "Rename it.")


def check_apart(**places: Path) -> None:
    """Refuse two flags that name one place.

    Raises:
        LmdError: they do.
    """
    for (one, a), (other, b) in combinations(places.items(), 2):
        if a.resolve() == b.resolve() or (a.exists() and b.exists() and a.samefile(b)):
            raise LmdError(f"{a} for both --{one} and --{other}", "two places", "Rename one.")


def write_atomic(path: str | Path, content: bytes) -> None:
    """Write a file so that a reader, or a crash, finds the old one or the new one, never half."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor, temporary = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


def write_json(path: str | Path, values: Any) -> None:
    """Write values as JSON, whole or not at all.

    Raises:
        LmdError: it cannot be written (the disk has filled up meanwhile).
    """
    try:
        write_atomic(path, (json.dumps(values, indent=1) + "\n").encode())
    except OSError as error:
        found = f"{path} ({error.strerror})"
        raise LmdError(found, "a file that can be written", "Make room.") from error


def file_sha256(path: Path) -> str:
    """The SHA-256 of a file's bytes, read once in a process while it stays as it is."""
    state = path.stat()
    return _sha256(path.absolute(), state.st_size, state.st_mtime_ns)


@lru_cache(maxsize=4096)
def _sha256(path: Path, size: int, changed_ns: int) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _is_json(path: Path, key: str) -> bool:
    """Whether a file holds JSON (an object with that key, if there is one), or nothing yet."""
    try:
        text = path.read_text(encoding="utf-8")
        values = json.loads(text or "{}")
    except (OSError, ValueError, RecursionError):
        return False
    return isinstance(values, dict | list) and (not text or not key or key in values)
