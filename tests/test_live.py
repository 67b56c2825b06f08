"""The engine under a virtual clock: pacing, stalls, latency, refusals, faults."""

import math
import os
import random
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
import soundfile
import torch
from fake_streamer import (
    SAMPLE_RATE,
    SAMPLES_PER_FRAME,
    FakeStreamer,
    KeepingSink,
    LoudStreamer,
    VirtualClock,
    tone_hz,
)

from lmd.config import WindowConfig
from lmd.errors import LmdError
from lmd.machine import openmp_library
from lmd.play.audio_file import AudioFile
from lmd.play.control_queue import ControlQueue
from lmd.play.engine import EngineOptions, LiveEngine
from lmd.play.guard import Guarded, guarded_step, limit
from lmd.play.pace import JITTER, SAFETY_S, Made, Trouble, affordable_steps, percentile
from lmd.play.play_queue import FADE_S, PlayQueue, SkippingClock
from lmd.play.sinks import BrowserSink, NullSink, Sink, SoundCardSink
from lmd.play.takes import TakeWriter, header_of, play_again, read_take
from lmd.stream.controls import Controls
from lmd.stream.state import StreamState
from lmd.stream.streamer import Block

FRAME_S = SAMPLES_PER_FRAME / SAMPLE_RATE
BLOCK_S = 48 * FRAME_S  # 2.4 s


def play(
    cost_s: Callable[[int, Controls], float] = lambda index, controls: 0.3,
    options: EngineOptions | None = None,
    controls: Controls | None = None,
    before: Callable[[LiveEngine, VirtualClock], None] = lambda engine, clock: None,
    streamer: FakeStreamer | None = None,
) -> tuple[LiveEngine, KeepingSink, list[object]]:
    """Play to the end in virtual time, in this thread."""
    clock, events = VirtualClock(), []
    streamer = streamer or FakeStreamer(clock, cost_s)
    streamer.clock = clock
    sink = KeepingSink(clock)
    engine = LiveEngine(streamer, sink, controls, options, on_event=events.append)
    before(engine, clock)
    engine.run()
    assert engine.failure is None, engine.failure
    return engine, sink, events


def test_a_full_queue_plays_the_very_samples() -> None:
    queue = PlayQueue(2, fade_samples=10)
    wave = np.random.default_rng(0).uniform(-1, 1, (2, 1000)).astype(np.float32)
    for start in range(0, 1000, 77):
        queue.push(wave[:, start : start + 77])
    played = np.concatenate([queue.pull(33) for _ in range(25)], axis=-1)  # 825 of 1000
    assert np.array_equal(played[:, 10:], wave[:, 10:825])  # the first 10 are faded in
    assert (queue.heard, queue.silent, queue.underruns, queue.level) == (825, 0, 0, 175)


@pytest.mark.parametrize("chunk", [1, 7, 128, 2000])
def test_running_dry_fades_out_and_in_without_a_step(chunk: int) -> None:
    fade = 100
    queue = PlayQueue(1, fade)
    queue.push(np.ones((1, 700), np.float32))
    first = [queue.pull(chunk) for _ in range(math.ceil(1000 / chunk))]
    queue.push(np.ones((1, 5000), np.float32))
    second = [queue.pull(chunk) for _ in range(math.ceil(1000 / chunk))]
    played = np.concatenate(first + second, axis=-1)[0]
    # A constant of 1 makes every step a gain step: the ramp's own is 1/fade.
    assert np.abs(np.diff(played, prepend=0)).max() <= 1 / fade + 1e-6
    assert queue.underruns == 1
    assert played[:700].max() == 1.0


