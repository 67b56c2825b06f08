"""Real time: a thread that keeps a sink's queue filled, however the controls move.

    engine = LiveEngine(streamer, NullSink(), Controls(prompt="church organ"))
    engine.start()
    engine.change(cfg_scale=2.0)   # heard from the next block on
    engine.stop()

The queue's target depth is counted just after a block was handed over. A block is begun as late as
its expected cost allows, so that a change of controls reaches it as late as possible. If the model
is too slow the sink fades to silence and counts; it plays on with the next block, and since its
clock never stopped, depth and latency are what they were.

Taught in notebook 04_play.
"""

import contextlib
import dataclasses
import math
import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from lmd.errors import LmdError
from lmd.machine import release_idle_threads
from lmd.play.control_queue import MAX_LIVE_STEPS, Change, ControlDesk
from lmd.play.guard import Guarded, Piece, guarded_step
from lmd.play.pace import (
    EngineOptions,
    Ledger,
    Made,
    Meters,
    Promise,
    Trouble,
    advice_for,
    affordable_steps,
    level_db,
)
from lmd.play.play_queue import Sink, SinkReport
from lmd.play.recorder import Recorder
from lmd.play.takes import TakeWriter
from lmd.rng import derive_seed
from lmd.stream.controls import Controls
from lmd.stream.streamer import Streamer

JITTER = 0.25  # of what a block costs at most: how much more the next one may cost
NAP_S = 0.25  # the longest wait before looking again whether something has changed

Event = Made | Promise | Trouble | Meters


