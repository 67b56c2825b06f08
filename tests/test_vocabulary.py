"""One word for one thing, and it is the field's word: what is written is checked against a list."""

import importlib
import json
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from lmd.pipeline.plan import ROOT

# What no page and no line of code says -> what it says instead.
BANNED = {
    r"judges?": "discriminator, or ClipMetrics",
    r"desks?": "control queue",
    r'(?<!["`])seams?(?!["`])': "block boundary",
    r"doors?": "noisy-latent projection, context projection",
    r"crowds?": "samples",
    r"beliefs?": "probability",
    r"panels of weights": "weights",
    r"heard_codec": "codec_hash_of",
    r"told": "describe, format, or said",
    r"is told": "is built from, or is given",
    r"in its ears": "in its context",
    r"if it is silent": "by default",
    # in quotes and as a file's name it stands for what older files are called
    r'(?<!["`])recognisers?(?!["`.])': "tagger",
}
DOCS = [path for path in sorted((ROOT / "docs").glob("*.md")) if path.name != "log.md"]
GLOSSARY = ROOT / "docs" / "glossary.md"
CODE = sorted(path for ext in ("py", "js", "toml", "j2") for path in ROOT.glob(f"lmd/**/*.{ext}"))
FILES = [*CODE, *sorted(ROOT.glob("notebooks/*.ipynb")), ROOT / "README.md", *DOCS]


def lines_of(path: Path) -> Iterator[str]:
    """Lines of a file; of a notebook: of its cells."""
    text = path.read_text(encoding="utf-8")
    if path.suffix == ".ipynb":
        text = "\n".join("".join(cell["source"]) for cell in json.loads(text)["cells"])
    yield from text.splitlines()


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_private_words_are_not_used(path: Path) -> None:
    found = [
        f"line {number}: {match[0]!r}, say {instead}"
        for number, line in enumerate(lines_of(path), start=1)
        for word, instead in BANNED.items()
        for match in [re.search(rf"(?<![\w-]){word}(?![\w-])", line, re.IGNORECASE)]
        if match
    ]
    assert not found


def exists(name: str) -> bool:
    """Whether a dotted name of the package can be imported, or looked up in what can be."""
    parts = name.split(".")
    for n in range(len(parts), 0, -1):
        try:
            found = importlib.import_module(".".join(parts[:n]))
        except ModuleNotFoundError:
            continue
        for part in parts[n:]:
            if part in getattr(found, "__dataclass_fields__", {}):
                return True  # a field without a default is no attribute of its class
            found = getattr(found, part, None)
        return found is not None
    return False


def test_the_code_that_pages_name_exists() -> None:
    named = {
        name
        for path in [ROOT / "README.md", *DOCS]
        for name in re.findall(r"`(lmd(?:\.\w+)+)`", path.read_text(encoding="utf-8"))
    }
    assert not sorted(name for name in named if not exists(name))
    assert exists("lmd.config.WindowConfig.context_frames")
    assert not exists("lmd.config.WindowConfig.no_such_size")
    assert not exists("lmd.no_such_module")


@pytest.mark.skipif(not GLOSSARY.is_file(), reason="no glossary yet")
def test_every_part_of_the_method_is_in_the_glossary() -> None:
    text = GLOSSARY.read_text(encoding="utf-8")
    for term in ("keep mask", "noise level", "velocity", "block-causal", "guidance", "rollout"):
        assert re.search(rf"^\| [^|]*{term}", text, re.IGNORECASE | re.MULTILINE), term
