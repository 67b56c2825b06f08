"""Renditions: one piece played once, everything drawn from (seed, piece, rendition)."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from lmd.corpus.draw import Draw
from lmd.corpus.instruments import FAMILIES, FAMILY_WEIGHTS, INSTRUMENTS
from lmd.corpus.levels import gain_of, limit, loudness_lufs
from lmd.corpus.scores import Piece
from lmd.corpus.tones import ToneBank, played_note

ARTICULATIONS = {"legato": 1.02, "tenuto": 0.94, "detached": 0.78, "staccato": 0.5}  # of a note
DYNAMICS: dict[str, int] = {"very soft": 4, "soft": 3, "moderate": 2, "loud": 1, "very loud": 0}
MAX_SECONDS = 60.0
LEAD_S = 0.1  # silence before the first note, so that an early note is not cut
MAX_GATE_S = 30.0
FERMATA_STRETCH = 1.6


@dataclass(frozen=True)
class Rendition:
    """How a piece is played; with the piece, all that its sound depends on."""

    piece_id: str  # with the next two: what everything else was drawn from
    rendition: int
    seed: int
    family: str  # one of `FAMILIES`
    instruments: tuple[str, ...]  # one name of `INSTRUMENTS` per voice
    tempo_bpm: float  # quarter notes a minute
    transposition: int  # semitones
    dynamics: str  # a key of `DYNAMICS`; softer is darker, loudness itself is normalised
    articulation: str  # a key of `ARTICULATIONS`
    looseness_ms: float  # standard deviation of the onsets
    swell_db: float  # rise and fall of the level over each phrase of eight quarters
    levels_db: tuple[float, ...]  # one per voice
    start_quarter: float  # of the excerpt
    end_quarter: float


def draw_rendition(
    piece: Piece, rendition: int, seed: int = 0, max_seconds: float = MAX_SECONDS
) -> Rendition:
    """The rendition of that number: a pure function of (seed, piece, rendition).

    Pieces longer than `max_seconds` are cut to an excerpt that begins with a bar.
    """
    draw = Draw(seed, piece.piece_id, rendition)
    family = draw.choice("family", list(FAMILIES), list(FAMILY_WEIGHTS.values()))
    tempo = round(60.0 * 2.0 ** draw.uniform("tempo", -0.35, 1.1))
    start, end = _excerpt(piece, draw, tempo, max_seconds)
    n_voices = len(piece.voices)
    return Rendition(
        piece_id=piece.piece_id,
        rendition=rendition,
        seed=seed,
        family=family,
        instruments=_instruments(draw, family, n_voices),
        tempo_bpm=float(tempo),
        transposition=int(draw.choice("transposition", range(-5, 7))),
        dynamics=draw.choice("dynamics", list(DYNAMICS), [1, 2, 3, 2, 2]),
        articulation=draw.choice("articulation", list(ARTICULATIONS), [4, 4, 2, 1]),
        looseness_ms=draw.uniform("looseness", 0, 14),
        swell_db=draw.uniform("swell", 0, 5),
        levels_db=tuple(
            (1.0 if v in (0, n_voices - 1) else 0.0) + draw.uniform(f"level {v}", -2, 2)
            for v in range(n_voices)
        ),
        start_quarter=start,
        end_quarter=end,
    )


def _excerpt(piece: Piece, draw: Draw, tempo: float, max_seconds: float) -> tuple[float, float]:
    """The stretch that is played, in quarter notes: whole bars from a drawn one on."""
    length, wanted = piece.quarters, max_seconds * tempo / 60
    if length <= wanted * 1.1:
        return 0.0, length
    starts = [m for m in piece.measures if m + wanted <= length] or [0.0]
    start = draw.choice("excerpt", starts)
    end = max((m for m in piece.measures if start < m <= start + wanted), default=start + wanted)
    return start, end if end > start + wanted / 2 else start + wanted


def _instruments(draw: Draw, family: str, n_voices: int) -> tuple[str, ...]:
    """One instrument per voice: the family's registers spread over the voices, high to low."""
    registers = FAMILIES[family]
    if len(registers) == 1:
        return (draw.choice("instrument", registers[0]),) * n_voices
    if family == "strings" and draw.uniform("section", 0, 1) < 0.5:
        return ("string ensemble",) * n_voices
    span = max(1, n_voices - 1)
    rows = [registers[round(v * (len(registers) - 1) / span)] for v in range(n_voices)]
    if family == "strings":
        rows = [row[:1] for row in rows]
    return tuple(draw.choice(f"instrument {v}", row) for v, row in enumerate(rows))


