"""The streamer: one block and the next state out of a state and the present controls.

    block, state = streamer.step(state, controls)

A state is a value: keep an old one and go on from there, save it, load it, and the same bytes come
out. Randomness depends on (seed, purpose, frame, step) alone.

A block is the most that is planned at once, not the least that can be changed: any frame is a legal
end of the context, so `rewind` gives the state after a part of a block, and another block is made
from there.

Source: Live Music Diffusion Models (arXiv 2605.22717), inference. Taught in notebook 04_play.
"""

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import islice, repeat
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lmd.codec.base import Codec, DecodeState, StreamingCodec, decode_block
from lmd.config import WindowConfig
from lmd.errors import LmdError
from lmd.model.dit import Condition
from lmd.model.kv_cache import Memory
from lmd.model.live_model import Passes
from lmd.model.text import TextEncoder, describe, mix
from lmd.model.weights import fingerprint
from lmd.rng import frame_noise, normal
from lmd.shapes import BlockLatents, Latents, Wave
from lmd.stream.block import BlockPlan, BlockSession, Denoiser, LiveDenoiser, both_branches
from lmd.stream.controls import Controls
from lmd.stream.given_audio import as_wave, past_the_end
from lmd.stream.samplers import Guidance, Velocities, sample, schedule
from lmd.stream.state import StreamState


@dataclass(frozen=True)
class Block:
    """One block of music, and how it came about.

    Attributes:
        index: 0, 1, 2 …
        latents: `[batch, latent, block frame]`.
        wave: the samples that can be heard now (with an exact boundary: late by the look-ahead).
        start_sample: where `wave` begins in the stream.
        controls: what it was made with.
        n_evaluations: model calls, each over one or two guidance branches.
        rebuilt: whether the context's keys were computed from the latent window.
        dit_ms, decode_ms: wall-clock time of the two halves.
        own_from: the sample of `wave` at which this block's own frames begin; before it lies what
            an exact boundary held back of the block before.
    """

    index: int
    latents: BlockLatents
    wave: Wave
    start_sample: int
    controls: Controls
    n_evaluations: int
    rebuilt: bool
    dit_ms: float
    decode_ms: float
    own_from: int = 0


