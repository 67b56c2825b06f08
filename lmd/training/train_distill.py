"""`lmd train distill`: few steps of a model go where many guided ones went."""

from lmd.training.options import DistillRun as Options
from lmd.training.run import train as main

__all__ = ["Options", "main"]
