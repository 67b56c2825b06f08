"""`python -m lmd train finetune`: a base becomes a live model that continues clean context."""

import argparse

from lmd.training import run


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the command's arguments."""
    run.configure(parser, "finetune")


def main(args: argparse.Namespace) -> int:
    """Train; returns 0 when the weights are written."""
    return run.train("finetune", args)
