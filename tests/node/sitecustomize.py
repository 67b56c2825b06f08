"""Python imports this first in every process of `nodes.start`: it gives the process an address.

gloo would announce the one address that the machine's name stands for, which all nodes here share.
"""

import os
from datetime import timedelta

import psutil
from torch.distributed import ProcessGroupGloo, Store, distributed_c10d

ADDRESS = os.environ["LMD_NODE_ADDRESS"]


class OwnAddress(ProcessGroupGloo):
    """Listens at, and tells the others, this node's address; then says where it listens."""

    def __init__(self, store: Store, rank: int, size: int, timeout: timedelta) -> None:
        options = ProcessGroupGloo._Options()
        options._timeout = timeout
        options._devices = [ProcessGroupGloo.create_device(hostname=ADDRESS)]
        super().__init__(store, rank, size, options)
        connections = psutil.Process().net_connections("tcp4")
        found = {c.laddr.ip for c in connections if c.status == psutil.CONN_LISTEN}
        print(f"rank {rank} of {size} listens at {' '.join(sorted(found))}", flush=True)


distributed_c10d.ProcessGroupGloo = OwnAddress
