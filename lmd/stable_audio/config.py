"""The config of a stable-audio-tools model in our terms.

Its sizes are read first. Then everything it says is held against what a model of these sizes says
that our code computes: nothing is taken to be the default in silence.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from lmd.config import PRESETS, DiTConfig, OobleckConfig, Preset, TextConfig, from_dict
from lmd.errors import LmdError

CONFIG_FILE = "model_config.json"
ADDED = ["inpaint_mask", "inpaint_masked_input"]  # what the input-add projection reads first
CODEC = "model.pretransform.config.decoder.config."
DIT = "model.diffusion.config."
Rules = Mapping[str, Any]  # see `problems`


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


def parse_config(raw: Any) -> StableAudioConfig:
    """Translate a `model_config.json`.

    Raises:
        LmdError: a model of another kind, keys that are unknown or missing, sizes that do not fit
            together.
    """
    sizes = {
        "latent_dim": _at(raw, DIT + "io_channels"),
        "width": _at(raw, DIT + "embed_dim"),
        "depth": _at(raw, DIT + "depth"),
        "n_heads": _at(raw, DIT + "num_heads"),
        "text_dim": _at(raw, DIT + "cond_token_dim"),
        "global_dim": _at(raw, DIT + "global_cond_dim"),
        "ff_mult": _at(raw, DIT + "ff_kwargs.mult", 4),
    }
    dit, codec = from_dict(DiTConfig, sizes), None
    if raw["model"].get("pretransform"):
        names = ("channels", "c_mults", "strides", "latent_dim")
        of_codec = {name: _at(raw, CODEC + name) for name in names}
        of_codec["audio_channels"] = _at(raw, CODEC + "out_channels")
        codec = from_dict(OobleckConfig, of_codec | {"sample_rate": _at(raw, "sample_rate")})
    conditions = _at(raw, "model.conditioning.configs")
    kinds = [_at(entry, "type") for entry in conditions] if isinstance(conditions, list) else None
    if kinds != ["t5", "number"]:
        _refuse([f"conditioning.configs of the types {kinds} (['t5', 'number'] are expected)"])
    ids = [_at(entry, "id") for entry in conditions]
    given = {
        "n_tokens": _at(conditions[0], "config.max_length", 128),
        "max_seconds": _at(conditions[1], "config.max_val"),
        "dim": dit.text_dim,
    }
    text = from_dict(TextConfig, given)
    found = problems(raw, _model_rules(dit, codec, ids), "")
    for entry, rules in zip(conditions, CONDITIONS, strict=True):
        found += problems(entry, rules, "conditioning.configs")
    added = _at(raw, "model.diffusion.input_add_ids", ADDED)
    if not isinstance(added, list) or added[: len(ADDED)] != ADDED:
        found.append(f"input_add_ids {added!r:.80} ({ADDED} are expected first)")
    if found:
        _refuse(found)
    return StableAudioConfig(dit, codec, replace(text, max_seconds=float(text.max_seconds)), ids[1])


def _at(section: Any, path: str, default: Any = None) -> Any:
    """What a section says at that path of keys; refused if there is neither that nor a default."""
    for name in path.split("."):
        if not isinstance(section, dict) or name not in section:
            return default if default is not None else _refuse([f"no {path}"])
        section = section[name]
    return section


def _refuse(found: list[str]) -> None:
    raise LmdError(
        f"{CONFIG_FILE} with {'; '.join(found)}",
        "a model of Stable Audio Open Small's kind",
        "Another kind of model cannot be loaded; check the spelling.",
    )


def problems(values: Any, rules: Rules, where: str) -> list[str]:
    """Each key of a section that is unknown, missing or asks for something not built here.

    Args:
        values: the section.
        rules: for every key the rules of a section, or a tuple of the values that mean what our
            code computes (None: absent is fine; int: any positive number), or `...`: it changes
            nothing in the networks, or is checked apart.
        where: the section's name.
    """
    if not isinstance(values, dict):
        return [f"{where} {values!r:.40} (a section is expected)"]
    found = [f"unknown key {where}.{key}" for key in sorted(set(values) - set(rules))]
    for key, rule in rules.items():
        value, place = values.get(key), f"{where}.{key}".removeprefix(".")
        if isinstance(rule, dict):
            found += problems(values.get(key, {}), rule, place)
        elif rule is not ... and value not in rule:
            if int in rule and type(value) is int and value > 0:
                continue
            wanted = [a if a is int else json.dumps(a) for a in rule if a is not None]
            expected = " or ".join("a whole number" if a is int else a for a in wanted)
            found.append(f"{place} {json.dumps(value):.40} ({expected} is expected)")
    return found


def _model_rules(dit: DiTConfig, codec: OobleckConfig | None, ids: list[str]) -> Rules:
    """What a model of these sizes may say."""
    transformer = {
        **dict.fromkeys(("embed_dim", "depth", "num_heads", "io_channels"), ...),
        **dict.fromkeys(("cond_token_dim", "postpend", "input_add_dim", "input_add_dims"), ...),
        **dict.fromkeys(("diffusion_objective", "zero_init_branch_outputs"), ...),
        "global_cond_dim": (dit.text_dim,),
        "ff_kwargs": {
            "mult": ...,
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
    diffusion = {
        "type": ("dit",),
        "diffusion_objective": ("rectified_flow", "rf_denoiser"),
        "cross_attention_cond_ids": (ids,),
        "global_cond_ids": (ids[1:],),
        "input_add_ids": ...,
        **dict.fromkeys(("prepend_cond_ids", "input_concat_ids"), (None, [])),
        "distribution_shift_options": ...,
        "config": transformer,
    }
    model = {
        "io_channels": (dit.latent_dim,),
        "pretransform": _codec_rules(codec, dit.latent_dim) if codec else ...,
        "conditioning": {"configs": ..., "cond_dim": (dit.text_dim,), "default_keys": ...},
        "diffusion": diffusion,
    }
    return {
        "model_type": ("diffusion_cond", "diffusion_cond_inpaint"),
        **dict.fromkeys(("sample_size", "sample_rate"), (int,)),
        "audio_channels": (None, int),
        "training": ...,
        "model": model,
    }


def _codec_rules(codec: OobleckConfig, latent_dim: int) -> Rules:
    """What an autoencoder of these sizes may say; its halves are mirror images."""
    half = {
        "channels": (codec.channels,),
        "c_mults": (list(codec.c_mults),),
        "strides": (list(codec.strides),),
        "use_snake": (True,),
        "antialias_activation": (None, False),
    }
    decoder = {
        "out_channels": ...,
        "latent_dim": (latent_dim,),
        "use_nearest_upsample": (None, False),
        "final_tanh": (False,),  # absent would mean True
    }
    encoder = {"in_channels": (codec.audio_channels,), "latent_dim": (2 * latent_dim,)}
    outer = {"type": ("oobleck",), "requires_grad": ...}
    return {
        "type": ("autoencoder",),
        "scale": (None, 1),
        **dict.fromkeys(("iterate_batch", "model_half", "chunked", "enable_grad"), ...),
        "config": {
            "latent_dim": (latent_dim,),
            "downsampling_ratio": (codec.samples_per_frame,),
            "io_channels": (codec.audio_channels,),
            "encoder": {**outer, "config": {**half, **encoder}},
            "decoder": {**outer, "config": {**half, **decoder}},
            "bottleneck": {"type": ("vae",), "config": (None, {})},
        },
    }


PROMPT = {
    "t5_model_name": (None, "t5-base"),  # absent means that, too
    "max_length": ...,
    "enable_grad": ...,
    "project_out": (None, False),
}
SECONDS = {"min_val": (0,), "max_val": ..., "fourier_features_type": (None, "learned")}
CONDITIONS = [{"id": ..., "type": ..., "config": rules} for rules in (PROMPT, SECONDS)]
