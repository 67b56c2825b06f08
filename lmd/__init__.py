"""Live music diffusion that can be read, trained and played in a notebook."""

import os
import sys

__version__ = "0.1.0"

# How long a waiting OpenMP thread spins before it sleeps; read when torch is first imported. Left
# alone, a second busy program on two cores makes small passes many times slower; without any
# spinning, passes on a quiet machine take twice as long. Measurements stand in docs/log.md.
# What imports torch first (`make lab`'s kernels) is given it by who starts it; without it a live
# engine goes over to one thread when its blocks suddenly cost many times as much.
SPIN_IS_LIMITED = "GOMP_SPINCOUNT" in os.environ or "torch" not in sys.modules
os.environ.setdefault("GOMP_SPINCOUNT", "10000")
