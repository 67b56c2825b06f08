"""Who sees whom: the rules of the three regimes, as tensors.

Frames come first in time order, then the global token (it carries t and sits last). `True` at
[query, key] means that the query sees the key.

Source: Live Music Diffusion Models (arXiv 2605.22717), attention masks; the sliding window is
`context // block` blocks back everywhere (training, bootstrap, fused step, later steps).
Taught in notebook 02_outpaint.
"""

import torch
from torch import Tensor

from lmd.config import REGIMES, Regime, check_block
from lmd.errors import LmdError
from lmd.shapes import AttentionMask


def attention_mask(regime: Regime, context_frames: int, block_frames: int) -> AttentionMask:
    """The mask of one window: context, block, global token.

    `full`: everybody sees everybody. `enc-dec`: context sees context; block and global token see
    everything. `block-causal`: a block sees itself and the `context // block` blocks before it; the
    global token belongs to the last block.

    Args:
        regime: one of `full`, `enc-dec`, `block-causal`.
        context_frames: known frames, in front.
        block_frames: frames to be generated, behind them.

    Returns:
        `[T + 1, T + 1]`, T = context + block.

    Raises:
        LmdError: an unknown regime; a block that does not divide the context (block-causal).
    """
    n_frames = context_frames + block_frames
    index = torch.arange(n_frames + 1)
    query, key = index[:, None], index[None, :]
    if regime == "full":
        return torch.ones(n_frames + 1, n_frames + 1, dtype=torch.bool)
    if regime == "enc-dec":
        return (key < context_frames) | (query >= context_frames)
    if regime == "block-causal":
        n_context = check_block(context_frames, block_frames)
        block = (index // block_frames).clamp(max=n_context)
        return window_rule(block, block, n_context)
    raise LmdError(f"regime {regime!r}", f"one of {', '.join(REGIMES)}", "Pick one of these.")


def context_mask(regime: Regime, context_frames: int, block_frames: int) -> AttentionMask:
    """The mask of a pass over the context alone: frames as in `attention_mask`.

    The global token is there, since every pass has one, but no frame sees it.

    Returns:
        `[s + 1, s + 1]`.
    """
    whole = attention_mask(regime, context_frames, block_frames)
    seen = torch.zeros(context_frames + 1, context_frames + 1, dtype=torch.bool)
    seen[:-1, :-1] = whole[:context_frames, :context_frames]
    seen[-1] = True
    return seen


def window_rule(query_block: Tensor, key_block: Tensor, n_context: int) -> AttentionMask:
    """A query sees keys of its own block and of the `n_context` blocks before it."""
    behind = query_block[:, None] - key_block[None, :]
    return (behind >= 0) & (behind <= n_context)


def fused_step_mask(n_context: int, block_frames: int) -> AttentionMask:
    """The mask of the fused first step.

    Queries: the finished block, the new block, the global token. Keys: `n_context` cached blocks,
    then the same three. Block indices: cached 0 ... n-1, finished n, new n+1.
    """
    fresh = torch.cat(
        [
            torch.full((block_frames,), n_context),
            torch.full((block_frames + 1,), n_context + 1),
        ]
    )
    cached = torch.arange(n_context).repeat_interleave(block_frames)
    return window_rule(fresh, torch.cat([cached, fresh]), n_context)


def all_blocks_mask(n_blocks: int, block_frames: int, n_context: int) -> AttentionMask:
    """The mask that teaches every block of a window in one pass.

    Tokens: a clean copy of the window, a noised copy, one global token per block. A clean block
    follows the window rule among clean blocks. A noised block, and its global token, see the
    `n_context` clean blocks before it, the noised block itself and its global token
    (Block Diffusion, arXiv 2503.09573).

    Returns:
        `[2 n o + n, 2 n o + n]` for n blocks of o frames.
    """
    block = torch.arange(n_blocks).repeat_interleave(block_frames)
    block = torch.cat([block, block, torch.arange(n_blocks)])
    is_clean = torch.arange(len(block)) < n_blocks * block_frames
    behind = block[:, None] - block[None, :]
    within = window_rule(block, block, n_context)
    clean_to_clean = is_clean[:, None] & is_clean[None, :] & within
    noised_to_clean = ~is_clean[:, None] & is_clean[None, :] & within & (behind > 0)
    noised_to_noised = ~is_clean[:, None] & ~is_clean[None, :] & (behind == 0)
    return clean_to_clean | noised_to_clean | noised_to_noised
