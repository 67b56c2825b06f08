"""`lmd data check FOLDER`: which files of a folder can be used, and why others cannot."""

from dataclasses import dataclass
from pathlib import Path

import tyro

from lmd.data.layouts import survey
from lmd.data.places import check_json_free, named_folder


@dataclass(frozen=True)
class Options:
    """Flags of the command.

    Attributes:
        folder: folder of audio.
        json: write the report here as JSON.
    """

    folder: tyro.conf.Positional[str]
    json: Path | None = None


def main(options: Options) -> int:
    """Report on a folder; status 1 if anything was rejected."""
    if options.json is not None:
        check_json_free(options.json, key="accepted")
    _, report = survey(named_folder(options.folder))
    for line in report.lines():
        print(line)
    n_accepted, n_rejected = len(report.accepted), len(report.rejected)
    print(f"{n_accepted} accepted, {n_rejected} rejected in {options.folder}")
    if options.json is not None:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(report.as_json() + "\n")
    return 1 if report.rejected else 0
