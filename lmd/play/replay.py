"""`python -m lmd replay`: a take, once more, to the bit; as sound or as a picture.

python -m lmd replay take.jsonl -o again.wav --figure take.png
"""

import argparse
from contextlib import ExitStack
from pathlib import Path

import torch
from tqdm import tqdm

from lmd.errors import LmdError
from lmd.play.sinks import AudioFile
from lmd.play.takes import SampleHash, Take, play_again, read_take
from lmd.pretrained import open_instrument, precision_of
from lmd.shapes import Wave

FIGURES = (".png", ".pdf", ".svg")


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the arguments."""
    parser.add_argument("take", type=Path, help="a file written while playing")
    parser.add_argument("-o", "--output", type=Path, help="wav or flac file to write")
    parser.add_argument("--figure", type=Path, help="png, pdf or svg: spectrogram and controls")
    parser.add_argument("--source", help="weights, if not where the take says; in its precision")
    parser.add_argument("--device", default="auto", help="cpu, cuda, mps or auto")


def main(args: argparse.Namespace) -> int:
    """Replay; status 1 if the samples are not those that were played."""
    if args.figure is not None:
        _check_figure(args.figure)
    take = read_take(args.take)
    torch.set_num_threads(take.header.n_threads)  # opening computes, too
    instrument = open_instrument(
        args.source or take.header.source,
        device=args.device,
        dtype=precision_of(take.header.source),
    )
    digest, waves = SampleHash(), []
    with ExitStack() as stack:
        file = None
        if args.output is not None:
            file = AudioFile(args.output, take.header.sample_rate, take.header.channels)
            stack.callback(file.close)
        for piece in tqdm(play_again(take, instrument.streamer), total=take.n_blocks, unit="block"):
            digest.update(piece.wave)
            if file is not None:
                file.write(piece.wave[0].numpy())
            if args.figure is not None:
                waves.append(piece.wave)
    if args.figure is not None:
        draw(take, torch.cat(waves, dim=-1), args.figure)
    return _verdict(take, digest.hexdigest())


def _check_figure(path: Path) -> None:
    """Refuse before anything is played what could not be drawn afterwards."""
    if path.suffix.lower() not in FIGURES or not path.parent.is_dir():
        raise LmdError(
            f"--figure {path}", f"a {' or '.join(FIGURES)} file in a folder that exists", "Mend it."
        )


def draw(take: Take, wave: Wave, path: Path) -> None:
    """Save a picture of a take."""
    from lmd.play.take_figure import plot_take  # matplotlib only where a picture is asked for

    plot_take(take, wave).savefig(path, dpi=110)


def _verdict(take: Take, sha256: str) -> int:
    if take.sha256 is None:
        print(f"{take.n_blocks} blocks played again; the take broke off, nothing to compare with")
        return 0
    if sha256 == take.sha256:
        print(f"{take.n_blocks} blocks, the same samples (SHA-256 {sha256[:16]}…)")
        return 0
    print(
        f"other samples: SHA-256 {sha256[:16]}…, played was {take.sha256[:16]}… (torch "
        f"{torch.__version__} here, {take.header.torch_version} then)"
    )
    return 1
