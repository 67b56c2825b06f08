"""Phase from local advances: how a decoder that is not given the phase makes one.

A magnitude spectrogram of a held tone does not change from frame to frame, but its phase turns, by
an angle that follows from the tone's frequency. So a decoder predicts not angles but *advances*:
from a frame to the next and from a bin to the next, each a complex number whose angle is the
advance and whose modulus (0 ... 1) says how sure it is. The phase is then integrated over frames.

Phases are those of a transform whose time zero is the middle of the window, and advances in time
are relative to the centre of the bin, so a tone in the middle of a bin has both advances 1.

Source: the phase-gradient family of Průša and Søndergaard (2016), with learned gradients.
"""

import math

import numpy as np
import torch
from jaxtyping import Complex, Float, Int
from torch import Tensor

Spectrum = Complex[Tensor, "batch bin step"]
Magnitude = Float[Tensor, "batch bin step"]
N_SWEEPS = 1  # how often evidence passes to the two neighbours; more changes nothing measured
NO_EVIDENCE = np.complex64(1e-15)  # where nothing is known the phase is 0


def bin_turn(n_bins: int, n_fft: int, hop: int) -> Complex[Tensor, " bin"]:
    """How far the centre of every bin turns in one hop, as unit complex numbers."""
    angle = 2 * math.pi * torch.arange(n_bins, dtype=torch.float64) * hop / n_fft
    return torch.polar(torch.ones_like(angle), angle).to(torch.complex64)


def advances(spectrum: Spectrum, n_fft: int, hop: int) -> tuple[Spectrum, Spectrum]:
    """The unit advances of a spectrum: in time (first step 0) and to the next bin (last bin 0)."""
    unit = spectrum / spectrum.abs().clamp_min(1e-12)
    turn = bin_turn(spectrum.shape[1], n_fft, hop)[:, None].to(spectrum.device)
    in_time, in_frequency = torch.zeros_like(unit), torch.zeros_like(unit)
    in_time[..., 1:] = unit[..., 1:] * unit[..., :-1].conj() * turn.conj()
    in_frequency[:, :-1] = unit[:, 1:] * unit[:, :-1].conj()
    return in_time, in_frequency


def restarts(onset: Float[Tensor, "batch step"], horizon: int) -> Int[Tensor, "batch step"]:
    """For every step, the step where its phase was started: the strongest onset in the horizon.

    A phase that is integrated for ever depends on all the past, and a stream could never equal one
    whole decode. So every step counts from the step of the highest `onset` among itself and the
    `horizon` steps before it (the latest of equals): a restart hides behind an attack.
    """
    padded = torch.nn.functional.pad(onset, (horizon, 0), value=-math.inf)
    windows = padded.unfold(-1, horizon + 1, 1).flip(-1)  # [batch, step, age], age 0 first
    steps = torch.arange(onset.shape[-1], device=onset.device)
    return steps - windows.argmax(-1)


def integrate(
    magnitude: Magnitude,
    in_time: Spectrum,
    in_frequency: Spectrum,
    start: Int[Tensor, "batch step"],
    hop_turn: Complex[Tensor, " bin"],
    n_past: int = 0,
    last: Complex[Tensor, "batch bin 1"] | None = None,
) -> Complex[Tensor, "batch bin new_step"]:
    """Phases that follow the advances, as unit complex numbers.

    A step turns the phases of the step before; then, in `N_SWEEPS` sweeps, loud and sure bins lead
    their neighbours. A step without a past sums the advances to the next bin up from bin 0. NumPy
    on the CPU, because the recursion is many small operations.

    Args:
        magnitude: linear.
        in_time: advance from the step before, relative to the bin's centre.
        in_frequency: advance to the next bin.
        start: for every step the step its phase counts from (`restarts`).
        hop_turn: `bin_turn` of the transform.
        n_past: so many steps at the beginning have their phases already.
        last: the spectrum of the last of these.

    Returns:
        The phases of all other steps.
    """
    runs = _runs(start.cpu().numpy(), n_past)
    lowest = int(runs[:, 1].min())  # nothing before it is looked at
    magnitude, in_time, in_frequency = (t[..., lowest:] for t in (magnitude, in_time, in_frequency))
    runs[:, 1:3] -= lowest
    turned = in_time * hop_turn[None, :, None]
    up = in_frequency[:, :-1] * magnitude[:, :-1]
    down = in_frequency[:, :-1].conj() * magnitude[:, 1:]
    rows, steps = torch.from_numpy(runs[:, :2]).to(in_frequency.device).unbind(1)
    angle = torch.angle(in_frequency[rows, :-1, steps]).cumsum(1)
    begun = torch.polar(torch.ones_like(angle), angle)
    begun = torch.cat([torch.ones_like(begun[:, :1]), begun], dim=1).detach().cpu().numpy()
    last = turned[..., :0] if last is None else last
    # steps first, so that one step of one row is contiguous
    arrays = [
        t.detach().resolve_conj().cpu().transpose(1, 2).contiguous().numpy()
        for t in (turned, magnitude, up, down, last)
    ]
    made = _integrate_runs(begun, *arrays, runs, n_past - lowest)
    return torch.from_numpy(made).to(magnitude.device).transpose(1, 2)


