"""How fast the Oobleck decoder streams, beside what this machine's matrix products allow."""

import statistics
import time
from dataclasses import dataclass

import torch

from lmd.codec.oobleck import OobleckCodec, build_reference, decoder_flops_per_frame
from lmd.config import OobleckConfig
from lmd.machine import now_s

PRODUCT = (4096, 1024, 1024)  # rows, inner, columns of the product that the bound is taken from
TRIAL = OobleckConfig(channels=128, c_mults=(1, 2), strides=(2, 4))  # small, of the real widths


@dataclass(frozen=True)
class DecoderSpeed:
    """A streamed decode, block by block; times are medians unless they say otherwise.

    Attributes:
        dtype: precision inside.
        threads: torch's threads.
        block_frames: latent frames per block.
        ms_p50: milliseconds per block.
        ms_p95: the slow end.
        rtf: seconds of audio per second of decoding.
        gflops_s: convolutions only, 10⁹ operations per second.
        product_gflops_s: what a plain matrix product reaches, measured between the blocks.
        bound_rtf: `rtf` if the convolutions ran at that rate and nothing else took time.
    """

    dtype: str
    threads: int
    block_frames: int
    ms_p50: float
    ms_p95: float
    rtf: float
    gflops_s: float
    product_gflops_s: float
    bound_rtf: float


@torch.no_grad()
def measure_decoder(
    codec: OobleckCodec, block_frames: int = 48, n_blocks: int = 8, batch: int = 1
) -> DecoderSpeed:
    """Stream random latents, each block followed by a matrix product in the same precision.

    Args:
        codec: e.g. `random_codec(OobleckConfig(), dtype=torch.bfloat16)`.
        block_frames: latent frames per block.
        n_blocks: blocks that count; two more come first and do not.
        batch: streams at once; `rtf` counts one of them.
    """
    rows, inner, columns = PRODUCT
    left = torch.randn(rows, inner, dtype=codec.dtype, device=codec.device)
    right = torch.randn(inner, columns, dtype=codec.dtype, device=codec.device)
    latents = torch.randn(batch, codec.latent_dim, block_frames)
    state, block_s, product_s = codec.stream_start(), [], []
    for index in range(n_blocks + 2):
        begin = now_s(codec.device)
        _, state = codec.stream_decode(state, latents)
        middle = now_s(codec.device)
        left @ right
        end = now_s(codec.device)
        if index >= 2:
            block_s.append(middle - begin)
            product_s.append(end - middle)
    flops = batch * block_frames * decoder_flops_per_frame(codec.config)
    audio_s = block_frames * codec.samples_per_frame / codec.sample_rate
    median_s = statistics.median(block_s)
    product_flops_s = 2 * rows * inner * columns / statistics.median(product_s)
    return DecoderSpeed(
        dtype=str(codec.dtype).removeprefix("torch."),
        threads=torch.get_num_threads(),
        block_frames=block_frames,
        ms_p50=1e3 * median_s,
        ms_p95=1e3 * sorted(block_s)[min(n_blocks - 1, round(0.95 * (n_blocks - 1)))],
        rtf=audio_s / median_s,
        gflops_s=flops / median_s / 1e9,
        product_gflops_s=product_flops_s / 1e9,
        bound_rtf=audio_s * product_flops_s / flops,
    )


@torch.no_grad()
def fastest_dtype(
    candidates: tuple[torch.dtype, ...] = (torch.float32, torch.bfloat16, torch.float16),
    n_trials: int = 5,
) -> torch.dtype:
    """The precision in which this machine decodes fastest, tried for a fraction of a second.

    Processors with matrix instructions for bfloat16 gain by it; others lose by it.
    """
    network = build_reference(TRIAL)
    codecs = {dtype: OobleckCodec(network, TRIAL, dtype) for dtype in candidates}
    best = dict.fromkeys(candidates, float("inf"))
    latents = torch.randn(1, TRIAL.latent_dim, 256)
    for _ in range(n_trials + 1):  # interleaved, so that a busy moment hits all alike
        for dtype, codec in codecs.items():
            begin = time.perf_counter()
            codec.decode(latents)
            best[dtype] = min(best[dtype], time.perf_counter() - begin)
    return min(best, key=best.__getitem__)
