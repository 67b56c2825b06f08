"""`lmd data encode`: a corpus through a codec into latent shards."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path

import lightning as L
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from torch import nn
from tqdm import tqdm

from lmd.checkpoint import encoder_digest, load_codec, load_tensors
from lmd.codec.base import Codec
from lmd.corpus.captions import further_captions, stem_caption
from lmd.corpus.manifest import Corpus, Row
from lmd.corpus.scores import DEFAULT_CACHE
from lmd.corpus.tables import hold_settings, read_rows, write_rows
from lmd.data.codec_fit import check_fit, codec_error_db, expectation
from lmd.data.shards import (
    INDEX,
    SETTINGS,
    SHARD_FORMAT,
    Entry,
    shard_entries,
    shard_fault,
    write_shard,
)
from lmd.errors import LmdError
from lmd.outputs import check_apart, check_folder
from lmd.shapes import Latents, Wave

MAX_CHUNK_FRAMES = 2048  # longer sounds are encoded piece by piece …
MARGIN_FRAMES = 64  # … with so much more on either side, which is thrown away
FURTHER_CAPTIONS = 7  # of every rendition, so that training hears it asked for in many ways


@dataclass(frozen=True)
class EncodeSettings:
    """What a folder of latents depends on, beside the codec.

    Attributes:
        stems: encode every voice too.
        rows_per_shard: sounds in one shard, with their stems.
        cache: where parsed scores are kept (stems are played again).
    """

    stems: bool = False
    rows_per_shard: int = 32
    cache: Path = DEFAULT_CACHE


@dataclass(frozen=True)
class Options(EncodeSettings):
    """Flags of the command.

    Attributes:
        data: a built corpus.
        codec: what encodes.
        out: folder to fill.
        accelerator: as in training: auto, cpu, gpu …
        devices: processes on this machine.
        num_nodes: machines.
        strategy: auto, ddp …
    """

    data: Path = Path("data/corpus")
    codec: Path = Path("data/pretrained/codec.safetensors")
    out: Path = Path("data/latents")
    accelerator: str = "auto"
    devices: str = "auto"
    num_nodes: int = 1
    strategy: str = "auto"


def main(options: Options) -> int:
    """Encode a corpus and say what to expect of it, and what came out."""
    corpus, codec = Corpus(options.data), load_codec(options.codec)
    check_fit(codec, corpus)
    fabric = _fabric(options)
    if fabric.is_global_zero:
        print(expectation(codec_error_db(codec, corpus), options.data), flush=True)
    encode_corpus(corpus, codec, options.out, options, fabric, encoder_sha256(options.codec))
    if fabric.is_global_zero:
        entries = read_rows(options.out / INDEX, Entry, "lmd data encode")
        hours = sum(entry.duration_s for entry in entries) / 3600
        n_frames = sum(entry.n_frames for entry in entries)
        print(f"{len(entries)} sounds, {hours:.2f} h, {n_frames} frames in {options.out}")
    return 0


def _fabric(options: Options) -> L.Fabric:
    """The processes that were asked for, started; `LmdError` where there are no such machines."""
    asked = {n: getattr(options, n) for n in ("accelerator", "devices", "num_nodes", "strategy")}
    try:
        fabric = L.Fabric(**asked)
    except (MisconfigurationException, RuntimeError, TypeError, ValueError) as error:
        found = " ".join(f"--{name.replace('_', '-')} {value}" for name, value in asked.items())
        todo = f"Lightning says: {' '.join(str(error).split())}"
        raise LmdError(found, "what this machine has", todo) from error
    fabric.launch()
    return fabric


def encode_wave(codec: Codec, wave: Wave) -> Latents:
    """Latents of a wave `[batch, channel, sample]` of any length, padded to whole frames."""
    hop = codec.samples_per_frame
    n_frames = -(-wave.shape[-1] // hop)
    wave = nn.functional.pad(wave, (0, n_frames * hop - wave.shape[-1]))
    parts = []
    for start in range(0, n_frames, MAX_CHUNK_FRAMES):
        end = min(start + MAX_CHUNK_FRAMES, n_frames)
        first, last = max(0, start - MARGIN_FRAMES), min(n_frames, end + MARGIN_FRAMES)
        latents = codec.encode(wave[..., first * hop : last * hop])
        parts.append(latents[..., start - first : end - first])
    return torch.cat(parts, dim=-1)


def encoder_sha256(path: str | Path) -> str:
    """Which latents a codec's file makes: the name under which latents know their encoder."""
    tensors, header = load_tensors(path, "codec")
    return encoder_digest(header.config, tensors)


def silence_frame(codec: Codec) -> list[float]:
    """The latents of silence, one value per channel (the middle of some seconds of it)."""
    weights = codec.parameters() if isinstance(codec, nn.Module) else iter(())
    like = next(weights, torch.zeros(()))
    with torch.inference_mode():
        quiet = like.new_zeros(1, codec.channels, 65 * codec.samples_per_frame)
        return codec.encode(quiet)[0, :, 32].to(torch.float16).tolist()


