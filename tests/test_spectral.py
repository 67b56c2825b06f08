"""The spectral codec: shapes, refusals, what a frame depends on, phases of known signals."""

import math
from dataclasses import replace

import pytest
import torch

from lmd.checkpoint import build_model
from lmd.codec import phase
from lmd.codec.base import Codec, DecodeState, decode_block
from lmd.codec.spectral import (
    SpectralCodec,
    amplitude,
    band_matrix,
    decibels,
    inverse_stft,
    onset_strength,
    stft,
)
from lmd.codec.spectral_decoder import SpectralDecoder
from lmd.config import preset
from lmd.data.codec_fit import mel_matrix
from lmd.errors import LmdError
from lmd.model.text import build_text_encoder
from lmd.rng import normal
from lmd.stream.controls import Controls
from lmd.stream.streamer import Streamer
from lmd.training.codec.losses import bin_weights

TINY = preset("tiny").codec
SMALL = preset("small").codec


@pytest.fixture(scope="module")
def codec():
    torch.manual_seed(0)
    made = SpectralCodec(TINY).eval()
    with torch.no_grad():  # levels of real music, not of fresh weights
        made.decoder.level.bias.fill_(-2.5)
    return made


def tones(n_samples: int, hz: tuple[float, ...], sample_rate: int = 22_050) -> torch.Tensor:
    time = torch.arange(n_samples) / sample_rate
    return sum(0.2 * torch.sin(2 * math.pi * f * time + i) for i, f in enumerate(hz))[None]


def test_inverse_stft_undoes_stft_away_from_the_ends():
    wave = normal((2, 1024 * 6), 0, "test wave")
    spectrum = stft(wave, 2048, 256)
    assert spectrum.shape == (2, 1025, 24)
    inside = slice(2048, -2048)
    # float32 sums of 16 overlapping grains; measured 5e-7
    assert (inverse_stft(spectrum, 2048, 256) - wave)[:, inside].abs().max() < 1e-5


def test_a_full_scale_sine_in_the_middle_of_a_bin_is_zero_decibels():
    wave = torch.sin(2 * math.pi * 100 / 2048 * torch.arange(1024 * 6))[None]
    power = stft(wave, 2048, 256).abs().square()[0, 100, 8:-8]
    assert (decibels(power, -80.0).abs() < 1e-3).all()  # measured 8e-6


def test_bands_average_powers_so_that_white_power_stays_white():
    bands = band_matrix(1025, 160, 256)
    assert bands.shape == (1025, 256)
    assert torch.allclose(torch.ones(1025) @ bands, torch.ones(256), atol=1e-5)
    assert (bands.sum(1) > 0).all()  # no bin is unheard


def test_mel_bands_and_bin_weights_are_averages():
    assert torch.allclose(mel_matrix(129, 22_050, 80).sum(0), torch.ones(80), atol=1e-5)
    assert float(bin_weights(1025, 22_050).mean()) == pytest.approx(1.0, abs=1e-5)


def test_amplitude_undoes_decibels_above_the_floor():
    magnitude = torch.tensor([[[1e-3, 0.1, 1.0]]])
    back = amplitude(decibels(magnitude.square(), -80.0), -80.0)
    assert torch.allclose(back, magnitude, rtol=1e-2)


def test_codec_has_what_the_protocol_asks_for(codec):
    made: Codec = codec
    assert (made.sample_rate, made.channels, made.latent_dim) == (22_050, 1, 8)
    assert made.samples_per_frame == 1024
    assert SpectralCodec(SMALL).lookahead_frames == 4  # as promised: at most 4


def test_more_channels_than_it_hears_are_refused():
    with pytest.raises(LmdError, match="2 channels"):
        SpectralCodec(replace(SMALL, channels=2))


@pytest.mark.parametrize("n_frames", [1, 2, 7])
def test_n_frames_of_samples_give_n_latents_and_back(codec, n_frames):
    wave = 0.1 * normal((2, 1, 1024 * n_frames), 0, "test wave")
    latents = codec.encode(wave)
    assert latents.shape == (2, 8, n_frames)
    assert codec.decode(latents).shape == wave.shape


@pytest.mark.parametrize(
    ("wave", "named"),
    [
        (torch.zeros(1, 1, 1500), "1500 samples"),
        (torch.zeros(1, 1, 0), "0 samples"),
        (torch.zeros(1, 2, 1024), "2 channels"),
        (torch.full((1, 1, 1024), math.nan), "not finite"),
        (torch.full((1, 1, 1024), math.inf), "not finite"),
    ],
)
def test_encode_refuses_what_it_cannot_do_right(codec, wave, named):
    with pytest.raises(LmdError, match=named):
        codec.encode(wave)


