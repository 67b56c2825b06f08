"""`python -m lmd data check FOLDER`: which files of a folder can be used, and why others cannot."""

import argparse
from pathlib import Path

from lmd.data.layouts import survey
from lmd.data.places import check_file_free


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the command's arguments."""
    parser.add_argument("folder", type=Path, help="folder of audio")
    parser.add_argument("--json", type=Path, help="write the report here as JSON")


def main(args: argparse.Namespace) -> int:
    """Report on a folder; status 1 if anything was rejected."""
    if args.json is not None:
        check_file_free(args.json)
    _, report = survey(args.folder)
    for item in report.rejected:
        print(f"rejected  {item}")
    print(f"{len(report.accepted)} accepted, {len(report.rejected)} rejected in {args.folder}")
    if args.json is not None:
        args.json.parent.mkdir(parents=True, exist_ok=True)
        args.json.write_text(report.as_json() + "\n")
    return 1 if report.rejected else 0
