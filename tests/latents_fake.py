"""A folder of latents as `lmd data encode` writes it, from plain random walks; for tests."""

import json
from dataclasses import asdict
from pathlib import Path

import pandas as pd
import torch

from lmd.data.shards import INDEX, SETTINGS, Entry, write_shard


def write_latents(
    folder: Path, latent_dim: int = 8, n_sounds: int = 4, n_frames: int = 900
) -> Path:
    """Write `n_sounds` smooth random sounds, captioned, into `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    generator = torch.Generator().manual_seed(0)
    entries, latents = [], []
    for i in range(n_sounds):
        steps = torch.randn(n_frames, latent_dim, generator=generator)
        smooth = torch.nn.functional.avg_pool1d(steps.T[None], 9, 1, 4)[0].T * 3
        latents.append(smooth)
        entries.append(
            Entry(
                f"sound{i}",
                -1,
                "shard-00000.safetensors",
                i * n_frames,
                n_frames,
                f"organ and flute, piece {i}",
                "train",
                f"p{i}",
                "nobody",
                "winds",
                "organ",
                100.0,
                "C",
                "major",
                n_frames / 21.53,
            )
        )
    write_shard(folder / "shard-00000.safetensors", latents, entries)
    pd.DataFrame([asdict(entry) for entry in entries]).to_csv(folder / INDEX, index=False)
    settings = {"latent_dim": latent_dim, "silence": [0.0] * latent_dim}
    (folder / SETTINGS).write_text(json.dumps(settings))
    return folder
