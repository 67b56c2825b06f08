"""The border: checkpoints of stable-audio-tools and LMDM become ours here, nowhere else."""
