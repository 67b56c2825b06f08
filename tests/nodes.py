"""The same program on several nodes, each with a loopback address of its own."""

import os
import socket
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).parent
ADDRESSES = ("127.0.0.2", "127.0.0.3")  # the first one is where they meet


def free_port() -> int:
    """A port at the first node's address that nobody uses."""
    with socket.socket() as free:
        free.bind((ADDRESSES[0], 0))
        return free.getsockname()[1]


def start(node: int, *words: object, **environment: str) -> subprocess.Popen:
    """A command on a node; its processes listen at the node's address."""
    told = {
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": os.pathsep.join(map(str, (HERE / "node", HERE.parent))),
        "LMD_NODE_ADDRESS": ADDRESSES[node],
    }
    return subprocess.Popen(
        [*map(str, words)],
        env={**os.environ, **told, **environment},
        cwd=HERE.parent,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def start_nodes(*words: object) -> list[subprocess.Popen]:
    """One Python process per node, with the words behind `python`, told apart as torchrun does."""
    shared = {
        "MASTER_ADDR": ADDRESSES[0],
        "MASTER_PORT": str(free_port()),
        "WORLD_SIZE": str(len(ADDRESSES)),
        "LOCAL_RANK": "0",
        "LOCAL_WORLD_SIZE": "1",
        "TORCHELASTIC_RUN_ID": "lmd",
    }
    processes = []
    for node in range(len(ADDRESSES)):
        ranks = dict.fromkeys(("RANK", "NODE_RANK", "GROUP_RANK"), str(node))
        processes.append(start(node, sys.executable, *words, **shared, **ranks))
    return processes


def run_pair(*words: object) -> None:
    """A command that starts its second process itself, to its end."""
    done = subprocess.run(
        [*map(str, words)], cwd=HERE.parent, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "MEMBER: 2/2" in done.stderr


def finish_nodes(processes: list[subprocess.Popen]) -> None:
    """Wait for all; what they said, if one failed or one was not at its own address alone."""
    try:
        texts = [process.communicate(timeout=900)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert [process.returncode for process in processes] == [0] * len(processes), texts
    for rank, (address, text) in enumerate(zip(ADDRESSES, texts, strict=True)):
        assert f"rank {rank} of {len(ADDRESSES)} listens at {address}\n" in text, text
