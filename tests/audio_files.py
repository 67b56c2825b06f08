"""Audio files to take in, good ones and bad ones."""

from pathlib import Path

import numpy as np
import soundfile

RATE = 22_050
FORMATS = {".aif": "AIFF", ".aifc": "AIFF", ".oga": "OGG", ".snd": "AU"}  # what names do not tell


def tone(seconds: float, rate: int = RATE, channels: int = 1, hz: float = 440) -> np.ndarray:
    wave = 0.3 * np.sin(2 * np.pi * hz * np.arange(round(seconds * rate)) / rate)
    return np.repeat(wave[:, None], channels, axis=1).astype(np.float32)


def write(path: Path, wave: np.ndarray, rate: int = RATE, **kwargs: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    soundfile.write(path, wave, rate, **kwargs)
    return path


def nan_wave() -> np.ndarray:
    wave = tone(2)
    wave[1000] = np.nan
    return wave


def mostly_silent() -> np.ndarray:
    """0.3 s in the middle of six."""
    return np.concatenate([0 * tone(3), tone(0.3), 0 * tone(2.7)])


def make_bad(folder: Path, kind: str) -> Path:
    """A file of a certain fault."""
    path = folder / f"{kind}.wav"
    folder.mkdir(parents=True, exist_ok=True)
    if kind == "zero":
        path.write_bytes(b"")
    elif kind == "text":
        path.write_text("these are words, not sound\n" * 50)
    elif kind == "directory":
        path.mkdir()
    elif kind == "broken-link":
        path.symlink_to(folder / "nowhere.wav")
    elif kind == "link-to-itself":
        path.symlink_to(path)
    elif kind == "packed-stems":
        path = folder / "song.stem.mp4"
        path.write_bytes(b"\0" * 100)
    else:
        waves = {
            "nan": (nan_wave(), RATE, "FLOAT"),
            "short": (tone(0.1), RATE, "PCM_16"),
            "8khz": (tone(2, 8000), 8000, "PCM_16"),
            "7-channel": (tone(2, channels=7), RATE, "PCM_16"),
            "silent": (0 * tone(2), RATE, "PCM_16"),
            "hardly-a-sound": (mostly_silent(), RATE, "PCM_16"),
        }
        wave, rate, subtype = waves[kind]
        write(path, wave, rate, subtype=subtype)
    return path
