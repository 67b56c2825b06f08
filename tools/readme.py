"""Fill the figures of README.md and docs/: `python tools/readme.py`.

No figure there is typed. A block between `<!-- begin NAME ARGUMENT -->` and `<!-- end -->` is
replaced by what the function of that name makes of the files in `outputs/published/`.

    python tools/readme.py                           fill every page
    python tools/readme.py --check                   exit 1 if a page would change
    python tools/readme.py --publish outputs/quick   first copy what the pages show out of a run
"""

import json
import re
import shutil
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pandas as pd
import soundfile
import tyro

from lmd.errors import LmdError
from lmd.machine import hardware
from lmd.pipeline.plan import ROOT

PAGES = ("README.md", "docs/performance.md", "docs/evaluation.md")
BLOCK = re.compile(r"(<!-- begin (\w+)(?: ([^\n]*?))? -->\n)(.*?)(<!-- end -->)", re.DOTALL)
SOUND_LIMIT, PICTURE_LIMIT = 200_000, 400_000  # bytes of a published file
Found = dict[str, Any]  # a published JSON file

PLAY = {
    "engine": "engine",
    "dtype": "precision",
    "regime": "regime",
    "n_steps": "steps",
    "dit_ms_p50": "transformer ms p50",
    "dit_ms_p95": "p95",
    "decode_ms_p50": "decode ms p50",
    "ttff_ms": "first sound ms",
    "rtf": "real-time factor",
    "speedup_vs_full": "against full",
    "speedup_vs_naive": "against naive",
    "rebuild_ms_p50": "after a change ms",
}
TRAIN = {
    "step": "step",
    "n_frames": "window frames",
    "step_ms_p50": "ms p50",
    "step_ms_p95": "p95",
    "frames_per_s": "trained frames per s",
    "product_gflops": "products, GFLOP/s",
    "share": "reached of that",
    "data_ms_p50": "reading data ms",
    "wait_ms_p50": "waiting for data ms",
}
ARC = {
    "blocks": "blocks in a rollout",
    "frames": "frames",
    "checkpointing": "checkpointing",
    "generator_s": "generator s",
    "discriminator_s": "discriminator s",
    "memory_gb": "memory GB",
}
DATA = {
    "what": "what",
    "unit": "unit",
    "per_second": "per second",
    "ms_p50": "ms p50",
    "ms_p95": "p95",
}


def fill(text: str, root: Path, up: str = "") -> str:
    """A page's text with every block made anew.

    Args:
        text: the page.
        root: the repository.
        up: the way from the page's folder to the root, as `../`, for its links.

    Raises:
        LmdError: a block of an unknown name.
    """

    def block(match: re.Match[str]) -> str:
        head, name, argument, _, tail = match.groups()
        if name not in BLOCKS:
            raise LmdError(f"block {name!r} in a page", f"one of {', '.join(BLOCKS)}", "Fix it.")
        made = re.sub(r"\]\((?!http)", f"]({up}", BLOCKS[name](root, argument or ""))
        return f"{head}{made}\n{tail}"

    return BLOCK.sub(block, text)


def notebooks(root: Path, profile: str) -> str:
    """A row per notebook: its first sentence, what it types out, its minutes in a published run."""
    run, rows = _read(root, f"{profile}.json"), []
    for path in sorted((root / "notebooks").glob("[0-9][0-9]_*.ipynb")):
        cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
        lines = [line.strip() for cell in cells[:2] for line in "".join(cell["source"]).split("\n")]
        idea = next(line for line in lines if line[:1].isalnum())
        typed = next(line for line in lines if line.startswith("**Typed out:**"))
        minutes = f"{run['notebooks'][path.stem]['seconds'] / 60:.1f}" if run else ""
        link = f"[`{path.stem}`](notebooks/{path.name})"
        rows.append([link, idea, typed.removeprefix("**Typed out:** ").rstrip("."), minutes])
    table = _table(pd.DataFrame(rows, columns=["notebook", "idea", "typed out", "minutes"]))
    return table + ("\n\n" + _where(run) if run else "")


def _where(run: Found) -> str:
    total = sum(entry["seconds"] for entry in run["notebooks"].values()) / 60
    machine = run["machine"]
    where = f"{hardware(machine)}, {machine['n_cores']} cores, {machine['memory_gib']:.0f} GiB"
    return f"Together {total:.1f} minutes (`lmd run --profile {run['profile']}` on {where})."


def speed(columns: dict[str, str], pattern: str) -> Callable[[Path, str], str]:
    """A block with a line on sizes and machine, then a table, for every file of that pattern."""

    def tables(root: Path, _: str) -> str:
        parts = []
        for path in sorted(_published(root).glob(pattern)):
            found = json.loads(path.read_text(encoding="utf-8"))
            rows = pd.DataFrame(found["rows"], dtype=object).reindex(columns=list(columns))
            rows = rows.dropna(axis="columns", how="all")
            parts.append(f"{_sizes(found)}:\n\n{_table(rows.rename(columns=columns))}")
        return "\n\n".join(parts)

    return tables


