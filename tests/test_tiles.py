"""Linear layers in AMX tiles: what they compute with emulated ones, on any processor.

The emulation also counts what a processor would refuse: tiles without a configuration in their
thread, wrong shapes.
"""

import copy
import os
import platform
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from engine import random_model
from hypothesis import given, settings
from hypothesis import strategies as st
from test_panels import random_block, random_heads, random_visibility
from torch import nn

from lmd import packed, panel_attention, panels, tiles
from lmd.config import DiTConfig
from lmd.errors import LmdError
from lmd.model.dit import KeyValue, LiveModel, RotaryEmbedding, frame_positions
from lmd.model.weights import fingerprint
from lmd.packed import PackedBlock, fastest_layout, is_packed, layouts, pack
from lmd.panels import can_use_panels, why_no_panels
from lmd.rng import normal
from lmd.stream.block import BlockPlan, LiveDenoiser
from lmd.tiles import TileLinear, can_use_tiles, in_tiles, why_no_tiles

BFLOAT16 = torch.bfloat16
ONE_ROUNDING = {"rtol": 2**-8, "atol": 1e-3}  # bfloat16 rounds by 2**-9; sums are of float32
X86 = sys.platform.startswith("linux") and platform.machine() == "x86_64"
REAL_KERNEL = tiles.kernel
pytestmark = pytest.mark.skipif(not can_use_panels(), reason=why_no_panels())
needs_tiles = pytest.mark.skipif(not can_use_tiles(), reason=why_no_tiles())


@pytest.fixture(scope="module", autouse=True)
def emulated():
    """The kernel with emulated tiles in the place of the real one."""
    with pytest.MonkeyPatch.context() as patch:
        library = tiles.load(panels.compiled(tiles.SOURCE, "-DEMULATE_TILES"))
        patch.setattr(tiles, "kernel", lambda: library)
        yield library


@pytest.fixture
def used(monkeypatch):
    """As on a processor with tiles."""
    monkeypatch.setattr(packed, "can_use_tiles", lambda: True)
    monkeypatch.setattr(panel_attention, "can_use_tiles", lambda: True)


def random_linear(n_inputs: int, n_outputs: int, *, bias: bool = True):
    linear = nn.Linear(n_inputs, n_outputs, bias=bias, dtype=BFLOAT16).requires_grad_(False)
    for index, parameter in enumerate(linear.parameters()):
        parameter.copy_(normal(tuple(parameter.shape), index, "weights"))
    return linear


def random_rows(*shape: int, purpose: str = "x"):
    return normal(shape, 0, purpose).to(BFLOAT16)


def check_products(linear: nn.Linear, n_rows: int) -> None:
    """All four operations against sums in float64 of the same bfloat16 numbers."""
    layer, x = TileLinear(linear), random_rows(n_rows, linear.in_features)
    other = random_rows(n_rows, linear.out_features, purpose="other")
    exact = x.double() @ linear.weight.double().T
    exact += 0 if linear.bias is None else linear.bias.double()
    pairs = [(layer(x), exact), (layer.plus(x, other), exact + other)]
    pairs += [(layer.times(x, other), exact * other), (layer(x, "swish"), F.silu(exact))]
    for ours, expected in pairs:
        assert ours.dtype == BFLOAT16
        torch.testing.assert_close(ours.double(), expected, **ONE_ROUNDING)
    assert tiles.kernel().tile_faults() == 0


@settings(max_examples=60, deadline=None)
@given(
    n_rows=st.integers(0, 260),
    n_inputs=st.integers(1, 90),
    n_outputs=st.integers(1, 90),
    bias=st.booleans(),
)
def test_layers_agree_with_exact_ones_of_any_size(n_rows, n_inputs, n_outputs, bias):
    check_products(random_linear(n_inputs, n_outputs, bias=bias), n_rows)


