"""The command line: `lmd COMMAND`, or `python -m lmd COMMAND`.

A command is a module with a dataclass `Options`, whose fields are the flags (made by tyro, with the
class's `Attributes:` as their help), and `main(options) -> int`, which returns the exit status.
Modules are imported only when their command is asked for.
"""

import errno
import gc
import importlib
import io
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path

import tyro
from tyro.constructors import (
    ConstructorRegistry,
    PrimitiveConstructorSpec,
    PrimitiveTypeInfo,
)

from lmd import __version__
from lmd.errors import LmdError

COMMANDS: dict[tuple[str, ...], tuple[str, str]] = {
    ("run",): ("lmd.pipeline.run", "execute the notebooks and write a report"),
    ("stream",): ("lmd.play.stream_command", "stream music to a file"),
    ("replay",): ("lmd.play.replay", "play a recorded take again"),
    ("export",): ("lmd.play.export_command", "write graphs that play"),
    ("data", "build"): ("lmd.data.build", "render the corpus, or read a folder of audio"),
    ("data", "check"): ("lmd.data.check", "report which files of a folder can be used"),
    ("data", "encode"): ("lmd.data.encode", "encode a built corpus into latent shards"),
    ("train", "codec"): ("lmd.training.codec.train", "train the spectral codec"),
    ("train", "base"): ("lmd.training.train_base", "train the bidirectional base model"),
    ("train", "finetune"): ("lmd.training.train_finetune", "turn a base into a live model"),
    ("train", "distill"): ("lmd.training.train_distill", "fewer steps, no guidance, same music"),
    ("train", "arc"): ("lmd.arc.train", "adversarial post-training on rollouts"),
    ("evaluate",): ("lmd.evaluation.run", "measure generated music"),
    ("convert",): ("lmd.stable_audio.convert", "make weights here from a Stable Audio checkpoint"),
    ("parity",): ("lmd.stable_audio.parity", "compare a checkpoint with its expected outputs"),
    ("bench",): ("lmd.bench", "measure speed on this machine"),
    ("bench", "live"): ("lmd.play.bench_live", "measure how soon a change is heard"),
}
MOVED = {
    ("interpolate",): "python tools/interpolate.py",
    ("train", "recogniser"): "python tools/train_tagger.py",
    ("train", "tagger"): "python tools/train_tagger.py",
    ("bench", "data"): "python tools/bench_data.py",
    ("bench", "train"): "python tools/bench_train.py",
    ("bench", "arc"): "python tools/bench_arc.py",
}
CANNOT_WRITE = {errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM}
INTERRUPTED, BROKEN_PIPE = 130, 141  # as a shell reports SIGINT and SIGPIPE


PATHS = ConstructorRegistry()


@PATHS.primitive_rule
def named_path(info: PrimitiveTypeInfo) -> PrimitiveConstructorSpec | None:
    """How tyro reads a path: an empty one, which would be the folder one stands in, is refused."""

    def path(words: list[str]) -> Path:
        if not words[0]:
            raise ValueError("found ''; expected a file or folder; '.' is the one you are in")
        return Path(words[0])

    if info.type is not Path:
        return None
    return PrimitiveConstructorSpec(
        nargs=1,
        metavar="PATH",
        instance_from_str=path,
        is_instance=lambda value: isinstance(value, Path),
        str_from_instance=lambda value: [str(value)],
    )


def usage() -> str:
    """One line for every command."""
    lines = [f"  {' '.join(words):16} {text}" for words, (_, text) in COMMANDS.items()]
    return "usage: lmd COMMAND [options], lmd --version\n\n" + "\n".join(lines)


@contextmanager
def importing() -> Iterator[None]:
    """What is imported stays to the end: no collection looks through it, now, later or at exit.

    With PyTorch and Lightning that is three seconds of a process's life on a small machine.
    """
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        gc.enable()


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; what it refuses (`LmdError`) is printed in one line, exit status 2.

    Args:
        argv: the words after `lmd`; None: those of this process.
    """
    words = list(sys.argv[1:] if argv is None else argv)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # a prompt may hold what a terminal cannot show
            stream.reconfigure(errors="backslashreplace")
    try:
        try:
            return _run(words, is_process=argv is None)
        finally:
            sys.stdout.flush()
    except BrokenPipeError:  # e.g. `lmd --help | head -1`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return BROKEN_PIPE


def _run(words: list[str], is_process: bool) -> int:
    """Find and run the command that the words begin with."""
    if words[:1] == ["--version"]:
        print(f"lmd {__version__}")
        return 0
    beginnings = [tuple(words[:n]) for n in (2, 1)]
    name = next((b for b in beginnings if b in COMMANDS or b in MOVED), None)
    if name is None:
        asked_for_help = words[:1] in (["-h"], ["--help"])
        print(usage(), file=sys.stdout if asked_for_help else sys.stderr)
        return 0 if asked_for_help else 2
    rest, prog = words[len(name) :], f"lmd {' '.join(name)}"
    if name in MOVED:
        print(f"{prog} is called `{MOVED[name]}` now", file=sys.stderr)
        return 2
    module_name, text = COMMANDS[name]
    with importing() if is_process else nullcontext():
        module = importlib.import_module(module_name)
    try:
        config = (tyro.conf.FlagCreatePairsOff,)  # no --no-X beside every --X
        about = {"prog": prog, "description": text, "config": config, "registry": PATHS}
        options = tyro.cli(module.Options, args=rest, **about)
        return module.main(options)
    except LmdError as error:
        print(f"{prog}: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"{prog}: interrupted", file=sys.stderr)
        return INTERRUPTED
    except OSError as error:
        if error.errno not in CANNOT_WRITE:
            raise
        print(f"{prog}: {error.filename or 'a file'}: {error.strerror}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