def test_decode_refuses_wrong_latents(codec):
    with pytest.raises(LmdError, match="7 channels"):
        codec.decode(torch.zeros(1, 7, 3))
    with pytest.raises(LmdError, match="not finite"):
        codec.decode(torch.full((1, 8, 3), math.nan))
    assert codec.decode(torch.zeros(1, 8, 0)).shape == (1, 1, 0)


def test_silence_is_one_latent_whatever_its_length(codec):
    latents = codec.encode(torch.zeros(1, 1, 1024 * 5))
    assert torch.equal(latents, latents[..., :1].expand_as(latents))
    assert torch.isfinite(latents).all()


def test_polarity_and_phase_leave_latents_alone(codec):
    wave = 0.1 * normal((1, 1, 1024 * 4), 0, "test wave")
    assert torch.allclose(codec.encode(wave), codec.encode(-wave), atol=1e-5)


def test_a_frame_depends_on_the_latents_that_the_codec_says(codec):
    n, at = 60, 40
    latents = normal((1, 8, n), 0, "test latents")
    changed = latents.clone()
    changed[..., at] += 1.0
    difference = (codec.decode(latents) - codec.decode(changed))[0, 0].abs()
    frames = difference.unflatten(0, (n, -1)).amax(1)
    first, last = at - codec.lookahead_frames, at + codec.lookback_frames
    assert (frames[:first] == 0).all()
    assert (frames[last + 1 :] == 0).all()
    assert frames[at] > 0


@pytest.mark.parametrize("block_frames", [3, 20])
def test_streamed_decode_equals_whole_decode(codec, block_frames):
    latents = normal((2, 8, 60), 1, "test latents")
    whole = codec.decode(latents)
    state, parts = DecodeState(), []
    for start in range(0, 60, block_frames):
        block = latents[..., start : start + block_frames]
        wave, state = decode_block(codec, state, block, "exact")
        parts.append(wave)
    streamed = torch.cat(parts, -1)
    assert streamed.shape[-1] == (60 - codec.lookahead_frames) * 1024
    # sums in another order would be turned into phases: none are; measured 0
    assert (streamed - whole[..., : streamed.shape[-1]]).abs().max() < 1e-5


def test_what_was_held_back_comes_when_the_stream_ends_without_another_frame(codec):
    latents = normal((2, 8, 20), 1, "test latents")
    none = latents[..., :0]
    first, state = codec.stream_decode(codec.stream_start(), latents)
    more, state = codec.stream_decode(state, none)
    rest, _ = codec.stream_decode(state, none, last=True)
    assert more.shape[-1] == 0
    assert rest.shape[-1] == codec.lookahead_frames * 1024
    # measured 0
    assert (torch.cat([first, rest], -1) - codec.decode(latents)).abs().max() < 1e-5
    assert codec.stream_decode(codec.stream_start(), none, last=True)[0].shape == (2, 1, 0)


@pytest.mark.parametrize("lengths", [[12, 12, 12], [1, 2, 3, 5, 1, 24]])
def test_a_guess_gives_the_rest_and_leaves_no_trace(codec, lengths):
    """One call equals two: the latents themselves, and the guess as an end behind them."""
    latents = normal((2, 8, sum(lengths)), 1, "test latents")
    with_guess = without = codec.stream_start()
    for block in latents.split(lengths, dim=-1):
        guess = block[..., -1:]
        wave, with_guess = codec.stream_decode(with_guess, block, guess=guess)
        certain, without = codec.stream_decode(without, block)
        rest, _ = codec.stream_decode(without, guess, last=True)
        # measured 0
        assert (wave - torch.cat([certain, rest], -1)).abs().max() < 1e-6
    end = latents[..., :4]
    ends = [codec.stream_decode(state, end, last=True)[0] for state in (with_guess, without)]
    assert (ends[0] - ends[1]).abs().max() < 1e-6


class NotStreaming:
    """The codec with whole decodes only."""

    def __init__(self, codec: SpectralCodec) -> None:
        for name in ("sample_rate", "channels", "latent_dim", "samples_per_frame"):
            setattr(self, name, getattr(codec, name))
        self.lookback_frames, self.lookahead_frames = codec.lookback_frames, codec.lookahead_frames
        self.encode, self.decode = codec.encode, codec.decode


def test_a_streaming_state_gives_what_decoding_the_look_back_again_gives(codec):
    """Over both boundaries, changing places, and beginning in the middle of a stream."""
    latents = normal((1, 8, 96), 3, "test latents")
    begun = DecodeState(latents[..., : codec.lookback_frames])
    for state in (DecodeState(), begun):
        states = {codec: state, NotStreaming(codec): state}
        for number, start in enumerate(range(48, 96, 4)):
            boundary = "fade" if number // 3 % 2 else "exact"
            waves = []
            for each in states:
                wave, states[each] = decode_block(
                    each, states[each], latents[..., start : start + 4], boundary
                )
                waves.append(wave)
            # measured 0 (exact) and 6e-8 (fading)
            torch.testing.assert_close(*waves, atol=1e-5, rtol=0)


