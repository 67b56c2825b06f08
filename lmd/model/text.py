"""Prompts to token embeddings, offline by default, and weighted mixes of prompts.

A prompt becomes `n_tokens` rows of width `dim`; rows past its last token are exact zeros, so an
empty prompt is all zeros, which is also what guidance takes for "no text".
"""

import math
import numbers
from collections.abc import Sequence
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor

from lmd.config import TextConfig
from lmd.errors import LmdError
from lmd.rng import normal
from lmd.shapes import Tokens

Prompt = str | tuple[tuple[str, float], ...]  # one text, or texts with weights that sum to 1
PromptRows = Float[Tensor, "token dim"]

WEIGHT_TOLERANCE = 1e-4  # how far a mix's weights may miss 1
WORDLLAMA_DIMS = (64, 128, 256)  # widths at which WordLlama's nested embeddings may be cut


@runtime_checkable
class TextEncoder(Protocol):
    """Anything that turns prompts into token embeddings."""

    n_tokens: int
    dim: int

    def encode(self, prompts: Sequence[str]) -> Tokens:
        """Embeddings `[prompt, n_tokens, dim]`, zeros after each prompt's last token."""
        ...


class CachedTextEncoder:
    """An encoder that remembers its most recent prompts; safe to call from several threads.

    A thread that asks for a remembered prompt does not wait for another one that computes.

    Args:
        n_tokens: rows per prompt.
        dim: width of a row.
        max_cached: how many prompts are remembered.
    """

    def __init__(self, n_tokens: int, dim: int, max_cached: int = 1024) -> None:
        self.n_tokens, self.dim = n_tokens, dim
        self._cached = lru_cache(max_cached)(self._padded)

    def embed(self, prompt: str) -> PromptRows:
        """The rows of one prompt's tokens, any number of them, without padding."""
        raise NotImplementedError

    def encode(self, prompts: Sequence[str]) -> Tokens:
        """Embed prompts, each padded with zeros or cut to `n_tokens` rows.

        Raises:
            LmdError: a bare string instead of a list of them, or nothing at all.
        """
        if isinstance(prompts, str) or not len(prompts):
            raise LmdError(f"prompts {prompts!r}", "a list with at least one text", "Wrap it: [p].")
        return torch.stack([self._cached(prompt) for prompt in prompts])

    def _padded(self, prompt: str) -> PromptRows:
        padded = torch.zeros(self.n_tokens, self.dim)
        if prompt.strip():
            rows = self.embed(prompt)[: self.n_tokens]
            padded[: len(rows)] = rows
        return padded


class HashTextEncoder(CachedTextEncoder):
    """Every word gets its own fixed random vector: no meaning, no files; for tests."""

    def embed(self, prompt: str) -> PromptRows:
        """One standard normal row per word, a function of the lower-cased word alone."""
        words = prompt.lower().split()
        return torch.stack([normal((self.dim,), 0, "word", word) for word in words])


class WordLlamaTextEncoder(CachedTextEncoder):
    """Static subword embeddings (WordLlama, 32,000 × 256) whose files come inside the package.

    Text is lower-cased and split into subwords, so a typo or an unknown word becomes smaller
    pieces, down to bytes, and never fails. Rows are scaled by one factor that gives the whole
    table unit variance; words keep their relative lengths, which are small for function words.

    Args:
        n_tokens: rows per prompt.
        dim: 64, 128 or 256: the embeddings are trained so that their first dimensions stand alone.

    Raises:
        LmdError: another width, or the package or its files are missing.
    """

    def __init__(self, n_tokens: int = 32, dim: int = 256) -> None:
        super().__init__(n_tokens, dim)
        if dim not in WORDLLAMA_DIMS:
            raise LmdError(f"text width {dim}", f"one of {WORDLLAMA_DIMS}", "Change its `dim`.")
        try:
            import wordllama

            loaded = wordllama.WordLlama.load(  # from its own package folder
                cache_dir=Path(wordllama.__file__).parent,
                trunc_dim=None if dim == max(WORDLLAMA_DIMS) else dim,
                disable_download=True,
            )
        except (ImportError, FileNotFoundError) as error:
            raise LmdError(
                f"no WordLlama files ({error})",
                "the wordllama package with its weights and tokenizer inside",
                "Install it again: pip install --force-reinstall wordllama",
            ) from error
        table = torch.from_numpy(loaded.embedding).float()
        self._tokenizer, self._table = loaded.tokenizer, table / table.square().mean().sqrt()

    def embed(self, prompt: str) -> PromptRows:
        """One row per subword."""
        ids = self._tokenizer.encode(prompt.lower(), add_special_tokens=False).ids
        return self._table[ids]


