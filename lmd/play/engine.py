"""Real time: a thread that keeps a sink's queue filled, however the controls move.

    engine = LiveEngine(streamer, NullSink(), Controls(prompt="church organ"))
    engine.start()
    engine.change(cfg_scale=2.0)   # heard a moment later
    engine.stop()

Much is planned ahead, so that nothing runs dry, and little of it is final. After a change the plan
is cut a little behind what is being heard: a short block is made from there under the new controls,
as fast as it can be, and cross-faded into; what was planned beyond is thrown away. If the model is
too slow the sink fades to silence and counts; it plays on with the next block, and since its clock
never stopped, depth and latency are what they were.

Taught in notebook 04_play.
"""

import contextlib
import math
import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from lmd.errors import LmdError
from lmd.machine import release_idle_threads
from lmd.play.audio_file import WRITING_FAILED, AudioFile
from lmd.play.control_queue import Change, ControlQueue
from lmd.play.pace import AppliedChange, EngineOptions, Ledger, Made, Meters, Trouble
from lmd.play.planner import Planned, Planner
from lmd.play.play_queue import SinkReport
from lmd.play.sinks import Sink
from lmd.play.takes import TakeWriter, as_many_threads
from lmd.stream.controls import Controls
from lmd.stream.state import StreamState
from lmd.stream.streamer import Streamer

BAR_EVERY_S = 0.5
LATE = "Changes wait for the next block: planning a cut takes longer than what is queued lasts."
NAP_S = 0.25  # the longest wait before looking again whether something has changed

Event = Made | AppliedChange | Trouble | Meters


