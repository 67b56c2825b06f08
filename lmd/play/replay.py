"""`python -m lmd replay`: a take, once more, to the bit; as sound or as a picture.

python -m lmd replay take.jsonl -o again.wav --figure take.png
"""

from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
import tyro
from tqdm import tqdm

from lmd.errors import LmdError
from lmd.machine import n_cores
from lmd.outputs import check_outputs
from lmd.play.audio_file import AudioFile, check_audio_path
from lmd.play.takes import SampleHash, Take, as_many_threads, play_again, read_take
from lmd.pretrained import open_instrument, precision_of

FIGURES = (".png", ".pdf", ".svg")


@dataclass(frozen=True)
class Options:
    """What to replay, and what to make of it."""

    take: tyro.conf.Positional[Path]  # A file written while playing.
    output: Annotated[Path | None, tyro.conf.arg(aliases=["-o"])] = None  # Wav or flac to write.
    figure: Path | None = None  # Png, pdf or svg: spectrogram and controls.
    source: str | None = None  # Weights, if not where the take says; in its precision.
    device: str = "auto"  # cpu, cuda, mps or auto.


def main(options: Options) -> int:
    """Replay; status 1 if the samples are not those that were played."""
    if options.figure is not None and options.figure.suffix.lower() not in FIGURES:
        raise LmdError(f"--figure {options.figure}", f"a {' or '.join(FIGURES)} file", "Rename it.")
    if options.output is not None:
        check_audio_path(options.output)
    check_outputs(take=options.take, output=options.output, figure=options.figure)
    take = read_take(options.take)
    n_threads = take.header.n_threads
    if n_threads > n_cores():
        print(f"{n_threads} threads in the take, {n_cores()} cores here: the last bit may differ")
    with as_many_threads(n_threads):  # opening computes, too
        sha256 = _replay(take, options)
    if take.sha256 is None:
        print(f"{take.n_blocks} blocks played again; the take broke off, nothing to compare with")
    elif sha256 == take.sha256:
        print(f"{take.n_blocks} blocks, the same samples (SHA-256 {sha256[:16]}…)")
    else:
        versions = f"torch {torch.__version__} here, {take.header.torch_version} then"
        print(f"other samples: SHA-256 {sha256[:16]}…, played was {take.sha256[:16]}… ({versions})")
    return int(take.sha256 not in (None, sha256))


def _replay(take: Take, options: Options) -> str:
    """Play all of it, write what is asked for; the SHA-256 of the samples."""
    header, digest, waves, file = take.header, SampleHash(), [], None
    source, dtype = options.source or header.source, precision_of(header.source)
    instrument = open_instrument(source, device=options.device, dtype=dtype)
    blocks = play_again(take, instrument.streamer)
    with ExitStack() as stack:
        if options.output is not None:
            file = AudioFile(options.output, header.sample_rate, header.channels)
            stack.callback(file.close)
        for samples in tqdm(blocks, total=take.n_blocks, unit="block"):
            digest.update(samples)
            if file is not None:
                file.write(samples)
            if options.figure is not None:
                waves.append(samples)
    if waves:
        from lmd.play.take_figure import plot_take  # matplotlib where a picture is asked for

        wave = torch.from_numpy(np.concatenate(waves, axis=-1))[None]
        plot_take(take, wave).savefig(options.figure, dpi=110)
    return digest.hexdigest()
