"""Live music diffusion that can be read, trained and played in a notebook."""