@pytest.mark.parametrize("n_threads", [1, 2])
@pytest.mark.parametrize(
    ("n_rows", "n_inputs", "n_outputs"),
    [(13, 64, 1024), (49, 64, 1000), (97, 100, 512), (241, 64, 96), (260, 2112, 40)],
)  # the last one's rows do not fit into the second cache at once
def test_layers_worth_several_threads_agree_too(n_rows, n_inputs, n_outputs, n_threads):
    before = torch.get_num_threads()
    torch.set_num_threads(n_threads)
    try:
        check_products(random_linear(n_inputs, n_outputs), n_rows)
    finally:
        torch.set_num_threads(before)


def test_what_is_no_number_or_endless_stays_so():
    linear = random_linear(1, 3, bias=False)
    linear.weight.copy_(torch.tensor([[float("nan")], [float("inf")], [3e38]]))
    x = torch.full((1, 1), 2.0, dtype=BFLOAT16)
    y = TileLinear(linear)(x)[0]
    assert y.isnan().tolist() == [True, False, False]
    assert y.isinf().tolist() == [False, True, True]


@pytest.mark.parametrize("n_threads", [1, 2])
def test_a_row_does_not_depend_on_the_others_or_on_the_threads(n_threads):
    layer, x = TileLinear(random_linear(320, 200)), random_rows(113, 320)
    before = torch.get_num_threads()
    whole = layer(x)
    torch.set_num_threads(n_threads)
    try:
        for n in (1, 5, 13, 16, 17, 48, 49, 112):
            assert torch.equal(layer(x[:n]), whole[:n])
        assert torch.equal(layer(x[None, 40:41])[0], whole[40:41])
    finally:
        torch.set_num_threads(before)


def test_weights_lie_as_tdpbf16ps_takes_them():
    weight = random_rows(70, 45)
    laid = in_tiles(weight)
    assert laid.shape == (3, 2, 2, 16, 16, 2)
    rebuilt = torch.zeros(96, 64, dtype=BFLOAT16)
    for panel, step, half, pair in torch.cartesian_prod(*map(torch.arange, laid.shape[:4])):
        first_output, first_input = 32 * panel + 16 * half, 32 * step + 2 * pair
        rebuilt[first_output : first_output + 16, first_input : first_input + 2] = laid[
            panel, step, half, pair
        ]
    assert torch.equal(rebuilt[:70, :45], weight)
    assert rebuilt[70:].count_nonzero() == rebuilt[:, 45:].count_nonzero() == 0


def test_the_plain_weights_come_out_as_they_went_in():
    for linear in (random_linear(45, 70), random_linear(64, 32, bias=False)):
        layer = TileLinear(linear)
        assert torch.equal(layer.weight, linear.weight)
        kept, expected = dict(layer.state_dict()), dict(linear.state_dict())
        torch.testing.assert_close(kept, expected, rtol=0, atol=0)


def test_moved_to_another_precision_a_layer_is_a_plain_one_and_back_again():
    linear = random_linear(40, 70)
    layer, x = TileLinear(linear), random_rows(13, 40)
    there = copy.deepcopy(layer).float()
    assert torch.equal(there(x.float()), copy.deepcopy(linear).float()(x.float()))
    assert torch.equal(copy.deepcopy(there).to(BFLOAT16)(x), layer(x))


def test_what_tiles_cannot_compute_is_refused():
    layer = TileLinear(random_linear(40, 70))
    with pytest.raises(LmdError, match="a gradient through layers"):
        layer(torch.zeros(1, 40, dtype=BFLOAT16, requires_grad=True))
    with pytest.raises(LmdError, match=r"torch.float32 of shape \(1, 40\).*torch.bfloat16 with"):
        layer(torch.zeros(1, 40))
    with pytest.raises(LmdError, match=r"shape \(1, 41\).*40 channels"):
        layer(torch.zeros(1, 41, dtype=BFLOAT16))
    with pytest.raises(RuntimeError):  # torch's own: 3 rows beside 2
        layer.plus(torch.zeros(2, 40, dtype=BFLOAT16), torch.zeros(3, 70, dtype=BFLOAT16))


def in_half(pair: KeyValue) -> KeyValue:
    return KeyValue(*(part.to(BFLOAT16) for part in pair))


