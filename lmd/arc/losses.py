"""ARC-Forcing: train a live model on its own continuations, scored by a discriminator.

The model continues real context for several blocks, exactly as it plays; each block carries
gradient through one network call. A discriminator compares the whole continuation with real music
(relativistic pair loss), and real music under its own prompt with the same under another's
(contrastive loss).

Source: Live Music Diffusion Models (arXiv 2605.22717), ARC-Forcing; Self Forcing
(arXiv 2506.08009); ARC (arXiv 2505.08175); approximate R1/R2 (arXiv 2501.08316);
straight-through gradients (arXiv 1308.3432). Taught in notebook 03_arc_forcing.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from lmd.arc.discriminator import Discriminator, Scores
from lmd.errors import LmdError
from lmd.model.dit import Condition
from lmd.model.kv_cache import Memory
from lmd.model.live_model import LiveModel
from lmd.rng import frame_noise
from lmd.shapes import BlockLatents, Latents, NoiseLevel, Tokens
from lmd.stream.block import BlockPlan, BlockSession, Denoiser
from lmd.stream.samplers import Guidance, SamplerName, add_noise, predict_clean, sample, schedule
from lmd.training.losses import drop_text

Rolled = Float[Tensor, "batch latent context_and_rollout"]
PERTURBATION = 0.05  # standard deviation of the step that R1 and R2 take


@dataclass(frozen=True)
class RolloutPlan:
    """How a model continues its own output.

    Where blocks are not played out, the call that learns is a block's last and jumps to clean, as
    in arXiv 2605.22717; many blocks then end after fewer calls than anybody plays with.
    """

    block: BlockPlan
    n_steps: int  # length of the noise schedule
    n_calls: tuple[int, ...]  # per block, which call learns, 1 ... n_steps
    seeds: tuple[int, ...]  # one per item: its noise is that of a stream with this seed
    sampler: SamplerName = "pingpong"  # without guidance
    plays_out: bool = False

    def __post_init__(self) -> None:
        if not self.n_calls or not all(1 <= n <= self.n_steps for n in self.n_calls):
            raise LmdError(
                f"{self.n_calls} as the calls that learn",
                f"one or more numbers from 1 to n_steps = {self.n_steps}",
                "Draw them with draw_calls.",
            )

    def noise(self, latent_dim: int, purpose: str, index: int, *step: int) -> Latents:
        """Noise for block number `index`, one stream of numbers per item."""
        shape, first = (latent_dim, self.block.block_frames), index * self.block.block_frames
        drawn = [frame_noise(shape, seed, purpose, first, *step) for seed in self.seeds]
        return torch.stack(drawn)


def draw_calls(n_blocks: int, n_steps: int, generator: torch.Generator) -> tuple[int, ...]:
    """For every block the call that learns, uniform over all of a schedule: 1 ... n_steps."""
    return tuple((torch.randint(n_steps, (n_blocks,), generator=generator) + 1).tolist())


def rollout(
    denoiser: Denoiser,
    context: Latents,
    condition: Condition,
    plan: RolloutPlan,
    *,
    with_grad: bool,
    memory: Memory | None = None,
) -> Rolled:
    """Continue `context` (clean latents) for several blocks as the streamer plays them.

    Blocks of all steps are what `Streamer.step` gives, bit for bit; a block that ends after call k
    has the schedule `(tau_0 ... tau_{k-1}, 0)`. Between blocks, latents and cached keys are
    detached; within a block only the call that learns builds a graph, if `with_grad`. Where blocks
    are played out and that call is not the last, the block's gradient is taken to be that of the
    clean block which that call names (straight through). The text keys in `memory` may carry
    gradient.

    Returns:
        `[batch, latent, context + rollout]`; the context in front is the given one.
    """
    times, pieces, window = schedule(plan.n_steps), [context], context
    latent_dim = context.shape[1]
    for index, n_calls in enumerate(plan.n_calls):
        with torch.no_grad():
            session = denoiser.open_block(window, condition, plan.block, memory)

        def draw(step: int, index: int = index) -> Latents:
            return plan.noise(latent_dim, "renoise", index, step).to(context)

        calls = OneLearns(session, n_calls, with_grad)
        noise = plan.noise(latent_dim, "noise", index).to(context)
        levels = times if plan.plays_out else (*times[:n_calls], 0.0)
        block = sample(plan.sampler, calls, noise, levels, 1.0, draw)
        if plan.plays_out:
            block = block.detach() + (calls.clean - calls.clean.detach())
        memory = session.memory
        pieces.append(block)
        window = torch.cat([window, block.detach()], dim=-1)[..., plan.block.block_frames :]
    return torch.cat(pieces, dim=-1)


class OneLearns:
    """A session as the sampler calls it, with gradient in call number `learns` (from 1) alone."""

    clean: BlockLatents  # what that call named

    def __init__(self, session: BlockSession, learns: int, with_grad: bool) -> None:
        self.session, self.learns, self.with_grad, self.n_made = session, learns, with_grad, 0

    def __call__(self, noisy: Latents, t: float) -> Guidance:
        """Velocity of the block; the graph is built in the call that learns."""
        self.n_made += 1
        learns = self.n_made == self.learns
        with torch.set_grad_enabled(self.with_grad and learns):
            velocity = self.session(noisy, t)
        if learns:
            self.clean = predict_clean(noisy, velocity, t)
        return Guidance(velocity)


def text_memory(model: LiveModel, condition: Condition) -> Memory:
    """The prompt's keys, to be shared by a rollout; under grad they carry gradient to the text."""
    return Memory(model.text_keys(condition.tokens))


