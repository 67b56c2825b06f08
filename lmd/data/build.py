"""`lmd data build`: scores rendered into a corpus, or a folder of audio taken in."""

from dataclasses import dataclass
from pathlib import Path

import torch

from lmd.corpus.build import BuildSettings, build_corpus
from lmd.corpus.scores import DEFAULT_CACHE
from lmd.data.check import named_folder
from lmd.data.own_audio import build_audio, caption_lines
from lmd.data.splits import copies


@dataclass(frozen=True)
class Options(BuildSettings):
    """Flags of the command.

    Attributes:
        out: folder to fill.
        hours: how much to render.
        workers: processes.
        seed: of all that is drawn.
        sample_rate: Hz.
        channels: mono or stereo.
        max_seconds: longer pieces become excerpts.
        soundfont: an .sf2 or .sf3 file instead of the built-in one.
        collections: folders of music21's corpus.
        stems: write stems too, instead of playing them again.
        cache: where parsed scores are kept.
        audio: take in this folder of audio instead of rendering scores.
        keep_going: go on when more than 5 % are rejected.
    """

    out: Path = Path("data/corpus")
    hours: float = 10.0
    workers: int = 1
    cache: Path = DEFAULT_CACHE
    audio: str | None = None
    keep_going: bool = False


def main(options: Options) -> int:
    """Build a corpus and say what is in it."""
    torch.set_num_threads(1)
    out, workers = options.out, options.workers
    if options.audio is None:
        kind = "renditions of {} pieces"
        rows = build_corpus(out, options.hours, options, workers, options.cache)
    else:
        kind = "windows of {} files"
        folder = named_folder(options.audio)
        rows, report = build_audio(folder, out, options, options.keep_going, workers)
        for line in (*report.lines(), *copies(rows), *caption_lines(rows)):
            print(line)
    hours = sum(row.duration_s for row in rows) / 3600
    n_pieces = len({row.piece_id for row in rows})
    print(f"{len(rows)} {kind.format(n_pieces)}, {hours:.2f} h, in {out}")
    return 0
