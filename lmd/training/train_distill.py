"""`python -m lmd train distill`: few steps of a model go where many guided ones went."""

import argparse

from lmd.training import run


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the command's arguments."""
    run.configure(parser, "distill")


def main(args: argparse.Namespace) -> int:
    """Train; returns 0 when the weights are written."""
    return run.train("distill", args)
