"""Prints requirements.lock: name and version of everything installed, nothing else.

Run by `make lock`. No addresses and no hashes: any index or mirror may serve the packages.
"""

import re
from importlib.metadata import distributions

HEADER = """\
# Written by `make lock`. Versions only, so that any index or mirror can serve them.
# Left out: nvidia-*, cuda-* and triton, which torch asks for itself on Linux with the versions that
# it was built for; without them the same file works on macOS and Windows.
"""
LEFT_OUT = re.compile(r"(nvidia-|cuda-|triton|pip$|setuptools$|wheel$|lmd$)")


def lock() -> str:
    """The text of the lock file for the environment that runs this."""
    versions = {
        d.metadata["Name"].lower(): f"{d.metadata['Name']}=={d.version}" for d in distributions()
    }
    lines = [line for name, line in sorted(versions.items()) if not LEFT_OUT.match(name)]
    return HEADER + "\n".join(lines) + "\n"


if __name__ == "__main__":
    print(lock(), end="")