class LiveEngine:
    """Plays a streamer into a sink, on a thread of its own. One engine plays one take.

    Args:
        streamer: makes the blocks.
        sink: plays them.
        controls: to begin with.
        options: pacing; may be changed with `configure`.
        take: where to write what is played.
        on_event: called from the engine's threads with every block, promise and trouble, and with
            the meters when the state changes; it must not take long.

    Raises:
        LmdError: controls that cannot be played.
    """

    def __init__(
        self,
        streamer: Streamer,
        sink: Sink,
        controls: Controls | None = None,
        options: EngineOptions | None = None,
        *,
        take: TakeWriter | None = None,
        on_event: Callable[[Event], None] | None = None,
    ) -> None:
        self.streamer, self.sink = streamer, sink
        self.options = EngineOptions() if options is None else options
        self._take, self.on_event = take, on_event or (lambda event: None)
        self.desk = ControlDesk(
            controls or Controls(),
            streamer.window,
            streamer.text.encode,
            refused=lambda message: self._trouble("refused", message),
        )
        self._wake, self._stopping = threading.Event(), threading.Event()
        self._thread: threading.Thread | None = None
        self.ledger, self._steps_cap = Ledger(), MAX_LIVE_STEPS
        self._recorder = Recorder()
        self._n_blocks = self._n_samples = self._seen_underruns = 0
        self._primed, self._held, self._state, self._error = False, False, "new", ""
        self._runs_since_s = math.inf  # the sink's clock at the start, or after the last pause
        self.failure: BaseException | None = None

    # --- from any thread -------------------------------------------------------------------

    def start(self) -> None:
        """Begin on a new thread; returns at once.

        Raises:
            LmdError: it has been started before.
        """
        self._check_is_new()
        release_idle_threads()  # the new thread computes now, not this one
        self._thread = threading.Thread(target=self.run, name="lmd-live", daemon=True)
        self._thread.start()

    def change(self, **changes: Any) -> Change:
        """Ask for other controls from the next block on.

        Raises:
            LmdError: see `ControlDesk.ask`; the music goes on as it was.
        """
        change = self.desk.ask(self.sink.clock.now(), **changes)
        self._wake.set()
        return change

    def configure(self, **changes: Any) -> None:
        """Change `EngineOptions` while playing.

        Raises:
            LmdError: an unknown option or a wrong value.
        """
        unknown = set(changes) - {f.name for f in dataclasses.fields(EngineOptions)}
        if unknown:
            raise LmdError(f"options {sorted(unknown)}", "fields of EngineOptions", "Check them.")
        self.options = replace(self.options, **changes)
        self._wake.set()

    def pause(self) -> None:
        """Hold the sink; the queue fills up and waits."""
        self._held = True
        if self._state == "playing":
            self.sink.run(False)
            self._set_state("paused")

    def resume(self) -> None:
        """Play on after a pause."""
        self._held = False
        if self._state == "paused":
            self._set_state("playing")
            self._runs_since_s = self.sink.clock.now()
            self.sink.run(True)
            self._wake.set()

    def stop(self, timeout_s: float = 30.0) -> None:
        """End the stream and wait for the thread.

        Raises:
            RuntimeError: the thread had failed; its error is the cause.
        """
        self._stopping.set()
        self._wake.set()
        if self._thread is not None and self._thread is not threading.current_thread():
            self._thread.join(timeout_s)
        if self.failure is not None:
            raise RuntimeError("the live engine failed") from self.failure

    def wait(self, timeout_s: float | None = None) -> bool:
        """Wait for the end (see `limit_s`); whether it has come."""
        if self._thread is threading.current_thread():
            return False  # asked by a listener: the stream is still going
        if self._thread is not None:
            self._thread.join(timeout_s)
            return not self._thread.is_alive()
        return True

    def record(self, path: str | Path, limit_s: float = math.inf) -> Path:
        """Also write what is made from now on, or `limit_s` of it, to a wav or flac file.

        Should writing fail (a full disk), the recording ends and the music goes on.

        Raises:
            LmdError: see `AudioFile`; or a recording is under way, or the stream has ended.
        """
        codec = self.streamer.codec
        return self._recorder.start(path, codec.sample_rate, codec.channels, limit_s)

    def stop_recording(self) -> Path | None:
        """Finish the recording, if there is one; its path."""
        return self._recorder.stop()

    def meters(self) -> Meters:
        """Where the stream is and how it keeps up."""
        is_open = self._state not in ("new", "stopped", "failed") and self._n_blocks > 0
        queued_s = self.sink.queued_s() if is_open else 0.0
        return self.ledger.meters(
            self.sink.report() if self._n_blocks else SinkReport(),
            self._rate,
            state="waiting" if queued_s == math.inf else self._state,
            n_blocks=self._n_blocks,
            played_s=self._n_samples / self._rate,
            queued_s=0.0 if queued_s == math.inf else queued_s,
            target_s=self._depth_s(self.desk.asked()),
            error=self._error,
        )

    # --- the engine's thread ---------------------------------------------------------------

    def run(self) -> None:
        """Play until stopped or until `limit_s`; `start` calls this on a thread.

        Raises:
            LmdError: it has played before.
        """
        self._check_is_new()
        try:
            codec = self.streamer.codec
            self.sink.open(codec.sample_rate, codec.channels)
            self._set_state("priming")
            self.desk.warm()
            self._guarded = Guarded(self.streamer.start())
            self._loop()
            self._set_state("stopped")
        except Exception as failure:  # said in the panel, kept for `stop` to raise
            self.failure = failure
            self._error = f"{type(failure).__name__}: {failure}"
            self._set_state("failed")
        finally:
            with contextlib.ExitStack() as ends:  # all of them, though one should fail
                for part in (self._take, self.sink, self._recorder, self.desk):
                    if part is not None:
                        ends.callback(part.close)

    def _check_is_new(self) -> None:
        """An engine plays once: its sink would begin its file anew."""
        if self._state != "new" or self._thread not in (None, threading.current_thread()):
            raise LmdError(f"an engine that is {self._state!r}", "a new one", "Make another.")

    def _loop(self) -> None:
        clock = self.sink.clock
        while not self._stopping.is_set():
            self._wake.clear()
            if self._finished():
                return self._drain()
            due_in_s = self._due_in_s()
            if due_in_s <= 0:
                self._make_one()
                continue
            self._let_sound()
            clock.sleep(min(due_in_s, NAP_S), self._wake)
            self._count_underruns()

    def _let_sound(self) -> None:
        """The queue is full for the first time, or will get no fuller: play, unless on hold."""
        if not self._primed:
            self._primed, self._runs_since_s = True, self.sink.clock.now()
            self._set_state("paused" if self._held else "playing")
            self.sink.run(not self._held)

    def _finished(self) -> bool:
        limit_s = self.options.limit_s
        return limit_s is not None and self._n_samples >= limit_s * self.streamer.codec.sample_rate

    def _drain(self) -> None:
        """Let the sink play what it has."""
        self._count_underruns()
        self.sink.finish()
        self._let_sound()
        while (left_s := self.sink.queued_s()) > 0 and not self._stopping.is_set():
            self.sink.clock.sleep(min(left_s, NAP_S), self._stopping)

    def _block_s(self, controls: Controls) -> float:
        codec = self.streamer.codec
        return controls.block_frames * codec.samples_per_frame / codec.sample_rate

    def _depth_s(self, controls: Controls) -> float:
        """The queue's target depth with such blocks."""
        block_s, asked_s = self._block_s(controls), self.options.queue_s
        return max(2 * block_s if asked_s is None else asked_s, block_s + self.options.safety_s)

    def _due_in_s(self) -> float:
        """Seconds until the next block must be begun; not positive: now."""
        controls = self._effective(self.desk.asked())
        block_s = self._block_s(controls)
        expected_s = self.ledger.costs.expected_s(controls)
        cost_s = block_s if expected_s is None else min(expected_s, block_s)
        left_s = max(self._depth_s(controls) - block_s, JITTER * cost_s)
        return self.sink.queued_s() - (left_s + cost_s)

    def _effective(self, controls: Controls) -> Controls:
        """What was asked, with the engine's own hand in it: `auto_steps`, `roll_seed`."""
        if self.options.auto_steps and self._steps_cap < controls.n_steps:
            controls = replace(controls, n_steps=self._steps_cap)
        if self.options.roll_seed:
            rolled = derive_seed(controls.seed, "roll", self._n_blocks) % 2**31
            controls = replace(controls, seed=rolled)
        return controls

    def _make_one(self) -> None:
        """One block from the controls to the sink, the take, the meters and the promises."""
        clock = self.sink.clock
        began_s = clock.now()
        asked, changes = self.desk.take()
        controls = self._effective(asked)
        piece, self._guarded = guarded_step(self.streamer, self._guarded, controls)
        made_s = clock.now() - began_s
        queued_s = self.sink.queued_s()
        made = self._made(piece, controls, made_s, queued_s)
        self._count_underruns()
        if self._take is not None:
            self._take.piece(piece, controls)
        self._hand_over(piece)
        if piece.fault is not None:
            self.desk.give_back(asked, changes)
            changes = []
        promises = [self._promise(change, made) for change in changes]
        self.ledger.note(made, promises)
        self._n_blocks += 1
        self._n_samples += made.n_samples
        self._learn(made)
        for event in (made, *promises):
            self.on_event(event)

    def _made(self, piece: Piece, controls: Controls, made_s: float, queued_s: float) -> Made:
        block = piece.block
        return Made(
            number=self._n_blocks,
            first_sample=self._n_samples,
            n_samples=piece.wave.shape[-1],
            own_sample=self._n_samples + (block.own_from if block else 0),
            length_s=self._block_s(controls),
            controls=controls,
            made_s=made_s,
            dit_ms=block.dit_ms if block else 0.0,
            decode_ms=block.decode_ms if block else 0.0,
            rebuilt=bool(block and block.rebuilt),
            queued_s=queued_s,
            level_db=level_db(piece.wave),
            fault=piece.fault,
        )

    def _hand_over(self, piece: Piece) -> None:
        samples = piece.wave[0].numpy()
        self.sink.write(samples)
        try:
            self._recorder.write(samples)
        except (OSError, RuntimeError, LmdError) as error:  # libsndfile's are RuntimeErrors
            with contextlib.suppress(OSError, RuntimeError):
                self._recorder.stop()
            self._trouble("recording", f"The recording ended: {error}")

    def _promise(self, change: Change, made: Made) -> Promise:
        latency_ms = None
        was_heard = self._state == "playing" and change.asked_s >= self._runs_since_s
        if self._primed and was_heard and math.isfinite(made.queued_s):
            end_s = self.sink.clock.now() + self.sink.queued_s()
            after_it = made.first_sample + made.n_samples - made.own_sample
            latency_ms = 1e3 * (end_s - after_it / self._rate - change.asked_s)
        return Promise(change, made.number, made.own_sample, latency_ms)

    @property
    def _rate(self) -> int:
        return self.streamer.codec.sample_rate

    def _learn(self, made: Made) -> None:
        """Costs for pacing, the cap for `auto_steps`, and what to say about a fault."""
        if made.fault is not None:
            self._trouble("fault", f"Block {made.number} was not playable: {made.fault}")
            return
        affordable = affordable_steps(made)
        if affordable < made.controls.n_steps:
            self._steps_cap = affordable
        else:  # recover one step a block
            self._steps_cap = min(affordable, self._steps_cap + 1)

    def _count_underruns(self) -> None:
        underruns = self.sink.report().underruns
        if underruns > self._seen_underruns:
            if self._take is not None:
                self._take.underrun()
            self._seen_underruns = underruns
            lines = advice_for(self.ledger.recent()) or (
                "One block came late; if it happens again, choose a longer queue.",
            )
            self._trouble("underrun", " ".join(lines))

    def _trouble(self, kind: str, message: str) -> None:
        self._error = message
        self.on_event(Trouble(kind, message))

    def _set_state(self, state: str) -> None:
        self._state = state
        self.on_event(self.meters())
