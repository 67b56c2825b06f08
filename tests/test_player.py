"""The player without a browser: traits, messages, refusals; and its scripts under node."""

import json
import math
import random
import re
import shutil
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import soundfile
import torch
import traitlets
from comm import get_comm_manager
from fake_streamer import SAMPLE_RATE, FakeStreamer
from ipywidgets.widgets.widget import _instances

from lmd.config import preset
from lmd.errors import LmdError
from lmd.play.play_queue import PlayQueue
from lmd.play.player import LivePlayer
from lmd.play.player_traits import CONTROL_NAMES, HERE, SCRIPTS
from lmd.play.takes import read_take
from lmd.pretrained import Instrument
from lmd.stream.controls import Controls
from lmd.stream.state import StreamState

HOSTILE = "<img src=x onerror=alert(1)>"
NODE = shutil.which("node")
SOURCES = {name: (HERE / name).read_text(encoding="utf-8") for name in SCRIPTS}


class Front:
    """A player and what it sends; `say` is what the page says."""

    def __init__(self, folder: Path, **options: Any) -> None:
        self.streamer = FakeStreamer()
        instrument = Instrument(self.streamer, preset("tiny"), "fake", is_trained=False)
        self.player = LivePlayer(instrument, take_folder=folder / "takes", **options)
        self.sent: list[dict[str, Any]] = []
        self.arrived = threading.Condition()
        self.player.send = self.receive  # type: ignore[method-assign]

    def receive(self, message: dict[str, Any], buffers: list[bytes] | None = None) -> None:
        with self.arrived:
            self.sent.append(message | {"n_buffers": len(buffers or [])})
            self.arrived.notify_all()

    def say(self, view: str = "page", **message: Any) -> None:
        self.player._on_message(self.player, message | {"view": view}, [])

    def wait_for(self, wanted: Callable[[dict[str, Any]], bool], after: int = 0) -> dict[str, Any]:
        deadline = time.monotonic() + 20
        with self.arrived:
            while time.monotonic() < deadline:
                for message in self.sent[after:]:
                    if wanted(message):
                        return message
                self.arrived.wait(0.1)
        raise AssertionError(f"never sent; got {[m['kind'] for m in self.sent[after:]]}")

    def wait_kind(self, kind: str, after: int = 0) -> dict[str, Any]:
        return self.wait_for(lambda message: message["kind"] == kind, after)


def wait_until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


@pytest.fixture
def front(tmp_path: Path) -> Iterator[Front]:
    front = Front(tmp_path, controls=Controls(prompt="organ", block_frames=4))
    yield front
    front.player.stop()


def test_play_opens_the_page_primes_it_and_runs_it(front: Front) -> None:
    front.say(kind="command", command="play")
    front.wait_for(lambda m: m["kind"] == "run" and m["running"])
    kinds = [m["kind"] for m in front.sent]
    assert kinds[0] == "open"
    assert kinds.index("audio") < kinds.index("run")
    audio = front.wait_kind("audio")
    assert audio["n_buffers"] == 1
    assert {m["to"] for m in front.sent} == {"page"}
    assert front.player.state == "playing"


def test_a_slider_moves_trait_and_stream_and_gets_its_block(front: Front) -> None:
    front.say(kind="command", command="play")
    front.wait_kind("run")
    front.say(kind="set", id=41, name="mix", value=0.25)
    applied = front.wait_kind("applied")
    assert front.player.mix == 0.25
    assert applied["ids"] == [41]
    assert applied["text"] == "mix 0.25"
    engine = front.player.engine
    assert engine is not None
    made = engine.ledger.history
    first = next(m for m in made if m.controls.prompt != "organ")
    assert first.controls.prompt == (("organ", 0.75), (front.player.prompt_b, 0.25))
    assert (applied["block"], applied["sample"]) == (first.number, first.first_sample)


