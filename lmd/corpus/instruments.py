"""The orchestra: General MIDI programs with names, envelopes and the families they form.

Soundfonts state envelopes and filters too, each in its own way; here they are few, named and the
same whatever the soundfont, so that a caption's words keep their sound.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class Instrument:
    """How one General MIDI program is played.

    Attributes:
        name: what captions and manifests call it.
        program: General MIDI program, counted from 0.
        low, high: playable MIDI pitches; a note outside is moved by octaves.
        attack_ms: rise time added to the sample's own.
        fade_s: time in which a held note falls by 60 dB at middle C; 0 = it is sustained.
            Strings twice as long fade half as fast: the time halves every two octaves up.
        release_ms: time in which a released note falls by 60 dB.
        cutoff_hz: corner of a two-pole low-pass, near what the built-in soundfont asks for at the
            height of its filter envelope; 0 = none.
    """

    name: str
    program: int
    low: int
    high: int
    attack_ms: float
    fade_s: float
    release_ms: float
    cutoff_hz: float


INSTRUMENTS: dict[str, Instrument] = {
    item.name: item
    for item in (
        Instrument("church organ", 19, 28, 98, 15, 0, 450, 6000),
        Instrument("harpsichord", 6, 29, 91, 1, 7, 120, 6500),
        Instrument("piano", 0, 21, 108, 1, 11, 250, 5000),
        Instrument("bright piano", 1, 21, 108, 1, 11, 250, 8000),
        Instrument("electric piano", 4, 28, 100, 2, 9, 200, 4500),
        Instrument("string ensemble", 48, 28, 100, 60, 0, 350, 2500),
        Instrument("violin", 40, 55, 100, 40, 0, 200, 0),
        Instrument("viola", 41, 48, 88, 40, 0, 200, 8000),
        Instrument("cello", 42, 36, 79, 40, 0, 220, 6000),
        Instrument("choir", 52, 36, 88, 70, 0, 400, 5500),
        Instrument("voices", 53, 36, 88, 60, 0, 350, 3500),
        Instrument("trumpet", 56, 52, 88, 20, 0, 160, 0),
        Instrument("trombone", 57, 38, 76, 25, 0, 180, 4500),
        Instrument("tuba", 58, 26, 64, 30, 0, 180, 4000),
        Instrument("French horn", 60, 38, 79, 35, 0, 220, 4000),
        Instrument("flute", 73, 58, 98, 30, 0, 150, 0),
        Instrument("recorder", 74, 58, 98, 25, 0, 120, 7000),
        Instrument("oboe", 68, 57, 91, 20, 0, 130, 0),
        Instrument("clarinet", 71, 48, 91, 25, 0, 130, 4500),
        Instrument("bassoon", 70, 33, 74, 25, 0, 150, 5000),
        Instrument("guitar", 24, 38, 86, 1, 6, 180, 7000),
        Instrument("harp", 46, 26, 100, 1, 8, 600, 0),
        Instrument("lute", 25, 36, 86, 1, 5, 150, 7000),
        Instrument("music box", 10, 60, 103, 1, 4, 700, 0),
        Instrument("warm pad", 89, 32, 96, 160, 0, 700, 1200),
        Instrument("synth strings", 50, 32, 96, 90, 0, 500, 4000),
        Instrument("halo pad", 94, 32, 96, 160, 0, 700, 2500),
    )
}

# A family lists, per register from high to low, the instruments that may play a voice there.
# One row = the same instrument for every voice.
FAMILIES: dict[str, tuple[tuple[str, ...], ...]] = {
    "church organ": (("church organ",),),
    "harpsichord": (("harpsichord",),),
    "piano": (("piano", "bright piano", "piano", "electric piano"),),
    "strings": (
        ("violin", "string ensemble"),
        ("violin", "string ensemble"),
        ("viola", "string ensemble"),
        ("cello", "string ensemble"),
    ),
    "choir": (("choir", "voices"),),
    "brass": (("trumpet",), ("trumpet", "French horn"), ("trombone", "French horn"), ("tuba",)),
    "woodwinds": (("flute", "recorder"), ("oboe", "clarinet"), ("clarinet",), ("bassoon",)),
    "plucked": (("guitar", "harp", "lute"),),
    "music box": (("music box",),),
    "synth pad": (("warm pad", "synth strings", "halo pad"),),
    "mixed": (
        ("violin", "flute", "oboe", "trumpet", "recorder", "choir", "music box", "harpsichord"),
        ("clarinet", "oboe", "viola", "guitar", "church organ", "French horn", "harp"),
        ("viola", "cello", "French horn", "clarinet", "trombone", "lute", "voices"),
        ("cello", "bassoon", "trombone", "tuba", "church organ", "piano", "harp"),
    ),
}
# Families are drawn with these weights: fading and sustained sounds about equally often.
FAMILY_WEIGHTS = dict(zip(FAMILIES, (3, 2, 3, 3, 2, 2, 2, 2, 1, 1, 3), strict=True))
