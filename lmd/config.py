"""Every size in one place: frozen dataclasses and three presets.

`tiny` is for tests, `small` ships with weights and plays in real time on two CPU cores,
`paper` has the exact shape of Stable Audio Open Small.
"""

import dataclasses
import math
from dataclasses import dataclass
from types import UnionType
from typing import Any, Literal, TypeVar, get_args, get_origin, get_type_hints

from lmd.errors import LmdError

Regime = Literal["full", "enc-dec", "block-causal"]
REGIMES: tuple[str, ...] = get_args(Regime)
T = TypeVar("T")

# Least and greatest value that a file may ask for, so that a small file cannot take all memory.
MOST = 65_536
MOST_ITEMS = 64  # of a list
MOST_SAMPLES = 2**26  # of audio in a window: 25 minutes
BOUNDS: dict[str, tuple[float, float]] = {
    **dict.fromkeys(("depth", "step_depth", "n_heads"), (1, 256)),
    **dict.fromkeys(("ff_mult", "hops_per_frame", "strides"), (1, 64)),
    **dict.fromkeys(("context_frames", "block_frames", "horizon_frames"), (1, 8192)),
    **dict.fromkeys(("hop", "dim", "n_linear", "n_bands", "n_tokens"), (1, 4096)),
    "c_mults": (1, 1024),
    "n_fft": (1, 16_384),
    "sample_rate": (1, 768_000),
    "rope_base": (1, 1e12),
    "max_seconds": (1e-3, 1e6),
    "floor_db": (-400, -1),
}


def check_block(context_frames: int, block_frames: int) -> int:
    """How many blocks the context holds.

    Raises:
        LmdError: the block does not divide the context, or is not positive.
    """
    if block_frames < 1 or context_frames < 1 or context_frames % block_frames:
        legal = [o for o in range(1, context_frames + 1) if context_frames % o == 0]
        raise LmdError(
            f"a block of {block_frames} frames in a context of {context_frames}",
            "a block that divides the context",
            f"Choose one of {legal}.",
        )
    return context_frames // block_frames


def check_samples(n: int, most: int = MOST) -> None:
    """Refuse a frame, or a window, of too many samples of audio."""
    if n > most:
        raise LmdError(
            f"a frame or window of {n} samples", f"at most {most}", "Choose smaller sizes."
        )


@dataclass(frozen=True)
class ControlChannel:
    """A frame-wise control that joins the input-add projection (a sketch, an accompaniment)."""

    name: str
    channels: int