def test_a_text_that_is_refused_leaves_the_panel_and_the_mix_goes_on(front: Front) -> None:
    encode = front.streamer.text.encode

    def fussy(prompts: list[str]) -> Any:
        if "harp" in prompts:
            raise LmdError("no harp", "another text", "Try the lute.")
        return encode(prompts)

    front.streamer.text.encode = fussy  # type: ignore[method-assign]
    front.say(kind="command", command="play")
    front.wait_kind("run")
    front.say(kind="set", id=1, name="prompt_a", value="harp")
    deadline = time.monotonic() + 20
    while front.player.prompt_a == "harp" and time.monotonic() < deadline:
        time.sleep(0.02)
    assert front.player.prompt_a == "organ"
    assert "no harp" in front.player.message
    front.say(kind="set", id=2, name="mix", value=0.5)
    assert (
        front.wait_for(lambda m: m["kind"] == "applied" and m["ids"] == [2])["text"] == "mix 0.50"
    )


def test_a_paused_player_goes_on_giving_signs_of_life(front: Front) -> None:
    front.say(kind="command", command="play")
    front.wait_for(lambda m: m["kind"] == "run" and m["running"])
    front.say(kind="command", command="pause")
    front.wait_kind("alive", after=len(front.sent))


def test_a_player_that_is_closed_or_whose_page_is_gone_plays_no_more(front: Front) -> None:
    front.say(kind="command", command="play")
    front.wait_kind("run")
    front.say(view="another", kind="gone")
    assert front.player.engine is not None
    assert not front.player.engine.wait(0)
    front.say(kind="gone")
    assert front.player.engine.wait(0)
    front.player.play()
    assert not front.player.engine.wait(0)
    front.player.close()
    assert front.player.engine.wait(0)


def test_thirty_players_that_were_shown_and_closed_leave_nothing_behind(tmp_path: Path) -> None:
    instrument = Instrument(FakeStreamer(), preset("tiny"), "fake", is_trained=False)
    comms, before = get_comm_manager().comms, set(_instances)
    n_comms = len(comms)
    for _ in range(30):
        player = LivePlayer(instrument, sink="null", take_folder=tmp_path)
        player._repr_mimebundle_()  # as a notebook shows it
        assert len(set(_instances) - before) == 2  # the player and its layout
        player.close()
    assert (set(_instances), len(comms)) == (before, n_comms)


