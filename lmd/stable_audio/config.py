"""The config of a stable-audio-tools model in our terms.

What it asks for is either understood or refused: nothing is taken to be the default in silence.
"""

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from lmd.config import PRESETS, DiTConfig, OobleckConfig, Preset, TextConfig, from_dict
from lmd.errors import LmdError

CONFIG_FILE = "model_config.json"
ADDED = ["inpaint_mask", "inpaint_masked_input"]  # what the input-add projection reads first

# What a section may say: a tuple lists the values that mean what our code computes (None: absent
# is fine), by themselves or by one of these checks; `...` marks what changes nothing in the
# networks, or is checked apart.
WHOLE, NUMBER, WHOLES, LIST = "a whole number", "a number", "whole numbers", "a list"
CHECKS: dict[str, Callable[[Any], bool]] = {
    WHOLE: lambda value: type(value) is int and value > 0,
    NUMBER: lambda value: type(value) in (int, float) and 0 < value < math.inf,
    WHOLES: lambda value: isinstance(value, list) and all(map(CHECKS[WHOLE], value)),
    LIST: lambda value: isinstance(value, list),
}
DIT = {
    **dict.fromkeys(("io_channels", "embed_dim", "depth", "num_heads"), (WHOLE,)),
    **dict.fromkeys(("cond_token_dim", "global_cond_dim"), (WHOLE,)),
    **dict.fromkeys(("postpend", "input_add_dim", "input_add_dims"), ...),
    **dict.fromkeys(("diffusion_objective", "zero_init_branch_outputs"), ...),
    "ff_kwargs": {
        "mult": (None, WHOLE),
        "no_bias": (None, False),
        "glu": (None, True),
        "use_conv": (None, False),
    },
    "transformer_type": (None, "continuous_transformer"),
    "attn_kwargs": ({"qk_norm": "ln"},),
    "global_cond_type": (None, "prepend"),
    "timestep_cond_type": (None, "global"),
    "patch_size": (None, 1),
    **dict.fromkeys(("project_cond_tokens", "project_global_cond"), (None, True)),
    **dict.fromkeys(("rotary_pos_emb", "cross_attend"), (None, True)),
    **dict.fromkeys(("input_concat_dim", "prepend_cond_dim", "num_memory_tokens"), (None, 0)),
    **dict.fromkeys(("causal", "conformer"), (None, False)),
    **dict.fromkeys(("use_sinusoidal_emb", "use_abs_pos_emb"), (None, False)),
}
RULES = {
    "model_type": ("diffusion_cond", "diffusion_cond_inpaint"),
    **dict.fromkeys(("sample_size", "sample_rate"), (WHOLE,)),
    "audio_channels": (None, WHOLE),
    "training": ...,
    "model": {
        "io_channels": (WHOLE,),
        "pretransform": ...,
        "conditioning": {"configs": (LIST,), "cond_dim": (WHOLE,), "default_keys": ...},
        "diffusion": {
            "type": ("dit",),
            "diffusion_objective": ("rectified_flow", "rf_denoiser"),
            **dict.fromkeys(("cross_attention_cond_ids", "global_cond_ids"), (LIST,)),
            "input_add_ids": ...,
            **dict.fromkeys(("prepend_cond_ids", "input_concat_ids"), (None, [])),
            "distribution_shift_options": ...,
            "config": DIT,
        },
    },
}
HALF = {  # of the autoencoder
    **dict.fromkeys(("channels", "latent_dim"), (WHOLE,)),
    **dict.fromkeys(("c_mults", "strides"), (WHOLES,)),
    "use_snake": (True,),
    "antialias_activation": (None, False),
}
DECODER = {
    **HALF,
    "out_channels": (WHOLE,),
    "use_nearest_upsample": (None, False),
    "final_tanh": (False,),  # absent would mean True
}
OUTER = {"type": ("oobleck",), "requires_grad": ...}
AUTOENCODER = {
    "type": ("autoencoder",),
    "scale": (None, 1),
    **dict.fromkeys(("iterate_batch", "model_half", "chunked", "enable_grad"), ...),
    "config": {
        **dict.fromkeys(("latent_dim", "downsampling_ratio", "io_channels"), (WHOLE,)),
        "encoder": {**OUTER, "config": {**HALF, "in_channels": (WHOLE,)}},
        "decoder": {**OUTER, "config": DECODER},
        "bottleneck": {"type": ("vae",), "config": (None, {})},
    },
}
CONDITIONERS = {
    "t5": {
        "t5_model_name": (None, "t5-base"),  # absent means that, too
        "max_length": (None, WHOLE),
        "enable_grad": ...,
        "project_out": (None, False),
    },
    "number": {"min_val": (0,), "max_val": (NUMBER,), "fourier_features_type": (None, "learned")},
}


@dataclass(frozen=True)
class StableAudioConfig:
    """What a `model_config.json` says, in our terms.

    Attributes:
        dit: sizes of the transformer.
        codec: sizes of the autoencoder, None if it has none.
        text: how prompts and lengths reach the transformer.
        seconds_id: its name for the length in seconds.
    """

    dit: DiTConfig
    codec: OobleckConfig | None
    text: TextConfig
    seconds_id: str

    @property
    def preset(self) -> Preset:
        """`paper`, with the sizes of this checkpoint.

        Raises:
            LmdError: it has no autoencoder.
        """
        if self.codec is None:
            raise LmdError("a checkpoint without an autoencoder", "one with it", "Pick another.")
        return replace(PRESETS["paper"], dit=self.dit, codec=self.codec, text=self.text)


