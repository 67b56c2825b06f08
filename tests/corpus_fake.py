"""A small corpus without music."""

from pathlib import Path

import numpy as np

from lmd.corpus.manifest import Corpus, Row, write_manifest, write_wav

RATE, HOP = 22_050, 1024


def make_corpus(folder: Path, n_rows: int = 6, n_frames: int = 30, channels: int = 1) -> Corpus:
    """Noise instead of music: rows with all splits and one stem layout."""
    rows = []
    for number in range(n_rows):
        n_samples = HOP * (n_frames + 5 * number) - 100  # not a whole number of frames
        wave = np.random.default_rng(number).uniform(-0.9, 0.9, (channels, n_samples))
        write_wav(folder / f"audio/{number}.wav", wave, RATE)
        stem_paths = [f"stems/{number}_{voice}.wav" for voice in range(2)]
        for voice, path in enumerate(stem_paths):
            write_wav(folder / path, (0.5 - voice) * wave, RATE)
        rows.append(
            Row(
                name=f"r{number}", piece_id=f"x/{number}", composer="bach", title="", rendition=0,
                split=("train", "validation", "test")[number % 3], seed=0, family="mixed",
                instruments="flute|tuba", tempo_bpm=60.0, key="C", mode="major", metre="4/4",
                transposition=0, articulation="legato", dynamics="loud", density_hz=1.0,
                brightness_hz=900.0, duration_s=round(n_samples / RATE, 4), n_samples=n_samples,
                sample_rate=RATE, channels=channels, caption=f"caption, number {number}",
                path=f"audio/{number}.wav", stem_paths="|".join(stem_paths), sha256=str(number),
            )
        )  # fmt: skip
    write_manifest(folder, rows)
    return Corpus(folder)
