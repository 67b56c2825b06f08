"""A codec's model card, made from its header and its measured scores."""

from pathlib import Path
from typing import Any

from lmd.checkpoint import read_header
from lmd.config import PRESETS
from lmd.errors import LmdError
from lmd.training.card import card, machine_text
from lmd.training.codec.metrics import markdown_table

NOTICE = (
    "The codec is at its best on music like that which it was trained on. Who may use the weights "
    "depends on who may use that music. The measures above are `python -m lmd train codec "
    "--evaluate FILE --card FILE`; SI-SDR is low by design: the phase is made up, not sent."
)


def codec_card(weights: Path, scores: dict[str, Any]) -> str:
    """Markdown about a spectral codec, and what `lmd train codec --evaluate` measured of it.

    Raises:
        LmdError: the scores are of other weights.
    """
    header = read_header(weights)
    notes, config = header.notes, header.config
    if scores["sha256"] != header.sha256:
        raise LmdError(
            f"scores of weights {scores['sha256'][:12]}",
            f"those of {weights.name}, {header.sha256[:12]}",
            "Measure again: python -m lmd train codec --evaluate FILE --json FILE.",
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
