"""The notebook runner, on tiny notebooks made here: each promise of `python -m lmd run`."""

import asyncio
import base64
import contextlib
import json
import os
import re
import shutil
import time
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import nbformat
import pytest
import zmq
import zmq.asyncio
from jupyter_client.session import Session

from lmd.__main__ import main
from lmd.errors import LmdError
from lmd.pipeline.notebook import Log, NotebookFailed, PatientChannel, max_silence_s
from lmd.pipeline.plan import Options, plan
from lmd.pipeline.report import read_metrics
from lmd.pipeline.run import data_key, input_key
from lmd.pipeline.run import main as run

PARAMETERS = 'output_dir = "../outputs/lab"\nseed = 0\npreset = "tiny"\nn_steps = 3\nrate = 0.5'
WRITE = (
    "import json, pathlib\n"
    "out = pathlib.Path(output_dir)\n"
    "out.mkdir(parents=True, exist_ok=True)\n"
    "(out / 'metrics.json').write_text(json.dumps({'n_steps': n_steps, 'seed': seed}))"
)
PNG = (  # one grey pixel
    "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAAAAAA6fptVAAAACklEQVR4nGNoAAAAggCBd81ytgAAAABJRU5ErkJggg=="
)


@pytest.fixture
def project(tmp_path: Path) -> Options:
    """An empty project: a folder for notebooks, one for the run, two profiles."""
    (tmp_path / "notebooks").mkdir()
    profiles = tmp_path / "profiles.toml"
    profiles.write_text('[quick.all]\npreset = "small"\n[quick.02_second]\nn_steps = 7\n[other]\n')
    return Options(
        out=tmp_path / "outputs" / "quick",
        notebooks=tmp_path / "notebooks",
        profiles=profiles,
        weights=tmp_path / "weights",
    )


@pytest.fixture
def in_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """Cells run here, without a kernel: for what a run decides, not how it executes."""

    def execute(source: Path, target: Path, parameters: dict, *_: object) -> None:
        names: dict = {}
        try:
            with contextlib.chdir(source.parent):
                for cell in nbformat.read(source, as_version=4).cells:
                    exec(cell.source, names)
                    names.update(parameters if "tags" in cell.metadata else {})
        except Exception as error:
            raise NotebookFailed(source.stem, repr(error)) from error

    monkeypatch.setattr("lmd.pipeline.run.execute", execute)


def write_notebook(project: Options, name: str, *cells: str, parameters: str = PARAMETERS) -> Path:
    """A notebook whose first cell holds the parameters and whose last writes metrics."""
    notebook = nbformat.v4.new_notebook(
        metadata={
            "kernelspec": {"name": "python3", "display_name": "Python 3", "language": "python"}
        }
    )
    tagged = nbformat.v4.new_code_cell(parameters, metadata={"tags": ["parameters"]})
    notebook.cells = [tagged, *(nbformat.v4.new_code_cell(cell) for cell in cells)]
    path = project.notebooks / f"{name}.ipynb"
    nbformat.write(notebook, path)
    return path


def with_(project: Options, **changes: object) -> Options:
    return replace(project, **changes)


def records(project: Options) -> dict:
    assert project.out is not None
    return json.loads((project.out / "run.json").read_text())["notebooks"]


class _Links(HTMLParser):
    """Every address that the page would load."""

    def __init__(self) -> None:
        super().__init__()
        self.addresses: list[str] = []
        self.tags: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.addresses += [value or "" for name, value in attrs if name in ("src", "href")]


def test_a_run_executes_in_order_and_ends_with_a_report_that_holds_everything(
    project: Options, capsys: pytest.CaptureFixture[str]
) -> None:
    media = (
        f"import base64\n(out / 'mask.png').write_bytes(base64.b64decode('{PNG}'))\n"
        "import soundfile, numpy\n"
        "soundfile.write(out / 'music.wav', numpy.zeros(2205), 22050)\n"
        "print('a line for the log')"
    )
    write_notebook(project, "01_first", WRITE, media)
    write_notebook(
        project, "02_second", "assert open('../outputs/quick/01_first/music.wav')", WRITE
    )
    assert run(project) == 0

    out = project.out
    assert out is not None
    summary = json.loads((out / "metrics.json").read_text())
    assert summary["notebooks"]["02_second"]["metrics"] == {"n_steps": 7, "seed": 0}  # the profile
    assert summary["notebooks"]["01_first"]["parameters"]["preset"] == "small"
    assert summary["versions"]["torch"].startswith("2.")
    assert summary["machine"]["n_cores"] >= 1
    page = (out / "report.html").read_text()
    links = _Links()
    links.feed(page)
    assert [address[:14] for address in links.addresses] == ["data:audio/wav", "data:image/png"]
    assert base64.b64decode(links.addresses[1].split(",")[1]) == base64.b64decode(PNG)
    assert "script" not in links.tags
    assert "color-scheme: light dark" in page
    assert (out / "logs" / "01_first.log").read_text() == "a line for the log\n"
    printed = capsys.readouterr()
    assert "music.wav" in printed.out
    assert "report.html" in printed.out
    assert "01_first: cell 4/4" in printed.err  # papermill adds a cell with the values