def test_a_stream_computes_new_steps_only(codec, monkeypatch):
    rows = []
    advances = SpectralDecoder._advances

    def counting(self, level, advance):
        rows.append(level.shape[1])
        return advances(self, level, advance)

    monkeypatch.setattr(SpectralDecoder, "_advances", counting)
    state, latents = DecodeState(), normal((1, 8, 48), 4, "test latents")
    for start in range(0, 48, 12):
        _, state = decode_block(codec, state, latents[..., start : start + 12], "exact")
    assert rows[1:] == [12 * TINY.hops_per_frame] * 3


def test_a_saved_streaming_state_goes_on_where_it_was(codec, tmp_path):
    tiny = preset("tiny")
    model, text = build_model(tiny).eval(), build_text_encoder(tiny.text)
    streamer = Streamer(model, codec, text, tiny.window)
    controls = Controls(n_steps=1, block_frames=4)
    _, state = streamer.step(streamer.start(), controls)
    streamer.save_state(state, tmp_path / "state.safetensors")
    loaded = streamer.load_state(tmp_path / "state.safetensors")
    first, second = (streamer.step(s, controls)[0].wave for s in (state, loaded))
    assert first.numel() > 0
    assert torch.equal(first, second)


def test_phase_integrated_from_true_advances_sounds_like_the_tones():
    """Magnitudes and advances of three steady tones give their magnitudes back."""
    spectrum = stft(tones(1024 * 24, (220.0, 331.7, 1003.3)), 2048, 256)
    in_time, in_frequency = phase.advances(spectrum, 2048, 256)
    turn = phase.bin_turn(1025, 2048, 256)
    start = torch.zeros(1, spectrum.shape[-1], dtype=torch.long)
    made = spectrum.abs() * phase.integrate(spectrum.abs(), in_time, in_frequency, start, turn)
    again = stft(inverse_stft(made, 2048, 256), 2048, 256).abs()[..., 8:-8]
    loud = spectrum.abs()[..., 8:-8] > 1e-2
    error_db = 20 * torch.log10(again[loud] / spectrum.abs()[..., 8:-8][loud])
    assert error_db.abs().mean() < 0.2  # measured 6e-7 dB


def test_advance_in_time_of_a_tone_in_mid_bin_is_one():
    wave = torch.cos(2 * math.pi * 100 / 2048 * torch.arange(1024 * 6))[None]
    in_time, in_frequency = phase.advances(stft(wave, 2048, 256), 2048, 256)
    # float32 phases of a strong bin; measured 5e-6
    assert (in_time[0, 100, 8:-8] - 1).abs().max() < 1e-3
    assert (in_frequency[0, 99:101, 8:-8] - 1).abs().max() < 1e-3


def test_restarts_pick_the_strongest_onset_within_the_horizon():
    onset = torch.tensor([[0.0, 3.0, 1.0, 2.0, 0.5, 0.1, 0.2, 5.0]])
    assert phase.restarts(onset, 3).tolist() == [[0, 1, 1, 1, 1, 3, 3, 7]]


def test_rows_decode_alike_alone_and_in_a_batch(codec):
    latents = normal((2, 8, 12), 2, "test latents")
    together = codec.decode(latents)
    alone = torch.cat([codec.decode(row[None]) for row in latents])
    # sums of grains in another order; measured 9e-8
    assert (together - alone).abs().max() < 1e-3


def test_onset_strength_is_zero_for_held_levels_and_at_the_first_step():
    level = torch.full((1, 5, 4), -30.0)
    level[..., 2:] = -20.0
    assert onset_strength(level, -80.0).tolist() == [[0.0, 0.0, 10.0, 0.0]]


def test_a_run_may_begin_anew_at_the_step_where_another_goes_on():
    shape, turn = (1, 9, 7), phase.bin_turn(9, 16, 4)
    magnitude = normal(shape, 0, "magnitude").abs()
    in_time, in_frequency = (
        torch.polar(torch.ones(shape), normal(shape, 0, name)) for name in ("time", "frequency")
    )
    start = torch.tensor([[0, 0, 0, 0, 0, 3, 3]])  # step 3 counts from 0, step 5 from step 3
    given = (magnitude, in_time, in_frequency, start, turn)
    whole = phase.integrate(*given)
    last = (magnitude * whole)[..., 2:3]
    assert (phase.integrate(*given, 3, last) - whole[..., 3:]).abs().max() < 1e-5
