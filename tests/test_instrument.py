"""What an instrument plays with unless told otherwise."""

import pytest
import torch
from lmd.packed import layouts, usual_layout

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
    whole, half = (open_instrument(source, dtype=dtype) for dtype in (None, "bfloat16"))
    assert half.source == f"{whole.source}@bfloat16"
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


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_usual_layout_is_one_that_this_machine_has(dtype):
    assert usual_layout(dtype) in ("plain", *layouts(dtype, 49))


def test_the_usual_layout_is_the_projects_own_before_another(monkeypatch):
    for name in ("can_use_panels", "can_use_tiles", "can_pack"):
        monkeypatch.setattr(f"lmd.packed.{name}", lambda *_: True)
    assert (usual_layout(torch.float32), usual_layout(torch.bfloat16)) == ("panels", "tiles")
    monkeypatch.setattr("lmd.packed.can_use_panels", lambda: False)
    monkeypatch.setattr("lmd.packed.can_use_tiles", lambda: False)
    assert (usual_layout(torch.float32), usual_layout(torch.bfloat16)) == ("plain", "onednn")
    monkeypatch.setattr("lmd.packed.can_pack", lambda _: False)
    assert usual_layout(torch.bfloat16) == "plain"


def test_an_instrument_in_half_precision_is_laid_out_for_the_processor(monkeypatch):
    asked = []
    monkeypatch.setattr("lmd.pretrained.pack", lambda model, layout: asked.append(layout))
    open_instrument("random:tiny:0", dtype="bfloat16")
    assert asked == [usual_layout(torch.bfloat16)]
