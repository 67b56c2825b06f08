"""One notebook under papermill: its parameters, its execution, its log.

papermill only warns about a parameter that a notebook does not have, and then runs at full size;
here it is an error before anything runs. Its progress bar stands still while a cell works; here
the line is redrawn, with the last thing that the notebook said.
"""

import ast
import os
import re
import shutil
import sys
import threading
import time
import warnings
from collections.abc import Callable, Mapping
from contextlib import closing
from pathlib import Path
from typing import Any, TextIO

import papermill
import zmq
from nbclient.exceptions import DeadKernelError
from papermill.clientwrap import PapermillNotebookClient
from papermill.engines import Engine, papermill_engines
from papermill.exceptions import PapermillExecutionError
from tqdm import tqdm
from traitlets.config import Config

from lmd.errors import LmdError

REQUIRED = ("output_dir", "seed", "preset")
BAR = "{desc}: cell {n_fmt}/{total_fmt} [{elapsed}]{postfix}"
KERNEL_ENVIRONMENT = {
    "MPLBACKEND": "module://matplotlib_inline.backend_inline",
    "TQDM_MININTERVAL": "2",  # a log is read, not watched
}
ENCRYPTION = "auto" if zmq.has("curve") else "disabled"  # between this process and the kernel
_ESCAPES = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")
_NOISE = re.compile(r"^\s*$")


class NotebookFailed(Exception):
    """A cell raised, or the kernel died: which cell, which error."""

    def __init__(self, cell: str, error: str) -> None:
        self.cell, self.error = cell, error
        super().__init__(f"{cell}: {error}")


class Log:
    """A text file made of lines, though progress bars write over themselves.

    Text that a carriage return would overwrite is kept at most once per `interval_s`.
    """

    def __init__(self, path: Path, interval_s: float = 5.0) -> None:
        self.file: TextIO = path.open("w", encoding="utf-8")
        self.interval_s = interval_s
        self.last = ""  # the newest non-empty text, finished or not
        self._pending = ""
        self._shown_at = float("-inf")

    def write(self, text: str) -> None:
        """Add text as it comes, in pieces of any size."""
        self._pending += _ESCAPES.sub("", text).replace("\r\n", "\n")
        *complete, self._pending = re.split(r"(?<=[\r\n])", self._pending)
        for piece in complete:
            self._line(piece[:-1], final=piece.endswith("\n"))
        if not _NOISE.match(self._pending):
            self.last = self._pending.strip()

    def _line(self, line: str, final: bool) -> None:
        if _NOISE.match(line):
            return
        self.last = line.strip()
        now = time.monotonic()
        if not final and now - self._shown_at < self.interval_s:
            return
        if not final:
            self._shown_at = now
        self.file.write(line.rstrip() + "\n")
        self.file.flush()

    def flush(self) -> None:
        """Nothing waits here but an unfinished line."""
        self.file.flush()

    def close(self) -> None:
        """Write what is left and close the file."""
        self._line(self._pending, final=True)
        self.file.close()


def without_bar(text: str) -> str:
    """A progress bar's text without the bar: `training: 50% 20/40 [00:02<00:02]`."""
    return re.sub(r"\s+", " ", re.sub(r"\|[^|]*\|", " ", text))


class _Ticker:
    """Redraws a bar while a long cell works."""

    def __init__(self, bar: tqdm, log: Log, interval_s: float) -> None:
        self.bar, self.log, self.interval_s = bar, log, interval_s
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._work, daemon=True)

    def __enter__(self) -> "_Ticker":
        self._thread.start()
        return self

    def _work(self) -> None:
        while not self._stop.wait(self.interval_s):
            self.bar.set_postfix_str(without_bar(self.log.last)[:60])  # redraws

    def __exit__(self, *error: object) -> None:
        self._stop.set()
        self._thread.join()


class _Lines:
    """Standard error where it is no terminal: a line for every redraw."""

    def write(self, text: str) -> None:
        if text.strip():
            sys.stderr.write(text.strip() + "\n")

    def flush(self) -> None:
        sys.stderr.flush()


class _CellCount:
    """What papermill takes for its bar: it counts finished cells and nothing else.

    (papermill itself would fill the bar when a notebook fails.)
    """

    n = 0

    def __init__(self, bar: tqdm) -> None:
        self.update = bar.update

    def refresh(self) -> None: ...

    def close(self) -> None: ...


