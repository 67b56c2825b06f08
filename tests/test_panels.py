"""Linear layers in panels: what they compute, alone and in an instrument, and what is refused."""

import copy
import os
import sys

import pytest
import torch
import torch.nn.functional as F
from engine import random_model
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from lmd import panel_attention, panels
from lmd.config import DiTConfig
from lmd.errors import LmdError
from lmd.model.dit import Block, KeyValue, RotaryEmbedding, frame_positions
from lmd.model.weights import fingerprint
from lmd.packed import PackedBlock, is_packed, pack
from lmd.panels import PanelLinear, can_use_panels, use_panels, why_no_panels
from lmd.pretrained import open_instrument
from lmd.rng import normal
from lmd.stream.block import BlockPlan, LiveDenoiser

needs_kernel = pytest.mark.skipif(not can_use_panels(), reason=why_no_panels())


def random_linear(n_inputs: int, n_outputs: int, *, bias: bool = True, half: bool = False):
    linear = nn.Linear(n_inputs, n_outputs, bias=bias).requires_grad_(False)
    for index, parameter in enumerate(linear.parameters()):
        drawn = normal(tuple(parameter.shape), index, "weights")
        parameter.copy_(drawn.half().float() if half else drawn)
    return linear


def test_the_kernel_is_there_where_there_is_a_compiler():
    """So that no test below is left out without a reason: Linux with g++ has it."""
    has_compiler = panels.shutil.which("g++") or panels.shutil.which("clang++")
    if sys.platform.startswith("linux") and has_compiler and os.environ.get("LMD_PANELS") != "0":
        assert why_no_panels() == ""
    else:
        assert why_no_panels()


@needs_kernel
@settings(max_examples=60, deadline=None)
@given(
    n_rows=st.integers(0, 230),
    n_inputs=st.integers(1, 90),
    n_outputs=st.integers(1, 90),
    bias=st.booleans(),
    half=st.booleans(),
)
def test_layers_agree_with_plain_ones_of_any_size(n_rows, n_inputs, n_outputs, bias, half):
    linear = random_linear(n_inputs, n_outputs, bias=bias, half=half)
    layer = PanelLinear(linear)
    x, other = normal((n_rows, n_inputs), 0, "x"), normal((n_rows, n_outputs), 1, "other")
    exact = x.double() @ linear.weight.double().T + (linear.bias.double() if bias else 0)
    # Errors of float32 sums grow with their terms, here of size 1: measured up to 1e-5 at 90.
    close = {"atol": 1e-4, "rtol": 0}
    torch.testing.assert_close(layer(x).double(), exact, **close)
    torch.testing.assert_close(layer.plus(x, other).double(), exact + other, **close)
    torch.testing.assert_close(layer.times(x, other).double(), exact * other, atol=1e-3, rtol=0)
    torch.testing.assert_close(layer(x, "swish").double(), F.silu(exact), **close)


def random_block(config: DiTConfig) -> Block:
    block = Block(config).requires_grad_(False)
    for index, parameter in enumerate(block.parameters()):
        drawn = normal(tuple(parameter.shape), index, "weights")
        parameter.copy_(drawn * (parameter.shape[-1] ** -0.5 if parameter.dim() > 1 else 1.0))
    return block


def random_heads(config: DiTConfig, n_batch: int, n_tokens: int, purpose: str) -> KeyValue:
    shape = (n_batch, config.n_heads, n_tokens, config.head_dim)
    return KeyValue(*(normal(shape, index, purpose) for index in range(2)))


def random_visibility(n_tokens: int, n_keys: int) -> torch.Tensor:
    attn_mask = normal((n_tokens, n_keys), 0, "visible") > 0
    attn_mask[:, -1] = True  # who sees nobody has no result
    return attn_mask


@needs_kernel
@settings(max_examples=40, deadline=None)
@given(
    n_tokens=st.integers(1, 100),
    n_past=st.integers(0, 200),
    n_batch=st.integers(1, 3),
    masked=st.booleans(),
    head_dim=st.sampled_from([32, 36, 64]),  # 36 is no whole number of panels: plain attention
)
def test_a_block_of_panels_agrees_with_the_plain_one(n_tokens, n_past, n_batch, masked, head_dim):
    config = DiTConfig(width=2 * head_dim, n_heads=2, depth=1)
    block = random_block(config)
    x = normal((n_batch, n_tokens, config.width), 0, "x")
    rotation = RotaryEmbedding(config.rope_dim, config.rope_base)(frame_positions(n_tokens - 1, 7))
    text = random_heads(config, n_batch, 9, "text")
    past = random_heads(config, n_batch, n_past, "past") if n_past else None
    attn_mask = random_visibility(n_tokens, n_past + n_tokens) if masked else None
    expected, kept = block(x, rotation, text, attn_mask, past)
    packed = PackedBlock(copy.deepcopy(block), PanelLinear)
    y, fresh = packed(x, rotation, text, attn_mask, past)
    close = {"atol": 2e-4, "rtol": 1e-4}
    torch.testing.assert_close(y, expected, **close)
    torch.testing.assert_close(fresh.key, kept.key, **close)
    torch.testing.assert_close(fresh.value, kept.value, **close)