class LiveEngine:
    """Plays a streamer into a sink, on a thread of its own. One engine plays one take.

    Args:
        streamer, sink: what makes the blocks and what plays them.
        controls, options: to begin with (`LmdError` if they cannot be played).
        start: where the stream begins, e.g. behind given audio (`Streamer.start`); None: silence.
        take: where to write what is played.
        on_event: called from the engine's threads with every block, applied change and trouble, and
            with the meters when the state changes; it must not take long.
    """

    def __init__(
        self,
        streamer: Streamer,
        sink: Sink,
        controls: Controls | None = None,
        options: EngineOptions | None = None,
        *,
        start: StreamState | None = None,
        take: TakeWriter | None = None,
        on_event: Callable[[Event], None] | None = None,
    ) -> None:
        self.streamer, self.sink = streamer, sink
        self.take, self.on_event = take, on_event or (lambda event: None)
        self.control_queue = ControlQueue(
            controls or Controls(),
            streamer.window,
            streamer.text.encode,
            refused=lambda message: self._trouble("refused", message),
            ready=lambda: self._wake.set(),
        )
        self._wake, self._stopping, self._ended = (threading.Event() for _ in range(3))
        self._thread: threading.Thread | None = None
        self.ledger = Ledger()
        self.recording: AudioFile | None = None
        self._files = threading.Lock()  # a recording is begun and ended by any thread
        self._rate = streamer.codec.sample_rate
        options = options or EngineOptions()
        self._planner = Planner(streamer, sink, self.control_queue, options, self.ledger, start)
        self._seen_underruns, self._is_late = 0, False
        self._primed, self._held, self._state, self._error = False, False, "new", ""
        self._runs_since_s = math.inf  # the sink's clock at the start, or after the last pause
        self.failure: BaseException | None = None  # what ended the stream, if something did

    def start(self) -> None:
        """Begin on a new thread, and return at once; an `LmdError` if it was started before."""
        self._check_is_new()
        release_idle_threads()  # the new thread computes now, not this one
        self._thread = threading.Thread(target=self.run, name="lmd-live", daemon=True)
        self._thread.start()

    def change(self, **changes: Any) -> Change:
        """Ask for other controls (`ControlQueue.ask`, with its refusals)."""
        change = self.control_queue.ask(self.sink.clock.now(), **changes)
        self._wake.set()
        return change

    def change_at(self, second: float, **changes: Any) -> None:
        """Ask, before the start, for other controls from that second of the stream on.

        Raises:
            LmdError: a time that is not positive, or controls that cannot be played.
        """
        self._check_is_new()
        self._planner.change_at(second, changes)

    def configure(self, **changes: Any) -> None:
        """Change some of `EngineOptions` while playing; an `LmdError` if a value is wrong."""
        self._planner.pacer.options = replace(self._planner.pacer.options, **changes)
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

    def hold(self, on: bool) -> None:
        """Repeat what was heard last and go no further, or go on (see `PlayQueue.hold`)."""
        self.sink.hold(on)
        self._wake.set()

    def stop(self, timeout_s: float = 30.0) -> None:
        """End the stream, its take and its files; a `RuntimeError` if the stream had failed."""
        self._stopping.set()
        self._wake.set()
        self.wait(timeout_s)
        if self.failure is not None:
            raise RuntimeError("the live engine failed") from self.failure

    def wait(self, timeout_s: float | None = None) -> bool:
        """Wait for the end; whether it has come, or there was no beginning."""
        if self._thread is threading.current_thread():
            return False  # asked by an observer: the stream is still going
        # Not `join`: if a signal interrupts that, Python 3.11 takes the thread for ended.
        return self._thread is None or self._ended.wait(timeout_s)

    def record(self, path: str | Path, limit_s: float = math.inf) -> Path:
        """Also write what is made from now on, or `limit_s` of it, to a file; its path.

        Should writing fail (a full disk), the recording ends and the music goes on.

        Raises:
            LmdError: see `AudioFile`; or a recording is under way, or the stream has ended.
        """
        with self._files:
            if self._state in ("stopped", "failed"):  # nobody would finish the file
                raise LmdError("a stream that has ended", "one that plays", "Start another first.")
            if self.recording is not None:
                raise LmdError("a recording under way", "none", "Stop it first.")
            self.recording = AudioFile(path, self._rate, self.streamer.codec.channels, limit_s)
            return self.recording.path

    def stop_recording(self) -> Path | None:
        """Finish the recording, if there is one; its path."""
        with self._files:
            file, self.recording = self.recording, None
        if file is None:
            return None
        file.close()
        return file.path

    def meters(self) -> Meters:
        """Where the stream is and how it keeps up."""
        is_open = self._state not in ("new", "stopped", "failed") and self._planner.n_blocks > 0
        queued_s = self.sink.queued_s() if is_open else 0.0
        meters = self.ledger.meters(
            self.sink.report() if self._planner.n_blocks else SinkReport(),
            self._rate,
            state="waiting" if queued_s == math.inf else self._state,
            n_blocks=self._planner.n_blocks,
            played_s=self._planner.timeline.n_samples / self._rate,
            queued_s=0.0 if queued_s == math.inf else queued_s,
            target_s=self._planner.pacer.depth_s(self.control_queue.asked()),
            error=self._error,
        )
        return replace(meters, advice=(LATE, *meters.advice)) if self._is_late else meters

    def run(self) -> None:
        """Play until stopped or until `limit_s`; `start` calls this on a thread."""
        self._check_is_new()
        try:
            self.sink.open(self._rate, self.streamer.codec.channels)
            self._set_state("priming")
            self._planner.begin()
            with as_many_threads(torch.get_num_threads()):  # `_learn` may take fewer meanwhile
                self._loop()
            self._settle(self.sink.queued_s())
            self._set_state("stopped")
        except Exception as failure:  # said in the panel, kept for `stop` to raise
            self._fail(failure)
        finally:
            with self._files:
                recording, self.recording = self.recording, None
            for part in (self.take, self.sink, recording, self.control_queue):
                try:
                    if part is not None:
                        part.close()
                except WRITING_FAILED as error:  # the others are finished though one should fail
                    self._fail(error)
            self._ended.set()

    def _fail(self, failure: Exception) -> None:
        self.failure, self._error = failure, f"{type(failure).__name__}: {failure}"
        self._set_state("failed")

    def _check_is_new(self) -> None:
        if self._state != "new" or self._thread not in (None, threading.current_thread()):
            raise LmdError(f"an engine that is {self._state!r}", "a new one", "Make another.")

    def _loop(self) -> None:
        """Plan whenever something is due, until the end."""
        planner, sink = self._planner, self.sink
        while not self._stopping.is_set():
            self._wake.clear()
            queued_s = sink.queued_s()
            self._settle(queued_s)
            planned = planner.step(queued_s)
            if isinstance(planned, Planned):
                self._note(planned)
                continue
            if planner.is_complete:
                sink.finish()
                if queued_s <= 0 and self._primed:
                    return
            self._let_sound()
            sink.clock.sleep(min(planned, NAP_S), self._wake)
            self._count_underruns()

    def _settle(self, queued_s: float) -> None:
        """Write down what has been heard."""
        plans, samples = self._planner.settle(queued_s)
        if samples.size:
            self._write("take", lambda take: take.heard(plans, samples))
            self._write("recording", lambda file: file.write(samples))

    def _note(self, planned: Planned) -> None:
        """Keep account of a block, and tell who wants to know."""
        made = planned.made
        if not made.is_cut:  # what was heard while it was made
            self._settle(made.queued_s + made.n_samples / self._rate)
        self._count_underruns()
        applied = [self._applied(change, made) for change in planned.changes]
        if planned.changes:
            self._is_late = planned.is_late
        self.ledger.note(made, applied)
        self._learn(made)
        for event in (made, *applied):
            self.on_event(event)

    def _let_sound(self) -> None:
        """The queue is full for the first time, or will get no fuller: play, unless on hold."""
        if not self._primed:
            self._primed, self._runs_since_s = True, self.sink.clock.now()
            self._set_state("paused" if self._held else "playing")
            self.sink.run(not self._held)

    def _write(self, kind: str, write: Callable[[Any], None]) -> None:
        """Write to the take or the recording; should that fail, it ends and the music goes on."""
        with self._files:
            file = getattr(self, kind)
            try:
                if file is not None:
                    write(file)
                return
            except WRITING_FAILED as error:
                why = str(error)
            setattr(self, kind, None)
            with contextlib.suppress(*WRITING_FAILED):
                file.close()
        self._trouble(kind, f"The {kind} ended: {why}")

    def _applied(self, change: Change, made: Made) -> AppliedChange:
        latency_ms = None
        was_heard = self._state == "playing" and change.asked_s >= self._runs_since_s
        if was_heard and math.isfinite(made.queued_s):
            end_s = self.sink.clock.now() + self.sink.queued_s()
            after_it = made.first_sample + made.n_samples - made.own_sample
            heard_s = max(end_s - after_it / self._rate, self.sink.clock.now())
            latency_ms = 1e3 * (heard_s - change.asked_s)
        return AppliedChange(change, made.number, made.own_sample, latency_ms)

    def _learn(self, made: Made) -> None:
        """For `auto_steps`, how many threads to use, and what to say about a fault."""
        if made.fault is not None:
            self._trouble("fault", f"Block {made.number} was not playable: {made.fault}")
            return
        self._planner.pacer.learn(made)
        if torch.get_num_threads() > 1 and self.ledger.is_starved(made.controls):
            torch.set_num_threads(1)  # threads that wait for each other wait for the neighbour
            self._trouble("threads", "Another program takes the cores: going on with one thread.")

    def _count_underruns(self) -> None:
        underruns = self.sink.report().underruns
        if underruns > self._seen_underruns:
            self._write("take", lambda take: take.note(underrun=True))
            self._seen_underruns = underruns
            self._trouble("underrun", self.ledger.advice_when_late())

    def _trouble(self, kind: str, message: str) -> None:
        self._error = message
        self.on_event(Trouble(kind, message))

    def _set_state(self, state: str) -> None:
        self._state = state
        self.on_event(self.meters())


def wait_with_bar(engine: LiveEngine, seconds: float) -> None:
    """Wait for the end behind a progress bar, then `stop`; an interrupt ends the stream, too."""
    try:
        with tqdm(total=round(seconds), unit="s", desc="music", mininterval=1.0) as bar:
            has_ended = False
            while not has_ended:
                has_ended = engine.wait(BAR_EVERY_S)
                bar.update(min(round(engine.meters().played_s), round(seconds)) - bar.n)
    finally:
        engine.stop()
