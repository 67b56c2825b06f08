"""Cuts into what is planned: where they go back to, what is heard of them, what a take keeps."""

import random
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from engine import streamer
from fake_streamer import SAMPLE_RATE, SAMPLES_PER_FRAME, FakeStreamer, tone_hz
from hypothesis import given, settings
from hypothesis import strategies as st

from lmd.checkpoint import load_codec
from lmd.codec.spectral import SpectralCodec
from lmd.config import WindowConfig
from lmd.errors import LmdError
from lmd.model.dit import Condition
from lmd.model.text import HashTextEncoder
from lmd.play.guard import Guarded
from lmd.play.play_queue import FADE_S, crossfaded
from lmd.play.takes import SampleHash, TakeWriter, header_of, play_again, read_take
from lmd.play.timeline import Timeline
from lmd.pretrained import SHIPPED
from lmd.rng import normal
from lmd.stream.controls import Controls
from lmd.stream.streamer import Streamer


def timeline_of(made: Streamer) -> Timeline:
    return Timeline(made, Guarded(made.start()))


class Held:
    """A denoiser that always plays the same frame: a held tone."""

    device = torch.device("cpu")
    memory = None

    def __init__(self, frame: torch.Tensor) -> None:
        self.frame, self.latent_dim = frame, frame.shape[1]

    def condition(self, prompt_tokens, seconds):
        return Condition(prompt_tokens, prompt_tokens)

    null_condition = None

    def open_block(self, context, condition, plan, memory):
        return self

    def __call__(self, noisy, t):
        return (noisy - self.frame.expand_as(noisy)) / t


@pytest.fixture(scope="module")
def held() -> tuple[torch.Tensor, SpectralCodec]:
    """A frame of a tone of three partials, and the shipped codec that plays it."""
    codec = load_codec(SHIPPED / "codec.safetensors")
    t = torch.arange(80 * codec.samples_per_frame) / codec.sample_rate
    tone = sum(0.2 * torch.sin(2 * torch.pi * hz * t) for hz in (220.0, 440.0, 1320.0))
    return codec.encode(tone[None, None])[..., 40:41], codec


def with_cuts(made: Streamer, n_cuts: int, seed: int = 0) -> tuple[np.ndarray, list[int]]:
    """What is heard of a stream that is cut at random places, and where it was cut."""
    rng, timeline, heard, cuts = random.Random(seed), timeline_of(made), [], []
    controls, short = Controls(n_steps=1), Controls(n_steps=1, block_frames=16)
    hop = made.codec.samples_per_frame
    while len(cuts) < n_cuts:
        while timeline.n_samples - timeline.n_settled < 60 * hop:
            timeline.append(controls)
        sample = timeline.n_settled + rng.randrange(1, 12 * hop)
        timeline.cut(sample, short)
        cuts.append(sample)
        heard.append(timeline.settle(sample + rng.randrange(1, 9 * hop))[1])
    heard.append(timeline.settle(timeline.n_samples)[1])
    return np.concatenate(heard, axis=-1)[0], cuts


class Wandering(Held):
    """Every plan is a little other than the one before, by `by`."""

    def __init__(self, frame: torch.Tensor, by: float) -> None:
        super().__init__(frame)
        self.by, self.n_plans = by, 0

    def open_block(self, context, condition, plan, memory):
        self.n_plans += 1
        return Held(self.frame + self.by * normal(tuple(self.frame.shape), self.n_plans, "plan"))