@pytest.mark.usefixtures("in_process")
def test_a_finished_notebook_runs_again_only_when_its_inputs_changed(project: Options) -> None:
    count = "p = pathlib.Path('../{}'); p.write_text(p.read_text() + 'x' if p.exists() else 'x')"
    write_notebook(project, "01_first", WRITE, count.format("one"))
    write_notebook(project, "02_second", WRITE, count.format("two"))
    root = project.notebooks.parent

    def runs() -> tuple[int, int]:
        return len((root / "one").read_text()), len((root / "two").read_text())

    assert run(project) == 0
    assert runs() == (1, 1)
    assert run(project) == 0
    assert runs() == (1, 1)  # nothing changed
    assert run(with_(project, settings=("02.n_steps=8",))) == 0
    assert runs() == (1, 2)  # only the second one's parameters changed
    (root / "outputs/quick/01_first/metrics.json").write_text('{"other": 1}')
    assert run(with_(project, settings=("02.n_steps=8",))) == 0
    assert runs() == (1, 3)  # what the first one left has changed
    assert run(with_(project, only="1", force=True)) == 0
    assert runs() == (2, 3)


@pytest.mark.usefixtures("in_process")
def test_a_finished_notebook_runs_again_when_what_it_left_is_gone(project: Options) -> None:
    write_notebook(project, "01_first", WRITE, "(out / 'music').write_text('x')")
    listen = "import pathlib; pathlib.Path('../outputs/quick/01_first/music').read_text()"
    write_notebook(project, "02_second", listen, WRITE)
    assert run(project) == 0
    assert project.out is not None
    shutil.rmtree(project.out / "01_first")
    assert run(with_(project, settings=("02.n_steps=8",))) == 0
    assert (project.out / "01_first/music").exists()


def test_a_run_does_not_begin_where_a_file_is(project: Options, tmp_path: Path) -> None:
    write_notebook(project, "02_second", WRITE)
    (tmp_path / "file").write_text("mine")
    with pytest.raises(LmdError, match="no folder"):
        run(with_(project, out=tmp_path / "file"))


@pytest.mark.usefixtures("in_process")
def test_a_finished_notebook_runs_again_when_data_outside_the_run_changed(
    project: Options,
) -> None:
    """A folder that a parameter names; that the notebook itself writes there is no change."""
    count = "p = pathlib.Path('../runs'); p.write_text(p.read_text() + 'x' if p.exists() else 'x')"
    index = "(pathlib.Path(data) / 'index.csv').write_text('made here')"
    parameters = f'{PARAMETERS}\ndata = "../music"\ncache = "../cache"'
    write_notebook(project, "02_second", WRITE, count, index, parameters=parameters)
    root = project.notebooks.parent
    for folder in ("music/deep", "other", "cache"):
        (root / folder).mkdir(parents=True)
    (root / "music/deep/a.wav").write_text("one")

    def n_runs(*settings: str) -> int:
        assert run(with_(project, settings=settings)) == 0
        return len((root / "runs").read_text())

    assert [n_runs(), n_runs()] == [1, 1]
    (root / "cache/scores").write_text("what can be made again")
    (root / "other/unnamed.wav").write_text("nobody asked for it")
    assert n_runs() == 1
    (root / "music/deep/a.wav").write_text("another")
    assert [n_runs(), n_runs()] == [2, 2]
    (root / "music/b.wav").write_text("one more")
    assert [n_runs(), n_runs()] == [3, 3]
    assert n_runs("02.data=../other") == 4
    os.utime(root / "other/unnamed.wav", ns=(0, 0))
    assert [n_runs("02.data=../other"), n_runs("02.data=../other")] == [5, 5]


