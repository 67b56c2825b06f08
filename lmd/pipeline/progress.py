"""What a running notebook says: its log in whole lines, and the line that shows how far it is."""

import re
import sys
import threading
import time
from pathlib import Path
from typing import TextIO

from tqdm import tqdm

_ESCAPES = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")
_NOISE = re.compile(r"^\s*$")


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


class Ticker:
    """Redraws a bar while a long cell works."""

    def __init__(self, bar: tqdm, log: Log, interval_s: float) -> None:
        self.bar, self.log, self.interval_s = bar, log, interval_s
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._work, daemon=True)

    def __enter__(self) -> "Ticker":
        self._thread.start()
        return self

    def _work(self) -> None:
        while not self._stop.wait(self.interval_s):
            self.bar.set_postfix_str(without_bar(self.log.last)[:60])  # redraws

    def __exit__(self, *error: object) -> None:
        self._stop.set()
        self._thread.join()


class Lines:
    """Standard error where it is no terminal: a line for every redraw."""

    def write(self, text: str) -> None:
        """A line of its own."""
        if text.strip():
            sys.stderr.write(text.strip() + "\n")

    def flush(self) -> None:
        """What a file does."""
        sys.stderr.flush()


class CellCount:
    """What papermill takes for its bar: it counts finished cells and nothing else.

    (papermill itself would fill the bar when a notebook fails.)
    """

    n = 0

    def __init__(self, bar: tqdm) -> None:
        self.update = bar.update

    def refresh(self) -> None:
        """Nothing: the ticker redraws."""

    def close(self) -> None:
        """Nothing: the engine closes the bar."""
