"""The bench: its rows, its token counts, packed layers, flat cost."""

import copy
import json
import re
import weakref
from dataclasses import fields, replace

import pytest
import torch
from engine import CONFIG, HoldCodec, random_model, streamer

from lmd.__main__ import main
from lmd.bench import (
    COMPILE_TOLERANCE,
    compile_blocks,
    long_stream,
    open_parts,
    rebuilds,
    table,
    tell,
)
from lmd.bound import Pass, Rates, passes_of
from lmd.config import PRESETS, REGIMES, DiTConfig, OobleckConfig, WindowConfig
from lmd.decoder_speed import DecoderSpeed
from lmd.machine import hardware, machine_dict
from lmd.model.dit import DiT
from lmd.model.weights import fingerprint
from lmd.packed import PackedLinear, can_pack, fastest_layout, is_packed, layouts, pack
from lmd.rng import normal
from lmd.stream.block import BlockPlan, LiveDenoiser
from lmd.stream.controls import Controls
from lmd.stream.streamer import Streamer

KEYS = {
    "regime", "n_steps", "tokens_per_block", "dit_ms_p50", "dit_ms_p95", "decode_ms_p50",
    "ttff_ms", "rtf", "peak_mb", "cache_mb", "speedup_vs_naive", "bound_speedup",
    "rebuild_ms_p50", "rebuild_ms",
}  # fmt: skip

CAUSES = {"prompt", "block_frames", "regime", "drop_context_frames"}


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
            assert row["rebuild_ms"].keys() == CAUSES
            assert min(row["rebuild_ms"].values()) > 0
        assert [row["tokens_per_block"] for row in report["rows"][:3]] == [482, 290, 146]
    assert "block-causal" in printed
    assert all(f"by {cause}" in printed for cause in CAUSES)


@pytest.mark.parametrize("regime", ["full", "enc-dec", "block-causal"])
def test_what_is_timed_as_a_rebuild_is_one(regime, monkeypatch):
    stream = streamer()
    base = Controls(prompt="organ", n_steps=2, block_frames=6, regime=regime)
    made, before = [], []
    step = stream.step

    def noting(state, controls):
        block, following = step(state, controls)
        made.append((controls, block, before[-1] if state.index else None))
        before.append(controls)
        return block, following

    state = stream.step(stream.start(), base)[1]
    monkeypatch.setattr(stream, "step", noting)
    before.append(base)
    blocks = rebuilds(stream, state, base)
    assert blocks.keys() == CAUSES
    for cause, timed in blocks.items():
        assert len(timed) == 2
        for block in timed:
            assert block.rebuilt, cause
            asked = replace(block.controls, drop_context_frames=0)
            assert asked == base
            assert (block.controls.drop_context_frames > 0) == (cause == "drop_context_frames")
    earlier = [controls for controls, block, _ in made if controls.n_steps == 1]
    moved = [
        {name for name in CAUSES if getattr(controls, name) != getattr(base, name)}
        for controls in earlier
    ]
    assert moved == [{"prompt"}, {"block_frames"}, {"regime"}, set()]


def test_token_counts_are_those_that_the_transformer_sees(monkeypatch):
    """Count tokens where they are computed and compare with what the bench says."""
    model, seen = random_model(), []
    trunk = type(model.dit).trunk

    def counting(self, x, *args, **kwargs):
        out, fresh = trunk(self, x, *args, **kwargs)
        seen.append(Pass(x.shape[1], x.shape[1] - out.shape[1]))
        return out, fresh

    monkeypatch.setattr(type(model.dit), "trunk", counting)
    stream = streamer(model)
    for regime in ("full", "enc-dec", "block-causal"):
        controls = Controls(prompt="a", regime=regime, n_steps=3, block_frames=6)
        state = stream.step(stream.start(), controls)[1]
        seen.clear()
        stream.step(state, controls)
        assert seen == passes_of(regime, 24, 6, 3), regime


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@torch.no_grad()
def test_packed_layers_agree_with_plain_ones(dtype):
    if dtype is torch.bfloat16 and not torch.ops.mkldnn._is_mkldnn_bf16_supported():
        pytest.skip("oneDNN has no bfloat16 products on this processor")
    assert can_pack(dtype)
    context, noisy = normal((1, 4, 24), 0, "context"), normal((1, 4, 6), 0, "noise")
    results = []
    for layout in ("plain", "onednn"):
        model = pack(random_model().to(dtype), layout=layout)
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
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_packed_model_has_the_state_of_the_plain_one(dtype):
    if not can_pack(dtype):
        pytest.skip("oneDNN has no such products on this processor")
    model = random_model().to(dtype)
    plain, before = {k: v.clone() for k, v in model.state_dict().items()}, fingerprint(model)
    for layout in layouts(dtype, 49):
        packed = pack(copy.deepcopy(model), layout=layout)
        assert is_packed(packed)
        torch.testing.assert_close(dict(packed.state_dict()), plain, atol=0, rtol=0)
        assert fingerprint(packed) == before
        assert fingerprint(pack(random_model(seed=1).to(dtype), layout=layout)) != before


