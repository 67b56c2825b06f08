"""`lmd train finetune`: a base becomes a live model that continues clean context."""

from lmd.training.options import FinetuneRun as Options
from lmd.training.run import train as main

__all__ = ["Options", "main"]
