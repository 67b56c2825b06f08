"""Fill the README's figures in: `python -m lmd.pipeline.readme`, between its markers, from files.

No figure in the README is typed. A block between `<!-- begin NAME ... -->` and `<!-- end -->` is
replaced by what the function of that name makes of the files in `outputs/published/`.

    python -m lmd.pipeline.readme --publish outputs/quick   copy what it shows out of a run, fill
    python -m lmd.pipeline.readme                           fill
    python -m lmd.pipeline.readme --check                   exit 1 when it would be changed
"""

import argparse
import json
import re
import shutil
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import soundfile

from lmd.errors import LmdError
from lmd.machine import hardware
from lmd.pipeline.plan import ROOT

BLOCK = re.compile(r"(<!-- begin (\w+)(?: ([^\n]*?))? -->\n)(.*?)(<!-- end -->)", re.DOTALL)
SOUND_LIMIT = 200_000  # bytes of one published sound
PICTURE_LIMIT = 400_000


def fill(text: str, root: Path) -> str:
    """The README's text with every block made anew.

    Raises:
        LmdError: a block whose name nobody knows.
    """

    def block(match: re.Match[str]) -> str:
        head, name, argument, _, tail = match.groups()
        if name not in BLOCKS:
            raise LmdError(
                f"block {name!r} in the README", f"one of {', '.join(BLOCKS)}", "Fix it."
            )
        return f"{head}{BLOCKS[name](root, argument or '')}\n{tail}"

    return BLOCK.sub(block, text)


def notebook_map(root: Path, _: str) -> str:
    """A row for each notebook: its link and its first sentence, read from it."""
    rows = []
    for path in sorted((root / "notebooks").glob("[0-9][0-9]_*.ipynb")):
        cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
        first = next(cell for cell in cells if cell["cell_type"] == "markdown")
        lines = [line.strip() for line in "".join(first["source"]).splitlines() if line.strip()]
        sentence = next((line for line in lines[1:] if line[0].isalnum()), "")
        rows.append([f"[`{path.stem}`](notebooks/{path.name})", sentence])
    return _table(["notebook", "what it is"], rows)


PLAY_COLUMNS = {
    "regime": "regime",
    "steps": "n_steps",
    "transformer ms p50": "dit_ms_p50",
    "p95": "dit_ms_p95",
    "decode ms p50": "decode_ms_p50",
    "first sound ms": "ttff_ms",
    "real-time factor": "rtf",
    "memory MiB": "peak_mb",
    "against naive": "speedup_vs_naive",
    "possible": "bound_speedup",
    "reached of the bound": "of_bound",
    "after a change ms": "rebuild_ms_p50",
}
TRAIN_COLUMNS = {
    "step": "step",
    "window frames": "n_frames",
    "ms p50": "step_ms_p50",
    "p95": "step_ms_p95",
    "frames taught per s": "frames_per_s",
    "products, GFLOP/s": "product_gflops",
    "reached of that": "share",
    "reading data ms": "data_ms_p50",
    "waiting for data ms": "wait_ms_p50",
}


def bench(root: Path, _: str) -> str:
    """The tables of `python -m lmd bench --json`, one after the other."""
    return _speed_tables(root, "bench*.json", PLAY_COLUMNS)


def training(root: Path, _: str) -> str:
    """The tables of `python -m lmd bench train --json`, one after the other."""
    return _speed_tables(root, "train*.json", TRAIN_COLUMNS)


def data(root: Path, _: str) -> str:
    """The table of `python -m lmd bench data --json`."""
    path = _published(root) / "data_speed.json"
    if not path.exists():
        return ""
    found = json.loads(path.read_text(encoding="utf-8"))
    names = {"what": "", "unit": "unit", "per_second": "a second", "ms_p50": "ms p50"}
    names["ms_p95"] = "p95"
    rows = [[row[name] for name in names] for row in found["rows"]]
    how = f"One thread, batches of {found['batch']} ({found['machine']['cpu']}):"
    return f"{how}\n\n{_table(list(names.values()), rows)}"


def _speed_tables(root: Path, pattern: str, columns: dict[str, str]) -> str:
    """A line on sizes and machine, then a table, for every published file of that name."""
    parts = []
    for path in sorted(_published(root).glob(pattern)):
        values = json.loads(path.read_text(encoding="utf-8"))
        machine = values.get("machine", {})
        where = f" ({hardware(machine)})" if machine else ""
        how = [f"`{values['preset']}`", values["dtype"]]
        how += [f"batch {values['batch']}"] if "batch" in values else []
        how += ["compiled"] if values.get("compiled") or "compile_s" in values else []
        how += [f"{values['threads']} threads", values["device"]]
        parts.append(f"{', '.join(how)}{where}:\n")
        rows = [[row[key] for key in columns.values()] for row in values["rows"]]
        parts.append(_table(list(columns), rows) + "\n")
    return "\n".join(parts).rstrip()


