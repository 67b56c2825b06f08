import json
import pickle
import shutil
from copy import deepcopy

import pytest
import torch
from safetensors.torch import load_file, save_file

from lmd.__main__ import main
from lmd.checkpoint import load_codec, load_model, read_header
from lmd.codec.oobleck import build_reference
from lmd.config import PRESETS, TextConfig
from lmd.errors import LmdError
from lmd.model.dit import Condition
from lmd.model.live_model import LiveModel
from lmd.stable_audio.config import StableAudioConfig, parse_config
from lmd.stable_audio.weights import load_stable_audio, stable_audio_name
from lmd.training.run import start_model

OUTPUTS = {"velocity", "velocity_cfg4", "seconds_embed", "encoder_out", "decoder_out"}
LAYER = "model.model.transformer.layers.0."


@pytest.fixture
def folder(fixtures, tmp_path):
    """A copy of the reference folder that a test may change."""
    return shutil.copytree(fixtures / "parity", tmp_path / "parity")


def edit_config(folder, change):
    raw = json.loads((folder / "model_config.json").read_text())
    change(raw)
    (folder / "model_config.json").write_text(json.dumps(raw))


def edit_weights(folder, change, file="model.safetensors"):
    tensors = load_file(folder / file)
    tensors = change(tensors) or tensors
    save_file({k: v.contiguous().clone() for k, v in tensors.items()}, folder / file)


def run(folder, *options):
    return main(["parity", str(folder), *options])


def test_every_reference_output_is_met(fixtures, tmp_path):
    path = tmp_path / "parity.json"
    assert run(fixtures / "parity", "--json", str(path)) == 0
    report = json.loads(path.read_text())
    assert {row["name"] for row in report["rows"]} == OUTPUTS
    for row in report["rows"]:
        assert row["max_abs_expected"] > 0.3
        assert row["max_abs_diff"] < 1e-5  # measured: at most 1.3e-6 (the command asks for 1e-4)
    assert report["ok"] is True


def test_the_table_names_every_output_and_json_can_go_to_standard_output(folder, capsys):
    run(folder)
    table = capsys.readouterr().out
    assert all(name in table for name in OUTPUTS)
    run(folder, "--json", "-")
    assert json.loads(capsys.readouterr().out)["ok"] is True


CORRUPTIBLE = {
    "velocity": LAYER + "self_attn.to_qkv.weight",
    "velocity_cfg4": LAYER + "cross_attn.to_kv.weight",
    "seconds_embed": "conditioner.conditioners.seconds_total.embedder.embedding.1.bias",
    "encoder_out": "pretransform.model.encoder.layers.1.layers.0.layers.1.weight_g",
    "decoder_out": "pretransform.model.decoder.layers.2.layers.0.beta",
}


@pytest.mark.parametrize("output", CORRUPTIBLE)
def test_a_corrupted_weight_makes_the_command_exit_1(folder, output, capsys):
    def corrupt(tensors):
        tensors[CORRUPTIBLE[output]][0] += 0.5

    edit_weights(folder, corrupt)
    assert run(folder) == 1
    assert output in capsys.readouterr().err


def test_inv_freq_is_taken_from_the_file(folder, capsys):
    name = "model.model.transformer.rotary_pos_emb.inv_freq"
    frequencies = 1e6 ** (-torch.arange(16) / 16)
    edit_weights(folder, lambda tensors: tensors.update({name: frequencies}))
    assert run(folder) == 1  # the expected outputs were made with base 10,000
    assert "velocity" in capsys.readouterr().err
    loaded = load_stable_audio(folder)
    assert torch.equal(loaded.model.dit.rope.inv_freq, frequencies)
    assert abs(loaded.config.dit.rope_base - 1e6) < 1e2


def test_a_lightning_checkpoint_with_split_projections_gives_the_same(folder):
    def dress(tensors):
        dressed = {}
        for name, tensor in tensors.items():
            if name.endswith("self_attn.to_qkv.weight"):
                stem = "diffusion." + name.removesuffix("to_qkv.weight")
                dressed[stem + "to_q.weight"] = tensor[:64].clone()
                dressed[stem + "to_kv.weight"] = tensor[64:].clone()
            else:
                dressed["diffusion." + name] = tensor
        return dressed

    dressed = dress(load_file(folder / "model.safetensors"))
    (folder / "model.safetensors").unlink()
    torch.save({"state_dict": dressed, "epoch": 3}, folder / "model.ckpt")
    assert run(folder) == 0


