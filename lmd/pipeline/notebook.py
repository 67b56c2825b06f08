"""One notebook under papermill: its parameters, its execution, its log.

papermill only warns about a parameter that a notebook does not have, and then runs at full size;
here it is an error before anything runs. Its progress bar stands still while a cell works; here
the line is redrawn, with the last thing that the notebook said. It waits for a silent cell for
ever; here a cell that says nothing for `MAX_SILENCE_S` (or `LMD_CELL_TIMEOUT_S` seconds, from the
environment) ends the run.
"""

import ast
import asyncio
import math
import os
import shutil
import sys
import time
import warnings
from collections.abc import Callable, Mapping
from contextlib import closing
from pathlib import Path
from typing import Any

import papermill
import zmq
from nbclient.exceptions import DeadKernelError
from nbclient.util import run_sync
from papermill.clientwrap import PapermillNotebookClient
from papermill.engines import Engine, papermill_engines
from papermill.exceptions import PapermillExecutionError
from tqdm import tqdm
from traitlets.config import Config

from lmd.errors import LmdError
from lmd.pipeline.kernel import KernelClient
from lmd.pipeline.progress import CellCount, Lines, Log, Ticker

OUTPUT = "output_dir"  # the parameter that a run sets
REQUIRED = (OUTPUT, "seed", "preset")
BAR = "{desc}: cell {n_fmt}/{total_fmt} [{elapsed}]{postfix}"
KERNEL_ENVIRONMENT = {
    "MPLBACKEND": "module://matplotlib_inline.backend_inline",
    "TQDM_MININTERVAL": "2",  # a log is read, not watched
}
MAX_SILENCE_S = 1800.0  # of a cell; long ones show a progress bar, so they are not silent
SILENCE_VARIABLE = "LMD_CELL_TIMEOUT_S"  # seconds instead of these, e.g. where CI runs
ENCRYPTION = "auto" if zmq.has("curve") else "disabled"  # between this process and the kernel


class NotebookFailed(Exception):
    """A cell raised or fell silent, or the kernel died: which cell, which error."""

    def __init__(self, cell: str, error: str) -> None:
        self.cell, self.error = cell, error
        super().__init__(f"{cell}: {error}")


def max_silence_s() -> float:
    """For how many seconds a cell may say nothing.

    Raises:
        LmdError: the environment variable is not a number of seconds.
    """
    text = os.environ.get(SILENCE_VARIABLE, "")
    try:
        seconds = float(text or MAX_SILENCE_S)
    except ValueError:
        seconds = math.nan
    if not seconds > 0:
        raise LmdError(f"{SILENCE_VARIABLE}={text}", "seconds, more than 0", "Change or unset it.")
    return seconds


class _Client(PapermillNotebookClient):
    """papermill's client, but a cell may not be silent for ever.

    A kernel can hang, or its answer get lost on the way (see `lmd.pipeline.kernel`). The length of
    a cell has no limit, for training may take hours.
    """

    def __init__(self, nb_man: Any, *, silence_s: float, **options: Any) -> None:
        super().__init__(nb_man, **options)
        self.silence_s, self.heard_at_s = silence_s, 0.0

    def process_message(self, *args: Any, **options: Any) -> Any:
        """Every message is a sign of life."""
        self.heard_at_s = time.monotonic()
        return super().process_message(*args, **options)

    def papermill_execute_cells(self) -> None:
        """All cells; the kernel then ends seconds sooner (see `lmd.__main__.importing`)."""
        super().papermill_execute_cells()
        self.kc.execute("import gc; gc.freeze()", silent=True, store_history=False)

    async def async_execute_cell(self, cell: Any, cell_index: int, **options: Any) -> Any:
        """Run one cell.

        Raises:
            NotebookFailed: nothing was heard of it for `silence_s`.
        """
        number = self.code_cells_executed + 1
        self.heard_at_s = time.monotonic()
        work = asyncio.ensure_future(super().async_execute_cell(cell, cell_index, **options))
        while not work.done():
            left_s = self.heard_at_s + self.silence_s - time.monotonic()
            if left_s <= 0:
                work.cancel()
                await asyncio.gather(work, return_exceptions=True)
                self.nb_man.cell_exception(cell, cell_index=cell_index)
                raise NotebookFailed(
                    _cell_name(number, cell.source),
                    f"nothing heard of it for {self.silence_s:g} s "
                    f"({SILENCE_VARIABLE} sets the limit)",
                )
            await asyncio.wait([work], timeout=left_s)
        return work.result()

    execute_cell = run_sync(async_execute_cell)  # the parent's is bound to the parent's


def _cell_name(number: int | None, source: str) -> str:
    """A cell as a reader finds it: its number and its first line."""
    first_line = next((line for line in source.splitlines() if line.strip()), "")
    return f"In [{number}], `{first_line.strip()}`"


class _LmdEngine(Engine):
    """The client above, with the caller's bar and an environment for the kernel."""

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
            file=sys.stderr if sys.stderr.isatty() else Lines(),
        )
        nb_man.pbar = CellCount(bar)
        client = _Client(
            nb_man,
            silence_s=max_silence_s(),
            kernel_name=kernel_name,
            startup_timeout=60,
            stdout_file=log,
            stderr_file=log,
            config=Config(
                KernelManager={"transport_encryption": ENCRYPTION, "client_factory": KernelClient}
            ),
        )
        with bar, Ticker(bar, log, interval_s):
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
        NotebookFailed: a cell raised an error or was silent for too long, or the kernel died.
        LmdError: `LMD_CELL_TIMEOUT_S` is not a number of seconds.
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
        cell = _cell_name(error.exec_count, error.source)
        raise NotebookFailed(cell, f"{error.ename}: {error.evalue}") from error
    except DeadKernelError as error:
        raise NotebookFailed(
            f"the cell after the last finished one in {target.name}",
            "the kernel died; most often the memory was used up",
        ) from error
