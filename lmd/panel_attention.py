"""Attention of a streamed block's few queries, in one step between two linear layers.

In PyTorch that is some twenty small operations a layer: norms, rotation, copies of cached and fresh
keys side by side, the attention itself. For 13 to 97 tokens most of their time is spent on starting
threads and on moving what a processor's first cache could have kept. `microkernel.cpp` does all of
it for one head after another; results agree with `lmd.model.dit` within rounding. Where `lmd.tiles`
multiplies, `tilekernel.cpp` does the same in bfloat16.

Source: scores of a group of queries at a time as in FlashAttention (arXiv 2205.14135).
"""

import ctypes
from functools import cache

import torch
from torch import Tensor

from lmd import panels, tiles
from lmd.config import DiTConfig
from lmd.errors import LmdError
from lmd.model.dit import CrossAttention, KeyValue, SelfAttention
from lmd.operations import Rotation
from lmd.panels import can_use_panels
from lmd.shapes import AttentionMask, Tokens
from lmd.tiles import can_use_tiles

_POINTERS = ("q", "k", "v", "q_weight", "q_bias", "k_weight", "k_bias", "cos", "sin")
_POINTERS += ("past_key", "past_value", "visible", "seen", "fresh_key", "fresh_value")
_SIZES = ("n_batch", "n_heads", "n_tokens", "n_past", "dim", "n_turned", "row_stride")


