from copy import deepcopy
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lmd.codec.base import Codec, DecodeState, StreamingCodec, decode_block
from lmd.codec.oobleck import (
    OobleckCodec,
    build_reference,
    decoder_reach_frames,
    random_codec,
)
from lmd.config import OobleckConfig
from lmd.errors import LmdError

CONFIGS = {
    "fixture-like": OobleckConfig(latent_dim=8, channels=8, c_mults=(1, 2, 4), strides=(2, 4, 4)),
    "mono": OobleckConfig(
        audio_channels=1, latent_dim=2, channels=6, c_mults=(1, 3), strides=(6, 2)
    ),
    "real strides": OobleckConfig(latent_dim=4, channels=4, c_mults=(1, 1, 2, 2, 4)),
}


def lively(config: OobleckConfig) -> torch.nn.Module:
    """A reference network whose every parameter matters and whose output is of audio's size."""
    torch.manual_seed(0)
    network = build_reference(config)
    for name, parameter in network.named_parameters():
        if name.endswith((".alpha", ".beta")):
            parameter.normal_(std=0.3)
    return network


@pytest.fixture(scope="module", params=CONFIGS)
def pair(request) -> tuple[torch.nn.Module, OobleckCodec]:
    config = CONFIGS[request.param]
    network = lively(config)
    return network, OobleckCodec(deepcopy(network), config)


def latents_for(codec: OobleckCodec, n_frames: int, batch: int = 2) -> torch.Tensor:
    return torch.randn(batch, codec.latent_dim, n_frames, generator=torch.manual_seed(1))


def test_it_is_a_codec_that_streams(pair):
    assert isinstance(pair[1], Codec)
    assert isinstance(pair[1], StreamingCodec)


@torch.no_grad()
def test_decoding_equals_diffusers(pair):
    network, codec = pair
    latents = latents_for(codec, 150)  # longer than one internal chunk
    expected = network.decoder(latents)
    wave = codec.decode(latents)
    assert wave.shape == (2, codec.channels, 150 * codec.samples_per_frame)
    assert expected.abs().max() > 0.1
    assert (wave - expected).abs().max() < 1e-5  # measured: at most 8e-7


@torch.no_grad()
def test_encoding_equals_diffusers(pair):
    network, codec = pair
    wave = torch.randn(2, codec.channels, 150 * codec.samples_per_frame)
    expected = network.encoder(wave)
    latents = codec.encode(wave)
    assert latents.shape == (2, codec.latent_dim, 150)
    assert expected.abs().max() > 0.1
    assert (latents - expected.chunk(2, dim=1)[0]).abs().max() < 1e-5  # measured: at most 8e-7
    assert (codec.encode_parameters(wave) - expected).abs().max() < 1e-5


@given(lengths=st.lists(st.integers(1, 40), min_size=1, max_size=8))
@settings(max_examples=15, deadline=None)
def test_a_streamed_decode_equals_the_whole_however_it_is_cut(lengths):
    config = CONFIGS["fixture-like"]
    codec = random_codec(config)
    latents = latents_for(codec, sum(lengths))
    state, waves = codec.stream_start(), []
    for index, chunk in enumerate(latents.split(lengths, dim=-1)):
        wave, state = codec.stream_decode(state, chunk, last=index == len(lengths) - 1)
        waves.append(wave)
    given_so_far = [sum(lengths[: i + 1]) for i in range(len(lengths))]
    certain = [max(0, n - codec.lookahead_frames) for n in given_so_far[:-1]] + given_so_far[-1:]
    hop = codec.samples_per_frame
    assert [wave.shape[-1] for wave in waves] == [
        (b - a) * hop for a, b in pairwise([0, *certain])
    ]  # never later than the look-ahead
    whole = codec.decode(latents)
    assert (torch.cat(waves, dim=-1) - whole).abs().max() < 1e-5  # measured: 1e-7, of about 0.1


@torch.no_grad()
def test_decode_block_streams_exactly_and_computes_nothing_twice(pair, monkeypatch):
    network, codec = pair
    latents = latents_for(codec, 60)
    monkeypatch.setattr(codec, "decode", lambda latents: pytest.fail("decoded as a whole"))
    state, waves = DecodeState(), []
    for block in latents.split(6, dim=-1):
        wave, state = decode_block(codec, state, block, "exact")
        waves.append(wave)
    streamed, expected = torch.cat(waves, dim=-1), network.decoder(latents)
    n = (60 - codec.lookahead_frames) * codec.samples_per_frame
    assert streamed.shape[-1] == n
    assert (streamed - expected[..., :n]).abs().max() < 1e-5  # measured: at most 8e-7


