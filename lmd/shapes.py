"""Names for the arrays that travel between modules; checked under pytest, free otherwise."""

from jaxtyping import Bool, Float, Int
from torch import Tensor

Wave = Float[Tensor, "batch channel sample"]  # audio, -1 ... 1
Latents = Float[Tensor, "batch latent frame"]  # what the transformer reads and writes
BlockLatents = Float[Tensor, "batch latent block"]  # the block beside its context
FrameControls = Float[Tensor, "batch control controlled"]  # further frame-wise controls

FrameMask = Float[Tensor, "batch 1 frame"]  # 1 = known audio
NoiseLevel = Float[Tensor, " batch"]  # 0 clean ... 1 noise
Tokens = Float[Tensor, "batch token dim"]  # text embeddings, or hidden states
OutputTokens = Float[Tensor, "batch output dim"]  # hidden states of some of a pass's tokens
Heads = Float[Tensor, "batch head token head_dim"]  # queries, keys, values
LayerHeads = Float[Tensor, "layer batch head token head_dim"]  # of all layers
SeenHeads = Float[Tensor, "batch head key head_dim"]  # keys and values beside other queries
AttentionMask = Bool[Tensor, "query key"]  # True = the query sees the key
Positions = Int[Tensor, " token"]  # rotary positions