@settings(max_examples=30, deadline=None)
@given(
    n_tokens=st.integers(1, 100),
    n_past=st.integers(0, 200),
    n_batch=st.integers(1, 3),
    masked=st.booleans(),
    head_dim=st.sampled_from([32, 36, 64]),  # 36 is no whole number of panels: plain attention
)
def test_a_block_of_tiles_is_as_near_to_float32_as_the_plain_one(
    n_tokens, n_past, n_batch, masked, head_dim
):
    n_batch += 16 // n_tokens  # errors of a single row are as large as chance has it
    config = DiTConfig(width=2 * head_dim, n_heads=2, depth=1)
    block = random_block(config).to(BFLOAT16)
    x = random_rows(n_batch, n_tokens, config.width)
    rotation = RotaryEmbedding(config.rope_dim, config.rope_base)(frame_positions(n_tokens - 1, 7))
    text = in_half(random_heads(config, n_batch, 9, "text"))
    past = in_half(random_heads(config, n_batch, n_past, "past")) if n_past else None
    attn_mask = random_visibility(n_tokens, n_past + n_tokens) if masked else None
    wide = [KeyValue(*(part.float() for part in kv)) if kv else None for kv in (text, past)]
    exact, kept = copy.deepcopy(block).float()(x.float(), rotation, wide[0], attn_mask, wide[1])
    plain, _ = block(x, rotation, text, attn_mask, past)
    laid_out = PackedBlock(copy.deepcopy(block), TileLinear)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(panel_attention, "can_use_tiles", lambda: True)
        assert panel_attention.suits(x, head_dim) == (head_dim != 36)
        y, fresh = laid_out(x, rotation, text, attn_mask, past)
    error, plain_error = (y.float() - exact).norm(), (plain.float() - exact).norm()
    assert error <= 1.25 * plain_error  # it rounds less often: 0.68 to 1.05 measured
    torch.testing.assert_close(fresh.key.float(), kept.key, rtol=0.02, atol=0.05)
    torch.testing.assert_close(fresh.value.float(), kept.value, rtol=0.02, atol=0.05)
    assert tiles.kernel().tile_faults() == 0


def test_what_a_token_sees_does_not_depend_on_the_others(used):
    config = DiTConfig(width=128, n_heads=2, depth=1)
    block = PackedBlock(random_block(config).to(BFLOAT16), TileLinear)
    rope, x = RotaryEmbedding(config.rope_dim, config.rope_base), random_rows(1, 60, 128)
    text, past = (in_half(random_heads(config, 1, n, f"{n}")) for n in (9, 40))
    attn_mask = torch.cat([torch.ones(60, 40, dtype=torch.bool), torch.eye(60).bool()], dim=1)
    whole = block(x, rope(torch.arange(60)), text, attn_mask, past)[0]
    alone = block(x[:, :1], rope(torch.arange(1)), text, attn_mask[:1, :41], past)[0]
    assert torch.equal(alone, whole[:, :1])


def test_memory_in_another_precision_is_refused(used):
    config = DiTConfig(width=128, n_heads=2, depth=1)
    block = PackedBlock(random_block(config).to(BFLOAT16), TileLinear)
    past, rotation = random_heads(config, 1, 8, "past"), RotaryEmbedding(32, 1e4)(torch.arange(5))
    with pytest.raises(LmdError, match="LMD_PANELS=0"):
        panel_attention.self_attention(
            block.block.self_attn, random_rows(1, 5, 128), rotation, None, past
        )


@torch.no_grad()
def test_a_model_in_tiles_plays_what_the_plain_one_plays(used):
    plain = random_model().to(BFLOAT16)
    assert "tiles" in layouts(BFLOAT16, 49)
    assert "tiles" not in layouts(torch.float32, 49)
    assert fastest_layout(plain, 49) != "tiles"  # it was tried, and emulated tiles are slow
    model = pack(copy.deepcopy(plain), layout="tiles")
    assert is_packed(model)
    assert isinstance(model.dit.blocks[0].gate, TileLinear)
    assert fingerprint(model) == fingerprint(plain)
    context, noisy = random_rows(3, 4, 24, purpose="context"), random_rows(3, 4, 6)
    prompt = random_rows(3, 6, 8, purpose="text")

    def played(model: LiveModel, dtype: torch.dtype) -> torch.Tensor:
        condition = model.condition(prompt.to(dtype), 1.0)
        plan = BlockPlan("block-causal", 6)
        session = LiveDenoiser(model).open_block(context.to(dtype), condition, plan, None)
        return session(noisy.to(dtype), 0.5).float()

    exact = played(copy.deepcopy(plain).float(), torch.float32)
    error, plain_error = ((played(m, BFLOAT16) - exact).norm() for m in (model, plain))
    assert error <= 1.25 * plain_error  # measured the same within 0.4 %
    assert tiles.kernel().tile_faults() == 0