@pytest.mark.usefixtures("in_process")
def test_a_failed_notebook_does_not_go_on_with_what_other_data_left(project: Options) -> None:
    """The same data: it finds its own half-made work; other data: an empty folder."""
    count = (
        "import pathlib; half = pathlib.Path(output_dir) / 'half'\n"
        "pathlib.Path('../found').write_text(str(half.exists()))"
    )
    stop = "half.write_text('x'); raise KeyError('bass')"
    parameters = f'{PARAMETERS}\ndata = "../music"'
    write_notebook(project, "02_second", count, stop, parameters=parameters)
    root = project.notebooks.parent
    (root / "music").mkdir()
    (root / "music/a.wav").write_text("one")

    def found_its_own() -> str:
        assert run(project) == 1
        return (root / "found").read_text()

    assert [found_its_own(), found_its_own()] == ["False", "True"]
    (root / "music/a.wav").write_text("another")
    assert [found_its_own(), found_its_own()] == ["False", "True"]


def test_weights_that_a_notebook_is_to_play_are_among_its_inputs(project: Options) -> None:
    parameters = f'{PARAMETERS}\nsource = "../mine:finetuned"\nprompt = "a text: with a colon"'
    write_notebook(project, "02_second", WRITE, parameters=parameters)
    (task,) = plan(project)

    def key() -> str:
        return data_key(task, project.folder, project.weights)

    keys = [key()]
    weights = project.notebooks.parent / "mine" / "finetuned.safetensors"
    weights.parent.mkdir()
    for text in ("some", "others"):
        weights.write_text(text)
        keys.append(key())
    assert len(set(keys)) == 3
    assert key() == keys[-1]


