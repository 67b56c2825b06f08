"""The command line: `python -m lmd COMMAND`.

A command is a module with a dataclass `Options`, whose fields are the flags (made by tyro, with the
class's `Attributes:` as their help), and `main(options) -> int`, which returns the exit status.
Modules are imported only when their command is asked for.
"""

import argparse
import gc
import importlib
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext

import tyro

from lmd.errors import LmdError

COMMANDS: dict[tuple[str, ...], tuple[str, str]] = {
    ("bench",): ("lmd.bench", "measure speed on this machine"),
    ("bench", "data"): ("lmd.training.data_speed", "measure how fast music is rendered and read"),
    ("bench", "train"): ("lmd.training.speed", "measure the speed of training steps"),
    ("bench", "arc"): ("lmd.arc.speed", "measure updates of ARC-Forcing by rollout length"),
    ("parity",): ("lmd.parity", "compare a foreign checkpoint with its expected outputs"),
    ("convert",): ("lmd.convert", "turn a foreign checkpoint into files of ours"),
    ("interpolate",): ("lmd.interpolate", "weights between those of two files"),
    ("data", "build"): ("lmd.data.build", "render the corpus, or read a folder of audio"),
    ("data", "check"): ("lmd.data.check_command", "report which files of a folder can be used"),
    ("data", "encode"): ("lmd.data.encode_command", "encode a built corpus into latent shards"),
    ("train", "codec"): ("lmd.training.codec.train", "train the spectral codec"),
    ("train", "base"): ("lmd.training.train_base", "train the bidirectional base model"),
    ("train", "finetune"): ("lmd.training.train_finetune", "turn a base into a live model"),
    ("train", "distill"): ("lmd.training.train_distill", "fewer steps, no guidance, same music"),
    ("train", "arc"): ("lmd.arc.train", "adversarial post-training on rollouts"),
    ("train", "recogniser"): (
        "lmd.evaluation.train_tagger",
        "fit the listener that measures music",
    ),
    ("run",): ("lmd.pipeline.run", "execute the notebooks and write a report"),
    ("stream",): ("lmd.play.stream_command", "stream music to a file"),
    ("replay",): ("lmd.play.replay", "play a recorded take again"),
    ("evaluate",): ("lmd.evaluation.command", "measure generated music"),
}


def usage() -> str:
    """One line for every command."""
    lines = [f"  {' '.join(words):16} {text}" for words, (_, text) in COMMANDS.items()]
    return "usage: python -m lmd COMMAND [options]\n\n" + "\n".join(lines)


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
    """Run one command; a refusal (`LmdError`) is printed in one line, exit status 2."""
    words = list(sys.argv[1:] if argv is None else argv)
    name = next((tuple(words[:n]) for n in (2, 1) if tuple(words[:n]) in COMMANDS), None)
    if name is None:
        asked_for_help = bool(words) and words[0] in ("-h", "--help")
        print(usage(), file=sys.stdout if asked_for_help else sys.stderr)
        return 0 if asked_for_help else 2
    module_name, text = COMMANDS[name]
    with importing() if argv is None else nullcontext():  # a process of its own, or a caller's
        module = importlib.import_module(module_name)
    prog, rest = f"lmd {' '.join(name)}", words[len(name) :]
    if hasattr(module, "Options"):
        config = (tyro.conf.FlagCreatePairsOff,)
        options = tyro.cli(module.Options, prog=prog, description=text, args=rest, config=config)
    else:  # the older form of a command
        parser = argparse.ArgumentParser(prog=prog, description=text)
        module.configure(parser)
        options = parser.parse_args(rest)
    try:
        return module.main(options)
    except LmdError as error:
        print(f"lmd {' '.join(name)}: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
