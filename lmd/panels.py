"""Products of few tokens at full speed: linear layers over weights that lie in panels.

A streamed block has 13 to 97 tokens. At such sizes a library's matrix product rearranges the
weights at every call, or reads them first and multiplies then. The kernel in `microkernel.cpp`
keeps them rearranged and fetches the next ones while it multiplies (float32, on the CPU). It is
compiled for this very processor the first time it is needed (seconds; the result is kept) and
shares torch's threads. Where there is no compiler, and with LMD_PANELS=0, plain layers stay;
results agree within rounding.

Source: the register-blocked inner kernel of Goto and van de Geijn (2008), over packed weights.
"""

import ctypes
import hashlib
import os
import platform
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn
from tqdm import tqdm

from lmd.errors import LmdError
from lmd.machine import openmp_library

SOURCE = Path(__file__).with_name("microkernel.cpp")
COMPILERS = ("g++", "clang++")
FLAGS = ("-O3", "-march=native", "-ffp-contract=fast", "-std=c++17", "-fno-exceptions", "-fno-rtti")
FLAGS += ("-fopenmp", "-shared", "-fPIC")
SWITCH = "LMD_PANELS"
_NONE, _ADD, _MULTIPLY, _SWISH = range(4)  # `Operation` in the source
POINTER, SIZE, NUMBER = ctypes.c_void_p, ctypes.c_long, ctypes.c_int

Panels = Float[Tensor, "panel inputs column"]  # float32, or float16 where that is exact


class PanelLinear(nn.Module):
    """A linear layer for inference; results agree with `nn.Linear` within rounding.

    A row of the result does not depend, not even in rounding, on how many rows there are. Weights
    that are 16-bit floats in truth, as those of a file in float16 are, are kept as such; products
    and sums are float32. Moved to a GPU or to another precision it becomes a plain layer again, and
    back on the CPU in float32 one of panels.

    Args:
        linear: the plain layer, in float32 on the CPU.
        rows: which of its outputs; None: all.
    """

    dtype = torch.float32  # that the kernel takes

    def __init__(self, linear: nn.Linear, rows: slice | None = None) -> None:
        super().__init__()
        rows = slice(None) if rows is None else rows
        weight, bias = linear.weight.detach()[rows], linear.bias
        self._take(weight)
        self.bias = weight.new_zeros(len(weight)) if bias is None else bias.detach()[rows].clone()
        self.has_bias = linear.bias is not None

    def forward(self, x: Tensor, activation: str = "none") -> Tensor:
        """`f(x W^T + b)`; f is "none" or "swish", which is SiLU."""
        return self._product(x, None, _SWISH if activation == "swish" else _NONE)

    def plus(self, x: Tensor, other: Tensor) -> Tensor:
        """`x W^T + b + other`."""
        return self._product(x, other, _ADD)

    def times(self, x: Tensor, other: Tensor) -> Tensor:
        """`(x W^T + b) * other`."""
        return self._product(x, other, _MULTIPLY)

    @property
    def weight(self) -> Float[Tensor, "outputs inputs"]:
        """The plain layer's."""
        return self._as_rows() if self.plain is None else self.plain

    def _take(self, weight: Tensor) -> None:
        """Hold this weight: in panels where the kernel can use them."""
        self.out_features, self.in_features = weight.shape
        suits = weight.device.type == "cpu" and weight.dtype == self.dtype
        self.plain = None if suits else weight
        self.panels = self._as_panels(weight) if suits else None

    def _as_panels(self, weight: Tensor) -> Tensor:
        """What the kernel reads."""
        half = weight.half()
        is_exact = kernel().panel_halves() and torch.equal(half.float(), weight)
        return in_panels(half if is_exact else weight, kernel().panel_columns())

    def _as_rows(self) -> Tensor:
        """`_as_panels` undone."""
        rows = self.panels.transpose(1, 2).reshape(-1, self.in_features)
        return rows[: self.out_features].float()

    def _product(self, x: Tensor, other: Tensor | None, operation: int) -> Tensor:
        if torch.is_grad_enabled() and x.requires_grad:
            raise LmdError(
                "a gradient through layers that were laid out for playing",
                "plain layers",
                "Load the weights again (lmd.checkpoint), or play under torch.no_grad().",
            )
        if self.plain is not None:
            y = F.linear(x, self.plain, self.bias.to(self.plain))
            if other is None:
                return F.silu(y) if operation == _SWISH else y
            return y + other if operation == _ADD else y * other
        if x.dtype != self.dtype or x.shape[-1] != self.in_features or x.device.type != "cpu":
            raise LmdError(
                f"{x.dtype} of shape {tuple(x.shape)} on {x.device} for a layer in panels",
                f"{self.dtype} with {self.in_features} channels on the CPU",
                "Move or convert the model and what goes into it together.",
            )
        x = x.contiguous()
        y = x.new_empty(*x.shape[:-1], self.out_features)
        if other is not None:
            other = other.expand_as(y).contiguous()
        self._fill(y, x, other, operation)
        return y

    def _fill(self, y: Tensor, x: Tensor, other: Tensor | None, operation: int) -> None:
        """Write the product into `y`; all lie in one piece."""
        kernel().panel_linear(
            x.data_ptr(),
            self.panels.data_ptr(),
            self.bias.data_ptr(),
            None if other is None else other.data_ptr(),
            y.data_ptr(),
            x.numel() // self.in_features,
            self.in_features,
            self.out_features,
            operation,
            self.panels.dtype == torch.float16,
            torch.get_num_threads(),
        )

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "PanelLinear":
        super()._apply(fn, recurse)
        self._take(fn(self.weight))
        self.bias = fn(self.bias)
        return self

    def _save_to_state_dict(
        self, destination: dict[str, Any], prefix: str, keep_vars: bool
    ) -> None:
        """The plain layer's weights."""
        destination[prefix + "weight"] = self.weight
        if self.has_bias:
            destination[prefix + "bias"] = self.bias


