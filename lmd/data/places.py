"""Whether results can be written where they are to go: asked before the work that makes them."""

import os
from pathlib import Path

from lmd.errors import LmdError


def check_folder_free(folder: Path) -> None:
    """Refuse a folder that cannot be made or written into; nothing is made yet.

    Raises:
        LmdError: a file stands there or above, or writing is not allowed.
    """
    there = next(path for path in (folder, *folder.absolute().parents) if os.path.lexists(path))
    if not there.is_dir():
        raise LmdError(
            f"{there}, which is no folder: it is a file", "a folder", "Choose another place."
        )
    if not os.access(there, os.W_OK | os.X_OK):
        raise LmdError(
            f"a folder {there} that may not be written", "one that may", "Choose another place."
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
