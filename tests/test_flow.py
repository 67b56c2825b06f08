"""The straight path and the samplers, against closed forms for Gaussian data."""

import math
from itertools import pairwise

import pytest
import torch

from lmd.errors import LmdError
from lmd.stream.samplers import (
    Guidance,
    add_noise,
    dpmpp_2m,
    euler,
    euler_pp,
    guided,
    pingpong,
    pingpong_pp,
    predict_clean,
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
    assert torch.equal(add_noise(clean, noise, torch.zeros(2)), clean)
    assert torch.equal(add_noise(clean, noise, torch.ones(2)), noise)
    t = torch.tensor([0.25, 0.75])
    slope = (add_noise(clean, noise, t + 0.01) - add_noise(clean, noise, t)) / 0.01
    torch.testing.assert_close(slope, velocity_of(clean, noise), atol=1e-4, rtol=1e-3)
    x = add_noise(clean, noise, torch.full((2,), 0.6))
    torch.testing.assert_close(predict_clean(x, noise - clean, 0.6), clean, atol=1e-6, rtol=1e-5)


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


# --- three correlated channels ----------------------------------------------------------------

MEANS = torch.tensor([0.7, -0.4, 0.1], dtype=torch.float64)
COVARIANCE = torch.tensor(
    [[0.25, 0.12, -0.05], [0.12, 0.16, 0.04], [-0.05, 0.04, 0.36]], dtype=torch.float64
)
UNIT = torch.eye(3, dtype=torch.float64)


def correlated_velocity(x, t):
    """E[noise - clean | x] by the rule for Gaussians, x of `[batch, channel, frame]`."""
    covariance = (1 - t) ** 2 * COVARIANCE + t**2 * UNIT
    scores = torch.linalg.solve(covariance, x.double() - (1 - t) * MEANS[:, None])
    clean = MEANS[:, None] + (1 - t) * COVARIANCE @ scores
    return (t * scores - clean).to(x)


def correlated_flow(t, t_next):
    """The flow between two levels as an affine map: scores along COVARIANCE's axes are kept."""
    variances, axes = torch.linalg.eigh(COVARIANCE)
    now, then = (((1 - u) ** 2 * variances + u**2).sqrt() for u in (t, t_next))
    matrix = axes @ torch.diag(then / now) @ axes.T
    return matrix, (1 - t_next) * MEANS - matrix @ MEANS * (1 - t)


def sampled_flow(sampler, times):
    """The same of a sampler: the velocity is affine in x, so four points tell its map."""
    corners = torch.cat([torch.zeros(3, 1, dtype=torch.float64), UNIT], dim=1)[None]
    reached = sampler(lambda x, t: Guidance(correlated_velocity(x, t)), corners, times)[0]
    return reached[:, 1:] - reached[:, :1], reached[:, 0]


@pytest.mark.parametrize(("sampler", "order"), [(euler, 1), (dpmpp_2m, 2)])
def test_mean_and_covariance_converge_at_the_known_order(sampler, order):
    """Of standard normal noise, carried along; no draws, so nothing but the order is seen."""
    errors = {"mean": [], "covariance": []}
    for n in (32, 64, 128, 256):
        times = grid(n)
        matrix, shift = sampled_flow(sampler, times)
        right, right_shift = correlated_flow(times[0], times[-1])
        errors["mean"].append((shift - right_shift).norm().item())
        errors["covariance"].append((matrix @ matrix.T - right @ right.T).norm().item())
    for name, values in errors.items():
        rates = [math.log2(a / b) for a, b in pairwise(values)]
        # Measured at the last doubling: euler 1.00 and 0.99, dpmpp 1.99 and 2.00.
        assert rates[-1] == pytest.approx(order, abs=0.1), (name, rates)


@pytest.mark.parametrize("sampler", [euler, dpmpp_2m])
def test_deterministic_samplers_turn_noise_into_mean_and_covariance_of_the_data(sampler):
    matrix, shift = sampled_flow(sampler, grid(600, 0.9999, 0.0001))
    # Measured: 6e-3 (euler) and 1e-4.
    torch.testing.assert_close(shift, MEANS, atol=0.01, rtol=0)
    torch.testing.assert_close(matrix @ matrix.T, COVARIANCE, atol=0.01, rtol=0)


@pytest.mark.parametrize("n_steps", [1, 2, 8])
def test_pingpong_with_a_perfect_model_leaves_mean_and_covariance(n_steps):
    def noise(step):
        return torch.randn(1, 3, 40_000, generator=torch.Generator().manual_seed(step + 1))

    def perfect(x, t):
        matrix, shift = correlated_flow(t, 0.0)
        return Guidance((x - (matrix @ x.double() + shift[:, None]).to(x)) / t)

    x = pingpong(perfect, noise(-1), schedule(n_steps), noise)[0].double()
    # 40,000 draws: standard errors of at most 0.003 of a mean, 0.0026 of a covariance.
    torch.testing.assert_close(x.mean(dim=1), MEANS, atol=0.013, rtol=0)
    torch.testing.assert_close(torch.cov(x), COVARIANCE, atol=0.011, rtol=0)


def test_guidance_of_one_samples_as_the_prompt_alone():
    """Whatever the branch without it says; in the `++` forms that branch also renoises."""
    x, times = start(50).double(), schedule(6)

    def few(step):
        return draw(step)[..., :50].double()

    def both(x, t):
        return Guidance(exact_velocity(x, t), torch.full_like(x, 5.0))

    for name in ("euler", "dpmpp", "pingpong"):
        alone = sample(name, velocities, x, times, 1.0, few)
        torch.testing.assert_close(sample(name, both, x, times, 1.0, few), alone)
        assert not torch.allclose(sample(name, both, x, times, 1.1, few), alone)


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
