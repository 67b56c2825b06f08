"""The config of a stable-audio-tools model in our terms.

What it asks for is either understood or refused: nothing is silently taken to be the default.
"""

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from lmd.config import DiTConfig, OobleckConfig, TextConfig
from lmd.errors import LmdError

ADDED = ["inpaint_mask", "inpaint_masked_input"]  # what the input-add projection reads first


def a_whole_number(value: Any) -> bool:
    """A positive one."""
    return isinstance(value, int) and not isinstance(value, bool) and value > 0


def a_number(value: Any) -> bool:
    """A positive, finite one."""
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    return is_number and 0 < value < math.inf


def whole_numbers(value: Any) -> bool:
    """A list of positive ones."""
    return isinstance(value, list) and all(map(a_whole_number, value))


def a_list(value: Any) -> bool:
    """Of anything."""
    return isinstance(value, list)


# What a section may say. A tuple lists the values that mean what our code computes (None: absent
# is fine); a function tells what is read if it is there; `...` marks a value that changes nothing
# in the networks themselves, or a section with rules of its own.
TOP = {
    "model_type": ("diffusion_cond", "diffusion_cond_inpaint"),
    **dict.fromkeys(("sample_size", "sample_rate", "audio_channels"), a_whole_number),
    **dict.fromkeys(("model", "training"), ...),
}
MODEL = {
    **dict.fromkeys(("pretransform", "conditioning", "diffusion"), ...),
    "io_channels": a_whole_number,
}
DIFFUSION = {
    "type": ("dit",),
    "diffusion_objective": ("rectified_flow", "rf_denoiser"),
    **dict.fromkeys(("cross_attention_cond_ids", "global_cond_ids", "input_add_ids"), a_list),
    **dict.fromkeys(("config", "distribution_shift_options"), ...),
    "prepend_cond_ids": (None, []),
    "input_concat_ids": (None, []),
}
DIT = {
    **dict.fromkeys(("io_channels", "embed_dim", "depth", "num_heads"), a_whole_number),
    **dict.fromkeys(("cond_token_dim", "global_cond_dim"), a_whole_number),
    **dict.fromkeys(("ff_kwargs", "postpend", "input_add_dim", "input_add_dims"), ...),
    **dict.fromkeys(("diffusion_objective", "zero_init_branch_outputs"), ...),
    "transformer_type": (None, "continuous_transformer"),
    "attn_kwargs": ({"qk_norm": "ln"},),
    "global_cond_type": (None, "prepend"),
    "timestep_cond_type": (None, "global"),
    "patch_size": (None, 1),
    "project_cond_tokens": (None, True),
    "project_global_cond": (None, True),
    "rotary_pos_emb": (None, True),
    "cross_attend": (None, True),
    "input_concat_dim": (None, 0),
    "prepend_cond_dim": (None, 0),
    "num_memory_tokens": (None, 0),
    "causal": (None, False),
    "conformer": (None, False),
    "use_sinusoidal_emb": (None, False),
    "use_abs_pos_emb": (None, False),
}
FF_KWARGS = {
    "mult": a_whole_number,
    "no_bias": (None, False),
    "glu": (None, True),
    "use_conv": (None, False),
}
PRETRANSFORM = {
    "type": ("autoencoder",),
    "scale": (None, 1, 1.0),
    **dict.fromkeys(("config", "iterate_batch", "model_half", "chunked", "enable_grad"), ...),
}
AUTOENCODER = {
    **dict.fromkeys(("encoder", "decoder", "bottleneck"), ...),
    **dict.fromkeys(("latent_dim", "downsampling_ratio", "io_channels"), a_whole_number),
}
HALF = {"type": ("oobleck",), "config": ..., "requires_grad": ...}
ENCODER = {
    **dict.fromkeys(("in_channels", "channels", "latent_dim"), a_whole_number),
    **dict.fromkeys(("c_mults", "strides"), whole_numbers),
    "use_snake": (True,),
    "antialias_activation": (None, False),
}
DECODER = {
    **dict.fromkeys(("out_channels", "channels", "latent_dim"), a_whole_number),
    **dict.fromkeys(("c_mults", "strides"), whole_numbers),
    "use_snake": (True,),
    "antialias_activation": (None, False),
    "use_nearest_upsample": (None, False),
    "final_tanh": (False,),  # absent would mean True
}
BOTTLENECK = {"type": ("vae",), "config": (None, {})}
CONDITIONING = {"configs": a_list, "cond_dim": a_whole_number, "default_keys": ...}
CONDITIONER = {"id": ..., "type": ("t5", "number"), "config": ...}
T5 = {
    "t5_model_name": (None, "t5-base"),  # absent means that, too
    "max_length": a_whole_number,
    "enable_grad": ...,
    "project_out": (None, False),
}
NUMBER = {"min_val": (0, 0.0), "max_val": a_number, "fourier_features_type": (None, "learned")}


