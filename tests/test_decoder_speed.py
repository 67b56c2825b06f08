import pytest
import torch

from lmd.codec.oobleck import decoder_flops_per_frame, random_codec
from lmd.config import OobleckConfig
from lmd.decoder_speed import fastest_dtype, measure_decoder

SMALL = OobleckConfig(latent_dim=4, channels=8, c_mults=(1, 2), strides=(2, 4))


@pytest.mark.parametrize("batch", [1, 2])
def test_the_measured_figures_fit_together(batch):
    codec = random_codec(SMALL)
    speed = measure_decoder(codec, block_frames=30, n_blocks=4, batch=batch)
    audio_s = 30 * SMALL.samples_per_frame / SMALL.sample_rate
    assert speed.rtf == pytest.approx(1e3 * audio_s / speed.ms_p50)
    assert speed.ms_p50 <= speed.ms_p95
    flops = batch * 30 * decoder_flops_per_frame(SMALL)
    assert speed.gflops_s * 1e9 == pytest.approx(flops / (speed.ms_p50 / 1e3))
    assert speed.rtf / speed.bound_rtf == pytest.approx(speed.gflops_s / speed.product_gflops_s)


def test_the_fastest_precision_is_one_of_the_candidates():
    assert fastest_dtype((torch.float32,), n_trials=1) is torch.float32
    assert fastest_dtype(n_trials=1) in (torch.float32, torch.bfloat16, torch.float16)
