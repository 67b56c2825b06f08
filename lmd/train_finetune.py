"""`python -m lmd train finetune`: a base becomes a live model that continues clean context."""

import argparse

from lmd import train_run


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the command's arguments."""
    train_run.configure(parser, "finetune")


def main(args: argparse.Namespace) -> int:
    """Train; returns 0 when the weights are written."""
    return train_run.train("finetune", args)
