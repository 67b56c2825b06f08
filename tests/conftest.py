"""What every test shares: offline, few threads, and shapes checked with beartype.

`LMD_TEST_THREADS` says how many threads torch uses (1 unless told). `make test` has two processes
work through the files, and then one through what is marked `alone` (real time, a limit of time).
"""

import importlib
import os
import signal
from contextlib import suppress
from pathlib import Path

import pytest
import torch
from jaxtyping import install_import_hook

os.environ.setdefault("MPLBACKEND", "Agg")
os.environ.update(HF_HUB_OFFLINE="1", TRANSFORMERS_OFFLINE="1", HF_HUB_DISABLE_TELEMETRY="1")
torch.set_num_threads(int(os.environ.get("LMD_TEST_THREADS", "1")))

# What is first imported by a module under the hook below is compiled from source in every process.
OTHERS = (
    "anywidget",
    "beartype",
    "lightning",
    "matplotlib.pyplot",
    "pandas",
    "papermill",
    "torchaudio",
)
for name in OTHERS:
    with suppress(ModuleNotFoundError):  # some tests run where not everything is installed
        importlib.import_module(name)

# A shell that runs this in the background has interrupts ignored; tests send them.
signal.signal(signal.SIGINT, signal.default_int_handler)

# Graphs that tests export are kept from run to run, apart from the user's.
os.environ.setdefault("LMD_CACHE", str(Path(__file__).parents[1] / ".pytest_cache" / "lmd"))

# Before the first `import lmd`: every annotated function then checks its arguments and results.
SHAPE_CHECKS = install_import_hook("lmd", "shape_checker.check")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files with minutes of work first: no process waits long for the other."""
    slow = {item.path for item in items if item.get_closest_marker("slow")}
    items.sort(key=lambda item: item.path not in slow)


@pytest.fixture(autouse=True)
def seeded() -> None:
    """Every test starts from the same global randomness, though none should need it."""
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def fixtures() -> Path:
    """The folder of small reference files."""
    return Path(__file__).parent / "fixtures"


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Say at the end what tests have noted: how long each notebook ran."""
    for report in terminalreporter.getreports("passed"):
        for name, value in report.user_properties:
            terminalreporter.write_line(f"{name}: {value}")


@pytest.fixture
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    """Any attempt to open a connection fails the test."""

    def refuse(*args: object, **kwargs: object) -> None:
        raise AssertionError(f"a test tried to use the network: {args}")

    for name in ("socket.connect", "create_connection", "getaddrinfo"):
        monkeypatch.setattr(f"socket.{name}", refuse)
