import threading

import pytest
import torch

from lmd.config import TextConfig, preset
from lmd.errors import LmdError
from lmd.model.text import (
    CachedTextEncoder,
    HashTextEncoder,
    T5TextEncoder,
    TextEncoder,
    WordLlamaTextEncoder,
    build_text_encoder,
    mix,
)

WARM, COLD = "warm dub techno", "cold solo piano"


@pytest.fixture(scope="module")
def wordllama() -> WordLlamaTextEncoder:
    return WordLlamaTextEncoder()


@pytest.mark.parametrize("name", ["tiny", "small", "paper"])
def test_every_preset_names_an_encoder_of_its_own_width(name):
    config = preset(name).text
    encoder = build_text_encoder(config)  # T5 is not loaded here
    assert isinstance(encoder, TextEncoder)
    assert (encoder.n_tokens, encoder.dim) == (config.n_tokens, config.dim)
    assert config.dim == preset(name).dit.text_dim


def test_wordllama_needs_no_network(no_network):
    rows = build_text_encoder(preset("small").text).encode([WARM])
    assert rows.shape == (1, 32, 256)
    assert rows.abs().sum() > 0


@pytest.mark.parametrize("encoder", [HashTextEncoder(8, 16), WordLlamaTextEncoder()])
def test_rows_after_the_last_token_are_exact_zeros(encoder):
    rows = encoder.encode([WARM, ""])
    used = rows[0].abs().sum(-1) > 0
    assert 3 <= used.sum() < encoder.n_tokens
    assert used[: int(used.sum())].all()  # tokens first, padding after
    assert torch.equal(rows[1], torch.zeros_like(rows[1]))
    long = encoder.encode(["word " * 100])[0]
    assert (long.abs().sum(-1) > 0).all()


def test_wordllama_rows_have_about_unit_variance(wordllama):
    assert abs(wordllama._table.square().mean() - 1) < 1e-5
    words = [
        "jazz",
        "piano",
        "techno",
        "guitar",
        "drums",
        "violin",
        "ambient",
        "warm",
        "slow",
        "bright",
    ]
    rows = torch.cat([wordllama.embed(word) for word in words])
    assert 0.5 < rows.square().mean().sqrt() < 2  # measured: 1.10


def test_wordllama_puts_a_paraphrase_nearer_than_another_subject(wordllama):
    def centre(text: str) -> torch.Tensor:
        return torch.nn.functional.normalize(wordllama.embed(text).mean(0), dim=0)

    pairs = ("quiet melancholic keyboard", "tax return form")
    near, far = (float(centre("slow sad piano") @ centre(other)) for other in pairs)
    assert near > far + 0.2  # measured cosines: 0.29 against -0.07


@pytest.mark.parametrize("odd", ["tekkno", "zxqvw", "Ünïcôdé 🎹", "\x00\n\t.", "ｆｕｌｌ"])
def test_a_typo_or_an_unknown_word_becomes_subwords_and_never_fails(wordllama, odd):
    rows = wordllama.encode([odd])
    assert torch.isfinite(rows).all()
    assert rows.abs().sum() > 0


def test_case_does_not_matter(wordllama):
    for encoder in (wordllama, HashTextEncoder(8, 16)):
        assert torch.equal(encoder.encode(["Warm DUB techno"]), encoder.encode([WARM]))


def test_wordllama_can_be_cut_to_its_nested_widths(wordllama):
    narrow = WordLlamaTextEncoder(dim=64)
    cosine = torch.nn.functional.cosine_similarity
    assert torch.allclose(
        cosine(narrow.embed(WARM), wordllama.embed(WARM)[:, :64]), torch.ones(5), atol=1e-5
    )
    with pytest.raises(LmdError, match="text width 100"):
        WordLlamaTextEncoder(dim=100)


def test_hash_words_are_the_same_in_every_process():
    rows = HashTextEncoder(8, 4).encode(["piano"])[0, 0]
    expected = torch.tensor([0.7737811, -0.4357955, -0.8055460, 0.0703192])  # another process's
    assert torch.allclose(rows, expected, atol=1e-6)


class Counting(CachedTextEncoder):
    """Counts how often each prompt is computed, and can be held up."""

    def __init__(self, max_cached: int = 2) -> None:
        super().__init__(2, 3, max_cached)
        self.computed: list[str] = []
        self.gate = threading.Event()
        self.gate.set()

    def embed(self, prompt: str) -> torch.Tensor:
        assert self.gate.wait(10)
        self.computed.append(prompt)
        return torch.full((1, 3), float(len(self.computed)))


