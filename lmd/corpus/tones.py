"""Single tones from a soundfont, and the shape that a played note gives them."""

from functools import lru_cache
from importlib.util import find_spec
from pathlib import Path

import numpy as np
from scipy.signal import butter, lfilter, sosfilt

from lmd.corpus.instruments import Instrument
from lmd.corpus.soundfont import Soundfont

_MIDDLE_C = 60
_LN_60_DB = float(np.log(1000.0))
_DARK_HZ = 900.0  # corner of the darkened copy of a tone


def default_soundfont() -> Path:
    """The General MIDI soundfont that ships inside pretty_midi."""
    spec = find_spec("pretty_midi")  # not imported: that takes longer
    return Path(spec.origin).parent / "TimGM6mb.sf2"


class ToneBank:
    """Held tones of a soundfont, mono, at constant strength, kept for the next time.

    Args:
        soundfont: an `.sf2` or `.sf3` file; None = the one inside pretty_midi.
        sample_rate: Hz.
        max_tones: kept in memory; the least recently used go first.
    """

    def __init__(
        self,
        soundfont: Path | str | None = None,
        sample_rate: int = 22_050,
        max_tones: int = 1024,
    ) -> None:
        self.soundfont = Path(soundfont) if soundfont else default_soundfont()
        self.sample_rate = sample_rate
        self._font = Soundfont(self.soundfont)
        self._kept = lru_cache(max_tones)(self._tone)

    def tone(
        self, program: int, pitch: int, n_samples: int, darkness: int = 0, cutoff_hz: float = 0
    ) -> np.ndarray:
        """A held tone of a General MIDI program, at least `n_samples` long, float32 `[sample]`.

        Darkness goes from 0 (as sampled) to 4 (mostly the low-passed copy); `cutoff_hz` is the
        corner of a two-pole low-pass, 0 = none.
        """
        seconds = 1
        while seconds * self.sample_rate < n_samples:
            seconds *= 2
        return self._kept(program, pitch, seconds, darkness, cutoff_hz)

    def _tone(
        self, program: int, pitch: int, seconds: int, darkness: int, cutoff_hz: float
    ) -> np.ndarray:
        wave = self._font.hold(program, pitch, seconds * self.sample_rate, self.sample_rate)
        if 0 < cutoff_hz < 0.45 * self.sample_rate:
            low_pass = butter(2, cutoff_hz, fs=self.sample_rate, output="sos")
            wave = sosfilt(low_pass, wave.astype(np.float64)).astype(np.float32)
        return darkened(wave, darkness / 5, self.sample_rate) if darkness else wave


def darkened(wave: np.ndarray, amount: float, sample_rate: int) -> np.ndarray:
    """`(1 − amount) · wave + amount · lowpass(wave)`: what a softer touch does to a sound."""
    pole = float(np.exp(-2 * np.pi * _DARK_HZ / sample_rate))
    low = lfilter([1 - pole], [1, -pole], wave.astype(np.float64))
    return ((1 - amount) * wave + amount * low).astype(np.float32)


@lru_cache(maxsize=256)
def _decay(n_samples: int, fall_samples: float) -> np.ndarray:
    """`exp` from 1 that falls by 60 dB in `fall_samples`."""
    return np.exp(-_LN_60_DB / fall_samples * np.arange(n_samples)).astype(np.float32)


def played_note(
    bank: ToneBank, instrument: Instrument, pitch: int, gate_s: float, darkness: int
) -> np.ndarray:
    """One note: attack, hold (fading if the instrument does), release; float32 `[sample]`.

    The key is held for `gate_s` seconds; the pitch is moved by octaves into the instrument's range.
    """
    pitch = fold(pitch, instrument.low, instrument.high)
    rate = bank.sample_rate
    n_gate = max(1, round(gate_s * rate))
    n_release = round(instrument.release_ms * rate / 1000)
    n_attack = max(1, min(round(instrument.attack_ms * rate / 1000), n_gate))
    n_samples = n_gate + n_release
    wave = bank.tone(instrument.program, pitch, n_samples, darkness, instrument.cutoff_hz)
    wave = wave[:n_samples].copy()
    if instrument.fade_s:
        fall = instrument.fade_s * 2.0 ** ((_MIDDLE_C - pitch) / 24) * rate
        wave *= _decay(1 << (len(wave) - 1).bit_length(), fall)[: len(wave)]
    wave[:n_attack] *= np.linspace(0, 1, n_attack, endpoint=False, dtype=np.float32)
    ramp = np.linspace(1, 0, n_release, dtype=np.float32)
    wave[n_gate:] *= _decay(n_release, float(n_release)) * ramp
    return wave


def fold(pitch: int, low: int, high: int) -> int:
    """The pitch, moved by octaves until it lies in [low, high]."""
    while pitch < low:
        pitch += 12
    while pitch > high:
        pitch -= 12
    return pitch


@lru_cache(maxsize=2)
def shared_bank(soundfont: str, sample_rate: int) -> ToneBank:
    """One bank of tones per process."""
    return ToneBank(soundfont or None, sample_rate)
