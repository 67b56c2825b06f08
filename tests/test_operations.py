"""The transformer's inner operations against their plain formulas, forwards and backwards."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from learning import gradients, numbers, plain_gate, plain_rotate
from torch import Tensor

from lmd import product_attention
from lmd.errors import LmdError
from lmd.machine import check_compiler
from lmd.model.dit import RotaryEmbedding
from lmd.operations import Rotation, attend, gated, rotate
from lmd.product_attention import CHUNK_SCORES, parts_of
from lmd.training.losses import pack_blocks, pack_copies


def rotation(n_tokens, dim):
    angle = numbers(n_tokens, dim // 2, seed=5)
    return Rotation(angle.cos(), angle.sin())


def test_rotation_and_its_gradient_equal_the_formula_to_the_bit():
    turn = rotation(7, 6)
    found = gradients(lambda x: rotate(x, turn), numbers(2, 3, 7, 10))
    expected = gradients(lambda x: plain_rotate(x, turn), numbers(2, 3, 7, 10))
    for one, other in zip(found, expected, strict=True):
        assert torch.equal(one, other)


def test_a_rotation_undone_is_none():
    turn, x = rotation(7, 10), numbers(2, 3, 7, 10)
    assert (rotate(rotate(x, turn), turn.backwards) - x).abs().max() < 1e-6  # measured 2e-7


def test_gate_and_its_gradient_equal_the_formula_to_the_bit():
    for one, other in zip(
        gradients(gated, numbers(2, 5, 8)), gradients(plain_gate, numbers(2, 5, 8)), strict=True
    ):
        assert torch.equal(one, other)


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize(("batch", "n_queries"), [(1, 6), (5, 300)])  # one chunk, several
def test_half_precision_attention_learns_what_exact_attention_does(masked, batch, n_queries):
    n_keys = 9 if n_queries == 6 else 1500
    shapes = [(batch, 2, n, 8) for n in (n_queries, n_keys, n_keys)]
    qkv = [numbers(*s, seed=i, dtype=torch.bfloat16) for i, s in enumerate(shapes)]
    assert (batch * 2 * n_queries * n_keys > CHUNK_SCORES) == (batch == 5)
    attn_mask = None
    if masked:
        attn_mask = numbers(n_queries, n_keys, seed=7) > 0
        attn_mask[:, 0] = True
    found = gradients(lambda *x: attend(*x, attn_mask), *qkv)
    exact = gradients(
        lambda *x: F.scaled_dot_product_attention(*x, attn_mask=attn_mask),
        *[x.double() for x in qkv],
    )
    for one, other in zip(found, exact, strict=True):
        distance = (one.double() - other).norm() / other.norm()
        assert distance < 0.02  # bfloat16 keeps 8 bits; measured 0.003 to 0.006


def windows() -> dict[str, Tensor]:
    """Who sees whom in packed training windows, all tokens and those that the last block reads."""
    causal, copies = pack_blocks(3, 48, 96), pack_copies(4, 24, 48)
    short = pack_blocks(4, 12, 48)  # groups too small to be worth it
    return {
        "causal": causal.attn_mask,
        "causal, read": causal.attn_mask[causal.n_clean : -3],
        "copies": copies.attn_mask,
        "short": short.attn_mask,
    }


def tokens_of(runs) -> Tensor:
    return torch.tensor([token for run in runs for token in range(*run)])


@pytest.mark.parametrize("name", windows())
def test_parts_of_a_mask_are_the_mask(name):
    """Every query in one group; what a group has is what is visible; where it can, nothing else."""
    attn_mask = windows()[name]
    found, n_computed = torch.zeros(attn_mask.shape, dtype=torch.int), 0
    for part in parts_of(attn_mask):
        for group in zip(part.queries, part.keys, strict=True):
            queries, keys = (tokens_of(runs) for runs in group)
            seen = torch.ones(len(queries), len(keys), dtype=torch.int)
            if part.attn_mask is not None:
                seen = part.attn_mask.int()
            found[queries[:, None], keys] += seen
            n_computed += seen.numel()
    assert torch.equal(found, attn_mask.int())
    # hidden pairs are left, if any, among the clean blocks that see different numbers of blocks
    share = n_computed / attn_mask.sum().item()
    assert share == 1 if name in ("causal, read", "copies") else share > 1
    assert n_computed < attn_mask.numel() or name == "short"


@pytest.mark.parametrize(("name", "n_parts"), [("causal", 3), ("causal, read", 1), ("short", 0)])
def test_groups_are_attended_apart_wherever_there_are_some(name, n_parts, monkeypatch):
    computed = []
    plain = product_attention._AttendByProducts.apply
    monkeypatch.setattr(
        product_attention._AttendByProducts,
        "apply",
        lambda q, k, v, attn_mask: computed.append((q, k)) or plain(q, k, v, attn_mask),
    )
    attn_mask = windows()[name]
    shapes = [(1, 2, n, 8) for n in (attn_mask.shape[0], attn_mask.shape[1], attn_mask.shape[1])]
    attend(*(numbers(*s, dtype=torch.bfloat16).requires_grad_() for s in shapes), attn_mask)
    assert len(computed) == max(1, n_parts)
    n_pairs = sum(q.shape[1] * q.shape[2] * k.shape[2] for q, k in computed)
    assert (n_pairs < 2 * attn_mask.numel()) == (n_parts > 0)


@pytest.mark.parametrize("name", windows())
@pytest.mark.parametrize("batch", [2, 40])  # one chunk, several
def test_half_precision_attention_in_groups_learns_what_exact_attention_does(name, batch):
    attn_mask = windows()[name]
    shapes = [
        (batch, 2, n, 8) for n in (attn_mask.shape[0], attn_mask.shape[1], attn_mask.shape[1])
    ]
    qkv = [numbers(*s, seed=i, dtype=torch.bfloat16) for i, s in enumerate(shapes)]
    found = gradients(lambda *x: attend(*x, attn_mask), *qkv)
    exact = gradients(
        lambda *x: F.scaled_dot_product_attention(*x, attn_mask=attn_mask),
        *[x.double() for x in qkv],
    )
    for one, other in zip(found, exact, strict=True):
        distance = (one.double() - other).norm() / other.norm()
        assert distance < 0.02  # as above


def test_full_precision_attention_is_the_librarys():
    q, k, v = (numbers(2, 2, 5, 4, seed=i) for i in range(3))
    found = gradients(attend, q, k, v)
    for one, other in zip(found, gradients(F.scaled_dot_product_attention, q, k, v), strict=True):
        assert torch.equal(one, other)


@pytest.mark.slow
@pytest.mark.skipif(not (shutil.which("g++") or shutil.which("clang++")), reason="no compiler")
def test_compiled_blocks_learn_what_plain_ones_do():
    worker = Path(__file__).with_name("compile_worker.py")
    run = subprocess.run([sys.executable, worker], capture_output=True, text=True, timeout=300)
    assert run.returncode == 0, run.stderr
    assert 0 < float(run.stdout) < 0.05  # bfloat16 keeps 8 bits; measured 0.013


def test_without_a_compiler_nothing_is_compiled(monkeypatch):
    monkeypatch.setenv("PATH", "")
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(LmdError, match="without a C"):
        check_compiler()


def test_positions_stay_exact_in_a_model_of_bfloat16():
    positions = torch.arange(240)
    exact = RotaryEmbedding(32, 10_000.0)
    half = RotaryEmbedding(32, 10_000.0).to(torch.bfloat16)
    assert half.inv_freq.dtype == torch.float32
    for found, expected in zip(half(positions), exact(positions), strict=True):
        assert torch.equal(found, expected)
