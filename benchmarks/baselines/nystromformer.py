"""Nystromformer (Xiong et al. 2021, "Nystromformer: A Nystrom-Based Algorithm for Approximating Self-Attention")."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.functional import conv2d, pad

from .budget import Budget


def landmarks(x: Tensor, m: int, key_mask: Tensor | None = None) -> Tensor:
    """Segment means over m segments of ceil(N / m) tokens, of the kept tokens only: (B, H, N, D) to (B, H, m, D).

    A segment without a token is 0, a landmark like any other.
    """
    missing = -x.shape[2] % m
    keep = torch.ones((1, x.shape[2]), dtype=torch.bool, device=x.device) if key_mask is None else key_mask
    kept = pad(keep, (0, missing)).unflatten(1, (m, -1)).sum(-1).clamp_min(1)
    if key_mask is not None:
        x = x.masked_fill(~key_mask[:, None, :, None], 0)
    return pad(x, (0, 0, 0, missing)).unflatten(2, (m, -1)).sum(3) / kept[:, None, :, None].to(x.dtype)


def iterative_pinv(a: Tensor, iterations: int) -> Tensor:
    """Moore-Penrose inverse: Z <- Z (13 I - A Z (15 I - A Z (7 I - A Z))) / 4, Z_0 = A^T / (|A|_1 |A|_inf).

    After Razavi et al. 2014, as the paper takes it; six iterations in the authors' code.
    """
    identity = torch.eye(a.shape[-1], dtype=a.dtype, device=a.device)
    norms = a.abs().sum(-2).amax(-1) * a.abs().sum(-1).amax(-1)
    z = a.mT / norms[..., None, None]
    for _ in range(iterations):
        az = a @ z
        z = z @ (13 * identity - az @ (15 * identity - az @ (7 * identity - az))) / 4
    return z


class Nystromformer(nn.Module):
    """softmax(q k~^T) softmax(q~ k~^T)^+ softmax(q~ k^T) v with m landmarks q~, k~, scores over sqrt(D).

    The convolution is the paper's skip connection: over the tokens of v, one kernel for each head, `kernel` of them
    odd (35 in the authors' settings for the Long Range Arena), added to the output; None leaves it out. H x kernel
    parameters. The pseudo-inverse is taken in float32 at least, under autocast too.
    """

    def __init__(self, budget: Budget, *, iterations: int = 6, kernel: int | None = 35) -> None:
        super().__init__()
        if kernel is not None and (kernel < 1 or kernel % 2 == 0):
            raise ValueError(f"kernel: {kernel} came; an odd positive number or None is accepted")
        self.m, self.iterations = budget.m, iterations
        self.skip: nn.Parameter | None = None
        if kernel is not None:
            generator = torch.Generator().manual_seed(budget.seed)
            start = torch.empty(budget.heads, 1, kernel, 1)
            self.skip = nn.Parameter(start.uniform_(-(kernel**-0.5), kernel**-0.5, generator=generator))

    def forward(self, q: Tensor, k: Tensor, v: Tensor, key_mask: Tensor | None = None) -> Tensor:
        if key_mask is not None:
            v = v.masked_fill(~key_mask[:, None, :, None], 0)
        scale = q.shape[-1] ** -0.5
        q_marks, k_marks = landmarks(q, self.m, key_mask) * scale, landmarks(k, self.m, key_mask)
        near_q = (scale * (q @ k_marks.mT)).softmax(-1)
        scores = q_marks @ k.mT
        if key_mask is not None:
            scores = scores.masked_fill(~key_mask[:, None, None, :], torch.finfo(scores.dtype).min)
        core = (q_marks @ k_marks.mT).to(torch.promote_types(q.dtype, torch.float32)).softmax(-1)
        with torch.autocast(q.device.type, enabled=False):
            inverse = iterative_pinv(core, self.iterations).to(q.dtype)
        out = near_q @ (inverse @ (scores.softmax(-1) @ v))
        if self.skip is None:
            return out
        reach = (self.skip.shape[2] // 2, 0)
        return out + conv2d(v, self.skip.to(v.dtype), padding=reach, groups=self.skip.shape[0])