class Streamer:
    """Endless music, block by block.

    Args:
        model: a `LiveModel`, a `GraphModel`, or anything with the `Denoiser` signature.
        codec: anything with the `Codec` signature.
        text: encodes prompts (and remembers them).
        window: context length; the block length is a control.
    """

    def __init__(
        self, model: Passes | Denoiser, codec: Codec, text: TextEncoder, window: WindowConfig
    ) -> None:
        self.denoiser = LiveDenoiser(model) if isinstance(model, Passes) else model
        self.codec, self.text, self.window = codec, text, window
        frame_rate_hz = codec.sample_rate / codec.samples_per_frame
        self.window_s = window.window_frames / frame_rate_hz

    def start(
        self, *, batch: int = 1, context: Tensor | np.ndarray | Sequence[Any] | None = None
    ) -> StreamState:
        """A state to begin from: silence, or the end of given audio.

        Args:
            batch: how many streams run side by side (given audio brings its own batch).
            context: audio at the codec's rate, see `as_wave`; its last context is used, a shorter
                one is preceded by silence. Heard before the stream, it joins without a step: in
                the stream's first 20 ms its end fades out, played backwards.

        Raises:
            LmdError: audio that is not finite, of other channels, or shorter than a frame.
        """
        n_frames = self.window.context_frames
        if context is None:
            silence = torch.zeros(batch, self.denoiser.latent_dim, n_frames)
            return StreamState(silence.to(self.denoiser.device))
        wave = as_wave(context, self.codec, self._codec_device())
        hop = self.codec.samples_per_frame
        margin = self.codec.lookback_frames  # so that the encoder's edge stays outside
        n_whole = min(wave.shape[-1] // hop, n_frames + margin) * hop
        with torch.no_grad():
            latents = self.codec.encode(wave[..., wave.shape[-1] - n_whole :])
        latents = latents[..., -n_frames:].float().to(self.denoiser.device)
        blank = latents.new_zeros(*latents.shape[:-1], n_frames - latents.shape[-1])
        past = latents[..., -self.codec.lookback_frames :].clone()
        decode = DecodeState(past, overhang=past_the_end(wave, self.codec.sample_rate))
        return StreamState(torch.cat([blank, latents], dim=-1), decode=decode)

    @torch.no_grad()
    def step(self, state: StreamState, controls: Controls) -> tuple[Block, StreamState]:
        """Make the next block.

        Args:
            state: from `start`, or from the step before; it is not changed.
            controls: for this block.

        Returns:
            The block, already decoded, and the state after it.

        Raises:
            LmdError: controls that cannot be played (nothing has happened then), or latents that
                are not finite.
        """
        controls.validate(self.window)
        began = time.perf_counter()
        context = drop_context(state.context, controls.drop_context_frames)
        latents, session, rebuilt = self._denoise(state, context, controls)
        if not torch.isfinite(latents).all():
            raise LmdError(
                f"latents that are not finite in block {state.index}",
                "finite numbers",
                "Lower cfg_scale, use float32, or check the weights; the state is as it was.",
            )
        denoised = time.perf_counter()
        wave, decode = decode_block(self.codec, state.decode, latents, controls.boundary)
        wave = wave.cpu()  # waits for the device
        decoded = time.perf_counter()
        block = Block(
            index=state.index,
            latents=latents,
            wave=wave,
            start_sample=state.n_samples,
            controls=controls,
            n_evaluations=controls.n_steps,
            rebuilt=rebuilt,
            dit_ms=1e3 * (denoised - began),
            decode_ms=1e3 * (decoded - denoised),
            own_from=state.decode.n_waiting * self.codec.samples_per_frame,
        )
        following = StreamState(
            context=torch.cat([context, latents], dim=-1)[..., latents.shape[-1] :],
            index=state.index + 1,
            n_frames=state.n_frames + latents.shape[-1],
            n_samples=state.n_samples + wave.shape[-1],
            memory=session.memory,
            memory_key=memory_key(controls),
            decode=decode,
        )
        return block, following

    @torch.no_grad()
    def rewind(self, state: StreamState, block: Block, frame: int) -> StreamState:
        """The state after the first frames of a block, as if the block had been no longer.

        They are decoded once more, so that the phases of a held tone go on; the next block's wave
        begins `lookahead_frames` before `frame`, as after any block. The context's keys are made
        anew.

        Args:
            state: what the block was made from.
            block: what `step` made from it.
            frame: the first one that is not kept, counted from the stream's beginning.

        Raises:
            LmdError: a frame before the block, or behind its end.
        """
        n, first = frame - state.n_frames, state.n_frames
        if not 0 <= n <= block.latents.shape[-1]:
            last = first + block.latents.shape[-1]
            raise LmdError(
                f"a cut at frame {frame}", f"{first} to {last}, within the block", "Cut there."
            )
        if n == 0:
            return state
        kept = block.latents[..., :n]
        context = drop_context(state.context, block.controls.drop_context_frames)
        wave, decode = decode_block(self.codec, state.decode, kept, block.controls.boundary)
        return StreamState(
            context=torch.cat([context, kept], dim=-1)[..., n:],
            index=state.index + 1,
            n_frames=frame,
            n_samples=state.n_samples + wave.shape[-1],
            memory=None if state.memory is None else replace(state.memory, context=None),
            memory_key=state.memory_key,
            decode=decode,
        )

    def stream(
        self,
        controls: Controls | Iterable[Controls] | Callable[[], Controls],
        *,
        n_blocks: int | None = None,
        state: StreamState | None = None,
    ) -> Iterator[Block]:
        """Blocks, one by one, each yielded as soon as it is decoded.

        Args:
            controls: the same for every block, one per block, or a function that is asked before
                every block.
            n_blocks: how many; None: until the controls end, or for ever.
            state: where to begin; None: silence.
        """
        if isinstance(controls, Controls):
            controls = repeat(controls)
        elif callable(controls):
            controls = iter(controls, None)
        state = self.start() if state is None else state
        for present in islice(controls, n_blocks):
            block, state = self.step(state, present)
            yield block

    def save_state(self, state: StreamState, path: str | Path) -> None:
        """Write a state of this streamer to a safetensors file, with what its weights are.

        Raises:
            LmdError: the file cannot be written.
        """
        state.save(path, self._weights(), describe(self.text))

    def load_state(self, path: str | Path) -> StreamState:
        """Read a state that `save_state` wrote, on whatever device, to this streamer's device.

        If it was made with another text encoder, the text's keys are computed afresh.

        Raises:
            LmdError: not such a file, or made with another model or codec.
        """
        context_shape = (self.denoiser.latent_dim, self.window.context_frames)
        devices = (self.denoiser.device, self._codec_device())
        running = self.codec.stream_start() if isinstance(self.codec, StreamingCodec) else None
        weights = self._weights()
        return StreamState.load(path, context_shape, weights, devices, describe(self.text), running)

    def _codec_device(self) -> torch.device:
        """Where the codec computes."""
        return getattr(self.codec, "device", self.denoiser.device)

    def _weights(self) -> dict[str, str]:
        """What a state goes on with: the SHA-256 of all weights, by part."""
        return {"model": fingerprint(self.denoiser), "codec": fingerprint(self.codec)}

    def _denoise(
        self, state: StreamState, context: Latents, controls: Controls
    ) -> tuple[BlockLatents, BlockSession, bool]:
        """The block's latents, its session, and whether the context was encoded afresh."""
        memory = usable_memory(state, controls)
        condition = self._condition(controls, context.shape[0])
        o = controls.block_frames
        noise_shape = (*context.shape[:-1], o)

        def draw(step: int) -> BlockLatents:
            return frame_noise(noise_shape, controls.seed, "renoise", state.n_frames, step).to(
                context
            )

        context_noise = None
        if controls.regime == "full":
            context_noise = normal(
                tuple(context.shape), controls.seed, "context-noise", state.n_frames // o
            ).to(context)
        plan = BlockPlan(controls.regime, o, _twice(context_noise, controls))
        session = self.denoiser.open_block(_twice(context, controls), condition, plan, memory)
        noise = frame_noise(noise_shape, controls.seed, "noise", state.n_frames).to(context)
        latents = sample(
            controls.sampler,
            guided_velocities(session, controls.is_guided),
            noise,
            schedule(controls.n_steps),
            controls.cfg_scale,
            draw,
        )
        return latents, session, memory is None or memory.context is None

    def _condition(self, controls: Controls, batch: int) -> Condition:
        """The prompt's condition, with the unguided branch behind it where guidance is on."""
        tokens = mix(self.text, controls.prompt).expand(batch, -1, -1)
        condition = self.denoiser.condition(tokens, self.window_s)
        if not controls.is_guided:
            return condition
        return both_branches(condition, self.denoiser.null_condition(condition))


def drop_context(context: Latents, n_frames: int) -> Latents:
    """Zero the oldest `n_frames` of the context; its mask stays 1."""
    if not n_frames:
        return context
    keep = torch.ones_like(context[:1, :1])
    keep[..., :n_frames] = 0
    return context * keep


def memory_key(controls: Controls) -> tuple:
    """What a memory depends on: text and guidance first, then the context's layout."""
    return (controls.prompt, controls.is_guided, controls.regime, controls.block_frames)


def usable_memory(state: StreamState, controls: Controls) -> Memory | None:
    """What of the state's memory still holds under these controls.

    The text's keys hold while prompt and guidance stay; the context's, in the block-causal regime,
    while regime and block length stay too and nothing is forgotten.
    """
    key = memory_key(controls)
    if state.memory is None or key[:2] != state.memory_key[:2]:
        return None
    if key != state.memory_key or controls.drop_context_frames or controls.regime != "block-causal":
        return replace(state.memory, context=None)
    return state.memory


def guided_velocities(session: BlockSession, is_guided: bool) -> Velocities:
    """A session as what samplers call; guidance runs both branches in one batch."""

    def velocities(noisy: Latents, t: float) -> Guidance:
        if not is_guided:
            return Guidance(session(noisy, t))
        return Guidance(*session(torch.cat([noisy, noisy]), t).chunk(2))

    return velocities


def _twice(latents: Tensor | None, controls: Controls) -> Tensor | None:
    """One copy per guidance branch."""
    if latents is None or not controls.is_guided:
        return latents
    return torch.cat([latents, latents])
