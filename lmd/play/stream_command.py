"""`python -m lmd stream`: music into a file, or paced by a clock to measure how it keeps up.

python -m lmd stream "church organ, slow, minor" --seconds 60 -o out.wav --take out.jsonl
"""

import argparse
import dataclasses
import json
from pathlib import Path

from tqdm import tqdm

from lmd.checkpoint import write_atomic
from lmd.config import REGIMES
from lmd.errors import LmdError
from lmd.play.control_queue import check_live
from lmd.play.engine import EngineOptions, Event, LiveEngine
from lmd.play.pace import Made, Meters, percentile
from lmd.play.play_queue import Sink
from lmd.play.sinks import FileSink, NullSink, SoundCardSink, check_audio_path
from lmd.play.takes import TakeWriter, header_of
from lmd.pretrained import DTYPES, Instrument, open_instrument
from lmd.stream.samplers import SAMPLERS

MAX_SECONDS = 24 * 3600
SETTABLE = ("cfg_scale", "n_steps", "sampler", "regime", "block_frames", "seed")


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the arguments."""
    parser.add_argument("prompt", help='what to play, e.g. "church organ, slow, minor"')
    parser.add_argument("--seconds", type=float, default=60.0, help="of music (default 60)")
    parser.add_argument("-o", "--output", type=Path, help="wav or flac file to write")
    parser.add_argument("--take", type=Path, help="JSON lines to write, for `lmd replay`")
    parser.add_argument("--json", type=Path, help="write measurements to this file")
    parser.add_argument("--paced", action="store_true", help="keep real time, heard by nobody")
    parser.add_argument("--play", action="store_true", help="keep real time on the sound card")
    parser.add_argument("--queue", type=float, help="seconds to make ahead (default two blocks)")
    parser.add_argument("--source", default="best", help="weights (default: the best there are)")
    parser.add_argument("--preset", default="small", help="tiny, small, paper (for --source best)")
    parser.add_argument("--device", default="auto", help="cpu, cuda, mps or auto")
    words = "of the model (default float32); bfloat16 is slower where the processor has none"
    parser.add_argument("--dtype", choices=DTYPES, help=words)
    parser.add_argument("--cfg-scale", type=float, help="guidance, 1 = off")
    parser.add_argument("--steps", type=int, dest="n_steps", help="model calls per block")
    parser.add_argument("--sampler", choices=tuple(SAMPLERS))
    parser.add_argument("--regime", choices=REGIMES)
    parser.add_argument("--block-frames", type=int)
    parser.add_argument("--seed", type=int)
    parser.add_argument("--auto", action="store_true", help="fewer steps when too slow")


def main(args: argparse.Namespace) -> int:
    """Stream; status 1 if a paced stream ran dry or a block could not be played."""
    _check(args)
    instrument = open_instrument(
        args.source, preset_name=args.preset, device=args.device, dtype=args.dtype
    )
    print(f"playing on {instrument.description}")
    engine = engine_of(args, instrument)
    meters = run_with_progress(engine, args.seconds)
    summary = summarize(engine, instrument, meters)
    if args.json is not None:
        write_atomic(args.json, (json.dumps(summary, indent=2) + "\n").encode())
    print(
        f"{meters.played_s:.1f} s of music, {summary['rtf_all']:.2f}× real time, "
        f"{meters.underruns} underruns" + (f"; {meters.error}" if meters.error else "")
    )
    return 1 if meters.underruns or summary["faults"] else 0


def _check(args: argparse.Namespace) -> None:
    """Refuse arguments that cannot be met, before anything is loaded."""
    if not 0 < args.seconds <= MAX_SECONDS:
        raise LmdError(f"--seconds {args.seconds}", f"up to {MAX_SECONDS}", "Give a number.")
    if args.output is None and not (args.paced or args.play):
        raise LmdError("nowhere to play to", "-o FILE, --paced or --play", "Name an output.")
    if args.output is not None:
        check_audio_path(args.output)
    if args.paced and args.play:
        raise LmdError("both --paced and --play", "one of them", "Drop one.")


def engine_of(args: argparse.Namespace, instrument: Instrument) -> LiveEngine:
    """The engine that the arguments ask for."""
    asked = {name: value for name in SETTABLE if (value := getattr(args, name)) is not None}
    controls = instrument.controls(args.prompt, **asked)
    check_live(controls, instrument.streamer.window)
    options = EngineOptions(queue_s=args.queue, auto_steps=args.auto, limit_s=args.seconds)
    sink: Sink
    if args.play:
        sink = SoundCardSink()
    elif args.paced:
        sink = NullSink()
    else:
        sink = FileSink(args.output, limit_s=args.seconds)
    take = None
    if args.take is not None:
        take = TakeWriter(args.take, header_of(instrument.streamer, instrument.source))
    engine = LiveEngine(instrument.streamer, sink, controls, options, take=take)
    if args.output is not None and (args.paced or args.play):
        try:
            engine.record(args.output, limit_s=args.seconds)
        except LmdError:
            if take is not None:
                take.close()
            raise
    return engine


def run_with_progress(engine: LiveEngine, seconds: float) -> Meters:
    """Play to the end behind a progress bar that counts seconds of music.

    Raises:
        LmdError: a refusal on the engine's thread.
        RuntimeError: the engine failed.
    """
    with tqdm(total=round(seconds), unit="s", desc="music", mininterval=1.0) as bar:

        def follow(event: Event) -> None:
            if isinstance(event, Made):
                bar.update(round(min(engine.meters().played_s, seconds)) - bar.n)

        engine.on_event = follow
        engine.start()
        try:
            while not engine.wait(0.5):
                pass
        except BaseException:
            engine.stop()
            raise
    if isinstance(engine.failure, LmdError):
        raise engine.failure
    engine.stop()
    return engine.meters()


def summarize(engine: LiveEngine, instrument: Instrument, meters: Meters) -> dict[str, object]:
    """What a stream measured, ready for JSON; times in ms are per block."""
    history = list(engine.ledger.history)
    costs_ms = [1e3 * made.made_s for made in history]
    made_s = sum(made.made_s for made in history)
    return {
        "source": instrument.source,
        "preset": instrument.preset.name,
        "controls": dataclasses.asdict(engine.desk.asked()),
        "meters": dataclasses.asdict(meters),
        "rtf_all": sum(made.length_s for made in history) / made_s if made_s else 0.0,
        "block_ms_p50": percentile(costs_ms, 50),
        "block_ms_p95": percentile(costs_ms, 95),
        "block_ms_max": max(costs_ms, default=None),
        "level_db_p50": percentile([made.level_db for made in history], 50),
        "faults": sum(made.fault is not None for made in history),
    }
