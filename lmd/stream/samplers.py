"""Rectified flow: the straight path between music and noise, and ways to walk it back.

`t = 0` is clean, `t = 1` is noise, velocity is `noise - clean`. Nothing here knows of a model: a
sampler takes any function that answers (noisy latents, t) with a `Guidance` pair of velocities.

Source: method.md of Live Music Diffusion Models (arXiv 2605.22717), G.2; DPM-Solver++
(arXiv 2211.01095); CFG++ (arXiv 2406.08070). Taught in notebook 02_outpaint.
"""

from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Literal, NamedTuple, get_args

import torch
from torch import Tensor

from lmd.errors import LmdError
from lmd.shapes import Latents, NoiseLevel

SamplerName = Literal["euler", "dpmpp", "pingpong", "pingpong++", "euler++"]
SAMPLERS: tuple[str, ...] = get_args(SamplerName)
LOG_SNR_START, LOG_SNR_END = -6.0, 2.0


class Guidance(NamedTuple):
    """The velocities of one call: with the prompt, and without it (None: guidance is off)."""

    cond: Latents
    uncond: Latents | None = None


Velocities = Callable[[Latents, float], Guidance]
Draw = Callable[[int], Latents]  # step -> fresh noise


def add_noise(clean: Latents, noise: Latents, t: NoiseLevel) -> Latents:
    """The straight path: `(1 - t) clean + t noise`, one t per batch item."""
    t = t.view(-1, 1, 1).to(clean.dtype)
    return (1 - t) * clean + t * noise


def velocity_of(clean: Latents, noise: Latents) -> Latents:
    """What the transformer learns to say anywhere on the path: `noise - clean`."""
    return noise - clean


def predict_clean(noisy: Latents, velocity: Latents, t: float) -> Latents:
    """The clean end of the straight line through `noisy`: `noisy - t velocity`."""
    return noisy - t * velocity


def schedule(n_steps: int) -> tuple[float, ...]:
    """Noise levels from 1 to 0, `n_steps + 1` of them, even in log-SNR between -6 and 2.

    `t = sigmoid(-logsnr)`, both ends forced.

    Raises:
        LmdError: fewer than one step.
    """
    if n_steps < 1:
        raise LmdError(f"{n_steps} steps", "at least 1", "Set n_steps to 1 or more.")
    log_snr = torch.linspace(LOG_SNR_START, LOG_SNR_END, n_steps + 1, dtype=torch.float64)
    times = torch.sigmoid(-log_snr)
    times[0], times[-1] = 1.0, 0.0
    return tuple(times.tolist())


def guided(velocities: Guidance, cfg_scale: float) -> Latents:
    """Classifier-free guidance: `uncond + cfg_scale (cond - uncond)`; 1 is off."""
    if velocities.uncond is None:
        return velocities.cond
    return velocities.uncond + cfg_scale * (velocities.cond - velocities.uncond)


def euler(
    velocities: Velocities, noise: Latents, times: Sequence[float], cfg_scale: float = 1.0
) -> Latents:
    """Follow the velocity in straight pieces: `x += (t' - t) v`. First order."""
    x = noise
    for t, t_next in pairwise(times):
        x = x + (t_next - t) * guided(velocities(x, t), cfg_scale)
    return x


def dpmpp_2m(
    velocities: Velocities, noise: Latents, times: Sequence[float], cfg_scale: float = 1.0
) -> Latents:
    """DPM-Solver++(2M) on the straight path: second order, one call a step.

    With `alpha = 1 - t`, `sigma = t` and `lam = log(alpha / sigma)`, a step is
    `x' = (sigma'/sigma) x + (alpha' - alpha sigma'/sigma) D`, where `D` extrapolates the last two
    predictions of the clean latents. A step that touches t = 1 or t = 0, where `lam` is infinite,
    is of first order.
    """
    x, previous, h_previous = noise, None, 0.0
    for t, t_next in pairwise(times):
        clean = predict_clean(x, guided(velocities(x, t), cfg_scale), t)
        finite = t_next > 0 and t < 1
        h = _log_snr_half(t_next) - _log_snr_half(t) if finite else 0.0
        estimate = clean
        if previous is not None and finite and h_previous > 0:
            estimate = clean + (clean - previous) * (h / (2 * h_previous))
        x = (t_next / t) * x + ((1 - t_next) - (1 - t) * t_next / t) * estimate
        previous, h_previous = clean, h
    return x


