"""Either codec in every notebook: nothing is asked of one that the other lacks."""

import ast
import json
import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import lightning as L
import matplotlib.pyplot as plt
import numpy as np
import pytest
import soundfile
import torch
from corpus_fake import make_corpus

from lmd.checkpoint import build_model
from lmd.codec.base import Codec, DecodeState, StreamingCodec, decode_block
from lmd.codec.oobleck import random_codec
from lmd.codec.spectral import SpectralCodec
from lmd.config import OobleckConfig, preset
from lmd.data.encode import EncodeSettings, encode_corpus, encode_wave
from lmd.data.shards import LatentShards
from lmd.evaluation.clips import through_codec
from lmd.evaluation.drift import drift_of, frame_statistics, play_streams
from lmd.evaluation.metrics import boundary_ratio
from lmd.model.text import build_text_encoder
from lmd.play.player import LivePlayer
from lmd.play.take_figure import plot_take
from lmd.play.takes import SampleHash, play_again, read_take
from lmd.pretrained import Instrument, QuietCodec
from lmd.rng import normal
from lmd.show import latentplot, play, specplot
from lmd.stream.controls import Controls
from lmd.stream.streamer import Streamer, StreamState

pytestmark = pytest.mark.filterwarnings(
    "ignore:.*treespec, LeafSpec.*",  # inside Lightning
    "ignore:.*does not have many workers.*",  # Lightning's advice; here there is no need
)
NOTEBOOKS = sorted((Path(__file__).parents[1] / "notebooks").glob("[0-9][0-9]_*.ipynb"))
OFFERED = set(Codec.__annotations__) | {"encode", "decode"}
TINY = preset("tiny")
STEREO = OobleckConfig(
    sample_rate=22_050, audio_channels=2, latent_dim=8, channels=4, c_mults=(1, 1, 2),
    strides=(4, 16, 16),
)  # fmt: skip


@pytest.fixture(params=["spectral", "oobleck"])
def instrument(request: pytest.FixtureRequest) -> Instrument:
    """The tiny live model in front of one codec or the other."""
    torch.manual_seed(0)
    is_spectral = request.param == "spectral"
    codec = SpectralCodec(TINY.codec).eval() if is_spectral else random_codec(STEREO)
    model, text = build_model(TINY).eval(), build_text_encoder(TINY.text)
    streamer = Streamer(model, QuietCodec(codec), text, TINY.window)
    sizes = replace(TINY, codec=TINY.codec if is_spectral else STEREO)
    return Instrument(streamer, sizes, "random", is_trained=False)


def asked_of_codecs(notebook: Path) -> Iterator[str]:
    """Attributes that the cells take from a `codec`, or from the `.codec` of a streamer."""
    cells = json.loads(notebook.read_text())["cells"]
    code = "\n".join("".join(c["source"]) for c in cells if c["cell_type"] == "code")
    for node in ast.walk(ast.parse(re.sub(r"(?m)^%.*$", "", code))):
        if isinstance(node, ast.Attribute):
            owner = ast.unparse(node.value)
            if owner == "codec" or (owner.endswith(".codec") and owner != "sizes.codec"):
                yield node.attr


@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_asks_a_codec_for_nothing_but_the_protocol(notebook: Path) -> None:
    assert set(asked_of_codecs(notebook)) <= OFFERED


def test_the_notebooks_do_use_codecs() -> None:
    asked = {name for notebook in NOTEBOOKS for name in asked_of_codecs(notebook)}
    assert {"decode", "sample_rate", "samples_per_frame", "latent_dim"} <= asked


def test_both_codecs_offer_the_protocol_and_a_stream() -> None:
    for codec in (SpectralCodec(TINY.codec), random_codec(STEREO)):
        assert isinstance(codec, StreamingCodec)


