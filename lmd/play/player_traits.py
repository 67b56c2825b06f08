"""What the player and its page both know: its fields, and every value that travels between them."""

from collections.abc import Sequence
from typing import Any

import anywidget
import traitlets

from lmd.config import REGIMES, WindowConfig
from lmd.errors import LmdError
from lmd.stream.controls import SEAMS, Controls, Prompt
from lmd.stream.samplers import SAMPLERS

CONTROL_NAMES = (
    "prompt_a",
    "prompt_b",
    "mix",
    "cfg_scale",
    "n_steps",
    "sampler",
    "regime",
    "block_frames",
    "seed",
    "boundary",
)
PACING_NAMES = ("queue_blocks", "auto_steps", "roll_seed")
PROMPTS = (
    "church organ, slow, minor",
    "string quartet, lively, major",
    "harpsichord, fast, minor",
    "brass ensemble, stately, major",
    "choir, slow, major",
)
SHORTEST_BLOCK_FRAMES = 4  # shorter ones cost far more than they last


def fields_for(window: WindowConfig) -> list[dict[str, Any]]:
    """One entry per field: kind, label, hint, limits or choices, and the row it stands in."""
    blocks = [n for n in window.block_lengths() if n >= SHORTEST_BLOCK_FRAMES]
    drop = (0, window.context_frames, 12)
    return [
        _field("prompt_a", "prompt", "text", "Prompt A", "what to play"),
        _range("mix", "prompt", "A ↔ B", "share of prompt B", (0, 1, 0.01), 2),
        _field("prompt_b", "prompt", "text", "Prompt B", "what to morph into"),
        _range("cfg_scale", "model", "Guidance", "how strictly; 1 = off", (0.5, 8, 0.1), 1),
        _range("n_steps", "model", "Steps", "per block and branch", (1, 32, 1), 0),
        _choice("sampler", "model", "Sampler", "how noise becomes music", list(SAMPLERS)),
        _choice("regime", "model", "Regime", "who sees whom", list(REGIMES)),
        _choice("block_frames", "model", "Block", "in frames: short answers sooner", blocks),
        _choice("boundary", "model", "Boundary", "exact is late by the look-ahead", list(SEAMS)),
        _range("drop_context_frames", "time", "Drop", "frames of context, oldest first", drop, 0),
        _field("seed", "time", "number", "Seed", "of the noise", min=0, max=2**31 - 1, step=1),
        _field("roll_seed", "time", "switch", "roll it", "another seed for every block"),
        _choice("queue_blocks", "time", "Queue", "in blocks: longer is safer", [1, 1.5, 2, 3, 4]),
        _field("auto_steps", "time", "switch", "auto steps", "fewer while the model is too slow"),
        _range("volume", "bar", "Volume", "of this page", (0, 1, 0.01), 2),
    ]


def _field(name: str, group: str, kind: str, label: str, hint: str, **more: Any) -> dict[str, Any]:
    entry = {"name": name, "group": group, "kind": kind, "label": label, "hint": hint}
    return entry | more


def _range(
    name: str, group: str, label: str, hint: str, limits: tuple[float, float, float], digits: int
) -> dict[str, Any]:
    low, high, step = limits
    more = {"min": low, "max": high, "step": step, "digits": digits}
    return _field(name, group, "range", label, hint, **more)


def _choice(name: str, group: str, label: str, hint: str, choices: list[Any]) -> dict[str, Any]:
    return _field(name, group, "choice", label, hint, choices=choices)


def mixed(first: str, second: str, share: float) -> Prompt:
    """One prompt out of two texts; an empty one, or one without weight, is left out."""
    if share <= 0 or not second.strip():
        return first
    if share >= 1 or not first.strip():
        return second
    return ((first, 1 - share), (second, share))


def trait_values(controls: Controls, prompts: Sequence[str]) -> dict[str, Any]:
    """The traits that say the same as these controls."""
    values = {n: getattr(controls, n) for n in CONTROL_NAMES if hasattr(controls, n)}
    prompt, other = controls.prompt, prompts[1] if len(prompts) > 1 else ""
    if isinstance(prompt, str):
        return values | {"prompt_a": prompt, "prompt_b": other, "mix": 0.0}
    if len(prompt) > 2:
        raise LmdError(f"a prompt of {len(prompt)} parts", "one or two", "The panel mixes two.")
    second, share = prompt[1] if len(prompt) == 2 else (other, 0.0)
    return values | {"prompt_a": prompt[0][0], "prompt_b": second, "mix": float(share)}


class PlayerTraits(anywidget.AnyWidget):
    """The player's traits, and the controls that they add up to."""

    # what the page needs to know once
    fields = traitlets.List().tag(sync=True)
    prompt_choices = traitlets.List().tag(sync=True)
    sample_rate = traitlets.Int().tag(sync=True)
    channels = traitlets.Int().tag(sync=True)
    sink = traitlets.Unicode().tag(sync=True)
    instrument = traitlets.Unicode().tag(sync=True)
    # the controls
    prompt_a = traitlets.Unicode().tag(sync=True)
    prompt_b = traitlets.Unicode().tag(sync=True)
    mix = traitlets.Float(0.0, min=0, max=1).tag(sync=True)
    cfg_scale = traitlets.Float(1.0).tag(sync=True)
    n_steps = traitlets.Int(8).tag(sync=True)
    sampler = traitlets.Unicode("pingpong").tag(sync=True)
    regime = traitlets.Unicode("block-causal").tag(sync=True)
    block_frames = traitlets.Int(48).tag(sync=True)
    seed = traitlets.Int(0).tag(sync=True)
    boundary = traitlets.Unicode("exact").tag(sync=True)
    drop_context_frames = traitlets.Int(96, min=0).tag(sync=True)  # what the button drops
    roll_seed = traitlets.Bool(False).tag(sync=True)
    auto_steps = traitlets.Bool(False).tag(sync=True)
    queue_blocks = traitlets.Float(2.0, min=1, max=8).tag(sync=True)
    volume = traitlets.Float(0.9, min=0, max=1).tag(sync=True)
    midi_map = traitlets.Dict().tag(sync=True)
    # what is going on
    state = traitlets.Unicode("new").tag(sync=True)
    message = traitlets.Unicode("").tag(sync=True)
    recording = traitlets.Unicode("").tag(sync=True)
    take_path = traitlets.Unicode("").tag(sync=True)
    meters = traitlets.Dict().tag(sync=True)

    @property
    def prompt(self) -> Prompt:
        """The two texts and the mix as one prompt."""
        return mixed(self.prompt_a, self.prompt_b, self.mix)

    def prompt_traits(self) -> dict[str, Any]:
        """What `prompt` is made of."""
        return {name: getattr(self, name) for name in ("prompt_a", "prompt_b", "mix")}

    def controls(self, **changes: Any) -> Controls:
        """The traits as `Controls`, some of them replaced."""
        values = {name: getattr(self, name) for name in CONTROL_NAMES} | changes
        prompt = mixed(values.pop("prompt_a"), values.pop("prompt_b"), values.pop("mix"))
        return Controls(prompt=prompt, **values)
