"""`lmd data build`: scores rendered into a corpus, or a folder of audio taken in."""

from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path

import torch

from lmd.corpus.build import BuildSettings, build_corpus
from lmd.corpus.manifest import Row
from lmd.corpus.scores import DEFAULT_CACHE
from lmd.data.check import named_folder
from lmd.outputs import check_apart, check_folder

STEMS_SHARE = 4  # a rendition's stems take about so many times the room of its mix


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

    def __post_init__(self) -> None:
        """Nothing: the settings that are made of them are checked, after parsing."""


def main(options: Options) -> int:
    """Build a corpus and say what is in it."""
    torch.set_num_threads(1)
    if options.audio is not None:
        rows, kind = _own_music(options, named_folder(options.audio)), "windows of {} files"
    else:
        rows, kind = _renditions(options), "renditions of {} pieces"
    hours = sum(row.duration_s for row in rows) / 3600
    n_pieces = len({row.piece_id for row in rows})
    print(f"{len(rows)} {kind.format(n_pieces)}, {hours:.2f} h, in {options.out}")
    return 0


def _renditions(options: Options) -> Sequence[Row]:
    """A corpus of scores."""
    settings = BuildSettings(**{f.name: getattr(options, f.name) for f in fields(BuildSettings)})
    check_apart(out=options.out, cache=options.cache)
    seconds = 3600 * min(max(0.0, options.hours), 10_000)
    n_bytes = int(2 * seconds * options.sample_rate) * options.channels
    check_folder(options.out, n_bytes * (1 + STEMS_SHARE * options.stems))
    check_folder(options.cache)
    return build_corpus(options.out, options.hours, settings, options.workers, options.cache)


def _own_music(options: Options, folder: Path) -> Sequence[Row]:
    """A corpus of a folder of audio."""
    from lmd.data.own_audio import AudioSettings, build_audio, caption_lines
    from lmd.data.splits import copies

    settings = AudioSettings(
        options.sample_rate, options.channels, options.max_seconds, options.stems
    )
    check_folder(options.out)
    rows, report = build_audio(folder, options.out, settings, options.keep_going, options.workers)
    for line in (*report.lines(), *(f"the same music  {line}" for line in copies(rows))):
        print(line)
    for line in caption_lines(rows):
        print(line)
    return rows
