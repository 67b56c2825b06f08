"""The masks against the rules, frame by frame."""

import pytest
import torch

from lmd.errors import LmdError
from lmd.model.masks import all_blocks_mask, attention_mask, fused_step_mask


def test_encdec_context_sees_context_and_target_sees_all():
    mask = attention_mask("enc-dec", 4, 2)
    for q in range(7):
        for k in range(7):
            assert mask[q, k] == (k < 4 or q >= 4)


def test_block_causal_sees_itself_and_n_blocks_back():
    mask = attention_mask("block-causal", 6, 2)  # blocks 0 1 2 | 3 + global token
    for q in range(9):
        for k in range(9):
            behind = min(q // 2, 3) - min(k // 2, 3)
            assert mask[q, k] == (0 <= behind <= 3)


@pytest.mark.parametrize("regime", ["enc-dec", "block-causal"])
def test_context_sees_neither_target_nor_global_token(regime):
    mask = attention_mask(regime, 12, 4)
    assert not mask[:12, 12:].any()
    assert mask[12:].any(dim=1).all()


def test_full_sees_everything():
    assert attention_mask("full", 6, 2).all()


def test_fused_mask_is_the_window_rule_cut_out_of_a_longer_history():
    n, o = 3, 2
    block = (torch.arange((n + 2) * o + 1) // o).clamp(max=n + 1)
    behind = block[:, None] - block[None, :]
    whole = (behind >= 0) & (behind <= n)
    assert torch.equal(fused_step_mask(n, o), whole[n * o :])


def test_all_blocks_mask_gives_each_noised_block_its_own_past():
    n_blocks, o, n = 4, 2, 2
    mask = all_blocks_mask(n_blocks, o, n)
    kinds = ["clean"] * 8 + ["noised"] * 8 + ["global"] * 4
    blocks = [i // 2 for i in range(8)] * 2 + list(range(4))
    for q, (kind_q, block_q) in enumerate(zip(kinds, blocks, strict=True)):
        for k, (kind_k, block_k) in enumerate(zip(kinds, blocks, strict=True)):
            if kind_q == "clean":
                expected = kind_k == "clean" and 0 <= block_q - block_k <= n
            elif kind_k == "clean":
                expected = 1 <= block_q - block_k <= n
            else:
                expected = block_q == block_k
            assert mask[q, k] == expected, (q, k)


def test_bad_regimes_and_blocks_are_refused():
    with pytest.raises(LmdError, match="block-causal"):
        attention_mask("causal", 6, 2)
    with pytest.raises(LmdError, match="divides the context"):
        attention_mask("block-causal", 6, 4)