@needs_kernel
def test_what_a_token_sees_does_not_depend_on_the_others_or_on_the_threads():
    config = DiTConfig(width=128, n_heads=2, depth=1)
    block = PackedBlock(random_block(config), PanelLinear)
    rope = RotaryEmbedding(config.rope_dim, config.rope_base)
    x, text = normal((1, 60, 128), 0, "x"), random_heads(config, 1, 9, "text")
    past, before = random_heads(config, 1, 40, "past"), torch.get_num_threads()

    def seen(first: int, n: int) -> torch.Tensor:
        """Tokens that see the past, and of one another only themselves."""
        attn_mask = torch.cat([torch.ones(n, 40, dtype=torch.bool), torch.eye(n).bool()], dim=1)
        rotation = rope(torch.arange(first, first + n))
        return block(x[:, first : first + n], rotation, text, attn_mask, past)[0]

    whole = seen(0, 60)
    for n_threads in (1, 2):
        torch.set_num_threads(n_threads)
        try:
            assert torch.equal(seen(0, 60), whole)
            assert torch.equal(seen(0, 1), whole[:, :1])
        finally:
            torch.set_num_threads(before)
    torch.testing.assert_close(seen(20, 30), whole[:, 20:50], atol=1e-5, rtol=0)


@needs_kernel
def test_the_first_look_leaves_the_callers_randomness_alone():
    panel_attention._attends_rightly.cache_clear()
    before = torch.get_rng_state()
    assert panel_attention._attends_rightly(64)
    assert torch.equal(torch.get_rng_state(), before)


@needs_kernel
@pytest.mark.parametrize("wrong", ["past in half", "a mask too small", "angles of fewer tokens"])
def test_what_the_kernel_would_read_past_its_end_is_refused(wrong):
    config = DiTConfig(width=128, n_heads=2, depth=1)
    block, x = PackedBlock(random_block(config), PanelLinear), normal((1, 5, 128), 0, "x")
    past, rope = random_heads(config, 1, 8, "past"), RotaryEmbedding(32, 1e4)
    rotation, attn_mask = rope(torch.arange(5)), torch.ones(5, 13, dtype=torch.bool)
    if wrong == "past in half":
        past = KeyValue(past.key.half(), past.value.half())
    elif wrong == "a mask too small":
        attn_mask = attn_mask[:, 1:]
    else:
        rotation = rope(torch.arange(4))
    with pytest.raises(LmdError, match="LMD_PANELS=0"):
        panel_attention.self_attention(block.block.self_attn, x, rotation, attn_mask, past)


@needs_kernel
def test_where_the_kernel_attends_wrongly_the_plain_formulas_are_used(monkeypatch):
    config = DiTConfig(width=128, n_heads=2, depth=1)
    block, x = PackedBlock(random_block(config), PanelLinear), normal((1, 5, 128), 0, "x")
    text = random_heads(config, 1, 9, "text")
    expected = block(x, RotaryEmbedding(32, 1e4)(torch.arange(5)), text)[0]
    assert panel_attention._attends_rightly(64)
    monkeypatch.setattr(panel_attention, "_attends_rightly", lambda *_: False)
    monkeypatch.setattr(panel_attention, "_attend", None)  # a call would fail
    y = block(x, RotaryEmbedding(32, 1e4)(torch.arange(5)), text)[0]
    torch.testing.assert_close(y, expected, atol=1e-5, rtol=0)


@needs_kernel
@pytest.mark.parametrize("n_threads", [1, 2])
def test_a_row_does_not_depend_on_the_others_or_on_the_threads(n_threads):
    layer, x = PanelLinear(random_linear(320, 200)), normal((113, 320), 0, "x")
    before = torch.get_num_threads()
    whole = layer(x)
    torch.set_num_threads(n_threads)
    try:
        for n in (1, 5, 13, 48, 112):
            assert torch.equal(layer(x[:n]), whole[:n])
        assert torch.equal(layer(x[None, 40:41])[0], whole[40:41])
    finally:
        torch.set_num_threads(before)


@needs_kernel
def test_weights_of_a_float16_file_are_kept_in_16_bits_and_stay_what_they_are():
    for half, dtype in ((True, torch.float16), (False, torch.float32)):
        linear = random_linear(40, 70, half=half)
        layer = PanelLinear(linear)
        assert layer.panels.dtype == dtype
        assert torch.equal(layer.weight, linear.weight)
        torch.testing.assert_close(dict(layer.state_dict()), dict(linear.state_dict()))


