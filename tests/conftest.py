"""What every test shares: offline, few threads, and shapes checked with beartype.

`LMD_TEST_THREADS` says how many threads torch uses (1 unless told). `make test` has two processes
work through the files; what is marked `alone` (real time, a limit of time) waits until nothing else
runs.
"""

import importlib
import os
import signal
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
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


HELD = pytest.StashKey[ExitStack]()
KEPT = pytest.StashKey[bool]()


@contextmanager
def _locked(path: Path, exclusive: bool) -> Iterator[None]:
    """Hold a file among the processes of a run, together with others or alone."""
    import fcntl  # not on Windows, where one process runs all tests

    with path.open("rb") as file:
        fcntl.flock(file, fcntl.LOCK_EX if exclusive else fcntl.LOCK_SH)
        try:
            yield
        finally:
            fcntl.flock(file, fcntl.LOCK_UN)  # a forked child may have the file open still


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files with minutes of work first, those that are to be alone last: nobody waits long."""
    marks: dict[Path, set[str]] = {}
    for item in items:
        marks.setdefault(item.path, set()).update(mark.name for mark in item.iter_markers())
    items.sort(key=lambda item: ("alone" in marks[item.path], "slow" not in marks[item.path]))


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item: pytest.Item, nextitem: pytest.Item | None) -> Iterator[None]:
    """Beside other processes: a file's `alone` tests wait for theirs to end, and they for these."""
    if not hasattr(item.config, "workerinput"):
        return (yield)
    alone = item.get_closest_marker("alone") is not None
    if HELD not in item.config.stash:
        item.config.stash[HELD] = ExitStack()
        item.config.add_cleanup(item.config.stash[HELD].close)  # if the run ends in the middle
    held = item.config.stash[HELD]
    if not item.config.stash.get(KEPT, False):
        # Who waits to be alone keeps the door, so that nobody else enters before.
        with _locked(Path(__file__).with_name("lab.py"), exclusive=True):
            held.enter_context(_locked(Path(__file__), exclusive=alone))
    more = nextitem is not None and nextitem.path == item.path
    keep = alone and more and nextitem.get_closest_marker("alone") is not None
    item.config.stash[KEPT] = keep
    try:
        return (yield)
    finally:
        if not keep:
            held.close()


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
