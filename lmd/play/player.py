"""The live player for notebooks: a widget whose traits are the controls of a stream.

    player = LivePlayer(open_instrument())
    player            # shows it; press Play
    player.mix = 0.5  # the same as moving the slider

It works wherever ipywidgets do. The page plays through an AudioWorklet fed with binary messages;
nothing is loaded from a network. Taught in notebooks 00_listen and 04_play.
"""

import contextlib
import dataclasses
import math
import secrets
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import traitlets

from lmd.errors import LmdError
from lmd.play.audio_file import read_audio
from lmd.play.control_queue import check_live
from lmd.play.engine import EngineOptions, Event, LiveEngine, wait_with_bar
from lmd.play.pace import AppliedChange, Made, Meters
from lmd.play.play_queue import SkippingClock
from lmd.play.player_traits import (
    CONTROL_NAMES,
    PACING_NAMES,
    PROMPT_NAMES,
    PROMPTS,
    PlayerTraits,
    fields_for,
    trait_values,
)
from lmd.play.sinks import BrowserSink, NullSink, Sink, SoundCardSink
from lmd.play.takes import TakeHeader, begin_take, header_of
from lmd.pretrained import Instrument
from lmd.stream.controls import Controls
from lmd.stream.state import StreamState

SINKS = ("browser", "null", "soundcard")
METERS_EVERY_S = 0.5


