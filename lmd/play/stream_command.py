"""`python -m lmd stream`: music into a file, or paced by a clock to measure how it keeps up.

python -m lmd stream "church organ, slow, minor" --seconds 60 -o out.wav --take out.jsonl
"""

import dataclasses
import sys
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro
from tqdm import tqdm

from lmd.config import Regime
from lmd.errors import LmdError
from lmd.outputs import check_outputs, write_json
from lmd.play.audio_file import check_audio_path
from lmd.play.control_queue import check_live
from lmd.play.engine import EngineOptions, Event, LiveEngine
from lmd.play.pace import Made, Meters, Trouble, percentile
from lmd.play.sinks import FileSink, NullSink, Sink, SoundCardSink
from lmd.play.takes import TakeWriter, header_of
from lmd.pretrained import Instrument, open_instrument
from lmd.stream.samplers import SamplerName

MIN_SECONDS, MAX_SECONDS = 0.01, 24 * 3600
SETTABLE = ("cfg_scale", "n_steps", "sampler", "regime", "block_frames", "seed")


@dataclass(frozen=True)
class Options:
    """What to stream, and where to.

    Attributes:
        prompt: What to play, e.g. "church organ, slow, minor".
        seconds: Of music.
        output: Wav or flac file to write.
        take: JSON lines to write, for `lmd replay`.
        json: Write measurements to this file.
        paced: Keep real time, heard by nobody.
        play: Keep real time on the sound card.
        queue: Seconds to make ahead (two blocks by default).
        source: Weights: `best`, arc, finetuned, base, FOLDER:KIND or random:PRESET:SEED.
        preset: tiny, small or paper (for --source best).
        device: cpu, cuda, mps or auto.
        dtype: Of the model (float32 by default); bfloat16 is slower where the processor has none.
        cfg_scale: Guidance, 1 = off.
        n_steps: Steps per block and branch.
        sampler: How noise becomes music.
        regime: Who sees whom.
        block_frames: Length of a block.
        seed: Of the noise.
        auto: Fewer steps when too slow.
    """

    prompt: tyro.conf.Positional[str]
    seconds: float = 60.0
    output: Annotated[Path | None, tyro.conf.arg(aliases=["-o"])] = None
    take: Path | None = None
    json: Path | None = None
    paced: bool = False
    play: bool = False
    queue: float | None = None
    source: str = "best"
    preset: str = "small"
    device: str = "auto"
    dtype: Literal["float32", "bfloat16"] | None = None
    cfg_scale: float | None = None
    n_steps: Annotated[int | None, tyro.conf.arg(name="steps")] = None
    sampler: SamplerName | None = None
    regime: Regime | None = None
    block_frames: int | None = None
    seed: int | None = None
    auto: bool = False


def main(options: Options) -> int:
    """Stream; status 1 if a paced stream ran dry, a block could not be played or a take ended."""
    _check(options)
    instrument = open_instrument(
        options.source,
        preset_name=options.preset,
        device=options.device,
        dtype=options.dtype,
    )
    print(f"playing on {instrument.description}")
    engine = engine_of(options, instrument)
    spoiled: list[str] = []
    is_whole = True
    try:
        run_with_progress(engine, options.seconds, spoiled)
    except KeyboardInterrupt:
        is_whole = False
        with suppress(RuntimeError):
            engine.stop()
    meters = engine.meters()
    summary = summarize(engine, instrument, meters)
    if options.json is not None:
        write_json(options.json, summary)
    words = [f"{min(meters.played_s, options.seconds):.1f} s of music"]
    words += [f"{summary['rtf_all']:.2f}× real time", f"{meters.underruns} underruns"]
    if summary["limited_db"] > 0:
        words.append(f"turned down by up to {summary['limited_db']:.0f} dB to full scale")
    print(", ".join(words) + (f"; {meters.error}" if meters.error else ""))
    if not is_whole:
        print("lmd stream: interrupted; what was written is finished", file=sys.stderr)
        return 130
    return 1 if meters.underruns or summary["faults"] or spoiled else 0


def _check(options: Options) -> None:
    """Refuse what cannot be met, before anything is loaded."""
    if not MIN_SECONDS <= options.seconds <= MAX_SECONDS:
        limits = f"{MIN_SECONDS} to {MAX_SECONDS}"
        raise LmdError(f"--seconds {options.seconds}", limits, "Give such a number.")
    if options.output is None and not (options.paced or options.play):
        raise LmdError("nowhere to play to", "-o FILE, --paced or --play", "Name an output.")
    if options.output is not None:
        check_audio_path(options.output)
    if options.paced and options.play:
        raise LmdError("both --paced and --play", "one of them", "Drop one.")
    check_outputs(output=options.output, take=options.take, json=options.json)


def engine_of(options: Options, instrument: Instrument) -> LiveEngine:
    """The engine that the options ask for."""
    asked = {name: value for name in SETTABLE if (value := getattr(options, name)) is not None}
    controls = instrument.controls(options.prompt, **asked)
    check_live(controls, instrument.streamer.window)
    pacing = EngineOptions(queue_s=options.queue, auto_steps=options.auto, limit_s=options.seconds)
    sink: Sink
    if options.play:
        sink = SoundCardSink()
    elif options.paced:
        sink = NullSink()
    else:
        sink = FileSink(options.output, limit_s=options.seconds)
    take = None
    if options.take is not None:
        take = TakeWriter(options.take, header_of(instrument.streamer, instrument.source))
    engine = LiveEngine(instrument.streamer, sink, controls, pacing, take=take)
    if options.output is not None and (options.paced or options.play):
        try:
            engine.record(options.output, limit_s=options.seconds)
        except LmdError:
            if take is not None:
                take.close()
            raise
    return engine


def run_with_progress(engine: LiveEngine, seconds: float, spoiled: list[str]) -> None:
    """Play to the end behind a progress bar; what is said of lost files is added to `spoiled`.

    Raises:
        LmdError: a refusal on the engine's thread.
        RuntimeError: the engine failed.
    """
    with tqdm(total=round(seconds), unit="s", desc="music", mininterval=1.0) as bar:

        def follow(event: Event) -> None:
            if isinstance(event, Made):
                bar.update(round(min(engine.meters().played_s, seconds)) - bar.n)
            elif isinstance(event, Trouble) and event.kind in ("take", "recording"):
                spoiled.append(event.message)

        engine.on_event = follow
        engine.start()
        while not engine.wait(0.5):
            pass
    if isinstance(engine.failure, LmdError):
        raise engine.failure
    engine.stop()


def summarize(engine: LiveEngine, instrument: Instrument, meters: Meters) -> dict[str, object]:
    """What a stream measured, ready for JSON; times in ms are per block."""
    history = list(engine.ledger.history)
    costs_ms = [1e3 * made.made_s for made in history]
    made_s = sum(made.made_s for made in history)
    return {
        "source": instrument.source,
        "preset": instrument.preset.name,
        "controls": dataclasses.asdict(engine.control_queue.asked()),
        "meters": dataclasses.asdict(meters),
        "rtf_all": sum(made.length_s for made in history) / made_s if made_s else 0.0,
        "block_ms_p50": percentile(costs_ms, 50),
        "block_ms_p95": percentile(costs_ms, 95),
        "block_ms_max": max(costs_ms, default=None),
        "level_db_p50": percentile([made.level_db for made in history], 50),
        "limited_db": max((made.limited_db for made in history), default=0.0),
        "faults": sum(made.fault is not None for made in history),
    }
