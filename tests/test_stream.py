"""The streamer: a value in, a value out, the same bytes, no clicks, clear refusals."""

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from engine import HoldCodec, random_model, streamer
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from lmd.codec.base import DecodeState, StreamingCodec, decode_block, equal_power_fade
from lmd.codec.oobleck import random_codec
from lmd.config import OobleckConfig, WindowConfig
from lmd.errors import LmdError
from lmd.model.dit import Condition
from lmd.model.text import HashTextEncoder
from lmd.model.weights import fingerprint
from lmd.pretrained import open_instrument
from lmd.rng import frame_noise, normal
from lmd.stream.controls import Controls, crossfade
from lmd.stream.samplers import SAMPLERS
from lmd.stream.streamer import Streamer

BASE = Controls(prompt="organ", n_steps=2, block_frames=6)


def play(stream, plan, state=None, batch=1):
    state = stream.start(batch=batch) if state is None else state
    blocks = []
    for controls in plan:
        block, state = stream.step(state, controls)
        blocks.append(block)
    return blocks, state


def latents_of(blocks):
    return torch.cat([block.latents for block in blocks], dim=-1)


def wave_of(blocks):
    return torch.cat([block.wave for block in blocks], dim=-1)


LIVELY = [
    BASE,
    replace(BASE, prompt=(("organ", 0.5), ("harp", 0.5)), cfg_scale=2.0),
    replace(BASE, block_frames=12, regime="enc-dec", sampler="euler"),
    replace(BASE, block_frames=3, seed=9, sampler="dpmpp", n_steps=3),
    replace(BASE, drop_context_frames=12, boundary="fade", sampler="pingpong++", cfg_scale=0.5),
    replace(BASE, regime="full", sampler="euler++", cfg_scale=0.9),
    BASE,
    BASE,
]


def test_one_call_of_eight_blocks_is_eight_calls_of_one():
    stream = streamer()
    together = list(stream.stream(LIVELY))
    one_by_one, _ = play(stream, LIVELY)
    assert [block.start_sample for block in together] == [b.start_sample for b in one_by_one]
    assert torch.equal(wave_of(together), wave_of(one_by_one))


def test_a_block_says_where_its_own_frames_begin():
    """Whatever boundaries and lengths come before it; an exact boundary holds some frames back."""
    stream = streamer()
    blocks, _ = play(stream, LIVELY)
    n_frames = 0
    for block in blocks:
        assert block.start_sample + block.own_from == n_frames * stream.codec.samples_per_frame
        n_frames += block.latents.shape[-1]
    hop = stream.codec.samples_per_frame
    held = [0, 2, 2, 2, 2, 0, 2, 2]  # the fading block hands out all that there is
    assert [block.own_from for block in blocks] == [frames * hop for frames in held]


def test_a_step_leaves_the_state_it_was_given_untouched():
    stream = streamer()
    _, state = play(stream, LIVELY[:3])
    before = {name: tensor.clone() for name, tensor in state.memory.tensors().items()}
    context = state.context.clone()
    first, _ = stream.step(state, BASE)
    second, _ = stream.step(state, BASE)
    assert torch.equal(first.wave, second.wave)
    assert torch.equal(state.context, context)
    for name, tensor in state.memory.tensors().items():
        assert torch.equal(tensor, before[name])


@pytest.mark.parametrize("at", range(1, len(LIVELY)))
def test_a_saved_state_goes_on_to_the_same_bytes(at, tmp_path):
    whole, _ = play(streamer(), LIVELY)
    _, state = play(streamer(), LIVELY[:at])
    streamer().save_state(state, tmp_path / "state.safetensors")
    fresh = streamer()
    rest, _ = play(fresh, LIVELY[at:], fresh.load_state(tmp_path / "state.safetensors"))
    assert torch.equal(wave_of(rest), wave_of(whole[at:]))
    assert [block.rebuilt for block in rest] == [block.rebuilt for block in whole[at:]]


def test_two_processes_with_the_same_seed_give_the_same_bytes():
    script = (
        "import hashlib, sys; from engine import *; from test_stream import *;"
        "wave = wave_of(play(streamer(), LIVELY)[0]);"
        "print(hashlib.sha256(wave.numpy().tobytes()).hexdigest())"
    )
    folder = Path(__file__).parent
    runs = [
        subprocess.run(
            [sys.executable, "-c", script],
            cwd=folder, check=True, capture_output=True, text=True, timeout=120,
        ).stdout
        for _ in range(2)
    ]  # fmt: skip
    assert runs[0] == runs[1]
    assert len(runs[0].strip()) == 64


