"""Performer (Choromanski et al. 2021, "Rethinking Attention with Performers"): FAVOR+ for softmax attention."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .budget import Budget

EPSILON = 1e-6  # added to every feature, as in common implementations: no denominator is 0


def orthogonal_features(m: int, width: int, seed: int) -> Tensor:
    """omega (m, D): rows N(0, I), orthogonal to each other within every block of D rows.

    A block is a uniformly random orthogonal matrix whose rows get the lengths of independent Gaussian vectors, so that
    each row by itself is N(0, I) and the estimate stays unbiased.
    """
    generator = torch.Generator().manual_seed(seed)
    blocks = []
    for start in range(0, m, width):
        gaussian = torch.randn(width, width, generator=generator, dtype=torch.float64)
        q, r = torch.linalg.qr(gaussian)
        q = q * r.diagonal().sign()  # makes the distribution uniform (Mezzadri 2007)
        lengths = torch.randn(width, width, generator=generator, dtype=torch.float64).norm(dim=1)
        blocks.append((lengths[:, None] * q)[: m - start])
    return torch.cat(blocks).float()


def log_features(x: Tensor, omega: Tensor) -> Tensor:
    """Exponents of sqrt(m) phi(x) = exp(omega x' - |x'|^2 / 2), x' = x / D^(1/4): (.., N, D) to (.., N, m).

    E[phi(q) . phi(k)] = exp(q . k / sqrt(D)).
    """
    scaled = x * x.shape[-1] ** -0.25
    return scaled @ omega.to(scaled.dtype).mT - scaled.square().sum(-1, keepdim=True) / 2


class Performer(nn.Module):
    """D^-1 (phi(q) (phi(k)^T v)), D = diag(phi(q) phi(k)^T 1), positive orthogonal random features.

    Exponents are shifted by their maximum (of a row for q, of all tokens for k), which cancels; features are made in
    float32 at least, under autocast too, products are in the dtype of q. Nothing is learned; features are drawn once.
    """

    omega: Tensor

    def __init__(self, budget: Budget) -> None:
        super().__init__()
        self.register_buffer("omega", orthogonal_features(budget.m, budget.width, budget.seed))

    def forward(self, q: Tensor, k: Tensor, v: Tensor, key_mask: Tensor | None = None) -> Tensor:
        dtype = torch.promote_types(q.dtype, torch.float32)
        with torch.autocast(q.device.type, enabled=False):
            of_q, of_k = (log_features(x.to(dtype), self.omega) for x in (q, k))
        if key_mask is not None:
            of_k = of_k.masked_fill(~key_mask[:, None, :, None], -torch.inf)
            v = v.masked_fill(~key_mask[:, None, :, None], 0)
        of_q = (of_q - of_q.detach().amax(-1, keepdim=True)).exp() + EPSILON
        top = of_k.detach().amax((-2, -1), keepdim=True)
        of_k = (of_k - top.clamp_min(torch.finfo(dtype).min)).exp() + EPSILON
        if key_mask is not None:
            of_k = of_k * key_mask[:, None, :, None]
        with torch.autocast(q.device.type, enabled=False):
            mass = of_q @ of_k.sum(-2).unsqueeze(-1)
        return ((of_q.to(q.dtype) @ (of_k.to(q.dtype).mT @ v)).to(dtype) / mass.clamp_min(EPSILON**2)).to(q.dtype)
