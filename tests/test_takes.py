"""Takes: written while playing, read back whole or broken off, played again to the bit."""

import json
import random
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
from fake_streamer import SAMPLES_PER_FRAME, FakeStreamer, LoudStreamer, VirtualClock

from lmd.__main__ import main
from lmd.errors import LmdError
from lmd.play.engine import EngineOptions, LiveEngine
from lmd.play.guard import Guarded
from lmd.play.pace import Made, Trouble
from lmd.play.sinks import NullSink, Sink
from lmd.play.takes import (
    OLD_NAMES,
    SampleHash,
    TakeHeader,
    TakeWriter,
    fingerprint,
    header_of,
    play_again,
    read_take,
)
from lmd.play.timeline import Timeline
from lmd.pretrained import QuietCodec, open_instrument
from lmd.stream.controls import Controls

SOURCE = "random:tiny:0"
CHOICES: dict[str, list[object]] = {
    "prompt": ["organ", "harp, fast", (("organ", 0.3), ("harp, fast", 0.7)), "“drums” \n{x}"],
    "cfg_scale": [1.0, 2.5],
    "n_steps": [1, 2, 3],
    "sampler": ["euler", "dpmpp", "pingpong"],
    "block_frames": [4, 6, 8],
    "regime": ["full", "enc-dec", "block-causal"],
    "seed": [0, 1, 2**40],
    "drop_context_frames": [48, 192],
    "boundary": ["exact", "fade"],
}


def play_take(folder: Path, n_changes: int = 24) -> tuple[Path, Path]:
    """Play with the real streamer, changing something at every block; the take and the wav."""
    rng = random.Random(11)
    instrument = open_instrument(SOURCE)
    header = header_of(instrument.streamer, instrument.source)
    take, wav = folder / "take.jsonl", folder / "take.wav"

    def follow(event: object) -> None:
        if isinstance(event, Made):
            if event.number < n_changes:
                name = list(CHOICES)[event.number % len(CHOICES)]
                now = getattr(engine.control_queue.asked(), name)
                engine.change(**{name: rng.choice([v for v in CHOICES[name] if v != now])})
            else:
                engine.configure(limit_s=0.1)

    engine = LiveEngine(
        instrument.streamer,
        Sink(),
        Controls(prompt="organ", block_frames=4, n_steps=2),
        take=TakeWriter(take, header),
        on_event=follow,
    )
    engine.record(wav)
    engine.run()
    assert engine.failure is None, engine.failure
    return take, wav


