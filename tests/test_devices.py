"""What a machine without a GPU can know of playing on one.

Fake tensors carry a device and compute nothing, but refuse to mix devices as real ones do; tensors
on `meta` have a device that something can be left behind from.
"""

import dataclasses
import os
import subprocess
import sys
from itertools import product
from types import SimpleNamespace

import pytest
import torch
from engine import CONFIG, WINDOW, random_model, streamer
from torch._subclasses.fake_tensor import FakeTensorMode

from lmd.arc.discriminator import Discriminator, HeadConfig
from lmd.arc.losses import Prompts, discriminator_loss, generator_loss
from lmd.arc.module import make_pair, plan_update
from lmd.arc.options import ArcRun
from lmd.checkpoint import build_model
from lmd.codec.oobleck import random_codec
from lmd.codec.spectral import SpectralCodec
from lmd.config import ControlChannel, OobleckConfig, SpectralCodecConfig, preset
from lmd.model.live_model import LiveModel, add_controls
from lmd.stream.controls import Controls
from lmd.stream.streamer import Streamer
from lmd.training.draws import BatchIndices

OOBLECK = OobleckConfig(
    sample_rate=800, audio_channels=1, latent_dim=4, channels=4, c_mults=(1, 2), strides=(2, 4)
)
SPECTRAL = SpectralCodecConfig(
    latent_dim=4, n_fft=1024, n_linear=32, n_bands=64, encoder_width=8, width=8, depth=1,
    step_width=8, step_depth=1, horizon_frames=2,
)  # fmt: skip
CODECS = {"oobleck": lambda: random_codec(OOBLECK), "spectral": lambda: SpectralCodec(SPECTRAL)}


def named_tensors(part, name):
    """Every tensor of nested dataclasses and tuples, under where it stands."""
    if isinstance(part, torch.Tensor):
        return {name: part}
    if dataclasses.is_dataclass(part):
        inner = [(field.name, getattr(part, field.name)) for field in dataclasses.fields(part)]
    else:
        inner = enumerate(part) if isinstance(part, tuple | list) else []
    found = (named_tensors(each, f"{name}.{place}") for place, each in inner)
    return {key: tensor for tensors in found for key, tensor in tensors.items()}


def devices_of(state):
    """Where the tensors of a state are: those that the codec made, and the others."""
    found = named_tensors(state, "")
    codecs = {name for name in found if name.startswith((".decode.overhang", ".decode.running"))}
    return [
        {found[name].device.type for name in names} for names in (codecs, found.keys() - codecs)
    ]


@pytest.fixture
def on_cuda(monkeypatch):
    """A streamer, all of fake tensors, whose model and codec are on a GPU."""
    monkeypatch.setattr(torch, "isfinite", lambda x: SimpleNamespace(all=lambda: True))
    monkeypatch.setattr(
        "lmd.stream.streamer.schedule", lambda n_steps: (1.0, 0.5, 0.0)
    )  # fakes have none
    codec = random_codec(OOBLECK)
    with FakeTensorMode():
        with torch.device("cuda"):
            model = LiveModel(CONFIG)
            for module in codec.modules():  # `to` cannot move fakes
                for name, weight in module.named_parameters(recurse=False):
                    fake = torch.nn.Parameter(torch.empty(weight.shape), requires_grad=False)
                    setattr(module, name, fake)
        yield Streamer(model, codec, streamer().text, WINDOW)


@pytest.mark.parametrize("regime", ["full", "enc-dec", "block-causal"])
def test_a_stream_never_mixes_devices(on_cuda, regime):
    assert on_cuda.start().context.device.type == "cuda"
    state = on_cuda.start(context=torch.zeros(1, 1, 8 * 40))
    assert state.context.device.type == "cuda"
    base = {"regime": regime, "n_steps": 2, "block_frames": 6}
    for controls in (
        Controls("a", **base),
        Controls("a", **base),
        Controls("b", cfg_scale=2.0, drop_context_frames=6, boundary="fade", **base),
        Controls("b", cfg_scale=0.5, sampler="pingpong++", **base),
    ):
        block, state = on_cuda.step(state, controls)
        assert block.latents.device.type == "cuda"
        assert block.wave.device.type == "cpu"
        assert devices_of(state)[1] == {"cuda"}
        assert devices_of(state)[0] <= {"cuda"}


@pytest.mark.parametrize("codec", CODECS)
def test_a_state_is_loaded_to_where_the_model_and_the_codec_are(codec, tmp_path, monkeypatch):
    path, made = tmp_path / "state.safetensors", []
    for device in ("cpu", "meta"):
        model, own = random_model().to(device), CODECS[codec]().to(device)
        made.append(Streamer(model, own, streamer().text, WINDOW))
    monkeypatch.setattr("lmd.stream.streamer.fingerprint", lambda part: "the same")
    state = made[0].start()
    for boundary in ("exact", "fade", "exact"):
        _, state = made[0].step(state, Controls("a", n_steps=1, block_frames=12, boundary=boundary))
    made[0].save_state(state, path)
    assert devices_of(made[0].load_state(path)) == [{"cpu"}, {"cpu"}]
    assert devices_of(made[1].load_state(path)) == [{"meta"}, {"meta"}]
    halves = Streamer(made[0].denoiser.model, made[1].codec, made[0].text, WINDOW)
    assert devices_of(halves.load_state(path)) == [{"meta"}, {"cpu"}]


