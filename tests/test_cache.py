"""Cached equals uncached, context is independent of noise, caches keep their size."""

from dataclasses import replace

import pytest
import torch
from engine import CONFIG, WINDOW, masked_forward, random_model, streamer
from hypothesis import given, settings
from hypothesis import strategies as st

from lmd.config import PRESETS, ControlChannel, DiTConfig, WindowConfig, preset
from lmd.model.dit import attend, frame_positions
from lmd.model.kv_cache import Memory
from lmd.model.live_model import LiveModel, add_controls
from lmd.model.masks import attention_mask
from lmd.model.text import mix
from lmd.rng import frame_noise, normal
from lmd.stream.block import BlockPlan, LiveDenoiser, both_branches
from lmd.stream.controls import Controls
from lmd.stream.samplers import Guidance, sample, schedule
from lmd.stream.streamer import drop_context

# The largest absolute difference in float32 from an independently written pass; measured 5e-5 over
# 13 blocks of a random model with latents up to 8, and 1e-5 over 400 drawn shapes and plans.
TOLERANCE = 1e-4


class Reference:
    """Streams like the streamer, from the rules alone: one masked pass over the whole history."""

    def __init__(self, model, stream, batch):
        self.model, self.stream = model, stream
        self.known = torch.zeros(batch, model.config.latent_dim, stream.window.context_frames)
        self.key, self.n_frames = None, 0

    @torch.no_grad()
    def step(self, index, controls):
        s, o = self.stream.window.context_frames, controls.block_frames
        key = (controls.prompt, controls.is_guided, controls.regime, o)
        if key != self.key or controls.drop_context_frames or controls.regime == "enc-dec":
            self.known = drop_context(self.known[..., -s:], controls.drop_context_frames)
        self.key = key
        tokens = mix(self.stream.text, controls.prompt).expand(len(self.known), -1, -1)
        condition = self.model.condition(tokens, self.stream.window_s)
        null = self.model.null_condition(condition)
        n_back = s // o if controls.regime == "block-causal" else None
        shape = (*self.known.shape[:-1], o)

        def velocities(x, t):
            cond = masked_forward(self.model, self.known, x, t, condition, n_back)
            if not controls.is_guided:
                return Guidance(cond)
            return Guidance(cond, masked_forward(self.model, self.known, x, t, null, n_back))

        latents = sample(
            controls.sampler,
            velocities,
            frame_noise(shape, controls.seed, "noise", self.n_frames),
            schedule(controls.n_steps),
            controls.cfg_scale,
            lambda step: frame_noise(shape, controls.seed, "renoise", self.n_frames, step),
        )
        return latents

    def goes_on_from(self, latents):
        self.known = torch.cat([self.known, latents], dim=-1)
        self.n_frames += latents.shape[-1]


def worst_difference(stream, model, batch, plan):
    """The largest absolute difference over a list of controls.

    Both go on from the streamer's blocks: a random model doubles whatever rounding it is given.
    """
    state, reference, worst = stream.start(batch=batch), Reference(model, stream, batch), 0.0
    for index, controls in enumerate(plan):
        block, state = stream.step(state, controls)
        worst = max(worst, (block.latents - reference.step(index, controls)).abs().max().item())
        reference.goes_on_from(block.latents)
    return worst


GUIDED = {"cfg_scale": 1.5, "sampler": "pingpong"}
PLUS_PLUS = {"cfg_scale": 0.7, "sampler": "pingpong++"}


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("guidance", [{}, GUIDED, PLUS_PLUS], ids=["off", "cfg", "cfg++"])
@pytest.mark.parametrize("regime", ["enc-dec", "block-causal"])
def test_cached_stream_equals_one_masked_pass_over_the_history(regime, guidance, batch):
    model = random_model()
    base = Controls(prompt="organ slow", n_steps=3, block_frames=6, regime=regime, **guidance)
    plan = [base] * 4
    plan += [replace(base, prompt="bright harp")] * 3  # a prompt change
    plan += [replace(base, prompt="bright harp", block_frames=12)] * 3  # a block-length change
    forgetting = replace(base, prompt="bright harp", block_frames=12, drop_context_frames=10)
    plan += [
        forgetting,
        replace(forgetting, drop_context_frames=0),
        replace(forgetting, drop_context_frames=0),
    ]
    assert worst_difference(streamer(model), model, batch, plan) < TOLERANCE


