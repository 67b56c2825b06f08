import json
import os
import pickle
import shutil
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save, save_file

from lmd.__main__ import main
from lmd.checkpoint import (
    build_model,
    load_bundle,
    load_codec,
    load_model,
    load_tensors,
    read_header,
    save_checkpoint,
)
from lmd.codec.base import Codec
from lmd.codec.oobleck import OobleckCodec, build_reference
from lmd.codec.spectral import SpectralCodec
from lmd.config import DiTConfig, OobleckConfig, preset
from lmd.data.encode import encoder_sha256
from lmd.errors import LmdError
from lmd.model.weights import tensors_sha256
from lmd.outputs import write_atomic
from lmd.pretrained import SHIPPED

TINY = preset("tiny")


@pytest.fixture
def model():
    """Random weights everywhere, zero-initialised layers included."""
    model = build_model(TINY)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_()
    return model.eval()


@pytest.fixture
def saved(model, tmp_path):
    path = tmp_path / "deep" / "base.safetensors"
    save_checkpoint(path, model.state_dict(), kind="base", config=TINY, notes={"steps": 3})
    return path


def velocity(model):
    condition = model.condition(torch.ones(1, 4, TINY.dit.text_dim), 11.0)
    return model(torch.ones(1, TINY.dit.latent_dim, 6), torch.tensor([0.5]), condition)


@torch.no_grad()
def test_a_loaded_model_gives_the_same_bits(saved, model):
    assert torch.equal(velocity(load_model(saved)), velocity(model))


def test_the_header_tells_everything_without_reading_the_weights(saved, model):
    header = read_header(saved)
    assert header.config == TINY
    assert (header.kind, header.notes, header.stored) == ("base", {"steps": 3}, "float32")
    assert len(header.sha256) == 64


def test_equal_content_gives_equal_bytes_in_another_process(tmp_path):
    program = (
        "import sys, torch; from lmd.checkpoint import *; from lmd.config import preset\n"
        "t = {f'w{i}': torch.full((2, 2), float(i)) for i in range(9)}\n"
        "save_checkpoint(sys.argv[1], t, kind='arc', config=preset('tiny'), notes={'a': 1, 'b': 2})"
    )
    paths = [tmp_path / f"{i}.safetensors" for i in range(2)]
    for hash_seed, path in enumerate(paths):
        environment = {**os.environ, "PYTHONHASHSEED": str(hash_seed)}
        subprocess.run([sys.executable, "-c", program, str(path)], check=True, env=environment)
    assert paths[0].read_bytes() == paths[1].read_bytes()


def test_half_storage_halves_the_file_and_loads_as_float32(model, tmp_path, saved):
    path = tmp_path / "half.safetensors"
    save_checkpoint(path, model.state_dict(), kind="base", config=TINY, stored="float16")
    assert path.stat().st_size < 0.6 * saved.stat().st_size
    loaded, exact = load_model(path).state_dict(), model.state_dict()
    assert {tensor.dtype for tensor in loaded.values()} == {torch.float32}
    for name, tensor in exact.items():
        if tensor.ndim < 2:  # norms, biases, rotary frequencies
            assert torch.equal(loaded[name], tensor)
        else:  # half precision rounds to 11 bits: relative error up to 2**-11
            assert torch.allclose(loaded[name], tensor, rtol=2**-11, atol=1e-7)


def test_a_write_that_fails_leaves_the_old_file_and_no_litter(saved, monkeypatch):
    before = saved.read_bytes()
    monkeypatch.setattr("os.replace", lambda *_: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError, match="disk full"):
        write_atomic(saved, b"new")
    assert saved.read_bytes() == before
    assert [path.name for path in saved.parent.iterdir()] == [saved.name]


def test_a_changed_byte_is_noticed(saved):
    content = bytearray(saved.read_bytes())
    content[-5] ^= 1
    saved.write_bytes(content)
    with pytest.raises(LmdError, match="not what was written"):
        load_model(saved)


@pytest.mark.parametrize("keep", [0, 7, 200, -1])
def test_a_truncated_file_is_refused(saved, keep):
    saved.write_bytes(saved.read_bytes()[:keep])
    with pytest.raises(LmdError, match="cut off"):
        load_model(saved)


def test_missing_unknown_and_misshapen_weights_are_all_listed(model, tmp_path):
    tensors = dict(model.state_dict())
    tensors["dit.surprise"] = tensors.pop("dit.project_in.weight")
    tensors["seconds.weights"] = torch.zeros(5)
    path = tmp_path / "base.safetensors"
    save_checkpoint(path, tensors, kind="base", config=TINY)
    with pytest.raises(LmdError) as refusal:
        load_model(path)
    for part in (
        "1 missing: dit.project_in.weight",
        "1 unknown: dit.surprise",
        "seconds.weights (5,) instead of (128,)",
    ):
        assert part in str(refusal.value)


def test_a_checkpoint_of_another_shape_is_refused(model, tmp_path):
    wider = replace(TINY, dit=DiTConfig(latent_dim=8, width=64, depth=2, n_heads=2, text_dim=16))
    path = tmp_path / "base.safetensors"
    save_checkpoint(path, model.state_dict(), kind="base", config=wider)
    with pytest.raises(LmdError, match="of another shape: dit"):
        load_model(path)


