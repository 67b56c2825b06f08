"""The suite's own net: annotations are enforced while tests run."""

from types import SimpleNamespace

import pytest
import torch

from lmd.codec.base import DecodeState, decode_block
from lmd.errors import LmdError


def fake_codec() -> SimpleNamespace:
    """One sample a frame: the latents are the wave."""
    geometry = {"sample_rate": 1, "channels": 1, "latent_dim": 1, "samples_per_frame": 1}
    reach = {"lookback_frames": 0, "lookahead_frames": 0}
    return SimpleNamespace(**geometry, **reach, encode=lambda wave: wave, decode=lambda wave: wave)


def test_a_wrong_name_reaches_the_packages_own_refusal():
    with pytest.raises(LmdError, match="sideways"):
        decode_block(fake_codec(), DecodeState(), torch.zeros(1, 1, 3), "sideways")


def test_a_wrong_shape_is_caught():
    decode_block(fake_codec(), DecodeState(), torch.zeros(1, 1, 3), "exact")
    with pytest.raises(Exception, match="latents"):
        decode_block(fake_codec(), DecodeState(), torch.zeros(1, 3), "exact")