def note_times(piece: Piece, how: Rendition) -> np.ndarray:
    """The notes as played: rows (onset_s, gate_s, pitch, voice, level_db), float64 `[note, 5]`.

    Time runs at the rendition's tempo, waits on fermatas and slows down over the last bar.
    """
    table = piece.table
    inside = (table[:, 0] >= how.start_quarter - 1e-9) & (table[:, 0] < how.end_quarter - 1e-9)
    table = table[inside]
    onset, end = table[:, 0], np.minimum(table[:, 0] + table[:, 1], how.end_quarter)
    grid, seconds = _clock(table, how)
    draw = Draw(how.seed, how.piece_id, how.rendition)
    loose = np.clip(draw.normal("timing", len(table)), -2.5, 2.5) * how.looseness_ms / 1000
    start_s = LEAD_S + np.interp(onset, grid, seconds) + loose
    held_s = np.interp(end, grid, seconds) - np.interp(onset, grid, seconds)
    gate_s = np.clip(held_s * ARTICULATIONS[how.articulation], 0.07, MAX_GATE_S)
    phase = (onset - how.start_quarter) / 8.0
    level = how.swell_db * (np.sin(np.pi * (phase % 1.0)) - 0.5)
    level += np.array(how.levels_db)[table[:, 3].astype(int)]
    level += 0.8 * np.clip(draw.normal("touch", len(table)), -2.5, 2.5)
    pitch = table[:, 2] + how.transposition
    return np.stack([np.maximum(start_s, 0.0), gate_s, pitch, table[:, 3], level], axis=1)


def _clock(table: np.ndarray, how: Rendition) -> tuple[np.ndarray, np.ndarray]:
    """Quarter-note positions and the seconds at which they are reached."""
    step = 0.25
    grid = how.start_quarter + step * np.arange(
        int(np.ceil((how.end_quarter - how.start_quarter) / step)) + 1
    )
    pace = np.ones(len(grid) - 1)
    for onset, duration, *_ in table[table[:, 4] > 0]:
        held = (grid[:-1] >= onset + duration / 2 - 1e-9) & (grid[:-1] < onset + duration - 1e-9)
        pace[held] = FERMATA_STRETCH
    last = np.clip((grid[1:] - (how.end_quarter - 4)) / 4, 0, 1)
    pace = pace * (1 + 0.35 * last)
    return grid, np.concatenate([[0.0], np.cumsum(pace * step * 60.0 / how.tempo_bpm)])


@dataclass(frozen=True)
class Rendered:
    """The sound of a rendition, float32."""

    stems: np.ndarray  # [voice, channel, sample]
    mix: np.ndarray  # [channel, sample]: the sum of the stems in voice order, to the bit
    wave: np.ndarray  # [channel, sample]: the mix after the limiter, |wave| <= 0.95
    notes: np.ndarray  # as `note_times` gives them


def render(piece: Piece, how: Rendition, bank: ToneBank, channels: int = 1) -> Rendered:
    """Play a rendition, in one channel or two (voices spread from left to right).

    The mix is at `lmd.corpus.levels.TARGET_LUFS`.
    """
    notes = note_times(piece, how)
    stems = [_stem(notes[notes[:, 3] == v], how, v, bank) for v in range(len(piece.voices))]
    n_samples = max(len(stem) for stem in stems)
    spread = np.zeros((len(stems), channels, n_samples), np.float32)
    for v, stem in enumerate(stems):
        pan = 0.0 if len(stems) == 1 else 0.6 * (2 * v / (len(stems) - 1) - 1)
        angle = np.pi / 4 * (1 + pan)
        gains = (1.0,) if channels == 1 else (np.cos(angle), np.sin(angle))
        for channel, gain in enumerate(gains):
            spread[v, channel, : len(stem)] = np.float32(gain) * stem
    spread *= np.float32(gain_of(loudness_lufs(sum_stems(spread), bank.sample_rate)))
    mix = sum_stems(spread)
    return Rendered(spread, mix, limit(mix, bank.sample_rate), notes)


def sum_stems(stems: np.ndarray) -> np.ndarray:
    """The mix `[channel, sample]`: stems added in voice order, in float32."""
    mix = stems[0].copy()
    for stem in stems[1:]:
        mix += stem
    return mix


def _stem(notes: np.ndarray, how: Rendition, voice: int, bank: ToneBank) -> np.ndarray:
    """One voice, at a common loudness for every instrument, float32 `[sample]`."""
    instrument, rate = INSTRUMENTS[how.instruments[voice]], bank.sample_rate
    darkness = DYNAMICS[how.dynamics]
    parts = []
    for onset_s, gate_s, pitch, _, level_db in notes:
        wave = played_note(bank, instrument, int(pitch), gate_s, darkness)
        parts.append((round(onset_s * rate), np.float32(10 ** (level_db / 20)) * wave))
    stem = np.zeros(max((at + len(wave) for at, wave in parts), default=rate), np.float32)
    for at, wave in parts:
        stem[at : at + len(wave)] += wave
    gated = stem[np.abs(stem) > 1e-4]
    level = float(np.sqrt(np.mean(np.square(gated, dtype=np.float64)))) if len(gated) else 1.0
    balance = 10 ** (how.levels_db[voice] / 20) / level
    return stem * np.float32(0.1 * balance)


def with_instruments(how: Rendition, instruments: Sequence[str]) -> Rendition:
    """The same rendition with other instruments, one name per voice."""
    return replace(how, family="mixed", instruments=tuple(instruments))
