"""How much of held-out music a codec keeps, per instrument family.

    python tools/measure_codec.py runs/my-codec/codec.safetensors --data data/mine --card codec.md

It looks at excerpts from the middle of the corpus's test pieces.
"""

import math
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import numpy as np
import pandas as pd
import torch
import torch.nn.functional as F
import tyro
from jaxtyping import Float
from torch import Tensor
from torchmetrics.functional.audio import scale_invariant_signal_distortion_ratio
from tqdm import tqdm

from lmd.checkpoint import load_codec, read_header
from lmd.codec.base import Codec, DecodeState, decode_block
from lmd.config import PRESETS
from lmd.corpus.manifest import Corpus
from lmd.data.codec_fit import PEAK_DB, Mono, log_mel_db, power
from lmd.errors import LmdError
from lmd.machine import machine_dict, tune_allocator
from lmd.outputs import check_outputs, write_atomic, write_json
from lmd.shapes import Latents
from lmd.training.card import card, machine_text

EXCERPT_S = 20.0
TOLERANCE_S = 0.05  # of an onset
ONSET_HOP = 256  # samples
NOTICE = (
    "The codec is at its best on music like that which it was trained on. Who may use the weights "
    "depends on who may use that music. The measures above are `python tools/measure_codec.py FILE "
    "--card FILE`; SI-SDR is low by design: the phase is made up, not sent."
)


@dataclass(frozen=True)
class Options:
    """Flags of the command.

    Attributes:
        codec: the weights.
        data: a built corpus.
        json: where the measures go.
        card: where a model card with them goes.
        hours: held-out music to measure on.
        threads: that torch uses.
    """

    codec: Annotated[Path, tyro.conf.Positional]
    data: Path = Path("data/corpus")
    json: Path | None = None
    card: Path | None = None
    hours: float = 0.5
    threads: int = torch.get_num_threads()


class Scores(NamedTuple):
    """One piece against the original; see the functions of these names."""

    log_mel_db: float
    stft_distance: float
    chroma: float
    onset_f1: float
    si_sdr_db: float  # scale-invariant; low where the phase is invented


def compare(output: Mono, target: Mono, sample_rate: int) -> Scores:
    """All scores of one piece against the original."""
    return Scores(
        log_mel_db(output, target, sample_rate),
        stft_distance(output, target),
        chroma_agreement(output, target, sample_rate),
        onset_f1(output, target, sample_rate),
        float(scale_invariant_signal_distortion_ratio(output.double(), target.double())),
    )


