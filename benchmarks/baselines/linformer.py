"""Linformer (Wang, Li, Khabsa, Fang and Ma 2020, "Linformer: Self-Attention with Linear Complexity")."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

from .budget import Budget


class Linformer(nn.Module):
    """softmax(q (E k)^T / sqrt(D)) F v with learned E, F (m, N), shared by the heads ("headwise sharing").

    A masked token is set to 0 before it is projected. Fewer tokens than N use the first columns of E and F, and both
    start as Xavier's uniform with gain 1 / sqrt(2), as in fairseq. 2 m N parameters.
    """

    def __init__(self, budget: Budget) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(budget.seed)
        self.key_projection, self.value_projection = (
            nn.Parameter(torch.empty(budget.m, budget.tokens)) for _ in range(2)
        )
        for projection in (self.key_projection, self.value_projection):
            nn.init.xavier_uniform_(projection, gain=1 / math.sqrt(2), generator=generator)

    def forward(self, q: Tensor, k: Tensor, v: Tensor, key_mask: Tensor | None = None) -> Tensor:
        if k.shape[2] > self.key_projection.shape[1]:
            raise ValueError(f"k has {k.shape[2]} tokens, E was made for {self.key_projection.shape[1]}")
        if key_mask is not None:
            k, v = (x.masked_fill(~key_mask[:, None, :, None], 0) for x in (k, v))
        e, f = (p[:, : k.shape[2]].to(q.dtype) for p in (self.key_projection, self.value_projection))
        return scaled_dot_product_attention(q, e @ k, f @ v)
