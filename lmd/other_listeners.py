"""Well-known listeners that may be installed beside this project; none is needed or fetched."""

from importlib.util import find_spec

PACKAGES = {"OpenL3": "openl3", "PaSST": "hear21passt", "CLAP": "laion_clap"}


def find_listeners() -> dict[str, bool]:
    """Which of them can be imported."""
    return {name: find_spec(package) is not None for name, package in PACKAGES.items()}
