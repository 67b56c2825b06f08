"""Codecs: waves to latents and back, block by block."""