def test_another_kind_is_refused(saved, tmp_path):
    with pytest.raises(LmdError, match="kind 'base'; expected one of \\['codec'\\]"):
        load_codec(saved)
    with pytest.raises(LmdError, match="kind 'teacher'"):
        save_checkpoint(tmp_path / "x.safetensors", {}, kind="teacher", config=TINY)
    with pytest.raises(LmdError, match="a OobleckConfig for kind 'arc'"):
        save_checkpoint(tmp_path / "x.safetensors", {}, kind="arc", config=OobleckConfig())


def test_a_pickle_is_never_opened(tmp_path):
    path = tmp_path / "base.ckpt"
    path.write_bytes(pickle.dumps({"state_dict": {}}))
    with pytest.raises(LmdError, match=r"a \.ckpt file; expected a \.safetensors"):
        load_model(path)


def test_files_that_are_not_ours_are_refused_with_what_to_do(tmp_path):
    with pytest.raises(LmdError, match="no file"):
        load_model(tmp_path / "none.safetensors")
    foreign = tmp_path / "foreign.safetensors"
    save_file({"w": torch.zeros(1)}, foreign)
    with pytest.raises(LmdError, match="lmd convert"):
        read_header(foreign)


@pytest.mark.parametrize(
    "entry",
    [
        *('{"format":', "nope", "[]", "3", '{"format": 1}', '{"format": 1, "config_type": []}'),
        '{"format": 1, "config_type": "DiTConfig", "config": {}, "kind": "base"}',
        '{"format": 1, "config_type": "RecogniserConfig", "config": {}, "kind": "recogniser"}',
    ],
)
def test_a_header_that_is_not_ours_is_refused(tmp_path, entry):
    path = tmp_path / "a.safetensors"
    path.write_bytes(save({"a": torch.zeros(1)}, {"lmd": entry}))
    with pytest.raises(LmdError, match="entry is not ours"):
        read_header(path)


def change_header(path, place, value):
    """Overwrite one field of a header, however deep, and nothing else."""
    with safe_open(path, "pt") as file:
        header = json.loads(file.metadata()["lmd"])
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    *outer, last = place.split(".")
    fields = header
    for name in outer:
        fields = fields[name]
    fields[last] = value
    path.write_bytes(save(tensors, {"lmd": json.dumps(header)}))


def test_a_header_with_a_misspelt_key_is_refused(saved):
    change_header(saved, "config.dit.widht", 3)
    with pytest.raises(LmdError, match="widht"):
        read_header(saved)


WRONG = [
    *(("config.dit.depth", value) for value in (10**7, 0, -1, 2.0, True, "2", None, [2])),
    *(("config.window.context_frames", value) for value in (10**9, -192)),
    *(("config.dit.rope_base", value) for value in (float("nan"), float("inf"), 0, "1", None)),
    *(("config.codec.hop", value) for value in (0, 10**6, 1000)),
    *(("config.dit.controls", value) for value in (None, "abc", [3], [{"name": 3}], [{}] * 65)),
    *(("config", value) for value in (None, [], 3)),
    *(("notes", value) for value in (None, [], "none")),
    *(("kind", value) for value in (None, [], "teacher", "codec", "tagger")),
    *(("sha256", value) for value in (None, 3)),
    *(("format", value) for value in (None, 3, "2")),
    ("config.text.encoder", "bert"),
    ("config.text.dim", 17),
    ("config.codec.latent_dim", 9),
    ("config.codec.n_linear", 64),
    ("config.name", None),
]


@pytest.mark.parametrize(("place", "value"), WRONG)
def test_values_out_of_type_or_bounds_are_refused_when_a_header_is_read(saved, place, value):
    change_header(saved, place, value)
    with pytest.raises(LmdError, match="expected"):
        read_header(saved)


def test_deeply_nested_json_is_refused(tmp_path):
    path = tmp_path / "base.safetensors"
    for entry in ("[" * 100_000, '{"notes": ' * 100_000, '{"format": ' + "9" * 5000 + "}"):
        path.write_bytes(save({"a": torch.zeros(1)}, {"lmd": entry}))
        with pytest.raises(LmdError, match="entry is not ours"):
            read_header(path)


@pytest.mark.parametrize("case", ["bomb_depth", "bomb_window"])
def test_a_small_file_that_asks_for_all_memory_is_refused(fixtures, tmp_path, capsys, case):
    shutil.copy(SHIPPED / "codec.safetensors", tmp_path)
    shutil.copy(fixtures / "weights" / case / "arc.safetensors", tmp_path)
    wave = tmp_path / "x.wav"
    assert main(["stream", "piano", "--source", f"{tmp_path}:arc", "-o", str(wave)]) == 2
    assert "expected a whole number, 1 to" in capsys.readouterr().err
    assert not wave.exists()


