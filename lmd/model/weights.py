"""Named weights: copying them into a module, all or nothing, and telling them apart."""

import hashlib
from collections.abc import Callable, Mapping
from typing import TypeVar

import torch
from torch import Tensor, nn

from lmd.errors import LmdError

M = TypeVar("M", bound=nn.Module)
MOST_NAMES = 12  # of one kind in a message


def build_loaded(build: Callable[[], M], tensors: Mapping[str, Tensor], source: str) -> M:
    """A module with the given weights, for inference; built only if every name and shape fits.

    What does not fit is found on the meta device, where tensors have shapes and no memory.

    Args:
        build: makes the module with fresh weights.
        tensors: a state dict.
        source: what to call it in a message.

    Raises:
        LmdError: see `check_names_and_shapes`.
    """
    with torch.device("meta"):
        check_names_and_shapes(build(), tensors, source)
    module = build()
    module.load_state_dict(dict(tensors))
    return module.eval()


def load_strict(module: nn.Module, tensors: Mapping[str, Tensor], source: str) -> None:
    """Copy weights into a module, which stays untouched if anything does not fit.

    Raises:
        LmdError: see `check_names_and_shapes`.
    """
    check_names_and_shapes(module, tensors, source)
    module.load_state_dict(dict(tensors))


def check_names_and_shapes(module: nn.Module, tensors: Mapping[str, Tensor], source: str) -> None:
    """Every weight must be there, no other, all of the right shape.

    Raises:
        LmdError: counts and names all that is missing, unknown or of another shape.
    """
    own = module.state_dict()
    both = own.keys() & tensors.keys()
    lists = {
        "missing": sorted(own.keys() - both),
        "unknown": sorted(tensors.keys() - both),
        "of another shape": [
            f"{name} {tuple(tensors[name].shape)} instead of {tuple(own[name].shape)}"
            for name in sorted(both)
            if tensors[name].shape != own[name].shape
        ],
    }
    if any(lists.values()):
        differences = "; ".join(
            f"{len(names)} {kind}: {', '.join(names[:MOST_NAMES])}"
            + (", …" if len(names) > MOST_NAMES else "")
            for kind, names in lists.items()
            if names
        )
        raise LmdError(
            f"{source} with weights {differences}",
            "exactly this model's weights",
            "The file belongs to another model or config: load it with its own.",
        )


def tensors_sha256(tensors: Mapping[str, Tensor], covered: str = "") -> str:
    """The SHA-256 of names, types, shapes and values, in the order of the names.

    Args:
        tensors: as stored.
        covered: a text to cover, too.
    """
    return _sha256(covered, tensors, "{}|{}|{}|")


def fingerprint(part: object) -> str:
    """The SHA-256 of names and weights, whatever the device; without weights, of the class's name.

    Args:
        part: a module, anything else with a `state_dict`, or what wraps one as `model`.
    """
    holder = part if hasattr(part, "state_dict") else getattr(part, "model", part)
    if hasattr(holder, "fingerprint"):  # of weights that were exported
        return holder.fingerprint
    tensors = holder.state_dict() if hasattr(holder, "state_dict") else {}
    return _sha256(type(part).__name__, tensors, "{} {} {}")


def _sha256(start: str, tensors: Mapping[str, Tensor], heading: str) -> str:
    digest = hashlib.sha256(start.encode())
    for name, tensor in sorted(tensors.items()):
        digest.update(heading.format(name, tensor.dtype, tuple(tensor.shape)).encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()