@needs_packing
def test_packing_lets_every_plain_weight_go_before_it_takes_the_next(monkeypatch):
    model = random_model(CONFIG)
    layers = [m for m in model.dit.blocks.modules() if isinstance(m, torch.nn.Linear)]
    weights = [weakref.ref(layer.weight) for layer in layers]
    del layers
    alive = []

    def count(*args, **kwargs):
        alive.append(sum(weight() is not None for weight in weights))
        return PackedLinear(*args, **kwargs)

    monkeypatch.setattr("lmd.packed.PackedLinear", count)
    pack(model, layout="onednn")

    n = len(weights) // CONFIG.depth  # layers of a block; the first of them becomes two
    starts = range(len(weights), 0, -n)
    expected = [left for start in starts for left in (start, *range(start, start - n, -1))]
    assert alive[1:] == expected  # the first call tries whether it can


@needs_packing
def test_which_layout_is_fastest_is_measured_on_this_processor(monkeypatch):
    """A clock that runs fast during one layout's turns favours that one; each can win."""
    model = random_model(CONFIG)
    names = ["plain", *layouts(torch.float32, 49)]
    for favoured, name in enumerate(names):
        ticks = iter(range(10**6))

        def clock(ticks=ticks, favoured=favoured):
            tick = next(ticks)  # begin and end of the first, begin and end of the second, …
            turn = tick // 2 % len(names)
            return tick // 2 + (tick % 2) * (1.0 if turn == favoured else 2.0)

        monkeypatch.setattr("lmd.packed.time.perf_counter", clock)
        assert fastest_layout(model) == name


def test_block_one_thousand_costs_the_passes_of_block_ten(monkeypatch):
    """The work of a block, in tokens, keys, shapes and cache bytes, does not grow with it."""
    config = DiTConfig(latent_dim=4, width=8, depth=1, n_heads=1, text_dim=8, global_dim=8)
    stream = Streamer(random_model(config), HoldCodec(), streamer().text, WindowConfig(4, 2))
    state, controls = stream.start(), Controls(prompt="a", n_steps=1, block_frames=2)
    passes, block_class = [], type(stream.denoiser.model.dit.blocks[0])
    forward = block_class.forward

    def counting(self, x, rotation, text, attn_mask=None, past=None, *read):
        passes.append((x.shape[1], len(rotation.cos), 0 if past is None else past.key.shape[2]))
        return forward(self, x, rotation, text, attn_mask, past, *read)

    monkeypatch.setattr(block_class, "forward", counting)
    costs = []
    for _ in range(1001):
        passes.clear()
        block, state = stream.step(state, controls)
        held = (state.context, state.decode.latents, *state.memory.tensors().values())
        shapes = [tuple(tensor.shape) for tensor in held]
        costs.append((shapes, state.memory.n_bytes, block.wave.shape, tuple(passes)))
    assert costs[10][-1] == (
        (5, 5, 4),
    )  # finished block, new block, global token; four cached frames
    assert all(cost == costs[10] for cost in costs[10:])
    assert torch.isfinite(block.latents).all()


def test_late_blocks_are_timed_in_turns_with_those_of_a_young_stream(monkeypatch):
    played, stream = [], streamer()
    step = stream.step

    def noted(state, controls):
        played.append(state.index)
        return step(state, controls)

    monkeypatch.setattr(stream, "step", noted)
    found = long_stream(stream, 12, 1, 110)
    assert played[:70] == [*range(60), *range(10)]
    assert played[70:] == [
        k for pair in zip(range(60, 110), range(10, 60), strict=True) for k in pair
    ]
    assert found["long_cache_sizes"] == 1
    assert found["long_cost_ratio"] > 0


def test_what_is_measured_of_a_compiled_stream_was_compiled_before(monkeypatch):
    """A pass of another shape would be compiled, or its CUDA graph recorded, on the clock."""
    stream, shapes = streamer(), set()
    block_class = type(stream.denoiser.model.dit.blocks[0])
    forward = block_class.forward

    def noting(self, x, rotation, text, attn_mask, past, read):
        mask = None if attn_mask is None else attn_mask.shape
        shapes.add((x.shape, rotation.cos.shape, mask, past and past.key.shape, str(read)))
        return forward(self, x, rotation, text, attn_mask, past, read)

    monkeypatch.setattr(block_class, "forward", noting)
    monkeypatch.setattr(DiT, "compile_blocks", lambda self, mode: None)
    compile_blocks(stream, 12)
    compiled = set(shapes)
    for regime in REGIMES:
        controls = Controls("organ", regime=regime, n_steps=3, block_frames=12)
        list(stream.stream([controls] * 4))
    assert len(compiled) >= 4  # naive, encoding, generating, absorbing
    assert shapes == compiled