@dataclass(frozen=True)
class ForeignConfig:
    """What a foreign config says, in our terms.

    Attributes:
        dit: sizes of the transformer.
        codec: sizes of the autoencoder, None if it has none.
        max_seconds: where lengths are clamped.
        seconds_id: its name for the length in seconds.
        n_text_tokens: prompts are padded to this many tokens.
        sample_size: samples it was trained on.
    """

    dit: DiTConfig
    codec: OobleckConfig | None
    max_seconds: float
    seconds_id: str
    n_text_tokens: int
    sample_size: int

    @property
    def text(self) -> TextConfig:
        """How prompts and lengths reach the transformer."""
        return TextConfig("t5-base", self.n_text_tokens, self.dit.text_dim, self.max_seconds)


def read_section(values: Any, rules: Mapping[str, Any], where: str) -> dict[str, Any]:
    """A section of a config whose every key is known and whose every value is supported.

    Raises:
        LmdError: lists each key that is unknown, missing or asks for something not built here.
    """
    if not isinstance(values, dict):
        raise LmdError(f"{where} = {values!r}", "a section", "Check model_config.json.")
    problems = [f"unknown key {key!r}" for key in sorted(set(values) - set(rules))]
    for key, allowed in rules.items():
        if callable(allowed):
            if key in values and not allowed(values[key]):
                wanted = allowed.__name__.replace("_", " ")
                problems.append(f"{key} = {json.dumps(values[key])} ({wanted} is expected)")
        elif allowed is not ... and values.get(key) not in allowed:
            wanted = " or ".join(json.dumps(value) for value in allowed if value is not None)
            problems.append(f"{key} = {json.dumps(values.get(key))} (only {wanted} is built here)")
    if problems:
        raise LmdError(
            f"{where} with {'; '.join(problems)}",
            "a model of Stable Audio Open Small's kind",
            "Another kind of model cannot be loaded; check the spelling.",
        )
    return values


def parse_config(raw: dict[str, Any]) -> ForeignConfig:
    """Translate a `model_config.json`.

    Raises:
        LmdError: a model of another kind, an unknown key, a missing one.
    """
    try:
        read_section(raw, TOP, "the config")
        model = read_section(raw["model"], MODEL, "model")
        diffusion = read_section(model["diffusion"], DIFFUSION, "model.diffusion")
        text_tokens, seconds_id, max_seconds = _parse_conditioning(model["conditioning"], diffusion)
        dit = _parse_dit(diffusion, model["conditioning"]["cond_dim"])
        codec = _parse_codec(model["pretransform"], raw) if model.get("pretransform") else None
        if model["io_channels"] != dit.latent_dim or (codec and codec.latent_dim != dit.latent_dim):
            raise LmdError(
                f"io_channels {model['io_channels']}, a transformer of {dit.latent_dim} channels "
                f"and an autoencoder of {codec and codec.latent_dim}",
                "one number of latent channels",
                "Check model_config.json.",
            )
        return ForeignConfig(
            dit, codec, max_seconds, seconds_id, text_tokens, int(raw["sample_size"])
        )
    except KeyError as error:
        raise LmdError(
            f"a config without {error}", "stable-audio-tools' keys", "Check model_config.json."
        ) from error


