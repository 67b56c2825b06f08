"""What the numbers of a training command may be, and where it may write: checked first of all."""

import argparse
import math
from typing import NamedTuple

from lmd.data.places import check_folder_free
from lmd.errors import LmdError


class Limits(NamedTuple):
    """The values from `low` to `high`, as `told`; the ends themselves unless they are open."""

    told: str
    low: float = -math.inf
    high: float = math.inf
    open_ends: tuple[float, ...] = (-math.inf, math.inf)

    def hold(self, value: float) -> bool:
        """Whether a value lies within; NaN does not."""
        return self.low <= value <= self.high and value not in self.open_ends


COUNT = Limits("1 or more", 1)
NOT_NEGATIVE = Limits("0 or more", 0)
POSITIVE = Limits("more than 0", 0, open_ends=(0, math.inf))
SHARE = Limits("0 to 1", 0, 1)
DECAY = Limits("0 or more, less than 1", 0, 1, open_ends=(1,))

LIMITS: dict[str, Limits] = {
    **dict.fromkeys(("steps", "updates", "batch", "accumulate"), COUNT),
    **dict.fromkeys(("devices", "num_nodes", "checkpoint_every"), COUNT),
    **dict.fromkeys(("lr", "lr_generator", "lr_discriminator", "learning_rate"), POSITIVE),
    **dict.fromkeys(("warmup", "encoder_steps", "adversarial_from", "sample_every"), NOT_NEGATIVE),
    **dict.fromkeys(("lora", "threads", "noise", "contrastive", "r1", "r2"), NOT_NEGATIVE),
    **dict.fromkeys(("text_dropout", "from_silence", "short_context", "long_share"), SHARE),
    "frames": Limits("2 or more", 2),  # a latent's change from frame to frame is looked at
    "ema": DECAY,
}


def check_words(args: argparse.Namespace) -> None:
    """Refuse a number of the command line that means nothing, and an `--out` that is no folder.

    Words that are no numbers in a command (`--steps 8,4,2`, `--noise uniform`) are not looked at.

    Raises:
        LmdError: names the option, and what it may be; see `check_folder_free`.
    """
    for name, limits in LIMITS.items():
        value = getattr(args, name, None)
        if isinstance(value, int | float) and not limits.hold(value):
            flag = f"--{name.replace('_', '-')}"
            raise LmdError(f"{flag} {value:g}", limits.told, "Correct the number.")
    check_folder_free(args.out)
