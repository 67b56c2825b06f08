"""The pages of the project and their command lines, as a reader would type them."""

import re
import shlex
import sys
from collections.abc import Mapping
from pathlib import Path

from lmd.pipeline.plan import ROOT

PAGES = {  # not the log, which says what once was
    path: path.read_text(encoding="utf-8")
    for path in (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")))
    if path.name != "log.md"
}
README = PAGES[ROOT / "README.md"]
BIN = Path(sys.executable).parent


def shell_lines(text: str = "\n".join(PAGES.values())) -> list[str]:
    """Every command line of a text's `sh` blocks, continuation lines joined."""
    blocks = re.findall(r"```sh\n(.*?)```", text, re.DOTALL)
    lines = "\n".join(blocks).replace("\\\n", " ").splitlines()
    return [line for line in lines if line.strip()]


def lmd_commands() -> list[list[str]]:
    """What follows `lmd` in these lines, however it is started."""
    words = [shlex.split(line, comments=True) for line in shell_lines()]
    return [line[line.index("lmd") + 1 :] for line in words if "lmd" in line]


def typed(line: str) -> list[str]:
    """The words of a command line, with the programs of this environment."""
    words = shlex.split(line, comments=True)
    if words[0] == "lmd":
        return [sys.executable, "-m", *words]
    return [str(BIN / words[0]), *words[1:]] if words[0] == "torchrun" else words


def command_with(start: str, places: Mapping[str, str]) -> list[str]:
    """The words of the one line that begins so, with each place in it taken by something else.

    Raises:
        AssertionError: no such line, several, or a place that it does not name.
    """
    (line,) = (line for line in shell_lines() if line.startswith(start))
    for place, what in places.items():
        assert place in line, f"no {place!r} in {line!r}"
        line = line.replace(place, what)
    return typed(line)
