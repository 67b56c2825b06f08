"""The bench: its rows, its token counts, flat cost."""

import json
import re
from dataclasses import replace

import pytest
import torch
from engine import HoldCodec, random_model, streamer

from lmd.__main__ import main
from lmd.bench import COMPILE_TOLERANCE, compile_blocks, rebuilds, tokens_of
from lmd.config import REGIMES, DiTConfig, WindowConfig
from lmd.machine import hardware, machine_dict
from lmd.model.dit import DiT
from lmd.stream.controls import Controls
from lmd.stream.streamer import Streamer

KEYS = {
    "engine", "dtype", "regime", "n_steps", "tokens_per_block", "dit_ms_p50", "dit_ms_p95",
    "decode_ms_p50", "ttff_ms", "rtf", "cache_mb", "speedup_vs_full", "rebuild_ms_p50",
    "rebuild_ms",
}  # fmt: skip

CAUSES = {"prompt", "block_frames", "regime", "drop_context_frames"}


def test_bench_writes_a_row_per_regime_and_step_count(tmp_path, capsys, monkeypatch):
    path = tmp_path / "bench.json"
    words = ["bench", "--preset", "tiny", "--steps", "2", "3", "--blocks", "2", "--threads", "1"]
    threads = torch.get_num_threads()
    assert main([*words, "--json", str(path)]) == 0
    monkeypatch.setattr("lmd.bench.measure", lambda _: json.loads(path.read_text()))
    assert main([*words, "--json", "-"]) == 0
    torch.set_num_threads(threads)
    printed = capsys.readouterr().out
    for report in (
        json.loads(path.read_text()),
        json.loads(printed[printed.rindex('{\n  "preset"') :]),
    ):
        assert {"preset", "threads", "device", "machine", "peak_mb", "rows"} <= report.keys()
        assert [(row["regime"], row["n_steps"]) for row in report["rows"]] == [
            (regime, n) for n in (2, 3) for regime in ("full", "enc-dec", "block-causal")
        ]
        for row in report["rows"]:
            assert row.keys() >= KEYS
            assert row["dit_ms_p95"] >= row["dit_ms_p50"] > 0
            assert row["rtf"] > 0
            assert row["rebuild_ms"].keys() == CAUSES
            assert min(row["rebuild_ms"].values()) > 0
        assert [row["tokens_per_block"] for row in report["rows"][:3]] == [482, 291, 146]
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
        seen.append(x.shape[1])
        return trunk(self, x, *args, **kwargs)

    monkeypatch.setattr(type(model.dit), "trunk", counting)
    stream = streamer(model)
    for regime in ("full", "enc-dec", "block-causal"):
        controls = Controls(prompt="a", regime=regime, n_steps=3, block_frames=6)
        state = stream.step(stream.start(), controls)[1]
        seen.clear()
        stream.step(state, controls)
        assert sum(seen) == tokens_of(regime, 24, 6, 3), regime


def test_engines_and_precisions_are_compared_in_one_run(capsys):
    words = ["bench", "--preset", "tiny", "--steps", "1", "--blocks", "2", "--threads", "1"]
    threads = torch.get_num_threads()
    assert (
        main([*words, "--engine", "torch", "graph", "--dtype", "float32", "int8", "--json", "-"])
        == 0
    )
    torch.set_num_threads(threads)
    rows = json.loads(capsys.readouterr().out)["rows"]
    found = [(row["engine"], row["dtype"]) for row in rows[::3]]
    assert found == [("torch", "float32"), ("graph", "float32"), ("graph", "int8")]


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
        made = report["compiled"]["float32"]
        assert made["tolerance"] == COMPILE_TOLERANCE[torch.float32]
        assert made["seconds"] > 0
        return status, made["max_difference"]

    monkeypatch.setattr("lmd.bench.check_compiler", lambda: None)
    threads = torch.get_num_threads()
    assert scaled(1.0) == (0, 0.0)
    status, difference = scaled(1 + 2**-22)
    assert status == 0
    assert 0 < difference <= COMPILE_TOLERANCE[torch.float32]
    status, difference = scaled(1.01)
    assert status == 1
    assert difference > COMPILE_TOLERANCE[torch.float32]
    torch.set_num_threads(threads)


def test_bad_bench_arguments_are_refused(capsys):
    assert main(["bench", "--preset", "huge"]) == 2
    assert "one of tiny, small, paper" in capsys.readouterr().err
    assert main(["bench", "--preset", "tiny", "--blocks", "1"]) == 2
    assert "at least 2 blocks" in capsys.readouterr().err
    assert main(["bench", "--preset", "tiny", "--engine", "steam"]) == 2
    assert "engines torch, graph" in capsys.readouterr().err


def test_where_the_figures_go_is_asked_before_they_are_measured(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("lmd.bench.measure", lambda *_: pytest.fail("it was measured"))
    (tmp_path / "file").write_text("mine")
    (tmp_path / "song.json").write_text('{"caption": "an air"}')
    for place in (tmp_path, tmp_path / "file" / "x.json"):
        assert main(["bench", "--json", str(place)]) == 2
        assert re.search("which is no (file|folder)", capsys.readouterr().err)
    for name in ("file", "song.json"):
        assert main(["bench", "--json", str(tmp_path / name)]) == 2
        assert "holds something else" in capsys.readouterr().err
    monkeypatch.setattr("lmd.bench.measure", lambda *_: {"a": 1})
    monkeypatch.setattr("lmd.bench.table", lambda *_: "a table")
    assert main(["bench", "--json", str(tmp_path / "new" / "x.json")]) == 0
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
