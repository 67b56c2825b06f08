"""Every file of weights in the repository: what its card says, that it loads, and that it plays."""

import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from lmd.checkpoint import RENAMED, load_bundle, load_codec, load_tensors, read_header
from lmd.codec.base import Boundary, DecodeState, decode_block
from lmd.evaluation.tagger import load_tagger
from lmd.pretrained import SHIPPED, open_instrument
from lmd.rng import normal
from lmd.shapes import Wave
from lmd.stream.samplers import Guidance, dpmpp_2m, schedule

FILES = sorted(SHIPPED.glob("*.safetensors"))
STREAMED = [path.stem for path in FILES if path.stem in ("finetuned", "arc")]
MOST_BYTES, MOST_BYTES_TOGETHER = 40e6, 120e6
PROMPT = "church organ, slow, minor"

pytestmark = pytest.mark.skipif(not FILES, reason="no weights are shipped")


def stated_sha256(card: Path) -> str:
    """The digest in a model card's table."""
    found = re.search(
        r"^\| SHA-256(?: of the tensors)? \| `([0-9a-f]{64})` \|$", card.read_text(), re.M
    )
    assert found, f"no SHA-256 in {card.name}"
    return found[1]


def check_card(card: Path, weights: Path) -> None:
    """The card states the digest of the weights, which `load_tensors` computes anew."""
    _, header = load_tensors(weights)
    assert stated_sha256(card) == header.sha256, f"{card.name} is of other weights"


def level_db(wave: Wave) -> float:
    """RMS in dB under full scale; everything must be finite."""
    assert torch.isfinite(wave).all()
    return float(10 * wave.square().mean().log10())


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_a_card_states_the_hash_of_its_weights(path: Path, tmp_path: Path) -> None:
    card, forged = path.with_suffix(".md"), tmp_path / "forged.md"
    check_card(card, path)
    assert read_header(path).kind == RENAMED.get(path.stem, path.stem)
    stated = stated_sha256(card)
    other = stated[:-1] + ("1" if stated[-1] == "0" else "0")
    forged.write_text(card.read_text().replace(stated, other))
    with pytest.raises(AssertionError, match="of other weights"):
        check_card(forged, path)


@pytest.mark.parametrize("engine", ["torch", "graph"])
def test_the_shipped_weights_play_what_they_always_played(engine: str) -> None:
    """Held against samples that an earlier version of this package made of the same weights."""
    kept = load_file(Path(__file__).parent / "fixtures" / "streams" / "shipped.safetensors")
    organ, strings = (
        {"prompt": "church organ, slow, minor", "seed": 1},
        {"prompt": "string quartet, fast", "seed": 1},
    )
    piano = {"prompt": "piano, slow", "seed": 2, "regime": "enc-dec"}
    for kind, plan in (("arc", [organ] * 3 + [strings] * 2), ("finetuned", [piano] * 2)):
        instrument = open_instrument(kind, engine=engine)
        blocks = list(instrument.streamer.stream(instrument.controls(**one) for one in plan))
        latents = torch.cat([block.latents for block in blocks], dim=-1)
        # measured: 8e-6 at most, of latents up to 3
        assert (latents - kept[f"{kind}.latents"]).abs().max() < 1e-4
        if kind == "arc":
            wave = torch.cat([block.wave for block in blocks], dim=-1)[..., :49152]
            # measured: 4e-4 (phases sum up small differences), kept in float16
            assert (wave - kept["arc.wave"].float()).abs().max() < 2e-3


def test_the_weights_are_small_enough_for_a_repository() -> None:
    sizes = {path.name: path.stat().st_size for path in FILES}
    assert max(sizes.values()) <= MOST_BYTES, sizes
    assert sum(sizes.values()) <= MOST_BYTES_TOGETHER, sizes


def test_the_codec_gives_a_second_of_sound_back() -> None:
    codec = load_codec(SHIPPED / "codec.safetensors")
    n_samples = round(codec.sample_rate / codec.samples_per_frame) * codec.samples_per_frame
    time_s = torch.arange(n_samples) / codec.sample_rate
    wave = sum(torch.sin(2 * torch.pi * hz * time_s) for hz in (220.0, 277.2, 329.6))[None, None]
    with torch.inference_mode():
        heard = codec.decode(codec.encode(0.1 * wave))
    assert heard.shape == wave.shape
    # Pure tones are not its music; measured 3.3 dB.
    assert abs(level_db(heard) - level_db(0.1 * wave)) < 6