FREE = st.fixed_dictionaries(
    {
        "prompt": st.sampled_from(["organ slow", "harp", (("organ", 0.25), ("harp", 0.75))]),
        "guidance": st.sampled_from([{}, GUIDED, PLUS_PLUS, {"sampler": "euler"}]),
        "regime": st.sampled_from(["enc-dec", "block-causal"]),
        "n_steps": st.integers(1, 2),
        "length": st.integers(0, 100),
        "forget": st.sampled_from([0, 0, 0, 0.5, 1]),
    }
)


@st.composite
def plans(draw, window):
    """Eight blocks or more of few or many changes: some controls stay, some are drawn anew."""
    lengths, drawn, plan = window.block_lengths(), draw(FREE), []
    for _ in range(draw(st.integers(8, 9))):
        fresh = draw(FREE)
        moved = draw(st.sets(st.sampled_from(sorted(fresh)), max_size=2))
        drawn = {**drawn, "forget": 0} | {name: fresh[name] for name in moved}
        plan.append(
            Controls(
                prompt=drawn["prompt"],
                n_steps=drawn["n_steps"],
                block_frames=lengths[drawn["length"] % len(lengths)],
                regime=drawn["regime"],
                drop_context_frames=int(drawn["forget"] * window.context_frames),
                **drawn["guidance"],
            )
        )
    return plan


@settings(max_examples=12, deadline=None)
@given(
    n_context=st.integers(1, 4),
    block=st.integers(1, 3),
    n_heads=st.integers(1, 3),
    half_head=st.integers(2, 3),  # a norm over four numbers now and then divides by almost nothing
    depth=st.integers(1, 3),
    batch=st.sampled_from([1, 3]),
    seed=st.integers(0, 2**32 - 1),
    data=st.data(),
)
def test_cached_equals_uncached_for_any_shape_and_any_changes(
    n_context, block, n_heads, half_head, depth, batch, seed, data
):
    config = DiTConfig(
        latent_dim=4, width=n_heads * 4 * half_head, depth=depth, n_heads=n_heads,
        text_dim=8, global_dim=8,
    )  # fmt: skip
    model = random_model(config, seed)
    window = WindowConfig(n_context * block, block)
    plan = data.draw(plans(window))
    assert worst_difference(streamer(model, window), model, batch, plan) < TOLERANCE


@torch.no_grad()
def session_after(model, regime, noisy, t, n_calls=1):
    """Call a fresh session, twice over: the bootstrap block, then the block after it."""
    denoiser = LiveDenoiser(model)
    context = normal((1, 4, 24), 0, "context")
    condition = model.condition(normal((1, 6, 8), 0, "text"), 1.0)
    first = denoiser.open_block(context, condition, BlockPlan(regime, 6), None)
    first(noisy, t)
    after = torch.cat([context, normal((1, 4, 6), 0, "block")], dim=-1)[..., 6:]
    second = denoiser.open_block(after, condition, BlockPlan(regime, 6), first.memory)
    for _ in range(n_calls):
        second(noisy, t)
    return first.memory, second.memory


@pytest.mark.parametrize("regime", ["enc-dec", "block-causal"])
def test_context_keys_and_values_are_the_same_bits_whatever_t_and_the_target(regime):
    model = random_model()
    quiet = session_after(model, regime, torch.zeros(1, 4, 6), 0.01)
    loud = session_after(model, regime, 1e3 * normal((1, 4, 6), 1, "noise"), 1.0)
    for memory_a, memory_b in zip(quiet, loud, strict=True):
        tensors_a, tensors_b = memory_a.tensors(), memory_b.tensors()
        assert tensors_a.keys() == tensors_b.keys()
        assert any(name.startswith("context.") for name in tensors_a)
        for name in tensors_a:
            assert torch.equal(tensors_a[name], tensors_b[name]), name