def _runs(start: np.ndarray, n_past: int) -> np.ndarray:
    """Runs of steps that count from the same step, longest way first.

    A run that goes on from the last step of the past begins right behind it.

    Args:
        start: `[row, step]`, as `restarts` gives it.
        n_past: steps at the beginning that have their phases.

    Returns:
        Rows (row, where it begins, first step, length counted from the beginning, 1 if it goes on).
    """
    runs = []
    for row, starts in enumerate(start):
        firsts = n_past + np.flatnonzero(np.diff(starts[n_past:], prepend=-1))
        ends = np.append(firsts[1:], len(starts))
        begins, goes_on = starts[firsts], np.zeros_like(firsts)
        if n_past and begins[0] == starts[n_past - 1]:
            begins[0], goes_on[0] = n_past, 1
        columns = (np.full_like(firsts, row), begins, firsts, ends - begins, goes_on)
        runs.append(np.stack(columns, axis=1))
    joined = np.concatenate(runs)
    return joined[np.argsort(-joined[:, 3], kind="stable")]


def _integrate_runs(
    begun: np.ndarray,
    turned: np.ndarray,
    magnitude: np.ndarray,
    up: np.ndarray,
    down: np.ndarray,
    last: np.ndarray,
    runs: np.ndarray,
    n_past: int,
) -> np.ndarray:
    """`integrate` for arrays `[row, step, bin]`: all runs go on together, one step at a time.

    `begun`, `[run, bin]`, is how runs without a past begin; it is written to. A run that begins
    before its first step only passes through the steps between; one that goes on from the past
    begins with the step after `last`.
    """
    goes_on = runs[:, 4] == 1
    rows = runs[goes_on, 0]
    at = (rows, n_past)
    if len(rows):
        begun[goes_on] = _next_unit(last[rows, 0], turned[at], up[at], down[at])
    out = np.empty_like(turned[:, n_past:])
    current = begun[:0]
    for age in range(runs[0, 3]):
        n = int(np.searchsorted(-runs[:, 3], -age))  # runs still going
        row, step = runs[:n, 0], runs[:n, 1] + age
        at = (row, step)
        unit = begun if age == 0 else _next_unit(current[:n], turned[at], up[at], down[at])
        current = unit * magnitude[at]
        heard = step >= runs[:n, 2]
        out[row[heard], step[heard] - n_past] = unit[heard]
    return out


def _next_unit(
    previous: np.ndarray, turned: np.ndarray, up: np.ndarray, down: np.ndarray
) -> np.ndarray:
    """Unit phases `[run, bin]` one step after the spectrum `previous`."""
    evidence = previous * turned
    evidence += NO_EVIDENCE
    unit = evidence * _inverse_size(evidence)
    for _ in range(N_SWEEPS):
        total = evidence.copy()
        total[:, 1:] += up * unit[:, :-1]
        total[:, :-1] += down * unit[:, 1:]
        unit = total * _inverse_size(total)
    return unit


def _inverse_size(value: np.ndarray) -> np.ndarray:
    """1 / modulus; faster than `np.abs`, and finite at zero."""
    return 1 / np.sqrt(value.real * value.real + value.imag * value.imag + np.float32(1e-36))
