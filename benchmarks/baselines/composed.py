"""The strongest rival: CSAT as a user would put it together from stock parts, without this library's kernels.

SDPA on projected k and v, and LISTA in plain torch, compiled or eager. It shares the measurements and the decoder's
start with CSAT, so that what differs is who runs them.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

from csat_ext.measurements import measurement
from csat_ext.reference import ista_weights

from .budget import Budget


def lista(z: Tensor, S: Tensor, B: Tensor, theta: Tensor, psi: Tensor, step: Tensor) -> Tensor:
    """T layers of LISTA (Gregor and LeCun 2010), tied weights (Hd, 1, ..), in the dtype of z; B z is taken once."""
    S, B, theta, psi, step = (weight.to(z.dtype) for weight in (S, B, theta, psi, step))
    measured = z @ B[:, 0].mT
    a = torch.zeros_like(measured)
    for t in range(theta.shape[1]):
        change = measured if t == 0 else a @ S[:, 0].mT + measured - a
        u = a + step[:, t, None, None] * change
        a = u.sign() * (u.abs() - theta[:, t, None]).relu()
    return a @ psi.mT


@lru_cache(maxsize=1)
def _compiled_lista() -> Any:
    return torch.compile(lista, fullgraph=True)


class ComposedStock(nn.Module):
    """lista(sdpa(q, Phi k, Phi v, log-mass)); Phi is the pool of m segments shifted per head, the decoder is learned.

    layers: T; 0 leaves the decoder out. compiled: False runs LISTA eagerly.
    """

    phi: Tensor
    score_bias: Tensor

    def __init__(self, budget: Budget, *, layers: int = 3, compiled: bool = True) -> None:
        super().__init__()
        drawn = measurement("pool", budget.m, budget.tokens, heads=budget.heads, head_shift=True, seed=budget.seed)
        assert drawn.score_bias is not None
        self.register_buffer("phi", drawn.phi)
        self.register_buffer("score_bias", drawn.score_bias)
        start = ista_weights(torch.eye(budget.width), 0.0, layers, psi=torch.eye(budget.width)) if layers else ()
        self.decoder = nn.ParameterList(nn.Parameter(weight.clone()) for weight in start)
        self.decode = _compiled_lista() if compiled else lista

    def forward(self, q: Tensor, k: Tensor, v: Tensor, key_mask: Tensor | None = None) -> Tensor:
        # Four dimensions: with a mask of three torch has no fused kernel on a CPU.
        phi, bias = self.phi.to(q.dtype), self.score_bias[None, :, None, :].to(q.dtype)
        if key_mask is not None:
            # What is left of a segment keeps the row's sum and its log-mass, as in csat_attention.
            whole, phi = phi.sum(-1, keepdim=True), phi * key_mask[:, None, None, :]
            mass = phi.sum(-1, keepdim=True)
            phi = phi * (whole / mass.masked_fill(mass == 0, 1))
            k, v = (x.masked_fill(~key_mask[:, None, :, None], 0) for x in (k, v))
            bias = bias.masked_fill(mass.mT == 0, -torch.inf)
        z = scaled_dot_product_attention(q, phi @ k, phi @ v, bias)
        return self.decode(z, *self.decoder) if len(self.decoder) else z