@torch.no_grad()
def test_one_uncached_pass_with_the_mask_equals_the_cached_step():
    """`LiveModel.forward`, which training uses, agrees with the caches that play."""
    from lmd.model.masks import attention_mask

    model = random_model()
    context, noisy = normal((2, 4, 24), 0, "context"), normal((2, 4, 6), 0, "noise")
    condition = model.condition(normal((2, 6, 8), 0, "text"), 1.0)
    window = torch.cat([normal((2, 4, 24), 0, "junk"), noisy], dim=-1)
    known = torch.cat([context, normal((2, 4, 6), 1, "junk")], dim=-1)
    keep = torch.ones(2, 1, 30)
    keep[..., 24:] = 0
    for regime in ("enc-dec", "block-causal"):
        whole = model(
            window, torch.tensor([0.6, 0.6]), condition,
            context=known, keep_mask=keep, attn_mask=attention_mask(regime, 24, 6),
        )  # fmt: skip
        session = LiveDenoiser(model).open_block(context, condition, BlockPlan(regime, 6), None)
        torch.testing.assert_close(session(noisy, 0.6), whole[..., 24:], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("read", [slice(12, 24), slice(0, 5), slice(0, 0)])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_tokens_that_nobody_reads_change_nothing_of_those_that_are_read(read, checkpointing):
    """Hidden states, every key and value, and the gradients are those of a pass that reads all."""
    model = random_model()
    model.dit.checkpointing = checkpointing
    attn_mask = attention_mask("block-causal", 24, 6)

    def outcome(wanted, kept):
        model.zero_grad()
        text = model.dit.text_key_values(normal((2, 7, 8), 0, "text"))
        x = model.dit.embed_target(normal((2, 4, 31), 0, "noisy"))
        x, fresh = model.dit.trunk(x, frame_positions(30), text, attn_mask, output_slice=wanted)
        (x[:, kept].square().sum() + sum(kv.key.sum() + kv.value.sum() for kv in fresh)).backward()
        gradients = {n: p.grad for n, p in model.dit.named_parameters() if p.grad is not None}
        return x[:, kept], fresh, gradients

    states, fresh, gradients = outcome(read, slice(None))
    whole_states, whole_fresh, whole_gradients = outcome(slice(None), read)
    assert states.shape[1] == read.stop - read.start
    close = {"atol": 1e-5, "rtol": 1e-4}
    torch.testing.assert_close(states, whole_states, **close)
    for kv, whole in zip(fresh, whole_fresh, strict=True):
        assert torch.equal(kv.key, whole.key)
        assert torch.equal(kv.value, whole.value)
    for name, whole in whole_gradients.items():
        torch.testing.assert_close(gradients.get(name, torch.zeros_like(whole)), whole, **close)


@pytest.mark.parametrize("regime", ["full", "block-causal"])
def test_attention_in_bfloat16_training_is_the_same_function_with_the_same_gradients(regime):
    mask = None if regime == "full" else attention_mask(regime, 24, 6)

    def outcome(dtype):
        heads = [normal((2, 3, 31, 8), 0, name).to(dtype).requires_grad_() for name in "qkv"]
        out = attend(*heads, mask)
        out.float().square().sum().backward()
        return [out, *(part.grad for part in heads)]

    for exact, found in zip(outcome(torch.float32), outcome(torch.bfloat16), strict=True):
        assert (found - exact).norm() < 0.02 * exact.norm()  # measured: 0.009


@torch.no_grad()
def test_future_frames_do_not_change_past_frames():
    """Block-causal: moving a later block leaves every earlier hidden state as it was."""
    model = random_model()
    text = model.dit.text_key_values(normal((1, 7, 8), 0, "text"))
    attn_mask = attention_mask("block-causal", 24, 6)[:24, :24]

    def hidden(context):
        x = model.dit.embed_context(context, torch.ones(1, 1, 24))
        return model.dit.trunk(x, frame_positions(24)[:-1], text, attn_mask)[0]

    context = normal((1, 4, 24), 0, "context")
    moved = context.clone()
    moved[..., 12:] += 1.0
    before, after = hidden(context), hidden(moved)
    assert torch.equal(before[:, :12], after[:, :12])
    assert not torch.allclose(before[:, 12:], after[:, 12:])


@pytest.mark.parametrize("block_frames", [2, 6, 12])
def test_cache_bytes_and_shapes_stay_constant_over_blocks(block_frames):
    stream = streamer()
    controls = Controls(prompt="a", n_steps=1, block_frames=block_frames)
    state, sizes = stream.start(), set()
    for _ in range(12):
        _, state = stream.step(state, controls)
        sizes.add((state.memory.n_bytes, state.memory.context.layers.keys.shape))
    assert len(sizes) == 1
    # Two layers of [text 7 keys + values, context 24 keys + values + rotated keys], width 16.
    assert sizes.pop()[0] == 2 * 4 * 16 * (2 * 7 + 3 * 24)


def test_memory_survives_its_own_file_names():
    stream = streamer()
    _, state = stream.step(stream.start(), Controls(prompt="a", n_steps=1, block_frames=6))
    again = Memory.from_tensors(state.memory.tensors())
    for name, tensor in state.memory.tensors().items():
        assert torch.equal(again.tensors()[name], tensor)


@torch.no_grad()
def test_an_added_control_changes_nothing_until_it_is_trained():
    model = random_model()
    grown = add_controls(model, ControlChannel("sketch", 3))
    condition = model.condition(normal((1, 6, 8), 0, "text"), 1.0)
    context, noisy = normal((1, 4, 24), 0, "context"), normal((1, 4, 6), 0, "noise")
    sketch = normal((1, 3, 30), 0, "sketch")
    plan = BlockPlan("block-causal", 6)
    before = LiveDenoiser(model).open_block(context, condition, plan, None)(noisy, 0.5)
    session = LiveDenoiser(grown).open_block(context, condition, plan, None, sketch)
    assert torch.equal(session(noisy, 0.5), before)
    grown.dit.to_input_add.weight.data[:, -3:] = 0.1
    for frame, where in ((3, "context"), (27, "target")):
        moved = sketch.clone()
        moved[..., frame] += 1.0
        a, b = (
            LiveDenoiser(grown).open_block(context, condition, plan, None, given)(noisy, 0.5)
            for given in (sketch, moved)
        )
        assert not torch.equal(a, b), where


def test_guided_batch_holds_both_branches():
    model = random_model()
    condition = model.condition(normal((2, 6, 8), 0, "text"), 1.0)
    both = both_branches(condition, model.null_condition(condition))
    assert torch.equal(both.tokens[:2], condition.tokens)
    assert not both.tokens[2:].any()
    assert torch.equal(both.global_cond[2:], condition.global_cond)


def test_paper_preset_has_the_published_number_of_parameters():
    with torch.device("meta"):
        dit = LiveModel(preset("paper").dit).dit
    n_added = dit.to_input_add.weight.numel()
    assert sum(parameter.numel() for parameter in dit.parameters()) - n_added == 340_879_488
    assert n_added == 66_560


@pytest.mark.parametrize("name", PRESETS)
def test_every_preset_has_the_one_latent_geometry(name):
    chosen = preset(name)
    assert chosen.frame_rate_hz == pytest.approx(21.53, abs=0.005)
    channels = chosen.dit.latent_dim
    assert channels == chosen.codec.latent_dim
    assert (channels < 64) if name == "tiny" else (channels == 64)
    assert chosen.window.context_frames == 192
    assert {12, 16, 24, 48} <= set(chosen.window.block_lengths())
    assert chosen.window.block_frames in chosen.window.block_lengths()
    assert all(192 % length == 0 for length in chosen.window.block_lengths())


def test_shape_checks_are_on():
    with pytest.raises(Exception, match="Type-check error"):
        drop_context(torch.zeros(4, 24), 1)
    assert CONFIG.latent_dim == 4
    assert WINDOW.context_frames == 24
