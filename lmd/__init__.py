"""Live music diffusion that can be read, trained and played in a notebook."""

import os

__version__ = "0.1.0"

# How long a waiting OpenMP thread spins before it sleeps; read when torch is first imported. Left
# alone, a second busy program on two cores makes small passes many times slower; without any
# spinning, passes on a quiet machine take twice as long. Measurements stand in docs/log.md.
os.environ.setdefault("GOMP_SPINCOUNT", "10000")
