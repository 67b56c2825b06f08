"""A codec's model card, made from its header, its measured scores and a transformer's trial."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lmd.checkpoint import Header, codec_hash_of, read_header
from lmd.config import PRESETS
from lmd.data.encode import encoder_sha256
from lmd.errors import LmdError
from lmd.training.card import run_log
from lmd.training.codec.metrics import markdown_table

SCORES = (
    "Data: scores of music21's corpus, rendered with the General MIDI soundfont that ships in "
    "pretty_midi (see data/README.md). Weights: the licence of this repository. They have "
    "heard that corpus and nothing else."
)
OWN_MUSIC = (
    "Data: a folder of audio; who may use the weights depends on who may use that music. They "
    "have heard it and nothing else."
)


HALF_HOUR = 30  # minutes


def codec_card(weights: Path, scores: dict[str, Any], learner: Path | None = None) -> str:
    """Markdown about a spectral codec.

    Args:
        weights: the checkpoint.
        scores: what `python -m lmd train codec --evaluate` measured of it.
        learner: the folder of a base's training on this codec's latents, begun from nothing: what
            half an hour taught it stands beside the scores.

    Raises:
        LmdError: the scores are of other weights; the learner heard another codec's latents, knew
            something before, or stopped before half an hour was over.
    """
    header = read_header(weights)
    if scores["sha256"] != header.sha256:
        raise LmdError(
            f"scores of weights {scores['sha256'][:12]}",
            f"those of {weights.name}, {header.sha256[:12]}",
            "Measure again: python -m lmd train codec --evaluate FILE --json FILE.",
        )
    learned, trial = list[str](), ""
    if learner is not None:
        notes = _learner_notes(weights, learner)
        learned, trial = _learned(learner, notes["hardware"]), notes["command"]
    return "\n".join(
        [
            f"# {weights.stem}",
            "",
            f"The codec of `{_preset(header)}`: magnitudes in, {header.config.latent_dim} "
            "learnable latent channels, an inverse STFT "
            "that invents the phase. Code: `lmd/codec/spectral.py`, `lmd/codec/phase.py`.",
            "",
            "| | |",
            "|---|---|",
            *_facts(header, weights),
            *_speed(scores),
            *learned,
            "",
            f"Held-out pieces of `{scores['data']}` (split by piece), "
            f"{scores['minutes']:.1f} minutes, against the input:",
            "",
            markdown_table(scores),
            "",
            "SI-SDR is low by design: the phase is made up, not sent.",
            "",
            *_commands(header, scores.get("hours"), learner, trial),
        ]
    )


def _facts(header: Header, weights: Path) -> list[str]:
    notes, config = header.notes, header.config
    plan, data, machine = notes["plan"], notes["data"], notes["machine"]
    frame_hz = config.sample_rate / config.samples_per_frame
    return [
        f"| file | `{weights.name}`, {weights.stat().st_size / 1e6:.1f} MB, {header.stored} |",
        f"| SHA-256 of the tensors | `{header.sha256}` |",
        f"| format | {config.sample_rate} Hz, {config.channels} channel, "
        f"{config.latent_dim} latents at {frame_hz:.2f} frames/s |",
        f"| decoder's training | {notes['steps']} steps of {plan['batch']} windows of "
        f"{plan['frames']} frames, discriminator from step {plan['adversarial_from']}, "
        f"seed {plan['seed']}, {notes['wall_s'] / 60:.0f} min wall time |",
        f"| encoder | {_encoder(header)} |",
        f"| data | {data['renditions']} renditions, {data['hours']} h (training split) |",
        f"| hardware | {machine['cpu']}, {machine['n_cores']} cores, "
        f"{machine['gpu'] or 'no GPU'}, torch {machine['torch']} |",
    ]


def _encoder(header: Header) -> str:
    """Where the encoder came from."""
    plan = header.notes["plan"]
    if plan["encoder_steps"]:
        return f"trained in the first {plan['encoder_steps']} of these steps"
    return "trained before, then fixed; see docs/log.md for its data and figures"


def _speed(scores: dict[str, Any]) -> list[str]:
    encode, decode = (scores[f"{way}_times_real_time"] for way in ("encode", "decode"))
    n_threads, cpu = (scores["machine"][name] for name in ("n_threads", "cpu"))
    return [
        f"| speed | {cpu}, {n_threads} threads: encode {encode:.0f}, decode {decode:.0f} times "
        "real time; per second of processor time "
        f"{scores['encode_seconds_per_cpu_second']:.0f} and "
        f"{scores['decode_seconds_per_cpu_second']:.0f} seconds of music |",
        f"| streaming | looks {scores['lookahead_frames']} frames ahead, "
        f"{scores['lookback_frames']} back; largest difference from a whole decode "
        f"{scores['stream_difference']:.1e} |",
        f"| predictability | next-frame R² of a ridge regression on four frames: "
        f"{scores['next_frame_r2']:.3f} |",
    ]


def _learned(learner: Path, machine: Mapping[str, Any]) -> list[str]:
    """What a transformer learned of these latents in half an hour, and on what."""
    log = run_log(learner)
    minutes = log["seconds"] / 60
    if minutes.max() < HALF_HOUR:
        raise LmdError(
            f"{learner}: a training of {minutes.max():.1f} minutes",
            f"one of at least {HALF_HOUR}",
            "Go on with it: the same command with more --steps.",
        )
    losses = log.loc[minutes <= HALF_HOUR, "loss"]
    n = max(1, len(losses) // HALF_HOUR)  # the steps of about a minute
    return [
        f"| what a transformer learns of it in {HALF_HOUR} minutes | a base begun from nothing "
        f"({machine['cpu']}, {machine['n_cores']} cores, {machine['gpu'] or 'no GPU'}) made "
        f"{len(losses)} steps; training loss {losses[:n].mean():.3f} over the first {n}, "
        f"{losses[-n:].mean():.3f} over the last {n} |"
    ]


def _learner_notes(codec: Path, learner: Path) -> dict[str, Any]:
    """What the weights in `learner` say of their training; refused if it proves nothing here."""
    notes = read_header(learner / "base.safetensors").notes
    heard, wanted = codec_hash_of(notes), encoder_sha256(codec)
    if "init" in notes or heard != wanted:
        knew = f"weights begun from {notes['init']['file']}" if "init" in notes else ""
        raise LmdError(
            f"{learner}: " + (knew or f"weights that heard latents of codec {str(heard)[:12]}"),
            f"a base trained from nothing on latents of {codec.name}, {wanted[:12]}",
            "Encode the corpus with this codec and train anew, without --init.",
        )
    return notes


def _preset(header: Header) -> str:
    """The preset that has this codec."""
    return next(name for name, sizes in PRESETS.items() if sizes.codec == header.config)


def _commands(header: Header, hours: float | None, learner: Path | None, trial: str) -> list[str]:
    """How to make it again.

    `hours`: of the corpus, where it was rendered; `trial`: the command that made the `learner`.
    """
    plan, settings = header.notes["plan"], header.notes["data"]["settings"]
    is_own_music = settings.get("kind") == "audio"
    build = "--audio FOLDER" if is_own_music else f"--seed {settings.get('seed', 0)}"
    build = f"--hours {hours:g} {build}" if hours else build
    train = (
        f"python -m lmd train codec --preset {_preset(header)} --data data/corpus"
        f" --out outputs/codec --steps {plan['steps']}"
        f" --encoder-steps {plan['encoder_steps']} --adversarial-from {plan['adversarial_from']}"
        f" --batch {plan['batch']} --frames {plan['frames']} --noise {plan['noise']}"
        f" --learning-rate {plan['learning_rate']} --seed {plan['seed']}"
    )
    if not plan["encoder_steps"]:
        train += " --encoder data/pretrained/codec.safetensors"
    learn, learned = [], ""
    if learner is not None:
        learn = ["python -m lmd data encode --data data/corpus", trial]
        learned = f" --learner {learner.as_posix()}"
    return [
        "Made by (the last start; a run may be stopped and go on):",
        "",
        "```",
        f"python -m lmd data build {build} --out data/corpus",
        train,
        *learn,
        "python -m lmd train codec --evaluate data/pretrained/codec.safetensors"
        f" --json scores.json --card data/pretrained/codec.md{learned}",
        "```",
        "",
        "With `--encoder FILE` the same command takes encoder and decoder from a codec and trains "
        "the decoder alone.",
        "",
        OWN_MUSIC if is_own_music else SCORES,
        "",
    ]