def test_an_input_add_projection_and_further_controls_are_loaded(folder):
    weight = torch.randn(64, 1 + 8 + 9)  # mask, latents, and nine further channels
    name = "model.model.to_input_add_embed.weight"
    edit_weights(folder, lambda tensors: tensors.update({name: weight}))
    loaded = load_stable_audio(folder)
    assert loaded.fresh == ()
    assert torch.equal(loaded.model.dit.to_input_add.weight, weight)
    assert sum(control.channels for control in loaded.config.dit.controls) == 9
    assert run(folder) == 0


def test_a_stock_model_gets_an_input_add_of_zeros(fixtures):
    loaded = load_stable_audio(fixtures / "parity")
    assert loaded.fresh == ("dit.to_input_add.weight",)
    assert not loaded.model.dit.to_input_add.weight.any()


def test_unmatched_keys_are_all_listed_and_refused_unless_lenient(folder, capsys):
    extra = {"losses.0.weight": torch.zeros(1), LAYER + "novel.weight": torch.zeros(1)}
    extra["pretransform.model.quantizer.weight"] = torch.zeros(2)
    edit_weights(folder, lambda tensors: tensors.update(extra))
    assert run(folder) == 2
    message = capsys.readouterr().err
    assert all(name in message for name in extra)
    assert run(folder, "--lenient") == 0
    assert load_stable_audio(folder, strict=False).unmatched == tuple(sorted(extra))


def test_missing_and_misshapen_weights_are_all_listed(folder):
    def spoil(tensors):
        del tensors[LAYER + "ff.ff.2.bias"]
        del tensors["pretransform.model.decoder.layers.0.bias"]
        tensors["model.model.to_cond_embed.0.weight"] = torch.zeros(64, 25)

    edit_weights(folder, spoil)
    with pytest.raises(LmdError) as refusal:
        load_stable_audio(folder, strict=False)
    for part in (
        "dit.blocks.0.ff.to_out.bias",
        "codec.decoder.conv1.bias",
        "to_cond_embed.0.weight (64, 25) instead of (64, 24)",
    ):
        assert part in str(refusal.value)


def test_a_layer_norm_with_a_shift_is_refused(folder):
    edit_weights(folder, lambda tensors: {**tensors, LAYER + "pre_norm.beta": torch.ones(64)})
    with pytest.raises(LmdError, match=r"layers\.0\.pre_norm\.beta"):
        load_stable_audio(folder)


UNSUPPORTED = {
    "another kind": lambda raw: raw.update(model_type="autoencoder"),
    "v objective": lambda raw: raw["model"]["diffusion"].update(diffusion_objective="v"),
    "adaLN": lambda raw: _dit(raw).update(global_cond_type="adaLN"),
    "no qk norm": lambda raw: _dit(raw).pop("attn_kwargs"),
    "misspelt": lambda raw: _dit(raw).update(dpeth=3),
    "tanh by default": lambda raw: _decoder(raw).pop("final_tanh"),
    "no snake": lambda raw: _decoder(raw).update(use_snake=False),
    "quantizer": lambda raw: raw["model"]["pretransform"]["config"].update(
        bottleneck={"type": "rvq"}
    ),
    "scaled latents": lambda raw: raw["model"]["pretransform"].update(scale=0.5),
    "two numbers": lambda raw: raw["model"]["conditioning"]["configs"].append(
        {"id": "seconds_start", "type": "number", "config": {"min_val": 0, "max_val": 5}}
    ),
    "no strides": lambda raw: _decoder(raw).pop("strides"),
    "other mirror": lambda raw: _decoder(raw).update(strides=[4, 4, 2]),
    "other latents": lambda raw: raw["model"].update(io_channels=9),
    "other condition": lambda raw: raw["model"]["conditioning"].update(cond_dim=25),
    "another T5": lambda raw: _prompt(raw).update(t5_model_name="google/flan-t5-base"),
    "words for numbers": lambda raw: raw.update(sample_size="x"),
    "a rate in words": lambda raw: raw.update(sample_rate="abc"),
    "a width in words": lambda raw: _dit(raw).update(embed_dim="x"),
    "no channels": lambda raw: _dit(raw).update(io_channels=0),
    "yes for a number": lambda raw: _dit(raw).update(depth=True),
    "no list of conditions": lambda raw: raw["model"]["conditioning"].update(configs=None),
    "no conditions' names": lambda raw: raw["model"]["diffusion"].update(global_cond_ids=None),
    "no added names": lambda raw: raw["model"]["diffusion"].update(input_add_ids=None),
    "strides in words": lambda raw: _decoder(raw).update(strides=["2", 4, 4]),
    "no end of time": lambda raw: _seconds(raw).update(max_val=float("inf")),
    "no tokens": lambda raw: _prompt(raw).update(max_length=0),
    "a number for a model": lambda raw: raw.update(model=3),
    "ten million blocks": lambda raw: _dit(raw).update(depth=10**7),
    "a width of forty thousand": lambda raw: _dit(raw).update(embed_dim=40_000, num_heads=100),
    "a wide autoencoder": lambda raw: [half.update(channels=40_000) for half in _halves(raw)],
}


