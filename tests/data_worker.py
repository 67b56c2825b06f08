"""What test_data_processes.py compares, made by one process or by several: latents."""

import sys

from lmd.__main__ import importing
from lmd.__main__ import main as lmd


def main(corpus: str, codec: str, out: str, devices: str) -> None:
    """Encode a corpus."""
    words = ["--data", corpus, "--codec", codec, "--out", out, "--stems", "--rows-per-shard", "1"]
    with importing():
        assert lmd(["data", "encode", *words, "--accelerator", "cpu", "--devices", devices]) == 0


if __name__ == "__main__":
    main(*sys.argv[1:])
