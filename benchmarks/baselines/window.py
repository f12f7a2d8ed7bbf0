"""What a causal local window gives by itself: the exact part of CSAT's block form, without what is behind it."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.functional import pad, scaled_dot_product_attention


class CausalWindow(nn.Module):
    """Token t attends to the tokens of its own block and of `window_blocks` before it, up to itself; learns nothing.

    (window_blocks + 1) N block scores at most are in memory.
    """

    def __init__(self, block: int, window_blocks: int) -> None:
        super().__init__()
        self.block, self.window_blocks = block, window_blocks

    def forward(self, q: Tensor, k: Tensor, v: Tensor, key_mask: Tensor | None = None) -> Tensor:
        """q, k, v (B, H, N, D), key_mask (B, N) bool, True = keep; a row that reaches no kept key is 0."""
        size, before = self.block, self.block * self.window_blocks
        tokens = q.shape[2]
        missing = -tokens % size
        keep = q.new_ones((q.shape[0], tokens), dtype=torch.bool) if key_mask is None else key_mask
        if key_mask is not None:
            k, v = (x.masked_fill(~keep[:, None, :, None], 0) for x in (k, v))
        queries = pad(q, (0, 0, 0, missing)).unflatten(2, (-1, size))
        keys, values = (
            pad(x, (0, 0, before, missing)).unfold(2, before + size, size).mT for x in (k, v)
        )  # (B, H, blocks, before + size, D)
        kept = pad(keep, (before, missing)).unfold(1, before + size, size)[:, None, :, None, :]
        row, column = torch.arange(size, device=q.device)[:, None], torch.arange(before + size, device=q.device)
        allowed = (column <= row + before) & kept
        seen = allowed.any(-1, keepdim=True)
        out = scaled_dot_product_attention(queries, keys, values, allowed | ~seen)  # a row of nothing must not be NaN
        return out.masked_fill(~seen, 0).flatten(2, 3)[:, :, :tokens]