def windows_at(wave: np.ndarray, places: list[int], rate: int) -> np.ndarray:
    """What is heard around the middle of the fades at these places, `[place, sample]`."""
    inside = [p + round(FADE_S * rate) // 2 for p in places if 2 * rate < p < wave.size - rate]
    return np.stack([wave[p - 256 : p + 256] for p in inside])


def test_a_held_tone_keeps_its_level_through_two_hundred_cuts_and_shows_no_line(held) -> None:
    """Against the same places of a stream whose plans differ as much and that is not cut."""
    tone, codec = held
    made = Streamer(Wandering(tone, 0.05), codec, HashTextEncoder(4, 8), WindowConfig(192, 48))
    cut, places = with_cuts(made, 200)
    uncut = timeline_of(made)
    while uncut.n_samples < cut.size:
        uncut.append(Controls(n_steps=1))
    plain = uncut.settle(cut.size)[1][0]

    def level_db(parts: np.ndarray) -> np.ndarray:
        return 10 * np.log10((parts**2).mean(1))

    def line_db(parts: np.ndarray) -> np.ndarray:
        """Energy above the partials, where a broken phase shows as a line in a spectrogram."""
        power = np.abs(np.fft.rfft(parts * np.hanning(parts.shape[1]))) ** 2
        hz = np.fft.rfftfreq(parts.shape[1], 1 / codec.sample_rate)
        return 10 * np.log10(power[:, hz > 3000].sum(1) / power.sum(1) + 1e-12)

    at_cuts, elsewhere = (windows_at(wave, places, codec.sample_rate) for wave in (cut, plain))
    assert abs(np.median(level_db(at_cuts)) - np.median(level_db(elsewhere))) < 1.0
    assert np.percentile(level_db(at_cuts), 5) > np.percentile(level_db(elsewhere), 5) - 1.0
    assert np.percentile(line_db(at_cuts), 95) < np.percentile(line_db(elsewhere), 95) + 3.0


def test_no_click_at_two_hundred_cuts_into_other_music(held) -> None:
    """Second differences in the fades against those between them; measured 1.2 and 1.05."""
    tone, codec = held
    made = Streamer(Wandering(tone, 0.3), codec, HashTextEncoder(4, 8), WindowConfig(192, 48))
    wave, places = with_cuts(made, 200)
    between = [(a + b) // 2 for a, b in pairwise(places) if b - a > 4096]
    at_cuts, elsewhere = (
        np.abs(np.diff(windows_at(wave, some, codec.sample_rate), 2)).max(1)
        for some in (places, between)
    )
    assert np.median(at_cuts) < 1.5 * np.median(elsewhere)
    assert np.percentile(at_cuts, 95) < 1.5 * np.percentile(elsewhere, 95)


@settings(max_examples=40, deadline=None)
@given(
    cuts=st.lists(st.tuples(st.integers(0, 9000), st.integers(0, 6000)), min_size=1, max_size=8),
    block=st.sampled_from([4, 12, 48]),
)
def test_what_is_heard_is_the_old_before_a_cut_and_the_new_after_its_fade(cuts, block) -> None:
    fake = FakeStreamer()
    timeline, heard, expected = timeline_of(fake), [], []
    fade = round(FADE_S * SAMPLE_RATE)
    for number, (ahead, then) in enumerate(cuts):
        controls = Controls(block_frames=block, seed=number)
        while timeline.n_samples - timeline.n_settled <= ahead:
            timeline.append(Controls(block_frames=block))
        sample = timeline.n_settled + ahead
        plan = timeline.cut(sample, controls)
        assert plan.cut_frame == sample // SAMPLES_PER_FRAME
        n = min(then, timeline.n_samples - sample)
        expected.append((sample, n, tone_hz(controls)))
        heard.append(timeline.settle(sample + n)[1])
    wave = np.concatenate(heard, axis=-1)[0]
    for (sample, n, hz), following in zip(expected, [*expected[1:], None], strict=True):
        end = sample + n if following is None else min(sample + n, following[0])
        t = np.arange(sample + fade, end) / SAMPLE_RATE
        assert (
            np.abs(wave[sample + fade : end] - 0.25 * np.sin(2 * np.pi * hz * t)).max(initial=0)
            < 1e-5
        )


def test_cuts_that_cannot_be_made_are_refused_and_the_plan_stays() -> None:
    timeline = timeline_of(FakeStreamer())
    timeline.append(Controls())
    timeline.settle(5000)
    planned = timeline.n_samples
    for sample in (4999, planned, planned + 10):
        with pytest.raises(LmdError, match="5000 to 19200, what is planned and not heard"):
            timeline.cut(sample, Controls(seed=1))
    assert timeline.n_samples == planned
    assert timeline.settle(planned)[1].shape[-1] == planned - 5000


def test_a_cut_whose_block_has_a_fault_leaves_the_plan_as_it_was() -> None:
    fake = FakeStreamer()
    timeline = timeline_of(fake)
    timeline.append(Controls())
    before, fake.poison = timeline.n_samples, {1}
    assert timeline.cut(7000, Controls(seed=1)).played.fault is not None
    assert timeline.n_samples == before
    t = np.arange(before) / SAMPLE_RATE
    heard = timeline.settle(before)[1][0]
    assert np.abs(heard - 0.25 * np.sin(2 * np.pi * tone_hz(Controls()) * t)).max() < 1e-5


@pytest.mark.parametrize("boundary", ["exact", "fade"])
def test_a_take_with_cuts_replays_to_the_same_samples(tmp_path: Path, boundary: str) -> None:
    made, rng = streamer(), random.Random(4)
    timeline, writer = timeline_of(made), TakeWriter(tmp_path / "t.jsonl", header_of(made, "here"))
    hop, n_cuts = made.codec.samples_per_frame, 0
    for step in range(60):
        drawn = {"block_frames": rng.choice([6, 12]), "seed": rng.randrange(3)}
        drawn["drop_context_frames"] = rng.choice([0, 0, 6])
        controls = Controls(n_steps=2, boundary=boundary, **drawn)
        waiting = timeline.n_samples - timeline.n_settled
        if waiting > 8 * hop and rng.random() < 0.6:
            timeline.cut(timeline.n_settled + rng.randrange(1, waiting), controls)
            n_cuts += 1
        else:
            timeline.append(controls)
        if step % 3 == 0:
            waiting = timeline.n_samples - timeline.n_settled
            writer.heard(*timeline.settle(timeline.n_settled + rng.randrange(waiting + 1)))
    writer.heard(*timeline.settle(timeline.n_settled + 3))
    writer.close()
    assert n_cuts > 10
    take, digest = read_take(writer.path), SampleHash()
    for samples in play_again(take, streamer()):
        digest.update(samples)
    assert take.cuts
    assert digest.hexdigest() == take.sha256
    # What was planned and never heard does not stand in it.
    assert take.n_blocks < 60


def test_a_crossfade_keeps_the_power_of_what_is_equal_and_of_what_is_not() -> None:
    noise = np.random.default_rng(0).standard_normal((2, 200_000)).astype(np.float32)
    same = crossfaded(noise[:1], noise[:1])
    other = crossfaded(noise[:1], noise[1:])
    opposite = crossfaded(noise[:1], -noise[:1])
    for mixed in (same, other):
        power = (mixed.reshape(-1, 2000) ** 2).mean(1)
        assert power == pytest.approx(1, abs=0.15)
    assert np.isfinite(opposite).all()