class T5TextEncoder(CachedTextEncoder):
    """The encoder half of T5, as Stable Audio uses it: last hidden states times the mask.

    Loaded when first needed. It is not shipped: it is looked for in `model` if that is a folder,
    else in the local Hugging Face cache, else fetched (unless `HF_HUB_OFFLINE=1`).

    Args:
        n_tokens: rows per prompt.
        dim: the model's width.
        model: name or folder.

    Raises:
        LmdError: (when first used) the model cannot be had, or has another width.
    """

    def __init__(self, n_tokens: int = 64, dim: int = 768, model: str = "t5-base") -> None:
        super().__init__(n_tokens, dim)
        self.model = model

    def embed(self, prompt: str) -> PromptRows:
        """One row per T5 token, the end token included."""
        tokenizer, encoder = self._loaded
        tokens = tokenizer(prompt, truncation=True, max_length=self.n_tokens, return_tensors="pt")
        with torch.no_grad():
            hidden = encoder(**tokens).last_hidden_state
        return (hidden * tokens["attention_mask"][..., None])[0].float()

    @cached_property
    def _loaded(self) -> tuple[Any, Any]:
        """Tokenizer and encoder."""
        try:
            from transformers import AutoTokenizer, T5EncoderModel

            tokenizer = AutoTokenizer.from_pretrained(self.model)
            encoder = T5EncoderModel.from_pretrained(self.model)
        except (ImportError, OSError, ValueError) as error:
            reason = str(error).partition("\n")[0] or type(error).__name__
            raise LmdError(
                f"no T5 called {self.model!r} ({reason})",
                "its tokenizer and weights in a folder or in the local cache",
                "Fetch it once (hf download t5-base), or use 'wordllama', which needs no download.",
            ) from error
        if (width := encoder.config.d_model) != self.dim:
            raise LmdError(f"T5 {self.model!r} of width {width}", f"{self.dim}", "Change `dim`.")
        return tokenizer, encoder.eval().requires_grad_(False)


def build_text_encoder(config: TextConfig) -> TextEncoder:
    """The encoder that a config names; T5 is only loaded when it is first used.

    Raises:
        LmdError: an unknown encoder, or one whose files are missing.
    """
    kinds = {"hash": HashTextEncoder, "wordllama": WordLlamaTextEncoder, "t5-base": T5TextEncoder}
    if config.encoder not in kinds:
        raise LmdError(
            f"text encoder {config.encoder!r}", f"one of {sorted(kinds)}", "Pick one of these."
        )
    return kinds[config.encoder](config.n_tokens, config.dim)


def as_mix(prompt: Prompt) -> tuple[tuple[str, float], ...]:
    """A prompt as (text, weight) pairs, checked; a plain text has weight 1.

    Raises:
        LmdError: no texts, what is no text or cannot be written down, a weight that is negative or
            not finite, or weights that do not sum to 1 within 1e-4.
    """
    if isinstance(prompt, str):
        prompt = ((prompt, 1.0),)
    if not isinstance(prompt, tuple) or not all(is_weighted_text(part) for part in prompt):
        raise LmdError(
            f"prompt {prompt!r}",
            "a text, or a tuple of (text, weight) pairs",
            "Give a text, or pairs whose weights sum to 1.",
        )
    weights = [float(weight) for _, weight in prompt]
    if not weights or not all(math.isfinite(weight) and weight >= 0 for weight in weights):
        raise LmdError(
            f"prompt weights {weights}", "at least one, none negative", "Correct the weights."
        )
    if abs(sum(weights) - 1) > WEIGHT_TOLERANCE:
        raise LmdError(
            f"prompt weights {weights} that sum to {sum(weights):g}",
            "a sum of 1",
            "Divide each weight by their sum.",
        )
    for text, _ in prompt:
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise LmdError(f"prompt {text!r} ({error.reason})", "text", "Type it anew.") from error
    return tuple((text, weight) for (text, _), weight in zip(prompt, weights, strict=True))


def is_weighted_text(part: object) -> bool:
    """Whether this is a (text, number) pair."""
    return (
        isinstance(part, tuple)
        and len(part) == 2
        and isinstance(part[0], str)
        and isinstance(part[1], numbers.Real)
        and not isinstance(part[1], bool)
    )


def describe(encoder: TextEncoder) -> str:
    """What an encoder is, in a few words that stand beside what was made with it."""
    return f"{type(encoder).__name__} {encoder.n_tokens}×{encoder.dim}"


def mix(encoder: TextEncoder, prompt: Prompt) -> Tokens:
    """Token embeddings of a prompt or of a weighted mix: Σ weight · embedding, row by row.

    Returns:
        `[1, n_tokens, dim]`.

    Raises:
        LmdError: see `as_mix`.
    """
    pairs = as_mix(prompt)
    rows = encoder.encode([text for text, _ in pairs])
    weights = torch.tensor([weight for _, weight in pairs])
    return (rows * weights[:, None, None]).sum(dim=0, keepdim=True)
