"""SoundFont 2 files: which sample plays a key, and that sample held for as long as it is wanted.

symusic 0.5.9 plays programs of the built-in soundfont out of tune (its piano by 3 to 14 semitones)
and knows neither velocity nor decay. `tests/test_data_render.py` holds every instrument to its key.

Source: SoundFont Technical Specification 2.04, sections 5 to 8; `.sf3` keeps samples as Ogg Vorbis.
"""

import io
import struct
from functools import cached_property, lru_cache
from itertools import pairwise
from pathlib import Path

import numpy as np
import soundfile
from scipy.signal import butter, sosfilt

from lmd.errors import LmdError

_RECORDS = {
    b"phdr": "<20sHHHIII",
    b"pbag": "<HH",
    b"pgen": "<Hh",
    b"inst": "<20sH",
    b"ibag": "<HH",
    b"igen": "<Hh",
    b"shdr": "<20sIIIIIBbHH",
}
# Generator numbers (specification, section 8.1.2).
_INSTRUMENT, _KEYS, _VELOCITIES, _SAMPLE, _MODE, _ROOT = 41, 43, 44, 53, 54, 58
_COARSE, _FINE, _SCALE, _ATTENUATION = 51, 52, 56, 48
_ADDED = (_COARSE, _FINE, _ATTENUATION)  # a preset's values are added to its instrument's
_OFFSETS = ((0, 4), (1, 12), (2, 45), (3, 50))  # start, end, loop start, loop end: fine, coarse
_VORBIS = 0x10
VELOCITY = 100  # softer and louder notes are made from this one


