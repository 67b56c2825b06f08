"""Named weights: copying them into a module, all or nothing, and telling them apart."""

import hashlib
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from lmd.errors import LmdError


def load_strict(module: nn.Module, tensors: Mapping[str, Tensor], source: str) -> None:
    """Copy weights into a module; every one must be there, no other, all of the right shape.

    Args:
        module: receives the weights; untouched if anything is refused.
        tensors: a state dict.
        source: what to call it in a message.

    Raises:
        LmdError: lists everything that is missing, unknown or of another shape.
    """
    own = module.state_dict()
    both = own.keys() & tensors.keys()
    other = [
        f"{name} {tuple(tensors[name].shape)} instead of {tuple(own[name].shape)}"
        for name in sorted(both)
        if tensors[name].shape != own[name].shape
    ]
    refuse_unmatched(source, sorted(own.keys() - both), sorted(tensors.keys() - both), other)
    module.load_state_dict(dict(tensors))


def refuse_unmatched(
    source: str, missing: list[str], unknown: list[str], other_shape: list[str]
) -> None:
    """Raise with every name that does not match; pass if there is none."""
    lists = {"missing": missing, "unknown": unknown, "of another shape": other_shape}
    if any(lists.values()):
        told = "; ".join(f"{len(v)} {k}: {', '.join(v)}" for k, v in lists.items() if v)
        raise LmdError(
            f"{source} with weights {told}",
            "exactly this model's weights",
            "The file belongs to another model or config: load it with its own.",
        )


def fingerprint(part: object) -> str:
    """The SHA-256 of names and weights, whatever the device; without weights, of the class's name.

    Args:
        part: a module, anything else with a `state_dict`, or what wraps one as `model`.
    """
    holder = part if hasattr(part, "state_dict") else getattr(part, "model", part)
    if hasattr(holder, "fingerprint"):  # of weights that were exported
        return holder.fingerprint
    digest = hashlib.sha256(type(part).__name__.encode())
    if hasattr(holder, "state_dict"):
        for name, tensor in sorted(holder.state_dict().items()):
            digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
            raw = tensor.detach().cpu().contiguous().flatten().view(torch.uint8)
            digest.update(raw.numpy())
    return digest.hexdigest()
