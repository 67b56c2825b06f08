"""Phase from local advances: how a decoder that was never told the phase makes one.

A magnitude spectrogram of a held tone does not change from frame to frame, but its phase turns, by
an angle that follows from the tone's frequency. So a decoder predicts not angles but *advances*:
from a frame to the next and from a bin to the next, each a complex number whose angle is the
advance and whose modulus (0 ... 1) says how sure it is. The phase is then integrated over frames.

Phases are those of a transform whose time zero is the middle of the window, and advances in time
are relative to the centre of the bin, so a tone in the middle of a bin has both advances 1.

Source: the phase-gradient family of Průša and Søndergaard (2016), with learned gradients.
"""

import math

import torch
from jaxtyping import Complex, Float, Int
from torch import Tensor

Spectrum = Complex[Tensor, "batch bin step"]
Magnitude = Float[Tensor, "batch bin step"]


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


def start_phase(in_frequency: Complex[Tensor, "batch bin"]) -> Complex[Tensor, "batch bin"]:
    """Phases of a step without a past: advances to the next bin, summed up from bin 0."""
    angle = torch.angle(in_frequency)
    angle = torch.cat([torch.zeros_like(angle[:, :1]), angle[:, :-1]], dim=1)
    return _unit_from_angle(torch.cumsum(angle, dim=1))


def next_phase(
    previous: Complex[Tensor, "batch bin"],
    in_time: Complex[Tensor, "batch bin"],
    in_frequency: Complex[Tensor, "batch bin"],
    magnitude: Float[Tensor, "batch bin"],
    n_sweeps: int = 2,
) -> Complex[Tensor, "batch bin"]:
    """One step on: turn the previous phases, then let strong and sure bins lead their neighbours.

    Args:
        previous: the last step's spectrum with its phases (magnitudes weigh the evidence).
        in_time: advances from the last step, bin turn included.
        in_frequency: advances to the next bin.
        magnitude: this step's magnitudes.
        n_sweeps: how often evidence passes to the two neighbours.
    """
    up = in_frequency[:, :-1] * magnitude[:, :-1]
    down = in_frequency[:, :-1].conj() * magnitude[:, 1:]
    evidence = previous * in_time
    unit = _unit(evidence)
    for _ in range(n_sweeps):
        total = evidence.clone()
        total[:, 1:] += up * unit[:, :-1]
        total[:, :-1] += down * unit[:, 1:]
        unit = _unit(total)
    return unit


def integrate(
    magnitude: Magnitude, in_time: Spectrum, in_frequency: Spectrum, start: Tensor, hop_turn: Tensor
) -> Spectrum:
    """The spectrum of given magnitudes whose phases follow the advances.

    Args:
        magnitude: `[batch, bin, step]`, linear.
        in_time: advance from the step before, relative to the bin's centre.
        in_frequency: advance to the next bin.
        start: `[batch, step]`, for every step the step its phase counts from (`restarts`).
        hop_turn: `bin_turn` of the transform.
    """
    turned = in_time * hop_turn[None, :, None]
    rows = [
        _integrate_row(magnitude[i], turned[i], in_frequency[i], start[i].tolist())
        for i in range(len(magnitude))
    ]
    return torch.stack(rows)


def _integrate_row(
    magnitude: Float[Tensor, "bin step"],
    in_time: Complex[Tensor, "bin step"],
    in_frequency: Complex[Tensor, "bin step"],
    start: list[int],
) -> Complex[Tensor, "bin step"]:
    """`integrate` for one row; a step whose start has changed is integrated again from there."""
    columns = [t.T.contiguous()[:, None] for t in (magnitude, in_time, in_frequency)]
    out: list[Tensor] = []
    current: Tensor | None = None
    for step, begin in enumerate(start):
        first = step if step and begin == start[step - 1] else begin
        for s in range(first, step + 1):
            level, time, frequency = (c[s] for c in columns)
            if s == begin:
                unit = start_phase(frequency)
            else:
                unit = next_phase(current, time, frequency, level)
            current = unit * level
        out.append(current[0])
    return torch.stack(out, dim=-1)


def _unit(value: Tensor) -> Tensor:
    """Numbers of modulus 1 with the same angle; 1 where there is no evidence at all."""
    size = value.abs()
    return torch.where(size > 1e-20, value / size.clamp_min(1e-20), 1.0)


def _unit_from_angle(angle: Tensor) -> Tensor:
    return torch.polar(torch.ones_like(angle), angle)
