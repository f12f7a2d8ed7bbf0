"""The two exact causal forms in plain torch, straight from their definitions: memory N^2 (block), N M D (prefix).

A plain Phi mixes tokens along the sequence, the future into the past. Here query t reads tokens s <= t alone, and the
gradient of row t to a token s > t is exactly 0. Letters of every shape as in `csat_ext.reference.attention`; as many
queries as tokens.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from csat_ext.reference.attention import (
    compute_dtype,
    project,
    recover,
    renormalise_rows,
    repeat_heads,
    sense_features,
)

FORMS = ("block", "prefix")


def causal_block(
    query: Tensor,  # (B, H, N, D)
    key: Tensor,  # (B, Hk, N, D)
    value: Tensor,  # (B, Hk, N, Dv)
    phi_k: Tensor,  # (r, Bk) or (1, Hk or H, r, Bk without the batch axis): the Phi of every block
    phi_v: Tensor | None = None,  # like phi_k; phi_k where absent
    *,
    window_blocks: int = 0,  # w
    decoder: Any = None,
    feature_sensing: Tensor | None = None,
    scale: float | None = None,
    score_bias: Tensor | None = None,  # (r,) or (1 or H, r)
    key_mask: Tensor | None = None,  # (B, N) bool, True = keep
) -> Tensor:  # (B, H, N, Dv), (B, H, N, R) without a decoder; dtype of the query
    """Block form. Token t lies in block c = floor(t / Bk). In ONE softmax its query sees

    - the r measurements Phi_K K_b, Phi_V V_b F^T, biased by score_bias, of every block b < c - w, and
    - the tokens s <= t of the blocks b >= c - w themselves.

    r = Bk and Phi = I is causal attention. A key mask acts on each block as on the keys of `csat_attention`.
    """
    size, n, heads, dtype = phi_k.shape[-1], key.shape[2], query.shape[1], compute_dtype(query)
    keep = torch.ones(key.shape[0], n, dtype=torch.bool, device=key.device) if key_mask is None else key_mask
    key, value = (torch.where(keep[:, None, :, None], x, 0.0) for x in (key, value))
    if feature_sensing is not None:
        value = sense_features(value, feature_sensing)
    blocks = [slice(b, b + size) for b in range(0, n - size + 1, size)]  # the finished ones
    measured = [
        _measured_block(key[:, :, b], value[:, :, b], phi_k, phi_v, score_bias, keep[:, b], heads) for b in blocks
    ]

    token = torch.arange(n, device=key.device)
    block = token // size
    local = (token <= token[:, None]) & (block >= block[:, None] - window_blocks)
    tau = query.shape[-1] ** -0.5 if scale is None else scale
    q, seen = query.to(dtype), local & keep[:, None, None]
    scores = [(tau * (q @ repeat_heads(key.to(dtype), heads).mT)).masked_fill(~seen, -math.inf)]
    values = [repeat_heads(value.to(dtype), heads)]
    for b, (kc, vc, bias) in enumerate(measured):
        of_block = tau * (q @ repeat_heads(kc.to(dtype), heads).mT) + bias[..., None, :]
        scores.append(of_block.masked_fill((b >= block - window_blocks)[:, None], -math.inf))
        values.append(repeat_heads(vc.to(dtype), heads))
    weights = _softmax_or_nothing(torch.cat(scores, -1))
    return recover((weights @ torch.cat(values, -2)).to(query.dtype), decoder)


def _measured_block(
    key: Tensor,
    value: Tensor,
    phi_k: Tensor,
    phi_v: Tensor | None,
    score_bias: Tensor | None,
    keep: Tensor,
    heads: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """Kc, Vc and the bias (B, H, r) of one block, its rows renormalised over the kept tokens."""
    factor_k, empty = renormalise_rows(phi_k, keep)
    factor_v = factor_k if phi_v is None else renormalise_rows(phi_v, keep)[0]
    kc = (project(key, phi_k, keep) * factor_k[..., None]).to(key.dtype)
    vc = (project(value, phi_k if phi_v is None else phi_v, keep) * factor_v[..., None]).to(value.dtype)
    beta = torch.zeros((), dtype=factor_k.dtype, device=key.device) if score_bias is None else score_bias
    return kc, vc, torch.where(repeat_heads(empty, heads), -math.inf, beta)


def causal_prefix(
    query: Tensor,  # (B, H, N, D)
    key: Tensor,  # (B, Hk, N, D)
    value: Tensor,  # (B, Hk, N, Dv)
    phi: Tensor,  # (1 or B, 1, Hk or H, N, M): row s is what token s adds to each measurement
    *,
    signed: bool = False,
    decoder: Any = None,
    feature_sensing: Tensor | None = None,
    scale: float | None = None,
    score_bias: Tensor | None = None,  # (M,), (1 or H, M) or (1 or B, 1 or H, M)
    key_mask: Tensor | None = None,  # (B, N) bool, True = keep
) -> Tensor:  # (B, H, N, Dv), (B, H, N, R) without a decoder; dtype of the query
    """Prefix form: query t attends over measurements of the tokens s <= t alone,

        Kc_tj = sum_{s <= t} phi_sj k_s / g_tj,    Vc_tj = sum_{s <= t} phi_sj F v_s / g_tj.

    phi >= 0: g_tj = sum_{s <= t} phi_sj, so that they are means, and log g_tj is added to the score; a measurement
    without mass takes no part. signed: g_t = sqrt(number of tokens s <= t), for phi of variance 1; nothing is added.
    A masked token is left out of every sum. phi_s one-hot at s, M = N: causal attention.
    """
    dtype, heads = compute_dtype(query), query.shape[1]
    keep = torch.ones(key.shape[0], key.shape[2], dtype=torch.bool, device=key.device) if key_mask is None else key_mask
    phi, key, value = (torch.where(keep[:, None, :, None], x.to(dtype), 0.0) for x in (phi, key, value))
    if feature_sensing is not None:
        value = sense_features(value, feature_sensing)
    phi, key, value = (repeat_heads(x, heads) for x in (phi, key, value))
    kc, vc = (torch.cumsum(phi[..., None] * x[..., None, :], dim=2) for x in (key, value))  # (B, H, N, M, D)
    if signed:
        mass = keep.to(dtype).cumsum(-1)[:, None, :, None]
        normal, log_mass = torch.where(mass > 0, mass, 1.0).sqrt(), torch.zeros_like(mass)
    else:
        mass = torch.cumsum(phi, dim=2)
        normal = torch.where(mass > 0, mass, 1.0)
        log_mass = normal.log()
    tau = query.shape[-1] ** -0.5 if scale is None else scale
    scores = tau * torch.einsum("bhtd,bhtjd->bhtj", query.to(dtype), kc) / normal + log_mass
    if score_bias is not None:
        scores = scores + score_bias.to(dtype)[..., None, :]
    weights = _softmax_or_nothing(scores.masked_fill(mass <= 0, -math.inf))
    z = torch.einsum("bhtj,bhtjd->bhtd", weights / normal, vc)
    return recover(z.to(query.dtype), decoder)


def _softmax_or_nothing(scores: Tensor) -> Tensor:
    """The softmax of each row, and zeros for a row of -inf alone."""
    nothing = (scores == -math.inf).all(-1, keepdim=True)
    return torch.softmax(scores.masked_fill(nothing, 0.0), -1).masked_fill(nothing, 0.0)