@pytest.fixture(scope="module")
def played(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    return play_take(tmp_path_factory.mktemp("take"))


def test_a_take_is_the_same_samples_in_a_fresh_process(played: tuple[Path, Path]) -> None:
    take_path, wav = played
    take = read_take(take_path)
    assert len(take.changes) >= 21
    again, figure = take_path.with_name("again.wav"), take_path.with_name("take.png")
    done = subprocess.run(
        [sys.executable, "-m", "lmd", "replay", take_path, "-o", again, "--figure", figure],
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert f"the same samples (SHA-256 {take.sha256[:16] if take.sha256 else None}" in done.stdout
    first, rate = soundfile.read(wav, dtype="float32")
    second, _ = soundfile.read(again, dtype="float32")
    assert rate == take.header.sample_rate
    assert first.size == take.n_samples
    assert np.array_equal(first, second)
    assert figure.read_bytes().startswith(b"\x89PNG")


def test_every_change_is_noted_with_its_block_and_sample(played: tuple[Path, Path]) -> None:
    lines = [json.loads(line) for line in played[0].read_text().splitlines()]
    notes = [line for line in lines if "controls" in line]
    assert [note["block"] for note in notes] == sorted(note["block"] for note in notes)
    assert all(len(note["controls"]) <= 2 for note in notes[1:])  # only what changed
    take = read_take(played[0])
    forgets = [controls.drop_context_frames for controls in take.controls()]
    assert sum(1 for f in forgets if f) == 2 or sum(1 for f in forgets if f) == 3
    assert take.changes[0] == Controls(prompt="organ", block_frames=4, n_steps=2)


def test_other_samples_are_noticed(played: tuple[Path, Path], tmp_path: Path) -> None:
    text = played[0].read_text().replace('"seed": 0', '"seed": 3', 1)
    changed = tmp_path / "changed.jsonl"
    changed.write_text(text)
    assert main(["replay", str(changed)]) == 1


def test_other_weights_are_refused(played: tuple[Path, Path]) -> None:
    with pytest.raises(LmdError, match="model_sha256"):
        next(play_again(read_take(played[0]), open_instrument("random:tiny:1").streamer))
    assert main(["replay", str(played[0]), "--source", "random:tiny:1"]) == 2


def test_a_take_that_broke_off_still_plays(played: tuple[Path, Path], tmp_path: Path) -> None:
    lines = played[0].read_text().splitlines()
    broken = tmp_path / "broken.jsonl"
    broken.write_text("\n".join(lines[:8]) + "\n" + lines[8][:20])
    take = read_take(broken)
    assert take.sha256 is None
    assert take.n_blocks == max(take.changes) + 1
    assert main(["replay", str(broken)]) == 0


def test_a_take_that_broke_off_after_a_long_quiet_stretch_has_its_blocks(tmp_path: Path) -> None:
    streamer, path = FakeStreamer(), tmp_path / "long.jsonl"
    writer = TakeWriter(path, header_of(streamer, "fake"))
    timeline = Timeline(streamer, Guarded(streamer.start()))
    controls = Controls(prompt="organ\u2028harp\u0085", block_frames=4)  # line ends of Unicode
    for _ in range(30):
        timeline.append(controls)
        writer.heard(*timeline.settle(timeline.n_samples))
    take = read_take(path)  # as the file is when the power goes
    assert (take.n_blocks, take.n_samples, take.sha256) == (24, 23 * 4 * SAMPLES_PER_FRAME, None)
    assert take.changes[0] == controls
    writer.close()
    assert read_take(path).n_blocks == 30


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (lambda text: "", "a take"),
        (lambda text: "not json\n", "a take"),
        (lambda text: "[1, 2]\n", "a take"),
        (lambda text: text.replace("lmd-take-2", "lmd-take-9"), "lmd-take-2"),
        (lambda text: text.replace('"n_threads"', '"threads"'), "unknown keys"),
        (lambda text: text.splitlines()[0], "block 0"),
        (lambda text: text.replace('"seed": 0', '"sed": 0', 1), "line 2"),
        (lambda text: text.replace('{"block": 0', '{"block": "x"', 1), "line 2"),
    ],
)
def test_what_is_no_take_is_refused(
    played: tuple[Path, Path], tmp_path: Path, spoil: Callable[[str], str], said: str
) -> None:
    path = tmp_path / "x.jsonl"
    path.write_text(spoil(played[0].read_text()))
    with pytest.raises(LmdError, match=said):
        read_take(path)
    with pytest.raises(LmdError, match="No such file"):
        read_take(tmp_path / "nowhere.jsonl")


def test_a_take_never_overwrites_another(played: tuple[Path, Path]) -> None:
    header = TakeHeader("", "", "", "", 1, 1, 1, "")
    for path in (played[0], played[0].parent / "no" / "take.jsonl"):
        with pytest.raises(LmdError, match="a new file in a folder that exists"):
            TakeWriter(path, header)


def test_faults_and_underruns_are_noted_and_faults_play_again(tmp_path: Path) -> None:
    clock = VirtualClock()
    streamer = FakeStreamer(clock, lambda index, controls: 8.0 if index == 6 else 0.2)
    streamer.poison = {3, 9, 10}
    path = tmp_path / "take.jsonl"
    engine = LiveEngine(
        streamer,
        NullSink(clock),
        options=EngineOptions(limit_s=40),
        take=TakeWriter(path, header_of(streamer, "fake")),
    )
    engine.run()
    assert engine.failure is None, engine.failure
    take = read_take(path)
    assert sorted(take.faults) == [3, 9, 10]
    assert [block for block, _ in take.underruns] == [6]
    digest = SampleHash()  # over the whole: the hash does not depend on the cuts
    digest.update(np.concatenate(list(play_again(take, FakeStreamer())), axis=-1))
    assert digest.hexdigest() == take.sha256