def _entry(row: Row, voice: int, shard: str, start: int, n_frames: int) -> Entry:
    """The index line of one encoded sound."""
    shared = {f.name: getattr(row, f.name) for f in fields(Entry) if hasattr(row, f.name)}
    if voice >= 0:
        shared["caption"] = stem_caption(row, voice)
        shared["instruments"] = row.instruments.split("|")[voice]
    return Entry(**shared, voice=voice, shard=shard, start_frame=start, n_frames=n_frames)


def encode_corpus(
    corpus: Corpus,
    codec: Codec,
    out: Path,
    how: EncodeSettings | None = None,
    fabric: L.Fabric | None = None,
    codec_id: str = "",
) -> list[str]:
    """Encode a corpus; shards that are there and whole are kept.

    Args:
        corpus: what to encode.
        codec: at the corpus's sample rate and channels; it is brought to the processes' device.
        out: the folder to fill.
        how: stems or not, size of the shards.
        fabric: Lightning's, launched; its processes share the shards. None = one, on this device.
        codec_id: names what encodes (`encoder_sha256`); another one is refused in the same folder.

    Returns:
        Messages about shards that were torn and were made again.

    Raises:
        LmdError: no rows in a shard, a codec that does not fit, not one stem where they are wanted,
            or a folder that cannot be written or was encoded from something else.
    """
    how, fabric = how or EncodeSettings(), fabric or L.Fabric(devices=1)
    if how.rows_per_shard < 1:
        raise LmdError(f"--rows-per-shard {how.rows_per_shard}", "1 or more", "Raise it.")
    check_apart(out=out, data=corpus.folder)
    n_voices = 5 if how.stems else 1
    n_frames = sum(row.n_samples for row in corpus.rows) // codec.samples_per_frame
    check_folder(out, 2 * codec.latent_dim * n_frames * n_voices)
    check_fit(codec, corpus)
    alone = set(corpus.without_stems()) if how.stems else set()
    if len(alone) == len(corpus):
        todo = "Build it with --stems from music that has them, or leave the option out here."
        raise LmdError(f"no stems in {corpus.folder}", "some, for --stems", todo)
    if alone:
        fabric.print(f"{len(alone)} of {len(corpus)} sounds have no stems: their mixes alone")
    settings = {
        "format": SHARD_FORMAT,
        "codec": codec_id,
        "corpus": hashlib.sha256("\n".join(row.sha256 for row in corpus.rows).encode()).hexdigest(),
        "stems": how.stems,
        "rows_per_shard": how.rows_per_shard,
        "silence": silence_frame(codec),
    }
    sizes = ("latent_dim", "sample_rate", "channels", "samples_per_frame")
    settings |= {name: getattr(codec, name) for name in sizes}
    hold_settings(out / SETTINGS, settings, free=("silence",))
    step = how.rows_per_shard
    shards = {
        out / f"shard-{number:05d}.safetensors": range(len(corpus))[first : first + step]
        for number, first in enumerate(range(0, len(corpus), step))
    }
    faults = {path: fault for path in shards if (fault := shard_fault(path))}
    torn = [f"{p.name}: {f}; encoded again" for p, f in faults.items() if f != "missing"]
    for line in torn:
        fabric.print(line)
    fabric.barrier()  # nobody writes before all have looked
    if isinstance(codec, nn.Module):
        codec.to(fabric.device)
    own = list(faults)[fabric.global_rank :: fabric.world_size]
    for path in tqdm(own, "encoding", mininterval=1, delay=2, disable=not fabric.is_global_zero):
        latents, entries, at = [], [], 0
        for row in shards[path]:
            stems = corpus.stems(row, how.cache) if how.stems and row not in alone else ()
            for voice, sound in enumerate((corpus.wave(row), *stems), -1):
                wave = torch.from_numpy(sound)[None].to(fabric.device)
                with torch.inference_mode():
                    frames = encode_wave(codec, wave)[0].T.cpu()
                entries.append(_entry(corpus.rows[row], voice, path.name, at, len(frames)))
                latents.append(frames)
                at += len(frames)
        write_shard(path, latents, entries)
    fabric.barrier()
    if fabric.is_global_zero:
        _write_index(out, list(shards), corpus)
    fabric.barrier()  # nobody goes on before there is an index
    return torn


def _write_index(out: Path, shards: Sequence[Path], corpus: Corpus) -> None:
    """One line per sound over all shards: where it lies, and what the corpus says of it now.

    Captions and splits may have changed since a shard was written; the sounds have not.
    """
    entries, row = [], -1
    known = [entry for path in shards for entry in shard_entries(path)]
    for old in tqdm(known, desc="captions", mininterval=2):
        row += old.voice < 0  # a mix comes before its stems
        about = corpus.rows[row]
        entry = _entry(about, old.voice, old.shard, old.start_frame, old.n_frames)
        also = further_captions(about, FURTHER_CAPTIONS) if old.voice < 0 else ()
        entries.append(replace(entry, also="|".join(also)))
    write_rows(out / INDEX, Entry, entries)