def test_a_compiled_stream_that_moves_too_far_from_eager_is_an_error(monkeypatch, capsys):
    """Compiling is replaced by a change of the weights: none, a rounding step, a large one."""

    def scaled(factor):
        def compile_blocks(self, mode="default"):
            assert mode == "default"
            for parameter in self.blocks.parameters():
                parameter.mul_(factor)

        monkeypatch.setattr(DiT, "compile_blocks", compile_blocks)
        words = ["bench", "--preset", "tiny", "--steps", "1", "--blocks", "2", "--threads", "1"]
        status = main([*words, "--compile", "--json", "-"])
        printed = capsys.readouterr().out
        report = json.loads(printed)
        assert report["compile_tolerance"] == COMPILE_TOLERANCE[torch.float32]
        assert report["compile_s"] > 0
        return status, report["compile_max_difference"]

    monkeypatch.setattr("lmd.bench.check_compiler", lambda: None)
    monkeypatch.setattr("lmd.bench.machine_rates", lambda *args: Rates(1e9, 1e9))
    threads = torch.get_num_threads()
    assert scaled(1.0) == (0, 0.0)
    status, difference = scaled(1 + 2**-22)
    assert status == 0
    assert 0 < difference <= COMPILE_TOLERANCE[torch.float32]
    status, difference = scaled(1.01)
    assert status == 1
    assert difference > COMPILE_TOLERANCE[torch.float32]
    torch.set_num_threads(threads)


def test_the_decoder_of_stable_audio_is_measured_on_request(monkeypatch, capsys):
    sizes = OobleckConfig(latent_dim=8, channels=8, c_mults=(1, 2), strides=(2, 4))
    monkeypatch.setitem(PRESETS, "tiny", replace(PRESETS["tiny"], codec=sizes))
    words = ["bench", "--preset", "tiny", "--steps", "1", "--blocks", "2", "--threads", "1"]
    monkeypatch.setattr("lmd.bench.machine_rates", lambda *args: Rates(1e9, 1e9))
    threads = torch.get_num_threads()
    assert main([*words, "--decoder", "--json", "-"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["decoder"].keys() == {field.name for field in fields(DecoderSpeed)}
    assert report["decoder"]["rtf"] > 0
    assert "decoder alone, float32" in table(report)
    monkeypatch.undo()
    assert main([*words, "--decoder"]) == 2
    assert "Stable Audio's autoencoder" in capsys.readouterr().err
    torch.set_num_threads(threads)


@pytest.mark.parametrize("name", ["tiny", "oobleck"])
def test_the_bench_moves_model_and_codec_to_the_device(name):
    sizes = OobleckConfig(latent_dim=8, channels=8, c_mults=(1, 2), strides=(2, 4))
    chosen = PRESETS["tiny"] if name == "tiny" else replace(PRESETS["tiny"], codec=sizes)
    model, codec = open_parts(chosen, None, None, torch.bfloat16, torch.device("meta"))
    assert {(p.device.type, p.dtype) for p in model.parameters()} == {("meta", torch.bfloat16)}
    assert codec.device.type == "meta"
    assert {tensor.device.type for tensor in codec.state_dict().values()} == {"meta"}


def test_bad_bench_arguments_are_refused(capsys):
    assert main(["bench", "--preset", "huge"]) == 2
    assert "one of tiny, small, paper" in capsys.readouterr().err
    assert main(["bench", "--preset", "tiny", "--blocks", "1"]) == 2
    assert "at least 2 blocks" in capsys.readouterr().err


def test_where_the_figures_go_is_asked_before_they_are_measured(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("lmd.bench.measure", lambda *_: pytest.fail("it was measured"))
    (tmp_path / "file").write_text("mine")
    for place in (tmp_path, tmp_path / "file" / "x.json"):
        assert main(["bench", "--json", str(place)]) == 2
        assert re.search("which is (a|no) folder", capsys.readouterr().err)
    tell({"a": 1}, "a table", str(tmp_path / "new" / "x.json"))
    assert json.loads((tmp_path / "new" / "x.json").read_text()) == {"a": 1}


@pytest.mark.parametrize(
    ("found", "told"),
    [
        ({}, "a processor"),
        ({"avx512_bf16": True}, "a processor with AVX-512 BF16"),
        ({"amx": True, "avx512_bf16": True}, "a processor with AMX"),
        ({"amx": True, "gpu": "a GPU"}, "a processor with AMX and a GPU"),
    ],
)
def test_a_machine_is_named_with_what_multiplies_bfloat16(found, told):
    none = {name: False for name, value in machine_dict().items() if isinstance(value, bool)}
    assert found.keys() <= none.keys() | {"gpu"}
    assert hardware({**none, "cpu": "a processor", "gpu": "", **found}) == told
    before_it_was_asked = {"cpu": "a processor", "amx": False, "gpu": ""}
    assert hardware(before_it_was_asked) == "a processor"