def durations(root: Path, profile: str) -> str:
    """How long each notebook took in the published run of a profile, and where."""
    path = _published(root) / f"{profile}.json"
    if not path.exists():
        return ""
    run = json.loads(path.read_text(encoding="utf-8"))
    rows = [[name, entry["seconds"]] for name, entry in run["notebooks"].items()]
    total = sum(entry["seconds"] for entry in run["notebooks"].values())
    machine = run["machine"]
    where = f"{hardware(machine)}, {machine['n_cores']} cores, {machine['memory_gib']:.0f} GiB"
    return (
        f"{_table(['notebook', 'seconds'], [*rows, ['together', total]])}\n\nMeasured on {where}."
    )


def aims(root: Path, _: str) -> str:
    """What the published evaluation says of the project's aims."""
    path = _published(root) / "evaluation.json"
    if not path.exists():
        return ""
    words = {True: "yes", False: "no", None: "not measured"}
    found = json.loads(path.read_text(encoding="utf-8"))["aims"]
    rows = [[row["aim"], row["found"], words[row["met"]]] for row in found]
    return _table(["aim", "found", "met"], rows)


def live(root: Path, _: str) -> str:
    """What `python tools/soak.py` found: one line for each measurement that is published."""
    folder, rows = _published(root), []
    for name, words in LIVE.items():
        path = folder / f"live_{name}.json"
        if path.exists():
            found = json.loads(path.read_text(encoding="utf-8"))
            waits = ", waits skipped" if found["waits_skipped"] else ""
            weights = f"`{found['source']}` {(found.get('sha256') or '')[:8]}".rstrip()
            boundary = found.get("boundary", found.get("seam"))  # older files say seam
            where = (
                f"{weights}, {found['n_steps']} steps, seam {boundary}{waits}, "
                f"{found['machine']['cpu']}"
            )
            rows += [[*row, where] for row in words(found)]
    return _table(["measured", "found", "with"], rows) if rows else ""


def _paced(found: dict[str, Any]) -> list[list[str]]:
    meters, lowest = found["meters"], found["lowest_queue_fraction"]
    what = f"{meters['played_s'] / 60:.0f} minutes by the clock"
    held = f"{meters['underruns']} underruns, the queue never under {lowest:.0%} of its depth"
    return [[what, f"{held}; blocks made at {meters['rtf']:.1f}× real time"]]


def _flat(found: dict[str, Any]) -> list[list[str]]:
    what = f"{found['parts'][-1]['minutes']:.0f} minutes of music as fast as it goes"
    level, centroid = (
        f"{found[name]:+.4f} ± {found[f'{name}_95']:.4f}"
        for name in ("level_db_per_minute", "centroid_hz_per_minute")
    )
    cost = (
        f"a block costs {found['cost_second_half_to_first']:.3f} times as much in the second half"
    )
    drift = f"per minute {found['rss_mb_per_minute']:+.3f} MB of memory, {level} dB of level"
    slider, queue = found["meters"]["latency_p50_ms"] / 1e3, found["meters"]["target_s"]
    heard = f"a slider is heard after {slider:.1f} s (median) with a queue of {queue:.1f} s"
    return [[what, f"{cost}; {drift}, {centroid} Hz of brightness (95 %); {heard}"]]


def _latency(found: dict[str, Any]) -> list[list[str]]:
    rows = []
    for frames, row in found["blocks"].items():
        what = f"slider to sound, blocks of {frames} frames ({row['block_ms']:.0f} ms)"
        heard = f"p50 {row['p50_ms']:.0f} ms, p95 {row['p95_ms']:.0f} ms"
        rows.append([what, f"{heard}; underruns: {row['underruns']}"])
    return rows


def _stalls(found: dict[str, Any]) -> list[list[str]]:
    rows = []
    for blocks, row in found["stalls"].items():
        silent = f"counted {row['underruns']} time, {row['silent_s']:.2f} s of silence"
        depths = [row[f"queued_{when}_ms"][-1] for when in ("before", "after")]
        rows.append(
            [
                f"a stall of {blocks} blocks ({row['stall_s']:.1f} s)",
                f"{silent}; queue before and after {depths[0]:.0f} and {depths[1]:.0f} ms",
            ]
        )
    return rows


