"""The command lines of the README, as a reader would type them."""

import re
import shlex
from collections.abc import Mapping

from lmd.pipeline.plan import ROOT

README = (ROOT / "README.md").read_text(encoding="utf-8")


def shell_lines() -> list[str]:
    """Every command line of the README's `sh` blocks, continuation lines joined."""
    blocks = re.findall(r"```sh\n(.*?)```", README, re.DOTALL)
    text = "\n".join(blocks).replace("\\\n", " ")
    return [line for line in text.splitlines() if line.strip()]


def lmd_commands() -> list[list[str]]:
    """What stands after `-m lmd` in these lines."""
    words = [shlex.split(line, comments=True) for line in shell_lines() if "-m lmd " in line]
    return [line[line.index("lmd") + 1 :] for line in words]


def command_with(start: str, places: Mapping[str, str]) -> list[str]:
    """The words of the one line that begins so, with each place in it taken by something else.

    Raises:
        AssertionError: no such line, several, or a place that it does not name.
    """
    (line,) = (line for line in shell_lines() if line.startswith(start))
    for place, what in places.items():
        assert place in line, f"no {place!r} in {line!r}"
        line = line.replace(place, what)
    return shlex.split(line, comments=True)