def _sizes(found: Found) -> str:
    how = [f"`{found['preset']}`"] if "preset" in found else []
    how += [str(found[name]) for name in ("dtype", "regime") if name in found]
    how += [f"batches of {found['batch']}"] if "batch" in found else []
    how += ["compiled"] if found.get("compiled") or "compile_s" in found else []
    how += [f"{found['threads']} thread(s)", found.get("device") or found.get("accelerator", "cpu")]
    return f"{', '.join(how)} ({hardware(found['machine'])})"


def criteria(root: Path, _: str) -> str:
    """Which of the project's criteria the published evaluation meets."""
    rows = pd.DataFrame(_read(root, "evaluation.json")["aims"], dtype=object)
    rows["met"] = rows["met"].map({True: "yes", False: "no"}).fillna("not measured")
    return _table(rows.rename(columns={"aim": "criterion"})[["criterion", "found", "met"]])


def numbers(root: Path, _: str) -> str:
    """The three figures of the README, each with its limits."""
    live, quality = _read(root, "live_paced.json"), _read(root, "evaluation.json")
    meters, change = live["meters"], _read(root, "changes_at_once.json")
    heard, waited = (
        found["slider_to_sound_ms"] for found in (change, _read(root, "changes_next_block.json"))
    )
    row = next(
        row
        for row in quality["rows"]
        if (row["method"], row["n_steps"], row["primed"]) == ("BC+AF", live["n_steps"], False)
    )
    fd, floor, ceiling = (
        found["fd_infinite"]["mean"]
        for found in (row, quality["anchors"]["codec"], quality["anchors"]["shuffled"])
    )
    machine = f"{live['machine']['n_cores']} cores of {hardware(live['machine'])}"
    rows = [
        [
            "Real-time factor",
            f"{meters['rtf']:.1f}",
            f"{meters['underruns']} underruns in {meters['played_s'] / 60:.0f} minutes; "
            f"`{live['preset']}`, {live['n_steps']} steps, {machine}; mono, 22 kHz",
        ],
        [
            "Slider to sound",
            f"{heard['p50']:.0f} ms (95 %: {heard['p95']:.0f} ms)",
            f"player's defaults, by the clock, {change['n_changes']} changes at random moments; "
            f"{waited['p50'] / 1e3:.1f} s where a change waits for the next block",
        ],
        [
            "Fréchet distance (FD∞)",
            f"{fd:.1f}",
            f"codec alone {floor:.1f}, shuffled frames {ceiling:.0f}; in our own embedding, "
            f"{quality['prompts']['pieces']} held-out pieces",
        ],
    ]
    return _table(pd.DataFrame(rows, columns=["what", "measured", "limits"]))


def live(root: Path, _: str) -> str:
    """What `python tools/soak.py` found: a row per measurement that is published."""
    rows = []
    for name, (what, words) in LIVE.items():
        found = _read(root, f"live_{name}.json")
        parts = found.get("stalls", {"": found}) if found else {}
        for key, part in parts.items():
            queued = {when: part.get(f"queued_{when}_ms", [0])[-1] for when in ("before", "after")}
            values = {**part, **queued, "key": key}
            waits = ", waits skipped" if found["waits_skipped"] else ""
            boundary = found.get("boundary", found.get("seam"))
            how = f"`{found['source']}` {(found.get('sha256') or '')[:8]}, {found['n_steps']} steps"
            how += f", boundary {boundary}{waits}, {found['machine']['cpu']}"
            rows.append([what.format(**values), words.format(**values), how])
    for path in sorted(_published(root).glob("changes_*.json")):
        found = json.loads(path.read_text(encoding="utf-8"))
        how = f"`{found['source']}` {(found['sha256'] or '')[:8]}, {found['n_steps']} steps, "
        rows.append(
            [CHANGES[0].format(**found), CHANGES[1].format(**found), how + found["machine"]["cpu"]]
        )
    return _table(pd.DataFrame(rows, columns=["measured", "found", "with"]))


CHANGES = (
    "slider to sound, {n_changes} changes answered {answer}, blocks of {block_frames} frames, "
    "commit {commit_frames}",
    "p50 {slider_to_sound_ms[p50]:.0f} ms, p95 {slider_to_sound_ms[p95]:.0f} ms; {n_cuts} cuts, "
    "{underruns} underruns",
)
LIVE = {
    "paced": (
        "{meters[played_s]:.0f} s in real time",
        "{meters[underruns]} underruns, the queue never under {lowest_queue_fraction:.0%} of its "
        "depth; blocks made at {meters[rtf]:.1f}× real time",
    ),
    "flat": (
        "{meters[played_s]:.0f} s of music as fast as possible",
        "the second half costs {cost_second_half_to_first:.3f} times the first; per minute "
        "{rss_mb_per_minute:+.3f} MB of memory, {level_db_per_minute:+.4f} ± "
        "{level_db_per_minute_95:.4f} dB, {centroid_hz_per_minute:+.2f} ± "
        "{centroid_hz_per_minute_95:.2f} Hz of centroid (95 %); slider to sound "
        "{meters[latency_p50_ms]:.0f} ms (median) with a queue of {meters[target_s]:.1f} s",
    ),
    "stalls": (
        "a stall of {key} blocks ({stall_s:.1f} s)",
        "counted {underruns} time, {silent_s:.2f} s of silence; queue before and after "
        "{before:.0f} and {after:.0f} ms",
    ),
}


