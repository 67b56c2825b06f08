"""Stage 2: ARC-Forcing, adversarial post-training on the model's own rollouts."""
