"""Latents: encoded, checked and repaired; windows that are arithmetic."""

import errno
import json
import os
import shutil
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import lightning as L
import numpy as np
import pandas as pd
import pytest
import torch
from corpus_fake import HOP, RATE, make_corpus
from torch import nn

from lmd.__main__ import main
from lmd.checkpoint import DECODER_SIZES, load_codec, save_checkpoint
from lmd.codec.oobleck import build_reference
from lmd.codec.spectral import SpectralCodec
from lmd.config import OobleckConfig, SpectralCodecConfig, preset
from lmd.corpus.captions import further_captions
from lmd.corpus.manifest import Corpus, write_manifest
from lmd.data.codec_fit import codec_error_db, expectation
from lmd.data.encode import (
    EncodeSettings,
    encode_corpus,
    encode_wave,
    encoder_sha256,
)
from lmd.data.latents import LatentWindows
from lmd.data.shards import LatentShards, map_shard, shard_fault
from lmd.errors import LmdError

DIM = 64


class MeanCodec(nn.Module):
    """A codec with a known answer: latent c of a frame is the mean of its c-th 16 samples."""

    sample_rate, channels, latent_dim, samples_per_frame = RATE, 1, DIM, HOP
    lookback_frames = lookahead_frames = 0
    offset = 0.25  # what silence is encoded as

    def encode(self, wave: torch.Tensor) -> torch.Tensor:
        """Means of 16 samples."""
        parts = wave.reshape(wave.shape[0], -1, DIM, HOP // DIM).mean(-1)
        return parts.transpose(1, 2) + self.offset

    def decode(self, latents: torch.Tensor) -> torch.Tensor:
        """Not needed here."""
        raise NotImplementedError


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Corpus:
    return make_corpus(tmp_path_factory.mktemp("corpus"))


def encode(corpus: Corpus, out: Path, **changes: object) -> list[str]:
    how = EncodeSettings(**{"stems": True, "rows_per_shard": 2, **changes})
    fabric = L.Fabric(accelerator="cpu", devices=1)
    return encode_corpus(corpus, MeanCodec(), out, how, fabric, "mean")


@pytest.fixture(scope="module")
def latents(corpus: Corpus, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("latents")
    encode(corpus, out)
    return out


def test_a_shard_holds_the_latents_of_mixes_and_stems(corpus: Corpus, latents: Path) -> None:
    shards = LatentShards(latents)
    assert len(shards.entries) == len(corpus) * 3
    assert {entry.voice for entry in shards.entries} == {-1, 0, 1}
    for entry in shards.entries:
        row = next(i for i, r in enumerate(corpus.rows) if r.name == entry.name)
        wave = corpus.wave(row) if entry.voice < 0 else corpus.stems(row)[entry.voice]
        wanted = encode_wave(MeanCodec(), torch.from_numpy(wave)[None])[0].T
        found = torch.from_numpy(np.array(shards.frames(entry))).float()
        assert found.shape == (-(-wave.shape[-1] // HOP), DIM)
        assert (found - wanted).abs().max() < 6e-4  # float16 of numbers up to 1.2; measured 4.9e-4


def test_index_and_captions_say_what_each_entry_is(latents: Path) -> None:
    entries = LatentShards(latents).entries
    assert entries[0].caption == "caption, number 0"
    assert "flute" in entries[1].caption
    assert entries[1].instruments == "flute"
    assert "tuba" in entries[2].caption
    assert entries[2].instruments == "tuba"


def test_a_rendition_is_asked_for_in_many_words(corpus: Corpus, latents: Path) -> None:
    """All captions of a mix are drawn in training; a stem, and someone's own music, has one."""
    windows = LatentWindows(latents, "train", 8, seed=3, kinds=("mix", "stem"))
    said: dict[str, set[str]] = {}
    for step in range(120):
        batch = windows.batch(step, range(4))
        for identity, caption in zip(batch["identity"], batch["caption"], strict=True):
            said.setdefault(identity.split("@")[0], set()).add(caption)
    assert windows.batch(7, range(4))["caption"] == windows.batch(7, range(4))["caption"]
    for entry in windows.entries:
        assert said[f"{entry.name}/{'mix' if entry.voice < 0 else entry.voice}"] == set(
            entry.captions
        )
        assert (len(entry.captions) > 4) == (entry.voice < 0)
    own = replace(corpus.rows[0], articulation="", caption="my song")
    assert further_captions(own, 7) == []
    fast = replace(corpus.rows[0], tempo_bpm=150.0)
    words = " ".join(further_captions(fast, 7))
    assert "150 BPM" in words or any(word in words for word in ("fast", "allegro", "lively"))


def test_captions_and_splits_that_changed_reach_the_index(corpus: Corpus, tmp_path: Path) -> None:
    encode(corpus, tmp_path / "latents")
    folder = tmp_path / "corpus"
    shutil.copytree(corpus.folder, folder)
    rows = [replace(row, caption=f"new {row.caption}", split="train") for row in corpus.rows]
    write_manifest(folder, rows)
    shard = tmp_path / "latents/shard-00000.safetensors"
    before = shard.stat().st_mtime_ns
    encode(Corpus(folder), tmp_path / "latents")
    entries = LatentShards(tmp_path / "latents").entries
    assert [e.caption for e in entries if e.voice < 0] == [row.caption for row in rows]
    assert {e.split for e in entries} == {"train"}
    assert shard.stat().st_mtime_ns == before


def test_encoding_again_touches_nothing(corpus: Corpus, latents: Path) -> None:
    before = {p.name: p.stat().st_mtime_ns for p in latents.glob("shard-*")}
    assert encode(corpus, latents) == []
    assert {p.name: p.stat().st_mtime_ns for p in latents.glob("shard-*")} == before


@pytest.mark.parametrize("damage", ["cut", "flipped", "side"])
def test_a_torn_shard_is_named_and_made_again(corpus: Corpus, tmp_path: Path, damage: str) -> None:
    encode(corpus, tmp_path)
    shard = tmp_path / "shard-00001.safetensors"
    whole = shard.read_bytes()
    if damage == "cut":
        shard.write_bytes(whole[:-7])
        with pytest.raises(LmdError, match="shard-00001"):
            map_shard(shard)
    elif damage == "flipped":
        shard.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    else:
        shard.with_suffix(".json").write_text('{"sha')
    with pytest.raises(LmdError, match=shard.name):
        LatentShards(tmp_path)
    messages = encode(corpus, tmp_path)
    assert len(messages) == 1
    assert shard.name in messages[0]
    assert shard.read_bytes() == whole
    assert shard_fault(shard) is None


def changed(folder: Path, column: str, value: object) -> None:
    """Give the second entry of an index another value."""
    table = pd.read_csv(folder / "index.csv", keep_default_na=False, dtype=str)
    table.loc[1, column] = str(value)
    table.to_csv(folder / "index.csv", index=False)


@pytest.mark.parametrize(
    ("column", "value"),
    [
        ("start_frame", -1), ("start_frame", 10**9), ("n_frames", 0), ("n_frames", 10**6),
        ("n_frames", -3), ("duration_s", "nan"), ("duration_s", -1.0), ("n_frames", "x"),
    ],
)  # fmt: skip
def test_an_entry_outside_its_shard_is_refused_with_its_line(
    latents: Path, tmp_path: Path, column: str, value: object
) -> None:
    folder = shutil.copytree(latents, tmp_path / "latents")
    changed(folder, column, value)
    with pytest.raises(LmdError, match=r"index\.csv, line 3: "):
        LatentShards(folder)


def test_an_index_of_before_there_were_further_captions_is_read(
    latents: Path, tmp_path: Path
) -> None:
    folder = shutil.copytree(latents, tmp_path / "latents")
    table = pd.read_csv(folder / "index.csv", keep_default_na=False, dtype=str)
    table.drop(columns="also").to_csv(folder / "index.csv", index=False)
    assert LatentShards(folder).entries == [
        replace(entry, also="") for entry in LatentShards(latents).entries
    ]


@pytest.mark.parametrize("damage", ["gone", "cut", "flipped", "no side", "torn side", "other"])
def test_damaged_latents_are_refused_before_anything_is_trained(
    latents: Path, tmp_path: Path, damage: str
) -> None:
    folder = shutil.copytree(latents, tmp_path / "latents")
    shard, other = folder / "shard-00001.safetensors", folder / "shard-00000.safetensors"
    whole = shard.read_bytes()
    changes = {
        "gone": shard.unlink,
        "cut": lambda: shard.write_bytes(whole[:-100]),
        "flipped": lambda: shard.write_bytes(whole[:-50] + bytes([whole[-50] ^ 1]) + whole[-49:]),
        "no side": shard.with_suffix(".json").unlink,
        "torn side": lambda: shard.with_suffix(".json").write_text("{"),
        "other": lambda: shard.write_bytes(other.read_bytes()),
    }
    LatentWindows(folder, window_frames=8)
    changes[damage]()
    with pytest.raises(LmdError, match="shard-00001"):
        LatentWindows(folder, window_frames=8)


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", '{"latent_dim": 64, "silence": [0, 1]}'])
def test_torn_settings_of_latents_are_refused(latents: Path, tmp_path: Path, text: str) -> None:
    folder = shutil.copytree(latents, tmp_path / "latents")
    (folder / "latents.json").write_text(text)
    with pytest.raises(LmdError, match=r"latents\.json"):
        LatentShards(folder)
    index = folder / "index.csv"
    index.write_text(index.read_text()[:-20])
    with pytest.raises(LmdError, match=r"index\.csv, line \d+: "):
        LatentShards(folder)


def test_the_encoding_says_what_to_expect_of_the_codec(
    corpus: Corpus, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    class Perfect(MeanCodec):
        def encode(self, wave: torch.Tensor) -> torch.Tensor:
            self.wave = wave
            return super().encode(wave)

        def decode(self, latents: torch.Tensor) -> torch.Tensor:
            return self.wave * self.gain

    codec = Perfect()
    for gain_db in (0.0, -3.0):
        codec.gain = 10 ** (gain_db / 20)
        error_db = codec_error_db(codec, corpus)
        assert error_db == pytest.approx(abs(gain_db), abs=0.05)
        told = expectation(error_db, corpus.folder)
        assert ("lmd train codec --data" in told) == (gain_db != 0)
    path = tmp_path / "codec.safetensors"
    config, tensors = codec_parts("spectral")
    save_checkpoint(path, tensors, kind="codec", config=config)
    words = ["--data", str(corpus.folder), "--codec", str(path), "--out", str(tmp_path / "out")]
    assert main(["data", "encode", *words, "--accelerator", "cpu", "--devices", "1"]) == 0
    assert "dB of log-mel error" in capsys.readouterr().out


def test_latents_are_not_written_into_their_corpus_nor_on_a_full_disk(
    corpus: Corpus, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(LmdError, match="two places"):
        encode(corpus, corpus.folder)
    monkeypatch.setattr("shutil.disk_usage", lambda _: SimpleNamespace(free=10))
    with pytest.raises(LmdError, match="GB free"):
        encode(corpus, tmp_path / "latents")
    assert not (tmp_path / "latents").exists()


@pytest.mark.parametrize("error", [errno.ENOSPC, errno.EROFS])
def test_a_disk_that_fills_while_latents_are_written_is_said_in_one_line(
    corpus: Corpus,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    error: int,
) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise OSError(error, os.strerror(error))

    config, tensors = codec_parts("spectral")
    path = tmp_path / "codec.safetensors"
    save_checkpoint(path, tensors, kind="codec", config=config)
    monkeypatch.setattr("lmd.data.shards.write_atomic", refuse)
    words = ["--data", str(corpus.folder), "--codec", str(path), "--out", str(tmp_path / "out")]
    assert main(["data", "encode", *words, "--accelerator", "cpu", "--devices", "1"]) == 2
    assert os.strerror(error) in capsys.readouterr().err.splitlines()[-1]


def test_an_interrupted_encoding_goes_on(corpus: Corpus, latents: Path, tmp_path: Path) -> None:
    encode(corpus, tmp_path)
    for path in tmp_path.glob("shard-0000[12].*"):
        path.unlink()
    assert encode(corpus, tmp_path) == []
    for path in latents.iterdir():
        assert (tmp_path / path.name).read_bytes() == path.read_bytes()


def test_other_settings_in_the_same_folder_are_refused(corpus: Corpus, latents: Path) -> None:
    with pytest.raises(LmdError, match="other stems"):
        encode(corpus, latents, stems=False)


def test_a_codec_for_another_rate_is_refused(corpus: Corpus, tmp_path: Path) -> None:
    codec = MeanCodec()
    codec.sample_rate = 44_100
    with pytest.raises(LmdError, match="44100"):
        encode_corpus(corpus, codec, tmp_path)


def codec_parts(kind: str) -> tuple[OobleckConfig | SpectralCodecConfig, dict[str, torch.Tensor]]:
    """Sizes and weights of a small codec."""
    if kind == "spectral":
        config = preset("tiny").codec
        return config, SpectralCodec(config).state_dict()
    config = OobleckConfig(latent_dim=4, channels=4, c_mults=(1, 2), strides=(2, 4))
    return config, build_reference(config).state_dict()


@pytest.mark.parametrize("kind", ["spectral", "oobleck"])
def test_latents_stay_at_home_when_only_the_decoder_changes(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "codec.safetensors"
    config, tensors = codec_parts(kind)

    def identity(**changed: torch.Tensor) -> str:
        save_checkpoint(path, tensors | changed, kind="codec", config=config)
        return encoder_sha256(path)

    before = identity()
    floats = [name for name, tensor in tensors.items() if tensor.is_floating_point()]
    assert {name.split(".")[0] for name in floats} == {"encoder", "decoder"}
    for name in floats:
        same = identity(**{name: tensors[name] + 1}) == before
        assert same == name.startswith("decoder."), name
    if kind == "spectral":
        assert {"encoder.latent_mean", "encoder.latent_std"} <= set(floats)


def test_every_size_that_changes_the_latents_changes_their_name(tmp_path: Path) -> None:
    config, tensors = codec_parts("spectral")
    wave = torch.randn(1, 1, 4 * config.samples_per_frame)

    def made(**sizes: float) -> tuple[str, torch.Tensor]:
        path = tmp_path / "codec.safetensors"
        save_checkpoint(path, tensors, kind="codec", config=replace(config, **sizes))
        return encoder_sha256(path), load_codec(path).encode(wave)

    name, latents = made()
    for sizes in ({"floor_db": -60.0}, {"n_linear": config.n_linear - 8}):
        other_name, other_latents = made(**sizes)
        assert other_name != name
        assert not torch.equal(other_latents, latents)
    same_name, same_latents = made(horizon_frames=8)
    assert same_name == name
    assert torch.equal(same_latents, latents)
    assert set(DECODER_SIZES) < set(vars(config))


def test_the_command_names_the_encoder_and_not_the_file(
    corpus: Corpus, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path, out = tmp_path / "codec.safetensors", tmp_path / "latents"
    config, tensors = codec_parts("spectral")
    words = [
        "data", "encode", "--data", str(corpus.folder), "--codec", str(path), "--out", str(out),
        "--accelerator", "cpu", "--devices", "1",
    ]  # fmt: skip

    def encode_with(change: str) -> int:
        changed = {change: tensors[change] + 1}
        save_checkpoint(path, tensors | changed, kind="codec", config=config)
        return main(words)

    assert encode_with("decoder.level.bias") == 0
    assert json.loads((out / "latents.json").read_text())["codec"] == encoder_sha256(path)
    assert encode_with("decoder.norm.bias") == 0
    assert encode_with("encoder.latent_mean") != 0
    assert "other codec" in capsys.readouterr().err


def test_music_without_stems_is_encoded_among_music_that_has_them(
    corpus: Corpus, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "corpus"
    shutil.copytree(corpus.folder, folder)
    rows = [replace(row, stem_paths="") if i % 3 else row for i, row in enumerate(corpus.rows)]
    write_manifest(folder, rows)
    encode(Corpus(folder), tmp_path / "latents")
    assert "4 of 6 sounds have no stems" in capsys.readouterr().out
    entries = LatentShards(tmp_path / "latents").entries
    voices = {row.name: [e.voice for e in entries if e.name == row.name] for row in rows}
    assert list(voices.values()) == [[-1, 0, 1], [-1], [-1]] * 2
    write_manifest(folder, [replace(row, stem_paths="") for row in rows])
    with pytest.raises(LmdError, match="no stems in"):
        encode(Corpus(folder), tmp_path / "other")
    encode(Corpus(folder), tmp_path / "other", stems=False)  # in the folder that was refused
    (folder / "corpus.json").write_text('{"soundfont": ""}')
    assert Corpus(folder).without_stems() == []  # scores are played again


@pytest.mark.parametrize(
    "option",
    [
        ("--rows-per-shard", "0"), ("--rows-per-shard", "-1"), ("--devices", "0"),
        ("--devices", "x"), ("--num-nodes", "0"), ("--accelerator", "foo"), ("--strategy", "foo"),
    ],
)  # fmt: skip
def test_a_mistaken_option_of_the_encoding_leaves_nothing_behind(
    corpus: Corpus, tmp_path: Path, capsys: pytest.CaptureFixture[str], option: tuple[str, str]
) -> None:
    config, tensors = codec_parts("spectral")
    path, out = tmp_path / "codec.safetensors", tmp_path / "latents"
    save_checkpoint(path, tensors, kind="codec", config=config)
    words = ["--data", str(corpus.folder), "--codec", str(path), "--out", str(out)]
    right = {"--accelerator": "cpu", "--devices": "1", option[0]: option[1]}
    words += [word for pair in right.items() for word in pair]
    assert main(["data", "encode", *words]) == 2
    assert f"{option[0]} {option[1]}" in capsys.readouterr().err
    assert not out.exists()


def test_latents_are_not_written_where_a_file_is(corpus: Corpus, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    with pytest.raises(LmdError, match="no folder"):
        encode(corpus, tmp_path / "file")


def test_latents_that_overflow_float16_stop_the_encoding(corpus: Corpus, tmp_path: Path) -> None:
    codec = MeanCodec()
    codec.offset = 1e6
    with pytest.raises(LmdError, match="not finite"):
        encode_corpus(corpus, codec, tmp_path, EncodeSettings(rows_per_shard=2))


def test_long_waves_are_encoded_in_chunks_with_the_same_result(monkeypatch) -> None:
    wave = torch.randn(1, 1, HOP * 50 - 3)
    whole = encode_wave(MeanCodec(), wave)
    monkeypatch.setattr("lmd.data.encode.MAX_CHUNK_FRAMES", 16)
    monkeypatch.setattr("lmd.data.encode.MARGIN_FRAMES", 2)
    assert torch.equal(encode_wave(MeanCodec(), wave), whole)


def test_a_window_is_a_function_of_seed_step_and_position(latents: Path) -> None:
    windows = LatentWindows(latents, window_frames=12)
    batch = windows.batch(7, range(4))
    again = LatentWindows(latents, window_frames=12).batch(7, range(2, 4))
    assert torch.equal(again["latents"], batch["latents"][2:])
    assert again["identity"] == batch["identity"][2:]
    assert batch["latents"].shape == (4, DIM, 12)
    assert batch["latents"].dtype == torch.float32
    other = LatentWindows(latents, window_frames=12, seed=1).batch(7, range(4))
    assert other["identity"] != batch["identity"]


def test_windows_are_drawn_evenly_over_all_frames(latents: Path) -> None:
    windows = LatentWindows(latents, window_frames=12)
    picks = [windows.pick(step, 0) for step in range(4000)]
    counts = np.bincount([windows._first[entry] + start for entry, start in picks])
    assert len(counts) == len(windows)
    expected = 4000 / len(windows)
    # Chi-square over n windows: mean n − 1, deviation sqrt(2 n); five deviations are allowed.
    chi = float(((counts - expected) ** 2 / expected).sum())
    assert abs(chi - len(windows)) < 5 * np.sqrt(2 * len(windows))


def test_only_the_asked_split_and_kind_come(latents: Path) -> None:
    for split in ("train", "validation", "test"):
        windows = LatentWindows(latents, split, 12, kinds=("stem",))
        assert {entry.split for entry in windows.entries} == {split}
        assert all(entry.voice >= 0 for entry in windows.entries)
    with pytest.raises(LmdError, match="stems"):
        LatentWindows(latents, kinds=("nothing",))


def test_short_sounds_and_leads_are_filled_with_silence(latents: Path) -> None:
    windows = LatentWindows(latents, window_frames=80, lead_frames=6)
    step = next(step for step in range(10_000) if windows.pick(step, 0) == (0, -6))
    first = windows.batch(step, [0])["latents"][0]
    n_frames = windows.entries[0].n_frames
    quiet = torch.full((DIM, 6), MeanCodec.offset)
    assert torch.equal(first[:, :6], quiet)
    assert torch.equal(first[:, 6 + n_frames :], quiet[:, :1].expand(-1, 74 - n_frames))
    assert not torch.equal(first[:, 6:12], quiet)
    starts = {windows.pick(step, 0)[1] for step in range(200)}
    assert min(starts) == -6


def test_latents_are_mapped_not_loaded(latents: Path) -> None:
    shards = LatentShards(latents)
    frames = shards.frames(shards.entries[0], 2, 5)
    mapped = shards._maps[shards.entries[0].shard]
    assert frames.dtype == np.float16
    assert isinstance(mapped.base, np.memmap) or isinstance(mapped, np.memmap)
    assert np.shares_memory(frames, mapped)
