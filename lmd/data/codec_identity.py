"""Which latents a codec makes: the name under which a folder of latents knows its encoder."""

import hashlib
import json
from pathlib import Path

from lmd.checkpoint import content_sha256, load_tensors
from lmd.config import SpectralCodecConfig, to_dict

ENCODER = "encoder."  # both codecs call it so; the latents' mean and scale lie in it too
DECODER_SIZES = ("width", "depth", "step_width", "step_depth", "horizon_frames")


def encoder_sha256(path: str | Path) -> str:
    """A digest of all that a codec's latents depend on, and of nothing else.

    SHA-256 of the encoder's tensors (names, shapes, values in float32; for the spectral codec the
    latents' mean and scale are among them) and of the sizes that encoding reads, such as the
    window of the transform. Another decoder leaves it as it is.

    Args:
        path: a codec written by `lmd.checkpoint.save_checkpoint`.

    Raises:
        LmdError: see `load_tensors`.
    """
    tensors, header = load_tensors(path, "codec")
    encoder = {name: tensor for name, tensor in tensors.items() if name.startswith(ENCODER)}
    sizes = to_dict(header.config)
    if isinstance(header.config, SpectralCodecConfig):
        sizes = {name: size for name, size in sizes.items() if name not in DECODER_SIZES}
    text = json.dumps([sizes, content_sha256(encoder)], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()
