"""The report of a run: one HTML file with its pictures, sounds, figures, hardware and versions.

Nothing in it points outside: pictures and sounds are data URIs, there is no script, and texts from
notebooks are escaped.
"""

import base64
import json
import time
from collections.abc import Mapping
from contextlib import suppress
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pandas as pd
from jinja2 import StrictUndefined, Template

from lmd import __version__
from lmd.errors import LmdError
from lmd.machine import machine_dict
from lmd.outputs import write_json

PACKAGES = ("torch", "torchaudio", "lightning", "numpy", "scipy", "papermill", "music21")
PACKAGES += ("pretty_midi", "soundfile", "wordllama", "transformers", "diffusers")
KINDS = {".wav": "audio/wav", ".flac": "audio/flac", ".ogg": "audio/ogg", ".png": "image/png"}
EMBED_LIMIT = 12_000_000  # bytes of one file; a longer sound is named, not embedded


def write_report(folder: Path, profile: str, records: Mapping[str, Mapping[str, Any]]) -> Path:
    """Write `report.html`, whose path comes back, and `metrics.json` into the folder of a run.

    `records` has each notebook's `status`, `seconds`, `parameters` and `error`.
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
    write_json(folder / "metrics.json", summary)
    template = Path(__file__).with_name("report.html.j2").read_text(encoding="utf-8")
    page = Template(template, autoescape=True, undefined=StrictUndefined, trim_blocks=True)
    media = {name: _media(folder / name) for name in summary["notebooks"]}
    report = folder / "report.html"
    report.write_text(page.render(**summary, media=media), encoding="utf-8")
    return report


def _media(folder: Path) -> list[dict[str, Any]]:
    """A notebook's sounds, then its pictures, as data where they are not too long."""
    files, found = [path for path in folder.glob("*.*") if path.suffix in KINDS], []
    for path in sorted(files, key=lambda path: (path.suffix == ".png", path)):
        kind, size, data = KINDS[path.suffix], path.stat().st_size, ""
        if size <= EMBED_LIMIT:
            data = f"data:{kind};base64,{base64.b64encode(path.read_bytes()).decode()}"
        label = path.stem.replace("_", " ")
        file = {"name": path.name, "label": label, "kind": kind, "data": data}
        found.append({**file, "size_mb": round(size / 1e6)})
    return found


def versions() -> dict[str, str]:
    """Versions of the packages that decide results."""
    return {"lmd": __version__, **{name: version(name) for name in PACKAGES}}


def read_metrics(path: Path) -> dict[str, Any]:
    """A notebook's figures; empty when it wrote none. `{"a": {"b": 1}}` becomes `{"a.b": 1}`."""
    if not path.exists():
        return {}
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise LmdError(f"{path} that is not JSON ({error})", "an object", "Fix it.") from error
    if not isinstance(values, dict):
        found = f"a {type(values).__name__} in {path}"
        raise LmdError(found, "an object of numbers and texts", "Give every figure its own name.")
    (flat,) = pd.json_normalize(values).to_dict("records") or ({},)
    return flat
