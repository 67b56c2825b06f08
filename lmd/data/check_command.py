"""`lmd data check FOLDER`: which files of a folder can be used, and why others cannot."""

from dataclasses import dataclass
from pathlib import Path

import tyro

from lmd.data.check import named_folder
from lmd.data.layouts import survey
from lmd.outputs import check_outputs, write_json


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
    check_outputs(json=options.json, json_key="accepted", make_folders=True)
    _, report = survey(named_folder(options.folder))
    for line in report.lines():
        print(line)
    n_accepted, n_rejected = len(report.accepted), len(report.rejected)
    print(f"{n_accepted} accepted, {n_rejected} rejected in {options.folder}")
    if options.json is not None:
        write_json(options.json, report.as_dict())
    return 1 if report.rejected else 0