def test_a_stream_state_is_a_value(pair):
    _, codec = pair
    latents = latents_for(codec, 50)
    _, state = codec.stream_decode(codec.stream_start(), latents[..., :30])
    first, _ = codec.stream_decode(state, latents[..., 30:])
    codec.stream_decode(state, -3 * latents)  # must not disturb it
    second, _ = codec.stream_decode(state, latents[..., 30:])
    assert torch.equal(first, second)


def test_samples_depend_on_exactly_the_stated_reach(pair):
    network, codec = pair
    back, ahead, hop = codec.lookback_frames, codec.lookahead_frames, codec.samples_per_frame
    latents = latents_for(codec, 60, batch=1).double().requires_grad_()
    network = deepcopy(network).double()
    network.decoder(latents)[..., 28 * hop : 30 * hop].sum().backward()
    touched = latents.grad[0].abs().sum(0).nonzero().flatten()
    assert (touched.min(), touched.max()) == (28 - back, 29 + ahead)


def test_the_real_decoder_reaches_ten_frames():
    assert decoder_reach_frames(OobleckConfig()) == (10, 10)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.bfloat16, 0.06), (torch.float16, 0.008)])
def test_half_precision_stays_near_single(pair, dtype, tolerance):
    network, codec = pair
    latents = latents_for(codec, 40)
    wave = codec.decode(latents)
    rough = OobleckCodec(deepcopy(network), codec.config, dtype).decode(latents)
    assert rough.dtype == torch.float32
    error = (rough - wave).square().mean().sqrt() / wave.square().mean().sqrt()
    assert 0 < error < tolerance  # measured: at most 0.022 and 0.0022


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        ((1, 2, 33), "33 samples"),
        ((1, 3, 32), "3 channels"),
        ((1, 2, 0), "0 samples"),
    ],
)
def test_waves_that_do_not_fit_are_refused(shape, message):
    codec = random_codec(CONFIGS["fixture-like"])
    with pytest.raises(LmdError, match=message):
        codec.encode(torch.zeros(shape))


def test_audio_with_nan_and_latents_that_do_not_fit_are_refused():
    codec = random_codec(CONFIGS["fixture-like"])
    with pytest.raises(LmdError, match="NaN"):
        codec.encode(torch.full((1, 2, 64), float("nan")))
    for shape in ((1, 9, 4), (1, 8, 0)):
        with pytest.raises(LmdError, match=f"{shape[1]} channels and {shape[2]} frames"):
            codec.decode(torch.zeros(shape))
    _, state = codec.stream_decode(codec.stream_start(), torch.zeros(2, 8, 4))
    with pytest.raises(LmdError, match="a batch of 1 in a stream of 2"):
        codec.stream_decode(state, torch.zeros(1, 8, 4))


def test_a_codec_without_its_encoder_decodes_the_same_and_refuses_to_encode():
    codec, latents = random_codec(CONFIGS["fixture-like"]), torch.randn(1, 8, 4)
    expected, whole = codec.decode(latents), codec.state_dict()
    assert torch.equal(codec.let_encoder_go().decode(latents), expected)
    assert codec.state_dict().keys() == {k for k in whole if k.startswith("decoder")}
    with pytest.raises(LmdError, match="encoder was let go"):
        codec.encode(torch.zeros(1, 2, 32))


def test_odd_strides_are_refused():
    with pytest.raises(LmdError, match="all strides even"):
        random_codec(OobleckConfig(latent_dim=2, channels=4, c_mults=(1, 2), strides=(3, 2)))


def test_the_reference_network_holds_every_weight_once():
    network = build_reference(CONFIGS["mono"])

    assert not [name for name, layer in network.named_modules() if "weight" in vars(layer)]


def test_weights_that_do_not_fit_are_listed():
    config = CONFIGS["fixture-like"]
    tensors = dict(build_reference(config).state_dict())
    del tensors["decoder.conv2.weight_g"]
    tensors["decoder.conv3.weight_g"] = torch.zeros(1)
    with pytest.raises(LmdError, match=r"missing: decoder\.conv2.*unknown: decoder\.conv3"):
        OobleckCodec.from_tensors(config, tensors)