def media(root: Path, argument: str) -> str:
    """A picture or a sound of a run, as `02_outpaint/masks.png | The masks`."""
    source, caption = (part.strip() for part in argument.split("|"))
    path = _published(root) / _published_name(source)
    link = f"[{caption}](outputs/published/{path.name})"
    if not path.exists():
        return ""
    is_picture = path.suffix == ".png"
    return f"!{link}" if is_picture else f"{link} ({soundfile.info(path).duration:.0f} s)"


BLOCKS: dict[str, Callable[[Path, str], str]] = {
    "arc": speed(ARC, "arc_small*.json"),
    "bench": speed(PLAY, "bench*.json"),
    "criteria": criteria,
    "data": speed(DATA, "data_speed.json"),
    "live": live,
    "media": media,
    "notebooks": notebooks,
    "numbers": numbers,
    "training": speed(TRAIN, "train*.json"),
}


def copy_run(run: Path, texts: Iterable[str], root: Path) -> list[Path]:
    """Copy a run's figures, and the pictures and sounds that pages name, to `outputs/published`.

    Args:
        run: the folder of a run whose notebooks have all finished.
        texts: the pages.
        root: the repository.

    Raises:
        LmdError: a notebook of the run has not finished, or a file would be too large.
    """
    summary = json.loads((run / "metrics.json").read_text(encoding="utf-8"))
    left = [name for name, entry in summary["notebooks"].items() if entry["status"] != "done"]
    if left:
        raise LmdError(f"{', '.join(left)} unfinished in {run}", "a whole run", "Run it again.")
    _published(root).mkdir(parents=True, exist_ok=True)
    written = [_published(root) / f"{summary['profile']}.json"]
    written[0].write_text(json.dumps(summary, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    for match in (match for text in texts for match in BLOCK.finditer(text)):
        name = (match[3] or "").partition("|")[0].strip()
        if match[2] == "media" and (run / name).is_file():
            written.append(_copy_small(run / name, _published(root) / _published_name(name)))
    return written


def _copy_small(source: Path, target: Path) -> Path:
    """A picture as it is, a sound as Ogg Vorbis."""
    limit = PICTURE_LIMIT if source.suffix == ".png" else SOUND_LIMIT
    if source.suffix == ".png":
        shutil.copyfile(source, target)
    else:
        soundfile.write(target, *soundfile.read(source), format="OGG", subtype="VORBIS")
    size = target.stat().st_size
    if size > limit:
        target.unlink()
        raise LmdError(f"{size} bytes for {source}", f"at most {limit}", "Make it shorter.")
    return target


def _published(root: Path) -> Path:
    return root / "outputs" / "published"


def _published_name(source: str) -> str:
    name = Path(source.replace("/", "_"))
    return name.name if name.suffix == ".png" else f"{name.stem}.ogg"


def _read(root: Path, name: str) -> Found:
    path = _published(root) / name
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}


def _table(rows: pd.DataFrame) -> str:
    text = rows.map(_cell).to_markdown(index=False, disable_numparse=True)
    return re.sub(r"-{4,}", "---", re.sub(r" {2,}", " ", text)).replace(":--", "--")


def _cell(value: Any) -> str:
    if isinstance(value, float):
        return "" if pd.isna(value) else f"{value:.0f}" if abs(value) >= 100 else f"{value:.3g}"
    return "" if value is None else str(value)


def main(check: bool = False, publish: Path | None = None) -> int:
    """Fill the pages, or say whether that would change them.

    Args:
        check: change nothing; exit status 1 if a page would change.
        publish: the folder of a run whose pictures, sounds and figures are copied first.
    """
    texts = {name: (ROOT / name).read_text(encoding="utf-8") for name in PAGES}
    try:
        for written in copy_run(publish, texts.values(), ROOT) if publish else ():
            print(f"wrote {written.relative_to(ROOT).as_posix()}")
        filled = {name: fill(text, ROOT, "../" * name.count("/")) for name, text in texts.items()}
    except LmdError as error:
        print(f"tools/readme.py: {error}", file=sys.stderr)
        return 2
    if check:
        return int(filled != texts)
    for name, text in filled.items():
        (ROOT / name).write_text(text, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(tyro.cli(main))
