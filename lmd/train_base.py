"""`python -m lmd train base`: the velocity of every frame of a window, no context."""

import argparse

from lmd import train_run


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the command's arguments."""
    train_run.configure(parser, "base")


def main(args: argparse.Namespace) -> int:
    """Train; returns 0 when the weights are written."""
    return train_run.train("base", args)
