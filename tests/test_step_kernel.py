"""What is computed between a training step's products: the kernel against the plain formulas."""

import os
import shutil
import subprocess
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path

import learning
import pytest
import torch
import torch.nn.functional as F
from learning import gradients, plain_gate, plain_rotate

from lmd import operations, product_attention, step_kernel
from lmd.checkpoint import build_model
from lmd.config import preset
from lmd.errors import LmdError
from lmd.operations import Rotation, gated, linear, normalised, rotate
from lmd.step_kernel import can_use_step_kernel, why_no_step_kernel
from lmd.training.draws import BatchIndices
from lmd.training.module import stage_loss, step_noise
from lmd.training.speed import kinds

needs_kernel = pytest.mark.skipif(not can_use_step_kernel(), reason=why_no_step_kernel())
ROUNDED = 0.004  # a bfloat16's share of error, as a norm; measured 0.0012 to 0.0029


numbers = partial(learning.numbers, dtype=torch.bfloat16)


def distance(one, other):
    return ((one.double() - other).norm() / other.norm()).item()


def assert_agree(work, exact, *inputs):
    """`work` by the kernel against `exact` in double precision."""
    with torch.autocast("cpu", torch.bfloat16):
        found = gradients(work, *inputs)
    expected = gradients(exact, *(x.double() for x in inputs))
    for ours, theirs, given in zip(found, expected, [None, *inputs], strict=True):
        assert distance(ours, theirs) < ROUNDED
        assert ours.shape == theirs.shape
        assert given is None or ours.dtype == given.dtype


def test_the_kernel_runs_where_it_can():
    has_compiler = any(shutil.which(name) for name in ("g++", "clang++"))
    on = all(os.environ.get(switch) != "0" for switch in step_kernel.SWITCHES)
    assert can_use_step_kernel() == (sys.platform.startswith("linux") and has_compiler and on)


@needs_kernel
@pytest.mark.parametrize("n_tokens", [1, 7, 150])  # of two rows: one block of rows, several
@pytest.mark.parametrize("part", [slice(0, 192), slice(192, 384)])
def test_heads_in_wider_rows_are_normalised(n_tokens, part):
    def heads(x):
        return x[..., part].unflatten(-1, (3, 64)).transpose(1, 2)

    assert_agree(
        lambda x, weight, bias: normalised(heads(x), weight, bias, 1e-6),
        lambda x, weight, bias: F.layer_norm(heads(x), (64,), weight, bias, 1e-6),
        numbers(2, n_tokens, 576) * 3 + 1,
        *numbers(2, 64, seed=1, dtype=torch.float32),
    )


@needs_kernel
@pytest.mark.parametrize(
    "lay", [torch.Tensor.contiguous, lambda x: x.transpose(0, 1), lambda x: x[:, ::2]]
)
def test_tokens_are_normalised_however_they_lie(lay):
    assert_agree(
        lambda x, weight: normalised(lay(x), weight, None, 1e-5),
        lambda x, weight: F.layer_norm(lay(x), (96,), weight, None, 1e-5),
        numbers(4, 6, 96),
        numbers(96, seed=1, dtype=torch.float32),
    )


@needs_kernel
@pytest.mark.parametrize("n_heads", [1, 3])
def test_heads_are_normalised_however_they_lie(n_heads):
    weight, bias = numbers(2, 64, seed=1, dtype=torch.float32)
    x = numbers(2, n_heads, 9, 64)
    for lay in (
        torch.Tensor.contiguous,
        lambda x: x[:, :, 2:7],
        lambda x: x[:1].expand(3, -1, -1, -1),
    ):
        assert_agree(
            lambda x, weight, bias, lay=lay: normalised(lay(x), weight, bias, 1e-6),
            lambda x, weight, bias, lay=lay: F.layer_norm(lay(x), (64,), weight, bias, 1e-6),
            x,
            weight,
            bias,
        )


@needs_kernel
def test_rows_that_hardly_vary_are_normalised_with_epsilon():
    x, weight = numbers(2, 3, 96) * 1e-3, torch.ones(96)
    x[0] = 2.5  # not at all
    found = normalised(x.requires_grad_(), weight, None, 1e-6)
    expected = F.layer_norm(x.double(), (96,), None, None, 1e-6)
    assert (found[0] == 0).all()
    assert distance(found, expected) < ROUNDED


@needs_kernel
def test_pairs_are_turned():
    angle = numbers(9, 16, seed=1, dtype=torch.float64)
    turn = Rotation(angle.cos(), angle.sin())

    single = Rotation(*(part.float() for part in turn))
    assert_agree(lambda x: rotate(x, single), lambda x: plain_rotate(x, turn), numbers(2, 3, 9, 64))


@needs_kernel
def test_gates_are_taken():
    assert_agree(gated, plain_gate, numbers(2, 70, 320) * 4)