@pytest.mark.usefixtures("in_process")
def test_a_finished_notebook_runs_again_with_other_versions(
    project: Options, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_notebook(project, "02_second", WRITE)
    weights = project.weights
    (task,) = plan(project)
    before = input_key(task, [], weights)
    assert input_key(task, [], weights) == before
    assert run(project) == 0
    first = records(project)["02_second"]
    assert run(project) == 0
    assert records(project)["02_second"] == first  # not run again
    monkeypatch.setattr("lmd.pipeline.report.version", lambda name: "99.0")
    assert input_key(task, [], weights) != before
    assert run(project) == 0
    assert records(project)["02_second"]["inputs"] != first["inputs"]


def test_a_failure_stops_the_run_and_names_cell_and_error_and_a_fix_resumes(
    project: Options, capsys: pytest.CaptureFixture[str]
) -> None:
    write_notebook(project, "01_first", WRITE)
    broken = write_notebook(project, "02_second", WRITE, "x = 1\n\nraise KeyError('bass')")
    write_notebook(project, "03_third", WRITE)
    assert run(project) == 1
    err = capsys.readouterr().err
    assert "02_second failed: In [4], `x = 1`: KeyError: 'bass'" in err
    assert re.search(r"executed copy +\S*executed/02_second.ipynb\n", err)
    assert [entry["status"] for entry in records(project).values()] == ["done", "failed"]
    assert project.out is not None
    executed = nbformat.read(project.out / "executed" / "02_second.ipynb", as_version=4)
    assert any("KeyError" in str(cell.get("outputs")) for cell in executed.cells)
    assert "KeyError" in (project.out / "report.html").read_text()

    text = broken.read_text().replace("raise KeyError('bass')", "pass")
    broken.write_text(text)
    first = records(project)["01_first"]
    assert run(project) == 0
    assert records(project)["01_first"] == first  # not run again
    assert records(project)["03_third"]["status"] == "done"


def test_a_killed_kernel_is_a_failure_and_not_a_hang(
    project: Options, capsys: pytest.CaptureFixture[str]
) -> None:
    write_notebook(project, "02_second", "import os\nos._exit(1)")
    assert run(project) == 1
    assert "02_second failed: In [3], `import os`: the kernel died" in capsys.readouterr().err


def test_a_flood_of_outputs_is_read_to_its_end(project: Options) -> None:
    """Left to itself, Jupyter loses some of it, gives up after four seconds or waits for ever."""
    flood = "for i in range(6_000): display({'text/plain': 'x' * 3000}, raw=True)"
    write_notebook(project, "02_second", WRITE, flood, "print('after')")
    assert run(project) == 0
    assert project.out is not None
    assert (project.out / "logs/02_second.log").read_text() == "after\n"
    executed = nbformat.read(project.out / "executed/02_second.ipynb", as_version=4)
    assert len(executed.cells[-2].outputs) == 6_000


def test_an_error_of_jupyters_own_names_the_cell(
    project: Options, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fall(*args: object, **options: object) -> None:
        raise RuntimeError("no outputs")

    monkeypatch.setattr("papermill.clientwrap.PapermillNotebookClient.process_message", fall)
    write_notebook(project, "02_second", WRITE)
    assert run(project) == 1
    err = capsys.readouterr().err
    assert re.search(r"02_second failed: In \[1\], `.+`: RuntimeError: no outputs", err)


def test_an_answer_that_comes_while_something_is_sent_is_heard():
    """The kernel's side answers, the client sends before its loop looks: nothing wakes the reader.

    `jupyter_client`'s own channel waits for ever here.
    """

    async def reply() -> str:
        session = Session(key=b"key")
        with zmq.asyncio.Context() as ours, zmq.Context() as theirs:
            kernel, client = theirs.socket(zmq.ROUTER), ours.socket(zmq.DEALER)
            client.identity = b"client"
            client.connect(f"tcp://127.0.0.1:{kernel.bind_to_random_port('tcp://127.0.0.1')}")
            channel = PatientChannel(client, session)
            channel.send(session.msg("execute_request"))
            assert kernel.poll(5000)
            answer = asyncio.ensure_future(channel.get_msg())
            await asyncio.sleep(0.1)  # the reader waits by now
            session.send(kernel, session.msg("execute_reply"), ident=b"client")
            time.sleep(0.2)  # the answer arrives, and nobody looks
            channel.send(session.msg("comm_msg"))
            try:
                return (await asyncio.wait_for(answer, 10))["header"]["msg_type"]
            finally:
                client.close(0)
                kernel.close(0)

    assert asyncio.run(reply()) == "execute_reply"


def test_a_silent_cell_ends_the_run_and_its_notebook_is_kept(
    project: Options, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LMD_CELL_TIMEOUT_S", "4")
    lively = "import time\nfor i in range(6):\n    time.sleep(1)\n    print(i)"  # longer than 4 s
    write_notebook(project, "02_second", WRITE, lively, "\nprint('here')\ntime.sleep(600)")
    assert run(project) == 1
    err = capsys.readouterr().err
    assert "02_second failed: In [5], `print('here')`: nothing came from it for 4 s" in err
    assert records(project)["02_second"]["seconds"] < 300
    assert project.out is not None
    executed = nbformat.read(project.out / "executed" / "02_second.ipynb", as_version=4)
    assert [cell.metadata.papermill["status"] for cell in executed.cells[-2:]] == [
        "completed",
        "failed",
    ]
    assert executed.cells[-1].outputs[0].text == "here\n"


@pytest.mark.parametrize("text", ["soon", "0", "-1", "nan"])
def test_a_limit_that_is_no_number_of_seconds_is_refused(
    text: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LMD_CELL_TIMEOUT_S", text)
    with pytest.raises(LmdError, match=f"LMD_CELL_TIMEOUT_S={text}; expected seconds"):
        max_silence_s()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"settings": ("02.n_stepz=8",)}, "'n_stepz' for 02_second.ipynb; expected one of n_steps"),
        ({"settings": ("07.n_steps=8",)}, "notebook '07'"),
        ({"settings": ("02.output_dir=/tmp/x",)}, "Give it as --out FOLDER"),
        ({"settings": ("all.output_dir=/tmp/x",)}, "Give it as --out FOLDER"),
        ({"settings": ("n_steps=8",)}, "NOTEBOOK.NAME=VALUE"),
        ({"settings": ("02.n_steps=many",)}, "expected int"),
        ({"settings": ("02.n_steps=true",)}, "expected int"),
        ({"settings": ("01.n_steps=8",), "only": "02"}, "left out by --only"),
        ({"only": "01,9"}, "notebook '9'"),
        ({"only": ""}, "notebook ''"),
        ({"profile": "quik"}, "profile 'quik'"),
    ],
)
def test_misspellings_are_refused_before_anything_runs(
    project: Options, changes: dict, message: str
) -> None:
    write_notebook(project, "01_first", WRITE)
    write_notebook(project, "02_second", WRITE)
    with pytest.raises(LmdError, match=message.replace("[", r"\[")):
        run(with_(project, **changes))
    assert project.out is not None
    assert not project.out.exists()


