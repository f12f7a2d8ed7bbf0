"""Longformer's sliding window (Beltagy, Peters and Cohan 2020): token i attends to |i - j| <= w / 2."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention.flex_attention import create_block_mask, flex_attention
from torch.nn.functional import pad

from .budget import Budget

FORMS = ("flex", "banded")


@lru_cache(maxsize=1)
def _compiled_flex() -> Any:
    return torch.compile(flex_attention, dynamic=False)


def banded_attention(q: Tensor, k: Tensor, v: Tensor, half: int, key_mask: Tensor | None = None) -> Tensor:
    """Attention to |i - j| <= half, in blocks of c = max(half, 1) queries and the c + 2 half keys that they can reach.

    3 N half scores at most are in memory (the authors' sliding chunks). A row that reaches no kept key is 0.
    """
    batch, tokens = q.shape[0], q.shape[2]
    block = max(half, 1)
    blocks = -(-tokens // block)
    missing = blocks * block - tokens
    keep = torch.ones((batch, tokens), dtype=torch.bool, device=q.device) if key_mask is None else key_mask
    if key_mask is not None:
        v = v.masked_fill(~keep[:, None, :, None], 0)

    def reached(x: Tensor, dim: int) -> Tensor:
        return x.unfold(dim, block + 2 * half, block)

    queries = pad(q, (0, 0, 0, missing)).unflatten(2, (blocks, block))
    keys, values = (reached(pad(x, (0, 0, half, half + missing)), 2) for x in (k, v))  # (B, H, blocks, D, c + 2 half)
    kept = reached(pad(keep, (half, half + missing)), 1)[:, None, :, None, :]
    row = torch.arange(block, device=q.device)[:, None]
    column = torch.arange(block + 2 * half, device=q.device)
    allowed = ((column - row >= 0) & (column - row <= 2 * half)) & kept
    scores = ((queries @ keys) * q.shape[-1] ** -0.5).masked_fill(~allowed, -torch.inf)
    nothing = ~allowed.any(-1, keepdim=True)
    weights = scores.masked_fill(nothing, 0).softmax(-1).masked_fill(nothing, 0)
    return (weights @ values.mT).flatten(2, 3)[:, :, :tokens]


class SlidingWindow(nn.Module):
    """Attention to a window of m keys around each token (m // 2 on either side); nothing is learned.

    form: "flex", torch's FlexAttention compiled, which skips the tiles outside the band, or "banded", plain torch;
    None is flex on CUDA and banded elsewhere, where FlexAttention has no backward pass. No global attention.
    """

    def __init__(self, budget: Budget, form: str | None = None) -> None:
        super().__init__()
        if form is not None and form not in FORMS:
            raise ValueError(f"form: {form!r} came; accepted: {', '.join(FORMS)} or None")
        self.half, self.form = budget.m // 2, form

    def forward(self, q: Tensor, k: Tensor, v: Tensor, key_mask: Tensor | None = None) -> Tensor:
        if (self.form or ("flex" if q.is_cuda else "banded")) == "banded":
            return banded_attention(q, k, v, self.half, key_mask)
        attention = _compiled_flex() if q.is_cuda else flex_attention
        return attention(q, k, v, block_mask=self.block_mask(q, key_mask))

    def block_mask(self, q: Tensor, key_mask: Tensor | None) -> Any:
        tokens = q.shape[2]
        if key_mask is None:
            return _window_mask(self.half, tokens, str(q.device))

        def allowed(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
            return ((i - j).abs() <= self.half) & key_mask[b, j]

        return create_block_mask(allowed, q.shape[0], None, tokens, tokens, device=str(q.device))


@lru_cache(maxsize=16)
def _window_mask(half: int, tokens: int, device: str) -> Any:
    def allowed(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        return (i - j).abs() <= half

    return create_block_mask(allowed, None, None, tokens, tokens, device=device)
