"""How well the recogniser hears, measured on pieces that it was not fitted on; its model card."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from lmd.checkpoint import read_header
from lmd.codec.base import Codec
from lmd.corpus.manifest import Corpus, Row
from lmd.evaluation.tagger import Heard, Recogniser, tempo_bpm
from lmd.training.card import NOTICE

NEAR = 0.08  # a tempo within this share of the true one is right


def pieces(
    model: Recogniser, corpus: Corpus, codec: Codec | None = None
) -> Iterator[tuple[Row, Heard]]:
    """What the recogniser makes of every piece, as it is or after a codec."""
    for index, row in enumerate(tqdm(corpus.rows, desc="listening", mininterval=2)):
        wave = torch.from_numpy(corpus.wave(index))[None]
        if codec is not None:
            n = wave.shape[-1] // codec.samples_per_frame * codec.samples_per_frame
            with torch.no_grad():
                wave = codec.decode(codec.encode(wave[..., :n]))
        yield row, model.listen(wave.mean(1)[0], row.sample_rate)


def hearing(heard: list[tuple[Row, Heard]], model: Recogniser) -> dict[str, float]:
    """Accuracies over pieces and windows.

    Returns:
        `family_piece`, `family_window`: share recognised; `family_piece_unmixed`: without the
        pieces whose voices are played by several families; `tempo_piece`: share within 8 %;
        `tempo_piece_octave`: or within 8 % of half or twice; `pieces`, `windows`: how many.
    """
    families = list(model.config.families)
    per_piece, per_window, unmixed, near, octave = [], [], [], [], []
    for row, what in heard:
        true = families.index(row.family)
        belief = what.family.clamp_min(1e-6).log().mean(0)
        per_piece.append(int(belief.argmax()) == true)
        per_window += (what.family.argmax(1) == true).tolist()
        if row.family != "mixed":
            unmixed.append(per_piece[-1])
        ratio = abs(np.log2(tempo_bpm(what.tempo) / row.tempo_bpm))
        limit = np.log2(1 + NEAR)
        near.append(ratio < limit)
        octave.append(ratio < limit or abs(ratio - 1) < limit)
    return {
        "pieces": len(per_piece),
        "windows": len(per_window),
        "family_piece": float(np.mean(per_piece)),
        "family_piece_unmixed": float(np.mean(unmixed)),
        "family_window": float(np.mean(per_window)),
        "tempo_piece": float(np.mean(near)),
        "tempo_piece_octave": float(np.mean(octave)),
    }


WORDS = {
    "pieces": "pieces",
    "windows": "windows of 5 s",
    "family_piece": "family recognised, per piece",
    "family_piece_unmixed": "the same, pieces of one family only",
    "family_window": "family recognised, per window",
    "tempo_piece": "tempo within 8 %, per piece",
    "tempo_piece_octave": "tempo within 8 %, half and double allowed",
    "pitch_f1": "pitch classes, F1 per window",
    "pitch_f1_all": "pitch classes if all twelve were said to sound, F1",
}


def card(path: Path) -> str:
    """Markdown about a recogniser out of its own header."""
    header = read_header(path)
    notes, config = header.notes, header.config
    scores: dict[str, dict[str, float]] = notes["scores"]
    lines = [
        f"# {path.stem}",
        "",
        "The listener that distances are measured with: 2 × 64 mel bands and 60 semitones of five "
        "seconds in; instrument family, pitch classes and tempo out; an embedding of "
        f"{config.embedding} numbers in between. Fitted on this project's corpus alone, whose "
        "truth is known. It knows these timbres and no others, so its distances are of use only "
        "inside this project.",
        "",
        "| | |",
        "|---|---|",
        f"| file | `{path.name}`, {path.stat().st_size / 1e6:.2f} MB, {header.stored} |",
        f"| SHA-256 of the tensors | `{header.sha256}` |",
        f"| families | {', '.join(config.families)} |",
        f"| weights | {notes['n_weights']} |",
        f"| steps × windows | {notes['plan']['steps']} × {notes['plan']['batch']} |",
        f"| wall time | {notes['seconds'] / 60:.1f} min with {notes['machine']['n_threads']} "
        f"thread(s) on {notes['machine']['cpu']} |",
        f"| data | {notes['data']['renditions']} training renditions, {notes['data']['hours']} h |",
        f"| command | `{notes['command']}` |",
        "",
        f"| on pieces it was not fitted on | {' | '.join(scores)} |",
        "|---" * (1 + len(scores)) + "|",
    ]
    for name, words in WORDS.items():
        values = [_show(score.get(name)) for score in scores.values()]
        lines.append(f"| {words} | {' | '.join(values)} |")
    return "\n".join([*lines, "", *NOTICE])


def _show(value: float | None) -> str:
    return "–" if value is None else f"{value:.3f}" if isinstance(value, float) else str(value)