class _Attention(ctypes.Structure):
    """`Attention` in the source."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in _POINTERS),
        *((name, ctypes.c_long) for name in _SIZES),
        ("epsilon", ctypes.c_float),
    )


def suits(x: Tensor, head_dim: int) -> bool:
    """Whether a kernel can attend here: on the CPU, played, heads of whole panels."""
    learns = torch.is_grad_enabled() and x.requires_grad
    if x.device.type != "cpu" or learns or not _has_kernel(x.dtype):
        return False
    columns = tiles.PANEL if x.dtype == torch.bfloat16 else panels.kernel().panel_columns()
    return head_dim % columns == 0 and _attends_rightly(head_dim, x.dtype)


def _has_kernel(dtype: torch.dtype) -> bool:
    """Whether one runs here for numbers of that precision."""
    if dtype == torch.bfloat16:
        return can_use_tiles()
    return dtype == torch.float32 and can_use_panels()


def self_attention(
    attention: SelfAttention,
    x: Tokens,
    rotation: Rotation,
    attn_mask: AttentionMask | None,
    past: KeyValue | None,
) -> tuple[Tokens, KeyValue]:
    """`SelfAttention.heads`: what the heads see, side by side, and the fresh, unrotated keys."""
    head_dim = attention.q_norm.normalized_shape[0]
    if not suits(x, head_dim):
        return attention.heads(x, rotation, attn_mask, past)
    qkv = attention.to_qkv(x)
    n_batch, n_tokens, _ = qkv.shape
    q, k, v = qkv.chunk(3, dim=-1)
    fresh = KeyValue(
        *(x.new_empty(n_batch, attention.n_heads, n_tokens, head_dim) for _ in range(2))
    )
    seen = _attend(
        attention, q, k, v, rotation=rotation, attn_mask=attn_mask, past=past, fresh=fresh
    )
    return seen, fresh


def cross_attention(attention: CrossAttention, x: Tokens, text: KeyValue) -> Tokens:
    """`CrossAttention.heads`: what the heads see of the text, side by side."""
    if not suits(x, attention.q_norm.normalized_shape[0]):
        return attention.heads(x, text)
    return _attend(attention, attention.to_q(x), past=text)


def _attend(
    attention: SelfAttention | CrossAttention,
    q: Tensor,
    k: Tensor | None = None,
    v: Tensor | None = None,
    *,
    rotation: Rotation | None = None,
    attn_mask: AttentionMask | None = None,
    past: KeyValue | None = None,
    fresh: KeyValue | None = None,
) -> Tokens:
    """Fill in the structure and call; `q`, `k` and `v` may be parts of wider rows."""
    n_batch, n_tokens, width = q.shape
    head_dim = width // attention.n_heads
    if past is None:
        past = KeyValue(*(q.new_empty(n_batch, attention.n_heads, 0, head_dim) for _ in range(2)))
    n_past = past.key.shape[2]
    shape = (n_batch, attention.n_heads, n_past, head_dim)
    tensors = {
        "q": q,
        "k": k,
        "v": v,
        "q_weight": attention.q_norm.weight,
        "q_bias": attention.q_norm.bias,
        "past_key": past.key.expand(shape).contiguous(),
        "past_value": past.value.expand(shape).contiguous(),
        "seen": q.new_empty(n_batch, n_tokens, width),
    }
    if fresh is not None:
        tensors |= {"k_weight": attention.k_norm.weight, "k_bias": attention.k_norm.bias}
        tensors |= {"fresh_key": fresh.key, "fresh_value": fresh.value}
    if rotation is not None:
        tensors |= {"cos": rotation.cos.contiguous(), "sin": rotation.sin.contiguous()}
    if attn_mask is not None:
        tensors["visible"] = attn_mask.contiguous()
    n_keys = n_past + (0 if k is None else n_tokens)
    _check(tensors, (n_tokens, n_keys))
    call = _Attention(
        n_batch=n_batch,
        n_heads=attention.n_heads,
        n_tokens=n_tokens,
        n_past=n_past,
        dim=head_dim,
        n_turned=0 if rotation is None else 2 * rotation.cos.shape[-1],
        row_stride=q.stride(1),
        epsilon=attention.q_norm.eps,
        **{name: t.data_ptr() for name, t in tensors.items() if t is not None},
    )
    in_tiles = q.dtype == torch.bfloat16
    attend = tiles.kernel().tile_attend if in_tiles else panels.kernel().panel_attend
    attend(ctypes.byref(call), torch.get_num_threads())
    return tensors["seen"]


def _check(tensors: dict[str, Tensor | None], seen_by: tuple[int, int]) -> None:
    """The kernel reads what it is pointed at, so what it is pointed at is looked at before."""
    for name, tensor in tensors.items():
        if tensor is None:
            continue
        angles = {"cos": torch.float32, "sin": torch.float32}
        expected = {"visible": torch.bool, **angles}.get(name, tensors["q"].dtype)
        rows = name in ("q", "k", "v")  # parts of rows that are one after another
        fits = tensor.stride(-1) == 1 and (not rows or tensor.stride() == tensors["q"].stride())
        fits &= not rows or tensor.stride(0) == tensor.shape[1] * tensor.stride(1)
        fits &= name != "visible" or tuple(tensor.shape) == seen_by
        fits &= name not in ("cos", "sin") or len(tensor) == seen_by[0]
        if tensor.dtype != expected or not fits:
            raise LmdError(
                f"{name} of {tensor.dtype}, shape {tuple(tensor.shape)}, stride {tensor.stride()}",
                f"{expected}, for queries and keys {seen_by}, rows one after another",
                "Convert the model and what it remembers together, or set LMD_PANELS=0.",
            )


@cache
def _attends_rightly(head_dim: int, dtype: torch.dtype = torch.float32) -> bool:
    """Whether the kernel, as this compiler made it, agrees with the plain formulas."""
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    n_heads, n_tokens, n_past = 2, 15, 20
    with torch.random.fork_rng(devices=[]):  # layers draw weights from the caller's randomness
        attention = SelfAttention(DiTConfig(width=n_heads * head_dim, n_heads=n_heads))
    for parameter in attention.requires_grad_(False).parameters():
        parameter.copy_(normal(*parameter.shape) * parameter.shape[-1] ** -0.5)
    attention.to(dtype)
    past = KeyValue(*(normal(1, n_heads, n_past, head_dim).to(dtype) for _ in range(2)))
    angle = normal(n_tokens, head_dim // 4)
    rotation = Rotation(angle.cos(), angle.sin())
    attn_mask = normal(n_tokens, n_past + n_tokens) > 0
    attn_mask[:, 0] = True
    x = normal(1, n_tokens, n_heads * head_dim).to(dtype)
    qkv = attention.to_qkv(x).chunk(3, dim=-1)
    fresh = KeyValue(*(x.new_empty(1, n_heads, n_tokens, head_dim) for _ in range(2)))
    seen = _attend(attention, *qkv, rotation=rotation, attn_mask=attn_mask, past=past, fresh=fresh)
    expected, kept = attention.heads(x, rotation, attn_mask, past)
    pairs = ((seen, expected), (fresh.key, kept.key), (fresh.value, kept.value))
    close = 1e-4 if dtype == torch.float32 else 0.05  # torch rounds between its steps
    return all(torch.allclose(ours, theirs, atol=close) for ours, theirs in pairs)
