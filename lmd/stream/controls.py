"""Everything that may change at a block boundary, and what is refused."""

import math
import numbers
from dataclasses import dataclass, fields
from typing import Any

from lmd.codec.base import Boundary
from lmd.config import REGIMES, Regime, WindowConfig, check_block
from lmd.errors import LmdError
from lmd.model.text import Prompt, as_mix, is_weighted_text
from lmd.stream.samplers import SAMPLERS, SamplerName

MAX_STEPS = 1000
MAX_CFG_SCALE = 100.0
BOUNDARIES = ("exact", "fade")
NUMBERS = {int: numbers.Integral, float: numbers.Real}


@dataclass(frozen=True)
class Controls:
    """What is asked of the next block. Nothing has to be declared beforehand.

    Attributes:
        prompt: a text, or (text, weight) pairs whose weights sum to 1.
        cfg_scale: guidance; 1 is off. The `++` samplers take (0, 1].
        n_steps: model calls for the block.
        sampler: see `lmd.stream.samplers`.
        block_frames: length of the block; divides the context.
        regime: `full`, `enc-dec` or `block-causal`.
        seed: of the block's noise.
        drop_context_frames: zero this many of the oldest context frames before the block (an
            event: ask once, not at every block).
        boundary: `exact` (late by the codec's look-ahead) or `fade` (at once, cross-faded).
    """

    prompt: Prompt = ""
    cfg_scale: float = 1.0
    n_steps: int = 8
    sampler: SamplerName = "pingpong"
    block_frames: int = 48
    regime: Regime = "block-causal"
    seed: int = 0
    drop_context_frames: int = 0
    boundary: Boundary = "exact"

    def __post_init__(self) -> None:
        """Make numbers of other kinds (NumPy's) Python's own; `validate` refuses the rest."""
        for field in fields(self):
            object.__setattr__(self, field.name, _plain(getattr(self, field.name), field.type))

    @property
    def is_guided(self) -> bool:
        """Whether a second, unprompted branch runs."""
        return self.cfg_scale != 1

    def validate(self, window: WindowConfig) -> None:
        """Refuse what cannot be played.

        Raises:
            LmdError: naming the control, its value and what would be right.
        """
        self._check_types()
        texts = as_mix(self.prompt)
        _check_choice("sampler", self.sampler, SAMPLERS)
        _check_choice("regime", self.regime, REGIMES)
        _check_choice("boundary", self.boundary, BOUNDARIES)
        _check_range("n_steps", self.n_steps, 1, MAX_STEPS)
        _check_range("seed", self.seed, 0, 2**63 - 1)
        _check_range("drop_context_frames", self.drop_context_frames, 0, window.context_frames)
        check_block(window.context_frames, self.block_frames)
        self._check_guidance(any(text.strip() and weight for text, weight in texts))

    def _check_types(self) -> None:
        """Whole numbers are ints, guidance is a number."""
        for field in fields(self):
            value = getattr(self, field.name)
            if field.type in NUMBERS and type(value) is not field.type:
                raise LmdError(
                    f"{field.name} = {value!r}",
                    f"a number ({field.type.__name__})",
                    f"Set {field.name} to a number.",
                )

    def _check_guidance(self, has_text: bool) -> None:
        """Guidance wants a text and a scale that the sampler understands."""
        plus_plus = self.sampler.endswith("++")
        top = 1.0 if plus_plus else MAX_CFG_SCALE
        if (
            not math.isfinite(self.cfg_scale)
            or not 0 <= self.cfg_scale <= top
            or (plus_plus and self.cfg_scale == 0)
        ):
            raise LmdError(
                f"cfg_scale = {self.cfg_scale!r} with sampler {self.sampler!r}",
                "a number in (0, 1]" if plus_plus else f"a number from 0 to {MAX_CFG_SCALE:g}",
                "1 turns guidance off.",
            )
        if self.is_guided and not has_text:
            raise LmdError(
                f"cfg_scale = {self.cfg_scale!r} with no text",
                "a prompt to be guided towards",
                "Give a prompt, or set cfg_scale to 1 (off).",
            )


def _plain(value: Any, kind: Any) -> Any:
    """A control's number, or its prompt's weights, as Python's own; anything else as it is."""
    if kind in NUMBERS and isinstance(value, NUMBERS[kind]) and not isinstance(value, bool):
        return kind(value)
    if isinstance(value, tuple) and all(is_weighted_text(part) for part in value):
        return tuple((text, float(weight)) for text, weight in value)
    return value


def _check_choice(name: str, value: object, choices: tuple[str, ...]) -> None:
    """Refuse a name that is not on the list."""
    if value not in choices:
        raise LmdError(f"{name} = {value!r}", f"one of {', '.join(choices)}", "Pick one of these.")


def _check_range(name: str, value: int, low: int, high: int) -> None:
    """Refuse a number outside low ... high."""
    if not low <= value <= high:
        raise LmdError(f"{name} = {value!r}", f"{low} to {high}", f"Set {name} in that range.")


def crossfade(first: str, second: str, n_blocks: int) -> list[Prompt]:
    """Prompts that ease from one text to another: block by block, ending on the second.

    Every step is a new prompt, so the context's keys are rebuilt at every block of the fade.

    Args:
        first: where to come from.
        second: where to arrive, with weight 1, at the last block.
        n_blocks: how many blocks the way takes, at least 1.
    """
    weights = [(i + 1) / n_blocks for i in range(n_blocks)]
    return [((first, 1 - weight), (second, weight)) for weight in weights[:-1]] + [second]