def test_a_take_of_nothing_leaves_no_file(tmp_path: Path) -> None:
    writer = TakeWriter(tmp_path / "none.jsonl", header_of(open_instrument(SOURCE).streamer, ""))
    assert writer.path.is_file()
    writer.close()
    assert not writer.path.exists()


@pytest.mark.parametrize(
    ("name", "value", "told"),
    [
        ("n_steps", 0, "n_steps = 0"),
        ("regime", "x", "regime = 'x'"),
        ("block_frames", "48", "block_frames = '48'"),
    ],
)
def test_controls_in_a_take_that_cannot_be_played_are_refused(
    name: str, value: object, told: str, played: tuple[Path, Path], tmp_path: Path
) -> None:
    lines = [json.loads(line) for line in played[0].read_text().splitlines()]
    lines[1]["controls"][name] = value
    path = tmp_path / "edited.jsonl"
    path.write_text("\n".join(map(json.dumps, lines)) + "\n")
    with pytest.raises(LmdError, match=told):
        list(play_again(read_take(path), open_instrument(SOURCE).streamer))


def test_a_picture_that_could_not_be_drawn_is_refused_before_anything_is_played(
    played: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    wrong = {"take.xyz": "a .png or .pdf or .svg file", "nowhere/take.png": "a folder that exists"}
    for figure, said in wrong.items():
        words = ["replay", str(played[0]), "-o", str(tmp_path / "again.wav")]
        assert main([*words, "--figure", str(tmp_path / figure)]) == 2
        assert said in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("name", "value"), [("n_threads", 0), ("n_threads", "x"), ("source", 5), ("text", None)]
)
def test_a_take_header_with_something_else_than_it_should_hold_is_refused(
    name: str, value: object, played: tuple[Path, Path], tmp_path: Path
) -> None:
    first, *rest = played[0].read_text().splitlines()
    path = tmp_path / "edited.jsonl"
    path.write_text("\n".join([json.dumps(json.loads(first) | {name: value}), *rest]) + "\n")
    with pytest.raises(LmdError, match=f"edited.jsonl with {name} {value!r}"):
        read_take(path)


def test_the_fingerprint_sees_one_changed_weight() -> None:
    part = torch.nn.Linear(3, 3)
    before = fingerprint(part)
    assert fingerprint(part) == before
    with torch.no_grad():
        part.weight[1, 1] += 1e-6
    assert fingerprint(part) != before