@pytest.mark.parametrize("asked", [True, False])
def test_what_is_held_goes_round_without_a_click_and_comes_back(asked: bool) -> None:
    """A tone whose period does not fit the loop: the gap is heard as the tone, with no step."""
    fade, hold, step = 160, 3000, 0.0613
    queue, tone = PlayQueue(1, fade, hold), np.sin(step * np.arange(9000)).astype(np.float32)[None]
    queue.push(tone[:, : 9000 if asked else 5000])
    first = queue.pull(5000 - fade)
    if asked:
        queue.hold(True)
    held = [queue.pull(128) for _ in range(100)]
    assert queue.heard == 5000
    queue.hold(False)
    if not asked:
        queue.replace(5000, tone[:, 5000:])
    again = queue.pull(2000)
    out = np.concatenate([first, *held, again], axis=-1)[0]
    middle = np.concatenate(held, axis=-1)[0, 2 * fade : -fade]
    assert np.abs(np.diff(out[fade:])).max() < 1.5 * step  # of a sine: `step` at most
    blocks = middle[: middle.size // 500 * 500].reshape(-1, 500)
    assert 0.6 < np.sqrt((blocks**2).mean(1)).min() <= np.sqrt((blocks**2).mean(1)).max() < 0.8
    assert np.array_equal(again[0, fade:], tone[0, 5000 + fade : 7000])
    assert queue.underruns == int(not asked)


def test_an_end_that_was_announced_is_no_underrun() -> None:
    queue = PlayQueue(1, 10)
    queue.push(np.ones((1, 50), np.float32))
    queue.ending = True
    queue.pull(100)
    assert (queue.underruns, queue.silent) == (0, 50)


def test_ten_minutes_paced_have_no_underrun_and_a_queue_never_under_a_quarter() -> None:
    rng = random.Random(1)

    def cost_s(index: int, controls: Controls) -> float:
        return BLOCK_S * rng.uniform(0.2, 0.9)

    engine, _, _ = play(cost_s, EngineOptions(limit_s=600))
    meters = engine.meters()
    assert meters.underruns == 0
    assert meters.silent_s == 0
    assert meters.played_s >= 600
    assert meters.lowest_s is not None
    # Measured: 0.50 of the target; a block is handed over when one of two is left.
    assert meters.lowest_s >= 0.25 * 2 * BLOCK_S


def test_every_sample_is_heard_once_and_in_order() -> None:
    _, sink, _ = play(options=EngineOptions(limit_s=30))
    heard = sink.heard()[0]
    n = heard.size
    expected = 0.25 * np.sin(2 * np.pi * tone_hz(Controls()) * np.arange(n) / SAMPLE_RATE)
    fade = round(FADE_S * SAMPLE_RATE)
    # Measured 3e-8: float32 rounding of a sine of amplitude 0.25.
    assert np.abs(heard[fade:-fade] - expected[fade:-fade]).max() < 1e-6
    assert n >= 29.9 * SAMPLE_RATE


@pytest.mark.parametrize("stall_blocks", [0.5, 1, 3])
def test_a_stall_is_counted_faded_and_over_within_two_blocks(stall_blocks: float) -> None:
    ordinary_s, stalled = 0.3, 8

    def cost_s(index: int, controls: Controls) -> float:
        return ordinary_s + (stall_blocks * BLOCK_S if index == stalled else 0)

    options = EngineOptions(queue_s=BLOCK_S, limit_s=60)  # one block of queue: every stall is heard
    engine, sink, events = play(cost_s, options)
    meters, heard = engine.meters(), sink.heard()[0]
    assert meters.underruns == 1
    troubles = [e for e in events if isinstance(e, Trouble) and e.kind == "underrun"]
    assert len(troubles) == 1
    # Silence lasts as long as the stall, less what was left in the queue.
    left_s = max(SAFETY_S, JITTER * ordinary_s)
    assert meters.silent_s == pytest.approx(stall_blocks * BLOCK_S - left_s, abs=0.01)
    # No click: the fake's sine moves by at most its slope between samples.
    slope = 0.25 * 2 * np.pi * tone_hz(Controls()) / SAMPLE_RATE
    assert np.abs(np.diff(heard)).max() <= slope + 0.25 / (FADE_S * SAMPLE_RATE) + 1e-6
    # The clock did not shift: all 60 s are heard, and take as long as they are, plus the silence.
    assert sink.queue.heard == 60 * SAMPLE_RATE
    passed_s = sink.clock.now() - ordinary_s  # since the first block was there
    assert heard.size / SAMPLE_RATE == pytest.approx(passed_s, abs=0.001)
    assert passed_s == pytest.approx(60 + meters.silent_s, abs=0.001)
    # From the second block after the stall on, the queue is as deep as before it.
    depths = [made.queued_s for made in engine.ledger.history]
    before, after = depths[4:stalled], depths[stalled + 2 : -1]
    assert after
    assert max(after) - min(before) < 0.01
    assert min(after) - max(before) > -0.01


@pytest.mark.parametrize(
    ("answer", "frames", "within_ms"), [("at once", 48, 30), ("next block", 12, 600 + 150)]
)
def test_a_change_is_heard_in_the_sample_it_was_promised_for_and_soon(
    answer: str, frames: int, within_ms: float
) -> None:
    """At once: as soon as a block is made (20 ms), whatever waits; or one block later at most."""
    rng, cost_s = random.Random(3), 0.02

    def before(engine: LiveEngine, clock: VirtualClock) -> None:
        when_s = 8.0
        for number in range(100):
            when_s += rng.uniform(1.0, 2.0)
            clock.at(when_s, lambda number=number: engine.change(seed=number + 1))

    queue_s = None if answer == "at once" else frames * FRAME_S
    options = EngineOptions(queue_s=queue_s, limit_s=165, answer=answer)
    controls = Controls(block_frames=frames)
    engine, sink, events = play(lambda index, controls: cost_s, options, controls, before)
    meters, heard = engine.meters(), sink.heard()[0]
    assert meters.n_changes == 100
    assert meters.underruns == 0
    assert meters.latency_p95_ms <= within_ms
    made = {event.number: event for event in events if isinstance(event, Made)}
    fade = round(FADE_S * SAMPLE_RATE)
    for applied in list(engine.ledger.applied)[:-1]:
        controls = made[applied.block].controls
        assert controls.seed == applied.change.number
        assert made[applied.block].is_cut == (answer == "at once")
        n = np.arange(applied.sample, applied.sample + 2 * SAMPLES_PER_FRAME)
        tone = 0.25 * np.sin(2 * np.pi * tone_hz(controls) * n / SAMPLE_RATE)
        assert np.abs(heard[n] - tone)[fade:].max() < 1e-4
        assert abs(heard[n[0] - 41 : n[0] - 1] - tone[:40]).max() > 1e-2  # and no sooner


def test_ten_minutes_of_changes_have_no_underrun_and_nothing_grows() -> None:
    """A change every half second; blocks cost a twentieth of what they last."""
    sizes = []

    def before(engine: LiveEngine, clock: VirtualClock) -> None:
        for number in range(1180):
            clock.at(8 + number / 2, lambda number=number: engine.change(seed=number + 1))
            clock.at(8 + number / 2, lambda: sizes.append(len(engine._planner.timeline._plans)))

    engine, _, _ = play(
        lambda index, controls: 0.1 * controls.block_frames / 48, EngineOptions(limit_s=600),
        before=before,
    )  # fmt: skip
    meters = engine.meters()
    assert (meters.underruns, meters.silent_s) == (0, 0)
    assert len(engine.ledger.applied) == 1024  # as many as are kept
    assert max(sizes) <= 8
    assert meters.latency_p95_ms < 60


def test_twenty_changes_in_two_seconds_are_answered_and_the_last_one_stays() -> None:
    def before(engine: LiveEngine, clock: VirtualClock) -> None:
        for number in range(20):
            clock.at(20 + number / 10, lambda number=number: engine.change(seed=number + 1))

    cost = lambda index, controls: 0.15 if controls.block_frames < 48 else 0.3  # noqa: E731
    engine, sink, events = play(cost, EngineOptions(limit_s=40), before=before)
    assert [a.change.number for a in engine.ledger.applied] == [*range(1, 21)]
    cuts = [e for e in events if isinstance(e, Made) and e.is_cut]
    assert 5 < len(cuts) < 20  # those that came while a plan was made went together
    assert cuts[-1].controls.seed == 20
    busy_s = sum(cut.made_s for cut in cuts)
    assert busy_s < 0.7 * (2 + 0.3) + 0.15
    last = engine.ledger.applied[-1].sample + round(FADE_S * SAMPLE_RATE)
    n = np.arange(last, last + 4000)
    tone = 0.25 * np.sin(2 * np.pi * tone_hz(cuts[-1].controls) * n / SAMPLE_RATE)
    assert np.abs(sink.heard()[0][n] - tone).max() < 1e-4


def test_a_machine_that_cannot_cut_in_time_says_so_and_plays_on() -> None:
    def before(engine: LiveEngine, clock: VirtualClock) -> None:
        for number in range(10):
            clock.at(30 + 4 * number, lambda number=number: engine.change(seed=number + 1))

    cost = lambda index, controls: 2.3  # noqa: E731  a block lasts 2.4 s
    options = EngineOptions(queue_s=BLOCK_S, limit_s=90)
    engine, _, _ = play(cost, options, before=before)
    assert "Changes wait for the next block" in engine.meters().advice[0]
    assert len(engine.ledger.applied) == 10
    quick, _, _ = play(lambda index, controls: 0.02, options, before=before)
    assert quick.meters().advice == ()


@pytest.mark.parametrize("commit", [6, 24])
def test_a_plan_is_made_again_when_so_much_of_it_was_played(commit: int) -> None:
    cost = lambda index, controls: 0.02  # noqa: E731
    engine, _, events = play(cost, EngineOptions(limit_s=60, commit_frames=commit))
    cuts = [e.first_sample for e in events if isinstance(e, Made) and e.is_cut]
    steps = np.diff(cuts) / SAMPLES_PER_FRAME
    assert np.median(steps) == pytest.approx(commit, abs=1)
    assert engine.meters().underruns == 0


WORKERS = """
import psutil, torch
from lmd.machine import release_idle_threads

torch.set_num_threads(2)
x = torch.ones(1000, 1000)
counts = []
for change in (lambda: x + x, release_idle_threads, lambda: x + x):
    change()
    counts.append(psutil.Process().num_threads())
print(*(count - counts[0] for count in counts))
"""


@pytest.mark.skipif(openmp_library() is None, reason="torch's threads are not GNU OpenMP's")
def test_a_thread_that_hands_its_work_over_lets_its_workers_go() -> None:
    """Idle workers of another thread would make every operation of the engine's wake its own."""
    shown = subprocess.run([sys.executable, "-c", WORKERS], capture_output=True, text=True)
    assert shown.stdout.split() == ["0", "-1", "0"], shown.stderr


@pytest.mark.parametrize(("answer", "grows_by_s"), [("at once", 0), ("next block", 2 * BLOCK_S)])
def test_the_queue_costs_latency_only_where_a_change_waits_for_the_next_block(
    answer: str, grows_by_s: float
) -> None:
    def p95(queue_s: float) -> float:
        def before(engine: LiveEngine, clock: VirtualClock) -> None:
            for number in range(50):
                clock.at(20 + number * 1.7, lambda n=number: engine.change(seed=n + 1))

        options = EngineOptions(queue_s=queue_s, limit_s=120, answer=answer)
        return play(options=options, before=before)[0].meters().latency_p95_ms or math.nan

    short, long = p95(BLOCK_S), p95(3 * BLOCK_S)
    assert long - short == pytest.approx(1e3 * grows_by_s, rel=0.1, abs=350)


def test_pausing_holds_the_sound_and_the_queue() -> None:
    def before(engine: LiveEngine, clock: VirtualClock) -> None:
        clock.at(12.0, engine.pause)
        clock.at(40.0, engine.resume)

    engine, sink, _ = play(options=EngineOptions(limit_s=30), before=before)
    meters = engine.meters()
    assert (meters.underruns, meters.silent_s) == (0, 0)
    assert sink.clock.now() >= 28 + 30  # the pause took its time and no more was made meanwhile
    assert sink.queue.heard == pytest.approx(
        engine.meters().played_s * SAMPLE_RATE, abs=SAMPLE_RATE
    )


def test_forgetting_happens_once() -> None:
    def before(engine: LiveEngine, clock: VirtualClock) -> None:
        clock.at(10.0, lambda: engine.change(drop_context_frames=96))

    engine, _, _ = play(options=EngineOptions(limit_s=40), before=before)
    forgotten = [made.controls.drop_context_frames for made in engine.ledger.history]
    assert forgotten.count(96) == 1
    assert sum(forgotten) == 96
    assert engine.control_queue.asked().drop_context_frames == 0


def test_a_block_that_is_not_finite_is_faded_and_the_stream_recovers() -> None:
    streamer = FakeStreamer()
    streamer.poison = {5, 11, 12, 13}
    engine, _, events = play(options=EngineOptions(limit_s=60), streamer=streamer)
    faults = [m.number for m in engine.ledger.history if m.fault]
    assert faults == [5, 11, 12, 13]
    assert all(math.isfinite(m.level_db) for m in engine.ledger.history)
    assert "not finite" in engine.meters().error
    assert len([e for e in events if isinstance(e, Trouble) and e.kind == "fault"]) == 4
    levels = [m.level_db for m in engine.ledger.history]
    assert -20 < levels[5] < levels[4]  # the last good block, fading
    assert levels[12] == levels[13] == -120  # then silence
    assert levels[6] == pytest.approx(levels[4], abs=0.1)
    assert levels[14] == pytest.approx(levels[4], abs=0.1)


def test_a_stream_goes_on_from_the_context_before_a_bad_block_and_after_two_from_silence() -> None:
    streamer = FakeStreamer()
    streamer.poison = {2, 5, 6}
    guarded, states = Guarded(streamer.start()), []
    for _ in range(8):
        states.append(guarded.state)
        _, guarded = guarded_step(streamer, guarded, Controls())
    assert states[3] is states[2]
    assert states[6] is states[5]
    indices = [state.index for state in [*states, guarded.state]]
    assert indices == [0, 1, 2, 2, 3, 4, 4, 0, 1]


def test_a_poisoned_block_leaves_no_step_in_the_wave() -> None:
    streamer = FakeStreamer()
    streamer.poison = {1}
    guarded, waves = Guarded(streamer.start()), []
    for _ in range(3):
        piece, guarded = guarded_step(streamer, guarded, Controls())
        waves.append(piece.wave[0, 0])
    wave = torch.cat(waves)
    slope = 0.25 * 2 * math.pi * tone_hz(Controls()) / SAMPLE_RATE
    assert float(waves[1][-1].abs()) < 1e-3
    assert float(waves[1].abs().max()) > 0.2  # the last block is heard, not cut off
    assert float(wave.diff().abs().max()) < 1.1 * slope


def test_auto_takes_fewer_steps_until_it_keeps_up_and_gives_them_back() -> None:
    slow = {"factor": 1.0}

    def cost_s(index: int, controls: Controls) -> float:
        slow["factor"] = 4.0 if 10 <= index < 30 else 1.0
        return slow["factor"] * 0.1 * controls.n_steps

    options = EngineOptions(limit_s=150, auto_steps=True)
    engine, _, _ = play(cost_s, options, Controls(n_steps=8))
    steps = [made.controls.n_steps for made in engine.ledger.history]
    assert set(steps[:10]) == {8}
    assert max(steps[12:30]) <= 5
    assert steps[-1] == 8
    fixed, _, _ = play(cost_s, replace(options, auto_steps=False), Controls(n_steps=8))
    assert engine.meters().underruns < fixed.meters().underruns


def test_a_model_that_is_too_slow_is_told_what_would_help() -> None:
    controls = Controls(n_steps=16, cfg_scale=3.0, prompt="organ", regime="enc-dec")
    engine, _, _ = play(lambda index, c: 0.2 * c.n_steps, EngineOptions(limit_s=60), controls)
    advice = " ".join(engine.meters().advice)
    assert "0.75× real time" in advice
    steps = affordable_steps(engine.ledger.history[-1])
    assert f"fewer steps: {steps} instead of 16" in advice
    assert "guidance off" in advice
    assert "block-causal" in advice
    assert engine.meters().underruns > 0
    fast, _, _ = play(lambda index, c: 0.2, EngineOptions(limit_s=60), controls)
    assert fast.meters().advice == ()


def test_fewer_steps_are_not_promised_to_do_what_they_cannot() -> None:
    """Decoding alone (made_s beyond the transformer's 70 %) takes longer than the block lasts."""
    engine, _, _ = play(lambda index, c: 9.0, EngineOptions(limit_s=30), Controls(n_steps=8))
    assert "fewer steps: 1 instead of 8 would help" in " ".join(engine.meters().advice)


def test_a_pause_is_not_counted_as_latency() -> None:
    def before(engine: LiveEngine, clock: VirtualClock) -> None:
        clock.at(20, engine.pause)
        clock.at(30, lambda: engine.change(seed=1))
        clock.at(140, engine.resume)
        clock.at(150, lambda: engine.change(seed=2))

    engine, _, _ = play(options=EngineOptions(queue_s=BLOCK_S, limit_s=60), before=before)
    assert len(engine.ledger.applied) == 2
    assert len(engine.ledger.latencies_ms()) == 1
    assert max(engine.ledger.latencies_ms()) < 3e3 * BLOCK_S


def test_a_new_text_is_encoded_beside_the_music() -> None:
    streamer, gate, threads = FakeStreamer(), threading.Event(), []
    encode = streamer.text.encode

    def slow_encode(prompts: list[str]) -> torch.Tensor:
        threads.append(threading.current_thread().name)
        if "harp" in prompts:
            assert gate.wait(20)
        return encode(prompts)

    streamer.text.encode = slow_encode  # type: ignore[method-assign]
    counts = {}

    def before(engine: LiveEngine, clock: VirtualClock) -> None:
        def ask() -> None:
            engine.change(prompt="harp", n_steps=3)
            engine.change(seed=5)

        def release() -> None:
            counts["before"] = engine.meters().n_blocks
            gate.set()
            deadline = threading.Event()
            while not engine.control_queue._is_encoded("harp"):
                deadline.wait(0.01)

        clock.at(10.0, ask)
        clock.at(30.0, release)

    engine, _, _ = play(
        options=EngineOptions(limit_s=60),
        controls=Controls(prompt="organ"),
        before=before,
        streamer=streamer,
    )
    history = list(engine.ledger.history)
    assert {m.controls.prompt for m in history[: counts["before"]]} == {"organ"}
    assert history[counts["before"] - 1].controls.seed == 5  # what needs no text did not wait
    assert history[-1].controls.prompt == "harp"
    assert engine.meters().underruns == 0
    assert threads[0] == threading.current_thread().name  # the first, before the music
    assert set(threads[1:]) == {"lmd-text"}


def test_a_text_that_fails_after_another_was_asked_for_changes_nothing() -> None:
    refused: list[str] = []

    def encode(texts: Sequence[str]) -> None:
        if "harp" in texts:
            queue.ask(0.0, prompt="lute")  # while the harp is still being read
            raise LmdError("no harp", "another text", "Try the lute.")

    queue = ControlQueue(Controls(prompt="organ"), WindowConfig(), encode, refused.append)
    queue.encode_first()
    queue.take()
    queue.ask(0.0, prompt="harp")
    queue.close()
    assert queue._worker is not None
    queue._worker.join(20)
    assert queue.asked().prompt == "lute"
    assert refused == []


def test_a_text_that_cannot_be_encoded_is_refused_and_the_old_one_plays_on() -> None:
    streamer = FakeStreamer()
    encode = streamer.text.encode

    def fussy(prompts: list[str]) -> torch.Tensor:
        if "harp" in prompts:
            raise LmdError("no harp", "another text", "Try the lute.")
        return encode(prompts)

    streamer.text.encode = fussy  # type: ignore[method-assign]

    def before(engine: LiveEngine, clock: VirtualClock) -> None:
        def settle() -> None:
            engine.change(prompt="harp")
            engine.control_queue.close()
            assert engine.control_queue._worker is not None
            engine.control_queue._worker.join(20)

        clock.at(10.0, settle)

    engine, _, events = play(
        options=EngineOptions(limit_s=30),
        controls=Controls(prompt="organ"),
        before=before,
        streamer=streamer,
    )
    assert {m.controls.prompt for m in engine.ledger.history} == {"organ"}
    assert [e.message for e in events if isinstance(e, Trouble)] == [
        "found no harp; expected another text. Try the lute."
    ]
    assert engine.control_queue.asked().prompt == "organ"


NEVER = [None, True, [], {}, object(), b"x", math.nan, math.inf, torch.ones(2), (("a", "b"),)]
NO_INT = [*NEVER, "eight", 2.5, -1]
NO_CHOICE = [*NEVER, "eight", "", 0, 2.5]
WRONG: dict[str, list[object]] = {
    "prompt": [*NEVER, 0, 2.5, "x" * 501, (("a", 0.4), ("b", 0.7)), (("a", math.nan),), [["a"]],
               tuple((str(i), 0.125) for i in range(9))],
    "cfg_scale": [*NEVER, "eight", -1, 101, 10**9],
    "n_steps": [*NO_INT, 0, 65, 10**9],
    "sampler": NO_CHOICE,
    "block_frames": [*NO_INT, 0, 7, 10**9],
    "regime": NO_CHOICE,
    "seed": [*NO_INT, 2**63],
    "drop_context_frames": [*NO_INT, 193],
    "boundary": NO_CHOICE,
    "volume": [0.5, *NEVER],
    "__class__": [dict, *NEVER],
}  # fmt: skip
RIGHT = {
    "prompt": ["organ", "", (("a", 0.25), ("b", 0.75)), [["a", 0.5], ["b", 0.5]]],
    "cfg_scale": [1, 1.5, 0.5, np.float32(2.0)],
    "n_steps": [1, 4, np.int64(8)],
    "sampler": ["euler", "dpmpp", "pingpong", "pingpong++", "euler++"],
    "block_frames": [12, 16, 24, 48, 96],
    "regime": ["full", "enc-dec", "block-causal"],
    "seed": [0, 1, 2**31],
    "drop_context_frames": [0, 48, 192],
    "boundary": ["exact", "fade"],
}
SAID = {"block_frames": "block"}  # what a refusal calls it, if not by its name


def fit_together(controls: Controls) -> bool:
    """Guidance wants a text, and the `++` samplers a scale of at most 1."""
    has_text = controls.prompt != ""
    scale = float(controls.cfg_scale)
    return (scale == 1 or has_text) and not (controls.sampler.endswith("++") and scale > 1)


def test_ten_thousand_random_changes_are_taken_if_right_and_refused_by_name_if_wrong() -> None:
    rng = random.Random(7)
    counts = {"wrong": 0, "right": 0, "together": 0}

    def ask_one(engine: LiveEngine) -> None:
        name = rng.choice(list(WRONG))
        is_wrong = name not in RIGHT or rng.random() < 0.5
        value = rng.choice(WRONG[name] if is_wrong else RIGHT[name])
        old = engine.control_queue.asked()
        fits = not is_wrong and fit_together(replace(old, **{name: value}))
        if fits:
            engine.change(**{name: value})
            now = getattr(engine.control_queue.asked(), name)
            expected = tuple(map(tuple, value)) if isinstance(value, list) else value
            assert now == expected
            assert type(now) in (int, float, str, tuple)
            counts["right"] += 1
            return
        with pytest.raises(LmdError, match="expected") as refused:
            engine.change(**{name: value})
        assert engine.control_queue.asked() == old
        if is_wrong:
            assert SAID.get(name, name) in str(refused.value)
        counts["wrong" if is_wrong else "together"] += 1

    def before(engine: LiveEngine, clock: VirtualClock) -> None:
        def ask() -> None:
            for _ in range(100):
                ask_one(engine)

        for number in range(100):
            clock.at(2.0 + 0.5 * number, ask)

    engine, _, _ = play(options=EngineOptions(limit_s=80), before=before)
    assert sum(counts.values()) == 10_000
    assert min(counts["wrong"], counts["right"]) > 3000
    assert counts["together"] > 100
    assert engine.meters().state == "stopped"
    assert len({m.controls for m in engine.ledger.history}) > 10


@pytest.mark.parametrize("ending", ["wav", "flac"])
def test_a_file_holds_what_was_streamed(tmp_path: Path, ending: str) -> None:
    path = tmp_path / f"ünïcode take.{ending}"
    engine = LiveEngine(FakeStreamer(), Sink(), options=EngineOptions(limit_s=5.0))
    engine.record(path, limit_s=5.0)
    engine.run()
    assert engine.failure is None
    samples, rate = soundfile.read(path, dtype="float32")
    assert (rate, samples.size) == (SAMPLE_RATE, 5 * SAMPLE_RATE)
    expected = 0.25 * np.sin(2 * np.pi * tone_hz(Controls()) * np.arange(samples.size) / rate)
    # wav holds the float32 samples, flac 24 bits: half a step is 6e-8.
    assert np.abs(samples - expected).max() < 2e-7


def test_a_recording_holds_what_was_heard_while_it_ran(tmp_path: Path) -> None:
    def before(engine: LiveEngine, clock: VirtualClock) -> None:
        clock.at(10.0, lambda: engine.record(tmp_path / "r.wav"))
        clock.at(30.0, engine.stop_recording)

    play(options=EngineOptions(limit_s=40), before=before)
    samples, rate = soundfile.read(tmp_path / "r.wav")
    # What was heard from then to then; the engine looks every NAP_S.
    assert samples.size / rate == pytest.approx(20, abs=2 * 0.25 + 0.3)


def test_a_recording_that_fails_ends_and_the_music_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(file: AudioFile, samples: np.ndarray) -> None:
        raise OSError("No space left on device")

    def record(engine: LiveEngine, clock: VirtualClock) -> None:
        engine.record(tmp_path / "beside.wav")
        clock.at(20.0, lambda: monkeypatch.setattr(AudioFile, "write", fail))

    engine, sink, events = play(options=EngineOptions(limit_s=40), before=record)
    told = [event for event in events if isinstance(event, Trouble)]
    assert [event.kind for event in told] == ["recording"]
    assert "No space left" in told[0].message
    assert engine.stop_recording() is None
    assert sink.report().heard_samples >= 40 * SAMPLE_RATE
    assert 0 < soundfile.info(tmp_path / "beside.wav").duration < 40


def test_a_recording_may_have_an_end_of_its_own(tmp_path: Path) -> None:
    def record(engine: LiveEngine, _clock: VirtualClock) -> None:
        engine.record(tmp_path / "beside.wav", limit_s=3.5)

    play(options=EngineOptions(limit_s=10), before=record)
    assert soundfile.info(tmp_path / "beside.wav").duration == pytest.approx(3.5, abs=1e-3)


def test_what_no_wav_file_holds_is_refused_and_what_was_written_stays(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lmd.play.audio_file.MAX_WAV_BYTES", 8 * 100)  # 100 samples of stereo
    with pytest.raises(LmdError, match=r"2 s for long.wav.*at most 1 s"):
        AudioFile(tmp_path / "long.wav", 100, 2, limit_s=2)
    assert not (tmp_path / "long.wav").exists()
    AudioFile(tmp_path / "long.flac", 100, 2, limit_s=2).close()
    file, part = AudioFile(tmp_path / "grows.wav", 100, 2), np.full((2, 60), 0.5, np.float32)
    file.write(part)
    with pytest.raises(LmdError, match="a wav file ends at 4 GiB"):
        file.write(part)
    file.close()
    assert np.array_equal(soundfile.read(tmp_path / "grows.wav")[0].T, part)


def test_what_the_disk_does_not_hold_is_refused_before_anything_is_made(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("shutil.disk_usage", lambda path: SimpleNamespace(free=1_000_000))
    with pytest.raises(LmdError, match=r"1 MB free for 3000 s.*room on the disk"):
        AudioFile(tmp_path / "long.wav", 100, 2, limit_s=3000)
    assert not (tmp_path / "long.wav").exists()
    AudioFile(tmp_path / "short.wav", 100, 2, limit_s=100).close()


def test_a_file_that_cannot_be_made_is_refused(tmp_path: Path) -> None:
    (tmp_path / "folder.wav").mkdir()
    with pytest.raises(LmdError, match=r"folder\.wav.*a file that can be written"):
        AudioFile(tmp_path / "folder.wav", 100, 1)


def test_an_engine_plays_once(tmp_path: Path) -> None:
    path, clock = tmp_path / "once.wav", VirtualClock()
    engine = LiveEngine(FakeStreamer(clock), Sink(), options=EngineOptions(limit_s=5))
    engine.record(path, limit_s=5)
    engine.run()
    before = path.read_bytes()
    for again in (engine.start, engine.run):
        with pytest.raises(LmdError, match="an engine that is 'stopped'"):
            again()
    assert path.read_bytes() == before


def test_a_pause_holds_to_the_end() -> None:
    states = []

    def hold(engine: LiveEngine, clock: VirtualClock) -> None:
        engine.on_event = lambda event: states.append(getattr(event, "state", None))
        clock.at(0.1, engine.pause)  # before the queue is full
        clock.at(60.0, engine.resume)

    engine, sink, _ = play(options=EngineOptions(limit_s=4, queue_s=9.0), before=hold)
    assert [state for state in states if state] == ["priming", "paused", "playing", "stopped"]
    assert engine.sink.clock.now() >= 64
    assert sink.report().heard_samples >= 4 * SAMPLE_RATE


def test_what_a_bad_block_would_have_carried_is_heard_with_the_next() -> None:
    asked: list[int] = []

    class Watched(FakeStreamer):
        def step(self, state: StreamState, controls: Controls) -> tuple[Block, StreamState]:
            asked.append(controls.drop_context_frames)
            return super().step(state, controls)

    clock = VirtualClock()
    streamer = Watched(clock, lambda index, controls: 0.3)
    streamer.poison = {5}
    changes = []

    def watch(engine: LiveEngine, _clock: VirtualClock) -> None:
        def follow(event: object) -> None:
            if isinstance(event, Made) and event.number == 4:
                changes.append(engine.change(drop_context_frames=96, seed=7))

        engine.on_event = follow

    engine, _, _ = play(options=EngineOptions(limit_s=30), before=watch, streamer=streamer)
    assert [made.number for made in engine.ledger.history if made.fault] == [5]
    assert asked[5:8] == [96, 96, 0]
    assert [(p.change, p.block) for p in engine.ledger.applied] == [(changes[0], 6)]


def test_more_steps_are_taken_at_once_where_the_machine_has_the_time() -> None:
    def ask(engine: LiveEngine, clock: VirtualClock) -> None:
        clock.at(12.0, lambda: engine.change(n_steps=16))

    options = EngineOptions(limit_s=60, auto_steps=True)
    engine, _, _ = play(
        lambda index, controls: 0.01 * controls.n_steps,
        options,
        Controls(prompt="organ", n_steps=2),
        before=ask,
    )
    steps = [made.controls.n_steps for made in engine.ledger.history]
    assert set(steps) == {2, 16}
    assert steps == sorted(steps)


def test_nothing_can_be_recorded_after_the_end(tmp_path: Path) -> None:
    engine = LiveEngine(FakeStreamer(), NullSink(VirtualClock()), options=EngineOptions(limit_s=2))
    engine.record(tmp_path / "whole.wav")
    engine.run()
    assert engine.stop_recording() is None  # finished with the stream
    assert soundfile.info(tmp_path / "whole.wav").duration >= 2
    with pytest.raises(LmdError, match="a stream that has ended"):
        engine.record(tmp_path / "late.wav")
    assert not (tmp_path / "late.wav").exists()


def test_a_prompt_of_before_the_start_is_encoded_before_it_plays() -> None:
    encoded: list[str] = []
    queue = ControlQueue(Controls(prompt="a"), WindowConfig(), encoded.extend, print)
    queue.ask(0.0, prompt="b")
    queue.encode_first()
    queue.ask(0.0, prompt="c")
    assert queue.take()[0].prompt in encoded
    queue.close()


def test_an_encoder_that_breaks_is_told_and_the_next_text_is_encoded() -> None:
    told: list[str] = []
    heard = threading.Event()

    def encode(texts: tuple[str, ...]) -> None:
        if texts == ("bad",):
            raise RuntimeError("no memory left")
        heard.set()

    streamer = FakeStreamer()
    queue = ControlQueue(Controls(prompt="organ"), streamer.window, encode, told.append)
    queue.encode_first()
    heard.clear()
    queue.ask(0.0, prompt="bad")
    queue.ask(0.0, seed=1)
    wait_until = time.monotonic() + 20
    while not told and time.monotonic() < wait_until:
        time.sleep(0.01)
    assert told == ["RuntimeError: no memory left"]
    assert queue.asked() == Controls(prompt="organ", seed=1)
    queue.ask(0.0, prompt="good")
    assert heard.wait(20)
    queue.close()


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda folder: AudioFile(folder / "x.mp3", 8000, 1), ".wav or .flac"),
        (lambda folder: AudioFile(folder / "no" / "x.wav", 8000, 1), "existing folder"),
        (lambda folder: EngineOptions(queue_s=-1), "0 or more"),
        (lambda folder: EngineOptions(limit_s=True), "0 or more"),
        (lambda folder: LiveEngine(FakeStreamer(), NullSink(), Controls(n_steps=65)), "1 to 64"),
    ],
)
def test_what_cannot_be_is_refused_with_what_to_do(
    tmp_path: Path, make: Callable[[Path], object], said: str
) -> None:
    with pytest.raises(LmdError, match=said):
        make(tmp_path)


