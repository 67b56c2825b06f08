"""The losses and draws of stage 1: closed forms, one-by-one agreement, independence of history."""

import ast
import copy
import json
from pathlib import Path

import pytest
import torch
from engine import WINDOW, streamer

from lmd.config import preset
from lmd.errors import LmdError
from lmd.model.live_model import LiveModel
from lmd.model.masks import attention_mask, window_rule
from lmd.stream.block import BlockPlan, LiveDenoiser
from lmd.stream.controls import Controls
from lmd.stream.samplers import add_noise
from lmd.training.draws import (
    BatchIndices,
    StepPlan,
    context_dropout,
    draw_kept,
    draw_levels,
    draw_noise,
    even_quantiles,
    plan_step,
    shift_levels,
    step_noise,
)
from lmd.training.losses import (
    drop_text,
    flow_loss,
    init_context_projection,
    outpaint_loss,
    pack_blocks,
    pack_copies,
    packed_loss,
    packed_velocity,
    stage_loss,
)
from lmd.training.options import FinetuneRun, TrainOptions

S, L, M, B, C = 16, 4, 5, 2, 8  # context, block, targets, batch, channels
LIVE = FinetuneRun()


@pytest.fixture(scope="module")
def model() -> LiveModel:
    """A `tiny` transformer in which every weight matters (fresh ones start with zero outputs)."""
    torch.manual_seed(1)
    model = LiveModel(preset("tiny").dit)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model.eval()


@pytest.fixture(scope="module")
def condition(model):
    with torch.no_grad():
        return model.condition(torch.randn(B, 8, 16), torch.tensor([5.0, 11.0]))


def latents(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(3))