@dataclass(frozen=True)
class DiTConfig:
    """The diffusion transformer. Widths count channels, `depth` counts blocks."""

    latent_dim: int = 64
    width: int = 1024
    depth: int = 16
    n_heads: int = 8
    text_dim: int = 768  # cross-attention token width
    global_dim: int = 768  # width of the global (seconds) condition
    ff_mult: int = 4
    rope_base: float = 10_000.0
    timestep_features: int = 256
    controls: tuple[ControlChannel, ...] = ()

    def __post_init__(self) -> None:
        if self.width % self.n_heads or (self.width // self.n_heads) % 4:
            raise LmdError(
                f"width {self.width} with {self.n_heads} heads",
                "a head width that is a multiple of 4 (half of it is rotated, in pairs)",
                "Choose width = n_heads × head width.",
            )

    @property
    def head_dim(self) -> int:
        """Channels of one attention head."""
        return self.width // self.n_heads

    @property
    def n_controls(self) -> int:
        """Channels of all further frame-wise controls together."""
        return sum(control.channels for control in self.controls)

    @property
    def rope_dim(self) -> int:
        """How many of a head's dimensions are rotated: half, at least 32 where there are."""
        return min(self.head_dim, max(self.head_dim // 2, 32))


@dataclass(frozen=True)
class WindowConfig:
    """What the model looks at: a context and a block, in latent frames."""

    context_frames: int = 192
    block_frames: int = 48

    def __post_init__(self) -> None:
        check_block(self.context_frames, self.block_frames)

    @property
    def window_frames(self) -> int:
        """Context and block together."""
        return self.context_frames + self.block_frames

    def block_lengths(self) -> tuple[int, ...]:
        """Every legal block length, shortest first: the divisors of the context."""
        return tuple(o for o in range(1, self.context_frames + 1) if not self.context_frames % o)


@dataclass(frozen=True)
class TextConfig:
    """The text encoder: `wordllama` needs no download, `t5-base` is the paper's."""

    encoder: Literal["wordllama", "t5-base", "hash"] = "t5-base"
    n_tokens: int = 64
    dim: int = 768
    max_seconds: float = 256.0


@dataclass(frozen=True)
class TaggerConfig:
    """The small network whose embeddings measure distances (see `lmd.evaluation.tagger`)."""

    families: tuple[str, ...]  # instrument families, in the order of the output
    sample_rate: int = 22_050
    window_steps: int = 108  # feature frames of 1024 samples: 5 s
    width: int = 128
    embedding: int = 64


@dataclass(frozen=True)
class SpectralCodecConfig:
    """The default codec: magnitudes in, latents, inverse STFT out (see `lmd.codec.spectral`)."""

    sample_rate: int = 22_050
    channels: int = 1
    latent_dim: int = 64
    hop: int = 256  # samples per STFT frame
    hops_per_frame: int = 4  # STFT frames per latent frame
    n_fft: int = 2048
    n_linear: int = 160  # lowest bands, one bin each
    n_bands: int = 256  # all bands of the encoder; those above are spaced evenly in pitch
    floor_db: float = -80.0  # under a full-scale sine; silence is this everywhere
    encoder_width: int = 512
    width: int = 512  # decoder blocks at the latent rate
    depth: int = 3
    step_width: int = 320  # decoder blocks at the STFT rate
    step_depth: int = 4
    horizon_frames: int = 32  # a phase counts from an onset at most this far back

    def __post_init__(self) -> None:
        check_samples(self.samples_per_frame)
        if self.n_fft % self.hop or not self.n_linear < min(self.n_bands, self.n_fft // 2 - 1):
            raise LmdError(
                f"n_fft {self.n_fft}, hop {self.hop}, n_linear {self.n_linear}, n_bands "
                f"{self.n_bands}",
                "a hop that divides n_fft, and n_linear below n_bands and n_fft / 2 - 1",
                "Correct the codec's sizes.",
            )

    @property
    def samples_per_frame(self) -> int:
        """Audio samples that one latent frame covers."""
        return self.hop * self.hops_per_frame


@dataclass(frozen=True)
class OobleckConfig:
    """Stable Audio's convolutional autoencoder (see `lmd.codec.oobleck`)."""

    sample_rate: int = 44_100
    audio_channels: int = 2
    latent_dim: int = 64
    channels: int = 128
    c_mults: tuple[int, ...] = (1, 2, 4, 8, 16)
    strides: tuple[int, ...] = (2, 4, 4, 8, 8)

    def __post_init__(self) -> None:
        check_samples(self.samples_per_frame)

    @property
    def samples_per_frame(self) -> int:
        """Audio samples that one latent frame covers."""
        return math.prod(self.strides)


@dataclass(frozen=True)
class Preset:
    """One purpose, every size that follows from it."""

    name: str
    dit: DiTConfig
    window: WindowConfig
    text: TextConfig
    codec: SpectralCodecConfig | OobleckConfig

    def __post_init__(self) -> None:
        found = (self.codec.latent_dim, self.text.dim)
        if found != (expected := (self.dit.latent_dim, self.dit.text_dim)):
            raise LmdError(
                f"a codec of {found[0]} channels and text of width {found[1]}",
                f"{expected[0]} and {expected[1]}, as the transformer has",
                "Give all three the same sizes.",
            )
        check_samples(self.window.window_frames * self.codec.samples_per_frame, MOST_SAMPLES)

    @property
    def frame_rate_hz(self) -> float:
        """Latent frames per second."""
        return self.codec.sample_rate / self.codec.samples_per_frame


PRESETS: dict[str, Preset] = {
    preset.name: preset
    for preset in (
        Preset(
            "tiny",
            DiTConfig(latent_dim=8, width=32, depth=2, n_heads=2, text_dim=16, global_dim=16),
            WindowConfig(context_frames=192, block_frames=48),
            TextConfig(encoder="hash", n_tokens=8, dim=16),
            SpectralCodecConfig(
                latent_dim=8,
                n_fft=1024,
                n_linear=32,
                n_bands=64,
                encoder_width=32,
                width=32,
                depth=1,
                step_width=32,
                step_depth=1,
                horizon_frames=8,
            ),
        ),
        Preset(
            "small",
            DiTConfig(width=320, depth=6, n_heads=5, text_dim=256, global_dim=256),
            WindowConfig(context_frames=192, block_frames=48),
            TextConfig(encoder="wordllama", n_tokens=32, dim=256),
            SpectralCodecConfig(),
        ),
        Preset("paper", DiTConfig(), WindowConfig(), TextConfig(), OobleckConfig()),
    )
}


def preset(name: str) -> Preset:
    """The preset of that name.

    Raises:
        LmdError: no such preset; the message lists those there are.
    """
    if name not in PRESETS:
        raise LmdError(f"preset {name!r}", f"one of {', '.join(PRESETS)}", "Pick one of these.")
    return PRESETS[name]


def to_dict(config: Any) -> dict[str, Any]:
    """A config as plain JSON-ready values; `from_dict` reads it back."""
    return dataclasses.asdict(config)


def from_dict(cls: type[T], values: Any) -> T:
    """Build a config from plain values; nested configs and tuples are restored.

    Raises:
        LmdError: an unknown key, a value of another type or outside `BOUNDS`.
        TypeError: no mapping, or a key is missing.
    """
    if not isinstance(values, dict):
        raise TypeError(f"{values!r:.80} instead of a {cls.__name__}")
    hints = get_type_hints(cls)
    if unknown := sorted(set(values) - set(hints)):
        raise LmdError(
            f"unknown keys {unknown} for {cls.__name__}",
            f"a subset of {sorted(hints)}",
            "Check the spelling.",
        )
    return cls(**{name: _restore(hints[name], name, value) for name, value in values.items()})


def _restore(hint: Any, name: str, value: Any) -> Any:
    """One value in the type that is declared; see `from_dict`."""
    kind = get_origin(hint)
    if isinstance(hint, UnionType):  # of configs: the first one that has these keys
        keys, options = set(value) if isinstance(value, dict) else set(), get_args(hint)
        hint = next((o for o in options if keys <= set(get_type_hints(o))), options[0])
    if dataclasses.is_dataclass(hint):
        return from_dict(hint, value)
    if kind is tuple and isinstance(value, list | tuple) and len(value) <= MOST_ITEMS:
        return tuple(_restore(get_args(hint)[0], name, item) for item in value)
    if hint in (int, float):
        least, most = BOUNDS.get(name, (1, MOST))
        fits = type(value) in (int, hint) and least <= value <= most
        expected = f"a {'whole ' if hint is int else ''}number, {least:g} to {most:g}"
    elif kind is Literal:
        fits, expected = value in get_args(hint), f"one of {list(get_args(hint))}"
    elif kind is tuple:
        fits, expected = False, f"a list of at most {MOST_ITEMS}"
    else:
        fits, expected = isinstance(value, hint), f"a {hint.__name__}"
    if not fits:
        todo = "The file is damaged, made by hand or of another version."
        raise LmdError(f"{name} {value!r:.80}", expected, todo)
    return value
