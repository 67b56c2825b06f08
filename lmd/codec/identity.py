"""Which codec latents are of: a digest of the encoder, noted wherever latents are learned from."""

import hashlib
import json
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from lmd.config import OobleckConfig, SpectralCodecConfig, to_dict
from lmd.model.weights import tensors_sha256

ENCODER = "encoder."  # both codecs call it so; the latents' mean and scale lie in it too
DECODER_SIZES = ("width", "depth", "step_width", "step_depth", "horizon_frames")


def encoder_digest(
    config: SpectralCodecConfig | OobleckConfig, tensors: Mapping[str, Tensor]
) -> str:
    """A digest of all that a codec's latents depend on.

    SHA-256 of the encoder's tensors (names, shapes, values in float32; for the spectral codec the
    latents' mean and scale are among them) and of the sizes that encoding reads, such as the
    window of the transform. Another decoder leaves it as it is.
    """
    encoder = {name: tensor for name, tensor in tensors.items() if name.startswith(ENCODER)}
    sizes = to_dict(config)
    if isinstance(config, SpectralCodecConfig):
        sizes = {name: size for name, size in sizes.items() if name not in DECODER_SIZES}
    text = json.dumps([sizes, tensors_sha256(encoder)], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


def codec_hash_of(notes: Mapping[str, Any]) -> str | None:
    """The digest of the encoder whose latents a model learned, if its file says that."""
    found: Any = notes
    for name in ("data", "latent_settings", "codec"):
        found = found.get(name) if isinstance(found, Mapping) else None
    return found if isinstance(found, str) else None