@pytest.mark.parametrize("boundary", ["exact", "fade"])
def test_a_stream_is_heard_drawn_and_written(
    instrument: Instrument, tmp_path: Path, boundary: str
) -> None:
    """What 00, 02 and 04 do: stream, go on from given latents, decode, draw, write."""
    streamer, codec = instrument.streamer, instrument.streamer.codec
    controls = instrument.controls("organ", n_steps=1, boundary=boundary)
    blocks = list(streamer.stream(controls, n_blocks=2))
    wave = torch.cat([block.wave for block in blocks], dim=-1)
    late = codec.lookahead_frames if boundary == "exact" else 0
    n_frames = 2 * controls.block_frames - late
    assert wave.shape == (1, codec.channels, n_frames * codec.samples_per_frame)
    by_hand, _ = decode_block(codec, DecodeState(), blocks[0].latents, boundary)
    assert by_hand.shape[1:] == (codec.channels, blocks[0].wave.shape[-1])
    context = normal((1, codec.latent_dim, streamer.window.context_frames), 0, "context")
    (block,) = streamer.stream(controls, n_blocks=1, state=StreamState(context))
    whole = codec.decode(torch.cat([context, block.latents], dim=-1))
    join = context.shape[-1] * codec.samples_per_frame
    assert boundary_ratio(whole[0].mean(0), [join], codec.sample_rate) > 0
    assert len(play(whole, codec.sample_rate).data) > 2 * whole.numel()
    specplot(wave, codec.sample_rate)
    latentplot(block.latents, instrument.preset.frame_rate_hz)
    plt.close("all")
    soundfile.write(tmp_path / "a.wav", wave[0].T.clamp(-1, 1).numpy(), codec.sample_rate)
    assert soundfile.info(tmp_path / "a.wav").channels == codec.channels


def test_a_take_is_played_again_and_drawn(instrument: Instrument, tmp_path: Path) -> None:
    """What 04 does with its player."""
    controls = instrument.controls("organ", n_steps=1, block_frames=24)
    player = LivePlayer(instrument, controls, sink="null", take_folder=tmp_path)
    player.play_for(2.5)
    take = read_take(player.take_path)
    digest, waves = SampleHash(), []
    for samples in play_again(take, instrument.streamer):
        digest.update(samples)
        waves.append(torch.from_numpy(samples)[None])
    assert take.sha256 == digest.hexdigest()
    plot_take(take, torch.cat(waves, dim=-1))
    plt.close("all")


def test_streams_are_measured(instrument: Instrument) -> None:
    """What 03 and 05 do with a minute of music, here with two seconds."""
    streamer, codec = instrument.streamer, instrument.streamer.codec
    latents, wave = play_streams(streamer, ["organ", "harp"], 2.0, Controls(n_steps=1))
    reference = frame_statistics(normal((4, codec.latent_dim, 64), 0, "data"))
    drift = drift_of(latents, wave, codec.sample_rate, reference)
    assert np.isfinite([*drift.level_db, *drift.brightness_hz, *drift.distance]).all()
    heard = through_codec(codec, wave.mean(1))
    assert heard.shape == (2, wave.shape[-1])
    assert torch.isfinite(heard).all()


def test_a_corpus_is_encoded_drawn_and_decoded(instrument: Instrument, tmp_path: Path) -> None:
    """What 01 does."""
    codec = instrument.streamer.codec
    corpus = make_corpus(tmp_path / "corpus", n_rows=2, channels=codec.channels)
    fabric = L.Fabric(accelerator="cpu", devices=1)
    encode_corpus(corpus, codec, tmp_path / "latents", EncodeSettings(stems=True), fabric)
    assert len(LatentShards(tmp_path / "latents").entries) == 6
    wave = torch.from_numpy(corpus.wave(0))[None]
    latents = encode_wave(codec, wave)
    assert codec.decode(latents).shape[1] == codec.channels
    assert codec.decode(latents).shape[-1] >= wave.shape[-1]
    latentplot(latents, instrument.preset.frame_rate_hz)
    plt.close("all")
