"""The report of a run: one HTML file with its pictures, sounds, figures, hardware and versions.

Nothing in it points outside: pictures and sounds are data URIs, there is no script, and texts from
notebooks are escaped.
"""

import base64
import json
import time
from collections.abc import Iterable, Iterator, Mapping
from html import escape
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from lmd.errors import LmdError
from lmd.machine import machine_dict

PACKAGES = ("torch", "torchaudio", "lightning", "numpy", "scipy", "papermill", "music21")
PACKAGES += ("pretty_midi", "soundfile", "wordllama", "transformers", "diffusers")
PICTURES = {".png": "image/png"}
SOUNDS = {".wav": "audio/wav", ".flac": "audio/flac", ".ogg": "audio/ogg"}
EMBED_LIMIT = 12_000_000  # bytes of one file; a longer sound is named, not embedded
STYLE = """
:root { color-scheme: light dark; --line: #8886; --soft: #8881; }
body { font: 16px/1.5 system-ui, sans-serif; max-width: 62rem; margin: 2rem auto; padding: 0 1rem; }
h1, h2 { line-height: 1.2; } h2 { margin-top: 3rem; border-top: 1px solid var(--line); }
table { border-collapse: collapse; margin: 1rem 0; display: block; overflow-x: auto; }
th, td { border-bottom: 1px solid var(--line); padding: .2rem .8rem .2rem 0; text-align: left; }
td.n { text-align: right; font-variant-numeric: tabular-nums; }
figure { margin: 1.2rem 0; } figcaption { opacity: .75; font-size: .9rem; }
img { max-width: 100%; background: #fff; border-radius: 4px; } audio { width: 100%; }
pre { background: var(--soft); padding: .8rem; overflow-x: auto; white-space: pre-wrap; }
"""


def write_report(folder: Path, profile: str, records: Mapping[str, Mapping[str, Any]]) -> Path:
    """Write `report.html` and `metrics.json` into the folder of a run.

    Args:
        folder: the run; each notebook's files are in the folder of its name.
        profile: which parameters were used.
        records: for each notebook `status`, `seconds`, `parameters`, `error`.

    Returns:
        The path of the report.
    """
    summary = {
        "profile": profile,
        "written": time.strftime("%Y-%m-%d %H:%M:%S %z"),
        "machine": machine_dict(),
        "versions": versions(),
        "notebooks": {
            name: {
                "status": record.get("status", "running"),
                "seconds": record.get("seconds"),
                "error": record.get("error", ""),
                "parameters": dict(record.get("parameters", {})),
                "metrics": _metrics_or_nothing(folder / name / "metrics.json"),
            }
            for name, record in sorted(records.items())
        },
    }
    metrics = json.dumps(summary, indent=2, sort_keys=True)
    (folder / "metrics.json").write_text(metrics + "\n", encoding="utf-8")
    report = folder / "report.html"
    report.write_text(render(summary, folder), encoding="utf-8")
    return report


def versions() -> dict[str, str]:
    """Installed versions of the packages that decide results."""
    found = {"lmd": version("lmd")}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "not installed"
    return found


def read_metrics(path: Path) -> dict[str, Any]:
    """A notebook's figures; empty when it wrote none. `{"a": {"b": 1}}` becomes `{"a.b": 1}`.

    Raises:
        LmdError: the file is not a JSON object.
    """
    if not path.exists():
        return {}
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise LmdError(f"{path} that is not JSON ({error})", "an object", "Fix it.") from error
    if not isinstance(values, dict):
        raise LmdError(
            f"a {type(values).__name__} in {path}",
            "an object of numbers and texts",
            "Give every figure its own name, with its unit as suffix.",
        )
    return dict(_flat(values))


def _flat(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in values.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value


def _metrics_or_nothing(path: Path) -> dict[str, Any]:
    """The same for the report, where an unreadable file has already failed its notebook."""
    try:
        return read_metrics(path)
    except LmdError:
        return {}


def render(summary: Mapping[str, Any], folder: Path) -> str:
    """The page as HTML text, from what `metrics.json` holds and the files in `folder`."""
    notebooks = summary["notebooks"]
    parts = [
        "<!doctype html>",
        '<html lang="en"><head><meta charset="utf-8">',
        '<meta name="viewport" content="width=device-width, initial-scale=1">',
        f"<title>lmd: {escape(summary['profile'])}</title><style>{STYLE}</style></head><body>",
        f"<h1>Live music diffusion, profile {escape(summary['profile'])}</h1>",
        f"<p>Written {escape(summary['written'])}.</p>",
        _table(
            ["notebook", "status", "seconds", "seed"],
            (
                [name, entry["status"], entry["seconds"], entry["parameters"].get("seed")]
                for name, entry in notebooks.items()
            ),
        ),
    ]
    for name, entry in notebooks.items():
        parts += _section(name, entry, folder / name)
    parts += ["<h2>Hardware</h2>", _table(["property", "value"], summary["machine"].items())]
    parts += ["<h2>Versions</h2>", _table(["package", "version"], summary["versions"].items())]
    return "\n".join([*parts, "</body></html>", ""])


def _section(name: str, entry: Mapping[str, Any], folder: Path) -> list[str]:
    """One notebook: sounds first, then pictures, figures, parameters."""
    parts = [f'<h2 id="{escape(name)}">{escape(name)}</h2>']
    if entry["error"]:
        parts.append(f"<pre>{escape(entry['error'])}</pre>")
    files = sorted(folder.iterdir()) if folder.is_dir() else []
    parts += [_figure(path, SOUNDS) for path in files if path.suffix in SOUNDS]
    parts += [_figure(path, PICTURES) for path in files if path.suffix in PICTURES]
    if entry["metrics"]:
        parts.append(_table(["metric", "value"], entry["metrics"].items()))
    rows = _table(["parameter", "value"], entry["parameters"].items())
    parts.append(f"<details><summary>parameters</summary>{rows}</details>")
    return parts


def _figure(path: Path, types: Mapping[str, str]) -> str:
    label = escape(path.stem.replace("_", " "))
    if path.stat().st_size > EMBED_LIMIT:
        size = path.stat().st_size / 1e6
        return f"<p>{label}: {size:.0f} MB, in {escape(path.parent.name)}/{escape(path.name)}</p>"
    kind = types[path.suffix]
    data = f"data:{kind};base64,{base64.b64encode(path.read_bytes()).decode()}"
    if types is SOUNDS:
        body = f'<audio controls preload="metadata" aria-label="{label}" src="{data}"></audio>'
    else:
        body = f'<img alt="{label}" src="{data}">'
    return f"<figure>{body}<figcaption>{label}</figcaption></figure>"


def _table(head: Iterable[str], rows: Iterable[Iterable[Any]]) -> str:
    header = "".join(f'<th scope="col">{escape(cell)}</th>' for cell in head)
    body = "".join(f"<tr>{''.join(_cell(value) for value in row)}</tr>" for row in rows)
    return f"<table><thead><tr>{header}</tr></thead><tbody>{body}</tbody></table>"


def _cell(value: Any) -> str:
    if isinstance(value, int | float) and not isinstance(value, bool):
        text = f"{value:.4g}" if isinstance(value, float) else f"{value}"
        return f'<td class="n">{text}</td>'
    return f"<td>{'' if value is None else escape(str(value))}</td>"
