"""Rollouts: they are what plays, one call of a block learns, every call is drawn alike."""

import copy
from contextlib import nullcontext
from dataclasses import replace

import pytest
import torch
from engine import WINDOW, random_model, streamer
from torch import Tensor

from lmd.arc.losses import Prompts, RolloutPlan, draw_calls, rollout, text_memory
from lmd.arc.module import plan_update
from lmd.arc.options import ArcRun, numbers
from lmd.config import WindowConfig
from lmd.errors import LmdError
from lmd.model.dit import Condition
from lmd.model.live_model import LiveModel
from lmd.stream.block import BlockPlan, LiveDenoiser
from lmd.stream.controls import Controls
from lmd.stream.samplers import Guidance, sample, schedule
from lmd.stream.streamer import Streamer

CONTEXT, BLOCK = WINDOW.context_frames, WINDOW.block_frames
REGIMES = ("enc-dec", "block-causal")
SAMPLERS = ("pingpong", "dpmpp", "euler")
LONG = WindowConfig(context_frames=192, block_frames=48)  # as shipped
N_BLOCKS, N_STEPS = 5, 3  # the last block of 48 frames hears nothing that was given


def draws(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def asked(batch: int = 2, dropped: tuple[int, ...] = ()) -> Prompts:
    flags = torch.tensor([i in dropped for i in range(batch)])
    return Prompts(torch.randn(batch, 6, 8, generator=draws(1)), flags)


def one_condition(batch: int = 1) -> Condition:
    return asked(batch).for_model(random_model(seed=5), 2.0)


def context_of(batch: int = 2, n_frames: int = CONTEXT) -> Tensor:
    return torch.randn(batch, 4, n_frames, generator=draws(8))


# Rollouts are what plays


def played(stream: Streamer, context: Tensor, controls: Controls) -> Tensor:
    """The latents of a stream that begins after `context`."""
    state = replace(stream.start(), context=context)
    blocks = stream.stream(controls, n_blocks=N_BLOCKS, state=state)
    return torch.cat([block.latents for block in blocks], dim=-1)


def rolled(
    stream: Streamer, context: Tensor, controls: list[Controls], with_grad: bool = True
) -> Tensor:
    """The same through `rollout`, one item per controls, with the prompts' keys shared."""
    one, seeds = controls[0], tuple(c.seed for c in controls)
    plan = RolloutPlan(
        BlockPlan(one.regime, one.block_frames), N_STEPS, (N_STEPS,) * N_BLOCKS, seeds, one.sampler
    )
    with torch.set_grad_enabled(with_grad):
        tokens = stream.text.encode([c.prompt for c in controls])
        condition = stream.denoiser.condition(tokens, stream.window_s)
        memory = text_memory(stream.denoiser.model, condition)
    out = rollout(stream.denoiser, context, condition, plan, with_grad=with_grad, memory=memory)
    assert out.requires_grad == with_grad
    assert torch.equal(out[..., : context.shape[-1]], context)
    return out[..., context.shape[-1] :].detach()


def controls_of(regime: str, sampler: str, block_frames: int, **more) -> Controls:
    words = {"prompt": "slow piano", "seed": 11, "boundary": "fade", **more}
    return Controls(
        n_steps=N_STEPS, sampler=sampler, block_frames=block_frames, regime=regime, **words
    )


@pytest.mark.parametrize("block_frames", [12, 24, 48])
@pytest.mark.parametrize("sampler", SAMPLERS)
@pytest.mark.parametrize("regime", REGIMES)
def test_a_rollout_is_what_the_streamer_plays_bit_for_bit(regime, sampler, block_frames):
    stream, context = streamer(window=LONG), context_of(1, LONG.context_frames)
    controls = controls_of(regime, sampler, block_frames)
    heard = played(stream, context, controls)
    for with_grad in (False, True):  # building the graph does not change the numbers
        assert torch.equal(rolled(stream, context, [controls], with_grad), heard)


@pytest.mark.parametrize("how", ["weights", "products"])
@pytest.mark.parametrize("sampler", SAMPLERS)
@pytest.mark.parametrize("regime", REGIMES)
def test_in_half_precision_too(regime, sampler, how):
    """bfloat16 weights as on stage, and float32 weights with bfloat16 products as in training.

    A call that learns multiplies in another order, which bfloat16 rounds otherwise: by up to 1.0 %
    of the largest latent, measured; the streamer's own distance from float32 is 0.8 %.
    """
    model = random_model().to(torch.bfloat16 if how == "weights" else torch.float32)
    half = torch.autocast("cpu", torch.bfloat16) if how == "products" else nullcontext()
    stream, controls = streamer(model), controls_of(regime, sampler, BLOCK)
    with half:
        heard = played(stream, context_of(1), controls)
        judged, taught = (rolled(stream, context_of(1), [controls], on) for on in (False, True))
    assert torch.equal(judged, heard)
    assert (taught - heard).abs().max() < 0.03 * heard.abs().max()


@pytest.mark.parametrize("sampler", SAMPLERS)
@pytest.mark.parametrize("regime", REGIMES)
def test_every_item_of_a_rollout_plays_its_own_stream(regime, sampler):
    """Its own context, noise and prompt, whatever the items beside it play."""
    stream, context = streamer(), context_of(3)
    prompts = ("slow piano", "fast harp", "organ")
    controls = [
        controls_of(regime, sampler, BLOCK, prompt=prompt, seed=11 + i)
        for i, prompt in enumerate(prompts)
    ]
    together = rolled(stream, context, controls)
    for i, own in enumerate(controls):
        alone = played(stream, context[i : i + 1], own)
        # products of another batch size round differently; measured 2e-6
        torch.testing.assert_close(together[i : i + 1], alone, rtol=0, atol=2e-5)


# One call of a block learns


class Recorder:
    """A denoiser whose sessions note who was called at which level; every call has a weight."""

    latent_dim = 4

    def __init__(self, n_blocks: int, n_steps: int) -> None:
        self.weight = torch.full((n_blocks, n_steps), 0.5, requires_grad=True)
        self.levels: list[list[float]] = []
        self.conditions: list[Condition] = []
        self.contexts: list[Tensor] = []

    def open_block(self, context, condition, plan, memory):
        self.levels.append([])
        self.conditions.append(condition)
        self.contexts.append(context)
        return RecordedBlock(self, context, len(self.levels) - 1)


class RecordedBlock:
    memory = None

    def __init__(self, owner: Recorder, context: Tensor, index: int) -> None:
        self.owner, self.index = owner, index
        self.level = context.mean()

    def __call__(self, noisy, t):
        levels = self.owner.levels[self.index]
        levels.append(t)
        return self.owner.weight[self.index, len(levels) - 1] * noisy + self.level


def test_a_block_that_ends_after_call_k_walks_the_first_k_levels():
    fake, calls = Recorder(4, 4), (1, 2, 4, 3)
    plan = RolloutPlan(BlockPlan("enc-dec", BLOCK), 4, calls, (0, 1))
    rollout(fake, context_of(), one_condition(2), plan, with_grad=True)
    assert [tuple(levels) for levels in fake.levels] == [schedule(4)[:k] for k in calls]


def test_the_last_call_jumps_to_clean():
    fake = Recorder(1, 4)
    plan = RolloutPlan(BlockPlan("enc-dec", BLOCK), 4, (2,), (7, 8))
    out = rollout(fake, torch.zeros(2, 4, CONTEXT), one_condition(2), plan, with_grad=False)
    start, fresh = plan.noise(4, "noise", 0), plan.noise(4, "renoise", 0, 0)
    t1 = schedule(4)[1]
    x = (1 - t1) * (start - 0.5 * start) + t1 * fresh
    torch.testing.assert_close(out[..., CONTEXT:], x - t1 * 0.5 * x, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_only_the_last_call_of_every_block_gets_gradient(sampler):
    fake, calls = Recorder(3, 4), (2, 4, 1)
    plan = RolloutPlan(BlockPlan("enc-dec", BLOCK), 4, calls, (0, 1), sampler)
    out = rollout(fake, context_of(), one_condition(2), plan, with_grad=True)
    out.square().sum().backward()
    reached = fake.weight.grad != 0
    expected = torch.zeros(3, 4, dtype=torch.bool)
    for block, k in enumerate(calls):
        expected[block, k - 1] = True
    assert torch.equal(reached, expected)


def test_no_gradient_crosses_blocks():
    """The last block's music depends on the first block, its gradient does not."""
    fake = Recorder(3, 2)
    plan = RolloutPlan(BlockPlan("enc-dec", BLOCK), 2, (2, 2, 2), (0, 1))
    out = rollout(fake, context_of(), one_condition(2), plan, with_grad=True)
    out[..., -BLOCK:].sum().backward()
    assert fake.weight.grad[2, 1] != 0
    assert not fake.weight.grad[:2].any()
    with torch.no_grad():
        other = Recorder(3, 2)
        other.weight[0, 1] += 0.1
        moved = rollout(other, context_of(), one_condition(2), plan, with_grad=False)
    assert not torch.equal(moved[..., -BLOCK:], out[..., -BLOCK:].detach())
    assert not any(context.requires_grad for context in fake.contexts)


def test_one_condition_serves_the_whole_rollout():
    fake, condition = Recorder(3, 2), one_condition(2)
    plan = RolloutPlan(BlockPlan("enc-dec", BLOCK), 2, (1, 2, 2), (0, 1))
    rollout(fake, context_of(), condition, plan, with_grad=False)
    assert all(seen is condition for seen in fake.conditions)


def test_dropped_items_get_zeroed_tokens_and_the_others_keep_theirs():
    model, question = random_model(), asked(3, dropped=(1,))
    condition, whole = question.for_model(model, 2.0), asked(3).for_model(model, 2.0)
    assert not condition.tokens[1].any()
    assert torch.equal(condition.tokens[[0, 2]], whole.tokens[[0, 2]])
    null = model.null_condition(whole)
    assert torch.equal(condition.tokens[1], null.tokens[1])
    assert torch.equal(condition.global_cond, null.global_cond)


def with_learning_calls_of(
    moved: LiveModel, model: LiveModel, question: Prompts, recorded: Tensor, plan: RolloutPlan
) -> Tensor:
    """The blocks of a rollout whose learning calls, with the text they read, have other weights.

    Contexts, their keys and all other calls, with the text that those read, are `model`'s. A block
    that is played out moves by as much as the clean block that its learning call names.
    """
    times, blocks = schedule(plan.n_steps), []
    still, other = (question.for_model(net, 2.0) for net in (model, moved))
    memory, text = text_memory(model, still), text_memory(moved, other).text
    for index, n_calls in enumerate(plan.n_calls):
        window = recorded[..., index * BLOCK : index * BLOCK + CONTEXT]
        session = LiveDenoiser(model).open_block(window, still, plan.block, memory)
        n_left, named_apart = n_calls, torch.zeros(())

        def velocities(noisy, t, session=session):
            nonlocal n_left, named_apart
            other_session = copy.copy(session)
            other_session.model, other_session.condition = moved, other
            other_session.memory = replace(session.memory, text=text)
            velocity = session(noisy, t)
            n_left -= 1
            if n_left:
                return Guidance(velocity)
            if plan.plays_out:
                named_apart = t * (velocity - other_session(noisy, t))
                return Guidance(velocity)
            return Guidance(other_session(noisy, t))

        block = sample(
            plan.sampler,
            velocities,
            plan.noise(4, "noise", index),
            times if plan.plays_out else (*times[:n_calls], 0.0),
            1.0,
            lambda step, index=index: plan.noise(4, "renoise", index, step),
        )
        blocks.append(block + named_apart)
        memory = session.memory
    return torch.cat(blocks, dim=-1)


@pytest.mark.parametrize("sampler", SAMPLERS)
@pytest.mark.parametrize("regime", REGIMES)
def test_blocks_that_are_played_out_are_what_plays_whichever_call_learns(regime, sampler):
    condition = asked().for_model(random_model(), 2.0)

    def blocks(n_calls: tuple[int, ...], plays_out: bool) -> Tensor:
        plan = RolloutPlan(BlockPlan(regime, BLOCK), 4, n_calls, (5, 6), sampler, plays_out)
        denoiser = LiveDenoiser(random_model())
        return rollout(denoiser, context_of(), condition, plan, with_grad=True)

    as_played = blocks((4, 4, 4), False)
    assert torch.equal(blocks((3, 1, 4), True), as_played)
    assert not torch.allclose(blocks((3, 1, 4), False), as_played, atol=1e-3)


@pytest.mark.parametrize(
    ("sampler", "plays_out"), [*((name, False) for name in SAMPLERS), ("dpmpp", True)]
)
@pytest.mark.parametrize("regime", REGIMES)
def test_gradient_is_that_of_moving_the_learning_calls_alone(regime, sampler, plays_out):
    """Finite differences in all weights, those of the shared text among them.

    Whatever else a weight moves, contexts, their keys, other calls of the block and a sampler's
    memory of them, is held still, and is not in the gradient.
    """
    model, question = random_model(), asked(2, dropped=(1,))
    block_plan, calls = BlockPlan(regime, BLOCK), (3, 1, 1, 4, 2)
    plan = RolloutPlan(block_plan, 4, calls, (5, 6), sampler, plays_out)
    probe = torch.randn(2, 4, 5 * BLOCK, generator=draws(9))

    def played_by(net: LiveModel) -> Tensor:
        condition = question.for_model(net, 2.0)
        memory, denoiser = text_memory(net, condition), LiveDenoiser(net)
        return rollout(denoiser, context_of(), condition, plan, with_grad=True, memory=memory)

    out = played_by(model)
    (out[..., CONTEXT:] * probe).sum().backward()
    weights = dict(model.named_parameters())
    learning = [name for name, p in weights.items() if p.grad is not None]
    assert {"dit.to_cond_embed.0.weight", "seconds.to_embed.weight"} <= set(learning)
    direction = {
        name: torch.randn(weights[name].shape, generator=draws(i)) * weights[name].abs().mean()
        for i, name in enumerate(learning)
    }
    slope = sum((direction[name] * weights[name].grad).sum().item() for name in learning)

    def moved_by(step: float) -> LiveModel:
        moved = copy.deepcopy(model).requires_grad_(False)
        for name, parameter in moved.named_parameters():
            parameter += step * direction.get(name, 0)
        return moved

    def measured(blocks_of) -> float:
        ends = [(blocks_of(moved_by(step)) * probe).sum().double() for step in (1e-3, -1e-3)]
        return ((ends[0] - ends[1]) / 2e-3).item()

    kept, model = out.detach(), model.requires_grad_(False)
    replayed = with_learning_calls_of(model, model, question, kept, plan)
    torch.testing.assert_close(replayed, kept[..., CONTEXT:])
    alone = measured(lambda net: with_learning_calls_of(net, model, question, kept, plan))
    everything = measured(lambda net: played_by(net)[..., CONTEXT:])
    # measured: 3e-4 at most; of a rollout by moved weights alone, 0.05 to 3.3 times the slope
    assert alone == pytest.approx(slope, rel=2e-3)
    assert everything != pytest.approx(slope, rel=0.02), "the rest of a rollout moves it too"


# Which call learns


class Watched:
    """A session that notes the levels it is called at."""

    def __init__(self, session, seen: list[float]) -> None:
        self.session, self.seen = session, seen

    def __call__(self, noisy: Tensor, t: float) -> Tensor:
        self.seen.append(t)
        return self.session(noisy, t)

    @property
    def memory(self):
        return self.session.memory


@pytest.mark.parametrize("n_steps", [1, 2, 4, 8])
def test_calls_are_drawn_uniformly_over_all_steps(n_steps):
    counts = torch.bincount(torch.tensor(draw_calls(8000, n_steps, draws())), minlength=n_steps + 1)
    expected = 8000 / n_steps
    five_deviations = 5 * (expected * (1 - 1 / n_steps)) ** 0.5
    assert counts[0] == 0
    assert len(counts) == n_steps + 1
    assert (counts[1:] - expected).abs().max() <= five_deviations


def test_every_call_of_every_step_count_in_use_learns_equally_often():
    """Over updates as they are planned, in every block of a rollout on its own."""
    options = ArcRun(blocks="3")
    plans = [plan_update(options, 0, update) for update in range(3000)]
    for n_steps, share in ((n, 1 / 3) for n in numbers(options.steps)):
        drawn = torch.tensor([plan.n_calls for plan in plans if plan.n_steps == n_steps])
        # binomial; five standard deviations
        assert abs(len(drawn) / 3000 - share) < 5 * (share * (1 - share) / 3000) ** 0.5
        share_of_call = 1 / n_steps
        margin = 5 * (share_of_call * (1 - share_of_call) / len(drawn)) ** 0.5
        for block in drawn.T:
            shares = torch.bincount(block, minlength=n_steps + 1)[1:] / len(drawn)
            assert len(shares) == n_steps
            assert (shares - share_of_call).abs().max() < margin
        both = torch.corrcoef(drawn.T.double())[0, 1]
        assert abs(both) < 5 / len(drawn) ** 0.5, "blocks are drawn independently"


@pytest.mark.parametrize("sampler", SAMPLERS)
@pytest.mark.parametrize("n_steps", [2, 4, 8])
def test_the_levels_that_learn_are_those_that_the_streamer_calls(sampler, n_steps):
    """Over all calls that can be drawn: the levels of a played block, each once."""
    fake = Recorder(n_steps, n_steps)
    plan = RolloutPlan(
        BlockPlan("enc-dec", BLOCK), n_steps, tuple(range(1, n_steps + 1)), (0, 1), sampler
    )
    rollout(fake, context_of(), one_condition(2), plan, with_grad=False)
    stream, seen = streamer(), []
    inner = stream.denoiser.open_block

    def watched(*arguments):
        session = inner(*arguments)
        return Watched(session, seen)

    stream.denoiser.open_block = watched
    controls = replace(controls_of("enc-dec", sampler, BLOCK), n_steps=n_steps)
    stream.step(stream.start(), controls)
    assert [levels[-1] for levels in fake.levels] == seen


def test_impossible_calls_are_refused():
    with pytest.raises(LmdError, match="from 1 to n_steps = 2"):
        RolloutPlan(BlockPlan("enc-dec", BLOCK), 2, (3,), (0,))


# How long its blocks are


def test_block_lengths_are_drawn_alike_as_a_function_of_seed_and_update():
    options = ArcRun(block_frames="48,24,12")
    plans = [plan_update(options, 5, update) for update in range(1500)]
    assert plans == [plan_update(options, 5, update) for update in range(1500)]
    lengths = [plan.block.block_frames for plan in plans]
    assert lengths != [plan_update(options, 6, k).block.block_frames for k in range(1500)]
    for length in (12, 24, 48):
        # 500 expected, standard deviation 18: five of them
        assert abs(lengths.count(length) - 500) < 91
    assert {p.n_frames - 8 * p.block.block_frames for p in plans} == {options.context_frames}