def _dit(raw):
    return raw["model"]["diffusion"]["config"]


def _halves(raw):
    autoencoder = raw["model"]["pretransform"]["config"]
    return [autoencoder[name]["config"] for name in ("encoder", "decoder")]


def _prompt(raw):
    return raw["model"]["conditioning"]["configs"][0]["config"]


def _seconds(raw):
    return raw["model"]["conditioning"]["configs"][1]["config"]


def _decoder(raw):
    return raw["model"]["pretransform"]["config"]["decoder"]["config"]


@pytest.mark.parametrize("change", UNSUPPORTED.values(), ids=UNSUPPORTED.keys())
def test_what_is_not_built_is_refused(folder, change, capsys):
    edit_config(folder, change)
    assert run(folder) == 2
    assert "found" in capsys.readouterr().err


class RunsCode:
    def __reduce__(self):
        return (open, (str(self.path), "w"))

    def __init__(self, path):
        self.path = path


def test_a_pickle_that_would_run_code_is_refused_and_does_not_run(folder):
    (folder / "model.safetensors").unlink()
    trap = RunsCode(folder / "ran")
    (folder / "model.ckpt").write_bytes(pickle.dumps({"state_dict": trap}))
    with pytest.raises(LmdError, match="could run code"):
        load_stable_audio(folder)
    assert not trap.path.exists()
    pickle.loads((folder / "model.ckpt").read_bytes())["state_dict"].close()
    assert trap.path.exists()  # the trap works


@pytest.mark.parametrize("n_bytes", [0, 9, 5000])
@pytest.mark.parametrize("file", ["model.safetensors", "expected.safetensors", "model.ckpt"])
def test_a_truncated_file_is_refused(folder, file, n_bytes):
    if file == "model.ckpt":
        torch.save(load_file(folder / "model.safetensors"), folder / file)
        (folder / "model.safetensors").unlink()
    (folder / file).write_bytes((folder / file).read_bytes()[:n_bytes])
    assert run(folder) == 2


def test_a_folder_without_what_is_needed_is_refused(folder, tmp_path, capsys):
    assert run(tmp_path / "nowhere") == 2
    (folder / "expected.safetensors").unlink()
    assert run(folder) == 2
    for text in ("{", "[" * 100_000):
        (folder / "model_config.json").write_text(text)
        assert run(folder) == 2
        assert "not JSON" in capsys.readouterr().err


def test_an_unknown_output_or_a_missing_input_is_refused(folder, capsys):
    def add(tensors):
        tensors["spectrogram"] = torch.zeros(1)

    edit_weights(folder, add, "expected.safetensors")
    assert run(folder) == 2
    assert "spectrogram" in capsys.readouterr().err

    def take(tensors):
        del tensors["spectrogram"], tensors["wave"]

    edit_weights(folder, take, "expected.safetensors")
    assert run(folder) == 2
    assert "wave" in capsys.readouterr().err


def test_outputs_of_another_shape_or_with_nan_do_not_pass(folder):
    def cut(tensors):
        tensors["velocity"] = tensors["velocity"][..., :-1].contiguous()
        tensors["decoder_out"][..., 5] = float("nan")

    edit_weights(folder, cut, "expected.safetensors")
    assert run(folder) == 1