def test_a_prompt_is_embedded_once_and_the_least_recently_used_is_forgotten():
    encoder = Counting(max_cached=2)
    for prompt in ("a", "b", "a", "c", "a", "b"):
        encoder.encode([prompt])
    assert encoder.computed == ["a", "b", "c", "b"]


def test_what_encode_returns_is_not_the_cache_itself():
    encoder = Counting()
    encoder.encode(["a"]).zero_()
    assert encoder.encode(["a"])[0, 0, 0] == 1


def test_a_remembered_prompt_does_not_wait_for_one_being_computed():
    encoder = Counting()
    encoder.encode(["known"])
    encoder.gate.clear()
    slow = threading.Thread(target=encoder.encode, args=(["new"],))
    quick = threading.Thread(target=encoder.encode, args=(["known"],))
    slow.start()
    quick.start()
    quick.join(5)
    assert not quick.is_alive()
    assert slow.is_alive()
    encoder.gate.set()
    slow.join(5)
    assert encoder.computed == ["known", "new"]


def test_a_mix_is_the_weighted_sum_row_by_row(wordllama):
    rows = wordllama.encode([WARM, COLD])
    mixed = mix(wordllama, ((WARM, 0.25), (COLD, 0.75)))
    assert mixed.shape == (1, 32, 256)
    assert torch.allclose(mixed[0], 0.25 * rows[0] + 0.75 * rows[1], atol=1e-6)
    assert torch.equal(mix(wordllama, WARM)[0], rows[0])
    assert torch.equal(mix(wordllama, ((WARM, 1.0), (COLD, 0.0)))[0], rows[0])


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        (((WARM, 0.5), (COLD, 0.4)), "sum to 0.9"),
        (((WARM, 1.5), (COLD, -0.5)), "none negative"),
        (((WARM, float("nan")),), "none negative"),
        ((), "at least one"),
        (((WARM, 1.0002),), "sum to 1.0002"),
    ],
)
def test_bad_weights_are_refused(prompt, message):
    with pytest.raises(LmdError, match=message):
        mix(HashTextEncoder(4, 4), prompt)


def test_weights_may_miss_one_by_rounding():
    mix(HashTextEncoder(4, 4), ((WARM, 0.50004), (COLD, 0.5)))


@pytest.mark.parametrize("prompts", ["techno", []])
def test_anything_but_a_list_of_texts_is_refused(prompts):
    with pytest.raises(LmdError, match="a list with at least one text"):
        HashTextEncoder(4, 4).encode(prompts)


def test_t5_says_what_to_do_when_it_is_not_there(no_network, tmp_path):
    encoder = build_text_encoder(TextConfig())
    assert torch.equal(encoder.encode([""]), torch.zeros(1, 64, 768))  # nothing to load for that
    with pytest.raises(LmdError, match="wordllama"):
        T5TextEncoder(model=str(tmp_path / "no-such-model")).encode([WARM])


@pytest.fixture(scope="module")
def t5_folder(tmp_path_factory) -> str:
    """A T5 of random weights with a word-level tokenizer, saved as the real one would be."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast, T5Config, T5EncoderModel

    folder = str(tmp_path_factory.mktemp("t5"))
    words = ["<pad>", "</s>", "<unk>", *f"{WARM} {COLD}".split()]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, "<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="$A </s>", special_tokens=[("</s>", 1)]
    )
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>", unk_token="<unk>"
    ).save_pretrained(folder)
    torch.manual_seed(0)
    config = T5Config(vocab_size=len(words), d_model=16, d_kv=4, d_ff=32, num_layers=2, num_heads=4)
    T5EncoderModel(config).save_pretrained(folder)
    return folder


def test_t5_rows_equal_a_padded_batch_times_its_mask(t5_folder):
    from transformers import AutoTokenizer, T5EncoderModel

    rows = T5TextEncoder(8, 16, t5_folder).encode([WARM, "piano"])
    tokens = AutoTokenizer.from_pretrained(t5_folder)(
        [WARM, "piano"], padding="max_length", max_length=8, return_tensors="pt"
    )
    with torch.no_grad():
        hidden = (
            T5EncoderModel.from_pretrained(t5_folder)
            .eval()(input_ids=tokens["input_ids"], attention_mask=tokens["attention_mask"])
            .last_hidden_state
        )
    expected = hidden * tokens["attention_mask"][..., None]
    assert (rows - expected).abs().max() < 1e-5  # measured: 5e-7, for rows of size about 1
    assert torch.equal(rows[0, 4:], torch.zeros(4, 16))
    assert torch.equal(rows[1, 2:], torch.zeros(6, 16))


def test_a_t5_of_another_width_is_refused(t5_folder):
    with pytest.raises(LmdError, match="width 16"):
        T5TextEncoder(8, 768, t5_folder).encode([WARM])
