"""One word for one thing, and it is the field's word: what is written is checked against lists."""

import json
import re
from collections.abc import Iterator
from pathlib import Path

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
# What no sentence says; in code these may be names.
BANNED_IN_PROSE = {
    r"laws?": "distribution",
    r"listeners?": "embedding model",
    r"panels": "the player, or weights",
    r"begun": "options of the run",
    r"who sees whom": "attention mask",
}
DOCS = [path for path in sorted((ROOT / "docs").glob("*.md")) if path.name != "log.md"]
PAGES = [ROOT / "README.md", *DOCS]
NOTEBOOKS = sorted(ROOT.glob("notebooks/*.ipynb"))
CODE = sorted(path for ext in ("py", "js", "toml", "j2") for path in ROOT.glob(f"lmd/**/*.{ext}"))


def cells_of(path: Path, *kinds: str) -> str:
    """A file's text; of a notebook, that of its cells of these kinds."""
    text = path.read_text(encoding="utf-8")
    if path.suffix != ".ipynb":
        return text
    cells = json.loads(text)["cells"]
    return "\n".join("".join(cell["source"]) for cell in cells if cell["cell_type"] in kinds)


def found_in(text: str, banned: dict[str, str]) -> Iterator[str]:
    """Every banned word of a text, and what to say."""
    for number, line in enumerate(text.splitlines(), start=1):
        for word, instead in banned.items():
            if match := re.search(rf"(?<![\w-]){word}(?![\w-])", line, re.IGNORECASE):
                yield f"line {number}: {match[0]!r}, say {instead}"


def test_private_words_are_not_used() -> None:
    texts = {path: cells_of(path, "markdown", "code") for path in (*CODE, *NOTEBOOKS, *PAGES)}
    found = {str(path): list(found_in(text, BANNED)) for path, text in texts.items()}
    assert len(found) > 100
    assert not {path: words for path, words in found.items() if words}


def test_pages_and_notebooks_use_the_fields_terms() -> None:
    """Outside of names of files and of the code."""
    folders = [ROOT / folder / "README.md" for folder in ("data", "outputs")]
    for path in (*PAGES, *folders, *NOTEBOOKS):
        prose = re.sub(r"`[^`\n]*`", "", cells_of(path, "markdown"))
        assert not list(found_in(prose, BANNED | BANNED_IN_PROSE)), path


def test_every_part_of_the_method_is_in_the_glossary() -> None:
    text = (ROOT / "docs" / "glossary.md").read_text(encoding="utf-8")
    for term in ("keep mask", "noise level", "velocity", "block-causal", "guidance", "rollout"):
        assert re.search(rf"^\| [^|]*{term}", text, re.IGNORECASE | re.MULTILINE), term
