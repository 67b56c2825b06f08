"""The files in which a corpus and its latents keep their rows and settings: CSV, JSON, logs."""

import csv
import io
import json
from collections.abc import Collection, Iterator, Sequence
from dataclasses import MISSING, fields
from pathlib import Path
from typing import Any, TypeVar

import pandas as pd

from lmd.errors import LmdError
from lmd.outputs import write_atomic, write_json

T = TypeVar("T")


def read_rows(path: Path, kind: type[T], command: str) -> list[T]:
    """The lines of a CSV file, each a dataclass of plain values; `command` makes such a file.

    Raises:
        LmdError: no such file, other columns, or a line that is torn, by its number.
    """
    if not path.is_file():
        raise LmdError(f"no {path}", "a file of this name", f"Run: {command}.")
    columns = {field.name: field.type for field in fields(kind)}
    n_needed = sum(field.default is MISSING for field in fields(kind))
    line, rows = 1, []
    try:
        text = path.read_text("utf-8")
        reader = csv.reader(io.StringIO(text, newline=""), strict=True)
        header = next(reader, [])
        is_known = header == list(columns)[: max(n_needed, len(header))]
        for values in reader if is_known else ():
            line = reader.line_num
            if len(values) != len(header):
                raise ValueError(f"{len(values)} of {len(header)} values")
            rows.append(kind(*(t(v) for t, v in zip(columns.values(), values, strict=False))))
        if not text.endswith("\n"):
            raise ValueError("it ends in the middle of a line")
    except (ValueError, csv.Error) as error:
        todo = f"Restore it, or remove it and run: {command}."
        raise LmdError(f"{path}, line {line}: {error}", "a whole file", todo) from error
    if not is_known:
        odd = sorted(set(header) ^ set(columns))
        todo = f"Remove it and run: {command}."
        raise LmdError(f"columns {odd} in {path}", "those of this version", todo)
    return rows


def write_rows(path: Path, kind: type[T], rows: Sequence[T]) -> None:
    """Write dataclasses as the CSV file that `read_rows` reads, in one stroke."""
    table = pd.DataFrame(rows, columns=[field.name for field in fields(kind)])
    write_atomic(path, table.to_csv(index=False, lineterminator="\n").encode())


def read_settings(path: Path) -> dict[str, Any]:
    """A JSON object from a file.

    Raises:
        LmdError: it cannot be read, or holds something else.
    """
    try:
        values = json.loads(path.read_text("utf-8"))
        if not isinstance(values, dict):
            raise ValueError(f"a {type(values).__name__}, not an object")
    except (OSError, ValueError, RecursionError) as error:
        hint = "Restore it, or remove its folder and make it again."
        raise LmdError(f"{path}: {error}", "JSON settings", hint) from error
    return values


def hold_settings(path: Path, values: dict[str, Any], free: Collection[str] = ()) -> None:
    """Write settings, or hold them against those of an earlier run; names in `free` may differ.

    Raises:
        LmdError: others differ.
    """
    values = json.loads(json.dumps(values))
    if path.is_file():
        before = read_settings(path)
        differing = [k for k in sorted(values) if k not in free and before.get(k) != values[k]]
        if differing:
            found = f"{path.parent} made with other {', '.join(differing)}"
            todo = "Choose another --out, or remove that folder."
            raise LmdError(found, "the same settings, to go on with it", todo)
    write_json(path, dict(sorted(values.items())))


def read_log(path: Path) -> Iterator[dict[str, Any]]:
    """The objects of a log, one a line; a line that an interruption tore is passed over."""
    lines = path.read_bytes().splitlines() if path.is_file() else ()
    for line in lines:
        try:
            entry = json.loads(line)
        except ValueError:
            continue
        if isinstance(entry, dict):
            yield entry


def append_log(path: Path, entry: dict[str, Any]) -> None:
    """Add an object to a log."""
    with path.open("a") as log:
        log.write(json.dumps(entry, sort_keys=True) + "\n")
