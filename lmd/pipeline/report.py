"""The report of a run: one HTML file with its pictures, sounds, figures, hardware and versions.

Nothing in it points outside: pictures and sounds are data URIs, there is no script, and texts from
notebooks are escaped.
"""

import base64
import json
import time
from collections.abc import Iterator, Mapping
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from jinja2 import StrictUndefined, Template

from lmd.errors import LmdError
from lmd.machine import machine_dict

PACKAGES = ("torch", "torchaudio", "lightning", "numpy", "scipy", "papermill", "music21")
PACKAGES += ("pretty_midi", "soundfile", "wordllama", "transformers", "diffusers")
KINDS = {".wav": "audio/wav", ".flac": "audio/flac", ".ogg": "audio/ogg", ".png": "image/png"}
EMBED_LIMIT = 12_000_000  # bytes of one file; a longer sound is named, not embedded


def write_report(folder: Path, profile: str, records: Mapping[str, Mapping[str, Any]]) -> Path:
    """Write `report.html` and `metrics.json` into the folder of a run.

    Args:
        folder: the run; each notebook's files are in the folder of its name.
        profile: which parameters were used.
        records: for each notebook `status`, `seconds`, `parameters`, `error`.

    Returns:
        The path of the report.
    """
    summary: dict[str, Any] = {
        "profile": profile,
        "written": time.strftime("%Y-%m-%d %H:%M:%S %z"),
        "machine": machine_dict(),
        "versions": versions(),
        "notebooks": {},
    }
    for name, record in sorted(records.items()):
        entry = {"status": "running", "seconds": None, "error": "", "parameters": {}, "metrics": {}}
        entry |= {key: record[key] for key in entry if key in record}
        with suppress(LmdError):  # an unreadable file has already failed its notebook
            entry["metrics"] = read_metrics(folder / name / "metrics.json")
        summary["notebooks"][name] = entry
    metrics = json.dumps(summary, indent=2, sort_keys=True)
    (folder / "metrics.json").write_text(metrics + "\n", encoding="utf-8")
    template = Path(__file__).with_name("report.html.j2").read_text(encoding="utf-8")
    page = Template(template, autoescape=True, undefined=StrictUndefined, trim_blocks=True)
    media = {name: _media(folder / name) for name in summary["notebooks"]}
    report = folder / "report.html"
    report.write_text(page.render(**summary, media=media), encoding="utf-8")
    return report


def _media(folder: Path) -> list[dict[str, Any]]:
    """A notebook's sounds, then its pictures, as data where they are not too long."""
    files = sorted(folder.iterdir()) if folder.is_dir() else []
    found = []
    for path in sorted(files, key=lambda path: path.suffix == ".png"):
        if path.suffix in KINDS:
            kind, size, data = KINDS[path.suffix], path.stat().st_size, ""
            if size <= EMBED_LIMIT:
                data = f"data:{kind};base64,{base64.b64encode(path.read_bytes()).decode()}"
            label = path.stem.replace("_", " ")
            file = {"name": path.name, "label": label, "kind": kind, "data": data}
            found.append({**file, "size_mb": round(size / 1e6)})
    return found


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