def test_the_seed_decides_the_music_and_the_block_index_the_noise():
    stream = streamer()
    first, _ = play(stream, [BASE] * 2)
    again, _ = play(stream, [BASE] * 2)
    other, _ = play(stream, [replace(BASE, seed=1)] * 2)
    assert torch.equal(latents_of(first), latents_of(again))
    assert not torch.allclose(latents_of(first), latents_of(other))
    assert not torch.allclose(first[0].latents, first[1].latents)


def test_batch_items_with_equal_contexts_differ_by_their_noise_alone():
    blocks, state = play(streamer(), [BASE] * 2, batch=3)
    assert blocks[0].wave.shape[0] == state.context.shape[0] == 3
    assert not torch.allclose(blocks[0].latents[0], blocks[0].latents[1])


def test_the_noise_of_a_frame_depends_on_its_number_alone():
    whole = frame_noise((1, 4, 200), 3, "noise", 0)
    assert torch.equal(frame_noise((1, 4, 60), 3, "noise", 70), whole[..., 70:130])
    assert torch.equal(frame_noise((1, 4, 48), 3, "noise", 48), normal((1, 4, 48), 3, "noise", 1))
    assert not torch.equal(frame_noise((1, 4, 60), 4, "noise", 70), whole[..., 70:130])


@settings(max_examples=30, deadline=None)
@given(
    n_before=st.integers(0, 3),
    kept=st.integers(0, 6),
    boundary=st.sampled_from(["exact", "fade"]),
    regime=st.sampled_from(["enc-dec", "block-causal"]),
    codec=st.sampled_from(["hold", "streaming"]),
)
def test_a_rewound_stream_goes_on_as_if_the_block_had_been_no_longer(
    n_before, kept, boundary, regime, codec
):
    stream = streamer()
    stream.codec = convolutional() if codec == "streaming" else stream.codec
    controls = Controls(n_steps=2, block_frames=6, boundary=boundary, regime=regime)
    state = stream.start()
    for _ in range(n_before):
        _, state = stream.step(state, controls)
    cut = replace(controls, drop_context_frames=6)
    block, after = stream.step(state, cut)
    rewound = stream.rewind(state, block, state.n_frames + kept)
    assert rewound.n_frames == state.n_frames + kept
    if kept == 0:
        assert rewound is state
    if kept == 6:  # its end: the same as never having rewound, but for keys that are made anew
        fresh = replace(after, memory=None)
        one, _ = stream.step(fresh, controls)
        other, _ = stream.step(rewound, controls)
        assert torch.equal(one.latents, other.latents)
        assert torch.equal(one.wave, other.wave)
    again, following = stream.step(rewound, controls)
    assert again.start_sample == rewound.n_samples
    assert following.n_frames == rewound.n_frames + 6
    # What is made anew is decoded with what was kept, as one stream.
    if boundary == "exact":
        latents = torch.cat([block.latents[..., :kept], again.latents], dim=-1)
        expected, _ = decode_block(stream.codec, state.decode, latents, boundary)
        n = again.wave.shape[-1]
        assert torch.allclose(again.wave, expected[..., expected.shape[-1] - n :], atol=1e-5)
    # Rewound again and again, a state does not grow.
    size = following.decode.latents.shape[-1]
    for _ in range(3):
        rewound = stream.rewind(rewound, again, rewound.n_frames + 3)
        again, following = stream.step(rewound, controls)
    assert following.decode.latents.shape[-1] <= size + 3 * 3


def test_a_cut_outside_its_block_is_refused():
    stream = streamer()
    block, state = stream.step(stream.start(), Controls(n_steps=1, block_frames=6))
    for frame in (-1, 7):
        with pytest.raises(LmdError, match=r"frame -?\d; expected 0 to 6"):
            stream.rewind(stream.start(), block, frame)
    with pytest.raises(LmdError, match="within the block"):
        stream.rewind(state, block, 3)


def test_every_sampler_plays():
    for sampler in SAMPLERS:
        scale = 0.5 if sampler.endswith("++") else 2.0
        blocks, _ = play(streamer(), [replace(BASE, sampler=sampler, cfg_scale=scale)] * 2)
        assert torch.isfinite(wave_of(blocks)).all()


