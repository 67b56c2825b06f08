"""What an instrument plays with unless told otherwise."""

import pytest

from lmd.config import preset
from lmd.controls import Controls
from lmd.errors import LmdError
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


def test_arc_forced_weights_get_few_steps_and_no_guidance():
    assert instrument("arc", True).controls("organ") == Controls(
        "organ", n_steps=4, sampler="dpmpp"
    )


def test_random_weights_keep_the_defaults():
    assert instrument("random:tiny:0", False).controls("organ") == Controls("organ")


def test_anything_may_be_changed_by_name():
    controls = instrument("finetuned", True).controls("organ", n_steps=4, cfg_scale=1.0)
    assert (controls.n_steps, controls.cfg_scale, controls.sampler) == (4, 1.0, "dpmpp")


def test_an_instrument_is_where_it_is_asked_to_be():
    there = open_instrument("random:tiny:0", device="meta").streamer
    assert {there.denoiser.device.type, there.codec.model.device.type} == {"meta"}
    for device in ("abacus", "cuda:7"):
        with pytest.raises(LmdError, match=f"device '{device}'"):
            open_instrument("random:tiny:0", device=device)
