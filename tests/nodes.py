"""The same program on several nodes, told apart as torchrun does, each on a loopback address."""

import os
import socket
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).parent


def start_nodes(*words: object, n_nodes: int = 2) -> list[subprocess.Popen]:
    """One Python process per node, with the words behind `python`."""
    with socket.socket() as free:
        free.bind(("127.0.0.2", 0))
        port = free.getsockname()[1]
    shared = {
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": str(HERE.parent),
        "MASTER_ADDR": "127.0.0.2",
        "MASTER_PORT": str(port),
        "WORLD_SIZE": str(n_nodes),
        "LOCAL_RANK": "0",
        "LOCAL_WORLD_SIZE": "1",
        "TORCHELASTIC_RUN_ID": "lmd",
    }
    return [
        subprocess.Popen(
            [sys.executable, *map(str, words)],
            env={**os.environ, **shared}
            | dict.fromkeys(("RANK", "NODE_RANK", "GROUP_RANK"), str(node)),
            cwd=HERE.parent,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for node in range(n_nodes)
    ]


def finish_nodes(processes: list[subprocess.Popen]) -> None:
    """Wait for all of them; what they said, if one failed."""
    try:
        texts = [process.communicate(timeout=900)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert [process.returncode for process in processes] == [0] * len(processes), texts
