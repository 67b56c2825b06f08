"""Prints how far gradients through compiled blocks are from those through plain ones.

A process of its own: the tests' shape checks cannot be compiled.
"""

import torch
from engine import CONFIG, random_model


def learnt(model: torch.nn.Module) -> torch.Tensor:
    """All gradients of one pass in bfloat16, as one vector."""
    generator = torch.Generator().manual_seed(1)
    noisy = torch.randn(2, CONFIG.latent_dim, 12, generator=generator)
    prompts = torch.randn(2, 6, CONFIG.text_dim, generator=generator)
    model.zero_grad()
    with torch.autocast("cpu", torch.bfloat16):
        velocity = model(noisy, torch.tensor([0.3, 0.8]), model.condition(prompts, 2.0))
    velocity.square().sum().backward()
    return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])


if __name__ == "__main__":
    model = random_model()
    plain = learnt(model)
    model.dit.compile_blocks()
    print(float((learnt(model) - plain).norm() / plain.norm()))