def test_a_take_in_half_precision_is_the_same_samples_again(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "take.jsonl"
    words = ["--source", SOURCE, "--dtype", "bfloat16", "--steps", "2", "--seconds", "2"]
    words += ["-o", str(tmp_path / "played.wav"), "--take", str(path)]
    assert main(["stream", "organ", *words]) == 0
    assert read_take(path).header.source == f"{SOURCE}@bfloat16"
    # The take knows the precision, whoever has the weights.
    for place in ([], ["--source", SOURCE]):
        assert main(["replay", str(path), *place]) == 0
    assert capsys.readouterr().out.count("the same samples") == 2


def test_random_weights_are_not_deafening() -> None:
    instrument = open_instrument(SOURCE)
    assert isinstance(instrument.streamer.codec, QuietCodec)
    assert not instrument.is_trained
    block, _ = instrument.streamer.step(instrument.streamer.start(), Controls())
    assert 0.01 < float(block.wave.square().mean().sqrt()) < 0.4


def test_a_take_that_finds_no_room_ends_and_the_music_goes_on(tmp_path: Path) -> None:
    clock, events = VirtualClock(), []
    writer = TakeWriter(tmp_path / "take.jsonl", header_of(FakeStreamer(), "fake"))
    writer._file.close()
    writer._file = open("/dev/full", "w")  # noqa: SIM115
    engine = LiveEngine(
        FakeStreamer(clock),
        NullSink(clock),
        options=EngineOptions(limit_s=20),
        take=writer,
        on_event=events.append,
    )
    engine.run()
    assert engine.failure is None
    assert engine.meters().played_s >= 20
    (trouble,) = [event for event in events if isinstance(event, Trouble)]
    assert trouble.kind == "take"
    assert "No space left on device" in trouble.message


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("blocknull", "line 3: blocks None; expected a whole number up to"),
        ("floatblocks", "line 3: blocks inf; expected a whole number up to"),
        ("hugeblocks", "line 3: blocks 1000000000000; expected a whole number up to"),
        ("sr", "with sample_rate 1; expected 22050"),
    ],
)
def test_a_take_from_elsewhere_is_refused_with_its_line(
    name: str, said: str, fixtures: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["replay", str(fixtures / "takes" / f"{name}.jsonl"), "-o", str(tmp_path / "x.wav")]
    assert main([*words, "--source", "random:small:0:codec"]) == 2
    assert said in capsys.readouterr().err.splitlines()[-1]
    assert not list(tmp_path.iterdir())


LINE = '{"block": 0, "sample": 0, "controls": {"seed": 1}}'


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ('{"blocks": -1, "samples": 1}', "blocks -1"),
        ('{"blocks": true, "samples": 1}', "blocks True"),
        ('{"blocks": 1, "samples": 1, "sha256": 7}', "sha256 7; expected a text"),
        ('{"block": 0.5, "sample": 0, "controls": {}}', "block 0.5"),
        ('{"block": 0, "sample": null, "fault": "x"}', "sample None"),
        ('{"block": 10000000, "sample": 0, "underrun": true}', "block 10000000"),
        ('{"block": 1, "sample": 9, "threads": 1e9}', "threads 1000000000.0"),
        ('{"block": 1, "sample": 9, "controls": [1]}', "has no attribute"),
        ("[1, 2]", "expected names and values in braces"),
        ("[" * 100_000, "recursion"),
        ("", "Expecting value"),
    ],
)
def test_a_line_that_no_writer_wrote_is_refused_with_its_number(
    line: str, said: str, tmp_path: Path
) -> None:
    writer = TakeWriter(tmp_path / "take.jsonl", header_of(FakeStreamer(), "fake"))
    writer._file.write(f"{LINE}\n{line}\n{LINE}\n")
    writer._file.close()
    with pytest.raises(LmdError, match="line 3: ") as refusal:
        read_take(writer.path)
    assert said in str(refusal.value)


def test_more_threads_than_the_machine_has_are_left_out_with_a_word(
    played: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before, path = torch.get_num_threads(), tmp_path / "take.jsonl"
    first, *rest = played[0].read_text().splitlines()
    path.write_text("\n".join([json.dumps(json.loads(first) | {"n_threads": 50_000}), *rest]))
    assert main(["replay", str(path)]) in (0, 1)
    assert "50000 threads in the take" in capsys.readouterr().out
    assert torch.get_num_threads() == before


def test_a_take_of_before_the_renaming_plays_the_same(
    played: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text = played[0].read_text()
    for old, new in OLD_NAMES.items():
        assert f'"{new}"' in text
        text = text.replace(f'"{new}"', f'"{old}"')
    path = tmp_path / "old.jsonl"
    path.write_text(text)
    assert read_take(path).changes == read_take(played[0]).changes
    assert main(["replay", str(path)]) == 0
    assert "the same samples" in capsys.readouterr().out


def test_a_take_of_before_the_limiter_plays_as_loud_as_it_was(tmp_path: Path) -> None:
    for limited, loudest in ((True, 1.0), (False, 4.0)):
        streamer = LoudStreamer()
        header = replace(header_of(streamer, "fake"), limited=limited)
        writer = TakeWriter(tmp_path / f"{limited}.jsonl", header)
        timeline = Timeline(streamer, Guarded(streamer.start()), limited)
        for _ in range(2):
            timeline.append(Controls())
        writer.heard(*timeline.settle(timeline.n_samples))
        writer.close()
        take, digest = read_take(writer.path), SampleHash()
        peaks = []
        for samples in play_again(take, LoudStreamer()):
            digest.update(samples)
            peaks.append(float(np.abs(samples).max()))
        assert digest.hexdigest() == take.sha256
        assert max(peaks) == pytest.approx(loudest, abs=1e-3)
