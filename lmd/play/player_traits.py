"""What the player and its page both know: every value that travels between kernel and browser."""

from typing import Any

import anywidget
import traitlets

from lmd.play.player_fields import CONTROL_NAMES, mixed
from lmd.stream.controls import Controls, Prompt


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

    def controls(self, **changes: Any) -> Controls:
        """The traits as `Controls`, some of them replaced."""
        values = {name: getattr(self, name) for name in CONTROL_NAMES} | changes
        prompt = mixed(values.pop("prompt_a"), values.pop("prompt_b"), values.pop("mix"))
        return Controls(prompt=prompt, **values)
