"""A decoder-only transformer over bytes, its attention full or a causal form of CSAT, with equally many parameters."""

from __future__ import annotations

import math
from typing import TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from csat_ext.cache import CSATCache
from csat_ext.language.cache import KVCache
from csat_ext.language.config import ModelConfig
from csat_ext.module import CSATAttention
from csat_ext.pretrain.model import Mlp, SDPAttention

BYTES = 256
LONGEST_WAVE = 10_000.0
Cache: TypeAlias = CSATCache | KVCache


class FullAttention(SDPAttention):
    """Full causal self-attention, which decodes from a `KVCache`."""

    def __init__(self, embed_dim: int, num_heads: int) -> None:
        super().__init__(embed_dim, num_heads, causal=True)

    def forward(self, x: Tensor, *, cache: KVCache | None = None) -> Tensor:  # type: ignore[override]
        """x (B, n, embed_dim), the whole sequence or, with a cache, its next n tokens -> (B, n, embed_dim)."""
        if cache is None:
            return super().forward(x)
        q, k, v = (
            projection(x).unflatten(-1, (self.num_heads, -1)).transpose(1, 2)
            for projection in (self.q_proj, self.k_proj, self.v_proj)
        )
        return self.out_proj(cache.step(q, k, v).transpose(1, 2).flatten(-2))

    def new_cache(self) -> KVCache:
        return KVCache()


def attention(config: ModelConfig, layer: int) -> FullAttention | CSATAttention:
    """The attention of a block."""
    if config.attention == "sdpa":
        return FullAttention(config.width, config.heads)
    form = config.block if config.attention == "block" else config.prefix
    return CSATAttention(config.width, config.heads, form.replace(layer=layer))


def waves(start: int, count: int, width: int) -> Tensor:
    """Sines and cosines of positions (Vaswani et al. 2017), (count, width) float32, the same however a sequence is
    split."""
    at = torch.arange(start, start + count, dtype=torch.float64)[:, None]
    rates = LONGEST_WAVE ** -(torch.arange(0, width, 2, dtype=torch.float64) / width)
    return torch.cat([torch.sin(at * rates), torch.cos(at * rates)], 1).float()


def parameters(module: nn.Module) -> int:
    """How many numbers are trained."""
    return sum(p.numel() for p in module.parameters())


class Block(nn.Module):
    """Pre-norm causal self-attention and MLP.

    Raises:
        ValueError: the parameters of CSAT leave the MLP no hidden unit.
    """

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(config.width), nn.LayerNorm(config.width)
        self.attn = attention(config, layer)
        extra = parameters(self.attn) - 4 * config.width * (config.width + 1)
        hidden = config.hidden - math.ceil(extra / (2 * config.width + 1))
        if hidden < 1:
            raise ValueError(
                f"model.hidden: {config.hidden} came; the {extra} parameters that model.{config.attention} adds to a "
                f"layer take {config.hidden - hidden} of it"
            )
        self.mlp = Mlp(config.width, hidden)

    def forward(self, x: Tensor, cache: Cache | None = None) -> Tensor:
        x = x + self.attn(self.norm1(x), cache=cache)
        return x + self.mlp(self.norm2(x))


class LanguageModel(nn.Module):
    """Bytes (B, n) -> logits (B, n, 256) of each next byte.

    Positions are sines and cosines added to the embedding, so that any length is taken; what comes after the length of
    training has positions that no training step has seen. The output layer is the embedding.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.width = config.width
        self.embedding = nn.Embedding(BYTES, config.width)
        self.blocks = nn.ModuleList(Block(config, layer) for layer in range(config.layers))
        self.norm = nn.LayerNorm(config.width)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)
        nn.init.normal_(self.embedding.weight, std=config.width**-0.5)

    def forward(self, windows: Tensor) -> Tensor:
        """The mean cross entropy, in nats a byte, of windows (B, n + 1) int64: each byte after the first from those
        before it."""
        logits = self.logits(windows[:, :-1])
        return F.cross_entropy(logits.float().flatten(0, 1), windows[:, 1:].flatten())

    def logits(self, tokens: Tensor, caches: list[Cache] | None = None) -> Tensor:
        """Logits (B, n, 256) of the byte after each of tokens (B, n) int64: the whole sequence, or, with the caches of
        `new_caches`, which take them up, the next n tokens of one."""
        start = caches[0].length if caches else 0
        x = self.embedding(tokens) * math.sqrt(self.width)
        x = x + waves(start, tokens.shape[1], self.width).to(x)
        for i, block in enumerate(self.blocks):
            x = block(x, None if caches is None else caches[i])
        return F.linear(self.norm(x), self.embedding.weight)

    def new_caches(self) -> list[Cache]:
        """What `logits` keeps of a sequence, one cache a layer."""
        return [block.attn.new_cache() for block in self.blocks]  # type: ignore[operator, union-attr]
