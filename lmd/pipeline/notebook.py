"""One notebook under papermill: its parameters, its execution, its log.

Unlike papermill alone: an unknown parameter is an error before anything runs, the progress line has
the last thing that the notebook said, and a cell that says nothing for half an hour ends the run.
"""

import ast
import asyncio
import math
import os
import re
import shutil
import sys
import time
import warnings
from collections.abc import Mapping
from contextlib import closing, suppress
from pathlib import Path
from queue import Empty
from typing import Any

import papermill
import zmq
from jupyter_client.asynchronous import AsyncKernelClient
from jupyter_client.channels import AsyncZMQSocketChannel
from nbclient.exceptions import CellExecutionError, DeadKernelError
from nbclient.util import run_sync
from papermill.clientwrap import PapermillNotebookClient
from papermill.engines import Engine, papermill_engines
from papermill.exceptions import PapermillExecutionError
from traitlets import Type
from traitlets.config import Config

from lmd.errors import LmdError

OUTPUT = "output_dir"  # the parameter that a run sets
REQUIRED = (OUTPUT, "seed", "preset")
KERNEL_ENVIRONMENT = {
    "MPLBACKEND": "module://matplotlib_inline.backend_inline",
    "TQDM_MININTERVAL": "2",  # a log is read, not watched
}
MAX_SILENCE_S = 1800.0  # of a cell; long ones show a progress bar, so they are not silent
SILENCE_VARIABLE = "LMD_CELL_TIMEOUT_S"  # seconds instead of these, e.g. where CI runs
LAST_OUTPUTS_S = 300  # for what a cell that has ended left to be read
ENCRYPTION = "auto" if zmq.has("curve") else "disabled"  # between this process and the kernel
LOOK_AGAIN_S = 1.0


class NotebookFailed(Exception):
    """A cell raised or fell silent, or the kernel died: which cell, which error."""

    def __init__(self, cell: str, error: str) -> None:
        super().__init__(f"{cell}: {error}")


