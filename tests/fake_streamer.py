"""A streamer in closed form and a clock that obeys: real-time behaviour without real time."""

import heapq
import itertools
import math
import threading
import zlib
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import torch

from lmd.codec.base import DecodeState
from lmd.config import WindowConfig
from lmd.model.text import HashTextEncoder
from lmd.play.sinks import NullSink
from lmd.stream.controls import Controls
from lmd.stream.streamer import Block, Streamer, StreamState

SAMPLE_RATE, SAMPLES_PER_FRAME = 8000, 400  # 20 latent frames a second


class VirtualClock:
    """Time that passes only when somebody sleeps or spends it; things can be arranged for later."""

    def __init__(self) -> None:
        self._now = 0.0
        self._later: list[tuple[float, int, Callable[[], object]]] = []
        self._order = itertools.count()

    def now(self) -> float:
        return self._now

    def at(self, when_s: float, what: Callable[[], object]) -> None:
        heapq.heappush(self._later, (when_s, next(self._order), what))

    def spend(self, seconds: float, wake: threading.Event | None = None) -> None:
        until = self._now + seconds
        while self._later and self._later[0][0] <= until:
            when_s, _, what = heapq.heappop(self._later)
            self._now = max(self._now, when_s)
            what()
            if wake is not None and wake.is_set():
                return
        self._now = max(self._now, until)

    def sleep(self, seconds: float, wake: threading.Event) -> None:
        self.spend(max(seconds, 1e-6), wake)


class KeepingSink(NullSink):
    """Plays to a test."""

    def open(self, sample_rate: int, channels: int) -> None:
        super().open(sample_rate, channels)
        self.kept, pull = [], self.queue.pull

        def keep(n: int) -> np.ndarray:
            self.kept.append(pull(n))
            return self.kept[-1]

        self.queue.pull = keep  # type: ignore[method-assign]

    def heard(self) -> np.ndarray:
        """Everything played so far, silence and fades included, `[channel, sample]`."""
        self.report()
        return np.concatenate(self.kept, axis=-1)


class FakeCodec:
    sample_rate, samples_per_frame, channels, latent_dim = SAMPLE_RATE, SAMPLES_PER_FRAME, 1, 2
    lookback_frames = lookahead_frames = 0

    def decode(self, latents: torch.Tensor) -> torch.Tensor:
        return torch.zeros(len(latents), 1, latents.shape[-1] * SAMPLES_PER_FRAME)


def tone_hz(controls: Controls) -> float:
    """Which tone the fake plays under these controls: any change moves it."""
    text = repr(replace(controls, drop_context_frames=0))
    return 200.0 + zlib.crc32(text.encode()) % 800


class FakeStreamer(Streamer):
    """Plays a sine whose pitch tells the controls; a block costs what `cost_s` says.

    `cost_s(index, controls)` seconds are spent on the clock while the block is made;
    `poison` holds calls (counted from 0) whose latents are NaN.
    """

    def __init__(
        self,
        clock: VirtualClock | None = None,
        cost_s: Callable[[int, Controls], float] = lambda index, controls: 0.1,
    ) -> None:
        self.clock, self.cost_s = clock, cost_s
        self.codec, self.text = FakeCodec(), HashTextEncoder(4, 8)
        self.window = WindowConfig(context_frames=192, block_frames=48)
        self.denoiser = self
        self.latent_dim, self.device = 2, torch.device("cpu")
        self.poison: set[int] = set()
        self.n_calls = 0

    def start(self, *, batch: int = 1, context: object = None) -> StreamState:
        return StreamState(torch.zeros(batch, 2, 4))

    def step(self, state: StreamState, controls: Controls) -> tuple[Block, StreamState]:
        controls.validate(self.window)
        call, self.n_calls = self.n_calls, self.n_calls + 1
        cost_s = self.cost_s(call, controls)
        if self.clock is not None:
            self.clock.spend(cost_s)
        n_frames = state.n_frames + controls.block_frames
        end = n_frames * SAMPLES_PER_FRAME
        t = torch.arange(state.n_samples, end, dtype=torch.float64) / SAMPLE_RATE
        wave = (0.25 * torch.sin(2 * math.pi * tone_hz(controls) * t)).float()[None, None]
        latents = torch.full((1, 2, controls.block_frames), float(state.index))
        if call in self.poison:
            latents = latents * float("nan")
        block = Block(
            state.index,
            latents,
            wave,
            state.n_samples,
            controls,
            controls.n_steps,
            state.index == 0,
            700 * cost_s,
            200 * cost_s,
            state.decode.n_waiting * SAMPLES_PER_FRAME,
        )
        following = replace(state, index=state.index + 1, n_frames=n_frames, n_samples=end)
        return block, replace(following, decode=DecodeState())


class LoudStreamer(FakeStreamer):
    """The same sine, `factor` times as loud: 16 at first reaches four times full scale."""

    factor = 16.0

    def step(self, state: StreamState, controls: Controls) -> tuple[Block, StreamState]:
        block, state = super().step(state, controls)
        return replace(block, wave=self.factor * block.wave), state