def problems(values: Any, rules: Mapping[str, Any], where: str) -> list[str]:
    """Each key of a section that is unknown, missing or asks for something not built here."""
    if not isinstance(values, dict):
        return [f"{where} {values!r:.40} (a section is expected)"]
    found = [f"unknown key {where}.{key}" for key in sorted(set(values) - set(rules))]
    for key, rule in rules.items():
        value, place = values.get(key), f"{where}.{key}".removeprefix(".")
        if isinstance(rule, dict):
            found += problems(values.get(key, {}), rule, place)
        elif rule is not ... and not any(_fits(value, allowed) for allowed in rule):
            wanted = " or ".join(
                allowed if str(allowed) in CHECKS else json.dumps(allowed)
                for allowed in rule
                if allowed is not None
            )
            found.append(f"{place} {json.dumps(value):.40} ({wanted} is expected)")
    return found


def _fits(value: Any, allowed: Any) -> bool:
    return CHECKS[allowed](value) if str(allowed) in CHECKS else value == allowed


def parse_config(raw: Any) -> StableAudioConfig:
    """Translate a `model_config.json`.

    Raises:
        LmdError: a model of another kind, keys that are unknown or missing, sizes that do not fit
            together.
    """
    found = problems(raw, RULES, "")
    if not found:
        model, conditioning = raw["model"], raw["model"]["conditioning"]["configs"]
        if model.get("pretransform"):
            found += problems(model["pretransform"], AUTOENCODER, "pretransform")
        for entry in conditioning:
            kind = entry.get("type") if isinstance(entry, dict) else None
            parts = CONDITIONERS.get(str(kind), {})
            rules = {"id": ..., "type": tuple(CONDITIONERS), "config": parts}
            found += problems(entry, rules, "conditioning.configs")
    if found:
        raise LmdError(
            f"{CONFIG_FILE} with {'; '.join(found)}",
            "a model of Stable Audio Open Small's kind",
            "Another kind of model cannot be loaded; check the spelling.",
        )
    dit, ff = model["diffusion"]["config"], model["diffusion"]["config"].get("ff_kwargs", {})
    sizes = {
        "latent_dim": dit["io_channels"],
        "width": dit["embed_dim"],
        "depth": dit["depth"],
        "n_heads": dit["num_heads"],
        "text_dim": dit["cond_token_dim"],
        "global_dim": dit["global_cond_dim"],
        "ff_mult": ff.get("mult", 4),
    }
    given = {entry["type"]: entry["config"] for entry in conditioning}
    names = {entry["type"]: entry.get("id") for entry in conditioning}
    ids = [names.get(kind) for kind in CONDITIONERS]  # the prompt's and the length's
    cond_dim = model["conditioning"]["cond_dim"]
    _must_agree(
        {
            "conditioning.configs' types": ([e["type"] for e in conditioning], list(CONDITIONERS)),
            "cross_attention_cond_ids": (model["diffusion"]["cross_attention_cond_ids"], ids),
            "global_cond_ids": (model["diffusion"]["global_cond_ids"], ids[1:]),
            "input_add_ids": ((model["diffusion"].get("input_add_ids", ADDED) or [])[:2], ADDED),
            "cond_token_dim": (dit["cond_token_dim"], cond_dim),
            "global_cond_dim": (dit["global_cond_dim"], cond_dim),
            "model.io_channels": (model["io_channels"], dit["io_channels"]),
        }
    )
    text = {
        "encoder": "t5-base",
        "n_tokens": given["t5"].get("max_length", 128),
        "dim": cond_dim,
        "max_seconds": float(given["number"]["max_val"]),
    }
    codec = (
        _parse_codec(model["pretransform"]["config"], raw) if model.get("pretransform") else None
    )
    return StableAudioConfig(
        from_dict(DiTConfig, sizes), codec, from_dict(TextConfig, text), ids[1]
    )


def _parse_codec(config: dict[str, Any], raw: dict[str, Any]) -> OobleckConfig:
    """The autoencoder's sizes; both halves must be mirror images."""
    encoder, decoder = config["encoder"]["config"], config["decoder"]["config"]
    sizes = {name: decoder[name] for name in ("channels", "c_mults", "strides", "latent_dim")}
    sizes |= {"sample_rate": raw["sample_rate"], "audio_channels": decoder["out_channels"]}
    built, latent_dim = from_dict(OobleckConfig, sizes), raw["model"]["io_channels"]
    mirrored = {n: (encoder[n], decoder[n]) for n in ("channels", "c_mults", "strides")}
    _must_agree(
        {
            **{f"encoder.{name}": pair for name, pair in mirrored.items()},
            "encoder.in_channels": (encoder["in_channels"], decoder["out_channels"]),
            "encoder.latent_dim": (encoder["latent_dim"], 2 * latent_dim),
            "decoder.latent_dim": (decoder["latent_dim"], latent_dim),
            "pretransform.latent_dim": (config["latent_dim"], latent_dim),
            "pretransform.io_channels": (config["io_channels"], decoder["out_channels"]),
            "downsampling_ratio": (config["downsampling_ratio"], built.samples_per_frame),
        }
    )
    return built


def _must_agree(pairs: Mapping[str, tuple[Any, Any]]) -> None:
    """Refuse a config whose parts contradict each other, all of it at once."""
    wrong = {name: pair for name, pair in pairs.items() if pair[0] != pair[1]}
    if wrong:
        raise LmdError(
            ", ".join(f"{name} {found}" for name, (found, _) in wrong.items()),
            ", ".join(f"{expected}" for _, expected in wrong.values()),
            f"Check {CONFIG_FILE}.",
        )