def test_unchanged_controls_keep_the_cache_and_changes_rebuild_it():
    plan = [
        (BASE, True),
        (BASE, False),
        (replace(BASE, n_steps=4, seed=3, sampler="euler"), False),
        (replace(BASE, prompt="harp"), True),
        (replace(BASE, prompt="harp"), False),
        (replace(BASE, prompt="harp", cfg_scale=2.0), True),
        (replace(BASE, prompt="harp", cfg_scale=3.0), False),
        (replace(BASE, prompt="harp", cfg_scale=3.0, block_frames=12), True),
        (replace(BASE, prompt="harp", cfg_scale=3.0, block_frames=12, drop_context_frames=4), True),
        (replace(BASE, prompt="harp", cfg_scale=3.0, block_frames=12), False),
        (replace(BASE, prompt="harp", cfg_scale=3.0, block_frames=12, regime="enc-dec"), True),
    ]
    blocks, _ = play(streamer(), [controls for controls, _ in plan])
    assert [block.rebuilt for block in blocks] == [rebuilt for _, rebuilt in plan]


def test_a_prompt_change_is_heard_in_the_next_block():
    stream = streamer()
    _, state = play(stream, [BASE] * 3)
    same, _ = stream.step(state, BASE)
    changed, _ = stream.step(state, replace(BASE, prompt="harp"))
    assert not torch.allclose(same.latents, changed.latents)


def test_a_crossfade_of_prompts_moves_every_block_and_arrives():
    stream = streamer()
    fade = crossfade("organ", "harp", 4)
    assert [prompt[1][1] for prompt in fade[:-1]] == [0.25, 0.5, 0.75]
    assert fade[-1] == "harp"
    blocks, _ = play(stream, [replace(BASE, prompt=prompt) for prompt in fade])
    arrived, _ = play(stream, [replace(BASE, prompt="harp")] * 4)
    left, _ = play(stream, [BASE] * 4)
    assert not torch.allclose(blocks[0].latents, left[0].latents)
    assert not torch.allclose(blocks[0].latents, arrived[0].latents)
    weights = {block.controls.prompt for block in blocks}
    assert len(weights) == 4


def test_forgetting_everything_is_starting_from_silence():
    stream = streamer()
    _, state = play(stream, [BASE] * 3)
    forgot, _ = stream.step(state, replace(BASE, drop_context_frames=24))
    silent, _ = stream.step(replace(stream.start(), n_frames=state.n_frames), BASE)
    assert torch.equal(forgot.latents, silent.latents)


class Echo:
    """A closed-form denoiser whose clean end is always half the last context frame."""

    latent_dim, device = 4, torch.device("cpu")

    def condition(self, prompt_tokens, seconds):
        return Condition(prompt_tokens, prompt_tokens[:, 0])

    def null_condition(self, condition):
        return condition

    def open_block(self, context, condition, plan, memory):
        class Session:
            memory = None

            def __call__(self, noisy, t):
                return (noisy - 0.5 * context[..., -1:]) / t

        return Session()


def test_anything_with_the_denoiser_signature_can_be_streamed():
    stream = Streamer(Echo(), HoldCodec(), streamer().text, WindowConfig(24, 6))
    state = replace(stream.start(), context=torch.ones(1, 4, 24))
    blocks, _ = play(stream, [BASE] * 3, state)
    for block, expected in zip(blocks, (0.5, 0.25, 0.125), strict=True):
        torch.testing.assert_close(block.latents, torch.full((1, 4, 6), expected))


def test_given_audio_becomes_the_context_and_the_stream_joins_it():
    stream = streamer()
    wave = normal((1, 1, 8 * 40), 0, "wave").clamp(-1, 1)
    state = stream.start(context=wave)
    assert torch.equal(state.context, HoldCodec().encode(wave)[..., -24:])
    short = stream.start(context=wave[..., : 8 * 5])
    assert not short.context[..., :19].any()
    assert torch.equal(short.context[..., 19:], HoldCodec().encode(wave[..., : 8 * 5]))
    block, _ = stream.step(state, BASE)
    whole = torch.cat([state.context, block.latents], dim=-1)
    expected = HoldCodec().decode(whole)[..., 24 * 8 : 28 * 8].clone()
    fade_in, fade_out = equal_power_fade(16, expected)  # 20 ms
    expected[..., :16] = expected[..., :16] * fade_in + wave[..., -16:].flip(-1) * fade_out
    torch.testing.assert_close(block.wave, expected)


