"""The orchestra: General MIDI programs with names, envelopes and the families they form.

Soundfonts state envelopes and filters too, each in its own way; here they are few, named and the
same whatever the soundfont, so that a caption's words keep their sound.
"""

from dataclasses import dataclass
from pathlib import Path

import yaml


@dataclass(frozen=True)
class Instrument:
    """How one General MIDI program is played."""

    name: str  # what captions and manifests call it
    program: int  # of General MIDI, counted from 0
    low: int  # MIDI pitches; a note under the lowest or over the highest is moved by octaves
    high: int
    attack_ms: float  # rise time added to the sample's own
    fade_s: float  # a held middle C falls by 60 dB; half as long two octaves up; 0 = sustained
    release_ms: float  # time in which a released note falls by 60 dB
    cutoff_hz: float  # of a two-pole low-pass, about as the built-in soundfont asks for; 0 = none


_LISTS = yaml.safe_load(Path(__file__).with_suffix(".yml").read_text("utf-8"))
INSTRUMENTS = {name: Instrument(name, *values) for name, values in _LISTS["instruments"].items()}
FAMILIES: dict[str, tuple[tuple[str, ...], ...]] = {
    name: tuple(map(tuple, rows)) for name, rows in _LISTS["families"].items()
}
FAMILY_WEIGHTS: dict[str, int] = dict(zip(FAMILIES, _LISTS["weights"], strict=True))