def test_added_controls_are_where_the_model_is_and_as_precise():
    grown = add_controls(random_model().to("meta", torch.bfloat16), ControlChannel("sketch", 3))
    assert {(p.device.type, p.dtype) for p in grown.parameters()} == {("meta", torch.bfloat16)}


@pytest.mark.parametrize("codec", CODECS)
def test_a_codec_moves_with_everything_it_computes_with(codec):
    made = CODECS[codec]()
    assert made.device.type == "cpu"
    weights = made.state_dict()
    assert len(weights) > 10
    assert made.to("meta") is made
    assert made.device.type == "meta"
    left = [*made.state_dict().values(), *made.buffers()]
    assert {tensor.device.type for tensor in left} == {"meta"}
    assert {k: v.shape for k, v in made.state_dict().items()} == {
        k: v.shape for k, v in weights.items()
    }


@torch.no_grad()
def test_what_outlives_a_call_is_not_in_the_memory_of_the_blocks_results(monkeypatch):
    """CUDA graphs write into the same memory at every call; so do these blocks."""
    results = {}

    def replaying(self, x, *args):
        out, fresh = forward(self, x, *args)
        key = (id(self), x.shape)
        if key not in results:
            results[key] = [torch.empty_strided(t.shape, t.stride()) for t in (out, *fresh)]
        for held, new in zip(results[key], (out, *fresh), strict=True):
            held.copy_(new)
        return results[key][0], type(fresh)(*results[key][1:])

    plans = [
        Controls("a", n_steps=2, block_frames=6, regime=regime)
        for regime in ("enc-dec", "block-causal", "block-causal", "block-causal")
    ]
    model = random_model()
    plain = [block.latents for block in streamer(model).stream(plans)]
    block_class = type(model.dit.blocks[0])
    forward = block_class.forward
    monkeypatch.setattr(block_class, "forward", replaying)
    state, stream = streamer(model).start(), streamer(model)
    for controls, expected in zip(plans, plain, strict=True):
        block, state = stream.step(state, controls)
        for held in results.values():
            for tensor in held:
                tensor.fill_(float("nan"))
        assert torch.equal(block.latents, expected)
        assert all(torch.isfinite(t).all() for t in state.memory.tensors().values())
    assert len(results) > 2


@pytest.mark.filterwarnings("ignore:Accessing the data pointer of FakeTensor")  # deep copies do
def test_an_update_of_arc_forcing_never_mixes_devices(monkeypatch):
    """In a process of its own: after copies of fakes PyTorch's next allocations may crash."""
    if "LMD_FAKES" not in os.environ:
        name = f"{__file__}::test_an_update_of_arc_forcing_never_mixes_devices"
        shown = subprocess.run(
            [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", name],
            env=os.environ | {"LMD_FAKES": "1", "PYTHONUNBUFFERED": "1"},
            capture_output=True,
            text=True,
        )
        assert "1 passed" in shown.stdout, shown.stdout + shown.stderr
        return
    sizes, rows = preset("tiny"), BatchIndices(0, 0, (0, 1), 2)
    options = ArcRun(blocks="2", warmup=0, sampler="dpmpp")
    plans = [plan_update(options, 0, update) for update in range(6)]
    assert {(plan.trains, plan.block.regime) for plan in plans} == set(
        product(("generator", "discriminator"), ("enc-dec", "block-causal"))
    )
    levels = tuple(1 - 0.1 * k for k in range(9))
    monkeypatch.setattr("lmd.arc.losses.schedule", lambda n: (*levels[:n], 0.0))
    monkeypatch.setattr("lmd.training.draws._uniform", lambda *drawn_from: 0.3)
    with FakeTensorMode(allow_non_fake_inputs=True):
        with torch.device("cuda"):
            player = build_model(sizes)
            judge = Discriminator(build_model(sizes), "blocks.1", HeadConfig.of(sizes.dit.width))
        tokens = torch.zeros(2, sizes.text.n_tokens, sizes.text.dim, device="cuda")
        asked = Prompts(tokens, torch.zeros(2, dtype=torch.bool, device="cuda"))
        for plan in plans:
            clean = torch.zeros(2, sizes.dit.latent_dim, plan.n_frames, device="cuda")
            wrong = Prompts(tokens + 1, asked.dropped)
            trial = make_pair(player, clean, asked, wrong, rows, plan, options)
            if plan.trains == "generator":
                verdict = generator_loss(judge, trial)
            else:
                verdict = discriminator_loss(judge, trial, 1.0, 0.01, 0.01)
            assert verdict.loss.device.type == "cuda"
