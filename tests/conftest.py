"""What every test shares: offline, few threads, and shapes checked with beartype.

`LMD_TEST_THREADS` says how many threads torch uses (1 unless told).
"""

import os
from pathlib import Path

import pytest
import torch
from jaxtyping import install_import_hook

os.environ.setdefault("MPLBACKEND", "Agg")
os.environ.update(HF_HUB_OFFLINE="1", TRANSFORMERS_OFFLINE="1", HF_HUB_DISABLE_TELEMETRY="1")
torch.set_num_threads(int(os.environ.get("LMD_TEST_THREADS", "1")))

# Before the first `import lmd`: every annotated function then checks its arguments and results.
SHAPE_CHECKS = install_import_hook("lmd", "shape_checker.check")


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