def pingpong(
    velocities: Velocities,
    noise: Latents,
    times: Sequence[float],
    draw: Draw,
    cfg_scale: float = 1.0,
) -> Latents:
    """Jump to the clean end, go back to the next level with fresh noise, repeat."""
    x = noise
    for step, (t, t_next) in enumerate(pairwise(times)):
        x = predict_clean(x, guided(velocities(x, t), cfg_scale), t)
        if t_next > 0:
            x = (1 - t_next) * x + t_next * draw(step)
    return x


def pingpong_pp(
    velocities: Velocities, noise: Latents, times: Sequence[float], draw: Draw, cfg_scale: float
) -> Latents:
    """Ping-pong in the CFG++ form: guided clean end, unguided renoising.

    `x' = clean_guided + t' (fresh noise - clean_unguided)` with `cfg_scale` in (0, 1].
    """
    x = noise
    for step, (t, t_next) in enumerate(pairwise(times)):
        pair = velocities(x, t)
        x_clean = predict_clean(x, guided(pair, cfg_scale), t)
        x_free = predict_clean(x, _free(pair), t)
        x = x_clean + t_next * (draw(step) - x_free) if t_next > 0 else x_clean
    return x


def euler_pp(
    velocities: Velocities, noise: Latents, times: Sequence[float], cfg_scale: float
) -> Latents:
    """Euler in the CFG++ form: `x' = clean_guided + t' v_uncond`, `cfg_scale` in (0, 1]."""
    x = noise
    for t, t_next in pairwise(times):
        pair = velocities(x, t)
        x = predict_clean(x, guided(pair, cfg_scale), t) + t_next * _free(pair)
    return x


def sample(
    name: SamplerName,
    velocities: Velocities,
    noise: Latents,
    times: Sequence[float],
    cfg_scale: float,
    draw: Draw,
) -> Latents:
    """Run the sampler of that name from `noise` at `times[0]` to `times[-1]`.

    Args:
        name: one of `SAMPLERS`.
        velocities: (noisy latents, t) -> `Guidance`; called once a step.
        noise: where to start, `[batch, latent, frame]`.
        times: falling noise levels, see `schedule`.
        cfg_scale: guidance; 1 is off. The `++` samplers take (0, 1].
        draw: step -> fresh noise, for the ping-pong samplers.

    Raises:
        LmdError: no such sampler.
    """
    if name == "euler":
        return euler(velocities, noise, times, cfg_scale)
    if name == "dpmpp":
        return dpmpp_2m(velocities, noise, times, cfg_scale)
    if name == "pingpong":
        return pingpong(velocities, noise, times, draw, cfg_scale)
    if name == "pingpong++":
        return pingpong_pp(velocities, noise, times, draw, cfg_scale)
    if name == "euler++":
        return euler_pp(velocities, noise, times, cfg_scale)
    raise LmdError(f"sampler {name!r}", f"one of {', '.join(SAMPLERS)}", "Pick one of these.")


def _free(pair: Guidance) -> Tensor:
    """The velocity without the prompt; the prompted one where guidance is off."""
    return pair.cond if pair.uncond is None else pair.uncond


def _log_snr_half(t: float) -> float:
    """`log(alpha / sigma)` at noise level t, for 0 < t < 1."""
    return float(torch.logit(torch.tensor(1 - t, dtype=torch.float64)))