class Soundfont:
    """An `.sf2` or `.sf3` file in memory.

    Raises:
        LmdError: no such file, or not a soundfont.
    """

    def __init__(self, path: Path) -> None:
        if not path.is_file() or path.suffix.lower() not in (".sf2", ".sf3"):
            todo = "Give its path, or leave the option out for the built-in one."
            raise LmdError(f"soundfont {str(path)!r}", "an existing .sf2 or .sf3 file", todo)
        data = path.read_bytes()
        if data[:4] != b"RIFF" or data[8:12] != b"sfbk":
            raise LmdError(f"{path.name} without its header", "RIFF … sfbk", "Give another file.")
        self.path, chunks = path, _chunks(data)
        missing = sorted({b"smpl", *_RECORDS} - set(chunks))
        if missing:
            raise LmdError(f"{path.name} without {missing}", "a whole soundfont", "Is it torn?")
        self._wave_bytes = chunks[b"smpl"]
        self._lists = {}
        for name, form in _RECORDS.items():
            n_bytes = len(chunks[name]) // struct.calcsize(form) * struct.calcsize(form)
            self._lists[name] = list(struct.iter_unpack(form, chunks[name][:n_bytes]))
        self._samples: dict[int, np.ndarray] = {}

    @cached_property
    def programs(self) -> dict[int, tuple[int, int]]:
        """The programs of bank 0 that have zones: where those begin and end."""
        presets = reversed(list(pairwise(self._lists[b"phdr"])))
        return {p[1]: (p[3], after[3]) for p, after in presets if p[2] == 0 and p[3] < after[3]}

    def hold(self, program: int, key: int, n_samples: int, sample_rate: int) -> np.ndarray:
        """A key held, at constant strength, mono float32 `[sample]` (silence if nothing sounds).

        Raises:
            LmdError: the soundfont has no such program in bank 0.
        """
        wave, zones = np.zeros(n_samples), self._zones(program, key)
        for zone in zones:
            gain = 10.0 ** (-0.4 * zone.get(_ATTENUATION, 0) / 200)
            wave += gain * self._play(zone, key, n_samples, sample_rate)
        return (wave / max(1, len(zones))).astype(np.float32)

    def _zones(self, program: int, key: int) -> list[dict[int, int]]:
        """What sounds when a key is pressed: each zone's values, by their generators' numbers."""
        if program not in self.programs:
            fault = f"no program {program} in {self.path.name}"
            raise LmdError(fault, "a General MIDI set", "Give another soundfont.")
        found = []
        for above in self._bags(b"pbag", b"pgen", *self.programs[program], _INSTRUMENT, key):
            instruments, number = self._lists[b"inst"], above[_INSTRUMENT]
            bags = instruments[number][1], instruments[number + 1][1]
            for zone in self._bags(b"ibag", b"igen", *bags, _SAMPLE, key):
                found.append({**zone, **{g: zone.get(g, 0) + above.get(g, 0) for g in _ADDED}})
        return found

    def _bags(
        self, bags: bytes, generators: bytes, first: int, last: int, target: int, key: int
    ) -> list[dict[int, int]]:
        """The zones of a preset or an instrument that hold a key.

        A first one without a target is the default of the others.
        """
        edges = pairwise(start for start, _ in self._lists[bags][first : last + 1])
        rows = [dict(self._lists[generators][a:b]) for a, b in edges]
        default = rows[0] if rows and target not in rows[0] else {}
        zones = [{**default, **row} for row in rows if target in row]
        return [
            zone
            for zone in zones
            if _holds(zone, _KEYS, key) and _holds(zone, _VELOCITIES, VELOCITY)
        ]

    def _play(self, zone: dict[int, int], key: int, n_samples: int, sample_rate: int) -> np.ndarray:
        """One zone: its loop unrolled, what would alias taken away, then read at its own pace."""
        header, data = self._lists[b"shdr"][zone[_SAMPLE]], self._sample(zone[_SAMPLE])
        _, begin, _, loop_begin, loop_end, rate, pitch, correction, _, kind = header
        root = zone.get(_ROOT, -1)
        root = root if root >= 0 else pitch if pitch < 128 else 60
        cents = (key - root) * zone.get(_SCALE, 100)
        cents += 100 * zone.get(_COARSE, 0) + zone.get(_FINE, 0) + correction
        step = rate * 2.0 ** (cents / 1200) / sample_rate  # source samples per sample of sound
        n_source = int(n_samples * step) + 4
        shift = [zone.get(fine, 0) + 32768 * zone.get(more, 0) for fine, more in _OFFSETS]
        base = 0 if kind & _VORBIS else begin  # in .sf3 the loop counts from the sample's start
        start, end = max(0, shift[0]), max(1, len(data) + shift[1])
        first, last = loop_begin - base + shift[2], loop_end - base + shift[3]
        part = data[start:end]
        if zone.get(_MODE, 0) in (1, 3) and 0 <= first < last <= len(data):
            n_turns = max(0, n_source - (last - start)) // (last - first) + 1
            part = np.concatenate([data[start:last], np.tile(data[first:last], n_turns)])
        part = part[:n_source]
        silence = np.zeros(n_source + 4 - len(part))
        source = np.concatenate([[0], part, silence]).astype(np.float32)
        if step > 1:
            source = sosfilt(_anti_alias(round(0.92 / step, 3)), source)
        at = np.arange(n_samples) * step + 1
        floor = at.astype(np.int64)
        x = (at - floor).astype(np.float32)
        a, b, c, d = (source[floor + k].astype(np.float32) for k in (-1, 0, 1, 2))
        # Catmull-Rom: the cubic through b and c whose slopes there are those of the neighbours.
        return b + 0.5 * x * (c - a + x * (2 * a - 5 * b + 4 * c - d + x * (3 * (b - c) + d - a)))

    def _sample(self, number: int) -> np.ndarray:
        """A sample's values, float32, -1 … 1; its neighbours in the file are not part of it."""
        if number not in self._samples:
            name, start, end, *_, kind = self._lists[b"shdr"][number]
            try:
                if kind & _VORBIS:
                    packed = io.BytesIO(self._wave_bytes[start:end])
                    wave, _ = soundfile.read(packed, dtype="float32")
                else:
                    raw = np.frombuffer(self._wave_bytes[2 * start : 2 * end], "<i2")
                    wave = raw.astype(np.float32) / 32768
            except soundfile.LibsndfileError as error:
                label = name.rstrip(bytes(1)).decode("latin-1")
                found = f"sample {label!r} of {self.path.name}: {error.error_string}"
                raise LmdError(found, "Ogg Vorbis", "Give its .sf2 form.") from error
            self._samples[number] = wave
        return self._samples[number]


def _holds(zone: dict[int, int], generator: int, value: int) -> bool:
    """Whether a zone's range of keys or velocities (low byte, high byte) holds one."""
    span = zone.get(generator)
    return span is None or span & 0xFF <= value <= (span >> 8) & 0xFF


def _chunks(data: bytes) -> dict[bytes, bytes]:
    """Every chunk of a RIFF file by name, those inside lists too."""
    found: dict[bytes, bytes] = {}
    at = 12
    while at + 8 <= len(data):
        name, size = data[at : at + 4], struct.unpack("<I", data[at + 4 : at + 8])[0]
        if name == b"LIST":
            at += 12  # go into it
            continue
        found[name] = data[at + 8 : at + 8 + size]
        at += 8 + size
        at += size % 2 and not data[at : at + 4].isalnum()  # FluidR3Mono has no pad bytes
    return found


@lru_cache(maxsize=512)
def _anti_alias(corner: float) -> np.ndarray:
    """A low-pass at that share of the source's Nyquist rate."""
    return butter(6, min(corner, 0.99), output="sos").astype(np.float32)
