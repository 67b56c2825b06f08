"""What the player and its page both know: its fields, and every value that travels between them."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import anywidget
import traitlets

from lmd.config import REGIMES, WindowConfig
from lmd.errors import LmdError
from lmd.play.pace import ANSWERS
from lmd.stream.controls import BOUNDARIES, Controls, Prompt
from lmd.stream.samplers import SAMPLERS

HERE = Path(__file__).parent
SCRIPTS = ("player_audio.js", "player_view.js", "player.js")
PROMPT_NAMES = ("prompt_a", "prompt_b", "mix")
OTHER_NAMES = ("cfg_scale", "n_steps", "sampler", "regime", "block_frames", "seed", "boundary")
CONTROL_NAMES = PROMPT_NAMES + OTHER_NAMES
PACING_NAMES = ("auto_steps", "roll_seed", "answer", "commit_frames")
PROMPTS = (
    "church organ, slow, minor",
    "string quartet, lively, major",
    "harpsichord, fast, minor",
    "brass ensemble, stately, major",
    "choir, slow, major",
)
GUIDANCE = {"min": 0.5, "max": 8, "step": 0.1, "digits": 1}
STEPS = {"min": 1, "max": 32, "step": 1, "digits": 0}
COMMITS = [0, 3, 6, 12, 24, 48]
COMMIT_HINT = "frames of a plan that are played before it is made again; 0: all"
SHORTEST_BLOCK_FRAMES = 4  # shorter ones cost far more than they last


def fields_for(window: WindowConfig) -> list[dict[str, Any]]:
    """One entry per field: kind, label, hint, limits or choices, and the row it stands in."""
    blocks = [n for n in window.block_lengths() if n >= SHORTEST_BLOCK_FRAMES]
    queues = {"choices": [1, 1.5, 2, 3, 4]}
    context = {"min": 0, "max": window.context_frames, "step": 12, "digits": 0}
    share = {"min": 0, "max": 1, "step": 0.01, "digits": 2}
    return [
        _field("prompt text", "prompt_a", "Prompt A", "what to play"),
        _field("prompt range", "mix", "A ↔ B", "share of prompt B", **share),
        _field("prompt text", "prompt_b", "Prompt B", "what to morph into"),
        _field("model range", "cfg_scale", "Guidance", "how strictly; 1 = off", **GUIDANCE),
        _field("model range", "n_steps", "Steps", "per block and branch", **STEPS),
        _field("model choice", "sampler", "Sampler", "noise to music", choices=[*SAMPLERS]),
        _field("model choice", "regime", "Regime", "who sees whom", choices=[*REGIMES]),
        _field("model choice", "block_frames", "Block", "short answers sooner", choices=blocks),
        _field("model choice", "boundary", "Boundary", "exact is later", choices=[*BOUNDARIES]),
        _field("time range", "drop_context_frames", "Drop", "oldest frames of context", **context),
        _field("time number", "seed", "Seed", "of the noise", min=0, max=2**31 - 1, step=1),
        _field("time switch", "roll_seed", "roll it", "another seed for every block"),
        _field("time choice", "queue_blocks", "Queue", "in blocks: longer is safer", **queues),
        _field("time choice", "answer", "Answer", "when a change is heard", choices=[*ANSWERS]),
        _field(
            "time choice", "commit_frames", "Commit", COMMIT_HINT, choices=[0, 3, 6, 12, 24, 48]
        ),
        _field("time switch", "hold", "hold", "repeat what was heard last, go no further"),
        _field("time switch", "auto_steps", "auto steps", "fewer while the model is too slow"),
        _field("bar range", "volume", "Volume", "of this page", **share),
    ]


def _field(place: str, name: str, label: str, hint: str, **more: Any) -> dict[str, Any]:
    group, kind = place.split()
    return {"name": name, "group": group, "kind": kind, "label": label, "hint": hint, **more}


def mixed(first: str, second: str, share: float) -> Prompt:
    """One prompt out of two texts; an empty one, or one without weight, is left out."""
    if share <= 0 or not second.strip():
        return first
    if share >= 1 or not first.strip():
        return second
    return ((first, 1 - share), (second, share))


def trait_values(controls: Controls, prompts: Sequence[str]) -> dict[str, Any]:
    """The traits that say the same as these controls."""
    values = {name: getattr(controls, name) for name in OTHER_NAMES}
    prompt, other = controls.prompt, prompts[1] if len(prompts) > 1 else ""
    if isinstance(prompt, str):
        return values | {"prompt_a": prompt, "prompt_b": other, "mix": 0.0}
    if len(prompt) > 2:
        raise LmdError(f"a prompt of {len(prompt)} parts", "one or two", "The panel mixes two.")
    second, share = prompt[1] if len(prompt) == 2 else (other, 0.0)
    return values | {"prompt_a": prompt[0][0], "prompt_b": second, "mix": float(share)}


class PlayerTraits(anywidget.AnyWidget):
    """The player's traits, and the controls that they add up to."""

    _esm = "\n".join((HERE / name).read_text(encoding="utf-8") for name in SCRIPTS)
    _css = (HERE / "player.css").read_text(encoding="utf-8")
    frame_s = 0.0  # how long a latent frame lasts

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
    hold = traitlets.Bool(False).tag(sync=True)
    auto_steps = traitlets.Bool(False).tag(sync=True)
    answer = traitlets.Enum(ANSWERS, ANSWERS[0]).tag(sync=True)
    commit_frames = traitlets.Int(0, min=0).tag(sync=True)
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
        """The two texts and the mix."""
        return {name: getattr(self, name) for name in PROMPT_NAMES}

    def controls(self, **changes: Any) -> Controls:
        """The traits as `Controls`, some of them replaced."""
        values = {name: getattr(self, name) for name in CONTROL_NAMES} | changes
        prompt = mixed(*(values.pop(name) for name in PROMPT_NAMES))
        return Controls(prompt=prompt, **values)

    def pacing(self) -> dict[str, Any]:
        """The traits that are `EngineOptions`."""
        queue_s = self.queue_blocks * self.block_frames * self.frame_s
        return {"queue_s": queue_s} | {name: getattr(self, name) for name in PACING_NAMES}
