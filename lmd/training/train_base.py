"""`python -m lmd train base`: the velocity of every frame of a window, no context."""

import argparse

from lmd.training import run


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the command's arguments."""
    run.configure(parser, "base")


def main(args: argparse.Namespace) -> int:
    """Train; returns 0 when the weights are written."""
    return run.train("base", args)