def parameters_of(path: Path) -> dict[str, Any]:
    """Names and default values in the cell tagged `parameters`.

    Raises:
        LmdError: no notebook, one that lacks one of `REQUIRED`, or a default that is no literal.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # papermill warns of a missing cell; refused below
            entries = papermill.inspect_notebook(path)
        values = {name: ast.literal_eval(entry["default"]) for name, entry in entries.items()}
    except Exception as error:  # papermill and nbformat raise many kinds
        found = f"{path} whose parameters cannot be read: {error}"
        raise LmdError(found, "a notebook, and literals as defaults", "Correct it.") from error
    if missing := ", ".join(name for name in REQUIRED if name not in values):
        expected = f"{', '.join(REQUIRED)} in one code cell tagged `parameters`"
        raise LmdError(f"no parameter {missing} in {path.name}", expected, "Add them there.")
    return values


def check_parameters(path: Path, given: Mapping[str, Any]) -> None:
    """Refuse names that the notebook does not have, and values of another type than its default."""
    defaults = parameters_of(path)
    for name, value in given.items():
        if name not in defaults:
            expected = f"one of {', '.join(sorted(defaults))}"
            raise LmdError(f"parameter {name!r} for {path.name}", expected, "Check the spelling.")
        default, found = defaults[name], type(value)
        allowed = (int, float) if isinstance(default, float) else (type(default),)
        if found not in allowed and default is not None and value is not None:
            expected = f"{allowed[-1].__name__}, as {default!r}"
            raise LmdError(f"{name} = {value!r} for {path.name}", expected, "Give such a value.")


def max_silence_s() -> float:
    """For how many seconds a cell may say nothing; what is no number of seconds is refused."""
    text = os.environ.get(SILENCE_VARIABLE) or f"{MAX_SILENCE_S}"
    with suppress(ValueError):
        if (seconds := float(text)) > 0:
            return seconds
    raise LmdError(f"{SILENCE_VARIABLE}={text}", "seconds, more than 0", "Change or unset it.")


class Log:
    """A text file of whole lines, though progress bars write over themselves.

    Text that a carriage return would overwrite is kept at most once per `interval_s`.
    """

    def __init__(self, path: Path, interval_s: float = 5.0) -> None:
        self.file, self.interval_s = path.open("w", encoding="utf-8"), interval_s
        self.last = ""  # the newest text that is not blank, finished or not
        self._pending, self._kept_s = "", -math.inf

    def write(self, text: str) -> None:
        """Add text as it comes, in pieces of any size."""
        text = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", text).replace("\r\n", "\n")
        *lines, self._pending = re.split(r"(?<=[\r\n])", self._pending + text)
        for line in lines:
            self._line(line)
        self.last = self._pending.strip() or self.last

    def _line(self, line: str) -> None:
        """Keep a line that is final, or that it is time for."""
        self.last = line.strip() or self.last
        is_final, now_s = not line.endswith("\r"), time.monotonic()
        if line.strip() and (is_final or now_s - self._kept_s >= self.interval_s):
            self._kept_s = self._kept_s if is_final else now_s
            print(line.rstrip(), file=self.file, flush=True)

    def flush(self) -> None:
        """Nothing to do: only an unfinished line waits."""

    def close(self) -> None:
        """Write what is left and close the file."""
        self._line(self._pending)
        self.file.close()


class PatientChannel(AsyncZMQSocketChannel):
    """A channel that looks into its queue now and then, whether it was woken or not.

    Jupyter's client reads its sockets with asyncio and sends through a plain view of them. ZeroMQ
    tells of news once only: an answer that arrives while something is sent lies in the queue, and
    the reader is never woken (pyzmq 27.3, jupyter_client 8.10, nbclient 0.11).
    """

    async def get_msg(self, timeout: float | None = None) -> dict[str, Any]:
        """The next message within `timeout` seconds (None: as long as it takes), else `Empty`."""
        while timeout is None:
            with suppress(Empty):
                return await super().get_msg(timeout=LOOK_AGAIN_S)
        return await super().get_msg(timeout=timeout)


class _KernelClient(AsyncKernelClient):
    shell_channel_class = Type(PatientChannel)
    iopub_channel_class = Type(PatientChannel)

    def connect_iopub(self, identity: bytes | None = None) -> zmq.Socket:
        """Messages wait here, in any number: what waits at the kernel is dropped in a flood."""
        self.context.rcvhwm = 0
        return super().connect_iopub(identity)


class _Client(PapermillNotebookClient):
    """papermill's client, with a progress line, a limit of silence and errors that name a cell.

    The length of a cell has no limit, for training may take hours.
    """

    def __init__(self, nb_man: Any, *, name: str, said: Log, interval_s: float, **options: Any):
        super().__init__(nb_man, stdout_file=said, stderr_file=said, **options)
        self.label, self.said, self.interval_s = name, said, interval_s
        self.n_done, self.began_s, self.drawn_s = 0, time.monotonic(), -math.inf
        self.silence_s, self.news_s = max_silence_s(), 0.0

    def draw(self, is_last: bool = False) -> None:
        """The progress line, if it is time to: finished cells, and what was said last."""
        now_s, is_terminal = time.monotonic(), sys.stderr.isatty()
        if is_last or now_s - self.drawn_s >= self.interval_s:
            self.drawn_s, spent_s = now_s, now_s - self.began_s
            said = " ".join(re.sub(r"\|[^|]*\|", " ", self.said.last).split())  # without the bar
            line = f"{self.label}: cell {self.n_done}/{len(self.nb.cells)} "
            line += f"[{spent_s // 60:.0f}:{spent_s % 60:02.0f}], {said[:60]}"
            n_columns = shutil.get_terminal_size((120, 24)).columns - 1
            start, end = ("\r", "\n" * is_last) if is_terminal else ("", "\n")
            line = line[:n_columns].ljust(n_columns * is_terminal)
            print(start + line, end=end, file=sys.stderr, flush=True)

    def process_message(self, *args: Any, **options: Any) -> Any:
        """Every message is a sign of life."""
        self.news_s = time.monotonic()
        return super().process_message(*args, **options)

    def papermill_execute_cells(self) -> None:
        """All cells; the kernel then ends seconds sooner (see `lmd.__main__.importing`)."""
        super().papermill_execute_cells()
        self.kc.execute("import gc; gc.freeze()", silent=True, store_history=False)

    async def async_execute_cell(self, cell: Any, cell_index: int, **options: Any) -> Any:
        """Run one cell; `NotebookFailed` if nothing comes for too long or its kernel dies."""
        name, self.news_s = _cell_name(self.code_cells_executed + 1, cell.source), time.monotonic()
        work = asyncio.ensure_future(super().async_execute_cell(cell, cell_index, **options))
        try:
            while not work.done():
                left_s = self.news_s + self.silence_s - time.monotonic()
                if left_s <= 0:
                    limit = f"{self.silence_s:g} s ({SILENCE_VARIABLE} sets the limit)"
                    raise NotebookFailed(name, f"nothing came from it for {limit}")
                await asyncio.wait([work], timeout=min(left_s, self.interval_s))
                self.draw()
            result = work.result()
            self.n_done = cell_index + 1
            return result
        except (CellExecutionError, asyncio.CancelledError):
            raise
        except Exception as error:
            left = asyncio.all_tasks() - {asyncio.current_task()}  # nbclient's own among them
            for task in left:
                task.cancel()
            await asyncio.gather(*left, return_exceptions=True)
            self.nb_man.cell_exception(cell, cell_index=cell_index)
            if isinstance(error, NotebookFailed):
                raise
            text = f"{type(error).__name__}: {error}"
            if isinstance(error, DeadKernelError):
                text = "the kernel died; most often the memory was used up"
            raise NotebookFailed(name, text) from error

    execute_cell = run_sync(async_execute_cell)  # the parent's is bound to the parent's


def _cell_name(number: int | None, source: str) -> str:
    """A cell as a reader finds it: its number and its first line."""
    first_line = source.strip().partition("\n")[0]
    return f"In [{number}], `{first_line.strip()}`"


class _LmdEngine(Engine):
    """The client above, with an environment for the kernel."""

    @classmethod
    def execute_managed_notebook(cls, nb_man: Any, kernel_name: str, **options: Any) -> None:
        kernel = {"transport_encryption": ENCRYPTION, "client_factory": _KernelClient}
        client = _Client(
            nb_man,
            kernel_name=kernel_name,
            startup_timeout=60,
            iopub_timeout=LAST_OUTPUTS_S,
            raise_on_iopub_timeout=False,  # a flood may lose the message that says it has ended
            config=Config(KernelManager=kernel),
            **{name: options[name] for name in ("name", "said", "interval_s")},
        )
        try:
            client.execute(env=os.environ | KERNEL_ENVIRONMENT)
        finally:
            client.draw(is_last=True)


papermill_engines.register("lmd", _LmdEngine)


def execute(
    source: Path, target: Path, parameters: Mapping[str, Any], log_path: Path, interval_s: float
) -> None:
    """Run a notebook in its own folder, into a copy that is written after every cell.

    What it prints goes into the log; the progress line is redrawn every `interval_s`.

    Raises:
        NotebookFailed: a cell raised an error or was silent for too long, or the kernel died.
    """
    with closing(Log(log_path)) as log:
        how = {"name": source.stem, "said": log, "interval_s": interval_s, "progress_bar": False}
        try:
            papermill.execute_notebook(
                source, target, dict(parameters), engine_name="lmd", cwd=source.parent, **how
            )
        except PapermillExecutionError as error:
            cell = _cell_name(error.exec_count, error.source)
            raise NotebookFailed(cell, f"{error.ename}: {error.evalue}") from error
        except (NotebookFailed, LmdError):
            raise
        except Exception as error:  # of papermill, Jupyter or the disk, between cells
            text = f"{type(error).__name__}: {error}"
            raise NotebookFailed(f"{source.name}, outside its cells", text) from error
