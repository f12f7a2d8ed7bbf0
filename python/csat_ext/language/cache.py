"""`KVCache`: all keys and values of full attention, beside which `csat_ext.CSATCache` is measured."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


class KVCache:
    """Keys and values of the tokens so far, in buffers that double when full, so that a token is copied about once."""

    def __init__(self) -> None:
        self._key = self._value = torch.empty(0)  # (B, H, at least length, D)
        self.length = 0

    @classmethod
    def holding(cls, key: Tensor, value: Tensor) -> KVCache:
        """A cache after these tokens, (B, H, n, D) each."""
        cache = cls()
        cache._key, cache._value, cache.length = key, value, key.shape[2]
        return cache

    @property
    def nbytes(self) -> int:
        """Memory of the keys and values of the tokens so far, without what the buffers have in reserve."""
        return 0 if not self.length else sum(t[:, :, : self.length].numel() * t.itemsize for t in self.buffers)

    @property
    def buffers(self) -> tuple[Tensor, Tensor]:
        return self._key, self._value

    @torch.no_grad()
    def step(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """The rows (B, H, n, D) of the next n tokens; query, key, value: (B, H, n, D)."""
        start, self.length = self.length, self.length + query.shape[2]
        if not start:
            self._key, self._value = key.contiguous(), value.contiguous()
            return F.scaled_dot_product_attention(query, key, value, is_causal=True)
        self._key, self._value = (self._appended(*pair, start) for pair in ((self._key, key), (self._value, value)))
        keys, values = (t[:, :, : self.length] for t in self.buffers)
        mask = None
        if query.shape[2] > 1:
            mask = query.new_ones((query.shape[2], self.length), dtype=torch.bool).tril(start)
        return F.scaled_dot_product_attention(query, keys, values, mask)

    def _appended(self, buffer: Tensor, new: Tensor, start: int) -> Tensor:
        if self.length > buffer.shape[2]:
            grown = buffer.new_empty((*buffer.shape[:2], 2 * self.length, buffer.shape[3]))
            grown[:, :, :start] = buffer[:, :, :start]
            buffer = grown
        buffer[:, :, start : self.length] = new
        return buffer
