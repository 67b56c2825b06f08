"""The orchestra: General MIDI programs with names, envelopes and the families they form.

Soundfonts state envelopes and filters too, each in its own way; here they are few, named and the
same whatever the soundfont, so that a caption's words keep their sound.
"""

from dataclasses import dataclass
from pathlib import Path

import yaml


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


_LISTS = yaml.safe_load(Path(__file__).with_suffix(".yml").read_text("utf-8"))
INSTRUMENTS = {name: Instrument(name, *values) for name, values in _LISTS["instruments"].items()}
FAMILIES: dict[str, tuple[tuple[str, ...], ...]] = {
    name: tuple(map(tuple, rows)) for name, rows in _LISTS["families"].items()
}
FAMILY_WEIGHTS: dict[str, int] = dict(zip(FAMILIES, _LISTS["weights"], strict=True))