LIVE: dict[str, Callable[[dict[str, Any]], list[list[str]]]] = {
    "paced": _paced,
    "flat": _flat,
    "stalls": _stalls,
    "latency": _latency,
}


def figures(root: Path, argument: str) -> str:
    """Single figures of the published run, as `quick 04_play rtf seconds`: a row each."""
    profile, notebook, *names = argument.split()
    path = _published(root) / f"{profile}.json"
    if not path.exists():
        return ""
    metrics = json.loads(path.read_text(encoding="utf-8"))["notebooks"][notebook]["metrics"]
    return _table(["figure", "value"], [[f"`{name}`", metrics[name]] for name in names])


def media(root: Path, argument: str) -> str:
    """A picture or a sound of a run, as `02_outpaint/masks.png | Who sees whom`."""
    source, caption = (part.strip() for part in argument.split("|"))
    path = _published(root) / _published_name(source)
    if not path.exists():
        return ""
    link = path.relative_to(root).as_posix()
    if path.suffix == ".png":
        return f"![{caption}]({link})"
    return f"[{caption}]({link}) ({soundfile.info(path).duration:.0f} s)"


BLOCKS: dict[str, Callable[[Path, str], str]] = {
    "aims": aims,
    "bench": bench,
    "data": data,
    "durations": durations,
    "figures": figures,
    "live": live,
    "media": media,
    "notebooks": notebook_map,
    "training": training,
}


def publish(run: Path, text: str, root: Path) -> list[Path]:
    """Copy the figures of a run, and the pictures and sounds that the README names, small.

    Args:
        run: the folder of a run whose notebooks have all finished.
        text: the README.
        root: the repository.

    Returns:
        What was written.

    Raises:
        LmdError: a notebook of the run has not finished, or a file would be too large.
    """
    summary = json.loads((run / "metrics.json").read_text(encoding="utf-8"))
    unfinished = [n for n, entry in summary["notebooks"].items() if entry["status"] != "done"]
    if unfinished:
        raise LmdError(
            f"{', '.join(unfinished)} unfinished in {run}", "a whole run", "Run it again."
        )
    target = _published(root)
    target.mkdir(parents=True, exist_ok=True)
    written = [target / f"{summary['profile']}.json"]
    written[0].write_text(json.dumps(summary, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    for name, argument in ((match[2], match[3] or "") for match in BLOCK.finditer(text)):
        source = run / argument.split("|")[0].strip()
        if name == "media" and source.is_file():
            written.append(_copy_small(source, target / _published_name(argument.split("|")[0])))
    return written


def _copy_small(source: Path, target: Path) -> Path:
    """A picture as it is, a sound as Ogg Vorbis."""
    limit = PICTURE_LIMIT
    if source.suffix == ".png":
        shutil.copyfile(source, target)
    else:
        limit = SOUND_LIMIT
        wave, sample_rate = soundfile.read(source)
        soundfile.write(target, wave, sample_rate, format="OGG", subtype="VORBIS")
    if target.stat().st_size > limit:
        size = target.stat().st_size
        target.unlink()
        raise LmdError(
            f"{size / 1e3:.0f} kB for {source}", f"at most {limit / 1e3:.0f} kB", "Make it shorter."
        )
    return target


def _published(root: Path) -> Path:
    return root / "outputs" / "published"


def _published_name(source: str) -> str:
    name = Path(source.strip().replace("/", "_"))
    return name.name if name.suffix == ".png" else f"{name.stem}.ogg"


def _table(head: list[str], rows: Iterable[Iterable[Any]]) -> str:
    lines = [head, ["---"] * len(head), *([_cell(value) for value in row] for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _cell(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.0f}" if abs(value) >= 100 else f"{value:.3g}"
    return "" if value is None else str(value).replace("|", "\\|")


def main(argv: list[str] | None = None) -> int:
    """Fill the README, or say whether that would change it."""
    parser = argparse.ArgumentParser(prog="python -m lmd.pipeline.readme", description=__doc__)
    parser.add_argument("--check", action="store_true")
    parser.add_argument("--publish", type=Path, metavar="RUN")
    args = parser.parse_args(argv)
    path = ROOT / "README.md"
    text = path.read_text(encoding="utf-8")
    try:
        for written in publish(args.publish, text, ROOT) if args.publish else ():
            print(f"wrote {written.relative_to(ROOT).as_posix()}")
        filled = fill(text, ROOT)
    except LmdError as error:
        print(f"lmd.pipeline.readme: {error}", file=sys.stderr)
        return 2
    if args.check:
        return int(filled != text)
    path.write_text(filled, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