@pytest.mark.parametrize("boundary", ["exact", "fade"])
def test_given_audio_and_the_stream_after_it_join_without_a_step(boundary):
    instrument = open_instrument("random:tiny:0")
    stream, rate = instrument.streamer, instrument.streamer.codec.sample_rate
    t = torch.arange(rate) / rate
    for phase in (0.0, 1.0, 1.6, 4.0):
        wave = 0.6 * torch.sin(2 * torch.pi * 220 * t + phase)
        inside = float(wave.diff().abs().max())
        state = stream.start(context=wave)
        controls = replace(instrument.controls("organ"), n_steps=1, boundary=boundary)
        block, _ = stream.step(state, controls)
        loudest = float(block.wave.abs().max())
        step = float((block.wave[0, 0, 0] - wave[-1]).abs())
        assert step < 0.01 * inside + 0.004 * loudest


GIVEN = normal((1, 1, 8 * 40), 0, "given").clamp(-0.99, 0.99)
AS_INT16 = (GIVEN * 2**15).to(torch.int16)


@pytest.mark.parametrize(
    ("audio", "expected"),
    [
        (AS_INT16, AS_INT16 / 2**15),
        (AS_INT16.numpy(), AS_INT16 / 2**15),
        (AS_INT16[0, 0].numpy().astype(">i2"), AS_INT16 / 2**15),
        (AS_INT16.to(torch.int32) * 2**16, AS_INT16 / 2**15),
        (GIVEN.double(), GIVEN),
        (GIVEN.clone().requires_grad_(), GIVEN),
        (GIVEN.half(), GIVEN.half().float()),
        (GIVEN[0], GIVEN),
        (GIVEN[0, 0], GIVEN),
        (GIVEN.numpy()[..., ::-1], GIVEN.flip(-1)),
        (GIVEN.tolist(), GIVEN),
    ],
)
def test_given_audio_may_be_of_any_kind_that_says_its_scale(audio, expected):
    state = streamer().start(context=audio)
    assert torch.equal(state.context, streamer().start(context=expected).context)
    assert state.context.dtype == torch.float32


def test_given_audio_goes_to_where_the_codec_computes():
    class Elsewhere(HoldCodec):
        device = torch.device("meta")

        def encode(self, wave):
            assert wave.device == self.device
            return torch.zeros(1, 4, wave.shape[-1] // 8)

    stream = streamer()
    stream.codec = Elsewhere()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Tensor, "__bool__", lambda self: True)  # a meta tensor has no values
        assert stream.start(context=GIVEN).context.shape == (1, 4, 24)


# --- decoding -------------------------------------------------------------------------------


@settings(max_examples=40, deadline=None)
@given(lengths=st.lists(st.integers(1, 9), min_size=1, max_size=12), seed=st.integers(0, 99))
def test_exact_boundaries_equal_one_decode_of_everything_and_come_late_by_the_lookahead(
    lengths, seed
):
    codec, state = HoldCodec(), DecodeState()
    latents = normal((2, 4, sum(lengths)), seed, "latents")
    waves, n_given = [], 0
    for block in latents.split(lengths, dim=-1):
        wave, state = decode_block(codec, state, block, "exact")
        waves.append(wave)
        n_given += block.shape[-1]
        n_heard = sum(wave.shape[-1] for wave in waves)
        assert n_heard == max(0, n_given - codec.lookahead_frames) * 8
    streamed = torch.cat(waves, dim=-1)
    # The same sums over the same five frames: measured 0.
    torch.testing.assert_close(streamed, codec.decode(latents)[..., : streamed.shape[-1]])


def test_fading_boundaries_are_handed_out_at_once_and_equal_the_whole_decode_inside():
    codec, state = HoldCodec(), DecodeState()
    latents = normal((1, 4, 40), 0, "latents")
    waves = []
    for block in latents.split(10, dim=-1):
        wave, state = decode_block(codec, state, block, "fade")
        assert wave.shape[-1] == 80
        waves.append(wave)
    whole = codec.decode(latents)
    for i, wave in enumerate(waves):
        inside = slice(2 * 8, 8 * 8)  # behind the fade, before the frames that lack their future
        torch.testing.assert_close(
            wave[..., inside], whole[..., i * 80 : (i + 1) * 80][..., inside]
        )