def relativistic_loss(winner: Scores, loser: Scores) -> Tensor:
    """`mean softplus(loser - winner)`, pair by pair; log 2 where the two are equal.

    The discriminator wants (real, fake), the generator (fake, real).
    """
    return F.softplus(loser - winner).mean()


def contrastive_loss(right: Scores, wrong: Scores, different: Tensor) -> Tensor:
    """`mean softplus(wrong - right)`: music must score higher under its own prompt than another's.

    An item whose two conditions are equal (not `different`, `[batch]` bool) counts as 0.
    """
    per_item = F.softplus(wrong - right).mean(dim=1)
    return (per_item * different).mean()


def derangement(n: int, generator: torch.Generator) -> Int[Tensor, " batch"]:
    """A uniformly drawn permutation of n items (two or more) that leaves none in its place."""
    if n < 2:
        raise LmdError(
            f"a contrastive loss over a batch of {n}",
            "at least 2 items",
            "Use a larger batch, or a contrastive weight of 0.",
        )
    while True:  # about e = 2.7 draws
        order = torch.randperm(n, generator=generator)
        if not (order == torch.arange(n)).any():
            return order


class Prompts(NamedTuple):
    """What items were asked for."""

    prompt: Tokens  # prompt embeddings
    dropped: Bool[Tensor, " batch"]  # without a condition, in both networks

    def for_model(self, model: LiveModel, seconds: float) -> Condition:
        """As a condition of `model`; items that were dropped get zeroed tokens."""
        return drop_text(model.condition(self.prompt, seconds), ~self.dropped)

    def differs(self, other: "Prompts") -> Bool[Tensor, " batch"]:
        """Which items' conditions are not those of `other`."""
        prompts = (other.prompt != self.prompt).flatten(1).any(dim=1)
        return torch.where(self.dropped | other.dropped, self.dropped != other.dropped, prompts)


