"""Soundfonts by path: `.sf2` with plain samples, `.sf3` with samples packed as Ogg Vorbis."""

import io
import struct
from pathlib import Path

import numpy as np
import pytest
import soundfile

from lmd.corpus.build import BuildSettings, build_corpus
from lmd.corpus.manifest import Corpus
from lmd.corpus.soundfont import Soundfont
from lmd.corpus.tones import ToneBank
from lmd.errors import LmdError

RATE, PERIOD = 22_050, 50  # samples per second and per wave: 441 Hz
LENGTH, LOOP = 6000, (2000, 4000)  # the loop is forty whole waves
VORBIS = 0x10  # a sample's flag


def sine() -> np.ndarray:
    return 0.5 * np.sin(2 * np.pi * np.arange(LENGTH) / PERIOD)


def chunk(name: bytes, data: bytes) -> bytes:
    return name + struct.pack("<I", len(data)) + data + b"\0" * (len(data) % 2)


def records(form: str, *rows: tuple) -> bytes:
    return b"".join(struct.pack(form, *row) for row in rows)


def packed(wave: np.ndarray) -> bytes:
    """A wave as an Ogg Vorbis file."""
    file = io.BytesIO()
    soundfile.write(file, wave, RATE, format="OGG", subtype="VORBIS")
    return file.getvalue()


def write_soundfont(path: Path, n_programs: int = 1, torn: bool = False) -> Path:
    """Every program plays a sine of 441 Hz, the second of two samples, for ever."""
    noise = np.random.default_rng(0).uniform(-0.5, 0.5, LENGTH)
    if path.suffix == ".sf3":
        parts = [packed(noise), b"no sound" if torn else packed(sine())]
        places = [(0, len(parts[0])), (len(parts[0]), sum(map(len, parts)))]
        first, kind = 0, 1 | VORBIS  # the loop counts from the sample's own start
    else:
        gap = bytes(2 * 46)  # as the specification asks for
        parts = [np.round(32767 * wave).astype("<i2").tobytes() + gap for wave in (noise, sine())]
        places = [(0, LENGTH), (LENGTH + 46, 2 * LENGTH + 46)]
        first, kind = LENGTH + 46, 1
    loop = (first + LOOP[0], first + LOOP[1])
    samples = [(b"noise", *places[0], *loop, RATE, 69, 0, 0, kind)]
    samples += [(b"sine", *places[1], *loop, RATE, 69, -4, 0, kind), (b"EOS", *[0] * 9)]
    programs = range(n_programs)
    lists = {
        b"phdr": ("<20sHHHIII", *((b"sine", p, 0, p, 0, 0, 0) for p in programs),
                  (b"EOP", 0, 0, n_programs, 0, 0, 0)),
        b"pbag": ("<HH", *((p, 0) for p in (*programs, n_programs))),
        b"pgen": ("<Hh", *((41, 0) for _ in programs), (0, 0)),  # plays instrument 0
        b"inst": ("<20sH", (b"sine", 0), (b"EOI", 1)),
        b"ibag": ("<HH", (0, 0), (2, 0)),
        b"igen": ("<Hh", (54, 1), (53, 1), (0, 0)),  # loops sample 1
        b"shdr": ("<20sIIIIIBbHH", *samples),
    }  # fmt: skip
    about = b"".join(chunk(name, records(*rows)) for name, rows in lists.items())
    wave = chunk(b"LIST", b"sdta" + chunk(b"smpl", b"".join(parts)))
    path.write_bytes(chunk(b"RIFF", b"sfbk" + wave + chunk(b"LIST", b"pdta" + about)))
    return path


@pytest.mark.parametrize("suffix", [".sf2", ".sf3"])
@pytest.mark.parametrize(("key", "hz"), [(69, 440), (81, 880), (57, 220)])
def test_a_key_sounds_at_its_pitch_and_is_held(
    tmp_path: Path, suffix: str, key: int, hz: float
) -> None:
    wave = Soundfont(write_soundfont(tmp_path / f"a{suffix}")).hold(0, key, 2 * RATE, RATE)
    spectrum = np.abs(np.fft.rfft(wave * np.hanning(len(wave))))
    assert np.argmax(spectrum) / 2 == pytest.approx(hz, abs=0.5)  # a bin is half a hertz wide
    levels = np.sqrt(np.mean(np.square(wave[: 40 * 1000].reshape(40, -1)), axis=1))
    assert levels[1:] == pytest.approx(0.5 / np.sqrt(2), rel=0.05)


def test_packed_samples_sound_like_plain_ones(tmp_path: Path) -> None:
    plain, unpacked = (
        Soundfont(write_soundfont(tmp_path / f"a{suffix}")).hold(0, 69, RATE, RATE)
        for suffix in (".sf2", ".sf3")
    )
    # Vorbis loses something, most of it where the sample begins at once; measured: 0.015
    assert np.sqrt(np.mean((plain - unpacked) ** 2)) < 0.03 * np.sqrt(np.mean(plain**2))


def test_samples_that_cannot_be_unpacked_are_named(tmp_path: Path) -> None:
    bank = ToneBank(write_soundfont(tmp_path / "a.sf3", torn=True))
    with pytest.raises(LmdError, match=r"sample 'sine' of a\.sf3.*Ogg Vorbis"):
        bank.tone(0, 69, 100)


@pytest.mark.parametrize("name", ["padded", "unpadded"])
def test_an_odd_chunk_is_read_with_its_pad_byte_and_without(tmp_path: Path, name: str) -> None:
    """Debian's FluidR3Mono is made without; these two have all chunks and no program."""
    path = Path(__file__).parent / f"fixtures/soundfonts/{name}.sf3"
    with pytest.raises(LmdError, match=rf"no program 0 in {name}\.sf3"):
        Soundfont(path).hold(0, 60, 9, RATE)
    with pytest.raises(LmdError, match=rf"no programs \[0, .*\] in {name}\.sf3"):
        build_corpus(tmp_path / "out", 1, BuildSettings(soundfont=str(path)), cache=tmp_path)
    assert not (tmp_path / "out").exists()


def test_a_program_that_is_missing_is_named(tmp_path: Path) -> None:
    with pytest.raises(LmdError, match=r"program 7 in a\.sf2"):
        Soundfont(write_soundfont(tmp_path / "a.sf2")).hold(7, 60, 9, RATE)


@pytest.mark.parametrize("suffix", [".sf2", ".sf3"])
def test_a_corpus_is_played_with_a_soundfont_given_by_its_path(tmp_path: Path, suffix: str) -> None:
    path = write_soundfont(tmp_path / f"a{suffix}", n_programs=128)
    how = BuildSettings(collections=("ciconia",), max_seconds=4.0, soundfont=str(path))
    build_corpus(tmp_path / "out", 1 / 3600, how, cache=tmp_path / "cache")
    corpus = Corpus(tmp_path / "out")
    assert np.abs(corpus.wave(0)).max() > 0.05
    assert corpus.stems(0, tmp_path / "cache").any()
    write_soundfont(path, n_programs=129)  # other contents under the same name
    with pytest.raises(LmdError, match="other soundfont_sha256"):
        build_corpus(tmp_path / "out", 1 / 3600, how, cache=tmp_path / "cache")
