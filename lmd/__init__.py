"""Live music diffusion that can be read, trained and played in a notebook."""

import os

# Threads that wait must not spin: with a second busy program on two cores, spinning made small
# transformer passes more than ten times slower. Read by OpenMP when torch is first imported.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
