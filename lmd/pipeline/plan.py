"""What a run will execute, decided and checked before anything runs."""

import os
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lmd.errors import LmdError
from lmd.pipeline.notebook import OUTPUT, check_parameters, parameters_of

PACKAGE = Path(__file__).parents[1]
ROOT = PACKAGE.parent


@dataclass(frozen=True)
class RunOptions:
    """What to run and where to. `settings` are texts such as `02.n_train_steps=500`."""

    profile: str = "quick"
    only: tuple[str, ...] = ()
    settings: tuple[str, ...] = ()
    force: bool = False
    out: Path | None = None  # default: outputs/PROFILE
    notebooks: Path = ROOT / "notebooks"
    profiles: Path = PACKAGE / "pipeline" / "profiles.toml"
    weights: Path = ROOT / "data" / "pretrained"

    @property
    def folder(self) -> Path:
        """Where the run is written."""
        return self.out or ROOT / "outputs" / self.profile


@dataclass(frozen=True)
class Task:
    """One notebook with everything decided."""

    source: Path
    parameters: Mapping[str, Any] = field(default_factory=dict)

    @property
    def name(self) -> str:
        """The notebook's file name without its suffix."""
        return self.source.stem


def plan(options: RunOptions) -> list[Task]:
    """Which notebooks run with which parameters, all of it checked.

    Raises:
        LmdError: an unknown profile, notebook or parameter, or a value of the wrong type.
    """
    sources = sorted(options.notebooks.glob("[0-9][0-9]_*.ipynb"))
    if not sources:
        raise LmdError(
            f"no notebook in {options.notebooks}",
            "files named as 02_outpaint.ipynb",
            "Run from a checkout of the repository (pip install -e .).",
        )
    chosen = {_find(word, sources) for word in options.only} or set(sources)
    profile = _profile(options.profiles, options.profile, sources)
    settings = [_setting(text, sources) for text in options.settings]
    folder = relative(options.folder, options.notebooks)
    tasks = []
    for source in (source for source in sources if source in chosen):
        given = profile.get("all", {}) | profile.get(source.stem, {})
        for target, name, value in settings:
            if target in (None, source):
                given = given | {name: value}
        given = {name: _fill(value, folder) for name, value in given.items()}
        given[OUTPUT] = f"{folder}/{source.stem}"
        check_parameters(source, parameters_of(source), given)
        tasks.append(Task(source, given))
    skipped = {target for target, _, _ in settings if target} - chosen
    if skipped:
        raise LmdError(
            f"--set for {', '.join(sorted(path.stem for path in skipped))}, left out by --only",
            "settings for notebooks that run",
            "Add it to --only, or drop the setting.",
        )
    return tasks


def _find(word: str, sources: Sequence[Path]) -> Path:
    """The notebook of that number (`02`, `2`) or name (`02_outpaint`)."""
    number = f"{int(word):02d}" if word.isdecimal() else None
    for source in sources:
        if word == source.stem or number == source.stem.split("_")[0]:
            return source
    raise LmdError(
        f"notebook {word!r}",
        f"one of {', '.join(source.stem for source in sources)}",
        "Give its number or its name.",
    )


def _profile(path: Path, name: str, sources: Sequence[Path]) -> dict[str, dict[str, Any]]:
    """One profile from the file, with every section's name checked."""
    try:
        profiles = tomllib.loads(path.read_text(encoding="utf-8"))
    except tomllib.TOMLDecodeError as error:
        raise LmdError(f"{path} that cannot be read: {error}", "TOML", "Correct it.") from error
    if name not in profiles:
        raise LmdError(f"profile {name!r}", f"one of {', '.join(profiles)}", "Pick one of these.")
    unknown = set(profiles[name]) - {"all", *(source.stem for source in sources)}
    if unknown:
        raise LmdError(
            f"sections {sorted(unknown)} in profile {name!r} of {path.name}",
            f"all, {', '.join(source.stem for source in sources)}",
            "Check the spelling.",
        )
    return profiles[name]


def _setting(text: str, sources: Sequence[Path]) -> tuple[Path | None, str, Any]:
    """`02.n_train_steps=500` as (notebook, name, value); notebook None means every one."""
    left, equals, right = text.partition("=")
    notebook, dot, name = left.strip().partition(".")
    if not (equals and dot and name.isidentifier()):
        raise LmdError(
            f"--set {text}", "NOTEBOOK.NAME=VALUE, as 02.n_train_steps=500", "Retype it."
        )
    if name == OUTPUT:
        found = f"--set {text}"
        raise LmdError(found, "other parameters: a run has one folder", "Give it as --out FOLDER.")
    try:
        value = tomllib.loads(f"value = {right}")["value"]
    except tomllib.TOMLDecodeError:
        value = right.strip()  # a text without quotes
    return (None if notebook == "all" else _find(notebook, sources)), name, value


def _fill(value: Any, folder: str) -> Any:
    return value.replace("{run}", folder) if isinstance(value, str) else value


def relative(path: Path, start: Path) -> str:
    """`path` as seen from `start`, with forward slashes; absolute on another drive."""
    try:
        return Path(os.path.relpath(path.resolve(), start.resolve())).as_posix()
    except ValueError:
        return path.resolve().as_posix()