def test_a_misspelt_parameter_on_the_command_line_is_an_error(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["run", "--profile", "smoke", "--only", "02", "--out", str(tmp_path / "out")]
    assert main([*words, "--set", "02.n_trian_steps=5"]) == 2
    assert "'n_trian_steps' for 02_outpaint.ipynb" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_profile_that_names_an_unknown_notebook_is_refused(project: Options) -> None:
    write_notebook(project, "01_first", WRITE)
    with pytest.raises(LmdError, match="02_second"):
        plan(project)


def test_a_notebook_without_the_agreed_parameters_is_refused(project: Options) -> None:
    write_notebook(project, "02_second", WRITE, parameters="seed = 0\nn_steps = 3")
    with pytest.raises(LmdError, match="no parameter output_dir, preset in 02_second"):
        plan(project)


def test_settings_reach_the_plan_with_their_types(project: Options) -> None:
    write_notebook(project, "02_second", WRITE)
    chosen = with_(project, settings=("all.seed=5", "02.rate=2", "2.preset=paper"))
    (task,) = plan(chosen)
    assert task.parameters == {
        "preset": "paper",
        "n_steps": 7,
        "seed": 5,
        "rate": 2,
        "output_dir": "../outputs/quick/02_second",
    }


@pytest.mark.parametrize(
    ("cell", "message"),
    [
        ("1 + 1", "no metrics.json"),
        (WRITE.replace("json.dumps({'n_steps': n_steps, 'seed': seed})", "'[1]'"), "found a list"),
    ],
)
@pytest.mark.usefixtures("in_process")
def test_a_notebook_that_leaves_no_metrics_fails(
    project: Options, capsys: pytest.CaptureFixture[str], cell: str, message: str
) -> None:
    write_notebook(project, "02_second", cell)
    assert run(project) == 1
    assert message in capsys.readouterr().err


def test_metrics_are_flat_in_the_report(tmp_path: Path) -> None:
    (tmp_path / "metrics.json").write_text('{"a": 1, "b": {"c": 2, "d": {"e": [3]}}}')
    assert read_metrics(tmp_path / "metrics.json") == {"a": 1, "b.c": 2, "b.d.e": [3]}


def test_files_of_somebody_else_are_never_removed(project: Options) -> None:
    write_notebook(project, "02_second", WRITE)
    assert project.out is not None
    folder = project.out / "02_second"
    folder.mkdir(parents=True)
    (folder / "symphony.wav").write_text("mine")
    with pytest.raises(LmdError, match="not from a run"):
        run(with_(project, force=True))
    assert (folder / "symphony.wav").read_text() == "mine"


@pytest.mark.parametrize("name", ["report.html", "metrics.json", "run.json"])
def test_a_file_of_somebody_else_is_not_overwritten(project: Options, name: str) -> None:
    write_notebook(project, "02_second", WRITE)
    assert project.out is not None
    project.out.mkdir(parents=True)
    (project.out / name).write_text("mine")
    with pytest.raises(LmdError, match="not from a run"):
        run(project)
    assert (project.out / name).read_text() == "mine"
    assert [path.name for path in project.out.iterdir()] == [name]


def test_texts_from_notebooks_are_inert_in_the_report(project: Options) -> None:
    hostile = WRITE.replace("'seed': seed", "'<img src=x onerror=alert(1)>': '<script>1</script>'")
    write_notebook(project, "02_second", hostile)
    assert run(project) == 0
    assert project.out is not None
    links = _Links()
    links.feed((project.out / "report.html").read_text())
    assert "script" not in links.tags
    assert links.addresses == []


def test_the_progress_line_shows_what_a_long_cell_said_last(
    project: Options, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lmd.pipeline.run.REDRAW_S", 0.2)
    bar = (
        "from tqdm import tqdm\nbar = tqdm(total=8, desc='training')\nbar.update(4)\nbar.refresh()"
    )
    write_notebook(project, "02_second", WRITE, bar, "import time; time.sleep(1)")
    assert run(project) == 0
    assert re.search(r"02_second: cell 4/5 \[\S+\], training: 50% 4/8", capsys.readouterr().err)


def test_a_progress_bar_leaves_few_lines_in_the_log(tmp_path: Path) -> None:
    log = Log(tmp_path / "x.log", interval_s=60.0)
    log.write("start\n")
    for step in range(100):
        log.write(f"\rstep {step}/100 ")
        log.write("\x1b[32mloss 0.5\x1b[0m")
    assert log.last == "step 99/100 loss 0.5"
    log.write("\rstep 100/100 loss 0.4\nend")
    log.close()
    lines = (tmp_path / "x.log").read_text().splitlines()
    assert lines == ["start", "step 0/100 loss 0.5", "step 100/100 loss 0.4", "end"]
