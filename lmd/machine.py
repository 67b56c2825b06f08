"""What the code runs on: device, memory allocator, and a description for reports."""

import ctypes
import gc
import os
import platform
import shutil
import sys
import time
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import psutil
import torch

from lmd.errors import LmdError

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # parameter numbers of glibc's malloc.h
_PAUSE_SOFT = 1  # omp_pause_soft of OpenMP 5's omp.h


def tune_allocator() -> bool:
    """Let glibc keep freed memory: large element-wise operations are several times faster on Linux.

    Call it before large tensors are made; elsewhere it does nothing. Whether it did something.
    """
    mallopt = _c_function("mallopt")
    if mallopt is None:
        return False
    mallopt.argtypes, mallopt.restype = [ctypes.c_int, ctypes.c_int], ctypes.c_int
    return bool(mallopt(_M_MMAP_THRESHOLD, 1 << 30)) and bool(mallopt(_M_TRIM_THRESHOLD, 2**31 - 1))


def trim_memory() -> None:
    """Give freed memory back to the system: after loading, before playing."""
    gc.collect()
    trim = _c_function("malloc_trim")
    if trim is not None:
        trim(0)


def _c_function(name: str) -> Any:
    """A function of the C library on Linux; None where it has none of that name."""
    return getattr(ctypes.CDLL(None), name, None) if sys.platform.startswith("linux") else None


def release_idle_threads() -> bool:
    """End this thread's waiting OpenMP workers; its next parallel operation starts new ones.

    Every thread that computes has workers of its own; when all together are more than there are
    cores, every parallel operation begins with waking them. So a thread that hands its work to
    another one calls this first. Whether there is an OpenMP runtime that did it.
    """
    library = openmp_library()
    if library is None:
        return False
    pause = getattr(ctypes.CDLL(str(library)), "omp_pause_resource_all", None)
    return pause is not None and pause(_PAUSE_SOFT) == 0


def openmp_library() -> Path | None:
    """GNU's OpenMP runtime that came with torch and runs its threads; None where it is another."""
    found = sorted((Path(torch.__file__).parent / "lib").glob("libgomp*"))
    return found[0] if found else None


def memory_gb(device: torch.device) -> float:
    """Peak memory on CUDA since the last call; resident memory of the process elsewhere."""
    if device.type == "cuda":
        peak = torch.cuda.max_memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        return peak / 1e9
    return psutil.Process().memory_info().rss / 1e9


def peak_mb(device: torch.device) -> float:
    """The most memory this process has held, in MiB: the GPU's on a GPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    info = psutil.Process().memory_info()
    peak = getattr(info, "peak_wset", None)  # Windows
    if peak is None:
        import resource

        unit = 1 if sys.platform == "darwin" else 1024
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
    return peak / 2**20


def now_s(device: torch.device) -> float:
    """The clock, once the device has done what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()
    return time.perf_counter()


def pick_device(name: str = "auto") -> torch.device:
    """The device of that name; `auto` prefers CUDA, then the CPU.

    Apple's `mps` is used only when asked for by name.

    Raises:
        LmdError: an unknown device, or one that this machine does not have.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        torch.empty(0, device=name)
        return torch.device(name)
    except (RuntimeError, AssertionError) as error:  # the latter: torch is built without it
        found = f"device {name!r} ({str(error).splitlines()[0]:.100})"
        expected = "'auto', 'cpu', 'cuda', 'cuda:N' or 'mps', as far as this machine has it"
        raise LmdError(found, expected, "Pick one of these.") from error


def check_compiler() -> None:
    """Refuse to compile where `torch.compile` would find no C++ compiler for the CPU.

    Raises:
        LmdError: there is none, and no GPU to compile for.
    """
    names = [os.environ.get("CXX", ""), "g++", "clang++", "cl"]
    if torch.cuda.is_available() or any(name and shutil.which(name) for name in names):
        return
    raise LmdError(
        "--compile on a machine without a C++ compiler",
        "g++ or clang++ on the PATH, or their name in CXX",
        "Install one, or leave the option out: the results are the same.",
    )


def n_cores() -> int:
    """Logical cores that this process may use."""
    affinity = getattr(os, "sched_getaffinity", None)
    return len(affinity(0)) if affinity else os.cpu_count() or 1


def machine_dict() -> dict[str, str | int | float | bool]:
    """The hardware and software behind a measurement, ready for JSON."""
    flags = _cpu_field("flags").split()
    return {
        "system": platform.system(),
        "cpu": _cpu_field("model name") or platform.processor() or platform.machine(),
        "n_cores": n_cores(),
        "n_threads": torch.get_num_threads(),  # that torch uses for one operation
        "memory_gib": round(psutil.virtual_memory().total / 2**30, 1),
        "amx": "amx_bf16" in flags,  # tiles, which make bfloat16 several times faster
        "avx512_bf16": "avx512_bf16" in flags,  # about twice as fast as float32
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else "",
        "python": platform.python_version(),
        "torch": torch.__version__,
    }


def half_products(machine: Mapping[str, Any]) -> str:
    """What a `machine_dict`'s processor multiplies bfloat16 with; empty where it has nothing."""
    if machine.get("amx"):
        return "AMX"
    return "AVX-512 BF16" if machine.get("avx512_bf16") else ""  # not in older records


def hardware(machine: Mapping[str, Any]) -> str:
    """Processor and GPU of a `machine_dict`, in a few words."""
    half = half_products(machine)
    with_half = f" with {half}" if half else ""
    return machine["cpu"] + with_half + (f" and {machine['gpu']}" if machine["gpu"] else "")


def _cpu_field(name: str) -> str:
    """One field of the first core in /proc/cpuinfo; empty where there is none."""
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            lines = (line.partition(":") for line in file)
            return next((value.strip() for key, _, value in lines if key.strip() == name), "")
    except OSError:
        return ""


def making_tables() -> AbstractContextManager:
    """Where small tables are made: on the default device, but on the CPU for an outline ("meta").

    There, `arange` would load PyTorch's compiler, a second of a process's life.
    """
    is_outline = torch.get_default_device().type == "meta"
    return torch.device("cpu") if is_outline else nullcontext()
