"""What a run will execute, decided and checked before anything runs."""

import os
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import tyro

from lmd.errors import LmdError
from lmd.pipeline.notebook import OUTPUT, check_parameters

PACKAGE = Path(__file__).parents[1]
ROOT = PACKAGE.parent
Internal = Annotated[Path, tyro.conf.Suppress]  # no flag


@dataclass(frozen=True)
class Options:
    """What to run and where to."""

    profile: str = "quick"  # smoke, quick, full or paper
    only: str | None = None  # only these notebooks, as 02,03; default: all
    # NOTEBOOK.NAME=VALUE, as 02.n_train_steps=500: replaces one parameter of a notebook (`all.` for
    # every one); may be repeated
    settings: Annotated[tuple[str, ...], tyro.conf.arg(name="set"), tyro.conf.UseAppendAction] = ()
    force: bool = False  # run even what is up to date
    out: Path | None = None  # folder of the run; default: outputs/PROFILE
    notebooks: Internal = ROOT / "notebooks"
    profiles: Internal = PACKAGE / "pipeline" / "profiles.toml"
    weights: Internal = ROOT / "data" / "pretrained"

    @property
    def folder(self) -> Path:
        """Where the run is written."""
        return self.out or ROOT / "outputs" / self.profile


@dataclass(frozen=True)
class Task:
    """One notebook with everything decided."""

    source: Path
    parameters: Mapping[str, Any]

    @property
    def name(self) -> str:
        """The notebook's file name without its suffix."""
        return self.source.stem


def plan(options: Options) -> list[Task]:
    """Which notebooks run with which parameters, all names and types checked."""
    sources = sorted(options.notebooks.glob("[0-9][0-9]_*.ipynb"))
    if not sources:
        todo = "Run from a checkout of the repository."
        raise LmdError(f"no notebook in {options.notebooks}", "files as 02_outpaint.ipynb", todo)
    chosen = set(sources)
    if options.only is not None:
        chosen = {_find(word.strip(), sources) for word in options.only.rstrip(", ").split(",")}
    profile = _profile(options, sources)
    settings = [_setting(text, sources) for text in options.settings]
    if skipped := {target.stem for target, _, _ in settings if target} - {p.stem for p in chosen}:
        found = f"--set for {', '.join(sorted(skipped))}, left out by --only"
        raise LmdError(found, "settings for notebooks that run", "Add it to --only, or drop it.")
    folder, tasks = relative(options.folder, options.notebooks), []
    for source in sorted(chosen):
        given = profile.get("all", {}) | profile.get(source.stem, {})
        given |= {name: value for target, name, value in settings if target in (None, source)}
        texts = {name: value for name, value in given.items() if isinstance(value, str)}
        given |= {name: text.replace("{run}", folder) for name, text in texts.items()}
        given[OUTPUT] = f"{folder}/{source.stem}"
        check_parameters(source, given)
        tasks.append(Task(source, given))
    return tasks


def _find(word: str, sources: Sequence[Path]) -> Path:
    """The notebook of that number (`02`, `2`) or name (`02_outpaint`)."""
    for source in sources:
        if word == source.stem or (word.isdecimal() and int(word) == int(source.stem[:2])):
            return source
    names = ", ".join(source.stem for source in sources)
    raise LmdError(f"notebook {word!r}", f"one of {names}", "Give its number or its name.")


def _profile(options: Options, sources: Sequence[Path]) -> dict[str, dict[str, Any]]:
    """The profile from the file, with every section's name checked."""
    name, path = options.profile, options.profiles
    try:
        profiles = tomllib.loads(path.read_text(encoding="utf-8"))
    except tomllib.TOMLDecodeError as error:
        raise LmdError(f"{path} that cannot be read: {error}", "TOML", "Correct it.") from error
    if name not in profiles:
        raise LmdError(f"profile {name!r}", f"one of {', '.join(profiles)}", "Pick one of these.")
    known = ["all", *(source.stem for source in sources)]
    if unknown := sorted(set(profiles[name]) - set(known)):
        found = f"sections {unknown} in profile {name!r} of {path.name}"
        raise LmdError(found, ", ".join(known), "Check the spelling.")
    return profiles[name]


def _setting(text: str, sources: Sequence[Path]) -> tuple[Path | None, str, Any]:
    """`02.n_train_steps=500` as (notebook, name, value); notebook None means every one."""
    left, equals, right = text.partition("=")
    notebook, dot, name = left.strip().partition(".")
    if not (equals and dot and name.isidentifier()):
        expected = "NOTEBOOK.NAME=VALUE, as 02.n_train_steps=500"
        raise LmdError(f"--set {text}", expected, "Retype it.")
    if name == OUTPUT:
        raise LmdError(f"--set {text}", "one folder for a run", "Give it as --out FOLDER.")
    try:
        value = tomllib.loads(f"value = {right}")["value"]
    except tomllib.TOMLDecodeError:
        value = right.strip()  # a text without quotes
    return (None if notebook == "all" else _find(notebook, sources)), name, value


def relative(path: Path, start: Path) -> str:
    """`path` as seen from `start`, with forward slashes; absolute on another drive."""
    try:
        return Path(os.path.relpath(path.resolve(), start.resolve())).as_posix()
    except ValueError:
        return path.resolve().as_posix()
