"""The bench: its rows, its token counts, packed layers, flat cost."""

import json
import weakref

import pytest
import torch
from engine import CONFIG, HoldCodec, random_model, streamer

from lmd.__main__ import main
from lmd.bench import tokens_of_passes
from lmd.config import DiTConfig, WindowConfig
from lmd.controls import Controls
from lmd.outpaint import BlockPlan, LiveDenoiser
from lmd.packed import PackedLinear, can_pack, is_packed, pack, packing_pays
from lmd.rng import normal
from lmd.stream import Streamer

KEYS = {
    "regime", "n_steps", "tokens_per_block", "dit_ms_p50", "dit_ms_p95", "decode_ms_p50",
    "ttff_ms", "rtf", "peak_mb", "cache_mb", "speedup_vs_naive", "bound_speedup",
}  # fmt: skip


def test_bench_writes_a_row_per_regime_and_step_count(tmp_path, capsys):
    path = tmp_path / "bench.json"
    words = ["bench", "--preset", "tiny", "--steps", "2", "3", "--blocks", "2", "--threads", "1"]
    threads = torch.get_num_threads()
    assert main([*words, "--json", str(path)]) == 0
    assert main([*words, "--json", "-"]) == 0
    torch.set_num_threads(threads)
    printed = capsys.readouterr().out
    for report in (
        json.loads(path.read_text()),
        json.loads(printed[printed.rindex('{\n  "preset"') :]),
    ):
        assert {"preset", "dtype", "threads", "device", "rows"} <= report.keys()
        assert [(row["regime"], row["n_steps"]) for row in report["rows"]] == [
            (regime, n) for n in (2, 3) for regime in ("full", "enc-dec", "block-causal")
        ]
        for row in report["rows"]:
            assert row.keys() >= KEYS
            assert row["dit_ms_p95"] >= row["dit_ms_p50"] > 0
            assert row["rtf"] > 0
        assert [row["tokens_per_block"] for row in report["rows"][:3]] == [482, 290, 146]
    assert "block-causal" in printed


def test_token_counts_are_those_that_the_transformer_sees(monkeypatch):
    """Count tokens where they are computed and compare with what the bench says."""
    model, seen = random_model(), []
    trunk = type(model.dit).trunk

    def counting(self, x, *args):
        seen.append(x.shape[1])
        return trunk(self, x, *args)

    monkeypatch.setattr(type(model.dit), "trunk", counting)
    stream = streamer(model)
    for regime in ("full", "enc-dec", "block-causal"):
        controls = Controls(prompt="a", regime=regime, n_steps=3, block_frames=6)
        state = stream.step(stream.start(), controls)[1]
        seen.clear()
        stream.step(state, controls)
        assert seen == tokens_of_passes(regime, 24, 6, 3), regime


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@torch.no_grad()
def test_packed_layers_agree_with_plain_ones(dtype):
    if dtype is torch.bfloat16 and not torch.ops.mkldnn._is_mkldnn_bf16_supported():
        pytest.skip("oneDNN has no bfloat16 products on this processor")
    assert can_pack(dtype)
    context, noisy = normal((1, 4, 24), 0, "context"), normal((1, 4, 6), 0, "noise")
    results = []
    for change in (lambda model: model, pack):
        model = change(random_model().to(dtype))
        condition = model.condition(normal((1, 6, 8), 0, "text"), 1.0)
        plan = BlockPlan("block-causal", 6)
        session = LiveDenoiser(model).open_block(context, condition, plan, None)
        results.append(session(noisy, 0.5))
    assert is_packed(model)
    # Measured: no difference at these sizes, 1.3e-7 of the largest value at those of `small`; the
    # tolerance allows another order of summation (a bfloat16 rounding step near 2 is 0.016).
    tolerance = {torch.float32: 1e-4, torch.bfloat16: 0.1}[dtype]
    torch.testing.assert_close(results[0], results[1], atol=tolerance, rtol=0)


needs_packing = pytest.mark.skipif(not can_pack(), reason="oneDNN's packed products are missing")


@needs_packing
def test_packing_lets_every_plain_weight_go_before_it_takes_the_next(monkeypatch):
    model = random_model(CONFIG)
    layers = [m for m in model.dit.blocks.modules() if isinstance(m, torch.nn.Linear)]
    weights = [weakref.ref(layer.weight) for layer in layers]
    del layers
    alive = []

    def count(*args):
        alive.append(sum(weight() is not None for weight in weights))
        return PackedLinear(*args)

    monkeypatch.setattr("lmd.packed.PackedLinear", count)
    pack(model)

    n = len(weights) // CONFIG.depth  # layers of a block; the first of them becomes two
    starts = range(len(weights), 0, -n)
    expected = [left for start in starts for left in (start, *range(start, start - n, -1))]
    assert alive[1:] == expected  # the first call tries whether it can


@needs_packing
def test_whether_packing_pays_is_measured_on_this_processor(monkeypatch):
    """A clock that runs slow during every second call favours those; either way can win."""
    for slow in (0, 1):
        ticks = iter(range(10**6))

        def clock(ticks=ticks, slow=slow):
            tick = next(ticks)  # begin and end of plain, begin and end of packed, …
            return tick // 2 + (tick % 2) * (2.0 if tick // 2 % 2 == slow else 1.0)

        monkeypatch.setattr("lmd.packed.time.perf_counter", clock)
        assert packing_pays(random_model(CONFIG)) == (slow == 0)


def test_block_one_thousand_costs_the_passes_of_block_ten():
    """The work of a block, counted in tokens and cache bytes, does not grow with the stream."""
    config = DiTConfig(latent_dim=4, width=8, depth=1, n_heads=1, text_dim=8, global_dim=8)
    stream = Streamer(random_model(config), HoldCodec(), streamer().text, WindowConfig(4, 2))
    state, controls = stream.start(), Controls(prompt="a", n_steps=1, block_frames=2)
    sizes = {}
    for index in range(1001):
        block, state = stream.step(state, controls)
        held = (state.context, state.decode.latents, *state.memory.tensors().values())
        sizes[index] = [tuple(tensor.shape) for tensor in held]
    assert sizes[1000] == sizes[10]
    assert torch.isfinite(block.latents).all()
    assert CONFIG.depth == 2


def test_bad_bench_arguments_are_refused(capsys):
    assert main(["bench", "--preset", "huge"]) == 2
    assert "one of tiny, small, paper" in capsys.readouterr().err
    assert main(["bench", "--preset", "tiny", "--blocks", "1"]) == 2
    assert "at least 2 blocks" in capsys.readouterr().err