def stft_distance(output: Mono, target: Mono) -> float:
    """Spectral convergence + mean |log magnitude difference|, windows of 512, 1024, 2048."""
    total = 0.0
    for n_fft in (512, 1024, 2048):
        found, true = (power(w, n_fft, n_fft // 4).sqrt() for w in (output, target))
        floor = true.max() * 10 ** (-PEAK_DB / 20)
        convergence = (found - true).norm() / true.norm().clamp_min(1e-12)
        logs = found.clamp_min(floor).log() - true.clamp_min(floor).log()
        total += float(convergence + logs.abs().mean())
    return total / 3


def chroma_profiles(wave: Mono, sample_rate: int) -> Float[Tensor, "12 step"]:
    """Amplitude per pitch class (A = 0), from 55 to 2,000 Hz, 186 ms windows at 22,050 Hz."""
    n_fft = 4096
    amplitude = power(wave, n_fft, n_fft // 4).sqrt()
    hz = torch.arange(n_fft // 2 + 1) * sample_rate / n_fft
    inside = (hz >= 55) & (hz <= 2000)
    classes = torch.round(12 * torch.log2(hz[inside] / 440)).long() % 12
    return torch.zeros(12, amplitude.shape[1]).index_add_(0, classes, amplitude[inside])


def chroma_agreement(output: Mono, target: Mono, sample_rate: int) -> float:
    """Mean cosine of the profiles over frames less than 50 dB under the loudest."""
    found, true = (chroma_profiles(w, sample_rate) for w in (output, target))
    loud = true.norm(dim=0) > true.norm(dim=0).max() * 10 ** (-50 / 20)
    return float(F.cosine_similarity(found[:, loud], true[:, loud], dim=0).mean())


@cache
def semitone_halves(n_fft: int, sample_rate: int) -> Float[Tensor, "band bin"]:
    """Triangular bands, 24 an octave from 30 Hz to 10 kHz; where bins are wider, one per bin."""
    centres_hz = 30 * 2 ** (torch.arange(math.ceil(24 * math.log2(10_000 / 30))) / 24)
    centres = (centres_hz * n_fft / sample_rate).round().clamp_max(n_fft // 2).unique()
    low, middle, high = centres[:-2, None], centres[1:-1, None], centres[2:, None]
    bins = torch.arange(n_fft // 2 + 1)
    rising, falling = (bins - low) / (middle - low), (high - bins) / (high - middle)
    return torch.minimum(rising, falling).clamp_min(0)


def onset_curve(wave: Mono, sample_rate: int) -> Float[Tensor, " step"]:
    """Rise of log(1 + 1000·a) over four hops of 256 samples, summed over bands of half a semitone.

    `a` are amplitudes in windows of 2048, the largest of them 1. Narrow bands keep the beating of
    neighbouring notes, which sums over wide ones turn into rises, out of the curve.
    """
    bands = semitone_halves(2048, sample_rate) @ power(wave, 2048, ONSET_HOP).sqrt()
    level = torch.log1p(1000 * bands / bands.max().clamp_min(1e-9))
    rise = (level[:, 4:] - level[:, :-4]).clamp_min(0).sum(0)
    return F.pad(rise, (2, 2))


def onsets_s(wave: Mono, sample_rate: int) -> Float[Tensor, " onset"]:
    """Times at which the spectrum rises: peaks of `onset_curve`.

    A peak is the highest within ±93 ms and stands over the mean within ±139 ms by 15 % of the 99th
    percentile of all rises: chosen for agreement with the score on originals (docs/log.md).
    """
    rise = onset_curve(wave, sample_rate)
    peak = F.max_pool1d(rise[None], 17, 1, 8)[0]
    mean = F.avg_pool1d(rise[None], 25, 1, 12, count_include_pad=False)[0]
    found = ((rise == peak) & (rise > mean + 0.15 * rise.quantile(0.99))).nonzero()[:, 0]
    return found * ONSET_HOP / sample_rate


def onset_f1(output: Mono, target: Mono, sample_rate: int) -> float:
    """F1 of the onsets, each matched once within 50 ms (mir_eval); 1 when neither has any."""
    from mir_eval.onset import f_measure  # slow to import, seldom needed

    found, true = (onsets_s(w, sample_rate).numpy() for w in (output, target))
    if not len(found) and not len(true):
        return 1.0
    return float(f_measure(true, found, TOLERANCE_S)[0]) if len(found) and len(true) else 0.0


def stream_difference(codec: Codec, latents: Latents, block_frames: int = 12) -> float:
    """Largest absolute difference between a decode in blocks (exact boundaries) and a whole one."""
    whole = codec.decode(latents)
    state, parts = DecodeState(), []
    for block in latents.split(block_frames, dim=-1):
        wave, state = decode_block(codec, state, block, "exact")
        parts.append(wave)
    streamed = torch.cat(parts, -1)
    return float((streamed - whole[..., : streamed.shape[-1]]).abs().max())


def evaluate(codec: Codec, corpus: Corpus, hours: float) -> dict[str, Any]:
    """Scores per instrument family and overall, speed, streaming.

    Looks at excerpts from the middle of about so many hours of held-out pieces, as large a share of
    every instrument family.

    Raises:
        LmdError: no sound.
    """
    if not len(corpus):
        raise LmdError("no held-out sound", "one or more", "Build a larger corpus.")
    n = int(min(len(corpus), max(2, hours * 3600 / EXCERPT_S)))
    by_family = np.argsort([row.family for row in corpus.rows], kind="stable")
    chosen = by_family[np.unique(np.linspace(0, len(corpus) - 1, n).round().astype(int))].tolist()
    rows, heard_s, encode_s, decode_s = [], 0.0, 0.0, 0.0
    for index in tqdm(chosen, desc="codec on held-out pieces"):
        wave = _excerpt(corpus, index, codec.samples_per_frame)
        began = time.perf_counter()
        latents = codec.encode(wave)
        encoded = time.perf_counter()
        output = codec.decode(latents)
        decode_s += time.perf_counter() - encoded
        encode_s += encoded - began
        heard_s += wave.shape[-1] / codec.sample_rate
        scores = compare(output.mean(1)[0], wave.mean(1)[0], codec.sample_rate)
        rows.append({"family": corpus.rows[index].family, **scores._asdict()})
    table = pd.DataFrame(rows)
    return {
        "families": {name: _mean(part) for name, part in table.groupby("family")},
        "all": _mean(table),
        "encode_times_real_time": heard_s / encode_s,
        "decode_times_real_time": heard_s / decode_s,
        "stream_difference": stream_difference(codec, latents),
        "lookahead_frames": codec.lookahead_frames,
        "lookback_frames": codec.lookback_frames,
        "minutes": heard_s / 60,
    }


def _excerpt(corpus: Corpus, index: int, hop: int) -> Float[Tensor, "1 channel sample"]:
    """From the middle of a piece, a whole number of frames."""
    row = corpus.rows[index]
    n = int(min(row.n_samples, EXCERPT_S * row.sample_rate)) // hop * hop
    return torch.from_numpy(corpus.wave(index, (row.n_samples - n) // 2, n))[None]


def _mean(scores: pd.DataFrame) -> dict[str, float]:
    """How many pieces, and the means of their scores."""
    return {"n": len(scores), **scores.drop(columns="family").mean().to_dict()}


def markdown_table(result: dict[str, Any]) -> str:
    """The result of `evaluate` as a Markdown table, families first."""
    rows = {**result["families"], "**all**": result["all"]}
    table = pd.DataFrame.from_dict(rows, orient="index")
    table.columns = ["pieces", "log-mel dB", "STFT distance", "chroma", "onset F1", "SI-SDR dB"]
    return table.rename_axis("family").to_markdown(floatfmt=("", "g", *[".3f"] * 5))


def codec_card(weights: Path, scores: dict[str, Any]) -> str:
    """Markdown about a spectral codec, and what `evaluate` measured of it.

    Raises:
        LmdError: the scores are of other weights.
    """
    header = read_header(weights)
    notes, config = header.notes, header.config
    if scores["sha256"] != header.sha256:
        raise LmdError(
            f"scores of weights {scores['sha256'][:12]}",
            f"those of {weights.name}, {header.sha256[:12]}",
            "Measure again: python tools/measure_codec.py FILE --json FILE.",
        )
    plan, data, used = notes["plan"], notes["data"], scores["machine"]
    kind = "recordings" if data["settings"].get("kind") == "audio" else "rendered scores"
    encoder = "trained before, then fixed"
    if plan["encoder_steps"]:
        encoder = f"trained in the first {plan['encoder_steps']} of these steps"
    facts = {
        "format": f"{config.sample_rate} Hz, {config.channels} channel, {config.latent_dim} "
        f"latents at {config.sample_rate / config.samples_per_frame:.2f} frames/s",
        "decoder's training": f"{notes['steps']} steps of {plan['batch']} windows of "
        f"{plan['frames']} frames, discriminator from step {plan['adversarial_from']}, "
        f"seed {plan['seed']}",
        "encoder": encoder,
        "data": f"{data['renditions']} {kind} of `{data['name']}`, {data['hours']} h (training "
        "split)",
        "hardware": machine_text(notes["machine"]),
        "speed": f"{used['cpu']}, {used['n_threads']} threads: encode "
        f"{scores['encode_times_real_time']:.0f}, decode {scores['decode_times_real_time']:.0f} "
        "times real time",
        "streaming": f"looks {scores['lookahead_frames']} frames ahead, "
        f"{scores['lookback_frames']} back; largest difference from a whole decode "
        f"{scores['stream_difference']:.1e}",
        "command": f"`{notes.get('command', 'unknown')}` (the last start)",
    }
    name = next(name for name, sizes in PRESETS.items() if sizes.codec == config)
    about = (
        f"The codec of `{name}`: magnitudes in, {config.latent_dim} learnable latent "
        "channels, an inverse STFT that invents the phase. Code: `lmd/codec/spectral.py`, "
        "`lmd/codec/phase.py`."
    )
    measured = (
        f"Held-out pieces of `{scores['data']}` (split by piece), {scores['minutes']:.1f} minutes, "
        "against the input:"
    )
    return card(weights, about, facts, measured, markdown_table(scores), notice=NOTICE)


def measure(options: Options) -> None:
    """Measure a codec on held-out pieces: print a table, write figures and model card."""
    check_outputs(json=options.json, card=options.card, make_folders=True)
    tune_allocator()
    torch.set_num_threads(options.threads)
    header, codec = read_header(options.codec), load_codec(options.codec)
    scores = evaluate(codec, Corpus(options.data, "test"), options.hours)
    scores |= {"sha256": header.sha256, "data": options.data.name, "machine": machine_dict()}
    print(markdown_table(scores))
    if options.json:
        write_json(options.json, scores)
    if options.card:
        write_atomic(options.card, codec_card(options.codec, scores).encode())


def main(words: Sequence[str] | None = None) -> int:
    """Measure; what is refused is printed."""
    try:
        measure(tyro.cli(Options, args=words, description=__doc__))
    except LmdError as error:
        print(f"measure_codec: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