@needs_kernel
def test_moved_to_another_precision_a_layer_is_a_plain_one_and_back_again():
    linear = random_linear(40, 70, half=True)
    layer, x = PanelLinear(linear), normal((13, 40), 0, "x")
    there = copy.deepcopy(layer).to(torch.bfloat16)
    expected = copy.deepcopy(linear).to(torch.bfloat16)(x.bfloat16())
    assert torch.equal(there(x.bfloat16()), expected)
    back = copy.deepcopy(layer).to(torch.float16).to(torch.float32)  # loses nothing: 16 bits
    assert torch.equal(back(x), layer(x))


@needs_kernel
@torch.no_grad()
def test_a_model_in_panels_plays_what_the_plain_one_plays():
    context, noisy = normal((3, 4, 24), 0, "context"), normal((3, 4, 6), 0, "noise")
    results, prints = [], []
    for layout in ("plain", "panels"):
        model = pack(random_model(), layout=layout)
        assert is_packed(model) == (layout == "panels")
        condition = model.condition(normal((3, 6, 8), 0, "text"), 1.0)
        session = LiveDenoiser(model).open_block(
            context, condition, BlockPlan("block-causal", 6), None
        )
        results.append(session(noisy, 0.5))
        prints.append(fingerprint(model))
    torch.testing.assert_close(*results, atol=1e-5, rtol=0)  # measured 2.4e-7
    assert prints[0] == prints[1]


@needs_kernel
def test_instruments_play_in_panels_and_only_they():
    instrument = open_instrument("random:tiny:0")
    model, codec = instrument.streamer.denoiser.model, instrument.streamer.codec.model
    assert is_packed(model)
    assert isinstance(codec.decoder.level, PanelLinear)
    assert isinstance(codec.encoder.linear, nn.Linear)


@needs_kernel
def test_what_panels_cannot_compute_is_refused():
    layer = PanelLinear(random_linear(40, 70))
    with pytest.raises(LmdError, match="a gradient through layers"):
        layer(torch.zeros(1, 40, requires_grad=True))
    with pytest.raises(LmdError, match=r"torch.float64 of shape \(1, 40\)"):
        layer(torch.zeros(1, 40, dtype=torch.float64))
    with pytest.raises(LmdError, match=r"shape \(1, 41\).*40 channels"):
        layer(torch.zeros(1, 41))
    with pytest.raises(LmdError, match=r"layout 'tiles'.*plain or one of \['panels'"):
        pack(random_model(), layout="tiles")
    with pytest.raises(RuntimeError):  # torch's own: 3 rows beside 2
        layer.plus(torch.zeros(2, 40), torch.zeros(3, 70))


@pytest.fixture
def fresh(monkeypatch, tmp_path):
    """As in a process that has not asked for the kernel yet, with a cache folder of its own."""
    monkeypatch.delenv("LMD_PANELS", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))

    def drop_context():
        why_no_panels.cache_clear()
        panels.kernel.cache_clear()

    drop_context()
    yield drop_context
    drop_context()


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"LMD_PANELS": "0"}, "LMD_PANELS is 0"),
        ({"PATH": "", "CXX": ""}, "the kernel could not be compiled: no C++ compiler"),
        ({"CXX": "false"}, "the kernel could not be compiled"),
    ],
)
def test_without_the_kernel_plain_layers_stay_and_the_reason_is_told(
    changes, expected, fresh, monkeypatch
):
    if not sys.platform.startswith("linux") and "LMD_PANELS" not in changes:
        pytest.skip("the kernel is for Linux")
    for name, value in changes.items():
        monkeypatch.setenv(name, value)
    assert type(use_panels(nn.Sequential(nn.Linear(3, 4)))[0]) is nn.Linear
    assert why_no_panels().startswith(expected)


@needs_kernel
def test_the_kernel_is_compiled_once_and_where_nothing_can_be_kept_anew(
    fresh, monkeypatch, tmp_path
):
    made = []
    for _ in range(2):
        fresh()
        assert can_use_panels()
        (kept,) = (tmp_path / "lmd").glob("*")
        made.append(kept.stat().st_mtime_ns)
    assert made[0] == made[1]
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))  # no folder fits under a file
    fresh()
    assert can_use_panels()


@needs_kernel
def test_every_linear_layer_inside_a_module_is_laid_out():
    module = nn.ModuleDict({"a": nn.Linear(3, 4), "b": nn.Sequential(nn.GELU(), nn.Linear(4, 2))})
    use_panels(module)
    assert sum(isinstance(m, PanelLinear) for m in module.modules()) == 2
    assert not any(isinstance(m, nn.Linear) for m in module.modules())
