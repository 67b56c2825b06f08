"""`python -m lmd run`: execute the notebooks in order, then write a report.

    python -m lmd run --profile quick --only 02,03 --set 02.n_train_steps=500

A notebook that finished is not run again unless something that it depends on has changed: its
cells, its parameters and the data that they name, the package and those that decide results, the
shipped weights, or what earlier notebooks left; or unless what it left is gone.
"""

import argparse
import json
import shutil
import sys
import time
from pathlib import Path
from typing import Any

from lmd.data.places import check_folder_free
from lmd.errors import LmdError
from lmd.pipeline.inputs import data_key, input_key
from lmd.pipeline.notebook import NotebookFailed, execute
from lmd.pipeline.plan import RunOptions, Task, plan
from lmd.pipeline.report import read_metrics, write_report

REDRAW_S = 30.0  # a new progress line this often where there is no terminal


class Run:
    """The folder of a run: executed copies, logs, outputs, and `run.json`, the record of each."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.record_path = folder / "run.json"
        self.records: dict[str, dict[str, Any]] = {}
        if self.record_path.exists():
            self.records = json.loads(self.record_path.read_text(encoding="utf-8"))["notebooks"]

    def output(self, name: str) -> Path:
        """Where that notebook writes."""
        return self.folder / name

    def metrics(self, name: str) -> Path:
        """The file that every notebook leaves there."""
        return self.output(name) / "metrics.json"

    def executed(self, name: str) -> Path:
        """Its executed copy."""
        return self.folder / "executed" / f"{name}.ipynb"

    def log(self, name: str) -> Path:
        """What it printed."""
        return self.folder / "logs" / f"{name}.log"

    def note(self, name: str, **values: Any) -> None:
        """Add to a notebook's record; the file on disk is replaced as a whole."""
        self.records[name] = self.records.get(name, {}) | values
        text = json.dumps({"notebooks": self.records}, indent=2, sort_keys=True)
        draft = self.record_path.with_suffix(".part")
        draft.write_text(text + "\n", encoding="utf-8")
        draft.replace(self.record_path)

    def prepare(self, name: str, key: str, begun_with: str, force: bool) -> None:
        """An empty output folder, or the one of an unfinished attempt at the same thing.

        A finished notebook that is run again starts from an empty one.

        Raises:
            LmdError: the folder holds files that no run has written.
        """
        output, record = self.output(name), self.records.get(name)
        if output.exists() and any(output.iterdir()):
            if record is None:
                raise LmdError(
                    f"files in {output} that are not from a run",
                    "an empty folder or one from an earlier run",
                    "Choose another --out.",
                )
            is_same = (record["key"], record.get("begun_with")) == (key, begun_with)
            if force or not is_same or record["status"] == "done":
                shutil.rmtree(output)
        for folder in (output, self.executed(name).parent, self.log(name).parent):
            folder.mkdir(parents=True, exist_ok=True)


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the command's arguments."""
    parser.add_argument("--profile", default="quick", help="smoke, quick (default), full or paper")
    parser.add_argument("--only", default="", metavar="02,03", help="only these notebooks")
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        dest="settings",
        metavar="02.NAME=VALUE",
        help="replace one parameter of a notebook (`all.` for every one); may be repeated",
    )
    parser.add_argument("--force", action="store_true", help="run even what is up to date")
    parser.add_argument("--out", type=Path, help="folder of the run (default outputs/PROFILE)")


def main(args: argparse.Namespace) -> int:
    """Run the notebooks; 1 when one of them failed."""
    only = tuple(word.strip() for word in args.only.split(",") if word.strip())
    return run(
        RunOptions(
            profile=args.profile,
            only=only,
            settings=tuple(args.settings),
            force=args.force,
            out=args.out,
        )
    )


def run(options: RunOptions) -> int:
    """Execute what the options ask for and write `report.html` and `metrics.json`.

    Returns:
        0, or 1 when a notebook failed (the run stops there, the report is still written).

    Raises:
        LmdError: an unknown profile, notebook or parameter, or a folder that cannot be written;
            nothing has been run then.
    """
    tasks = plan(options)
    folder = options.folder
    check_folder_free(folder)
    folder.mkdir(parents=True, exist_ok=True)
    current = Run(folder)
    started = time.perf_counter()
    failed = False
    for task in tasks:
        if not _run_one(current, task, options):
            failed = True
            break
    report = write_report(folder, options.profile, current.records)
    sounds = sorted(
        path
        for pattern in ("*.wav", "*.flac", "*.ogg")
        for path in folder.glob(f"[0-9][0-9]_*/{pattern}")
    )
    for sound in sounds:
        print(f"sound   {_shown(sound)}")
    print(f"report  {_shown(report)}")
    print(f"{'stopped' if failed else 'done'} after {time.perf_counter() - started:.0f} s")
    return int(failed)


def _run_one(current: Run, task: Task, options: RunOptions) -> bool:
    """Run one notebook unless it is up to date; whether later ones may go on."""
    earlier = [current.output(name) for name in current.records if name < task.name]
    key = input_key(task, earlier, options.weights)
    record = current.records.get(task.name, {})
    begun_with = data_key(task, current.folder, options.weights)
    is_same = record.get("key") == key and record.get("status") == "done"
    is_same = is_same and record["data"] == begun_with and current.metrics(task.name).is_file()
    if is_same and not options.force:
        print(f"{task.name}: up to date ({record['seconds']:.0f} s when it ran)")
        return True
    current.prepare(task.name, key, begun_with, options.force)
    started = time.perf_counter()
    begun = {"key": key, "begun_with": begun_with, "parameters": dict(task.parameters)}
    current.note(task.name, status="running", error="", **begun)
    error = _attempt(current, task)
    seconds = round(time.perf_counter() - started, 2)
    data = data_key(task, current.folder, options.weights)
    status = "failed" if error else "done"
    current.note(task.name, status=status, error=error, seconds=seconds, data=data)
    if error:
        print(f"{task.name} failed: {error}", file=sys.stderr)
        print(f"  executed copy  {_shown(current.executed(task.name))}", file=sys.stderr)
        print(f"  log            {_shown(current.log(task.name))}", file=sys.stderr)
    return not error


def _attempt(current: Run, task: Task) -> str:
    """Run one notebook and look at what it left; what went wrong, or an empty text."""
    metrics = current.metrics(task.name)
    try:
        execute(
            task.source,
            current.executed(task.name),
            task.parameters,
            current.log(task.name),
            interval_s=1.0 if sys.stderr.isatty() else REDRAW_S,
        )
        read_metrics(metrics)
    except (NotebookFailed, LmdError) as failure:
        return str(failure)
    return "" if metrics.exists() else "it left no metrics.json in its output_dir"


def _shown(path: Path) -> str:
    """Short, if it lies under the current folder."""
    full = path.resolve()
    return str(full.relative_to(Path.cwd()) if full.is_relative_to(Path.cwd()) else full)
