"""The straight path and the samplers, against closed forms for Gaussian data."""

import math
from itertools import pairwise

import pytest
import torch

from lmd.errors import LmdError
from lmd.flow import (
    Guidance,
    clean_of,
    dpmpp_2m,
    euler,
    euler_pp,
    guided,
    noised,
    pingpong,
    pingpong_pp,
    sample,
    schedule,
    velocity_of,
)

MEAN, STD = 0.7, 0.3


def exact_velocity(x, t):
    """E[noise - clean | x] for clean ~ N(MEAN, STD²): the field of the probability flow."""
    variance = (1 - t) ** 2 * STD**2 + t**2
    return (t - (1 - t) * STD**2) / variance * (x - (1 - t) * MEAN) - MEAN


def exact_flow(x, t, t_next):
    """Where the probability flow carries x from t to t_next: standard scores are kept."""

    def moments(level):
        return (1 - level) * MEAN, math.hypot((1 - level) * STD, level)

    (mean, std), (mean_next, std_next) = moments(t), moments(t_next)
    return mean_next + std_next * (x - mean) / std


def velocities(x, t):
    return Guidance(exact_velocity(x, t))


def flow_map(x, t):
    """The velocity of a perfect few-step model: its clean end is where the flow ends."""
    return Guidance((x - exact_flow(x, t, 0.0)) / t)


def grid(n, start=0.95, end=0.05):
    """Levels even in log-SNR, away from the ends where it is infinite."""
    lo, hi = math.log((1 - start) / start), math.log((1 - end) / end)
    return [1 / (1 + math.exp(lo + (hi - lo) * i / n)) for i in range(n + 1)]


def draw(step):
    return torch.randn(1, 1, 20_000, generator=torch.Generator().manual_seed(100 + step))


def start(n=20_000):
    return torch.randn(1, 1, n, generator=torch.Generator().manual_seed(1))


def test_path_runs_from_clean_to_noise_and_velocity_is_its_slope():
    clean, noise = torch.randn(2, 3, 5), torch.randn(2, 3, 5)
    assert torch.equal(noised(clean, noise, torch.zeros(2)), clean)
    assert torch.equal(noised(clean, noise, torch.ones(2)), noise)
    t = torch.tensor([0.25, 0.75])
    slope = (noised(clean, noise, t + 0.01) - noised(clean, noise, t)) / 0.01
    torch.testing.assert_close(slope, velocity_of(clean, noise), atol=1e-4, rtol=1e-3)
    x = noised(clean, noise, torch.full((2,), 0.6))
    torch.testing.assert_close(clean_of(x, noise - clean, 0.6), clean, atol=1e-6, rtol=1e-5)


def test_schedule_has_the_published_values():
    expected = (1, 0.9933, 0.982, 0.9526, 0.8808, 0.7311, 0.5, 0.2689, 0)
    assert schedule(8) == pytest.approx(expected, abs=5e-5)
    assert schedule(2) == pytest.approx((1, 0.8808, 0), abs=5e-5)
    assert schedule(1) == (1, 0)
    with pytest.raises(LmdError, match="at least 1"):
        schedule(0)


@pytest.mark.parametrize(("sampler", "order"), [(euler, 1), (dpmpp_2m, 2)])
def test_deterministic_samplers_converge_to_the_exact_flow_at_their_order(sampler, order):
    x = start(100).double()
    errors = []
    for n in (16, 32, 64, 128):
        times = grid(n)
        reached = sampler(velocities, x, times)
        errors.append((reached - exact_flow(x, times[0], times[-1])).abs().max().item())
    rates = [math.log2(a / b) for a, b in pairwise(errors)]
    # Measured: euler 0.97, 0.98, 0.99; dpmpp 1.72, 1.93, 1.97. The last doubling counts.
    assert rates[-1] == pytest.approx(order, abs=0.15)


@pytest.mark.parametrize("sampler", [euler, dpmpp_2m])
def test_deterministic_samplers_reach_mean_and_spread_of_the_data(sampler):
    x = sampler(velocities, start(), grid(200, 0.999, 0.001))
    # 20,000 draws: standard error 0.002 of the mean, 0.0015 of the spread.
    assert x.mean().item() == pytest.approx(MEAN, abs=0.01)
    assert x.std().item() == pytest.approx(STD, abs=0.01)


@pytest.mark.parametrize("n_steps", [1, 2, 8])
def test_pingpong_with_a_perfect_model_leaves_the_data_distribution(n_steps):
    x = pingpong(flow_map, start(), schedule(n_steps), draw)
    assert x.mean().item() == pytest.approx(MEAN, abs=0.01)
    assert x.std().item() == pytest.approx(STD, abs=0.01)


def test_guidance_of_one_is_the_conditional_velocity():
    cond, uncond = torch.randn(1, 2, 3), torch.randn(1, 2, 3)
    torch.testing.assert_close(guided(Guidance(cond, uncond), 1.0), cond)
    assert torch.equal(guided(Guidance(cond, uncond), 0.0), uncond)
    assert torch.equal(guided(Guidance(cond), 5.0), cond)


def test_plus_plus_forms_with_scale_one_are_the_plain_samplers():
    times, x = schedule(6), start(50)
    close = {"atol": 1e-5, "rtol": 1e-5}
    torch.testing.assert_close(
        euler_pp(velocities, x, times, 1.0), euler(velocities, x, times), **close
    )

    def few(step):
        return draw(step)[..., :50]

    torch.testing.assert_close(
        pingpong_pp(velocities, x, times, few, 1.0), pingpong(velocities, x, times, few), **close
    )


def test_plus_plus_step_uses_guided_clean_and_unguided_noise():
    x, t, t_next, scale = torch.tensor([[[2.0]]]), 0.8, 0.5, 0.6
    pair = Guidance(torch.tensor([[[1.0]]]), torch.tensor([[[0.5]]]))
    guided_clean, free_clean = 2.0 - 0.8 * (0.5 + 0.6 * 0.5), 2.0 - 0.8 * 0.5
    got = pingpong_pp(lambda x, t: pair, x, (t, t_next), lambda i: torch.ones(1, 1, 1), scale)
    assert got.item() == pytest.approx(guided_clean + t_next * (1.0 - free_clean), abs=1e-6)
    got = euler_pp(lambda x, t: pair, x, (t, t_next), scale)
    assert got.item() == pytest.approx(guided_clean + t_next * 0.5, abs=1e-6)


def test_every_name_runs_its_sampler_and_others_are_refused():
    x, times = start(50), schedule(4)

    def few(step):
        return draw(step)[..., :50]

    for name, expected in {
        "euler": euler(velocities, x, times),
        "dpmpp": dpmpp_2m(velocities, x, times),
        "pingpong": pingpong(velocities, x, times, few),
        "pingpong++": pingpong_pp(velocities, x, times, few, 0.5),
        "euler++": euler_pp(velocities, x, times, 0.5),
    }.items():
        assert torch.equal(sample(name, velocities, x, times, 0.5, few), expected), name
    with pytest.raises(LmdError, match="heun"):
        sample("heun", velocities, x, times, 1.0, few)
