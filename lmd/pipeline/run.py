"""`python -m lmd run`: execute the notebooks in order, then write a report.

    python -m lmd run --profile quick --only 02,03 --set 02.n_train_steps=500

A notebook that finished is not run again unless something that it depends on has changed: its
cells, its parameters and the data that they name, the package and those that decide results, the
shipped weights, or what earlier notebooks left; or unless what it left is gone.
"""

import hashlib
import json
import os
import shutil
import sys
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from lmd.errors import LmdError
from lmd.outputs import check_folder, write_json
from lmd.pipeline.notebook import OUTPUT, NotebookFailed, execute, parameters_of
from lmd.pipeline.plan import PACKAGE, Options, Task, plan
from lmd.pipeline.report import KINDS, read_metrics, versions, write_report

REDRAW_S = 30.0  # a new progress line this often where there is no terminal
SOURCES = (".py", ".js", ".css", ".j2")  # what of the package can change a result
NO_INPUTS = (OUTPUT, "cache")  # where a notebook writes; what can be made again
EXPECTED = "an empty folder or one from an earlier run"


def main(options: Options) -> int:
    """Execute what the options ask for and write `report.html` and `metrics.json`.

    Returns 1 when a notebook failed: the run stops there, the report is still written. Options that
    cannot be followed are refused before anything runs.
    """
    tasks = plan(options)
    check_folder(options.folder)
    run, began_s = Run(options), time.perf_counter()
    is_done = all(run.do(task) for task in tasks)  # stops at the first failure
    report = write_report(options.folder, options.profile, run.records)
    for sound in sorted(options.folder.glob("[0-9][0-9]_*/*")):
        if KINDS.get(sound.suffix, "").startswith("audio"):
            print(f"sound   {_shown(sound)}")
    print(f"report  {_shown(report)}")
    print(f"{'done' if is_done else 'stopped'} after {time.perf_counter() - began_s:.0f} s")
    return int(not is_done)


class Run:
    """The folder of a run: executed copies, logs, outputs, and `run.json`, the record of each.

    Raises:
        LmdError: the folder holds a report, or a `run.json`, that no run has written.
    """

    def __init__(self, options: Options) -> None:
        self.options, self.folder = options, options.folder
        self.record_path = self.folder / "run.json"
        self.records: dict[str, dict[str, Any]] = {}
        kept = [name for name in ("report.html", "metrics.json") if (self.folder / name).exists()]
        try:
            if self.record_path.exists():
                self.records = dict(json.loads(self.record_path.read_text("utf-8"))["notebooks"])
            elif kept:
                raise KeyError(kept[0])
        except (ValueError, KeyError, TypeError) as error:
            found = f"files in {self.folder} that are not from a run ({error!r})"
            raise LmdError(found, EXPECTED, "Choose another --out.") from error

    def note(self, name: str, **values: Any) -> None:
        """Add to a notebook's record; the file on disk is replaced as a whole."""
        self.records[name] = self.records.get(name, {}) | values
        write_json(self.record_path, {"notebooks": self.records})

    def do(self, task: Task) -> bool:
        """Run one notebook unless it is up to date; whether later ones may go on."""
        folder, name, began_s = self.folder, task.name, time.perf_counter()
        weights, force = self.options.weights, self.options.force
        inputs = [
            input_key(task, [folder / n for n in self.records if n < name], weights),
            data_key(task, folder, weights),
        ]
        output, record = folder / name, self.records.get(name, {})
        metrics, is_done = output / "metrics.json", record.get("status") == "done"
        if is_done and record.get("left") == inputs and metrics.is_file() and not force:
            print(f"{name}: up to date ({record['seconds']:.0f} s when it ran)")
            return True
        if output.exists() and any(output.iterdir()):
            if not record:
                found = f"files in {output} that are not from a run"
                raise LmdError(found, EXPECTED, "Choose another --out.")
            if force or is_done or record.get("inputs") != inputs:
                shutil.rmtree(output)  # else: of an unfinished attempt at the same thing
        copy, log = folder / "executed" / f"{name}.ipynb", folder / "logs" / f"{name}.log"
        for place in (output, copy.parent, log.parent):
            place.mkdir(parents=True, exist_ok=True)
        parameters = dict(task.parameters)
        self.note(name, status="running", error="", inputs=inputs, parameters=parameters)
        interval_s = 1.0 if sys.stderr.isatty() else REDRAW_S
        try:
            execute(task.source, copy, task.parameters, log, interval_s)
            read_metrics(metrics)
            error = "" if metrics.exists() else "it left no metrics.json in its output_dir"
        except (NotebookFailed, LmdError) as failure:
            error = str(failure)
        self.note(
            name,
            status="failed" if error else "done",
            error=error,
            seconds=round(time.perf_counter() - began_s, 2),
            left=[inputs[0], data_key(task, folder, weights)],  # with what it wrote there itself
        )
        if error:
            print(f"{name} failed: {error}", file=sys.stderr)
            print(f"  executed copy  {_shown(copy)}", file=sys.stderr)
            print(f"  log            {_shown(log)}", file=sys.stderr)
        return not error


def _shown(path: Path) -> str:
    """Short, if it lies under the current folder."""
    full = path.resolve()
    return str(full.relative_to(Path.cwd()) if full.is_relative_to(Path.cwd()) else full)


def input_key(task: Task, earlier: Iterable[Path], weights: Path) -> str:
    """A digest of cells, parameters, versions, package, shipped weights and earlier outputs."""
    cells = json.loads(task.source.read_text(encoding="utf-8"))["cells"]
    sources = [[cell["cell_type"], "".join(cell["source"])] for cell in cells]
    described = [sources, dict(task.parameters), versions()]
    digest = hashlib.blake2b(json.dumps(described, sort_keys=True).encode(), digest_size=16)
    package = [path for path in _files(PACKAGE) if path.suffix in SOURCES]
    package += sorted(task.source.parent.glob("*.py"))  # what lies beside the notebooks
    left = sorted(path for folder in earlier for path in _files(folder))
    for path in (*package, *sorted(weights.glob("*.safetensors")), *left):
        with path.open("rb") as file:
            content = hashlib.file_digest(file, "blake2b").hexdigest()
        digest.update(f"{path.parent.name}/{path.name} {content}\n".encode())
    return digest.hexdigest()


def data_key(task: Task, run: Path, weights: Path) -> str:
    """A digest of the files and folders that parameters name, outside the run and the weights.

    A folder of weights may be named as FOLDER:KIND. Names, sizes and times of change stand for
    contents. A notebook may write there as well, so take the digest again when it has ended.
    """
    digest = hashlib.blake2b(digest_size=16)
    for name, value in sorted((parameters_of(task.source) | dict(task.parameters)).items()):
        if name in NO_INPUTS or not isinstance(value, str):
            continue
        texts = [text for text in (value, value.rpartition(":")[0]) if text]
        places = [Path(task.source.parent, text) for text in texts]
        place = next((place.resolve() for place in places if os.path.exists(place)), None)
        if place and not any(place.is_relative_to(known.resolve()) for known in (run, weights)):
            for path in _files(place):
                about = path.stat()
                digest.update(f"{name} {path} {about.st_size} {about.st_mtime_ns}\n".encode())
    return digest.hexdigest()


def _files(place: Path) -> list[Path]:
    """A file itself, or all files of a folder, in order."""
    return sorted(path for path in (place, *place.rglob("*")) if path.is_file())
