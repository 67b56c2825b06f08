"""What an instrument plays with unless told otherwise."""

import pytest

from lmd.config import preset
from lmd.controls import Controls
from lmd.instrument import Instrument, open_instrument


def instrument(source: str, is_trained: bool) -> Instrument:
    return Instrument(open_instrument("random:tiny:0").streamer, preset("tiny"), source, is_trained)


@pytest.mark.parametrize("source", ["base", "finetuned", "runs/mine:finetuned"])
def test_weights_trained_by_regression_get_guidance_and_a_deterministic_sampler(source):
    controls = instrument(source, True).controls("organ", seed=3)
    assert (controls.sampler, controls.seed) == ("dpmpp", 3)
    assert controls.cfg_scale > 1
    assert controls.n_steps > Controls().n_steps
    controls.validate(preset("small").window)


@pytest.mark.parametrize(("source", "is_trained"), [("arc", True), ("random:tiny:0", False)])
def test_few_step_weights_and_random_ones_keep_the_few_step_defaults(source, is_trained):
    assert instrument(source, is_trained).controls("organ") == Controls("organ")


def test_anything_may_be_changed_by_name():
    controls = instrument("finetuned", True).controls("organ", n_steps=4, cfg_scale=1.0)
    assert (controls.n_steps, controls.cfg_scale, controls.sampler) == (4, 1.0, "dpmpp")
