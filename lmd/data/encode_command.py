"""`lmd data encode`: a corpus through a codec into latent shards."""

import logging
from dataclasses import dataclass
from pathlib import Path

import lightning as L
from lightning.fabric.utilities.exceptions import MisconfigurationException

from lmd.checkpoint import load_codec
from lmd.corpus.manifest import Corpus
from lmd.corpus.scores import DEFAULT_CACHE
from lmd.corpus.tables import read_rows
from lmd.data.codec_fit import check_fit, codec_error_db, expectation
from lmd.data.encode import QUIET, EncodeSettings, encode_corpus, encoder_sha256
from lmd.data.shards import INDEX, Entry
from lmd.errors import LmdError


@dataclass(frozen=True)
class Options:
    """Flags of the command.

    Attributes:
        data: a built corpus.
        codec: what encodes.
        out: folder to fill.
        stems: encode every voice too.
        rows_per_shard: sounds of a corpus in one file.
        cache: where parsed scores are kept.
        accelerator: as in training: auto, cpu, gpu …
        devices: processes on this machine.
        num_nodes: machines.
        strategy: auto, ddp …
    """

    data: Path = Path("data/corpus")
    codec: Path = Path("data/pretrained/codec.safetensors")
    out: Path = Path("data/latents")
    stems: bool = False
    rows_per_shard: int = 32
    cache: Path = DEFAULT_CACHE
    accelerator: str = "auto"
    devices: str = "auto"
    num_nodes: int = 1
    strategy: str = "auto"


def _trainer(options: Options) -> L.Trainer:
    """Lightning's trainer on the machines that were asked for.

    Raises:
        LmdError: there are none such.
    """
    devices = int(options.devices) if options.devices.isdigit() else options.devices
    asked = {
        "accelerator": options.accelerator,
        "devices": devices,
        "num_nodes": options.num_nodes,
        "strategy": options.strategy,
    }
    try:
        return L.Trainer(**asked, **QUIET)
    except (MisconfigurationException, RuntimeError, TypeError, ValueError) as error:
        raise LmdError(
            " ".join(f"--{name.replace('_', '-')} {value}" for name, value in asked.items()),
            "what this machine has",
            f"Lightning says: {' '.join(str(error).split())}",
        ) from error


def main(options: Options) -> int:
    """Encode a corpus and say what to expect of it, and what came out."""
    how = EncodeSettings(options.stems, options.rows_per_shard, options.cache)
    corpus = Corpus(options.data)
    codec = load_codec(options.codec)
    logging.getLogger("lightning.pytorch.utilities.rank_zero").setLevel(logging.WARNING)
    trainer = _trainer(options)
    check_fit(codec, corpus)
    if trainer.is_global_zero:
        print(expectation(codec_error_db(codec, corpus), options.data), flush=True)
    encode_corpus(corpus, codec, options.out, how, trainer, encoder_sha256(options.codec))
    if trainer.is_global_zero:
        entries = read_rows(options.out / INDEX, Entry, "lmd data encode")
        hours = sum(entry.duration_s for entry in entries) / 3600
        n_frames = sum(entry.n_frames for entry in entries)
        print(f"{len(entries)} sounds, {hours:.2f} h, {n_frames} frames in {options.out}")
    return 0
