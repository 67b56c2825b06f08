"""ARC-Forcing's judge: losses on closed forms, labels on their frames."""

import math
from dataclasses import replace

import pytest
import torch
from engine import CONFIG, WINDOW, random_model
from torch import Tensor, nn

from lmd.arc.discriminator import PATCH_FRAMES, Discriminator, HeadConfig, ScoreHead
from lmd.arc.losses import (
    Prompts,
    RealFakePair,
    contrastive_loss,
    derangement,
    discriminator_loss,
    frozen,
    generator_loss,
    relativistic_loss,
    smoothness,
)
from lmd.errors import LmdError
from lmd.model.live_model import LiveModel

HEAD = HeadConfig(channels=(8, 8, 12, 16), n_blocks=1)
CONTEXT, BLOCK = WINDOW.context_frames, WINDOW.block_frames
REGIMES = ("enc-dec", "block-causal")


def draws(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def asked(batch: int = 3, dropped: tuple[int, ...] = (), seed: int = 1) -> Prompts:
    flags = torch.tensor([i in dropped for i in range(batch)])
    return Prompts(torch.randn(batch, 6, 8, generator=draws(seed)), flags)


def trial(batch: int = 3, n_blocks: int = 2) -> RealFakePair:
    real = torch.randn(batch, 4, CONTEXT + n_blocks * BLOCK, generator=draws(2))
    fake = torch.randn(batch, 4, CONTEXT + n_blocks * BLOCK, generator=draws(3))
    fake[..., :CONTEXT] = real[..., :CONTEXT]
    noise = torch.randn(real.shape, generator=draws(4))
    return RealFakePair(
        real=real,
        fake=fake,
        asked=asked(batch),
        wrong=asked(batch, seed=2),
        t=torch.tensor([0.2, 0.5, 0.9])[:batch],
        noise=noise,
        nudge=torch.randn(real.shape, generator=draws(5)),
        first_frame=CONTEXT,
        seconds=3.0,
    )


def discriminator(last_block: str = "blocks.1") -> Discriminator:
    """Random weights everywhere, so that everything matters."""
    net = Discriminator(random_model(seed=5), last_block, HEAD)
    with torch.random.fork_rng():
        torch.manual_seed(6)
        for parameter in net.head.parameters():
            parameter.data = torch.randn(parameter.shape) * 0.3
    return net


def scores_of(judge, question, clean, asked=None) -> Tensor:
    (scores,) = question.scores(judge, (clean, asked or question.asked))
    return scores


# Losses


def test_pair_loss_is_log_two_for_equal_scores_and_linear_far_on_the_wrong_side():
    scores = torch.randn(3, 5)
    # float32 rounding of log 2: 6e-8
    assert relativistic_loss(scores, scores).item() == pytest.approx(math.log(2), abs=1e-6)
    assert relativistic_loss(scores - 50, scores).item() == pytest.approx(50, rel=1e-6)
    assert relativistic_loss(scores + 50, scores).item() == pytest.approx(0, abs=1e-6)


def test_pair_loss_equals_its_closed_form_and_its_gradient_is_a_sigmoid():
    winner = torch.tensor([[0.5, -1.0]], requires_grad=True)
    loser = torch.tensor([[-0.5, 2.0]])
    loss = relativistic_loss(winner, loser)
    expected = (math.log(1 + math.exp(-1)) + math.log(1 + math.exp(3))) / 2
    assert loss.item() == pytest.approx(expected, rel=1e-6)
    loss.backward()
    expected_grad = -torch.sigmoid(torch.tensor([[-1.0, 3.0]])) / 2
    torch.testing.assert_close(winner.grad, expected_grad, atol=1e-6, rtol=0)


def test_contrastive_loss_counts_only_items_whose_condition_changed():
    right, wrong = torch.tensor([[1.0, 1.0], [0.0, 0.0]]), torch.tensor([[0.0, 0.0], [9.0, 9.0]])
    first_only = contrastive_loss(right, wrong, torch.tensor([True, False]))
    assert first_only.item() == pytest.approx(math.log(1 + math.exp(-1)) / 2, rel=1e-6)
    both = contrastive_loss(right, wrong, torch.tensor([True, True]))
    expected = (math.log(1 + math.exp(-1)) + math.log(1 + math.exp(9))) / 2
    assert both.item() == pytest.approx(expected, rel=1e-6)
    assert contrastive_loss(right, wrong, torch.tensor([False, False])).item() == 0


@pytest.mark.parametrize("n", [2, 3, 4, 9])
def test_a_derangement_is_a_permutation_that_moves_everybody(n):
    for seed in range(50):
        order = derangement(n, draws(seed))
        assert sorted(order.tolist()) == list(range(n))
        assert all(order[i] != i for i in range(n))


def test_both_derangements_of_three_are_drawn_equally_often():
    firsts = [int(derangement(3, generator)[0]) for generator in [draws(0)] for _ in range(400)]
    assert 150 < firsts.count(1) < 250  # binomial, 400 draws: five standard deviations are 50


def test_one_item_cannot_be_deranged():
    with pytest.raises(LmdError, match="at least 2 items"):
        derangement(1, draws())


def test_conditions_differ_by_prompt_or_by_dropout():
    question, other = asked(4, dropped=(2, 3)), asked(4, dropped=(3,), seed=2)
    other.prompt[1] = question.prompt[1]
    assert question.differs(other).tolist() == [True, False, True, False]


def test_smoothness_of_a_linear_score_is_its_squared_gradient():
    weight = torch.randn(64, generator=draws(0))
    step = 0.05 * torch.randn(20_000, 64, generator=draws(1))
    moved = (step @ weight)[:, None]
    found = smoothness(torch.zeros_like(moved), moved, 0.05)
    # the mean of 20,000 squared normals: standard error 1 %; measured 0.1 %
    assert found.item() == pytest.approx(weight.square().sum().item(), rel=0.04)


def test_real_and_fake_are_noised_alike():
    """The same music on both sides scores the same: equal t, equal noise.

    Not to the bit: some processors round a product by its row. Other noise moves scores by units.
    """
    same = trial()
    same = replace(same, fake=same.real)
    verdict = discriminator_loss(discriminator(), same, contrastive=0)
    torch.testing.assert_close(verdict.real, verdict.fake, rtol=1e-4, atol=1e-3)
    # half of what scores of up to 50 differ by: 1.5e-5 at most where a row's place changes rounding
    assert verdict.pair.item() == pytest.approx(math.log(2), abs=1e-4)


def test_the_terms_add_up_with_their_weights():
    judge, question = discriminator(), trial()
    alone = discriminator_loss(judge, question, contrastive=0)
    both = discriminator_loss(judge, question, contrastive=2.0)
    torch.testing.assert_close(both.loss, alone.loss + 2 * both.contrastive)
    assert both.contrastive > 0
    smooth = discriminator_loss(judge, question, contrastive=0, r1=1, r2=1)
    assert smooth.loss > alone.loss


def test_each_loss_reaches_its_own_network_alone():
    judge, question = discriminator(), trial()
    fake = question.fake.clone().requires_grad_(True)
    question = replace(question, fake=fake)
    with frozen(judge):
        generator_loss(judge, question).loss.backward()
    assert fake.grad.abs().sum() > 0
    assert all(parameter.grad is None for parameter in judge.parameters())
    assert all(parameter.requires_grad for parameter in judge.parameters())
    fake.grad = None
    discriminator_loss(judge, question).loss.backward()
    assert fake.grad is None
    assert all(parameter.grad is not None for parameter in judge.head.parameters())


# The discriminator


def own_taps_only(head: ScoreHead) -> None:
    """Leave of every kernel the taps that lie over its own patch."""
    with torch.no_grad():
        for layer in (*head.modules(),):
            if isinstance(layer, nn.Conv1d) and layer.kernel_size[0] > 1:
                kernel, stride = layer.kernel_size[0], layer.stride[0]
                keep = torch.zeros(kernel)
                first = layer.padding[0]
                keep[first : first + stride] = 1
                layer.weight.mul_(keep)


@pytest.mark.parametrize(
    "frame", [CONTEXT, CONTEXT + 3, CONTEXT + 4, CONTEXT + 7, CONTEXT + 8, CONTEXT + 2 * BLOCK - 1]
)
def test_a_marked_frame_moves_only_its_own_score(frame):
    """A base at initialisation passes frames through; the head's kernels keep their own taps."""
    judge = Discriminator(LiveModel(CONFIG), "blocks.1", HEAD)
    own_taps_only(judge.head)
    question = trial()
    scores = scores_of(judge, question, question.real)
    marked = question.real.clone()
    marked[..., frame] += 3
    moved = (scores_of(judge, question, marked) != scores).any(dim=0)
    assert moved.nonzero().flatten().tolist() == [(frame - CONTEXT) // PATCH_FRAMES]


@pytest.mark.parametrize("frame", [0, CONTEXT - 1])
def test_context_frames_have_no_score(frame):
    judge = Discriminator(LiveModel(CONFIG), "blocks.1", HEAD)
    question = trial()
    marked = question.real.clone()
    marked[..., frame] += 3
    before = scores_of(judge, question, question.real)
    assert before.shape == (3, 2 * BLOCK // PATCH_FRAMES)
    assert torch.equal(scores_of(judge, question, marked), before)


def test_the_full_head_looks_equally_far_to_both_sides_of_its_patch():
    """Kernels of 7, 4, 4 and 3: 14 frames beyond the patch, plus 3 per ConvNeXt block."""
    head = ScoreHead(CONFIG.width, HeadConfig(channels=(8, 8, 12, 16), n_blocks=0))
    features = torch.randn(1, 64, CONFIG.width, requires_grad=True)
    head(features)[0, 8].backward()
    touched = features.grad[0].abs().sum(dim=1).nonzero().flatten().tolist()
    assert touched == list(range(32 - 10, 35 + 10 + 1))


def test_the_discriminator_sees_the_whole_sequence_in_both_directions():
    judge, question = discriminator(), trial()
    before = scores_of(judge, question, question.real)
    for frame in (0, CONTEXT + 2 * BLOCK - 1):
        marked = question.real.clone()
        marked[..., frame] += 3
        assert (scores_of(judge, question, marked) != before).all()


def test_the_discriminator_hears_the_prompt_and_the_noise_level():
    judge, question = discriminator(), trial()
    before = scores_of(judge, question, question.real)
    assert (scores_of(judge, question, question.real, question.wrong) != before).all()
    later = replace(question, t=question.t + 0.05)
    assert (scores_of(judge, later, question.real) != before).all()


def test_the_discriminator_is_a_copy_that_ends_at_the_named_block():
    base = random_model()
    before = {name: tensor.clone() for name, tensor in base.state_dict().items()}
    judge = Discriminator(base, "blocks.0", HEAD)
    assert len(judge.base.dit.blocks) == 1
    with torch.no_grad():
        for parameter in judge.parameters():
            parameter.zero_()
    assert all(torch.equal(before[name], tensor) for name, tensor in base.state_dict().items())
    with pytest.raises(LmdError, match=r"blocks\.7"):
        Discriminator(base, "blocks.7", HEAD)


def test_a_rollout_that_is_no_whole_number_of_patches_is_refused():
    heard = asked(1).for_model(random_model(seed=5), 2.0)
    with pytest.raises(LmdError, match="multiple of 4"):
        discriminator()(torch.zeros(1, 4, CONTEXT + 6), torch.ones(1), heard, CONTEXT)