@pytest.mark.skipif(can_use_tiles(), reason="this processor has tiles")
def test_emulated_tiles_are_nothing_to_play_with():
    assert "tiles" not in layouts(BFLOAT16, 49)
    assert not panel_attention.suits(random_rows(1, 5, 128), 64)


def test_where_tiles_are_missing_or_unwanted_nothing_is_compiled(monkeypatch):
    monkeypatch.setattr(tiles, "kernel", None)  # a call would fail
    monkeypatch.setattr(tiles, "processor", lambda: "flags : fpu avx512f amx_tile")
    for switch in tiles.SWITCHES:
        monkeypatch.delenv(switch, raising=False)
    assert why_no_tiles.__wrapped__() == "the processor has no amx_bf16"
    for switch in tiles.SWITCHES:
        with monkeypatch.context() as patch:
            patch.setenv(switch, "0")
            assert why_no_tiles.__wrapped__() == f"{switch} is 0"


def test_a_system_that_refuses_tiles_is_believed(monkeypatch):
    class Refusing:
        def tile_permission(self):
            return 95

    monkeypatch.setattr(tiles, "compiled", lambda *_: None)
    monkeypatch.setattr(tiles, "load", lambda _: Refusing())
    monkeypatch.setattr(tiles, "kernel", REAL_KERNEL.__wrapped__)
    monkeypatch.setattr(tiles, "processor", lambda: " ".join(tiles.INSTRUCTIONS))
    for switch in tiles.SWITCHES:
        monkeypatch.delenv(switch, raising=False)
    assert "no permission to use tiles" in why_no_tiles.__wrapped__()


def compiled_for(processor: str, folder) -> subprocess.CompletedProcess:
    flags = [flag for flag in panels.FLAGS if not flag.startswith(("-march", "-O"))]
    command = [panels._compiler(), *flags, "-O1", f"-march={processor}", tiles.FLAG]
    command += [str(tiles.SOURCE), "-S", "-o", str(folder / "made.s")]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)


@pytest.mark.skipif(not X86, reason="a compiler for another processor")
def test_the_real_kernel_compiles_to_tile_instructions(tmp_path):
    """It runs only where there are tiles; that it compiles is seen on every x86."""
    done = compiled_for("sapphirerapids", tmp_path)
    if "sapphirerapids" in done.stderr:
        pytest.skip("a compiler that does not know the processor")
    assert done.returncode == 0, done.stderr
    assembly = (tmp_path / "made.s").read_text()
    for instruction in ("ldtilecfg", "tdpbf16ps\t%tmm6, %tmm4, %tmm0", "tilerelease"):
        assert instruction.replace("\t", " ") in assembly.replace("\t", " ")
    done = compiled_for("haswell", tmp_path)
    assert done.returncode != 0
    assert "knows no AMX tiles" in done.stderr


@needs_tiles
def test_real_tiles_compute_what_emulated_ones_do(monkeypatch):
    layer, x = TileLinear(random_linear(320, 200)), random_rows(49, 320)
    expected = layer(x)
    monkeypatch.setattr(tiles, "kernel", REAL_KERNEL)
    torch.testing.assert_close(layer(x), expected, **ONE_ROUNDING)


def test_a_processor_with_tiles_uses_them():
    """So that the test above is not left out without a reason."""
    has_all = set(tiles.INSTRUCTIONS) <= set(panels.processor().split())
    if has_all and all(os.environ.get(switch) != "0" for switch in tiles.SWITCHES):
        assert why_no_tiles() == ""
    else:
        assert why_no_tiles()
