"""Captions: a rendition's metadata in words, many ways, drawn from (seed, piece, rendition)."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import yaml

from lmd.corpus.draw import Draw, QuickDraw
from lmd.corpus.manifest import Row

_WORDS: dict[str, Any] = yaml.safe_load(Path(__file__).with_name("words.yml").read_text("utf-8"))
SYNONYMS, FAMILY_WORDS, STYLES = _WORDS["synonyms"], _WORDS["families"], _WORDS["styles"]
Scale = list[tuple[float, list[str]]]  # bounds, and words below them
TEMPO_WORDS: Scale = _WORDS["tempo"]
COUNT_WORDS = ("", "solo", "two", "three", "four", "five", "six", "seven", "eight")


def _word_for(value: float, scale: Scale, draw: Draw, key: str) -> str:
    words = next(words for bound, words in scale if value < bound)
    return draw.choice(key, words)


def _instruments(row: Row, draw: Draw) -> str:
    """A family's name, or the list of its instruments, each once."""
    if row.family in FAMILY_WORDS and draw.uniform("by family", 0, 1) < 0.6:
        return draw.choice("family word", FAMILY_WORDS[row.family])
    names = [
        draw.choice(f"synonym {name}", SYNONYMS[name])
        for name in dict.fromkeys(row.instruments.split("|"))
    ]
    return names[0] if len(names) == 1 else ", ".join(names[:-1]) + " and " + names[-1]


def _tempo(row: Row, draw: Draw) -> str:
    word = _word_for(row.tempo_bpm, TEMPO_WORDS, draw, "tempo word")
    bpm = f"{row.tempo_bpm:.0f} BPM"
    return draw.choice("tempo form", (word, word, bpm, f"{word}, {bpm}"))


def _key(row: Row, draw: Draw) -> str:
    plain = row.key.replace("♭", "-flat").replace("♯", "-sharp")
    forms = (f"in {plain} {row.mode}", f"{row.mode} key", f"in a {row.mode} key", row.mode)
    return draw.choice("key form", forms)


def _metre(row: Row, draw: Draw) -> str:
    forms = [f"in {row.metre}", f"{row.metre} time"]
    if row.metre in ("3/4", "3/8", "3/2"):
        forms.append("triple metre")
    return draw.choice("metre form", forms)


def _voices(row: Row, draw: Draw) -> str:
    count = COUNT_WORDS[len(row.instruments.split("|"))]
    if count == "solo":
        return "solo"
    forms = (f"{count} voices", f"{count}-part harmony", f"{count} parts")
    return draw.choice("voices form", forms)


def _chosen(name: str, words: dict[str, Sequence[str]], value: str) -> Callable[[Row, Draw], str]:
    return lambda row, draw: draw.choice(name, words[getattr(row, value)])


def _scaled(name: str, scale: Scale, value: str) -> Callable[[Row, Draw], str]:
    return lambda row, draw: _word_for(getattr(row, value), scale, draw, name)


# How likely each is mentioned, and its words.
ATTRIBUTES: dict[str, tuple[float, Callable[[Row, Draw], str]]] = {
    "tempo": (0.6, _tempo),
    "key": (0.4, _key),
    "metre": (0.15, _metre),
    "style": (0.4, _chosen("style word", STYLES, "composer")),
    "density": (0.35, _scaled("density word", _WORDS["density"], "density_hz")),
    "brightness": (0.35, _scaled("brightness word", _WORDS["brightness"], "brightness_hz")),
    "voices": (0.2, _voices),
    "articulation": (0.3, _chosen("touch word", _WORDS["articulation"], "articulation")),
    "dynamics": (0.25, _chosen("dynamics word", _WORDS["dynamics"], "dynamics")),
}
TEMPLATES: tuple[str, ...] = (
    "{who}, {what}",
    "{who}: {what}",
    "{what}, {who}",
    "{what}, played on {who}",
    "music for {who}, {what}",
    "a piece for {who}, {what}",
    "{what} {who}",
)


def caption(row: Row, draw: Draw | None = None) -> str:
    """One caption. Each attribute is mentioned with its own probability, in a drawn order."""
    draw = draw or Draw(row.seed, "caption", row.piece_id, row.rendition)
    who = _instruments(row, draw)
    mentioned = [
        (draw.uniform(f"order {name}", 0, 1), say(row, draw))
        for name, (probability, say) in ATTRIBUTES.items()
        if draw.uniform(f"mention {name}", 0, 1) < probability
    ]
    what = [text for _, text in sorted(mentioned)]
    if not what:
        return who
    template = draw.choice("template", TEMPLATES)
    if template == "{what} {who}" and len(what) > 1:
        template = "{what}, {who}"
    return template.format(who=who, what=", ".join(what))


def further_captions(row: Row, n: int) -> list[str]:
    """Up to `n` other captions of a rendition; none of someone's own music, which says its own."""
    if not row.articulation:
        return []
    draws = (QuickDraw(row.seed, "caption", row.piece_id, row.rendition, k) for k in range(n))
    texts = [caption(row, draw) for draw in draws]
    return [text for text in dict.fromkeys(texts) if text != row.caption]


def stem_caption(row: Row, voice: int) -> str:
    """A caption for one voice heard alone."""
    draw = Draw(row.seed, "caption", row.piece_id, row.rendition)
    instruments = row.instruments.split("|")
    name, last = instruments[voice], len(instruments) - 1
    if name not in SYNONYMS:  # a stem of someone's own music
        return draw.choice(f"stem form {voice}", (f"{name} alone", f"solo {name}", f"{name} stem"))
    word = draw.choice(f"stem synonym {voice}", SYNONYMS[name])
    if not row.tempo_bpm:  # someone's own music: neither the voices' order nor the tempo is known
        return draw.choice(f"stem form {voice}", (f"{word} alone", f"solo {word}"))
    place = "bass line" if voice == last else "melody" if voice == 0 else "inner voice"
    forms = (f"solo {word}, {place}", f"{word} alone", f"{place}, {word}, single voice")
    return f"{draw.choice(f'stem form {voice}', forms)}, {_tempo(row, draw)}"
