"""`lmd stream`: music into a file, or paced by a clock to measure how it keeps up.

lmd stream "church organ, slow, minor" --seconds 60 -o out.wav --take out.jsonl
"""

import dataclasses
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from lmd.config import Regime
from lmd.errors import LmdError
from lmd.outputs import check_apart, check_outputs, write_json
from lmd.play.audio_file import check_audio_path, read_audio
from lmd.play.engine import EngineOptions, Event, LiveEngine, wait_with_bar
from lmd.play.pace import Trouble, percentile
from lmd.play.sinks import NullSink, Sink, SoundCardSink
from lmd.play.takes import begin_take, header_of
from lmd.pretrained import Instrument, open_instrument
from lmd.stream.samplers import SamplerName

SETTABLE = ("cfg_scale", "n_steps", "sampler", "regime", "block_frames", "seed")


@dataclass(frozen=True)
class Options:
    """What to stream, and where to."""

    prompt: tyro.conf.Positional[str]  # What to play, e.g. "church organ, slow, minor".
    seconds: float = 60.0  # Of music.
    output: Annotated[Path | None, tyro.conf.arg(aliases=["-o"])] = None  # Wav or flac to write.
    prompt_at: tyro.conf.UseAppendAction[tuple[tuple[float, str], ...]] = ()  # Second, prompt.
    continue_from: Path | None = None  # A sound file whose last seconds are the first context.
    take: Path | None = None  # JSON lines to write, for `lmd replay`.
    json: Path | None = None  # Write measurements to this file.
    paced: bool = False  # Keep real time, heard by nobody.
    play: bool = False  # Keep real time on the sound card.
    queue: float | None = None  # Seconds to make ahead (two blocks by default).
    answer: Literal["at once", "next block"] = "at once"  # When a change is heard.
    commit_frames: int = 0  # So much of a plan is played before it is made again (0: all).
    source: str = "best"  # best, arc, finetuned, base, FOLDER:KIND, random:PRESET:SEED, graphs.
    preset: str = "small"  # tiny, small or paper (for --source best).
    device: str = "auto"  # cpu, cuda, mps or auto.
    engine: Literal["auto", "torch", "graph"] = "auto"  # What computes (graphs on a CPU).
    dtype: Literal["float32", "bfloat16", "int8"] | None = None  # Of products (default float32).
    cfg_scale: float | None = None  # Guidance, 1 = off.
    n_steps: Annotated[int | None, tyro.conf.arg(name="steps")] = None  # Per block and branch.
    sampler: SamplerName | None = None  # How noise becomes music.
    regime: Regime | None = None  # Who sees whom.
    block_frames: int | None = None  # Length of a block.
    seed: int | None = None  # Of the noise.
    auto: bool = False  # Fewer steps when too slow.


def main(options: Options) -> int:
    """Stream; status 1 if a paced stream ran dry, a block could not be played or a take ended."""
    _check(options)
    instrument = open_instrument(
        options.source,
        preset_name=options.preset,
        device=options.device,
        dtype=options.dtype,
        engine=options.engine,
    )
    print(f"playing on {instrument.description}")
    engine, was_interrupted = _engine(options, instrument), False
    lost: list[str] = []  # what is said of files that could not be finished

    def follow(event: Event) -> None:
        if isinstance(event, Trouble) and event.kind in ("take", "recording"):
            lost.append(event.message)
            if not (options.paced or options.play):  # then nobody hears the rest
                engine.stop()

    engine.on_event = follow
    try:
        engine.start()
        wait_with_bar(engine, options.seconds)
    except KeyboardInterrupt:
        was_interrupted = True
    except RuntimeError as failure:
        if isinstance(failure.__cause__, LmdError):
            raise failure.__cause__ from None
        raise
    summary = summarize(engine, instrument)
    if options.json is not None:
        write_json(options.json, summary)
    meters = engine.meters()
    words = f"{min(meters.played_s, options.seconds):.1f} s of music, "
    words += f"{summary['rtf_all']:.2f}× real time, {meters.underruns} underruns"
    if summary["limited_db"] > 0:
        words += f", turned down by up to {summary['limited_db']:.0f} dB to full scale"
    print(words + (f"; {meters.error}" if meters.error else ""))
    if was_interrupted:
        print("lmd stream: interrupted; what was written is finished", file=sys.stderr)
        return 130
    return int(bool(meters.underruns or summary["faults"] or lost))


def _check(options: Options) -> None:
    """Refuse what cannot be met, before anything is loaded."""
    if not 0.01 <= options.seconds <= 24 * 3600:
        raise LmdError(f"--seconds {options.seconds}", "0.01 to 86400", "Give such a number.")
    if options.output is None and not (options.paced or options.play):
        raise LmdError("nowhere to play to", "-o FILE, --paced or --play", "Name an output.")
    if options.output is not None:
        check_audio_path(options.output)
    if options.paced and options.play:
        raise LmdError("both --paced and --play", "one of them", "Drop one.")
    outputs = {"output": options.output, "take": options.take, "json": options.json}
    check_outputs(**outputs, json_key="rtf_all")
    if options.continue_from is not None:
        read = {"continue-from": options.continue_from}
        check_apart(**read, **{name: path for name, path in outputs.items() if path})


def _engine(options: Options, instrument: Instrument) -> LiveEngine:
    """The engine that the options ask for."""
    asked = {name: value for name in SETTABLE if (value := getattr(options, name)) is not None}
    controls = instrument.controls(options.prompt, **asked)
    pacing = EngineOptions(
        queue_s=options.queue,
        auto_steps=options.auto,
        answer=options.answer,
        commit_frames=options.commit_frames,
        limit_s=options.seconds,
    )
    sink = SoundCardSink() if options.play else NullSink() if options.paced else Sink()
    streamer, start = instrument.streamer, None
    if options.continue_from is not None:
        codec = streamer.codec
        given = (codec.sample_rate, codec.channels, streamer.window_s)
        start = streamer.start(context=read_audio(options.continue_from, *given))
    engine = LiveEngine(streamer, sink, controls, pacing, start=start)
    for second, prompt in options.prompt_at:
        engine.change_at(second, prompt=prompt)
    if options.take is not None:  # first: it replaces nothing
        engine.take = begin_take(
            options.take, header_of(streamer, instrument.source), streamer, start
        )
    try:
        if options.output is not None:
            engine.record(options.output, limit_s=options.seconds)
    except LmdError:
        if engine.take is not None:
            engine.take.close()
        raise
    return engine


def summarize(engine: LiveEngine, instrument: Instrument) -> dict[str, Any]:
    """What a stream measured, ready for JSON; times in ms are per block."""
    history = list(engine.ledger.history)
    costs_ms = [1e3 * made.made_s for made in history]
    made_s = sum(made.made_s for made in history)
    return {
        "source": instrument.source,
        "preset": instrument.preset.name,
        "controls": dataclasses.asdict(engine.control_queue.asked()),
        "meters": dataclasses.asdict(engine.meters()),
        "rtf_all": sum(made.length_s for made in history) / made_s if made_s else 0.0,
        "block_ms_p50": percentile(costs_ms, 50),
        "block_ms_p95": percentile(costs_ms, 95),
        "block_ms_max": max(costs_ms, default=None),
        "level_db_p50": percentile([made.level_db for made in history], 50),
        "limited_db": max((made.limited_db for made in history), default=0.0),
        "faults": sum(made.fault is not None for made in history),
    }
