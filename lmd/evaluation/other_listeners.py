"""OpenL3, PaSST and CLAP, where a person has installed them; none is needed and none is fetched.

The packages load their weights from this machine. While they do, opening a connection is refused,
so weights that are missing give a reason instead of a download.
"""

import os
import socket
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from importlib import import_module
from importlib.util import find_spec
from typing import Any, Literal

import numpy as np
import torch
import torchaudio

from lmd.training.codec.metrics import Mono

Kind = Literal["distance", "tags", "match"]


class Listener:
    """One of them, ready to hear.

    Args:
        kind: "distance" (embeddings of windows, for a Fréchet distance), "tags" (probabilities,
            for a divergence) or "match" (one embedding, compared with that of a text).
        sample_rate: Hz that it wants.
        hear: samples at that rate -> array.
        read: texts -> embeddings, for "match".
    """

    def __init__(
        self,
        kind: Kind,
        sample_rate: int,
        hear: Callable[[np.ndarray], np.ndarray],
        read: Callable[[Sequence[str]], np.ndarray] | None = None,
    ) -> None:
        self.kind, self.sample_rate, self._hear, self.read = kind, sample_rate, hear, read

    def hear(self, wave: Mono, sample_rate: int) -> np.ndarray:
        """Of one clip: `[window, size]`, `[label]` or `[size]`, by kind."""
        heard = torchaudio.functional.resample(wave, sample_rate, self.sample_rate)
        return np.asarray(self._hear(heard.numpy()), np.float64)


def _openl3() -> Listener:
    """Music embeddings of 512 numbers, a second long, one every half second."""
    package = import_module("openl3")
    model = package.models.load_audio_embedding_model("mel256", "music", 512)

    def hear(wave: np.ndarray) -> np.ndarray:
        found, _ = package.get_audio_embedding(wave, 48_000, model=model, hop_size=0.5, verbose=0)
        return found

    return Listener("distance", 48_000, hear)


def stretches(wave: np.ndarray, size: int) -> list[np.ndarray]:
    """All whole stretches of `size` samples; a wave that is shorter as it is."""
    whole = [wave[k : k + size] for k in range(0, len(wave) - size + 1, size)]
    return whole or [wave]


def _passt() -> Listener:
    """Probabilities of AudioSet's 527 labels, mean over whole stretches of ten seconds."""
    model = import_module("hear21passt.base").get_basic_model(mode="logits").eval()

    @torch.no_grad()
    def hear(wave: np.ndarray) -> np.ndarray:
        parts = map(torch.from_numpy, stretches(wave, 10 * 32_000))
        return torch.stack([model(part[None])[0].softmax(-1) for part in parts]).mean(0).numpy()

    return Listener("tags", 32_000, hear)


def _clap() -> Listener:
    """Sound and text in one space; the sound is the mean over whole stretches of ten seconds.

    Longer than that, the package would hear a stretch of its own random choice.
    """
    model = import_module("laion_clap").CLAP_Module(enable_fusion=False)
    model.load_ckpt()

    def hear(wave: np.ndarray) -> np.ndarray:
        parts = np.stack(stretches(wave, 10 * 48_000))
        return model.get_audio_embedding_from_data(x=parts, use_tensor=False).mean(0)

    def read(texts: Sequence[str]) -> np.ndarray:
        return np.asarray(model.get_text_embedding(list(texts), use_tensor=False), np.float64)

    return Listener("match", 48_000, hear, read)


OPENERS: dict[str, tuple[str, Callable[[], Listener]]] = {
    "OpenL3": ("openl3", _openl3),
    "PaSST": ("hear21passt", _passt),
    "CLAP": ("laion_clap", _clap),
}


@contextmanager
def offline() -> Iterator[None]:
    """Refuse every connection that is opened inside."""

    def refuse(*args: Any, **kwargs: Any) -> None:
        raise OSError("no connection is opened during an evaluation")

    names = ("create_connection", "getaddrinfo")
    kept = {name: getattr(socket, name) for name in names}
    before = os.environ.get("HF_HUB_OFFLINE")
    os.environ["HF_HUB_OFFLINE"] = "1"
    for name in names:
        setattr(socket, name, refuse)
    try:
        yield
    finally:
        for name, function in kept.items():
            setattr(socket, name, function)
        if before is None:
            del os.environ["HF_HUB_OFFLINE"]
        else:
            os.environ["HF_HUB_OFFLINE"] = before


def open_listeners() -> tuple[dict[str, Listener], dict[str, str]]:
    """Those that can be used, and for each a word: "used", "not installed" or why not.

    A package may fail in any way while it loads: the reason is reported, the evaluation goes on.
    """
    found: dict[str, Listener] = {}
    words: dict[str, str] = {}
    for name, (package, opener) in OPENERS.items():
        if find_spec(package) is None:
            words[name] = "not installed"
            continue
        try:
            with offline():
                found[name] = opener()
            words[name] = "used"
        except Exception as error:
            words[name] = f"installed, but {type(error).__name__}: {error}"
    return found, words
