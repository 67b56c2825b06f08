"""What an instrument plays with by default."""

import pytest
import torch

from lmd.config import preset
from lmd.errors import LmdError
from lmd.model.weights import fingerprint
from lmd.pretrained import Instrument, open_instrument
from lmd.stream.controls import Controls


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


def first_latents(opened: Instrument) -> torch.Tensor:
    streamer = opened.streamer
    return streamer.step(streamer.start(), Controls("organ", n_steps=2))[0].latents


@pytest.mark.parametrize("source", ["random:tiny:0", "arc"])
def test_half_precision_plays_the_same_music_within_its_rounding(source):
    whole, half = (
        open_instrument(source, dtype=dtype, engine="torch") for dtype in (None, "bfloat16")
    )
    engine = "" if source.startswith("random") else "@torch"
    assert (whole.source, half.source) == (source + engine, f"{source}@bfloat16{engine}")
    assert half.streamer.denoiser.model.dit.dtype == torch.bfloat16
    expected, found = first_latents(whole), first_latents(half)
    # measured 0.003 (tiny) and 0.012 (small) of the largest; other weights or noise move it by 1
    apart = (found.float() - expected).abs().max() / expected.abs().max()
    assert 0 < apart < 0.05
    again = open_instrument(half.source)
    assert again.source == half.source
    assert fingerprint(again.streamer.denoiser) == fingerprint(half.streamer.denoiser)
    assert torch.equal(first_latents(again), found)


def test_a_precision_is_no_part_of_the_place():
    for dtype in ("", "@bfloat16"):
        opened = instrument(f"runs/@mine:finetuned{dtype}", True)
        assert opened.kind == "finetuned"
    assert open_instrument("random:tiny:0@bfloat16", dtype="float32").source == "random:tiny:0"
    with pytest.raises(LmdError, match="dtype 'float8'"):
        open_instrument("random:tiny:0", dtype="float8")
    for source in ("arc@float8", "random:tiny:0@float8"):
        with pytest.raises(LmdError, match=f"source '{source}'; .*with or without @bfloat16"):
            open_instrument(source)