def test_packed_blocks_lose_what_blocks_one_by_one_lose(model, condition):
    """All targets of a window in one pass equal one masked forward per target.

    The first target is compared with the mask of a plain window, later ones with the same window
    rule over everything before them (what a cached stream has seen).
    """
    clean, noise, t = latents(B, C, S + M * L), latents(B, M, C, L), torch.rand(B, M)
    with torch.no_grad():
        packed = packed_loss(model, clean, noise, t, condition, pack_blocks(M, L, S))
        singles = []
        for j in range(M):
            end = S + (j + 1) * L
            window, target = clean[..., :end], clean[..., end - L : end]
            noisy = torch.zeros_like(window)
            noisy[..., -L:] = add_noise(target, noise[:, j], t[:, j])
            keep = torch.ones(B, 1, end)
            keep[..., -L:] = 0
            block = torch.cat([torch.arange(end) // L, torch.tensor([S // L + j])])
            mask = window_rule(block, block, S // L)
            if j == 0:
                assert torch.equal(mask, attention_mask("block-causal", S, L))
            velocity = model(
                noisy,
                t[:, j],
                condition,
                context=window,
                keep_mask=keep,
                attn_mask=mask,
                first_position=1 - j * L,
            )
            wanted = noise[:, j] - target
            singles.append((velocity[..., -L:] - wanted).square().mean((1, 2)))
    error = (packed - torch.stack(singles, 1)).abs().max().item()
    assert error < 1e-5, error  # measured 1e-6 on losses of about 2: float32 rounding


@pytest.mark.parametrize("memory_frames", [S, S // 2, L])
def test_packed_blocks_see_what_a_cached_stream_sees(model, condition, memory_frames):
    """Also after an earlier split: what a stream with so short a memory sees."""
    s = memory_frames
    clean, t = latents(B, C, s + M * L), 0.6
    noisy = latents(B, M, C, L)
    levels = torch.full((B, M), t)
    denoiser, memory = LiveDenoiser(model), None
    with torch.no_grad():
        packed = packed_velocity(model, clean, noisy, levels, condition, pack_blocks(M, L, s))
        for j in range(M):
            context = clean[..., j * L : j * L + s]
            session = denoiser.open_block(context, condition, BlockPlan("block-causal", L), memory)
            streamed = session(noisy[:, j], t)
            memory = session.memory
            error = (packed[:, j] - streamed).abs().max().item()
            assert error < 1e-4, (j, error)  # measured 2e-6: rotation at other positions


def test_packed_copies_lose_what_single_windows_lose(model, condition):
    clean, noise, t = latents(B, C, S + L), latents(B, 3, C, L), torch.rand(B, 3)
    with torch.no_grad():
        packed = packed_loss(model, clean, noise, t, condition, pack_copies(3, L, S))
        for j in range(3):
            whole = torch.cat([torch.zeros(B, C, S), noise[:, j]], dim=-1)
            plan = StepPlan("enc-dec", S + L, L)
            single = outpaint_loss(model, clean, whole, t[:, j], condition, plan)
            assert (packed[:, j] - single).abs().max() < 1e-5  # measured 1e-6


def test_noise_on_the_context_reaches_only_the_naive_baseline(model, condition):
    clean, noise, t = latents(B, C, S + L), latents(B, C, S + L), torch.tensor([0.3, 0.8])
    other = torch.cat([noise[..., :S] + 1, noise[..., S:]], dim=-1)
    with torch.no_grad():
        for regime, same in (("full", False), ("enc-dec", True), ("block-causal", True)):
            plan = StepPlan(regime, S + L, L)
            first = outpaint_loss(model, clean, noise, t, condition, plan)
            second = outpaint_loss(model, clean, other, t, condition, plan)
            assert torch.equal(first, second) == same, regime


def test_a_perfect_velocity_loses_nothing_and_a_silent_model_loses_the_targets_power(condition):
    clean, noise, t = latents(B, C, S), torch.randn(B, C, S), torch.tensor([0.2, 0.9])
    assert flow_loss(lambda *_: noise - clean, clean, noise, t, condition).abs().max() == 0
    silent = flow_loss(lambda x, *_: torch.zeros_like(x), clean, noise, t, condition)
    assert torch.allclose(silent, (noise - clean).square().mean((1, 2)))


@pytest.mark.parametrize("n_frames", [60, 240, 768, 5000])
def test_noise_levels_rise_with_their_quantile_and_stay_inside(n_frames):
    t = shift_levels(torch.linspace(0, 1, 101), n_frames)
    assert t.min() >= 0
    assert t.max() <= 1
    assert (t.diff() > 0).all()


def test_the_shift_is_the_published_one():
    t = shift_levels(torch.tensor([0.25, 0.5]), 240)
    wanted = [1.6487 * u / (1 + 0.6487 * u) for u in (0.25, 0.5)]  # method, t' at 240 frames
    assert t.tolist() == pytest.approx(wanted, abs=1e-4)


def test_levels_cover_the_path_evenly_in_every_step():
    rows = BatchIndices(0, 7, tuple(range(8)), 8)
    u = even_quantiles(rows, 4)
    assert (u.flatten().sort().values.diff() - 1 / 32).abs().max() < 1e-6
    assert torch.equal(draw_levels(rows, 4, 240), shift_levels(u, 240))


def test_draws_depend_on_seed_step_and_row_alone():
    whole = BatchIndices(5, 9, tuple(range(8)), 8)
    halves = [BatchIndices(5, 9, tuple(range(i, i + 4)), 8) for i in (0, 4)]
    clean = latents(8, C, S + L)
    for draw in (
        lambda rows, part: draw_noise(rows, C, 6),
        lambda rows, part: draw_levels(rows, 3, 240),
        lambda rows, part: draw_kept(rows, "text dropout", 0.5),
        lambda rows, part: context_dropout(part, rows, L, S, 0.2, 0.3),
    ):
        together = draw(whole, clean)
        apart = [draw(rows, part) for rows, part in zip(halves, clean.chunk(2), strict=True)]
        assert torch.equal(together, torch.cat(apart))
        assert not torch.equal(together, draw(BatchIndices(6, 9, whole.positions, 8), clean))


def test_context_dropout_zeroes_whole_blocks_from_the_oldest_at_the_stated_rates():
    rows = BatchIndices(0, 0, tuple(range(400)), 400)
    dropped = context_dropout(torch.ones(400, 1, 240), rows, 48, 192, 0.2, 0.3)
    lost = (dropped == 0).sum(-1).flatten()
    assert set(lost.tolist()) == {0, 48, 96, 144, 192}
    assert (dropped.diff(dim=-1) >= 0).all()  # zeros first
    nothing = (lost == 0).float().mean()
    assert nothing == pytest.approx(0.5, abs=0.1)  # 0.2 all + 0.3 part; 4 sigma of 400 draws


def test_what_is_forgotten_is_what_a_young_stream_does_not_have_yet():
    """After two blocks from silence: the context of a row that kept its two newest blocks."""
    stream, o = streamer(), WINDOW.block_frames
    s = WINDOW.context_frames
    controls = Controls("slow piano", n_steps=1, sampler="euler", block_frames=o)
    state = stream.start()
    for _ in range(2):
        _, state = stream.step(state, controls)
    before = latents(1, state.context.shape[1], s - 2 * o)
    window = torch.cat([before, state.context[..., -2 * o :], before[..., :o]], dim=-1)
    rows = BatchIndices(0, 0, tuple(range(20)), 20)
    dropped = context_dropout(window.repeat(20, 1, 1), rows, o, s, 0.0, 1.0)[..., :s]
    young = [bool((row == 0).all(0).sum() == s - 2 * o) for row in dropped]
    assert any(young)
    assert torch.equal(dropped[young.index(True)], state.context[0])


def test_a_shorter_memory_is_another_computation_than_a_forgotten_one(model, condition):
    """A block attends to zeros whose mask is 1, and cannot to frames that are not there."""
    clean, noise, t = latents(B, C, S + L), latents(B, 1, C, L), torch.full((B, 1), 0.5)
    forgotten = clean.clone()
    forgotten[..., : S // 2] = 0
    with torch.no_grad():
        whole = packed_loss(model, forgotten, noise, t, condition, pack_copies(1, L, S))
        short = clean[..., S // 2 :]
        shorter = packed_loss(model, short, noise, t, condition, pack_copies(1, L, S // 2))
    assert (whole - shorter).abs().min() > 1e-3


def test_splits_are_drawn_at_their_share_and_all_shorter_ones_alike():
    plans = [plan_step(LIVE, k) for k in range(3000)]
    shorter = [plan for plan in plans if plan.context_frames < 192]
    assert len(shorter) / len(plans) == pytest.approx(0.25, abs=0.03)  # 4 sigma
    assert all(plan.context_frames % plan.block_frames == 0 for plan in plans)
    for o in (12, 16, 24, 48):
        drawn = [plan.context_frames for plan in shorter if plan.block_frames == o]
        assert set(drawn) == set(range(o, 192, o))
        assert sum(drawn) / len(drawn) == pytest.approx(96, abs=20)  # 4 sigma of the fewest
    for plan in plans:
        behind = 240 if plan.regime == "block-causal" else plan.block_frames
        assert plan.n_frames == plan.context_frames + behind
    always = FinetuneRun(short_context=0.0)
    assert {plan_step(always, k).context_frames for k in range(200)} == {192}


@pytest.mark.parametrize("regime", ["full", "enc-dec", "block-causal"])
def test_a_step_with_a_shorter_memory_looks_at_nothing_older(model, regime):
    """Its loss is finite, and neither window nor dropout reach back before the split."""
    options = FinetuneRun(
        batch=B,
        regimes=((regime, 1.0),),
        block_lengths=((L, 1.0),),
        context_frames=S,
        short_context=1.0,
        target_frames=2 * L,
        enc_dec_frames=2 * L,
        context_dropout_all=1.0,
    )
    rows, plan = BatchIndices(0, 0, (0, 1), B), plan_step(options, 0)
    assert plan.context_frames < S
    clean = latents(B, C, plan.n_frames)
    other = torch.cat(
        [clean[..., : plan.context_frames] + 1, clean[..., plan.context_frames :]], -1
    )
    condition = model.condition(torch.zeros(B, 8, 16), 5.0)
    noise = step_noise(options, rows, C)
    with torch.no_grad():
        losses = [
            stage_loss(model, each, noise, condition, options, rows) for each in (clean, other)
        ]
    assert torch.isfinite(losses[0]).all()
    assert torch.equal(*losses)  # all of the shorter context was dropped, and no frame of a target


def test_plans_follow_their_shares():
    plans = [plan_step(LIVE, k) for k in range(600)]
    share = sum(plan.regime == "block-causal" for plan in plans) / len(plans)
    assert share == pytest.approx(0.6, abs=0.08)  # 4 sigma
    assert {plan.block_frames for plan in plans} == {12, 16, 24, 48}
    assert all(p.n_targets * p.block_frames == 240 for p in plans if p.regime == "block-causal")
    lengths = [plan_step(TrainOptions("base", 1), k).n_frames for k in range(600)]
    assert lengths.count(768) / 600 == pytest.approx(0.1, abs=0.05)


def test_block_lengths_that_do_not_fit_are_refused():
    with pytest.raises(LmdError, match="divides"):
        FinetuneRun(block_lengths=((36, 1.0),)).check()


def test_dropped_text_is_the_null_condition(model, condition):
    dropped = drop_text(condition, torch.tensor([0.0, 1.0]))
    null = model.null_condition(condition)
    assert torch.equal(dropped.tokens[0], null.tokens[0])
    assert torch.equal(dropped.tokens[1], condition.tokens[1])
    assert torch.equal(dropped.global_cond, condition.global_cond)


def test_an_opened_context_door_takes_clean_frames_as_the_base_takes_them(model):
    opened = init_context_projection(copy.deepcopy(model))
    x = latents(B, C, S)
    with torch.no_grad():
        known = opened.dit.embed_context(x, torch.ones(B, 1, S))
        error = (known - model.dit.embed_target(x)).abs().max()
    assert error < 1e-5  # measured 5e-7: two products in another order


def test_notebook_types_out_the_packages_loss(model, condition):
    """The cell tagged `loss` of 02_outpaint defines `training_loss`: equal to the package's."""
    path = Path(__file__).parents[1] / "notebooks/02_outpaint.ipynb"
    cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
    source = next("".join(c["source"]) for c in cells if "loss" in c["metadata"].get("tags", []))
    assert any(isinstance(n, ast.FunctionDef) for n in ast.parse(source).body)
    names: dict = {"torch": torch, "attention_mask": attention_mask}
    exec(source, names)
    clean, noise, t = latents(B, C, S + L), torch.randn(B, C, S + L), torch.tensor([0.3, 0.8])
    with torch.no_grad():
        for regime in ("enc-dec", "block-causal"):
            plan = StepPlan(regime, S + L, L)
            ours = outpaint_loss(model, clean, noise, t, condition, plan).mean()
            typed = names["training_loss"](model, clean, noise, t, condition, regime, L)
            assert torch.equal(typed, ours)