def in_panels(weight: Float[Tensor, "outputs inputs"], n_columns: int) -> Panels:
    """`n_columns` outputs side by side, input after input; zeros behind the last output."""
    n_panels = -(-len(weight) // n_columns)
    padded = F.pad(weight, (0, 0, 0, n_panels * n_columns - len(weight)))
    return padded.view(n_panels, n_columns, -1).transpose(1, 2).contiguous()


def use_panels(module: nn.Module) -> nn.Module:
    """Lay out every linear layer inside a module, in place, where `can_use_panels()`.

    Args:
        module: float32, on the CPU, to be played; it cannot be trained afterwards.

    Returns:
        The same module. Its state dict stays what it was.
    """
    if can_use_panels():
        for parent in list(module.modules()):
            for name, child in list(parent.named_children()):
                if isinstance(child, nn.Linear):
                    setattr(parent, name, PanelLinear(child))
    return module


def can_use_panels() -> bool:
    """Whether the kernel runs here (compiled if it was not yet)."""
    return why_no_panels() == ""


@cache
def why_no_panels() -> str:
    """What stands in the way of the kernel, for a person; "" if nothing does."""
    if off := switched_off(SWITCH):
        return off
    if not sys.platform.startswith("linux"):
        return f"{sys.platform}: torch's own products are used"
    return why_not(_multiplies_rightly)


def switched_off(*switches: str) -> str:
    """Which of these variables of the environment is 0, for a person; "" if none is."""
    return next((f"{name} is 0" for name in switches if os.environ.get(name) == "0"), "")


def why_not(computes_rightly: Callable[[], bool]) -> str:
    """What stands in the way of a kernel that a first use compiles; "" if nothing does."""
    try:
        right = computes_rightly()
    except (OSError, subprocess.SubprocessError) as error:
        said = getattr(error, "stderr", None) or str(error)
        return f"the kernel could not be compiled: {said.strip()[-500:]}"
    return "" if right else "the kernel computes something else than torch"


@cache
def kernel() -> ctypes.CDLL:
    """The compiled kernel.

    Raises:
        OSError: no compiler, nowhere to write, or a library that cannot be loaded.
        subprocess.SubprocessError: the compiler failed; `stderr` says why.
    """
    library = ctypes.CDLL(str(compiled(SOURCE)))
    library.panel_linear.argtypes = [POINTER] * 5 + [SIZE] * 3 + [NUMBER] * 3
    library.panel_attend.argtypes = [POINTER, NUMBER]
    library.panel_linear.restype = library.panel_attend.restype = None
    library.panel_columns.restype = library.panel_halves.restype = NUMBER
    return library


def compiled(source: Path, *flags: str) -> Path:
    """The library's path, kept from an earlier run or made now.

    Args:
        source: it may include `SOURCE`.
        flags: for the compiler, beside `FLAGS`.

    Raises:
        OSError: no compiler, or nowhere to write.
        subprocess.SubprocessError: the compiler failed; `stderr` says why.
    """
    compiler, flags = _compiler(), (*FLAGS, *flags)
    texts = (source.read_text(), SOURCE.read_text())
    described = (*texts, compiler, *flags, torch.__version__, processor())
    name = f"{source.stem}-{hashlib.sha256(repr(described).encode()).hexdigest()[:16]}.so"
    kept = _cache_folder() / name
    if kept.is_file():
        return kept
    runtime = openmp_library()
    shared = [] if runtime is None else [str(runtime)]  # one set of threads for torch and kernel
    with tempfile.TemporaryDirectory(dir=kept.parent) as folder:
        made = Path(folder) / name
        command = [compiler, *flags, str(source), "-o", str(made), *shared]
        with tqdm(total=1, desc="compiling for this processor, once") as bar:
            subprocess.run(command, check=True, capture_output=True, text=True, timeout=120)
            bar.update()
        made.replace(kept)  # at once: another process may be doing the same
    return kept


def _compiler() -> str:
    """The C++ compiler's path."""
    for name in (os.environ.get("CXX", ""), *COMPILERS):
        if name and (path := shutil.which(name)):
            return path
    raise OSError("no C++ compiler on the PATH (g++ or clang++, or its name in CXX)")


def processor() -> str:
    """What a library for this processor must not be used without: its instructions."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((x for x in lines if x.startswith(("flags", "Features"))), platform.machine())


def _cache_folder() -> Path:
    """Where compiled kernels are kept between runs; if nothing can be written there, a new one."""
    folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "lmd"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
    except OSError:
        return Path(tempfile.mkdtemp(prefix="lmd-"))
    return folder


def _multiplies_rightly() -> bool:
    """Whether products of some awkward sizes agree with torch's."""
    generator = torch.Generator().manual_seed(0)
    for n_rows, n_inputs, n_outputs in ((1, 1, 1), (13, 40, 70), (49, 320, 100)):
        x, other = (torch.randn(n_rows, n, generator=generator) for n in (n_inputs, n_outputs))
        linear = nn.utils.skip_init(nn.Linear, n_inputs, n_outputs).requires_grad_(False)
        for parameter in linear.parameters():
            parameter.normal_(generator=generator)
        for round_off in (lambda w: w, lambda w: w.half().float()):
            linear.weight.data = round_off(linear.weight)
            layer, y = PanelLinear(linear), linear(x)
            pairs = [(layer(x), y), (layer.plus(x, other), y + other)]
            pairs += [(layer.times(x, other), y * other), (layer(x, "swish"), F.silu(y))]
            if not all(torch.allclose(ours, theirs, atol=1e-3) for ours, theirs in pairs):
                return False
    return True