def test_a_missing_sound_card_library_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "sounddevice", None)
    with pytest.raises(LmdError, match="pip install sounddevice"):
        SoundCardSink()


class SoundCard(ModuleType):
    """The library `sounddevice` as the sink uses it; the test is the card that asks for samples."""

    class PortAudioError(Exception):
        pass

    def __init__(self) -> None:
        super().__init__("sounddevice")
        self.streams: list[SoundCard.OutputStream] = []
        card = self

        class OutputStream:
            def __init__(self, **options: Any) -> None:
                if options["device"] == "broken":
                    raise card.PortAudioError("Invalid sample rate")
                self.options, self.active, self.closed = options, False, False
                card.streams.append(self)

            def start(self) -> None:
                self.active = True

            def stop(self) -> None:
                self.active = False

            def close(self) -> None:
                self.active, self.closed = False, True

            def ask_for(self, n: int) -> np.ndarray:
                assert self.active
                out = np.full((n, self.options["channels"]), np.nan, self.options["dtype"])
                self.options["callback"](out, n, None, None)
                return out

        self.OutputStream = OutputStream


@pytest.fixture
def card(monkeypatch: pytest.MonkeyPatch) -> SoundCard:
    made = SoundCard()
    monkeypatch.setitem(sys.modules, "sounddevice", made)
    return made


