"""Products of few tokens in bfloat16: linear layers over weights that lie in AMX tiles.

What `lmd.panels` does in float32, for processors that multiply tiles (Sapphire Rapids and later):
oneDNN's products keep up with them, but with 13 to 97 tokens not with the memory. The kernel in
`tilekernel.cpp` is compiled the first time it is needed. On other processors, without a compiler
and with LMD_TILES=0 or LMD_PANELS=0 nothing is compiled and other layers stay.

Source: the register-blocked inner kernel of Goto and van de Geijn (2008), over packed weights.
"""

import ctypes
import os
from functools import cache
from pathlib import Path

import torch
import torch.nn.functional as F
from jaxtyping import BFloat16
from torch import Tensor, nn

from lmd.panels import (
    NUMBER,
    POINTER,
    SIZE,
    SWITCH,
    PanelLinear,
    compiled,
    processor,
    switched_off,
    why_not,
)

SOURCE = Path(__file__).with_name("tilekernel.cpp")
INSTRUCTIONS = ("amx_tile", "amx_bf16", "avx512f")  # as Linux names them
SWITCHES = ("LMD_TILES", SWITCH)
FLAG = "-Wfatal-errors"  # the first one says what is missing
PANEL, STEP = 32, 32  # outputs, inputs: as in the source

Tiles = BFloat16[Tensor, "panel step half pair output two"]


class TileLinear(PanelLinear):
    """A linear layer for inference in bfloat16; agrees with `nn.Linear` within rounding.

    Sums are float32 and are rounded once, behind bias, activation, sum or product. A row of the
    result does not depend on how many rows there are. Moved to a GPU or to another precision it
    becomes a plain layer again, and back on the CPU in bfloat16 one of tiles.

    Args:
        linear: the plain layer, in bfloat16 on the CPU.
        rows: which of its outputs; None: all.
    """

    dtype = torch.bfloat16

    def _as_panels(self, weight: Tensor) -> Tiles:
        return in_tiles(weight)

    def _as_rows(self) -> Tensor:
        n_panels, n_steps = self.panels.shape[:2]
        rows = self.panels.permute(0, 2, 4, 1, 3, 5).reshape(n_panels * PANEL, n_steps * STEP)
        return rows[: self.out_features, : self.in_features].contiguous()

    def _fill(self, y: Tensor, x: Tensor, other: Tensor | None, operation: int) -> None:
        missing = -self.in_features % STEP
        x = F.pad(x, (0, missing)) if missing else x
        kernel().tile_linear(
            x.data_ptr(),
            self.panels.data_ptr(),
            self.bias.data_ptr(),
            None if other is None else other.data_ptr(),
            y.data_ptr(),
            y.numel() // self.out_features,
            self.in_features + missing,
            self.out_features,
            operation,
            torch.get_num_threads(),
        )


def in_tiles(weight: BFloat16[Tensor, "outputs inputs"]) -> Tiles:
    """As the kernel reads them; zeros behind the last output and the last input."""
    n_outputs, n_inputs = weight.shape
    padded = F.pad(weight, (0, -n_inputs % STEP, 0, -n_outputs % PANEL))
    halves = padded.view(-(-n_outputs // PANEL), 2, PANEL // 2, -(-n_inputs // STEP), STEP // 2, 2)
    return halves.permute(0, 3, 1, 4, 2, 5).contiguous()


def can_use_tiles() -> bool:
    """Whether the kernel runs here (compiled if it was not yet)."""
    return why_no_tiles() == ""


@cache
def why_no_tiles() -> str:
    """What stands in the way of the kernel, for a person; "" if nothing does."""
    if off := switched_off(*SWITCHES):
        return off
    if missing := [name for name in INSTRUCTIONS if name not in processor().split()]:
        return f"the processor has no {', '.join(missing)}"
    return why_not(_multiplies_rightly)


@cache
def kernel() -> ctypes.CDLL:
    """The compiled kernel; this process may use tiles from now on.

    Raises:
        OSError: as `lmd.panels.kernel`, or a system that does not let this process use tiles.
        subprocess.SubprocessError: the compiler failed; `stderr` says why.
    """
    library = load(compiled(SOURCE, FLAG))
    if refusal := library.tile_permission():
        raise OSError(refusal, f"no permission to use tiles: {os.strerror(refusal)}")
    return library


def load(path: Path) -> ctypes.CDLL:
    """The library with the types of what it offers."""
    library = ctypes.CDLL(str(path))
    library.tile_linear.argtypes = [POINTER] * 5 + [SIZE] * 3 + [NUMBER] * 2
    library.tile_attend.argtypes = [POINTER, NUMBER]
    library.tile_linear.restype = library.tile_attend.restype = None
    return library


def _multiplies_rightly() -> bool:
    """Whether products of some awkward sizes agree with sums in float64 within one rounding."""
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).bfloat16()

    for n_rows, n_inputs, n_outputs in ((1, 1, 1), (13, 40, 70), (49, 320, 100), (97, 64, 1056)):
        x, other = normal(n_rows, n_inputs), normal(n_rows, n_outputs)
        linear = nn.utils.skip_init(nn.Linear, n_inputs, n_outputs, dtype=torch.bfloat16)
        for parameter in linear.requires_grad_(False).parameters():
            parameter.copy_(normal(*parameter.shape))
        y = F.linear(x.double(), linear.weight.double(), linear.bias.double())
        layer = TileLinear(linear)
        pairs = [(layer(x), y), (layer.plus(x, other), y + other)]
        pairs += [(layer.times(x, other), y * other), (layer(x, "swish"), F.silu(y))]
        close = {"atol": 1e-3, "rtol": 2**-8}
        if not all(torch.allclose(ours.double(), theirs, **close) for ours, theirs in pairs):
            return False
    return True