def _parse_dit(diffusion: dict[str, Any], cond_dim: int) -> DiTConfig:
    """The transformer's sizes; `controls` follow from the weights."""
    config = read_section(diffusion["config"], DIT, "model.diffusion.config")
    ff = read_section(config.get("ff_kwargs", {}), FF_KWARGS, "ff_kwargs")
    if diffusion.get("input_add_ids", ADDED)[:2] != ADDED:
        raise LmdError(f"input_add_ids {diffusion['input_add_ids']}", f"{ADDED} first", "Reorder.")
    if {config["cond_token_dim"], config["global_cond_dim"]} != {cond_dim}:
        raise LmdError(
            f"condition widths {config['cond_token_dim']} and {config['global_cond_dim']}",
            f"cond_dim = {cond_dim} for both (one number as global condition)",
            "Check model_config.json.",
        )
    return DiTConfig(
        latent_dim=config["io_channels"],
        width=config["embed_dim"],
        depth=config["depth"],
        n_heads=config["num_heads"],
        text_dim=config["cond_token_dim"],
        global_dim=config["global_cond_dim"],
        ff_mult=ff.get("mult", 4),
    )


def _parse_conditioning(
    conditioning: dict[str, Any], diffusion: dict[str, Any]
) -> tuple[int, str, float]:
    """Prompt tokens, the name of the length condition, and its greatest value."""
    read_section(conditioning, CONDITIONING, "model.conditioning")
    parts = {}
    for entry in conditioning["configs"]:
        read_section(entry, CONDITIONER, "model.conditioning.configs")
        rules = T5 if entry["type"] == "t5" else NUMBER
        parts[entry["type"]] = entry["id"], read_section(entry["config"], rules, entry["id"])
    names = [parts[kind][0] for kind in ("t5", "number") if kind in parts]
    found = (diffusion["cross_attention_cond_ids"], diffusion["global_cond_ids"])
    if len(conditioning["configs"]) != 2 or found != (names, names[1:]):
        raise LmdError(
            f"conditions {[entry['id'] for entry in conditioning['configs']]}, of which {found[0]} "
            f"are tokens and {found[1]} global",
            "a T5 prompt and one number as tokens, the number as global condition too",
            "Another kind of model cannot be loaded.",
        )
    prompt, (seconds_id, number) = parts["t5"][1], parts["number"]
    return prompt.get("max_length", 128), seconds_id, float(number["max_val"])


def _parse_codec(pretransform: dict[str, Any], raw: dict[str, Any]) -> OobleckConfig:
    """The autoencoder's sizes; both halves must be mirror images."""
    read_section(pretransform, PRETRANSFORM, "model.pretransform")
    config = read_section(pretransform["config"], AUTOENCODER, "model.pretransform.config")
    halves = {}
    for name, rules in (("encoder", ENCODER), ("decoder", DECODER)):
        half = read_section(config[name], HALF, f"the {name}")
        halves[name] = read_section(half["config"], rules, f"the {name}'s config")
    read_section(config["bottleneck"], BOTTLENECK, "the bottleneck")
    encoder, decoder = halves["encoder"], halves["decoder"]
    mirrored = all(encoder[key] == decoder[key] for key in ("channels", "c_mults", "strides"))
    wave_channels = {encoder["in_channels"], decoder["out_channels"], config["io_channels"]}
    built = OobleckConfig(
        sample_rate=raw["sample_rate"],
        audio_channels=decoder["out_channels"],
        latent_dim=decoder["latent_dim"],
        channels=decoder["channels"],
        c_mults=tuple(decoder["c_mults"]),
        strides=tuple(decoder["strides"]),
    )
    expected = (2 * decoder["latent_dim"], built.samples_per_frame, decoder["latent_dim"])
    found = (encoder["latent_dim"], config["downsampling_ratio"], config["latent_dim"])
    if not mirrored or len(wave_channels) != 1 or found != expected:
        raise LmdError(
            f"an encoder {encoder} and a decoder {decoder}",
            "mirror images, the encoder with twice the latent channels, and io_channels, "
            "latent_dim and downsampling_ratio to match",
            "Check model_config.json.",
        )
    return built
