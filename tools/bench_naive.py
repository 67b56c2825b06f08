"""The naive baseline of a bench: stable-audio-tools' own transformer over the whole window.

    lmd bench --preset small --steps 4 8 --json bench.json
    python tools/bench_naive.py bench.json

times one of its passes for every precision of the file, here and now, and adds to each row how
many times faster it is than as many passes as it has steps (`speedup_vs_naive`). It needs
stable-audio-tools.
"""

import json
import statistics
import sys
import time
from pathlib import Path

import torch

from lmd.config import Preset, preset
from lmd.outputs import write_json
from lmd.pretrained import DTYPES


def pass_ms(chosen: Preset, dtype: str, n_times: int = 5) -> float:
    """The median of some passes, after one that is not counted."""
    from stable_audio_tools.models.dit import DiffusionTransformer

    c, window = chosen.dit, chosen.window.window_frames
    model = DiffusionTransformer(
        io_channels=c.latent_dim, embed_dim=c.width, depth=c.depth, num_heads=c.n_heads,
        cond_token_dim=c.text_dim, global_cond_dim=c.global_dim, attn_kwargs={"qk_norm": "ln"},
    ).to(DTYPES[dtype]).eval()  # fmt: skip
    noisy, t = torch.randn(1, c.latent_dim, window), torch.rand(1)
    text = torch.randn(1, chosen.text.n_tokens + 1, c.text_dim)
    given = [x.to(DTYPES[dtype]) for x in (noisy, t, text, torch.randn(1, c.global_dim))]
    spent = []
    with torch.inference_mode():
        for _ in range(n_times + 1):
            began = time.perf_counter()
            model(given[0], given[1], cross_attn_cond=given[2], global_embed=given[3])
            spent.append(1e3 * (time.perf_counter() - began))
    return statistics.median(spent[1:])


def main(path: Path) -> None:
    """Add the baseline to a file of `lmd bench --json`."""
    report = json.loads(path.read_text())
    torch.set_num_threads(report["threads"])
    precisions = {row["dtype"] for row in report["rows"]} & DTYPES.keys()
    passes = {dtype: pass_ms(preset(report["preset"]), dtype) for dtype in sorted(precisions)}
    for row in report["rows"]:
        if row["dtype"] in passes:
            row["speedup_vs_naive"] = row["n_steps"] * passes[row["dtype"]] / row["dit_ms_p50"]
    write_json(path, report | {"stable_audio_tools_pass_ms": passes})


if __name__ == "__main__":
    main(Path(sys.argv[1]))