def test_a_sound_card_gets_the_very_samples_silence_when_they_run_out_and_is_released(
    card: SoundCard,
) -> None:
    sink = SoundCardSink(device=3)
    sink.hold_s = 0  # silence, then
    sink.open(SAMPLE_RATE, 2)
    (stream,) = card.streams
    assert {k: stream.options[k] for k in ("samplerate", "channels", "device")} == {
        "samplerate": SAMPLE_RATE, "channels": 2, "device": 3,
    }  # fmt: skip
    wave = np.random.default_rng(1).uniform(-1, 1, (2, 1000)).astype(np.float32)
    sink.write(wave)
    assert not stream.active  # primed before it sounds
    assert sink.queued_s() == 1000 / SAMPLE_RATE
    sink.run(True)
    fade = round(FADE_S * SAMPLE_RATE)
    played = np.concatenate([stream.ask_for(100) for _ in range(8)])
    assert np.array_equal(played[fade:], wave[:, fade:800].T)
    assert sink.queued_s() == 200 / SAMPLE_RATE
    sink.run(False)
    assert not stream.active
    sink.run(True)
    assert np.array_equal(stream.ask_for(300)[200:], np.zeros((100, 2), np.float32))
    report = sink.report()
    assert (report.heard_samples, report.silent_samples, report.underruns) == (1000, 100, 1)
    sink.write(wave)
    sink.finish()
    stream.ask_for(1200)
    assert sink.report().underruns == 1  # the end is none
    sink.close()
    assert stream.closed


