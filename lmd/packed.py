"""Linear layers whose weights are laid out once for this processor's matrix products.

At the 49 tokens of a streamed block a plain product spends a good part of its time rearranging the
weights it reads. oneDNN keeps them rearranged; PyTorch reaches it through the operators that its
own compiler uses. Where they are missing, the plain layer stays.
"""

import torch
from torch import Tensor, nn

from lmd.dit import LiveModel

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


class PackedLinear(nn.Module):
    """A linear layer for inference on the CPU; results agree with `nn.Linear` within rounding."""

    def __init__(self, linear: nn.Linear, n_tokens: int) -> None:
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.packed = torch.ops.mkldnn._reorder_linear_weight(linear.weight.detach(), n_tokens)
        self.bias = None if linear.bias is None else linear.bias.detach()

    def forward(self, x: Tensor) -> Tensor:
        """`x W^T + b`."""
        flat = x.reshape(-1, self.in_features)
        y = torch.ops.mkldnn._linear_pointwise(flat, self.packed, self.bias, "none", [], "")
        return y.view(*x.shape[:-1], self.out_features)


def can_pack(dtype: torch.dtype = torch.float32) -> bool:
    """Whether this build and processor can."""
    if not torch.backends.mkldnn.is_available() or dtype not in DTYPES:
        return False
    try:
        layer = nn.Linear(8, 8).to(dtype)
        PackedLinear(layer, 1)(torch.zeros(1, 8, dtype=dtype))
    except (AttributeError, RuntimeError):
        return False
    return True


def pack(model: LiveModel, n_tokens: int = 49) -> LiveModel:
    """Repack the transformer's blocks for playing on the CPU, in place, layer by layer.

    The plain weights are let go one by one, so memory does not double; a packed model can be
    played but neither trained nor saved. Where packing is impossible the model stays as it is.

    Args:
        model: to be played.
        n_tokens: how many tokens a pass usually has (block and global token).

    Returns:
        The same model.
    """
    if model.dit.project_in.weight.device.type != "cpu" or not can_pack(model.dit.dtype):
        return model
    parents = [m for m in model.dit.blocks.modules() if not isinstance(m, nn.Linear)]
    for parent in parents:  # hold names, not layers: a held layer keeps its plain weights
        for name in [n for n, child in parent.named_children() if isinstance(child, nn.Linear)]:
            setattr(parent, name, PackedLinear(getattr(parent, name), n_tokens))
    return model


def is_packed(model: LiveModel) -> bool:
    """Whether `pack` has done its work on this model."""
    return any(isinstance(module, PackedLinear) for module in model.modules())
