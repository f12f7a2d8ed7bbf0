"""The operator in plain torch, straight from its formulas: the oracle every kernel is measured against.

Letters of every shape: B batch, H query heads, Hk key heads (Hk divides H), N tokens, Nq queries, M measurements, D key
features, Dv value features, R sensed features, P dictionary atoms, T decoder layers.

Any floating dtype; float16 and bfloat16 compute in float32 and round at the end of each function, as the ops do.
Written to be read: nothing is fused, every intermediate is stored. Autograd differentiates it, and what is masked
(tokens, measurements with bias -inf) gets gradients of exactly 0, never NaN.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import _get_current_dispatch_mode_stack

from csat_ext.measurements import rows_over_places


def project(
    x: Tensor,  # (B, Hx, N, D)
    phi: Tensor,  # (M, N), (Hp, M, N) or (1 or B, Hp, M, N); Hp is 1, Hx or a multiple of Hx
    key_mask: Tensor | None = None,  # (B, N) bool, True = keep
) -> Tensor:  # (B, max(Hx, Hp), M, D), dtype of x
    """Measure: y_j = sum over kept s of phi_js x_s. A masked token is not read: NaN there changes nothing."""
    phi = _four_axes(phi)
    dtype = compute_dtype(x)
    tokens, rows = x.to(dtype), phi.to(dtype)
    if key_mask is not None:
        tokens = torch.where(key_mask[:, None, :, None], tokens, 0.0)
        rows = torch.where(key_mask[:, None, None, :], rows, 0.0)
    heads = max(x.shape[1], phi.shape[1])
    return (repeat_heads(rows, heads) @ repeat_heads(tokens, heads)).to(x.dtype)


def project_implicit(
    x: Tensor,  # (B, Hx, N, D)
    counts: Tensor | None,  # (1 or B, N + 1): tokens measured before s; None: all are
    anchors: Tensor | None,  # (1 or B, A): the token of a row, -1: none
    ensemble: str,
    rows: int,  # M
    heads: int,  # Hp: 1 or a multiple of Hx
    seed: int,
    layer: int,
) -> Tensor:  # (B, max(Hx, Hp), A + M, D), dtype of x
    """Measure by a Phi that the kernels hold nowhere. Over the n kept tokens s, p_s of which come before s:

    rademacher  phi_js = sign(seed, layer, h, j, s) / sqrt(n)
    srht        phi_js = sign(seed, layer, h, 0, s) (-1)^popcount(i_j & s) / sqrt(n), i_j = start + step j
    pool        phi_js = |[p_s, p_s + 1) and [e_j, e_{j+1})| / (e_{j+1} - e_j), e_j = (j + (2 h + 1 - H) / (2 H)) n / M
                within, e_0 = 0, e_M = n

    with the draws of `csat_ext.philox`. Row a in front of them is the token of anchor a.
    """
    if counts is None:
        counts = torch.arange(x.shape[2] + 1, device=x.device)[None]
    if anchors is None:
        anchors = counts.new_empty((1, 0))
    phi = rows_over_places(ensemble, rows, heads, seed, layer, counts, anchors)
    read = (phi != 0).any(2).any(1).expand(x.shape[0], -1)
    return project(x, phi, read)


def renormalise_rows(
    phi: Tensor,  # (M, N), (Hp, M, N) or (1 or B, Hp, M, N)
    key_mask: Tensor,  # (B, N) bool, True = keep
) -> tuple[Tensor, Tensor]:  # factor (B, Hp, M), float32 or float64; empty (B, Hp, M) bool
    """What every row of Phi is multiplied by under a key mask, and which rows have nothing left.

    A row whose entries are all >= 0: sum_s phi_js / sum_{s kept} phi_js, so that it still averages. A row with a
    negative entry: sqrt(N / n_kept), which turns variance 1/N into 1/n_kept. A row is empty, and its factor 0, when no
    kept token has an entry other than 0.
    """
    phi = _four_axes(phi)
    phi = phi.to(compute_dtype(phi))
    signed = (phi < 0).any(-1)
    remaining = _kept_sum(phi, key_mask)
    empty = _kept_sum((phi != 0).to(phi.dtype), key_mask) == 0
    average = phi.sum(-1) / torch.where(empty | signed, 1.0, remaining)
    count = key_mask.sum(-1).clamp_min(1).to(phi.dtype)[:, None, None]
    factor = torch.where(signed, torch.sqrt(phi.shape[-1] / count), average)
    return torch.where(empty, 0.0, factor), empty


def _kept_sum(rows: Tensor, key_mask: Tensor) -> Tensor:
    """sum over kept s of rows_js, (B, Hp, M); a shared Phi is not copied for every batch element."""
    keep = key_mask.to(rows.dtype)
    if rows.shape[0] == 1:
        return torch.einsum("hmn,bn->bhm", rows[0], keep)
    return torch.einsum("bhmn,bn->bhm", rows, keep)


def attend(
    q: Tensor,  # (B, H, Nq, D)
    kc: Tensor,  # (B, Hk, M, D)
    vc: Tensor,  # (B, Hk, M, R)
    score_bias: Tensor | None,  # (M,), (1 or H, M) or (1 or B, 1 or H, M)
    scale: float,
) -> tuple[Tensor, Tensor]:  # z (B, H, Nq, R), dtype of q; lse (B, H, Nq), float32 or float64
    """Attend: s_ij = scale q_i . kc_j + bias_j, lse_i = log sum_j exp(s_ij), z_i = sum_j exp(s_ij - lse_i) vc_j.

    A measurement with bias -inf takes no part. A row whose every bias is -inf has z = 0 and lse = -inf.
    """
    dtype, heads = compute_dtype(q), q.shape[1]
    kc, vc = repeat_heads(kc.to(dtype), heads), repeat_heads(vc.to(dtype), heads)
    scores = scale * (q.to(dtype) @ kc.mT)  # (B, H, Nq, M)
    dead = torch.zeros((), dtype=torch.bool, device=q.device)
    if score_bias is not None:
        bias = score_bias.to(dtype)[..., None, :]  # (.., 1, M)
        dead = bias == -math.inf
        scores = scores + torch.where(dead, 0.0, bias)
    # The greatest score cancels between numerator and denominator, so it carries no gradient.
    top = scores.detach().masked_fill(dead, -math.inf).amax(-1, keepdim=True)
    top = torch.where(top == -math.inf, 0.0, top)
    weights = torch.where(dead, 0.0, torch.exp(torch.where(dead, 0.0, scores - top)))
    mass = weights.sum(-1, keepdim=True)  # at least 1 unless every measurement is dead
    nothing = mass == 0
    safe_mass = torch.where(nothing, 1.0, mass)
    z = (weights / safe_mass) @ vc
    lse = torch.where(nothing, -math.inf, torch.log(safe_mass) + top)
    return z.to(q.dtype), lse[..., 0]


def soft_threshold(u: Tensor, theta: Tensor | float) -> Tensor:
    """soft(u, theta) = sign(u) max(|u| - theta, 0), element by element, theta >= 0 broadcast to u."""
    return torch.sign(u) * torch.relu(torch.abs(u) - theta)


def decode(
    z: Tensor,  # (B, H, Nq, R)
    S: Tensor,  # (1 or T, P, P) or (1 or H, 1 or T, P, P)
    B: Tensor,  # (1 or T, P, R) or (1 or H, 1 or T, P, R)
    theta: Tensor,  # (T, P) or (1 or H, T, P)
    psi: Tensor | None,  # (Dv, P) or (1 or H, Dv, P); None: the identity
    step: Tensor | None = None,  # (T,) or (1 or H, T); 1 where absent
) -> Tensor:  # (B, H, Nq, Dv), dtype of z
    """Recover: a_0 = 0; u_t = a_t + step_t ((S_t - I) a_t + B_t z); a_{t+1} = soft(u_t, theta_t); c = Psi a_T.

    S or B with first axis 1 are tied over the T layers. With step 1: the paper's a_{t+1} = soft(S a_t + B z, theta_t).
    """
    dtype, (layers, atoms) = compute_dtype(z), theta.shape[-2:]
    S, B, theta = (_head_axis(t.to(dtype), dims) for t, dims in ((S, 3), (B, 3), (theta, 2)))
    step = torch.ones_like(theta[..., 0]) if step is None else _head_axis(step.to(dtype), 1)
    rows = z.to(dtype)
    a = rows.new_zeros(*rows.shape[:-1], atoms)
    for t in range(layers):
        S_t, B_t = S[:, t if S.shape[1] > 1 else 0], B[:, t if B.shape[1] > 1 else 0]  # (1 or H, P, P), (1 or H, P, R)
        u = a + step[:, t, None, None] * (a @ S_t.mT - a + rows @ B_t.mT)
        a = soft_threshold(u, theta[:, t, None, :])
    return (a if psi is None else a @ _head_axis(psi.to(dtype), 2).mT).to(z.dtype)


def csat_attention(
    query: Tensor,  # (B, H, Nq, D)
    key: Tensor,  # (B, Hk, N, D)
    value: Tensor,  # (B, Hk, N, Dv)
    phi_k: Tensor,  # (M, N), (1, Hk or H, M, N) or (1 or B, 1, Hk or H, M, N), heads in one axis
    phi_v: Tensor | None = None,  # like phi_k; phi_k where absent
    *,
    decoder: Any = None,  # .S .B .theta .psi .step: `decode`; .weight (1 or H, R, Dv): z W; a function of Z; None: Z
    feature_sensing: Tensor | None = None,  # F (R, Dv) or (1, Hk or H, R, Dv)
    scale: float | None = None,  # tau, 1 / sqrt(D) where absent
    score_bias: Tensor | None = None,  # beta: (M,), (1 or H, M) or (1 or B, 1 or H, M)
    key_mask: Tensor | None = None,  # (B, N) bool, True = keep
) -> Tensor:  # (B, H, Nq, Dv), (B, H, Nq, R) without a decoder; dtype of the query
    """Kc = Phi_K K, Vc = Phi_V V F^T, Z = softmax(tau Q Kc^T + beta) Vc, and the decoder on every row of Z.

    Under a key mask the rows of Phi_K and Phi_V are multiplied by the factor of `renormalise_rows`, and those of Phi_K
    that have nothing left get beta = -inf. With every token masked the output is 0.
    """
    heads = query.shape[1]
    same = phi_v is None
    phi_k = _four_axes(phi_k)
    phi_v = phi_k if phi_v is None else _four_axes(phi_v)
    kc, vc = project(key, phi_k, key_mask), project(value, phi_v, key_mask)
    if key_mask is not None:
        factor_k, empty = renormalise_rows(phi_k, key_mask)
        factor_v = factor_k if same else renormalise_rows(phi_v, key_mask)[0]
        kc = (kc * factor_k[..., None]).to(key.dtype)
        vc = (vc * factor_v[..., None]).to(value.dtype)
        beta = torch.zeros((), dtype=factor_k.dtype, device=key.device) if score_bias is None else score_bias
        score_bias = torch.where(empty.repeat_interleave(heads // empty.shape[1], dim=1), -math.inf, beta)
    if feature_sensing is not None:
        vc = sense_features(vc, feature_sensing)
    z, _ = attend(query, kc, vc, score_bias, query.shape[-1] ** -0.5 if scale is None else scale)
    return recover(z, decoder)


def sense_features(
    values: Tensor,  # (B, Hc, M, Dv)
    feature_sensing: Tensor,  # F (R, Dv) or (Hf, R, Dv); Hf is 1, Hc or a multiple of Hc
) -> Tensor:  # V F^T (B, max(Hc, Hf), M, R), dtype of the values
    """Sense: every row v becomes F v."""
    sensing = _head_axis(feature_sensing.to(compute_dtype(values)), 2)
    groups = max(values.shape[1], sensing.shape[0])
    rows = repeat_heads(values, groups).to(sensing.dtype)
    return (rows @ repeat_heads(sensing[None], groups).mT).to(values.dtype)


def recover(z: Tensor, decoder: Any) -> Tensor:  # (B, H, Nq, R) to (B, H, Nq, Dv)
    """What the `decoder` of `csat_attention` makes of the rows of Z."""
    if decoder is None:
        return z
    if callable(decoder):
        return decoder(z)
    if hasattr(decoder, "weight"):
        return (z.to(compute_dtype(z)) @ decoder.weight.to(compute_dtype(z))).to(z.dtype)
    return decode(z, decoder.S, decoder.B, decoder.theta, decoder.psi, decoder.step)


def has_values(x: Tensor) -> bool:
    """Whether a check may look into x: not while a compiler traces, not on the meta device, not under torch.func."""
    if torch.compiler.is_compiling() or x.is_meta or isinstance(x, FakeTensor):
        return False
    return not torch._C._functorch.is_functorch_wrapped_tensor(x)


def fakes_tensors() -> bool:
    """Whether what is made now holds no values, whatever it is made from."""
    return any(isinstance(mode, FakeTensorMode) for mode in _get_current_dispatch_mode_stack())


def compute_dtype(x: Tensor) -> torch.dtype:
    """float64 for float64, float32 for everything else."""
    return x.dtype if x.dtype in (torch.float32, torch.float64) else torch.float32


def _four_axes(phi: Tensor) -> Tensor:
    """phi with its batch and head axes, (1 or B, Hp, M, N)."""
    return phi.reshape((1,) * (4 - phi.dim()) + phi.shape)


def _head_axis(weight: Tensor, dims: int) -> Tensor:
    """weight, of `dims` axes, with its head axis in front."""
    return weight if weight.dim() > dims else weight[None]


def repeat_heads(x: Tensor, heads: int) -> Tensor:
    """(B, Hx, ..) to (B, heads, ..): head h reads head h / (heads / Hx)."""
    return x if x.shape[1] == heads else x.repeat_interleave(heads // x.shape[1], dim=1)