def test_equal_power_fade_keeps_the_power():
    fade_in, fade_out = equal_power_fade(64, torch.zeros(1))
    torch.testing.assert_close(fade_in**2 + fade_out**2, torch.ones(64))
    assert fade_in[0] < 0.02 < 0.98 < fade_in[-1]


class ToneCodec:
    """Latents are amplitudes of one smooth tone; overlapping windows make frames interact."""

    sample_rate, channels, latent_dim, samples_per_frame = 8000, 1, 4, 64
    lookback_frames = lookahead_frames = 1

    def decode(self, latents):
        window = torch.hann_window(128)
        frames = latents.mean(dim=1)[:, :, None] * window
        n = latents.shape[-1]
        padded = torch.zeros(latents.shape[0], (n + 1) * 64)
        for i in range(n):
            padded[:, i * 64 : i * 64 + 128] += frames[:, i]
        return padded[:, None, 32 : 32 + n * 64]


@pytest.mark.parametrize("boundary", ["exact", "fade"])
def test_no_click_at_a_hundred_joins(boundary):
    codec, state, waves = ToneCodec(), DecodeState(), []
    latents = 1.0 + 0.3 * normal((1, 4, 101 * 12), 0, "walk").cumsum(dim=-1) / 12
    for block in latents.split(12, dim=-1):
        wave, state = decode_block(codec, state, block, boundary)
        waves.append(wave)
    joins = torch.tensor([wave.shape[-1] for wave in waves]).cumsum(0)[:-1]
    bend = torch.cat(waves, dim=-1)[0, 0].diff().diff().abs()
    near = torch.zeros(len(bend), dtype=torch.bool)
    for join in joins:
        near[join - 4 : join + 2] = True
    # Peak second difference at joins over the peak inside; measured exact 0.004, fade 0.99.
    assert len(joins) == 100
    assert bend[near].max() / bend[~near].max() < 1.5


OOBLECK = OobleckConfig(
    sample_rate=800, audio_channels=1, latent_dim=4, channels=4, c_mults=(1, 2), strides=(2, 4)
)


def convolutional():
    """A small convolutional codec that keeps its own streaming state."""
    return random_codec(OOBLECK)


def test_a_codec_with_its_own_streaming_state_gives_the_same_samples():
    codec = convolutional()
    assert isinstance(codec, StreamingCodec)
    latents = normal((1, 4, 60), 0, "latents")
    whole = codec.decode(latents)
    for lengths in ([12] * 5, [1, 2, 3, 4, 20, 30], [60]):
        state, waves = DecodeState(), []
        for block in latents.split(lengths, dim=-1):
            wave, state = decode_block(codec, state, block, "exact")
            waves.append(wave)
        streamed = torch.cat(waves, dim=-1)
        assert streamed.shape[-1] == (60 - codec.lookahead_frames) * 8
        # float32 convolutions over pieces against one over everything: measured 1e-7.
        torch.testing.assert_close(streamed, whole[..., : streamed.shape[-1]], atol=1e-5, rtol=0)


def test_boundaries_may_change_at_any_block_and_nothing_is_lost_or_repeated():
    codec = convolutional()
    boundaries = ["exact", "fade", "exact", "exact", "fade", "fade", "exact"]
    latents = normal((1, 4, 40 * len(boundaries)), 0, "latents")
    state, n_heard, whole = DecodeState(), 0, codec.decode(latents)
    for boundary, block in zip(boundaries, latents.split(40, dim=-1), strict=True):
        wave, state = decode_block(codec, state, block, boundary)
        clear = slice(n_heard + 16, n_heard + 32)  # behind a fade
        torch.testing.assert_close(wave[..., 16:32], whole[..., clear], atol=1e-5, rtol=0)
        n_heard += wave.shape[-1]
    assert n_heard == (40 * len(boundaries) - codec.lookahead_frames) * 8