def test_a_stream_plays_on_a_sound_card_and_ends_with_its_card_released(card: SoundCard) -> None:
    sink = SoundCardSink()
    options = EngineOptions(limit_s=3, queue_s=1.0)
    engine = LiveEngine(FakeStreamer(), sink, Controls(block_frames=12), options)
    engine.start()
    heard, deadline = [], time.monotonic() + 20
    while not engine.wait(0.001):
        assert time.monotonic() < deadline
        if card.streams and card.streams[0].active:
            heard.append(card.streams[0].ask_for(400)[:, 0])
    engine.stop()
    assert card.streams[0].closed
    samples = np.concatenate(heard)[: 3 * SAMPLE_RATE]
    expected = 0.25 * np.sin(2 * np.pi * tone_hz(Controls(block_frames=12)) / SAMPLE_RATE
                             * np.arange(samples.size))  # fmt: skip
    sound = slice(round(FADE_S * SAMPLE_RATE), SAMPLE_RATE // 2)
    assert np.abs(samples[sound] - expected[sound]).max() < 1e-6


def test_a_device_that_refuses_fails_the_stream_with_what_to_do(card: SoundCard) -> None:
    engine = LiveEngine(FakeStreamer(), SoundCardSink(device="broken"))
    engine.run()
    assert isinstance(engine.failure, LmdError)
    assert engine.meters().state == "failed"
    assert "refuses 8000 Hz × 1 (Invalid sample rate)" in engine.meters().error
    assert "Name another device" in engine.meters().error


def test_a_failing_streamer_ends_the_stream_and_says_so() -> None:
    class Broken(FakeStreamer):
        def step(self, state: object, controls: Controls) -> object:  # type: ignore[override]
            raise ZeroDivisionError("a bug")

    engine = LiveEngine(Broken(), NullSink(VirtualClock()))
    engine.start()
    assert engine.wait(20)
    with pytest.raises(RuntimeError, match="live engine failed") as caught:
        engine.stop()
    assert isinstance(caught.value.__cause__, ZeroDivisionError)
    assert engine.meters().state == "failed"
    assert "a bug" in engine.meters().error


def test_a_thread_in_real_time_plays_and_stops() -> None:
    engine = LiveEngine(FakeStreamer(), NullSink(), Controls(block_frames=1))
    seen = threading.Event()
    engine.on_event = lambda event: seen.set() if isinstance(event, Made) else None
    engine.start()
    assert seen.wait(10)
    engine.stop()
    assert engine.wait(0)
    assert engine.meters().state == "stopped"


def test_the_skipping_clock_counts_computing_and_skips_waiting() -> None:
    clock = SkippingClock()
    began = time.perf_counter()
    engine = LiveEngine(FakeStreamer(), NullSink(clock), options=EngineOptions(limit_s=120))
    engine.run()
    took_s, ahead_s = time.perf_counter() - began, clock.now() - time.perf_counter()
    assert engine.meters().played_s >= 120
    assert took_s + ahead_s >= 119  # what was not waited for was skipped


class Page:
    """A browser page as the sink sees it: it plays by the clock and reports when told to."""

    def __init__(self, clock: VirtualClock) -> None:
        self.sink = BrowserSink(self.receive, clock, patience_s=20.0)
        self.clock, self.speaks, self.messages = clock, True, []
        self.queue, self.running, self.at_s = PlayQueue(1, 160), False, 0.0

    def receive(self, message: dict, buffers: list[bytes]) -> None:
        self.messages.append(message["kind"])
        self.play()
        if message["kind"] == "open":
            self.queue = PlayQueue(1, 160)
        elif message["kind"] == "audio":
            self.queue.push(np.frombuffer(buffers[0], "<i2").reshape(-1, 1).T / np.float32(32767))
        elif message["kind"] == "run":
            self.running, self.at_s = message["running"], self.clock.now()

    def play(self) -> None:
        due = int((self.clock.now() - self.at_s) * SAMPLE_RATE)
        if self.running and due > 0:
            self.queue.pull(due)
            self.at_s += due / SAMPLE_RATE

    def report(self) -> None:
        self.play()
        self.clock.at(self.clock.now() + 0.2, self.report)
        if self.speaks:
            q = self.queue
            counters = {"heard": q.heard, "silent": q.silent, "underruns": q.underruns}
            self.sink.on_report({"epoch": self.sink.epoch, "lowest": 0, **counters})


def play_to(page: Page, limit_s: float) -> LiveEngine:
    options = EngineOptions(limit_s=limit_s)
    engine = LiveEngine(FakeStreamer(page.clock), page.sink, options=options)
    page.clock.at(0.0, page.report)
    engine.run()
    assert engine.failure is None, engine.failure
    return engine


def test_a_page_is_fed_by_its_reports() -> None:
    page = Page(VirtualClock())
    play_to(page, 120)
    assert page.queue.underruns == 0
    assert page.queue.heard == pytest.approx(120 * SAMPLE_RATE, rel=0.03)


def test_a_kernel_too_busy_to_read_reports_goes_on_feeding() -> None:
    page = Page(VirtualClock())
    page.clock.at(30.0, lambda: setattr(page, "speaks", False))
    page.clock.at(45.0, lambda: setattr(page, "speaks", True))
    play_to(page, 120)
    assert page.queue.underruns == 0


def test_a_page_that_is_gone_is_not_fed_for_ever_and_may_come_back() -> None:
    page, levels = Page(VirtualClock()), []
    page.clock.at(30.0, lambda: (setattr(page, "speaks", False), setattr(page, "running", False)))
    page.clock.at(300.0, lambda: levels.append(page.sink.queued_s() == math.inf))
    page.clock.at(300.0, lambda: levels.append(page.messages.count("audio")))

    def back() -> None:
        page.speaks, page.running, page.at_s = True, True, page.clock.now()

    page.clock.at(301.0, back)
    engine = play_to(page, 90)
    assert levels[0] is True
    # 30 s heard, 20 s of patience, a queue of two blocks.
    assert levels[1] * BLOCK_S < 30 + 20 + 3 * BLOCK_S
    assert engine.meters().played_s >= 90


@pytest.mark.parametrize(
    "message",
    [
        {},
        {"epoch": 1, "heard": "1", "silent": 0, "underruns": 0, "lowest": 0},
        {"epoch": 1, "heard": -1, "silent": 0, "underruns": 0, "lowest": 0},
        {"epoch": 1, "heard": math.nan, "silent": 0, "underruns": 0, "lowest": 0},
        {"epoch": 0, "heard": 500, "silent": 0, "underruns": 0, "lowest": 0},
    ],
)
def test_nonsense_from_a_page_is_ignored(message: dict) -> None:
    sink = BrowserSink(lambda message, buffers: None, VirtualClock())
    sink.open(SAMPLE_RATE, 1)
    sink.write(np.zeros((1, 1000), np.float32))
    sink.on_report(message)
    assert sink.queued_s() == 1000 / SAMPLE_RATE


def test_a_report_of_the_last_take_does_not_count_for_the_next_one() -> None:
    late = {"epoch": 3, "heard": 5000, "silent": 0, "underruns": 2, "lowest": 0}
    sink = BrowserSink(lambda message, buffers: None, VirtualClock())
    sink.epoch = 3  # as the player hands it on
    sink.on_report(late)  # the page still plays the last take
    sink.open(SAMPLE_RATE, 1)
    sink.on_report(late)
    sink.write(np.zeros((1, 1000), np.float32))
    assert sink.queued_s() == 1000 / SAMPLE_RATE
    assert sink.report().underruns == 0


def test_percentiles_are_values_that_occurred() -> None:
    values = [float(x) for x in range(1, 101)]
    assert percentile(values, 50) == 50
    assert percentile(values, 95) == 95
    assert percentile([7.0], 95) == 7.0
    assert percentile([], 95) is None


def test_the_limiter_leaves_what_is_not_too_loud_alone_to_the_bit() -> None:
    wave = torch.rand(1, 2, 5000) * 2 - 1
    wave[0, 0, 100] = 1.0
    limited, gain_db = limit(wave, 0.0, SAMPLE_RATE)
    assert torch.equal(limited, wave)
    assert gain_db == 0


@pytest.mark.parametrize("cuts", [[1], [777], [1000, 1001, 6000]])
def test_the_limiter_holds_full_scale_wherever_the_stream_is_cut(cuts: list[int]) -> None:
    t = torch.arange(6 * SAMPLE_RATE) / SAMPLE_RATE
    swell = torch.where((t > 0.3) & (t < 0.6), 16.0, 0.9)  # and back to less than full scale
    wave = (swell * torch.sin(2 * math.pi * 220 * t)).expand(1, 2, -1)
    whole, _ = limit(wave, 0.0, SAMPLE_RATE)
    assert float(whole.abs().max()) <= 1
    quiet, back = slice(0, int(0.3 * SAMPLE_RATE)), slice(round(5.5 * SAMPLE_RATE), None)
    assert torch.equal(whole[..., quiet], wave[..., quiet])
    assert torch.equal(whole[..., back], wave[..., back])  # the gain is exactly 1 again
    gain_db, parts = 0.0, []
    for part in wave.tensor_split(cuts, dim=-1):
        limited, gain_db = limit(part, gain_db, SAMPLE_RATE)
        parts.append(limited)
    # Measured 1e-7: the gain's rounding depends on where the counting begins.
    assert float((torch.cat(parts, dim=-1) - whole).abs().max()) < 1e-6


def test_a_stream_that_is_too_loud_is_turned_down_and_says_what_would_help() -> None:
    streamer = LoudStreamer()

    def quieter(engine: LiveEngine, clock: VirtualClock) -> None:
        clock.at(20.0, lambda: advice.extend(engine.meters().advice))
        clock.at(20.0, lambda: setattr(streamer, "factor", 1.0))

    advice: list[str] = []
    engine, sink, _ = play(options=EngineOptions(limit_s=60), before=quieter, streamer=streamer)
    assert np.abs(sink.heard()).max() <= 1
    assert any("12 dB over full scale" in line for line in advice)
    history = list(engine.ledger.history)
    assert history[0].limited_db == pytest.approx(20 * math.log10(4), abs=0.01)
    assert history[-1].limited_db == engine.meters().limited_db == 0
    assert not any("full scale" in line for line in engine.meters().advice)


def test_cores_that_are_taken_away_let_the_engine_go_on_with_one_thread(tmp_path: Path) -> None:
    """Threads that wait for each other, while something else computes: a hundred times as slow."""
    threads = []

    def cost_s(index: int, controls: Controls) -> float:
        threads.append(torch.get_num_threads())
        return 2.0 if index >= 20 and threads[-1] > 1 else 0.02

    streamer, path, before = FakeStreamer(), tmp_path / "take.jsonl", torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        writer = TakeWriter(path, header_of(streamer, "fake"))
        engine, _, events = play(
            cost_s, EngineOptions(limit_s=100), streamer=None, before=with_take(writer)
        )
        assert torch.get_num_threads() == 2  # afterwards as before
        assert threads.index(1) == 22  # two such blocks in a row are enough
        assert set(threads[22:]) == {1}
        assert engine.meters().underruns == 0
        assert [e.kind for e in events if isinstance(e, Trouble)] == ["threads"]
        take = read_take(path)
        assert take.threads == {22: 1}
        threads.clear()
        again = FakeStreamer(None, cost_s)
        assert sum(samples.shape[-1] for samples in play_again(take, again)) == take.n_samples
        assert threads.index(1) == 22
    finally:
        torch.set_num_threads(before)


def with_take(writer: TakeWriter) -> Callable[[LiveEngine, VirtualClock], None]:
    return lambda engine, clock: setattr(engine, "take", writer)


ORDERS = {"lmd first": "import lmd, torch", "torch first": "import torch, lmd"}


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("given", [True, False])
def test_what_starts_a_kernel_limits_how_long_threads_spin(order: str, given: bool) -> None:
    """`lmd run` and `make lab` hand the limit on; alone it holds where lmd is imported first."""
    environment = {k: v for k, v in os.environ.items() if k != "GOMP_SPINCOUNT"}
    if given:
        makefile = (Path(__file__).parent.parent / "Makefile").read_text()
        assert "export GOMP_SPINCOUNT ?= 10000" in makefile
        environment["GOMP_SPINCOUNT"] = "10000"
    code = f"{ORDERS[order]}, os; print(lmd.SPIN_IS_LIMITED, os.environ['GOMP_SPINCOUNT'])"
    shown = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=True
    )
    assert shown.stdout.split() == [str(given or order == "lmd first"), "10000"]


