"""Captions: a rendition's metadata in words, many ways, drawn from (seed, piece, rendition)."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from lmd.corpus.draw import Draw

SYNONYMS: dict[str, tuple[str, ...]] = {
    "church organ": ("church organ", "organ", "pipe organ", "cathedral organ"),
    "harpsichord": ("harpsichord", "cembalo", "clavecin"),
    "piano": ("piano", "grand piano", "acoustic piano"),
    "bright piano": ("bright piano", "piano", "upright piano"),
    "electric piano": ("electric piano", "Rhodes piano", "e-piano"),
    "string ensemble": ("string ensemble", "strings", "string orchestra", "string section"),
    "violin": ("violin", "fiddle", "solo violin"),
    "viola": ("viola",),
    "cello": ("cello", "violoncello"),
    "choir": ("choir", "chorus", "singing choir", "choir singing aah"),
    "voices": ("voices", "human voices", "vocal ensemble", "choir singing ooh"),
    "trumpet": ("trumpet",),
    "trombone": ("trombone",),
    "tuba": ("tuba", "bass tuba"),
    "French horn": ("French horn", "horn"),
    "flute": ("flute", "transverse flute"),
    "recorder": ("recorder", "recorder flute", "block flute"),
    "oboe": ("oboe",),
    "clarinet": ("clarinet",),
    "bassoon": ("bassoon",),
    "guitar": ("guitar", "classical guitar", "nylon guitar", "acoustic guitar"),
    "harp": ("harp", "concert harp"),
    "lute": ("lute", "steel guitar", "plucked lute"),
    "music box": ("music box", "musical box", "toy music box"),
    "warm pad": ("warm pad", "synth pad", "warm synthesizer pad", "synthesizer"),
    "synth strings": ("synth strings", "string synthesizer", "synthesizer", "synth pad"),
    "halo pad": ("halo pad", "synth pad", "shimmering synthesizer pad", "ambient pad"),
}
FAMILY_WORDS: dict[str, tuple[str, ...]] = {
    "strings": ("strings", "string quartet", "bowed strings", "string ensemble"),
    "brass": ("brass", "brass ensemble", "brass quartet", "brass section"),
    "woodwinds": ("woodwinds", "wind ensemble", "woodwind quartet", "wind instruments"),
    "choir": ("choir", "chorus", "vocal ensemble"),
    "plucked": ("plucked strings",),
    "synth pad": ("synth pad", "synthesizer pad", "ambient synthesizer"),
}
STYLES: dict[str, tuple[str, ...]] = {
    "bach": ("chorale", "Bach chorale", "baroque chorale", "hymn", "baroque", "church music"),
    "beethoven": ("Beethoven string quartet", "classical chamber music", "Beethoven"),
    "haydn": ("Haydn string quartet", "classical chamber music", "Haydn"),
    "mozart": ("Mozart", "classical chamber music", "classical"),
    "monteverdi": ("madrigal", "Monteverdi madrigal", "Renaissance polyphony"),
    "corelli": ("baroque trio sonata", "Corelli", "baroque"),
    "cpebach": ("keyboard music", "early classical"),
    "ciconia": ("medieval polyphony", "early music"),
    "luca": ("medieval polyphony", "early music"),
    "lusitano": ("Renaissance polyphony", "motet"),
    "schumann_robert": ("romantic", "Schumann song", "romantic music"),
    "weber": ("romantic", "Weber"),
}
TEMPO_WORDS: tuple[tuple[float, tuple[str, ...]], ...] = (
    (60, ("very slow", "largo", "solemn and slow")),
    (76, ("slow", "adagio", "unhurried")),
    (100, ("moderate tempo", "andante", "walking pace", "medium tempo")),
    (120, ("moderately fast", "allegretto", "flowing tempo")),
    (1e9, ("fast", "allegro", "lively", "quick")),
)
DENSITY_WORDS: tuple[tuple[float, tuple[str, ...]], ...] = (
    (1.2, ("sparse", "long notes", "few notes", "sustained")),
    (2.2, ("steady", "calm movement", "even notes")),
    (3.2, ("flowing", "moving voices", "active")),
    (1e9, ("busy", "dense", "many notes", "running notes")),
)
BRIGHTNESS_WORDS: tuple[tuple[float, tuple[str, ...]], ...] = (
    (900, ("dark", "muffled", "deep and dark")),
    (1300, ("mellow", "soft tone", "warm tone")),
    (1850, ("warm", "round tone", "natural tone")),
    (1e9, ("bright", "brilliant", "clear and bright")),
)
COUNT_WORDS = ("", "solo", "two", "three", "four", "five", "six", "seven", "eight")
ARTICULATION_WORDS: dict[str, tuple[str, ...]] = {
    "legato": ("legato", "smooth", "connected"),
    "tenuto": ("tenuto", "gently separated"),
    "detached": ("detached", "articulated", "non legato"),
    "staccato": ("staccato", "short notes", "crisp"),
}
DYNAMICS_WORDS: dict[str, tuple[str, ...]] = {
    "very soft": ("very soft", "pianissimo", "hushed"),
    "soft": ("soft", "gentle", "quiet"),
    "moderate": ("moderate dynamics", "mezzo forte"),
    "loud": ("loud", "forte", "strong"),
    "very loud": ("very loud", "fortissimo", "powerful"),
}


@dataclass(frozen=True)
class Described:
    """What a caption may speak of.

    Attributes:
        composer, family, instruments: as in the manifest; one instrument per voice.
        tempo_bpm: quarter notes a minute.
        key, mode, metre: e.g. "G", "minor", "3/4".
        density_hz: onsets a second.
        brightness_hz: spectral centroid.
        articulation, dynamics: keys of `render.ARTICULATIONS` and `render.DYNAMICS`.
    """

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
    value: float, scale: Sequence[tuple[float, tuple[str, ...]]], draw: Draw, key: str
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
    "density": (0.35, lambda a, d: word_for(a.density_hz, DENSITY_WORDS, d, "density word")),
    "brightness": (
        0.35,
        lambda a, d: word_for(a.brightness_hz, BRIGHTNESS_WORDS, d, "brightness word"),
    ),
    "voices": (0.2, _voices),
    "articulation": (0.3, lambda a, d: d.choice("touch word", ARTICULATION_WORDS[a.articulation])),
    "dynamics": (0.25, lambda a, d: d.choice("dynamics word", DYNAMICS_WORDS[a.dynamics])),
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
    said = [
        (draw.uniform(f"order {name}", 0, 1), say(about, draw))
        for name, (probability, say) in ATTRIBUTES.items()
        if draw.uniform(f"mention {name}", 0, 1) < probability
    ]
    what = [text for _, text in sorted(said)]
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
