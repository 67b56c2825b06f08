"""Weights between those of two files."""

import pytest
import torch
from engine import random_model
from interpolate import Options, interpolate, main

from lmd.checkpoint import codec_hash_of, load_tensors, read_header, save_checkpoint
from lmd.config import preset
from lmd.errors import LmdError


@pytest.fixture
def ends(tmp_path):
    """Two files of `tiny`, each with its weights as stored."""
    files = []
    for kind, seed in (("finetuned", 1), ("arc", 2)):
        path = tmp_path / f"{kind}.safetensors"
        weights = random_model(seed=seed).state_dict()
        save_checkpoint(path, weights, kind=kind, config=preset("tiny"), notes={"command": kind})
        files.append((path, weights))
    return files


def test_weights_lie_on_the_line_and_say_what_they_are(ends, tmp_path):
    (first, start), (second, end) = ends
    out = tmp_path / "between" / "arc.safetensors"
    second.with_suffix(".md").write_text("# arc\n\nAs it was trained.\n")
    learned = {"renditions": 7, "hours": 0.5, "latent_settings": {"codec": "1", "corpus": "c" * 64}}
    notes = {"command": "arc", "data": learned}
    save_checkpoint(second, end, kind="arc", config=preset("tiny"), notes=notes)
    assert main([str(first), str(second), "--share", "0.25", "--out", str(out)]) == 0
    found, header = load_tensors(out, "arc")
    assert found.keys() == end.keys()
    for name, tensor in found.items():
        expected = 0.75 * start[name] + 0.25 * end[name]
        torch.testing.assert_close(tensor.float(), expected, rtol=1e-3, atol=1e-5)
    assert (header.kind, header.config) == ("arc", preset("tiny"))
    assert header.notes["data"] == learned
    card = out.with_suffix(".md").read_text()
    assert f"| data | 7 sounds, 0.5 h, corpus `{'c' * 12}` |" in card
    for said in ("25% of the way", header.sha256, header.notes["command"], "As it was trained."):
        assert said in card
    assert "made by `finetuned`" in card
    assert "made by `arc`" in card


def line(first, second, share, out):
    interpolate(Options(first, second, out, share))


@pytest.mark.parametrize("share", [0.0, 1.0])
def test_the_ends_of_the_line_are_the_files(ends, share, tmp_path):
    out = tmp_path / "end.safetensors"
    line(ends[0][0], ends[1][0], share, out)
    found, _ = load_tensors(out, "arc")
    for name, tensor in ends[int(share)][1].items():
        torch.testing.assert_close(found[name].float(), tensor, rtol=1e-3, atol=1e-5)


def test_what_has_no_line_between_is_refused(ends, tmp_path):
    (first, _), (second, weights) = ends
    out = tmp_path / "out.safetensors"
    for share in (-0.1, 1.5, float("nan")):
        with pytest.raises(LmdError, match="0 to 1"):
            line(first, second, share, out)
    other = tmp_path / "other.safetensors"
    save_checkpoint(other, weights, kind="arc", config=preset("small"))
    with pytest.raises(LmdError, match="models of other sizes"):
        line(first, other, 0.5, out)
    learned_notes = [{"data": {"latent_settings": {"codec": digit * 64}}} for digit in "12"]
    apart = [tmp_path / f"learned-{digit}.safetensors" for digit in "12"]
    for path, notes in zip(apart, learned_notes, strict=True):
        save_checkpoint(path, weights, kind="arc", config=preset("tiny"), notes=notes)
    with pytest.raises(LmdError, match="latents of 2 codecs"):
        line(*apart, 0.5, out)
    assert not out.exists()
    for number, (start, end) in enumerate(((first, apart[1]), (apart[1], second))):
        known = tmp_path / f"known-{number}.safetensors"
        line(start, end, 0.5, known)
        assert codec_hash_of(read_header(known).notes) == "2" * 64
    for name in ("model", "model.ckpt", "model.md"):
        with pytest.raises(LmdError, match=r"a name that ends in \.safetensors"):
            line(first, second, 0.5, tmp_path / name)
        assert not (tmp_path / name).exists()
    card = tmp_path / "another.md"
    out.write_text("mine")
    card.write_text("of others")
    with pytest.raises(LmdError, match="not there yet"):
        line(first, second, 0.5, out)
    assert out.read_text() == "mine"
    with pytest.raises(LmdError, match="not there yet"):
        line(first, second, 0.5, card.with_suffix(".safetensors"))
    assert card.read_text() == "of others"
