"""The warm-up on trajectories: the teacher plays as the streamer does, the student as it plays."""

from dataclasses import replace

import pytest
import torch
from engine import WINDOW, random_model, streamer
from torch import Tensor

from lmd.arc.losses import RolloutPlan
from lmd.errors import LmdError
from lmd.model.dit import Condition
from lmd.model.text import HashTextEncoder
from lmd.rng import normal
from lmd.stream.block import BlockPlan, LiveDenoiser
from lmd.stream.controls import Controls
from lmd.stream.samplers import predict_clean, schedule
from lmd.training import distill
from lmd.training.distill import distill_loss, teacher_block, trajectory_loss
from lmd.training.draws import BatchIndices, draw_timesteps, plan_step, step_noise
from lmd.training.options import DistillRun

CONTEXT, BLOCK, SEED = WINDOW.context_frames, WINDOW.block_frames, 11
OPTIONS = DistillRun(teacher_steps=4, cfg_scale=2.5, n_timesteps=3)
LEVELS = schedule(OPTIONS.teacher_steps)
REGIMES = ("enc-dec", "block-causal")


def context() -> Tensor:
    return normal((1, 4, CONTEXT), 3, "context")


def condition_of(model) -> Condition:
    stream = streamer(model)
    with torch.no_grad():
        return stream.denoiser.condition(stream.text.encode(["slow piano"]), stream.window_s)


def noise_of(regime: str) -> Tensor:
    return RolloutPlan(BlockPlan(regime, BLOCK), 1, (1,), (SEED,)).noise(4, "noise", 0)


def taught(regime: str, model=None) -> Tensor:
    """The block that a teacher makes of that noise."""
    model, plan = model or random_model(), BlockPlan(regime, BLOCK)
    given = (context(), noise_of(regime), condition_of(model), plan, LEVELS, OPTIONS.cfg_scale)
    return teacher_block(model, *given)


@pytest.mark.parametrize("regime", REGIMES)
def test_a_trajectory_ends_at_the_block_that_the_streamer_plays(regime):
    stream = streamer()
    controls = Controls(
        "slow piano",
        n_steps=OPTIONS.teacher_steps,
        sampler="dpmpp",
        cfg_scale=OPTIONS.cfg_scale,
        block_frames=BLOCK,
        regime=regime,
        seed=SEED,
        boundary="fade",
    )
    block, _ = stream.step(replace(stream.start(), context=context()), controls)
    assert torch.equal(taught(regime), block.latents)


@pytest.mark.parametrize("regime", REGIMES)
def test_the_student_is_measured_as_it_plays(regime):
    """All timesteps in one pass equal a call of the cached session at each, without guidance.

    Rectified flow's own velocity, noise minus end, names the end from every one of these states.
    """
    student, levels = random_model(seed=4), [LEVELS[k] for k in (0, 1, 3)]
    noise, end = noise_of(regime), taught(regime)
    condition, plan = condition_of(student), BlockPlan(regime, BLOCK)
    with torch.no_grad():
        loss = trajectory_loss(student, context(), noise, end, levels, condition, plan)
        errors = []
        for t in levels:
            session = LiveDenoiser(student).open_block(context(), condition, plan)
            state = (1 - t) * end + t * noise
            assert torch.allclose(predict_clean(state, noise - end, t), end, atol=1e-5)
            errors.append((predict_clean(state, session(state, t), t) - end).square().mean())
    assert loss.item() == pytest.approx(torch.stack(errors).mean().item(), rel=1e-5)


def test_who_names_the_end_loses_nothing():
    """A student without weights says velocity 0: its clean block is the state itself."""
    student, end = random_model(), taught("enc-dec")
    with torch.no_grad():
        for parameter in student.parameters():
            parameter.zero_()
        condition, plan = condition_of(student), BlockPlan("enc-dec", BLOCK)
        given = ([0.25, 0.75], condition, plan)
        assert trajectory_loss(student, context(), end, end, *given).item() == 0
        loss = trajectory_loss(student, context(), end + 1, end, *given)
    assert loss.item() == pytest.approx((0.25**2 + 0.75**2) / 2, rel=1e-5)


def test_a_step_compares_at_the_drawn_levels_with_the_teachers_block(monkeypatch):
    seen = []

    def looked(student, *given):
        seen.append(given)
        return trajectory_loss(student, *given)

    monkeypatch.setattr(distill, "trajectory_loss", looked)
    model, rows = random_model(), BatchIndices(0, 0, (0,), 1)
    options = replace(OPTIONS, context_frames=CONTEXT, block_lengths=((BLOCK, 1.0),))
    tokens = HashTextEncoder(6, 8).encode(["slow piano"])
    clean = normal((1, 4, plan_step(options, 0).n_frames), 3, "clean")
    noise = step_noise(options, rows, 4)
    distill_loss(model, model, clean, noise, tokens, 1.0, options, rows)
    ((before, start, end, levels, condition, plan),) = seen
    assert torch.equal(start, noise)
    assert levels == [LEVELS[k] for k in draw_timesteps(options, 0)]
    how = (before, noise, condition, plan, LEVELS, options.cfg_scale)
    assert torch.equal(end, teacher_block(model, *how))


def test_no_gradient_reaches_the_teacher():
    teacher, student = random_model(), random_model(seed=4)
    noise, end = noise_of("block-causal"), taught("block-causal", teacher)
    plan = BlockPlan("block-causal", BLOCK)
    condition, levels = condition_of(student), [LEVELS[0], LEVELS[2]]
    trajectory_loss(student, context(), noise, end, levels, condition, plan).sum().backward()
    assert student.dit.project_in.weight.grad.abs().max() > 0
    assert all(parameter.grad is None for parameter in teacher.parameters())


def test_timesteps_are_a_function_of_seed_and_step_and_all_are_drawn_alike():
    drawn = [draw_timesteps(OPTIONS, step) for step in range(2000)]
    assert drawn == [draw_timesteps(OPTIONS, step) for step in range(2000)]
    assert drawn != [draw_timesteps(replace(OPTIONS, seed=1), step) for step in range(2000)]
    counts = torch.bincount(torch.tensor(drawn).flatten(), minlength=OPTIONS.teacher_steps)
    assert all(len(set(timesteps)) == OPTIONS.n_timesteps for timesteps in drawn)
    share = OPTIONS.n_timesteps / OPTIONS.teacher_steps
    assert (counts / 2000 - share).abs().max() < 0.05  # five standard deviations


@pytest.mark.parametrize("n_timesteps", [0, 9])
def test_timesteps_that_a_trajectory_does_not_have_are_refused(n_timesteps):
    with pytest.raises(LmdError, match="timesteps of a trajectory of 8 steps"):
        DistillRun(teacher_steps=8, n_timesteps=n_timesteps).check()
