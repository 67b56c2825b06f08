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
from lmd.training.distill import Trajectory, distill_loss, teacher_trajectory, trajectory_loss
from lmd.training.draws import BatchIndices, DistillOptions, FinetuneOptions, draw_timesteps
from lmd.training.options import TrainOptions, step_noise

CONTEXT, BLOCK, SEED = WINDOW.context_frames, WINDOW.block_frames, 11
OPTIONS = DistillOptions(n_steps=4, cfg_scale=2.5, n_timesteps=3)
REGIMES = ("enc-dec", "block-causal")


def context() -> Tensor:
    return normal((1, 4, CONTEXT), 3, "context")


def condition_of(model) -> Condition:
    stream = streamer(model)
    with torch.no_grad():
        return stream.denoiser.condition(stream.text.encode(["slow piano"]), stream.window_s)


def trajectory_of(regime: str, model=None) -> Trajectory:
    model = model or random_model()
    plan = BlockPlan(regime, BLOCK)
    noise = RolloutPlan(plan, 1, (1,), (SEED,)).noise(4, "noise", 0)
    return teacher_trajectory(model, context(), noise, condition_of(model), plan, OPTIONS)


@pytest.mark.parametrize("regime", REGIMES)
def test_a_trajectory_ends_at_the_block_that_the_streamer_plays(regime):
    stream = streamer()
    controls = Controls(
        "slow piano",
        n_steps=OPTIONS.n_steps,
        sampler="dpmpp",
        cfg_scale=OPTIONS.cfg_scale,
        block_frames=BLOCK,
        regime=regime,
        seed=SEED,
        boundary="fade",
    )
    block, _ = stream.step(replace(stream.start(), context=context()), controls)
    way = trajectory_of(regime)
    assert torch.equal(way.end, block.latents)
    assert way.states.shape == (1, OPTIONS.n_steps, 4, BLOCK)


@pytest.mark.parametrize("loss_on", ["block", "velocity"])
@pytest.mark.parametrize("regime", REGIMES)
def test_the_student_is_measured_as_it_plays(regime, loss_on):
    """All timesteps in one pass equal a call of the cached session at each, without guidance."""
    student, way, timesteps = random_model(seed=4), trajectory_of(regime), [0, 1, 3]
    condition, plan = condition_of(student), BlockPlan(regime, BLOCK)
    with torch.no_grad():
        loss = trajectory_loss(student, context(), way, timesteps, condition, plan, loss_on)
        times, errors = schedule(OPTIONS.n_steps), []
        for step in timesteps:
            session = LiveDenoiser(student).open_block(context(), condition, plan)
            state = way.states[:, step]
            named = predict_clean(state, session(state, times[step]), times[step])
            scale = 1 if loss_on == "block" else times[step]
            errors.append(((named - way.end) / scale).square().mean())
    assert loss.item() == pytest.approx(torch.stack(errors).mean().item(), rel=1e-5)


def test_who_names_the_end_loses_nothing():
    """A student without weights says velocity 0: its clean block is the state itself."""
    student, way = random_model(), trajectory_of("enc-dec")
    with torch.no_grad():
        for parameter in student.parameters():
            parameter.zero_()
        condition, plan = condition_of(student), BlockPlan("enc-dec", BLOCK)
        stays = Trajectory(way.end[:, None].expand(-1, OPTIONS.n_steps, -1, -1), way.end)
        given = (context(), stays, [1, 2], condition, plan, "velocity")
        assert trajectory_loss(student, *given).item() == 0
        away = Trajectory(stays.states + 0.5, way.end)
        loss = trajectory_loss(student, context(), away, [1, 2], condition, plan, "block")
    assert loss.item() == pytest.approx(0.25, rel=1e-5)


def test_a_straight_path_lies_between_the_ends_of_a_curved_trajectory():
    """Rectified flow's own velocity, noise minus end, names the end from every point of it."""
    way = trajectory_of("enc-dec")
    path, noise = way.straight(), way.states[:, 0]
    assert torch.equal(path.end, way.end)
    assert torch.allclose(path.states[:, 0], noise, atol=1e-6)
    for state, t in zip(path.states.unbind(1), schedule(OPTIONS.n_steps)[:-1], strict=True):
        assert torch.allclose(predict_clean(state, noise - way.end, t), way.end, atol=1e-5)
    assert (path.states[:, 1:] - way.states[:, 1:]).abs().max() > 0.01


@pytest.mark.parametrize("loss_on", ["block", "velocity"])
@pytest.mark.parametrize("states", ["trajectory", "straight"])
def test_a_step_looks_at_the_line_and_compares_what_was_asked_for(states, loss_on, monkeypatch):
    ways, compared = [], []

    def looked(student, context, way, *others):
        ways.append(way)
        compared.append(others[-1])
        return trajectory_loss(student, context, way, *others)

    monkeypatch.setattr(distill, "trajectory_loss", looked)
    model, rows = random_model(), BatchIndices(0, 0, (0,), 1)
    short = FinetuneOptions(context_frames=CONTEXT, block_lengths=((BLOCK, 1.0),))
    drawn = replace(OPTIONS, states=states, loss_on=loss_on)
    options = TrainOptions("distill", n_steps=1, finetune=short, distill=drawn)
    tokens = HashTextEncoder(6, 8).encode(["slow piano"])
    clean = normal((1, 4, options.plan(0).n_frames), 3, "clean")
    noise = step_noise(options, rows, 4)
    distill_loss(model, model, clean, noise, tokens, 1.0, options, rows)
    (way,) = ways
    assert compared == [loss_on]
    is_straight = torch.allclose(way.states, way.straight().states, atol=1e-5)
    assert is_straight == (states == "straight")


def test_no_gradient_reaches_the_teacher():
    teacher, student = random_model(), random_model(seed=4)
    way, condition = trajectory_of("block-causal", teacher), condition_of(student)
    plan = BlockPlan("block-causal", BLOCK)
    loss = trajectory_loss(student, context(), way, [0, 2], condition, plan, "velocity")
    loss.sum().backward()
    assert student.dit.project_in.weight.grad.abs().max() > 0
    assert all(parameter.grad is None for parameter in teacher.parameters())


def test_timesteps_are_a_function_of_seed_and_step_and_all_are_drawn_alike():
    drawn = [draw_timesteps(OPTIONS, 0, step) for step in range(2000)]
    assert drawn == [draw_timesteps(OPTIONS, 0, step) for step in range(2000)]
    assert drawn != [draw_timesteps(OPTIONS, 1, step) for step in range(2000)]
    counts = torch.bincount(torch.tensor(drawn).flatten(), minlength=OPTIONS.n_steps)
    assert all(len(set(timesteps)) == OPTIONS.n_timesteps for timesteps in drawn)
    share = OPTIONS.n_timesteps / OPTIONS.n_steps
    assert (counts / 2000 - share).abs().max() < 0.05  # five standard deviations


@pytest.mark.parametrize("n_timesteps", [0, 9])
def test_timesteps_that_a_trajectory_does_not_have_are_refused(n_timesteps):
    with pytest.raises(LmdError, match="timesteps of a trajectory of 8 steps"):
        DistillOptions(n_steps=8, n_timesteps=n_timesteps)
