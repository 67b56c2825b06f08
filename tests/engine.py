"""Small models and an independent reference for the engine's tests."""

import torch
from torch import Tensor

from lmd.config import DiTConfig, WindowConfig
from lmd.model.dit import Condition
from lmd.model.live_model import LiveModel
from lmd.model.text import HashTextEncoder
from lmd.stream.streamer import Streamer

CONFIG = DiTConfig(latent_dim=4, width=16, depth=2, n_heads=2, text_dim=8, global_dim=8)
WINDOW = WindowConfig(context_frames=24, block_frames=6)


def random_model(config: DiTConfig = CONFIG, seed: int = 0) -> LiveModel:
    """A model whose every weight matters (nothing left at its zero initialisation)."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = LiveModel(config).eval()
        for parameter in model.parameters():
            if parameter.ndim > 1:
                scale = parameter.shape[-1] ** -0.5 if parameter.ndim == 2 else 0.3
                parameter.data = torch.randn(parameter.shape) * scale
        model.dit.timestep_features.data = torch.randn(model.dit.timestep_features.shape)
    return model


class HoldCodec:
    """A codec with known answers: a sample is the mean over a few neighbouring frames."""

    sample_rate, channels, latent_dim, samples_per_frame = 800, 1, 4, 8
    lookback_frames = lookahead_frames = 2

    def encode(self, wave: Tensor) -> Tensor:
        """Each frame's first four samples are its latents."""
        return wave.unfold(-1, 8, 8)[:, 0, :, :4].transpose(1, 2).contiguous()

    def decode(self, latents: Tensor) -> Tensor:
        """A moving mean over five frames of the mean latent, held for a frame."""
        mean = latents.mean(dim=1, keepdim=True)
        padded = torch.nn.functional.pad(mean, (2, 2))
        return padded.unfold(-1, 5, 1).mean(dim=-1).repeat_interleave(8, dim=-1)


def streamer(model: LiveModel | None = None, window: WindowConfig = WINDOW) -> Streamer:
    """A small streamer with random weights."""
    return Streamer(model or random_model(), HoldCodec(), HashTextEncoder(6, 8), window)


def masked_forward(
    model: LiveModel,
    known: Tensor,
    noisy: Tensor,
    t: float,
    condition: Condition,
    n_back: int | None,
) -> Tensor:
    """One uncached pass over a whole history: the reference that caches must agree with.

    Written from the rules alone, with loops and plain matrix products, and none of the package's
    attention, cache or outpainting code.

    Args:
        known: every latent since the last rebuild, `[batch, latent, frame]`.
        noisy: the block being made.
        t: its noise level.
        condition: prompt, of the same batch.
        n_back: block-causal: how many blocks back are seen; None: enc-dec.
    """
    dit = model.dit
    n_known, o = known.shape[-1], noisy.shape[-1]
    n_all = n_known + o
    attn_mask = torch.zeros(n_all + 1, n_all + 1, dtype=torch.bool)
    for query in range(n_all + 1):
        for key in range(n_all + 1):
            frame_q, frame_k = min(query, n_all - 1), min(key, n_all - 1)
            if n_back is None:
                attn_mask[query, key] = key < n_known or query >= n_known
            else:
                behind = frame_q // o - frame_k // o
                attn_mask[query, key] = 0 <= behind <= n_back
    n_context = n_known if n_back is None else n_back * o
    ones = torch.ones_like(known[:, :1])
    x_known = torch.cat([ones, known], dim=1).transpose(1, 2) @ dit.to_input_add.weight.T
    mixed = noisy + dit.preprocess_conv.weight[:, :, 0] @ noisy
    x_noisy = mixed.transpose(1, 2) @ dit.project_in.weight.T
    moment = dit.global_token(torch.full((len(noisy),), t), condition.global_cond)
    x = torch.cat([x_known, x_noisy, moment], dim=1)
    # The block sits at n_context + 1 …, as while streaming; older frames lie before it.
    positions = torch.arange(n_all) - n_known + n_context + 1
    positions = torch.cat([positions, torch.zeros(1, dtype=torch.long)])
    text = dit.to_cond_embed(condition.tokens)
    for block in dit.blocks:
        x = x + _self_attention(block.self_attn, block.pre_norm(x), positions, attn_mask, dit)
        x = x + _cross_attention(block.cross_attn, block.cross_norm(x), text)
        value, gate = block.ff.to_gated(block.ff_norm(x)).chunk(2, dim=-1)
        x = x + block.ff.to_out(value * gate * torch.sigmoid(gate))
    y = (x[:, n_known:n_all] @ dit.project_out.weight.T).transpose(1, 2)
    return y + dit.postprocess_conv.weight[:, :, 0] @ y


def _attend(q: Tensor, k: Tensor, v: Tensor, attn_mask: Tensor | None) -> Tensor:
    """Softmax attention of one head, `[batch, token, dim]`."""
    scores = q @ k.transpose(1, 2) / q.shape[-1] ** 0.5
    if attn_mask is not None:
        scores = scores.masked_fill(~attn_mask, float("-inf"))
    return scores.softmax(dim=-1) @ v


def _turn(x: Tensor, positions: Tensor, inv_freq: Tensor) -> Tensor:
    """Rotary embedding as complex multiplication."""
    half = len(inv_freq)
    phase = torch.polar(
        torch.ones(len(positions), half), positions[:, None].float() * inv_freq[None]
    )
    turned = torch.complex(x[..., :half], x[..., half : 2 * half]) * phase
    return torch.cat([turned.real, turned.imag, x[..., 2 * half :]], dim=-1)


def _self_attention(
    layer: torch.nn.Module, x: Tensor, positions: Tensor, attn_mask: Tensor, dit: torch.nn.Module
) -> Tensor:
    q, k, v = (x @ w.T for w in layer.to_qkv.weight.chunk(3))
    heads = []
    for qh, kh, vh in zip(*(part.chunk(layer.n_heads, dim=-1) for part in (q, k, v)), strict=True):
        qh = _turn(layer.q_norm(qh), positions, dit.rope.inv_freq)
        kh = _turn(layer.k_norm(kh), positions, dit.rope.inv_freq)
        heads.append(_attend(qh, kh, vh, attn_mask))
    return torch.cat(heads, dim=-1) @ layer.to_out.weight.T


def _cross_attention(layer: torch.nn.Module, x: Tensor, text: Tensor) -> Tensor:
    q = x @ layer.to_q.weight.T
    k, v = (text @ w.T for w in layer.to_kv.weight.chunk(2))
    heads = [
        _attend(layer.q_norm(qh), layer.k_norm(kh), vh, None)
        for qh, kh, vh in zip(*(p.chunk(layer.n_heads, dim=-1) for p in (q, k, v)), strict=True)
    ]
    return torch.cat(heads, dim=-1) @ layer.to_out.weight.T