@needs_kernel
def test_every_gate_is_exact_to_one_rounding():
    """All bfloat16 numbers from the smallest that are not denormal to those that overflow."""
    gate = torch.arange(1 << 16, dtype=torch.int32).to(torch.int16).view(torch.bfloat16)
    gate = gate[(gate.abs() > 1e-30) & (gate.abs() < 80)]
    gate = gate[: len(gate) // 32 * 32]
    found = step_kernel.gate(torch.cat([torch.ones_like(gate), gate])[None])
    share = 1 / (1 + (-gate.double()).exp())
    error = (found[0].double() / (gate.double() * share) - 1).abs()
    assert error.max() < 2**-8 + 5e-5  # half of the last place, of 8 bits, and the formula's own


@needs_kernel
def test_a_gate_far_out_stays_finite_and_a_nan_is_not_hidden():
    far = torch.tensor([-1e30, -200.0, -88.0, 0.0, 88.0, 200.0, 1e30, float("nan")])
    x = torch.stack([torch.ones(8), far]).repeat_interleave(2, dim=1).reshape(1, 1, 32)
    out, gradient = gradients(gated, x.bfloat16())
    expected = F.silu(far).repeat_interleave(2).bfloat16()[None, None]
    assert torch.allclose(out, expected, rtol=0.01, atol=1e-7, equal_nan=True)
    assert torch.isfinite(gradient.view(2, 16)[:, :14]).all()
    assert torch.isnan(normalised(x.bfloat16().requires_grad_(), torch.ones(32), None, 1e-5)).all()


@needs_kernel
@pytest.mark.parametrize("n_rows", [1, 64, 131])
def test_a_bias_learns(n_rows):
    x, weight = numbers(2, n_rows, 48), numbers(96, 48, seed=1, dtype=torch.float32) / 7
    assert_agree(linear, F.linear, x, weight, numbers(96, seed=2, dtype=torch.float32))


@needs_kernel
def test_what_is_summed_over_rows_does_not_depend_on_threads():
    x, gradient, weight = numbers(3, 211, 96), numbers(3, 211, 96, seed=1), torch.ones(96)
    before, found = torch.get_num_threads(), []
    try:
        for n_threads in (1, 2, 3):
            torch.set_num_threads(n_threads)
            found.append([step_kernel.sum_rows(x[0])])
            found[-1] += step_kernel.unnormalise(gradient, x, weight, 1e-5)
    finally:
        torch.set_num_threads(before)
    for other in found[1:]:
        assert all(torch.equal(*pair) for pair in zip(found[0], other, strict=True))


@needs_kernel
def test_tokens_taken_and_put_back_are_added_up():
    x, tokens = numbers(2, 3, 20, 16), torch.tensor([3, 4, 5, 3, 19])
    taken = step_kernel.take(x, tokens)
    assert torch.equal(taken, x[:, :, tokens])
    parts, whose = [taken, taken[:, :, 1:3]], [tokens, tokens[1:3].contiguous()]
    expected = torch.zeros(2, 3, 20, 16)
    for part, some in zip(parts, whose, strict=True):
        expected.index_add_(2, some, part.float())
    assert torch.equal(step_kernel.put(parts, whose, 20), expected.bfloat16())


@needs_kernel
def test_what_does_not_fit_is_refused_before_it_is_read():
    x, ones, angle = numbers(2, 3, 5, 64), torch.ones(64), torch.ones(5, 16)
    some = torch.tensor([0, 4])
    for work, told in (
        (lambda: step_kernel.normalise(x, ones[:32], None, 1e-5), r"\(32,\).*\(64,\)"),
        (lambda: step_kernel.normalise(x, ones.bfloat16(), None, 1e-5), "bfloat16.*float32"),
        (lambda: step_kernel.normalise(x, ones, ones[:1], 1e-5), r"\(1,\).*\(64,\)"),
        (lambda: step_kernel.normalise(x.half(), ones, None, 1e-5), "float16.*bfloat16"),
        (lambda: step_kernel.normalise(x[..., :20], ones[:20], None, 1e-5), "divides"),
        (lambda: step_kernel.unnormalise(x, x, ones[:63], 1e-5), r"\(63,\).*\(64,\)"),
        (lambda: step_kernel.unnormalise(x[:, :, :4], x, ones, 1e-5), "3, 4, 64.*3, 5, 64"),
        (lambda: step_kernel.rotate(x, angle[:4], angle[:4], False), r"\(4, 16\).*\(5, 16\)"),
        (lambda: step_kernel.rotate(x, angle, angle[:, :8], False), r"\(5, 8\).*\(5, 16\)"),
        (lambda: step_kernel.rotate(x, ones.expand(5, 64), angle, False), r"5, 64.*5, 32"),
        (lambda: step_kernel.gate(x[..., :20]), "divides"),
        (lambda: step_kernel.gate(x.float()), "float32.*bfloat16"),
        (lambda: step_kernel.ungate(x, x), "5, 64.*5, 32"),
        (lambda: step_kernel.sum_rows(x[0, 0].float()), "float32.*bfloat16"),
        (lambda: step_kernel.take(x, some.int()), "int32.*int64"),
        (lambda: step_kernel.take(x, some + 1), "tokens 1 to 5"),
        (lambda: step_kernel.put([x], [some], 5), "3, 5, 64.*3, 2, 64"),
        (lambda: step_kernel.put([x[:, :, :2]], [some - 1], 5), "tokens -1 to 3"),
    ):
        with pytest.raises(LmdError, match="(?s)" + told):
            work()


@needs_kernel
@pytest.mark.parametrize("name", ["normalise", "rotate", "gate"])
def test_pytorch_finds_nothing_wrong_with_the_operations(name):
    """Their shapes without data, their gradients' registration: what a compiler relies on."""
    angle, ones = numbers(5, 16, dtype=torch.float32), torch.ones(64, requires_grad=True)
    x = numbers(2, 3, 5, 64).requires_grad_()
    inputs = {
        "normalise": (x, ones, ones, 1e-5),
        "rotate": (x, angle.cos(), angle.sin(), False),
        "gate": (x,),
    }
    torch.library.opcheck(getattr(torch.ops.lmd, name).default, inputs[name])


@needs_kernel
def test_a_compiler_goes_on_across_them():
    worker = Path(__file__).with_name("step_worker.py")
    run = subprocess.run([sys.executable, worker], capture_output=True, text=True, timeout=300)
    assert run.returncode == 0, run.stderr
    assert run.stdout.strip() == "True"


def step_of(kind, model):
    """The loss of a training step of this kind, and all gradients as one vector."""
    rows = BatchIndices(0, 0, tuple(range(len(kind.clean))), len(kind.clean))
    noise = step_noise(kind.options, rows, kind.clean.shape[1])
    prompts = numbers(len(kind.clean), 4, model.config.text_dim, dtype=torch.float32)
    condition = model.condition(prompts, 5.0)
    loss = stage_loss(model, kind.clean, noise, condition, kind.options, rows).mean()
    gradients = torch.autograd.grad(loss, list(model.parameters()), allow_unused=True)
    return loss.item(), torch.cat([g.flatten() for g in gradients if g is not None])


@needs_kernel
@pytest.mark.parametrize("which", [0, 1, 2])
def test_a_training_step_in_bfloat16_is_no_farther_from_exact_with_the_kernel(which, monkeypatch):
    small = preset("small")
    sizes = replace(small, dit=replace(small.dit, width=128, n_heads=2, depth=2))
    torch.manual_seed(0)
    model = build_model(sizes)
    for parameter in model.parameters():  # output projections begin at zero
        parameter.data += 0.02 * torch.randn_like(parameter)
    kind = kinds(sizes, 1, torch.device("cpu"))[which]
    kind.clean = numbers(*kind.clean.shape, seed=4, dtype=torch.float32)
    exact_loss, exact = step_of(kind, model)
    answers = []
    plain = step_kernel.suits
    with torch.autocast("cpu", torch.bfloat16):
        monkeypatch.setattr(step_kernel, "suits", lambda *w: answers.append(plain(*w)) or plain(*w))
        loss, gradient = step_of(kind, model)
        monkeypatch.setattr(step_kernel, "suits", lambda *widths: False)
        other_loss, other = step_of(kind, model)
    assert sum(answers) > 6 * sizes.dit.depth  # norms, rotations, gates, biases of every block
    error = ((gradient - exact).norm() / exact.norm()).item()
    others = ((other - exact).norm() / exact.norm()).item()
    assert error < 1.05 * others < 0.1, (error, others)
    assert abs(loss - exact_loss) < max(2 * abs(other_loss - exact_loss), 1e-3 * exact_loss)


@pytest.mark.parametrize("switch", step_kernel.SWITCHES)
def test_switched_off_the_plain_formulas_stay_and_the_reason_is_told(switch, monkeypatch):
    for name in step_kernel.SWITCHES:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv(switch, "0")
    assert why_no_step_kernel.__wrapped__() == f"{switch} is 0"
    monkeypatch.setattr(step_kernel, "why_no_step_kernel", why_no_step_kernel.__wrapped__)
    monkeypatch.setattr(step_kernel, "kernel", None)  # whoever called it would be told
    x = numbers(2, 5, 64)
    assert operations._kernel_for(x, 64) is None
    assert not product_attention._suits_kernel(x[None])
    assert distance(gradients(gated, x)[0], plain_gate(x.double())) < ROUNDED


@pytest.mark.parametrize("x", [numbers(2, 5, 64, dtype=torch.float32), numbers(2, 5, 61)])
def test_other_numbers_and_widths_are_left_to_pytorch(x):
    assert operations._kernel_for(x, x.shape[-1]) is None
    with torch.no_grad():
        assert operations._kernel_for(numbers(2, 5, 64), 64) is None