def test_sizes_are_compared_with_the_tensors_before_anything_is_built(model, tmp_path, monkeypatch):
    """Without this, width 40,000 takes 256 GB."""
    wide = replace(TINY.dit, width=40_000, n_heads=100)
    path = tmp_path / "base.safetensors"
    sizes = replace(TINY, dit=wide)
    save_checkpoint(path, model.state_dict(), kind="base", config=sizes)
    places = []

    def noted(config):
        places.append(torch.get_default_device().type)
        return build_model(config)

    monkeypatch.setattr("lmd.checkpoint.build_model", noted)
    with pytest.raises(LmdError, match=r"of another shape: dit\..*, …"):
        load_model(path)
    assert places == ["meta"]


def test_the_digest_covers_the_config(saved):
    """A changed size that no shape shows is noticed, too."""
    change_header(saved, "config.dit.rope_base", 5000)
    with pytest.raises(LmdError, match="not what was written"):
        load_tensors(saved)


def test_files_of_the_first_format_still_load(saved, model):
    """They have a digest of the tensors alone, as stated on the cards of shipped weights."""
    change_header(saved, "format", 1)
    with pytest.raises(LmdError, match="not what was written"):
        load_tensors(saved)
    change_header(saved, "sha256", tensors_sha256(model.state_dict()))
    assert torch.equal(velocity(load_model(saved)), velocity(model))


@pytest.mark.parametrize("value", [float("nan"), 1e6])
def test_weights_that_would_not_be_finite_are_not_written(tmp_path, value):
    path = tmp_path / "base.safetensors"
    tensors = {"w": torch.full((2, 2), value)}
    with pytest.raises(LmdError, match="not finite"):
        save_checkpoint(path, tensors, kind="base", config=TINY, stored="float16")
    assert not path.exists()


def test_views_of_one_storage_can_be_saved(tmp_path):
    both = torch.arange(8.0).reshape(2, 4)
    path = tmp_path / "x.safetensors"
    save_checkpoint(path, {"a": both, "b": both.T}, kind="base", config=TINY)
    tensors, _ = load_tensors(path)
    assert torch.equal(tensors["b"], both.T)


@torch.no_grad()
def test_codecs_of_both_families_come_back_with_the_same_bits(tmp_path):
    config = OobleckConfig(latent_dim=4, channels=4, c_mults=(1, 2), strides=(2, 2))
    spectral = SpectralCodec(TINY.codec).eval()
    pairs = {
        "oobleck": (config, build_reference(config)),
        "spectral": (TINY.codec, spectral),
    }
    for name, (sizes, network) in pairs.items():
        path = tmp_path / f"{name}.safetensors"
        save_checkpoint(path, network.state_dict(), kind="codec", config=sizes)
        codec = load_codec(path)
        if name == "oobleck":
            assert load_codec(path, torch.bfloat16).dtype == torch.bfloat16
        assert isinstance(codec, Codec)
        latents = torch.randn(1, sizes.latent_dim, 12)
        original = OobleckCodec(network, config) if name == "oobleck" else spectral
        assert torch.equal(codec.decode(latents), original.decode(latents))


@torch.no_grad()
def test_a_bundle_holds_what_is_needed_to_be_heard(saved):
    codec = SpectralCodec(TINY.codec)
    path = saved.parent / "codec.safetensors"
    save_checkpoint(path, codec.state_dict(), kind="codec", config=TINY.codec)
    bundle = load_bundle(saved.parent, "base")
    assert bundle.preset == TINY
    assert bundle.text.encode([""]).shape == (1, TINY.text.n_tokens, TINY.text.dim)
    assert bundle.codec.latent_dim == bundle.model.config.latent_dim
    with pytest.raises(LmdError, match=r"no file .*arc"):
        load_bundle(saved.parent)


def test_a_bundle_of_a_codec_whose_latents_were_not_heard_is_refused(tmp_path):
    """The same sizes do not do; another decoder behind the same encoder does."""
    first, second = SpectralCodec(TINY.codec), SpectralCodec(TINY.codec)
    path = tmp_path / "codec.safetensors"

    def save(codec):
        save_checkpoint(path, codec.state_dict(), kind="codec", config=TINY.codec)
        return encoder_sha256(path)

    heard = save(first)
    notes = {"data": {"latent_settings": {"codec": heard}}}
    weights = build_model(TINY).state_dict()
    base = tmp_path / "base.safetensors"
    save_checkpoint(base, weights, kind="base", config=TINY, notes=notes)
    load_bundle(tmp_path, "base")
    assert save(second) != heard
    with pytest.raises(LmdError, match="another codec"):
        load_bundle(tmp_path, "base")
    second.encoder.load_state_dict(first.encoder.state_dict())
    assert save(second) == heard
    load_bundle(tmp_path, "base")


def test_a_bundle_of_a_model_and_another_codec_is_refused(saved, tmp_path):
    config = OobleckConfig(latent_dim=8, channels=4, c_mults=(1, 2), strides=(2, 2))
    save_checkpoint(saved.parent / "codec.safetensors", {}, kind="codec", config=config)
    with pytest.raises(LmdError, match="another codec"):
        load_bundle(saved.parent, "base")