@dataclass(frozen=True)
class RealFakePair:
    """Real music and a rollout that continues the same context, noised alike."""

    real: Rolled
    fake: Rolled  # its context is the real one's
    asked: Prompts  # of both
    wrong: Prompts  # of other items, see `derangement`
    t: NoiseLevel  # of both
    noise: Rolled  # of both
    nudge: Rolled  # standard normal: where R1 and R2 look for smoothness
    first_frame: int  # of the rollout
    seconds: float  # of the whole

    def scores(self, discriminator: Discriminator, *pairs: tuple[Latents, Prompts]) -> list[Scores]:
        """Scores of latents under prompts, all at this pair's noise, in one pass."""
        n, t = len(pairs), self.t.repeat(len(pairs))
        clean = torch.cat([clean for clean, _ in pairs])
        asked = Prompts(*(torch.cat(parts) for parts in zip(*(a for _, a in pairs), strict=True)))
        condition = asked.for_model(discriminator.base, self.seconds)
        noisy = add_noise(clean, self.noise.repeat(n, 1, 1), t)
        return list(discriminator(noisy, t, condition, self.first_frame).chunk(n))


class GanLoss(NamedTuple):
    """A loss to go backward from, its parts, and the scores."""

    loss: Tensor
    pair: Tensor
    contrastive: Tensor
    real: Scores
    fake: Scores

    @property
    def accuracy(self) -> Tensor:
        """Share of pairs in which the real one scores higher; 0.5 = cannot tell."""
        return (self.real > self.fake).float().mean()


def generator_loss(discriminator: Discriminator, pair: RealFakePair) -> GanLoss:
    """`mean softplus(score(real) - score(fake))`; call it, and go backward, inside `frozen`."""
    with torch.no_grad():
        (real,) = pair.scores(discriminator, (pair.real, pair.asked))
    (fake,) = pair.scores(discriminator, (pair.fake, pair.asked))
    loss = relativistic_loss(fake, real)
    return GanLoss(loss, loss.detach(), loss.new_zeros(()), real, fake.detach())


def discriminator_loss(
    discriminator: Discriminator,
    pair: RealFakePair,
    contrastive: float = 1.0,
    r1: float = 0.0,
    r2: float = 0.0,
) -> GanLoss:
    """Pair loss, contrastive loss, smoothness around real music (R1) and around rollouts (R2).

    The last three by their weights; a term of weight 0 is not computed. The contrastive one has 1
    (enc-dec) and 2 (block-causal) in the paper's code.
    """
    asked, fake_latents = pair.asked, pair.fake.detach()
    step = PERTURBATION * pair.nudge
    inputs = {"real": (pair.real, asked), "fake": (fake_latents, asked)}
    if contrastive:
        inputs["wrong"] = (pair.real, pair.wrong)
    if r1:
        inputs["near real"] = (pair.real + step, asked)
    if r2:
        inputs["near fake"] = (fake_latents + step, asked)
    scores = dict(zip(inputs, pair.scores(discriminator, *inputs.values()), strict=True))
    real, fake = scores["real"], scores["fake"]
    relativistic = relativistic_loss(real, fake)
    loss, contrast = relativistic, relativistic.new_zeros(())
    if contrastive:
        contrast = contrastive_loss(real, scores["wrong"], asked.differs(pair.wrong))
        loss = loss + contrastive * contrast
    for weight, name in ((r1, "real"), (r2, "fake")):
        if weight:
            loss = loss + weight * smoothness(scores[name], scores[f"near {name}"], PERTURBATION)
    return GanLoss(loss, relativistic.detach(), contrast.detach(), real.detach(), fake.detach())


def smoothness(scores: Scores, moved: Scores, perturbation: float) -> Tensor:
    """Approximate gradient penalty: `mean (D(x + s e) - D(x))^2 / s^2`, e standard normal.

    In expectation that is the squared norm of the gradient, for a small step s.
    """
    return ((moved - scores) / perturbation).square().mean()


@contextmanager
def frozen(module: nn.Module) -> Iterator[None]:
    """Inside, the weights of `module` collect no gradient; afterwards they do again."""
    module.requires_grad_(False)
    try:
        yield
    finally:
        module.requires_grad_(True)