def test_an_interrupted_cell_ends_its_stream(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    controls = Controls(prompt="organ", block_frames=4)
    player = Front(tmp_path, sink="null", controls=controls).player

    def interrupt(**_: object) -> None:
        assert player.engine is not None
        while not player.engine.ledger.history:  # else there is nothing to write down
            time.sleep(0.01)
        raise KeyboardInterrupt

    monkeypatch.setattr("lmd.play.engine.tqdm", interrupt)
    with pytest.raises(KeyboardInterrupt):
        player.play_for(1e6)
    assert player.engine is not None
    assert player.engine.wait(0)
    assert read_take(player.take_path).sha256 is not None


def test_a_folder_that_cannot_be_written_is_said_in_the_panel(front: Front, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    front.player.take_folder = tmp_path / "file/takes"
    front.say(kind="command", command="play")
    assert "Not a directory" in front.player.message
    assert front.player.engine is None


def test_the_state_at_the_end_is_the_last_word(front: Front) -> None:
    """The follower reads the meters, then the engine stops and says so, then the follower says."""
    front.player.sink = "null"
    engine = front.player._start()
    playing = replace(engine.meters(), state="playing")
    engine.stop()
    front.player._show_meters(playing)
    front.player._follow(engine)
    assert front.player.state == "stopped"


def test_a_trait_set_in_a_notebook_is_the_same_as_a_slider(front: Front) -> None:
    front.say(kind="command", command="play")
    front.wait_kind("run")
    front.player.n_steps = 3
    applied = front.wait_kind("applied")
    assert applied["text"] == "Steps 3"
    assert applied["ids"] == []
    assert front.player.controls().n_steps == 3
    with pytest.raises(traitlets.TraitError, match="1 to 64"):
        front.player.n_steps = 65
    assert front.player.n_steps == 3


def test_a_player_that_is_too_slow_says_what_would_help_and_auto_steps_does_it(
    tmp_path: Path,
) -> None:
    front = Front(tmp_path, sink="null", controls=Controls("organ", n_steps=8, block_frames=4))
    player, streamer = front.player, front.streamer
    streamer.clock = SimpleNamespace(spend=time.sleep)  # type: ignore[assignment]
    streamer.cost_s = lambda index, controls: 0.04 * controls.n_steps  # 0.32 s; a block has 0.2 s
    player.play()
    wait_until(lambda: "fewer steps" in player.message)
    wait_until(lambda: any("fewer steps" in line for line in player.meters.get("advice", ())))
    player.auto_steps = True
    wait_until(lambda: player.meters["n_steps"] < 8)
    assert player.n_steps == 8  # what was asked for stays
    player.stop()


def test_commands_pause_resume_drop_context_roll_restart_stop(front: Front) -> None:
    player = front.player
    front.say(kind="command", command="play")
    front.wait_kind("run")
    front.say(kind="command", command="pause")
    assert player.state == "paused"
    assert front.sent[-1]["running"] is False
    front.say(kind="command", command="play")
    assert player.state == "playing"
    front.say(kind="command", command="drop_context")
    applied = front.wait_kind("applied")
    assert applied["text"] == "drop 96"
    counters = {"silent": 0, "underruns": 0, "lowest": 0}
    front.say(kind="report", epoch=1, heard=applied["sample"] + 1, **counters)
    front.say(kind="command", command="roll")
    assert player.seed != 0
    first_take, n_sent = player.take_path, len(front.sent)
    front.say(kind="command", command="restart")
    assert front.wait_kind("open", n_sent)["epoch"] == 2
    assert player.take_path != first_take
    assert read_take(first_take).sha256 is not None
    front.say(kind="command", command="stop")
    assert player.state == "stopped"
    forgotten = [c.drop_context_frames for c in read_take(first_take).controls()]
    assert forgotten.count(96) == 1


def test_how_soon_a_change_is_heard_may_change_while_music_plays(front: Front) -> None:
    front.say(kind="command", command="play")
    front.wait_kind("run")
    assert front.player.engine is not None
    for name, value in (("answer", "next block"), ("commit_frames", 12), ("queue_blocks", 3)):
        front.say(kind="set", name=name, value=value)
    options = front.player.engine._planner.pacer.options
    assert (options.answer, options.commit_frames) == ("next block", 12)
    front.say(kind="set", name="hold", value=True)
    assert front.sent[-1]["kind"] == "hold"
    assert front.sent[-1]["on"] is True
    front.player.stop()


def test_the_player_goes_on_from_given_sound(front: Front, tmp_path: Path) -> None:
    soundfile.write(tmp_path / "given.wav", np.zeros(4000, np.float32), SAMPLE_RATE)
    begun, front.player._streamer.window_s = [], 12.0
    front.player._streamer.start = lambda **given: (
        begun.append(given) or StreamState(torch.zeros(1, 2, 4))
    )
    front.player.continue_from(tmp_path / "given.wav")
    sound = np.linspace(-1, 1, 800, dtype="<f4")
    front.player._on_message(None, {"kind": "context", "view": "page"}, [sound.tobytes()])
    assert front.wait_kind("open")["epoch"] == 1
    assert begun[0]["context"].shape == (1, 4000)
    assert np.array_equal(begun[1]["context"], sound[None])
    with pytest.raises(LmdError, match="sound that can be read"):
        front.player.continue_from(Path(__file__))
    front.player.stop()


def test_another_page_takes_over_and_the_first_falls_silent(front: Front) -> None:
    front.say(kind="command", command="play")
    front.wait_kind("run")
    front.say("other", kind="command", command="play")
    opened = front.wait_for(lambda m: m["kind"] == "open" and m["to"] == "other")
    assert opened["epoch"] == 2
    counters = {"silent": 0, "underruns": 9, "lowest": 0}
    front.say("page", kind="report", epoch=2, heard=10**6, **counters)
    sink = front.player._page_sink
    assert sink is not None
    assert sink.report().underruns == 0


def test_two_players_do_not_disturb_each_other(tmp_path: Path) -> None:
    fronts = [Front(tmp_path / str(i), controls=Controls(block_frames=4)) for i in range(2)]
    for front in fronts:
        front.say(kind="command", command="play")
    for front in fronts:
        front.wait_kind("run")
    fronts[0].player.stop()
    assert [front.player.state for front in fronts] == ["stopped", "playing"]
    fronts[1].player.stop()


NEVER = [None, [], {}, math.inf, math.nan, [["a", 0.5]]]
NO_INT = [*NEVER, True, "8", 2.5, -1]
NO_CHOICE = [*NEVER, True, "eight", "", 0]
NO_SWITCH = [*NEVER, 0, 1, 0.5, "on"]
WRONG: dict[Any, list[Any]] = {
    "prompt_a": [*NEVER, True, 0, "x" * 501],
    "prompt_b": [*NEVER, True, 2.5, "x" * 501],
    "mix": [*NEVER, True, "0.5", -1, 1.5, 10**12],
    "cfg_scale": [*NEVER, True, "8", -1, 101],
    "n_steps": [*NO_INT, 0, 65, 10**12],
    "sampler": NO_CHOICE,
    "regime": NO_CHOICE,
    "block_frames": [*NO_INT, 0, 7, 10**12],
    "boundary": NO_CHOICE,
    "drop_context_frames": [*NO_INT, 193, 10**12],
    "seed": [*NO_INT, 2**63],
    "roll_seed": NO_SWITCH,
    "queue_blocks": [*NEVER, True, "2", 0.5, 9],
    "auto_steps": NO_SWITCH,
    "answer": NO_CHOICE,
    "commit_frames": NO_INT,
    "hold": NO_SWITCH,
    "volume": [*NEVER, True, "1", -1, 2],
    **{name: [0, "x", None] for name in ["engine", "_esm", "state", "take_folder", None, 7]},
}
RIGHT: dict[Any, list[Any]] = {
    "prompt_a": ["organ", HOSTILE, ""],
    "prompt_b": ["harp", ""],
    "mix": [0, 0.25, 1],
    "cfg_scale": [1, 0.5, 8],
    "n_steps": [1, 8, 64],
    "sampler": ["euler", "dpmpp", "pingpong++", "euler++"],
    "regime": ["full", "enc-dec", "block-causal"],
    "block_frames": [4, 12, 48],
    "boundary": ["exact", "fade"],
    "drop_context_frames": [0, 96, 192],
    "seed": [0, 7, 2**31 - 1],
    "roll_seed": [True, False],
    "queue_blocks": [1, 1.5, 4],
    "auto_steps": [True, False],
    "answer": ["at once", "next block"],
    "commit_frames": [0, 12, 48],
    "hold": [True, False],
    "volume": [0, 0.5, 1],
}
SAID = {"prompt_a": ["a prompt of"], "prompt_b": ["a prompt of"], "block_frames": ["a block of"]}


def fit_together(controls: Controls) -> bool:
    """Guidance wants a text, and the `++` samplers a scale of at most 1."""
    scale = controls.cfg_scale
    return (scale == 1 or controls.prompt != "") and not (
        controls.sampler.endswith("++") and scale > 1
    )


def test_ten_thousand_settings_are_taken_if_right_and_refused_in_the_panel_if_wrong(
    front: Front,
) -> None:
    rng, player = random.Random(5), front.player
    front.say(kind="command", command="play")
    front.wait_kind("run")
    assert set(RIGHT) == {field["name"] for field in player.fields}
    counts = {"wrong": 0, "right": 0, "together": 0}
    for _ in range(14_000):
        name = rng.choice(list(WRONG))
        is_wrong = name not in RIGHT or rng.random() < 0.5
        value = rng.choice(WRONG[name] if is_wrong else RIGHT[name])
        old, n_sent = getattr(player, str(name), None), len(front.sent)
        others = player.controls()
        change = {name: value} if name in CONTROL_NAMES and not is_wrong else {}
        taken = not is_wrong and fit_together(player.controls(**change))
        player.message = ""
        front.say(kind="set", name=name, value=value, id=rng.choice([1, 2, None, "x"]))
        told = [m for m in front.sent[n_sent:] if m["kind"] == "refused"]
        if taken:
            assert told == []
            assert getattr(player, name) == value
            counts["right"] += 1
            continue
        counts["wrong" if is_wrong else "together"] += 1
        assert player.controls() == others
        assert getattr(player, str(name), None) == old
        assert [m["name"] for m in told] == [str(name)]
        assert told[0]["value"] == old
        assert player.message.startswith("Refused: ")
        if is_wrong:
            called = [str(name), *SAID.get(name, [])]
            assert any(word in player.message for word in called)
    assert min(counts["wrong"], counts["right"]) > 3000
    assert counts["together"] > 100
    assert player.engine is not None
    assert player.engine.failure is None
    assert player.state == "playing"


def test_messages_of_nonsense_change_nothing(front: Front) -> None:
    rng, player = random.Random(6), front.player
    front.say(kind="command", command="play")
    front.wait_kind("run")
    values = [None, True, -1, 0.5, 10**12, math.inf, math.nan, "", HOSTILE, [], {}]
    before = player.controls()
    for _ in range(1000):
        kind, value = rng.choice(["command", "report", "hello", "", None, 3]), rng.choice(values)
        player.message = ""
        command = rng.choice(["explode", "__init__", None])
        front.say(kind=kind, name="seed", value=1, id=value, command=command,
                  epoch=rng.choice(values), heard=value)  # fmt: skip
        assert (kind == "command") == player.message.startswith("Refused: the command")
    player._on_message(player, "not even a dict", [])
    assert (player.state, player.controls()) == ("playing", before)
    front.say(kind="command", command="restart")
    front.wait_for(lambda m: m["kind"] == "made", len(front.sent))


def test_a_wrong_value_is_told_to_the_page_with_the_right_one(front: Front) -> None:
    front.say(kind="set", id=1, name="sampler", value="magic")
    assert front.sent[-1] == {
        "kind": "refused",
        "name": "sampler",
        "value": "pingpong",
        "n_buffers": 0,
    }
    assert "one of euler" in front.player.message
    front.say(kind="set", id=2, name="sampler", value="euler")
    assert front.player.message == ""


def test_a_hostile_prompt_is_text_all_the_way(front: Front) -> None:
    front.say(kind="set", id=1, name="prompt_a", value=HOSTILE)
    assert front.player.prompt == HOSTILE
    everything = "\n".join(SOURCES.values())
    for danger in ("innerHTML", "outerHTML", "insertAdjacentHTML", "document.write", "eval(",
                   "new Function", "DOMParser", "createContextualFragment"):  # fmt: skip
        assert danger not in everything


def test_the_scripts_fetch_nothing() -> None:
    everything = "\n".join(SOURCES.values()) + (HERE / "player.css").read_text(encoding="utf-8")
    code = re.sub(r"^\s*//.*$", "", everything, flags=re.MULTILINE)
    for word in ("http:", "https:", "//cdn", "fetch(", "import ", "importScripts", "@import",
                 "url(", "XMLHttpRequest", "WebSocket"):  # fmt: skip
        assert word not in code, word


def test_a_failure_is_said_and_the_next_play_works(front: Front) -> None:
    player, step = front.player, front.streamer.step

    def broken(*args: Any) -> Any:
        raise ZeroDivisionError("a bug")

    front.streamer.step = broken  # type: ignore[method-assign]
    front.say(kind="command", command="play")
    assert player.engine is not None
    assert player.engine.wait(20)
    assert (player.state, player.message) == ("failed", "ZeroDivisionError: a bug")
    front.streamer.step = step  # type: ignore[method-assign]
    front.say(kind="command", command="restart")
    front.wait_kind("run")
    assert player.state == "playing"


def test_recording_writes_what_is_heard(front: Front) -> None:
    player = front.player
    front.say(kind="command", command="record")
    assert player.message == "Play first, then record."
    front.say(kind="command", command="play")
    front.wait_kind("run")
    front.say(kind="command", command="record")
    path, n_sent = Path(player.recording), len(front.sent)
    front.wait_kind("audio", n_sent)
    counters = {"silent": 0, "underruns": 0, "lowest": 0}
    front.say(kind="report", epoch=1, heard=5 * 400, **counters)
    time.sleep(0.6)  # the engine looks every quarter of a second
    front.say(kind="command", command="record")
    assert player.recording == ""
    samples, rate = soundfile.read(path)
    assert rate == SAMPLE_RATE
    assert samples.size >= 4 * 400


def test_headless_playing_writes_a_take_and_meters(tmp_path: Path) -> None:
    front = Front(tmp_path, sink="null", controls=Controls(prompt=(("a", 0.5), ("b", 0.5))))
    meters = front.player.play_for(30)
    assert meters.played_s >= 30
    assert meters.underruns == 0
    assert json.loads(json.dumps(front.player.meters))["state"] == "stopped"
    take = read_take(front.player.take_path)
    assert take.changes[0].prompt == (("a", 0.5), ("b", 0.5))
    assert (front.player.prompt_a, front.player.prompt_b, front.player.mix) == ("a", "b", 0.5)


def test_an_observer_may_move_a_control_from_the_stream_itself(tmp_path: Path) -> None:
    front = Front(tmp_path, sink="null", controls=Controls(prompt="organ"))
    front.player.observe(lambda change: setattr(front.player, "n_steps", 2), "state")
    front.player.play_for(20)
    assert front.player.engine is not None
    assert front.player.engine.ledger.history[-1].controls.n_steps == 2


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"sink": "radio"}, "sink 'radio'"),
        ({"controls": Controls(prompt=(("a", 0.2), ("b", 0.3), ("c", 0.5)))}, "one or two"),
        ({"controls": Controls(block_frames=7)}, "a block of 7 frames"),
    ],
)
def test_a_wrong_beginning_is_refused(tmp_path: Path, options: dict[str, Any], said: str) -> None:
    with pytest.raises(LmdError, match=said):
        Front(tmp_path, **options)
    with pytest.raises(LmdError, match="'null' or 'soundcard'"):
        Front(tmp_path).player.play_for(1)