class LivePlayer(PlayerTraits):
    """A stream with sliders, meters and a picture.

    Args:
        controls: to begin with; a prompt of two parts sets both texts and the mix.
        sink: `browser`, `null` (heard by nobody: for papermill) or `soundcard`.
        take_folder: where takes and recordings are written; made if missing.
        prompts: suggestions for the two text fields.

    Raises:
        LmdError: an unknown sink, or controls that cannot be played.
    """

    engine: LiveEngine | None = None  # also of one whose beginning was refused
    _sounding: "ClassVar[LivePlayer | None]" = None  # the one that has the sound card

    def __init__(
        self,
        instrument: Instrument,
        controls: Controls | None = None,
        *,
        sink: str = "browser",
        take_folder: str | Path = "outputs/takes",
        prompts: Sequence[str] = PROMPTS,
    ) -> None:
        if sink not in SINKS:
            raise LmdError(f"sink {sink!r}", f"one of {', '.join(SINKS)}", "Pick one of these.")
        self._streamer, self._source = instrument.streamer, instrument.source
        controls = controls or instrument.controls(prompts[0])
        check_live(controls, self._streamer.window)
        self.take_folder = Path(take_folder)
        self._page = ""  # the view that plays
        self._page_sink: BrowserSink | None = None
        self._lock, self._asking_id = threading.Lock(), 0
        # what was asked, by number: the page's ids, a word for the picture, the prompt's traits
        self._asked: dict[int, tuple[list[int], str, dict[str, Any] | None]] = {}
        self._header: TakeHeader | None = None  # hashing the weights takes a moment
        self._begin_from: StreamState | None = None
        self._playing: dict[str, Any] = {}  # the prompt's traits as they are heard
        codec = self._streamer.codec
        self.frame_s = codec.samples_per_frame / codec.sample_rate
        super().__init__(
            fields=fields_for(self._streamer.window),
            prompt_choices=list(prompts),
            sample_rate=codec.sample_rate,
            channels=codec.channels,
            sink=sink,
            instrument=instrument.description,
            **trait_values(controls, prompts),
        )
        self.on_msg(self._on_message)
        self.observe(self._on_control, names=[*CONTROL_NAMES])
        self.observe(self._on_hold, names="hold")
        self.observe(self._on_pacing, names=[*PACING_NAMES, "queue_blocks", "block_frames"])

    def ask(self, name: str, value: Any, request: int = 0) -> bool:
        """Set a control as the panel does; whether it was accepted, or refused with `message`."""
        known = {entry["name"] for entry in self.fields}
        try:
            if name not in known:
                raise LmdError(f"control {name!r}", f"one of {sorted(known)}", "Check the name.")
            if isinstance(value, bool) != isinstance(getattr(self, name), bool):
                raise LmdError(f"{name} = {value!r}", "another type", "Use the panel's controls.")
            self._asking_id = request
            self.set_trait(name, value)
        except (traitlets.TraitError, LmdError) as error:
            self.message = f"Refused: {error}"
            self.send({"kind": "refused", "name": name, "value": getattr(self, name, None)})
            return False
        finally:
            self._asking_id = 0
        if self.message.startswith("Refused"):
            self.message = ""
        return True

    def play(self) -> None:
        """Start, or go on after a pause (the browser's first Play must be a click there)."""
        if (engine := self._alive()) is not None:
            engine.resume()
        elif self.sink == "browser" and not self._page:
            self.message = "Press Play in the page: browsers want a click before they make sound."
        else:
            self._start()

    def play_for(self, seconds: float) -> Meters:
        """Play so much music and wait for its end; with `null` the waiting itself is skipped.

        Raises:
            LmdError: with the browser as sink, which a waiting kernel could not serve.
        """
        if self.sink == "browser":
            raise LmdError("play_for with sink 'browser'", "'null' or 'soundcard'", "Press Play.")
        self.stop()
        engine = self._start(limit_s=seconds)
        wait_with_bar(engine, seconds)
        self._show_meters(engine.meters())
        return engine.meters()

    def pause(self) -> None:
        """Hold."""
        if (engine := self._alive()) is not None:
            engine.pause()

    def stop(self) -> None:
        """End the take."""
        if self.engine is not None:
            with contextlib.suppress(RuntimeError):  # a failure stands in `message` already
                self.engine.stop()
            self.recording = ""

    def close(self) -> None:
        """End the take, and the widget with it and what it brought along."""
        self.stop()
        self.layout.close()
        super().close()

    def drop_context(self) -> None:
        """Silence the oldest `drop_context_frames` of the context, once."""
        n_frames = self.drop_context_frames
        self._change("drop_context_frames", f"drop {n_frames}", n_frames)

    def continue_from(self, sound: Path | np.ndarray | None) -> None:
        """Let the next take go on from the end of some sound; None: from silence.

        Args:
            sound: a file, or `[channel, sample]` at the codec's rate.

        Raises:
            LmdError: a file that cannot be read, or sound that cannot be gone on from.
        """
        streamer, codec = self._streamer, self._streamer.codec
        if isinstance(sound, Path):
            sound = read_audio(sound, codec.sample_rate, codec.channels, streamer.window_s)
        self._begin_from = None if sound is None else streamer.start(context=sound)

    def record(self) -> None:
        """Begin a recording next to the take, or finish it."""
        if (engine := self._alive()) is None:
            self.message = "Play first, then record."
        elif self.recording:
            engine.stop_recording()
            self.message, self.recording = f"Recorded {self.recording}", ""
        else:
            stem = f"{Path(self.take_path).stem}-{engine.meters().n_blocks:04d}"
            self.recording = str(engine.record(self.take_folder / f"{stem}.wav"))

    def _on_message(self, _widget: Any, content: Any, buffers: Any) -> None:
        if not isinstance(content, dict):
            return
        kind, view = content.get("kind"), str(content.get("view", ""))
        try:
            if kind == "set":
                request = content.get("id")
                known = request if isinstance(request, int) else 0
                self.ask(str(content.get("name")), content.get("value"), known)
            elif kind == "command":
                self._command(str(content.get("command")), view)
            elif kind == "report" and view == self._page and self._page_sink is not None:
                self._page_sink.on_report(content)
            elif kind == "context" and buffers:
                self.continue_from(np.frombuffer(buffers[0], "<f4").reshape(self.channels, -1))
                self._command("restart", view)
            elif kind == "gone" and view == self._page:  # its cell was run again, or deleted
                self.stop()
        except (LmdError, OSError, RuntimeError) as error:  # a full disk among them
            self.message = str(error)

    def _command(self, command: str, view: str) -> None:
        if command == "play":
            if self.sink == "browser" and view != self._page:
                self.stop()  # the page that played before falls silent
                self._page = view
            self.play()
        elif command == "restart":
            self.stop()
            self._page = view or self._page
            self._start()
        elif command == "roll":
            self.seed = secrets.randbelow(2**31)
        elif command in ("pause", "stop", "record", "drop_context"):
            getattr(self, command)()
        else:
            self.message = f"Refused: the command {command!r} is none of the player's."

    @traitlets.validate(*CONTROL_NAMES, "drop_context_frames", "queue_blocks", "volume")
    def _check(self, proposal: Any) -> Any:
        name, value = proposal["trait"].name, proposal["value"]
        if isinstance(value, float) and not math.isfinite(value):  # NaN passes min and max
            raise traitlets.TraitError(f"{name} = {value}: no number")
        changes = [] if name in ("queue_blocks", "volume") else [{name: value}]
        if name in ("prompt_a", "prompt_b"):  # the mix must be free to move
            changes.append({name: value, "mix": 0.5})
        try:
            for change in changes:
                check_live(self.controls(**change), self._streamer.window)
        except LmdError as error:
            raise traitlets.TraitError(str(error)) from error
        return value

    def _on_control(self, change: Any) -> None:
        name = change["name"]
        if name in PROMPT_NAMES:
            text = f"{name[-1].upper()}: {change['new']}"
            self._change("prompt", text if name != "mix" else f"mix {self.mix:.2f}", self.prompt)
        else:
            label = next(f["label"] for f in self.fields if f["name"] == name)
            value = f"{change['new']:g}" if isinstance(change["new"], float) else change["new"]
            self._change(name, f"{label} {value}", change["new"])

    def _change(self, name: str, text: str, value: Any) -> None:
        if (engine := self._alive()) is None:
            return
        with self._lock:  # the news of its block must not overtake this note
            change = engine.change(**{name: value})
            ids = [self._asking_id] if self._asking_id else []
            prompt = self.prompt_traits() if name == "prompt" else None
            self._asked[change.number] = (ids, text, prompt)

    def _on_hold(self, change: Any) -> None:
        if (engine := self._alive()) is not None:
            engine.hold(change["new"])

    def _on_pacing(self, _change: Any) -> None:
        if (engine := self._alive()) is not None:
            engine.configure(**self.pacing())

    def _alive(self) -> LiveEngine | None:
        """The engine, if it has not ended."""
        return None if self.engine is None or self.engine.wait(0) else self.engine

    def _start(self, limit_s: float = math.inf) -> LiveEngine:
        if self.sink == "soundcard":
            if LivePlayer._sounding not in (None, self):
                LivePlayer._sounding.stop()
            LivePlayer._sounding = self
        options = EngineOptions(limit_s=limit_s, **self.pacing())
        sink, controls = self._make_sink(skip_waits=limit_s < math.inf), self.controls()
        check_live(controls, self._streamer.window)
        self.take_folder.mkdir(parents=True, exist_ok=True)
        name = f"take-{time.strftime('%Y%m%d-%H%M%S')}-{secrets.token_hex(2)}.jsonl"
        begin = self._begin_from
        self._header = self._header or header_of(self._streamer, self._source)
        take = begin_take(self.take_folder / name, self._header, self._streamer, begin)
        engine = LiveEngine(self._streamer, sink, controls, options, start=begin, take=take)
        engine.on_event = self._on_event
        self.engine, self.take_path, self.message = engine, str(take.path), ""
        self._asked.clear()
        self.hold = False
        self._playing = self.prompt_traits()
        engine.start()
        threading.Thread(target=self._follow, args=(engine,), daemon=True).start()
        return engine

    def _make_sink(self, skip_waits: bool) -> Sink:
        if self.sink == "null":
            return NullSink(SkippingClock() if skip_waits else None)
        if self.sink == "soundcard":
            return SoundCardSink()
        before, self._page_sink = self._page_sink, BrowserSink(self._send_to_page)
        self._page_sink.epoch = before.epoch if before is not None else 0
        return self._page_sink

    def _send_to_page(self, message: dict[str, Any], buffers: list[bytes]) -> None:
        self.send(message | {"to": self._page}, buffers)

    def _on_event(self, event: Event) -> None:
        if isinstance(event, Meters):
            self._show_meters(event)
        elif isinstance(event, Made):
            self._place("made", event.own_sample, text=str(event.number))
        elif isinstance(event, AppliedChange):
            with self._lock:
                ids, text, prompt = self._asked.pop(event.change.number, ([], "", None))
                self._playing = prompt or self._playing
            self._place("applied", event.sample, ids=ids, text=text, block=event.block)
        else:
            self.message = event.message
            if event.kind == "refused":  # the old prompt plays on: show it
                for name, value in self._playing.items():
                    self.set_trait(name, value)
            elif event.kind == "recording":
                self.recording = ""

    def _place(self, kind: str, sample: int, **values: Any) -> None:
        """Tell the page that plays what belongs to a sample."""
        if self._page_sink is not None:
            values |= {"kind": kind, "epoch": self._page_sink.epoch, "sample": sample}
            self._send_to_page(values, [])

    def _follow(self, engine: LiveEngine) -> None:
        """Show the meters until the engine ends, and that it has."""
        while not engine.wait(METERS_EVERY_S) and engine is self.engine:
            self._show_meters(engine.meters())
            self.send({"kind": "alive"})  # meters that stay as they are are not sent again
        if engine is self.engine:
            self._show_meters(engine.meters())

    def _show_meters(self, meters: Meters) -> None:
        values = dataclasses.asdict(meters)
        infinite = {k for k, v in values.items() if isinstance(v, float) and not math.isfinite(v)}
        self.meters = values | dict.fromkeys(infinite)
        self.state = meters.state
        if meters.state in ("stopped", "failed"):
            self.recording = ""
            self.message = meters.error if meters.state == "failed" else self.message