def test_a_saved_state_holds_the_codecs_streaming_state(tmp_path):
    def fresh():
        return Streamer(random_model(), convolutional(), streamer().text, WindowConfig(24, 6))

    whole, _ = play(fresh(), [BASE] * 6)
    _, state = play(fresh(), [BASE] * 3)
    fresh().save_state(state, tmp_path / "state.safetensors")
    again = fresh()
    rest, _ = play(again, [BASE] * 3, again.load_state(tmp_path / "state.safetensors"))
    assert torch.equal(wave_of(rest), wave_of(whole[3:]))


def test_an_unknown_boundary_is_refused():
    with pytest.raises(LmdError, match="boundary 'hard'"):
        decode_block(HoldCodec(), DecodeState(), torch.zeros(1, 4, 2), "hard")


# --- bad input ------------------------------------------------------------------------------

BAD = {
    "block that does not divide": ({"block_frames": 7}, "divides the context"),
    "no block": ({"block_frames": 0}, "divides the context"),
    "weights not summing to one": ({"prompt": (("a", 0.5), ("b", 0.6))}, "sum of 1"),
    "negative weight": ({"prompt": (("a", 1.5), ("b", -0.5))}, "none negative"),
    "no steps": ({"n_steps": 0}, "1 to"),
    "steps as text": ({"n_steps": "8"}, "a number"),
    "guidance without text": ({"prompt": " ", "cfg_scale": 3.0}, "no text"),
    "guidance that is not a number": ({"cfg_scale": float("nan")}, "cfg_scale = nan"),
    "cfg++ above one": ({"sampler": "euler++", "cfg_scale": 3.0}, "(0, 1]"),
    "unknown sampler": ({"sampler": "heun"}, "one of"),
    "unknown regime": ({"regime": "causal"}, "one of"),
    "unknown boundary": ({"boundary": "hard"}, "one of"),
    "forgetting more than there is": ({"drop_context_frames": 25}, "0 to 24"),
    "negative seed": ({"seed": -1}, "0 to"),
    "prompt that is a number": ({"prompt": 5}, "a text, or a tuple"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_controls_are_refused_and_the_state_goes_on(name):
    changes, message = BAD[name]
    stream = streamer()
    _, state = play(stream, [BASE] * 2)
    expected, _ = stream.step(state, BASE)
    with pytest.raises(LmdError) as refused:
        stream.step(state, replace(BASE, **changes))
    assert message in str(refused.value)
    assert refused.value.todo
    after, _ = stream.step(state, BASE)
    assert torch.equal(after.wave, expected.wave)


@pytest.mark.parametrize(
    ("wave", "message"),
    [
        (torch.full((1, 1, 80), float("nan")), "finite"),
        (torch.zeros(1, 2, 80), "[batch, 1, sample]"),
        (torch.zeros(1, 1, 3), "at least 8 samples"),
        (torch.zeros(80, 1), "[1, sample]"),
        (torch.zeros(2, 80), "[1, sample]"),
        (torch.zeros(0, 1, 80), "[1, sample]"),
        (torch.tensor(0.5), "[1, sample]"),
        ([0] * 80, "int16 or int32"),
        (torch.zeros(1, 1, 80, dtype=torch.uint8), "int16 or int32"),
        (torch.full((1, 1, 80), 32767.0), "more than 10 times full scale"),
        ([[0.0] * 80, [0.0]], "a tensor or an array"),
        ("music.wav", "a tensor or an array"),
    ],
)
def test_bad_context_audio_is_refused(wave, message):
    with pytest.raises(LmdError) as refused:
        streamer().start(context=wave)
    assert message in str(refused.value)


def test_poisoned_weights_are_reported_and_the_state_is_kept():
    model = random_model()
    stream = streamer(model)
    _, state = play(stream, [BASE])
    healthy = model.dit.project_out.weight.data.clone()
    model.dit.project_out.weight.data[0, 0] = float("nan")
    with pytest.raises(LmdError, match="not finite in block 1"):
        stream.step(state, BASE)
    model.dit.project_out.weight.data = healthy
    block, _ = stream.step(state, BASE)
    assert torch.isfinite(block.wave).all()


def with_codec(seed):
    return Streamer(
        random_model(), random_codec(OOBLECK, seed), streamer().text, WindowConfig(24, 6)
    )


def test_a_state_of_other_weights_is_refused(tmp_path):
    path, stream = tmp_path / "state.safetensors", with_codec(0)
    stream.save_state(play(stream, [BASE])[1], path)
    assert with_codec(0).load_state(path).index == 1
    others = {
        "model": Streamer(random_model(seed=1), stream.codec, stream.text, stream.window),
        "codec": with_codec(1),
    }
    for part, other in others.items():
        with pytest.raises(LmdError, match=f"a state of the {part} with SHA-256") as refused:
            other.load_state(path)
        found = fingerprint(stream.denoiser if part == "model" else stream.codec)
        wanted = fingerprint(other.denoiser if part == "model" else other.codec)
        assert found[:12] in refused.value.found
        assert wanted[:12] in refused.value.expected
        assert f"the {part} that it was saved with" in refused.value.todo
    with pytest.raises(LmdError, match="a state of the codec"):
        streamer().load_state(path)  # a codec without weights


def test_a_state_made_with_another_text_encoder_goes_on_with_its_own_tokens(tmp_path):
    class Other(HashTextEncoder):
        def embed(self, prompt):
            return -super().embed(prompt)

    path, stream = tmp_path / "state.safetensors", streamer()
    stream.save_state(play(stream, [BASE])[1], path)
    other = Streamer(stream.denoiser, stream.codec, Other(6, 8), stream.window)
    state = other.load_state(path)
    assert state.memory is None
    heard, _ = other.step(state, BASE)
    afresh, _ = other.step(replace(stream.load_state(path), memory=None), BASE)
    assert torch.equal(heard.latents, afresh.latents)
    assert stream.load_state(path).memory is not None


def test_a_state_that_cannot_be_written_is_refused(tmp_path):
    stream = streamer()
    with pytest.raises(LmdError, match="a file that can be written"):
        stream.save_state(stream.start(), tmp_path / "nowhere" / "state.safetensors")


def test_a_state_in_other_precision_is_refused(tmp_path):
    path, stream = tmp_path / "state.safetensors", streamer()
    stream.save_state(play(stream, [BASE])[1], path)
    with pytest.raises(LmdError, match="in the same precision"):
        streamer(random_model().to(torch.bfloat16)).load_state(path)


def test_a_state_that_names_no_weights_is_refused(tmp_path):
    """As the first version of the format wrote it."""
    path, stream = tmp_path / "state.safetensors", streamer()
    stream.save_state(play(stream, [BASE])[1], path)
    with safe_open(path, "pt") as file:
        header = json.loads(file.metadata()["lmd"])
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    del header["weights"]
    header["format"] = "lmd-stream-state-1"
    save_file(tensors, path, {"lmd": json.dumps(header)})
    with pytest.raises(LmdError, match="lmd-stream-state-1") as refused:
        stream.load_state(path)
    assert "what weights it was made with" in refused.value.expected
    assert "write it with save_state" in refused.value.todo


def test_numbers_of_numpy_are_as_good_as_python_s(tmp_path):
    path = tmp_path / "state.safetensors"
    numpys = Controls(
        prompt=(("organ", np.float64(0.5)), ("harp", np.float32(0.5))),
        cfg_scale=np.float32(1.5),
        n_steps=np.int64(2),
        block_frames=np.int32(6),
        seed=np.uint8(3),
        drop_context_frames=np.int16(6),
    )
    plain = Controls((("organ", 0.5), ("harp", 0.5)), 1.5, 2, block_frames=6, seed=3)
    plain = replace(plain, drop_context_frames=6)
    assert repr(numpys) == repr(plain)
    stream = streamer()
    expected, _ = play(stream, [plain, plain])
    blocks, state = play(stream, [numpys])
    stream.save_state(state, path)
    rest, _ = play(stream, [numpys], stream.load_state(path))
    assert torch.equal(wave_of([*blocks, *rest]), wave_of(expected))
    for value in (np.float64(2.5), np.bool_(True), np.array([2, 3])):
        with pytest.raises(LmdError, match="n_steps"):
            stream.step(state, replace(BASE, n_steps=value))


def test_a_state_of_another_model_or_no_state_at_all_is_refused(tmp_path):
    path = tmp_path / "state.safetensors"
    streamer().save_state(play(streamer(), [BASE])[1], path)
    with pytest.raises(LmdError, match="Load it with the window"):
        streamer(window=WindowConfig(12, 6)).load_state(path)
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(LmdError, match="a saved stream state"):
        streamer().load_state(path)
    with pytest.raises(LmdError, match="a saved stream state"):
        streamer().load_state(tmp_path / "missing.safetensors")