@torch.no_grad()
def make_folder(folder, raw, seconds):
    """A folder of other sizes: random weights under their names, outputs of other code paths.

    The autoencoder's outputs are diffusers'. The transformer's are this project's own, so this
    checks that sizes and names are read, not the arithmetic, which the reference folder does.
    """
    config = parse_config(raw)
    model = LiveModel(config.dit, config.text.max_seconds)
    codec = build_reference(config.codec)
    for parameter in model.parameters():
        parameter.normal_(std=0.2)
    model.dit.to_input_add.weight.zero_()
    tensors = their_names(config, model.state_dict(), codec.state_dict())
    folder.mkdir()
    save_file({k: v.contiguous().clone() for k, v in tensors.items()}, folder / "model.safetensors")
    (folder / "model_config.json").write_text(json.dumps(raw))
    c, hop = config.dit.latent_dim, config.codec.samples_per_frame
    given = {
        "latents": torch.randn(1, c, 10),
        "t": torch.rand(1),
        "cross_attn_cond": torch.randn(1, 4, config.dit.text_dim),
        "global_cond": torch.randn(1, config.dit.global_dim),
        "seconds": seconds,
        "wave": torch.randn(1, config.codec.audio_channels, 12 * hop),
        "vae_latents": torch.randn(1, c, 12),
    }
    condition = Condition(given["cross_attn_cond"], given["global_cond"])
    expected = {
        "velocity": model(given["latents"], given["t"], condition),
        "seconds_embed": model.seconds(seconds),
        "encoder_out": codec.encoder(given["wave"]),
        "decoder_out": codec.decoder(given["vae_latents"]),
    }
    both = {name: tensor.contiguous() for name, tensor in (given | expected).items()}
    save_file(both, folder / "expected.safetensors")


def their_names(config, model, codec):
    """The state dicts of a model and a codec under stable-audio-tools' names."""
    flat = {k: v.flatten() if k.endswith((".alpha", ".beta")) else v for k, v in codec.items()}
    parts = {"model": model, "codec": flat}.items()
    return {stable_audio_name(f"{p}.{k}", config): v for p, part in parts for k, v in part.items()}


def test_weights_are_found_under_their_numbered_names():
    config = StableAudioConfig(PRESETS["paper"].dit, PRESETS["paper"].codec, TextConfig(), "length")
    names = {
        "codec.decoder.block.1.res_unit2.conv1.bias": "decoder.layers.2.layers.3.layers.1.bias",
        "codec.encoder.block.0.res_unit3.snake2.beta": "encoder.layers.1.layers.2.layers.2.beta",
        "codec.encoder.block.4.conv1.weight_v": "encoder.layers.5.layers.4.weight_v",
        "codec.decoder.snake1.alpha": "decoder.layers.6.alpha",
        "codec.decoder.conv2.weight_g": "decoder.layers.7.weight_g",
    }
    for ours, theirs in names.items():
        assert stable_audio_name(ours, config) == f"pretransform.model.{theirs}"


def test_folders_of_other_sizes_work(fixtures, tmp_path):
    raw = json.loads((fixtures / "parity" / "model_config.json").read_text())
    other = deepcopy(raw)
    other["model"]["io_channels"] = 4
    other["model"]["conditioning"]["cond_dim"] = 12
    other["model"]["conditioning"]["configs"][1] = {
        "id": "length",
        "type": "number",
        "config": {"min_val": 0, "max_val": 90},
    }
    diffusion = other["model"]["diffusion"]
    diffusion.update(cross_attention_cond_ids=["prompt", "length"], global_cond_ids=["length"])
    diffusion["config"].update(
        io_channels=4, embed_dim=128, depth=2, num_heads=1, cond_token_dim=12, global_cond_dim=12
    )
    diffusion["config"]["ff_kwargs"] = {"mult": 2}
    autoencoder = other["model"]["pretransform"]["config"]
    autoencoder.update(latent_dim=4, downsampling_ratio=16, io_channels=1)
    for half, key, latent in (("encoder", "in_channels", 8), ("decoder", "out_channels", 4)):
        autoencoder[half]["config"].update(
            {"channels": 6, "c_mults": [1, 3], "strides": [8, 2], "latent_dim": latent, key: 1}
        )
    seconds = torch.tensor([0.0, 45.0, 90.0, 200.0])  # the last one is clamped
    make_folder(tmp_path / "other", other, seconds)
    assert run(tmp_path / "other") == 0
    loaded = load_stable_audio(tmp_path / "other")
    assert loaded.config.dit.head_dim == 128
    assert loaded.config.text.max_seconds == 90
    assert torch.equal(*loaded.model.seconds(seconds)[2:])