def test_the_tagger_tags_a_window_of_sound() -> None:
    tagger, header = load_tagger(SHIPPED / "tagger.safetensors")
    rate = tagger.config.sample_rate
    time_s = torch.arange(6 * rate) / rate  # its window is five seconds
    heard = tagger.tag_wave(torch.sin(2 * torch.pi * 220 * time_s))
    assert int(heard.pitch_classes.mean(0).argmax()) == 9  # A
    assert heard.family.shape[1] == len(header.config.families)
    assert torch.allclose(heard.family.sum(1), torch.ones(len(heard.family)), atol=1e-5)
    assert torch.isfinite(heard.embedding).all()


@torch.inference_mode()
def test_the_base_samples_a_window() -> None:
    bundle = load_bundle(SHIPPED, "base")
    n_frames = bundle.preset.window.block_frames
    seconds = n_frames / bundle.preset.frame_rate_hz
    condition = bundle.model.condition(bundle.text.encode([PROMPT]), seconds)
    noise = normal((1, bundle.preset.dit.latent_dim, n_frames), 0, "shipped")
    latents = dpmpp_2m(
        lambda noisy, t: Guidance(bundle.model(noisy, torch.full((1,), t), condition)),
        noise,
        schedule(4),
    )
    assert not torch.allclose(latents, noise, atol=0.5)
    assert -50 < level_db(bundle.codec.decode(latents)) < 0  # measured -22


@pytest.mark.parametrize("kind", STREAMED)
def test_a_live_model_streams_two_blocks_that_can_be_heard(kind: str) -> None:
    instrument = open_instrument(kind)
    controls = instrument.controls(PROMPT, n_steps=2)
    blocks = list(instrument.streamer.stream(controls, n_blocks=2))
    assert [block.latents.shape[-1] for block in blocks] == [controls.block_frames] * 2
    for block in blocks:
        assert -50 < level_db(block.wave) < 0  # measured -24 and -25


@pytest.fixture(scope="module")
def joined_latents() -> tuple[torch.Tensor, ...]:
    """A held chord, behind which no click can hide, as short blocks with 108 joins."""
    codec = load_codec(SHIPPED / "codec.safetensors")
    time_s = torch.arange(109 * 2 * codec.samples_per_frame) / codec.sample_rate
    wave = sum(torch.sin(2 * torch.pi * hz * time_s) for hz in (220.0, 277.2, 329.6))
    return codec.encode(0.1 * wave[None, None]).split(2, dim=-1)


def click(waves: list[Wave], n_after: int = 0) -> float:
    """The peak second difference at 100 joins, over that elsewhere between them.

    A place `n_after` samples behind each join counts as a join, too. The first and last few joins
    stay out: the chord's own beginning and end are steps.
    """
    joins = torch.tensor([wave.shape[-1] for wave in waves]).cumsum(0)[-109:-1]
    bend = torch.cat(waves, dim=-1)[0, 0].diff().diff().abs()
    near = torch.zeros(len(bend), dtype=torch.bool)
    for join in (*joins, *(joins + n_after)):
        near[join - 4 : join + 2] = True
    inside = slice(int(joins[3]) + 10, int(joins[-4]) - 10)
    assert len(joins[4:-4]) == 100
    bend, near = bend[inside], near[inside]
    return float(bend[near].max() / bend[~near].max())


@pytest.mark.parametrize("boundary", ["exact", "fade"])
def test_no_click_at_a_hundred_joins_of_the_shipped_codec(
    boundary: Boundary, joined_latents
) -> None:
    codec, state, waves = load_codec(SHIPPED / "codec.safetensors"), DecodeState(), []
    for latents in joined_latents:
        wave, state = decode_block(codec, state, latents, boundary)
        waves.append(wave)
    n_fade = round(0.02 * codec.sample_rate) if boundary == "fade" else 0  # where the fade ends
    assert click(waves, n_fade) < 1.5  # measured 0.69 and 0.80


def test_blocks_decoded_apart_would_click(joined_latents) -> None:
    codec = load_codec(SHIPPED / "codec.safetensors")
    assert click([codec.decode(latents) for latents in joined_latents]) > 1.5  # measured 3.3