class _LmdEngine(Engine):
    """papermill's own client, with the caller's bar and an environment for the kernel."""

    @classmethod
    def execute_managed_notebook(
        cls, nb_man: Any, kernel_name: str, *, name: str, log: Log, interval_s: float, **_: Any
    ) -> None:
        bar = tqdm(
            total=len(nb_man.nb.cells),
            desc=name,
            bar_format=BAR,
            mininterval=interval_s,
            ncols=shutil.get_terminal_size((120, 24)).columns,
            nrows=24,  # a terminal that does not know its size gets a line too
            file=sys.stderr if sys.stderr.isatty() else _Lines(),
        )
        nb_man.pbar = _CellCount(bar)
        client = PapermillNotebookClient(
            nb_man,
            kernel_name=kernel_name,
            startup_timeout=60,
            stdout_file=log,
            stderr_file=log,
            config=Config(KernelManager={"transport_encryption": ENCRYPTION}),
        )
        with bar, _Ticker(bar, log, interval_s):
            client.execute(env=os.environ | KERNEL_ENVIRONMENT)


papermill_engines.register("lmd", _LmdEngine)


def parameters_of(path: Path) -> dict[str, Any]:
    """Names and default values in the cell tagged `parameters`.

    Raises:
        LmdError: the notebook cannot be read, has no such cell, lacks `output_dir`, `seed` or
            `preset`, or a default is not a plain literal.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # papermill warns of a missing cell; refused below
            inspected = papermill.inspect_notebook(path)
    except (ValueError, KeyError, AttributeError) as error:
        raise LmdError(
            f"a notebook {path.name} that cannot be read ({error})",
            "a Jupyter notebook with kernelspec metadata",
            "Open and save it in JupyterLab.",
        ) from error
    missing = [name for name in REQUIRED if name not in inspected]
    if missing:
        raise LmdError(
            f"no parameter {', '.join(missing)} in {path.name}",
            f"{', '.join(REQUIRED)} in the one cell tagged `parameters`",
            "Add them to that cell.",
        )
    try:
        return {name: ast.literal_eval(entry["default"]) for name, entry in inspected.items()}
    except (ValueError, SyntaxError) as error:
        raise LmdError(
            f"a parameter of {path.name} that is not a plain literal ({error})",
            "numbers, texts, lists, True, False or None",
            "Compute it in the next cell instead.",
        ) from error


def check_parameters(path: Path, defaults: Mapping[str, Any], given: Mapping[str, Any]) -> None:
    """Refuse names that the notebook does not have, and values of another type than its default.

    Raises:
        LmdError: a misspelt name or a wrong type.
    """
    for name, value in given.items():
        if name not in defaults:
            raise LmdError(
                f"parameter {name!r} for {path.name}",
                f"one of {', '.join(sorted(defaults))}",
                "Check the spelling.",
            )
        default = defaults[name]
        right = default is None or value is None or type(value) is type(default)
        if not right and not (isinstance(default, float) and type(value) is int):
            raise LmdError(
                f"{name} = {value!r} ({type(value).__name__}) for {path.name}",
                f"{type(default).__name__}, as {default!r}",
                "Give a value of that type.",
            )


def execute(
    source: Path, target: Path, parameters: Mapping[str, Any], log_path: Path, interval_s: float
) -> None:
    """Run `source` into `target` with its own folder as working directory.

    Args:
        source: the notebook; it is not changed.
        target: the executed copy, written after every cell and kept when a cell fails.
        parameters: values for its `parameters` cell.
        log_path: everything that the notebook printed, line by line.
        interval_s: how often the progress line is redrawn.

    Raises:
        NotebookFailed: a cell raised an error, or the kernel died.
    """
    with closing(Log(log_path)) as log:
        _guarded(
            target,
            lambda: papermill.execute_notebook(
                source,
                target,
                dict(parameters),
                engine_name="lmd",
                cwd=source.parent,
                progress_bar=False,
                name=source.stem,
                log=log,
                interval_s=interval_s,
            ),
        )


def _guarded(target: Path, work: Callable[[], object]) -> None:
    """papermill's two ways of failing as one error that names the cell."""
    try:
        work()
    except PapermillExecutionError as error:
        first_line = next((s for s in error.source.splitlines() if s.strip()), "")
        raise NotebookFailed(
            f"In [{error.exec_count}], `{first_line.strip()}`", f"{error.ename}: {error.evalue}"
        ) from error
    except DeadKernelError as error:
        raise NotebookFailed(
            f"the cell after the last finished one in {target.name}",
            "the kernel died; most often the memory was used up",
        ) from error