INTERRUPTED = """
import signal, sys, threading
from fake_streamer import FakeStreamer
from lmd.play.engine import LiveEngine
from lmd.play.play_queue import SkippingClock
from lmd.play.sinks import NullSink

signal.signal(signal.SIGINT, signal.default_int_handler)
engine = LiveEngine(FakeStreamer(cost_s=lambda *_: 0), NullSink(SkippingClock()))
engine.start()
main_thread = threading.main_thread().ident
threading.Timer(0.2, lambda: signal.pthread_kill(main_thread, signal.SIGINT)).start()
try:
    engine.wait(200)
except KeyboardInterrupt:
    print(engine.wait(0), end=" ")
    engine.stop()
    print(engine.wait(0), engine.meters().state)
"""


def test_an_engine_can_be_waited_for_through_an_interrupt() -> None:
    """Python 3.11 takes a thread for ended whose `join` a signal interrupts: no `join` then."""
    tests = str(Path(__file__).parent)  # in a process of its own: an interrupt may be late
    shown = subprocess.run(
        [sys.executable, "-c", INTERRUPTED],
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONPATH": tests},
        check=True,
    )
    assert shown.stdout.split() == ["False", "True", "stopped"]


@pytest.mark.parametrize("is_limited", [True, False])
def test_an_underrun_names_the_import_that_lets_threads_spin(
    is_limited: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lmd.SPIN_IS_LIMITED", is_limited)
    cost = lambda index, controls: 8.0 if index == 6 else 0.2  # noqa: E731
    _, _, events = play(cost, EngineOptions(limit_s=40))
    (trouble,) = [event for event in events if isinstance(event, Trouble)]
    assert "One block came late" in trouble.message
    assert ("Import lmd before torch" in trouble.message) == (not is_limited)