def test_play_before_a_click_explains_itself(front: Front) -> None:
    front.player.play()
    assert "Press Play in the page" in front.player.message


def node(script: str, values: Any = None) -> Any:
    """Run JavaScript with the audio script in scope; it returns JSON on its last line."""
    if NODE is None:
        pytest.skip("no node to run the player's scripts outside a browser")
    text = SOURCES["player_audio.js"] + f"\nconst input = {json.dumps(values)};\n" + script
    done = subprocess.run(
        [NODE, "-e", text], capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_moves_that_never_get_a_block_are_forgotten_oldest_first() -> None:
    script = (SOURCES["player_view.js"] + SOURCES["player.js"]).replace("export default", "void")
    script += """
    let sent = 0;
    const model = { get: () => "playing", send: () => sent++ };
    const player = Object.create(Player.prototype);
    Object.assign(player, { model, view: "a", asked: new Map(), timers: {}, nextId: 1 });
    for (let i = 0; i < input; i++) player.ask(`control ${i}`, i);
    const ids = [...player.asked.keys()];
    console.log(JSON.stringify({ sent, n: ids.length, most: MAX_ASKED, last: ids.at(-1) }));
    process.exit();
    """
    kept = node(script, 1000)
    assert kept["sent"] == kept["last"] == 1000
    assert kept["n"] == kept["most"] < 100


def test_a_page_that_drops_binary_messages_is_told_so() -> None:
    script = (SOURCES["player_view.js"] + SOURCES["player.js"]).replace("export default", "void")
    script += """
    const told = [undefined, []].map((buffers) => {
      const player = Object.create(Player.prototype);
      const shown = [];
      Object.assign(player, { epoch: 1, view: "a", audio: {} });
      player.showTraits = () => shown.push(player.trouble);
      player.receive({ kind: "audio", to: "a", epoch: 1 }, buffers);
      return shown;
    });
    console.log(JSON.stringify(told));
    """
    told = node(script)
    assert [len(shown) for shown in told] == [1, 1]
    assert all("drops the binary part of messages" in shown[0] for shown in told)


WORKLET_RUN = """
let made;
globalThis.sampleRate = 8000; globalThis.currentTime = 0;
globalThis.AudioWorkletProcessor = class { constructor() { this.port = { postMessage() {} }; } };
globalThis.registerProcessor = (_, processor) => { made = processor; };
new Function(WORKLET)();
const ring = new made({ processorOptions: { channels: 1, seconds: 2 } });
const out = [];
ring.take({ kind: "open", epoch: 1, hold_s: 0.2 });
ring.take({ kind: "run", epoch: 1, running: true });
ring.take({ kind: "push", epoch: 0, first: 0, samples: new Float32Array(99) }); // old: ignored
let written = 0;
for (const step of input) {
  if (typeof step === "boolean") {
    ring.take({ kind: "hold", epoch: 1, on: step });
    continue;
  }
  const [first, n] = Array.isArray(step) ? step : [written, step];
  if (n > 0) {
    const tone = (_, i) => Math.sin((step[2] ?? 0.05) * (first + i));
    ring.take({ kind: "push", epoch: 1, first, samples: Float32Array.from({ length: n }, tone) });
    written = first + n;
  } else for (let i = 0; i < -n; i++) {
    const block = new Float32Array(128);
    ring.process([], [[block]]);
    out.push(...block);
  }
}
const { heard, silent, underruns, level, lost } = ring;
console.log(JSON.stringify({ out, heard, silent, underruns, level, lost }));
"""


def test_the_worklet_plays_exactly_what_the_python_queue_plays() -> None:
    plan = [1000, -5, 500, -20, 3000, -10, 700, -40, 64, -1, 4000, -7]
    # Cuts: ahead of what is heard, into the end of the queue, late, too late for anything.
    plan += [[6200, 3000, 0.03], -2, [7000, 300, 0.07], -3, [6100, 2000, 0.02], -2, [100, 50, 0.1]]
    plan += [-9, 500, -30]
    plan += [3000, -2, True, -20, False, -9]  # held where it is, and on
    played = node(WORKLET_RUN, plan)
    queue, out, written = PlayQueue(1, 160, 1600), [], 0
    for step in plan:
        if isinstance(step, bool):
            queue.hold(step)
            continue
        first, n, slope = step if isinstance(step, list) else (written, step, 0.05)
        if n > 0:
            tone = np.sin(slope * np.arange(first, first + n)).astype(np.float32)[None]
            queue.replace(first, tone)
            written = first + n
        else:
            out += [queue.pull(128) for _ in range(-n)]
    expected = np.concatenate(out, axis=-1)[0]
    # float32 against float64 gains: measured 6e-8.
    assert np.abs(np.array(played["out"]) - expected).max() < 1e-6
    counted = (played["heard"], played["silent"], played["underruns"], played["level"])
    assert counted == (queue.heard, queue.silent, queue.underruns, queue.level)
    assert played["lost"] == 0


def test_the_worklet_never_holds_more_than_its_ring() -> None:
    played = node(WORKLET_RUN, [10_000, 10_000, -1])
    assert played["lost"] == 20_000 - 2 * 8000
    assert played["level"] == 2 * 8000 - 128


def test_the_picture_shows_a_tone_where_it_sounds() -> None:
    script = """
    const spectrum = new Spectrum(input.rate);
    const wave = Float32Array.from({ length: input.rate }, (_, i) =>
      Math.sin((2 * Math.PI * input.hz * i) / input.rate));
    const columns = spectrum.push(wave, 0);
    const column = Array.from(spectrum.columns.slice(5 * N_BANDS, 6 * N_BANDS));
    const edges = spectrum.edges.map((k) => (k * input.rate) / N_FFT);
    console.log(JSON.stringify({ columns, column, edges }));
    """
    for hz in (440, 1760, 7040):
        seen = node(script, {"rate": 22_050, "hz": hz})
        assert seen["columns"] == [0, (22_050 - 1024) // 512 + 1]
        loudest = int(np.argmax(seen["column"]))
        assert seen["edges"][loudest] - 22 <= hz <= seen["edges"][loudest + 1] + 22  # a bin is 21.5
        assert max(seen["column"]) > 240
