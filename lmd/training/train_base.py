"""`lmd train base`: the velocity of every frame of a window, no context."""

from lmd.training.options import BaseRun as Options
from lmd.training.run import train as main

__all__ = ["Options", "main"]