def test_a_stock_config_of_stable_audio_open_small_gives_the_paper_preset(fixtures):
    raw = json.loads((fixtures / "parity" / "model_config.json").read_text())
    raw["model"]["io_channels"] = 64
    raw["model"]["conditioning"]["cond_dim"] = 768
    raw["model"]["diffusion"]["config"].update(
        io_channels=64,
        embed_dim=1024,
        depth=16,
        num_heads=8,
        cond_token_dim=768,
        global_cond_dim=768,
    )
    autoencoder = raw["model"]["pretransform"]["config"]
    autoencoder.update(latent_dim=64, downsampling_ratio=2048)
    for half, latent in (("encoder", 128), ("decoder", 64)):
        autoencoder[half]["config"].update(
            channels=128, c_mults=[1, 2, 4, 8, 16], strides=[2, 4, 4, 8, 8], latent_dim=latent
        )
    config = parse_config(raw)
    assert config.dit == PRESETS["paper"].dit
    assert config.codec == PRESETS["paper"].codec
    assert config.text == PRESETS["paper"].text


def test_a_converted_checkpoint_is_the_same_model_and_codec(fixtures, tmp_path, capsys):
    assert main(["convert", str(fixtures / "parity"), "--out", str(tmp_path)]) == 0
    theirs = load_stable_audio(fixtures / "parity")
    model, codec = (
        load_model(tmp_path / "base.safetensors"),
        load_codec(tmp_path / "codec.safetensors"),
    )
    for name, weight in theirs.model.state_dict().items():
        assert torch.equal(weight, model.state_dict()[name]), name
    latents = torch.randn(1, codec.latent_dim, 5, generator=torch.Generator().manual_seed(0))
    assert torch.equal(codec.decode(latents), theirs.codec.decode(latents))
    sizes = read_header(tmp_path / "base.safetensors").config
    started = start_model("finetune", sizes, tmp_path / "base.safetensors", seed=0)
    assert started.dit.to_input_add.weight.any()  # the context projection is initialised
    assert main(["convert", str(fixtures / "parity"), "--out", str(tmp_path)]) == 2
    assert "files that are not there yet" in capsys.readouterr().err


def test_what_a_checkpoint_says_of_prompt_and_length_is_kept_and_held_against_the_preset(
    folder, tmp_path
):
    def change(raw):
        _prompt(raw).update(max_length=128)
        _seconds(raw).update(max_val=512)

    sizes = load_stable_audio(folder).config.preset
    edit_config(folder, change)
    other = load_stable_audio(folder).config.preset
    assert (sizes.text.n_tokens, sizes.text.max_seconds) == (64, 256)
    assert (other.text.n_tokens, other.text.max_seconds) == (128, 512)
    assert main(["convert", str(folder), "--out", str(tmp_path / "converted")]) == 0
    for init in (folder, tmp_path / "converted" / "base.safetensors"):
        start_model("base", other, init, seed=0)
        differences = r"max_seconds 512.0 → 256.0, n_tokens 128 → 64"
        with pytest.raises(LmdError, match=differences):
            start_model("base", sizes, init, seed=0)


def test_a_stock_model_is_a_base_to_begin_with(fixtures, tmp_path):
    """`train finetune --init FOLDER`: its weights, and the context projection initialised."""
    sizes = load_stable_audio(fixtures / "parity").config.preset
    started = start_model("finetune", sizes, fixtures / "parity", seed=0)
    stock = load_stable_audio(fixtures / "parity").model
    assert torch.equal(started.dit.blocks[0].ff.to_out.weight, stock.dit.blocks[0].ff.to_out.weight)
    entering = stock.dit.project_in.weight @ (
        torch.eye(sizes.dit.latent_dim) + stock.dit.preprocess_conv.weight[..., 0]
    )
    assert torch.equal(started.dit.to_input_add.weight[:, 1 : 1 + sizes.dit.latent_dim], entering)
