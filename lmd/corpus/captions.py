"""Captions: a rendition's metadata in words, many ways, drawn from (seed, piece, rendition)."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from lmd.corpus.draw import Draw

_WORDS: dict[str, Any] = yaml.safe_load(Path(__file__).with_name("words.yml").read_text("utf-8"))
SYNONYMS, FAMILY_WORDS, STYLES = _WORDS["synonyms"], _WORDS["families"], _WORDS["styles"]
TEMPO_WORDS: list[tuple[float, list[str]]] = _WORDS["tempo"]  # bounds, and words below them
COUNT_WORDS = ("", "solo", "two", "three", "four", "five", "six", "seven", "eight")


@dataclass(frozen=True)
class Described:
    """What a caption may speak of; see `lmd.corpus.manifest.Row`. One instrument per voice."""

    composer: str
    family: str
    instruments: tuple[str, ...]
    tempo_bpm: float
    key: str
    mode: str
    metre: str
    density_hz: float
    brightness_hz: float
    articulation: str
    dynamics: str


def word_for(
    value: float, scale: Sequence[tuple[float, Sequence[str]]], draw: Draw, key: str
) -> str:
    """A synonym from the first row of the scale whose bound lies above the value."""
    words = next(words for bound, words in scale if value < bound)
    return draw.choice(key, words)


def instrument_words(about: Described, draw: Draw) -> str:
    """The instruments: a family's name, or the list of them."""
    if about.family in FAMILY_WORDS and draw.uniform("by family", 0, 1) < 0.6:
        return draw.choice("family word", FAMILY_WORDS[about.family])
    names = [
        draw.choice(f"synonym {name}", SYNONYMS[name])
        for name in dict.fromkeys(about.instruments)  # each once, in order
    ]
    return names[0] if len(names) == 1 else ", ".join(names[:-1]) + " and " + names[-1]


def _tempo(about: Described, draw: Draw) -> str:
    word = word_for(about.tempo_bpm, TEMPO_WORDS, draw, "tempo word")
    bpm = f"{about.tempo_bpm:.0f} BPM"
    return draw.choice("tempo form", (word, word, bpm, f"{word}, {bpm}"))


def _key(about: Described, draw: Draw) -> str:
    plain = about.key.replace("♭", "-flat").replace("♯", "-sharp")
    forms = (f"in {plain} {about.mode}", f"{about.mode} key", f"in a {about.mode} key", about.mode)
    return draw.choice("key form", forms)


def _metre(about: Described, draw: Draw) -> str:
    forms = [f"in {about.metre}", f"{about.metre} time"]
    if about.metre in ("3/4", "3/8", "3/2"):
        forms.append("triple metre")
    return draw.choice("metre form", forms)


def _voices(about: Described, draw: Draw) -> str:
    count = COUNT_WORDS[len(about.instruments)]
    if count == "solo":
        return "solo"
    return draw.choice(
        "voices form", (f"{count} voices", f"{count}-part harmony", f"{count} parts")
    )


ATTRIBUTES: dict[str, tuple[float, Callable[[Described, Draw], str]]] = {
    "tempo": (0.6, _tempo),
    "key": (0.4, _key),
    "metre": (0.15, _metre),
    "style": (0.4, lambda about, draw: draw.choice("style word", STYLES[about.composer])),
    "density": (0.35, lambda a, d: word_for(a.density_hz, _WORDS["density"], d, "density word")),
    "brightness": (
        0.35,
        lambda a, d: word_for(a.brightness_hz, _WORDS["brightness"], d, "brightness word"),
    ),
    "voices": (0.2, _voices),
    "articulation": (
        0.3,
        lambda a, d: d.choice("touch word", _WORDS["articulation"][a.articulation]),
    ),
    "dynamics": (0.25, lambda a, d: d.choice("dynamics word", _WORDS["dynamics"][a.dynamics])),
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


def caption(about: Described, draw: Draw) -> str:
    """One caption. Each attribute is mentioned with its own probability, in a drawn order."""
    who = instrument_words(about, draw)
    mentioned = [
        (draw.uniform(f"order {name}", 0, 1), say(about, draw))
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


def stem_caption(about: Described, voice: int, draw: Draw) -> str:
    """A caption for one voice heard alone."""
    name = about.instruments[voice]
    if name not in SYNONYMS:  # a stem of someone's own music
        return draw.choice(f"stem form {voice}", (f"{name} alone", f"solo {name}", f"{name} stem"))
    word = draw.choice(f"stem synonym {voice}", SYNONYMS[name])
    if not about.tempo_bpm:  # someone's own music: neither the voices' order nor the tempo is known
        return draw.choice(f"stem form {voice}", (f"{word} alone", f"solo {word}"))
    last = len(about.instruments) - 1
    place = "bass line" if voice == last else "melody" if voice == 0 else "inner voice"
    forms = (f"solo {word}, {place}", f"{word} alone", f"{place}, {word}, single voice")
    return f"{draw.choice(f'stem form {voice}', forms)}, {_tempo(about, draw)}"
