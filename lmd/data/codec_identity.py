"""Which latents a codec makes: the name under which a folder of latents knows its encoder."""

from pathlib import Path

from lmd.checkpoint import encoder_digest, load_tensors


def encoder_sha256(path: str | Path) -> str:
    """The `encoder_digest` of a codec's file.

    Args:
        path: a codec written by `lmd.checkpoint.save_checkpoint`.

    Raises:
        LmdError: see `load_tensors`.
    """
    tensors, header = load_tensors(path, "codec")
    return encoder_digest(header.config, tensors)
