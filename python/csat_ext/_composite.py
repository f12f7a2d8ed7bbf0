"""The csat operators in plain torch: what runs on a device that csat has no kernels for.

Same formulas, same accumulation type and same rules as the kernels (see docs/architecture.md); only slower, and the
scores are stored whole (`attend_prefix`: those of a chunk of tokens). Registered under CompositeExplicitAutograd, so
that a kernel for the device always comes first.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from csat_ext._library import backend_of
from csat_ext.measurements import rows_over_places

_warned: set[str] = set()
_PREFIX_CHUNK = 128  # tokens of attend_prefix at a time


def _announced(function: Callable[..., Any]) -> Callable[..., Any]:
    """Says once per device type that plain torch runs, and why."""

    def announcing(first: Tensor, *args: Any) -> Any:
        device_type = first.device.type
        if device_type not in _warned:
            _warned.add(device_type)
            warnings.warn(f"csat_ext on {device_type} tensors: {backend_of(device_type)}", stacklevel=2)
        return function(first, *args)

    return announcing


def accumulate_dtype(dtype: torch.dtype) -> torch.dtype:
    """float64 for float64, float32 for everything else."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def new_token_rows(like: Tensor, batch: int, heads: int, count: int, columns: int) -> Tensor:
    """New rows (B, H, N, columns) in the dtype of `like`, the heads of a token side by side."""
    if heads == 1 or count == 1:
        return like.new_empty((batch, heads, count, columns))
    return like.new_empty((batch, count, heads, columns)).transpose(1, 2)


def new_rows(like: Tensor, columns: int) -> Tensor:
    """New rows (B, H, N, columns) for those of `like` (B, H, N, any), lying as they do there: the heads of a token side
    by side, as the projections of a layer leave them and read their gradients, so that the layer copies nothing on
    either side of attention; else contiguous. `new_rows` of csrc/torch/checks.h is the same rule for the kernels."""
    batch, heads, count = like.shape[:3]
    if like.stride(1) < like.stride(2):
        return new_token_rows(like, batch, heads, count, columns)
    return like.new_empty((batch, heads, count, columns))


def _laid(rows: Tensor, like: Tensor) -> Tensor:
    """The rows in the dtype of `like`, lying as `new_rows` has them."""
    return new_rows(like, rows.shape[3]).copy_(rows)


def _accumulate(like: Tensor, *tensors: Any) -> list[Any]:
    return [None if t is None else t.to(accumulate_dtype(like.dtype)) for t in tensors]


def _to_heads(x: Tensor, heads: int) -> Tensor:
    """Output head h reads head h / (heads / Hx) of x."""
    return x if x.shape[1] == heads else x.repeat_interleave(heads // x.shape[1], dim=1)


def _from_heads(dx: Tensor, heads: int) -> Tensor:
    """The transpose of `_to_heads`."""
    return dx if dx.shape[1] == heads else dx.unflatten(1, (heads, dx.shape[1] // heads)).sum(2)


def _unmasked(x: Tensor, key_mask: Tensor | None) -> Tensor:
    return x if key_mask is None else x.masked_fill(~key_mask[:, None, :, None], 0)


def project(x: Tensor, phi: Tensor, key_mask: Tensor | None) -> Tensor:
    heads = max(x.shape[1], phi.shape[1])
    tokens, weights = _accumulate(x, _to_heads(_unmasked(x, key_mask), heads), phi)
    return (weights @ tokens).to(x.dtype)


def project_backward(
    dy: Tensor, x: Tensor, phi: Tensor, key_mask: Tensor | None, need_dx: bool, need_dphi: bool
) -> tuple[Tensor, Tensor]:
    grad, tokens, weights = _accumulate(x, dy, _to_heads(_unmasked(x, key_mask), dy.shape[1]), phi)
    dx, dphi = x.new_empty(0), phi.new_empty(0)
    if need_dx:
        dx = _laid(_unmasked(_from_heads(weights.mT @ grad, x.shape[1]), key_mask), x)
    if need_dphi:
        dphi = (grad @ tokens.mT).sum_to_size(phi.shape).to(phi.dtype)
    return dx, dphi


def renormalise_rows(phi: Tensor, key_mask: Tensor) -> tuple[Tensor, Tensor]:
    rows, keep = phi.to(accumulate_dtype(phi.dtype)), key_mask[:, None, None]
    signed = (rows < 0).any(-1)
    kept = torch.where(keep, rows, 0)
    empty = (kept == 0).all(-1)
    mass = torch.where(empty | signed, 0, kept.sum(-1))
    average = rows.sum(-1) / torch.where(mass == 0, 1, mass)
    count = key_mask.sum(-1).clamp_min(1).to(rows.dtype)[:, None, None]
    factor = torch.where(signed, torch.sqrt(phi.shape[-1] / count), average)
    return torch.where(empty, 0, factor), mass


def _implicit_phi(
    x: Tensor, tokens: int, counts: Tensor | None, anchors: Tensor | None, settings: tuple[Any, ...]
) -> tuple[Tensor, Tensor]:
    """The matrix (B or 1, heads, A + rows, N) that is implicit in the kernels, and the tokens that it reads (B, N)."""
    if counts is None:
        counts = torch.arange(tokens + 1, device=x.device)[None]
    if anchors is None:
        anchors = counts.new_empty((1, 0))
    ensemble, rows, heads, seed, layer = settings
    phi = rows_over_places(ensemble, rows, heads, seed, layer, counts, anchors)
    return phi.to(accumulate_dtype(x.dtype)), (phi != 0).any(2).any(1).expand(x.shape[0], -1)


def project_implicit(
    x: Tensor,
    counts: Tensor | None,
    anchors: Tensor | None,
    ensemble: str,
    rows: int,
    heads: int,
    seed: int,
    layer: int,
) -> Tensor:
    return project(x, *_implicit_phi(x, x.shape[2], counts, anchors, (ensemble, rows, heads, seed, layer)))


def project_implicit_backward(
    dy: Tensor,
    counts: Tensor | None,
    anchors: Tensor | None,
    ensemble: str,
    heads: int,
    seed: int,
    layer: int,
    x_heads: int,
    tokens: int,
) -> Tensor:
    rows = dy.shape[2] - (0 if anchors is None else anchors.shape[1])
    phi, keep = _implicit_phi(dy, tokens, counts, anchors, (ensemble, rows, heads, seed, layer))
    x = new_token_rows(dy, dy.shape[0], x_heads, tokens, dy.shape[3]).zero_()
    return project_backward(dy, x, phi, keep, True, False)[0]


def _scores(q: Tensor, keys: Tensor, bias: Tensor | None, scale: float) -> Tensor:
    scores = scale * (q @ keys.mT)
    return scores if bias is None else scores + bias.to(scores.dtype)


def _attend(q: Tensor, kc: Tensor, vc: Tensor, bias: Tensor | None, scale: float) -> tuple[Tensor, Tensor]:
    """kc and vc with the heads of q, the bias broadcast to (B, H, Nq, M)."""
    queries, keys, values = _accumulate(q, q, kc, vc)
    scores = _scores(queries, keys, bias, scale)
    lse = scores.logsumexp(-1)
    empty = lse.isneginf().unsqueeze(-1)
    z = (scores - lse.unsqueeze(-1)).exp().masked_fill(empty, 0) @ values
    return _laid(z.masked_fill(empty, 0), q), lse


def _attend_backward(
    dz: Tensor, q: Tensor, kc: Tensor, vc: Tensor, bias: Tensor | None, lse: Tensor, scale: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """dq, dkc, dvc of every head, dbias (B, H, M), all in the accumulation dtype."""
    grad, queries, keys, values = _accumulate(q, dz, q, kc, vc)
    empty = lse.isneginf().unsqueeze(-1)
    p = (_scores(queries, keys, bias, scale) - lse.unsqueeze(-1)).exp().masked_fill(empty, 0)
    dp = grad @ values.mT
    ds = (p * (dp - (p * dp).sum(-1, keepdim=True))).masked_fill(empty, 0)
    return scale * (ds @ keys), scale * (ds.mT @ queries), p.mT @ grad, ds.sum(-2)


def attend(q: Tensor, kc: Tensor, vc: Tensor, score_bias: Tensor | None, scale: float) -> tuple[Tensor, Tensor]:
    heads, bias = q.shape[1], None if score_bias is None else score_bias.unsqueeze(-2)
    return _attend(q, _to_heads(kc, heads), _to_heads(vc, heads), bias, scale)


def attend_backward(
    dz: Tensor,
    q: Tensor,
    kc: Tensor,
    vc: Tensor,
    score_bias: Tensor | None,
    z: Tensor,
    lse: Tensor,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    heads, bias = q.shape[1], None if score_bias is None else score_bias.unsqueeze(-2)
    dq, dkc, dvc, dbias = _attend_backward(dz, q, _to_heads(kc, heads), _to_heads(vc, heads), bias, lse, scale)
    dkc, dvc = _from_heads(dkc, kc.shape[1]), _from_heads(dvc, vc.shape[1])
    return _laid(dq, q), dkc.to(q.dtype), dvc.to(q.dtype), lse.new_empty(0) if score_bias is None else dbias


def _of_tokens(
    q: Tensor,
    kc: Tensor,
    k: Tensor,
    v: Tensor,
    score_bias: Tensor | None,
    key_mask: Tensor | None,
    numbers: tuple[int, ...],
) -> tuple[Tensor, Tensor, Tensor]:
    """k and v with zeros for masked tokens, and the score bias (B, H, Nq, E + N): -inf where a query sees nothing."""
    (block_size, window_blocks, per_block), (n, e), heads = numbers, (k.shape[2], kc.shape[2]), q.shape[1]
    token = torch.arange(n - q.shape[2], n, device=q.device)[:, None]
    local = torch.arange(n, device=q.device)
    blocks = (token // block_size - window_blocks).clamp_min(0)
    earlier = e - per_block * max(n // block_size - window_blocks, 0)
    far = torch.arange(e, device=q.device) < earlier + per_block * blocks
    near = (local <= token) & (local >= blocks * block_size)
    near = near.expand(q.shape[0], heads, -1, -1) if key_mask is None else near & key_mask[:, None, None]
    bias = torch.zeros((), dtype=accumulate_dtype(q.dtype), device=q.device)
    of_measured = (bias if score_bias is None else score_bias.to(bias.dtype).unsqueeze(2)).where(far, -torch.inf)
    of_local = bias.where(near, -torch.inf)
    biases = [x.expand(q.shape[0], heads, q.shape[2], -1) for x in (of_measured, of_local)]
    return _unmasked(k, key_mask), _unmasked(v, key_mask), torch.cat(biases, -1)


def _joined(kc: Tensor, k: Tensor, heads: int) -> Tensor:
    return torch.cat([_to_heads(x, heads) for x in (kc, k)], 2)


def attend_causal(
    q: Tensor,
    kc: Tensor,
    vc: Tensor,
    k: Tensor,
    v: Tensor,
    score_bias: Tensor | None,
    key_mask: Tensor | None,
    scale: float,
    *numbers: int,
) -> tuple[Tensor, Tensor]:
    k, v, bias = _of_tokens(q, kc, k, v, score_bias, key_mask, numbers)
    return _attend(q, _joined(kc, k, q.shape[1]), _joined(vc, v, q.shape[1]), bias, scale)


def attend_causal_backward(
    dz: Tensor,
    q: Tensor,
    kc: Tensor,
    vc: Tensor,
    k: Tensor,
    v: Tensor,
    score_bias: Tensor | None,
    key_mask: Tensor | None,
    z: Tensor,
    lse: Tensor,
    scale: float,
    *numbers: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    e, tokens = kc.shape[2], k.shape[2]
    kept_k, kept_v, bias = _of_tokens(q, kc, k, v, score_bias, key_mask, numbers)
    keys, values = _joined(kc, kept_k, q.shape[1]), _joined(vc, kept_v, q.shape[1])
    dq, dkeys, dvalues, dbias = _attend_backward(dz, q, keys, values, bias, lse, scale)
    gradients = [
        _from_heads(part, x.shape[1])
        for d, pair in ((dkeys, (kc, k)), (dvalues, (vc, v)))
        for part, x in zip(d.split([e, tokens], 2), pair, strict=True)
    ]
    dkc, dk, dvc, dv = gradients
    dkc, dvc = (part.to(q.dtype).contiguous() for part in (dkc, dvc))
    of_bias = lse.new_empty(0) if score_bias is None else dbias[..., :e].contiguous()
    return _laid(dq, q), dkc, dvc, _laid(dk, k), _laid(dv, v), of_bias


class _PrefixChunk(NamedTuple):
    """Some tokens of `attend_prefix`, zeros where they are masked, with the heads of q and in the accumulation type."""

    q: Tensor
    k: Tensor
    v: Tensor
    phi: Tensor
    added: Tensor  # to the mass: phi, or 1 (B, 1, n, 1) of a token that counts


def _prefix_chunks(
    q: Tensor, k: Tensor, v: Tensor, phi: Tensor, key_mask: Tensor | None, signed: bool
) -> Iterator[_PrefixChunk]:
    phi = phi.expand(q.shape[0], -1, -1, -1)
    for start in range(0, q.shape[2], _PREFIX_CHUNK):
        at = slice(start, start + _PREFIX_CHUNK)
        keep = None if key_mask is None else key_mask[:, at]
        tokens = (_to_heads(_unmasked(x[:, :, at], keep), q.shape[1]) for x in (k, v, phi))
        queries, keys, values, added = _accumulate(q, q[:, :, at], *tokens)
        counted = torch.ones_like(queries[:, :1, :, :1])
        yield _PrefixChunk(queries, keys, values, added, _unmasked(counted, keep) if signed else added)


def _prefix_scores(
    chunk: _PrefixChunk, kc: Tensor, mass: Tensor, bias: Tensor | None, scale: float, signed: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The lower triangle of q k^T; g; u = scale raw / g; the scores, -inf where a measurement has no mass."""
    running = mass + chunk.added.cumsum(2)
    filled = running > 0
    g = torch.where(filled, running, 1)
    g = g.sqrt() if signed else g
    near = (chunk.q @ chunk.k.mT).tril()
    u = scale * (chunk.q @ kc.mT + near @ chunk.phi) / g
    scores = u if signed else u + g.log()
    scores = scores if bias is None else scores + bias.to(scores.dtype)
    return near, g, u, scores.masked_fill(~filled, -torch.inf)


_PrefixSums = tuple[Tensor, Tensor, Tensor]  # kc, vc and the mass (B, H, 1, M), signed: (B, 1, 1, 1)


def _behind(chunk: _PrefixChunk, state: _PrefixSums) -> _PrefixSums:
    kc, vc, mass = state
    return kc + chunk.phi.mT @ chunk.k, vc + chunk.phi.mT @ chunk.v, mass + chunk.added.sum(2, keepdim=True)


def _prefix_start(kc: Tensor, vc: Tensor, mass: Tensor, heads: int, signed: bool) -> _PrefixSums:
    mass = mass.unsqueeze(2)
    return _to_heads(kc, heads), _to_heads(vc, heads), mass if signed else _to_heads(mass, heads)


def attend_prefix(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    phi: Tensor,
    kc: Tensor,
    vc: Tensor,
    mass: Tensor,
    score_bias: Tensor | None,
    key_mask: Tensor | None,
    scale: float,
    signed: bool,
) -> tuple[Tensor, ...]:
    heads, bias = q.shape[1], None if score_bias is None else score_bias.unsqueeze(2)
    state = _prefix_start(kc, vc, mass, heads, signed)
    rows, sums = [q.new_empty((*q.shape[:2], 0, v.shape[3]))], [kc.new_empty((*q.shape[:2], 0))]
    for chunk in _prefix_chunks(q, k, v, phi, key_mask, signed):
        _, g, _, scores = _prefix_scores(chunk, state[0], state[2], bias, scale, signed)
        lse = scores.logsumexp(-1)
        empty = lse.isneginf().unsqueeze(-1)
        w = (scores - lse.unsqueeze(-1)).exp().masked_fill(empty, 0) / g
        rows.append((w @ state[1] + (w @ chunk.phi.mT).tril() @ chunk.v).to(q.dtype))
        sums.append(lse)
        state = _behind(chunk, state)
    state_end = (x[:, :: heads // kc.shape[1]] for x in state[:2])
    mass_end = state[2] if signed else state[2][:, :: heads // kc.shape[1]]
    ends = (x.clone(memory_format=torch.contiguous_format) for x in (*state_end, mass_end.squeeze(2)))
    return _laid(torch.cat(rows, 2), q), torch.cat(sums, 2), *ends


def attend_prefix_backward(
    dz: Tensor,
    dkc_end: Tensor,
    dvc_end: Tensor,
    dmass_end: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    phi: Tensor,
    kc: Tensor,
    vc: Tensor,
    mass: Tensor,
    score_bias: Tensor | None,
    key_mask: Tensor | None,
    lse: Tensor,
    scale: float,
    signed: bool,
) -> tuple[Tensor, ...]:
    heads, bias = q.shape[1], None if score_bias is None else score_bias.unsqueeze(2)
    chunks = list(_prefix_chunks(q, k, v, phi, key_mask, signed))
    states = [_prefix_start(kc, vc, mass, heads, signed)]
    for chunk in chunks[:-1]:
        states.append(_behind(chunk, states[-1]))
    dkc, dvc = (_of_first_heads(x, heads) for x in (dkc_end, dvc_end))
    dmass = None if signed else _of_first_heads(dmass_end.unsqueeze(2), heads)
    dbias = lse.new_zeros((*q.shape[:2], phi.shape[3]))
    of_tokens: list[tuple[Tensor, ...]] = []
    parts = zip(chunks, states, dz.split(_PREFIX_CHUNK, 2), lse.split(_PREFIX_CHUNK, 2), strict=True)
    for chunk, (kp, vp, masses), grad, sums in reversed(list(parts if chunks else ())):
        (grad,) = _accumulate(q, grad)
        near, g, u, scores = _prefix_scores(chunk, kp, masses, bias, scale, signed)
        empty = sums.isneginf().unsqueeze(-1)
        p = (scores - sums.unsqueeze(-1)).exp().masked_fill(empty, 0)
        of_values = (grad @ chunk.v.mT).tril()
        dp = (grad @ vp.mT + of_values @ chunk.phi) / g
        delta = (p * dp).sum(-1, keepdim=True)
        ds = (p * (dp - delta)).masked_fill(empty, 0)
        w, a = p / g, scale * ds / g
        of_keys = (a @ chunk.phi.mT).tril()
        dq = a @ kp + of_keys @ chunk.k
        dk = of_keys.mT @ chunk.q + chunk.phi @ dkc
        dv = (w @ chunk.phi.mT).tril().mT @ grad + chunk.phi @ dvc
        dphi = near.mT @ a + chunk.k @ dkc.mT + of_values.mT @ w + chunk.v @ dvc.mT
        if dmass is not None:
            dg = (ds * (1 - u) - p * dp) / g
            dphi = dphi + dg.flip(2).cumsum(2).flip(2) + dmass
            dmass = dmass + dg.sum(2, keepdim=True)
        dkc, dvc = dkc + a.mT @ chunk.q, dvc + w.mT @ grad
        dbias += ds.sum(2)
        of_tokens.append((dq, dk, dv, dphi))
    if not of_tokens:
        of_tokens.append(tuple(lse.new_empty((*q.shape[:2], 0, x.shape[3])) for x in (q, k, v, phi)))
    dq, dk, dv, dphi = (torch.cat(x, 2) for x in zip(*reversed(of_tokens), strict=True))
    of_state = (_from_heads(x, kc.shape[1]) for x in (dkc, dvc))
    return (
        *(_laid(dq, q), _laid(_from_heads(dk, k.shape[1]), k), _laid(_from_heads(dv, v.shape[1]), v)),
        _unmasked(_from_heads(dphi, kc.shape[1]), key_mask),
        *of_state,
        lse.new_empty(0) if dmass is None else _from_heads(dmass, kc.shape[1]).squeeze(2),
        lse.new_empty(0) if score_bias is None else dbias,
    )


def _of_first_heads(x: Tensor, heads: int) -> Tensor:
    """Another transpose of `_from_heads`: x at the first of the heads that share it, zeros at the others."""
    group = heads // x.shape[1]
    return torch.nn.functional.pad(x.unsqueeze(2), (0, 0, 0, 0, 0, group - 1)).flatten(1, 2)


def _layer(weights: Tensor, t: int) -> Tensor:
    """Layer t of S or B, which are tied when their layer axis is 1."""
    return weights[:, t if weights.shape[1] > 1 else 0]


def _iterates(z: Tensor, S: Tensor, B: Tensor, theta: Tensor, step: Tensor) -> tuple[list[Tensor], list[Tensor]]:
    """a_0 .. a_T and the changes y_t = S_t a_t + B_t z - a_t."""
    iterates = [z.new_zeros((*z.shape[:-1], theta.shape[-1]))]
    changes = []
    for t in range(theta.shape[1]):
        a = iterates[-1]
        changes.append(a @ _layer(S, t).mT + z @ _layer(B, t).mT - a)
        u = a + step[:, t, None, None] * changes[-1]
        iterates.append(u.sign() * (u.abs() - theta[:, t, None]).clamp_min(0))
    return iterates, changes


def decode(z: Tensor, S: Tensor, B: Tensor, theta: Tensor, psi: Tensor | None, step: Tensor) -> Tensor:
    rows, S, B, theta, psi, step = _accumulate(z, z, S, B, theta, psi, step)
    last = _iterates(rows, S, B, theta, step)[0][-1]
    return _laid(last if psi is None else last @ psi.mT, z)


def decode_backward(
    dc: Tensor, z: Tensor, S: Tensor, B: Tensor, theta: Tensor, psi: Tensor | None, step: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    grad, rows, S, B, theta, psi, step = _accumulate(z, dc, z, S, B, theta, psi, step)
    iterates, changes = _iterates(rows, S, B, theta, step)
    head_axis = (0,) if S.shape[0] > 1 else (0, 1)  # batch, and the heads that share a decoder

    def summed(per_head: Tensor) -> Tensor:
        return per_head.sum(head_axis).reshape(S.shape[0], *per_head.shape[2:])

    dS, dB, dtheta, dstep = (torch.zeros_like(t) for t in (S, B, theta, step))
    dpsi = grad.new_empty(0) if psi is None else summed(grad.mT @ iterates[-1])
    g, dz = grad if psi is None else grad @ psi, torch.zeros_like(rows)
    for t in reversed(range(theta.shape[1])):
        e = g * (iterates[t + 1] != 0)
        dtheta[:, t] = -summed((e * iterates[t + 1].sign()).sum(-2))
        dstep[:, t] = summed((e * changes[t]).sum((-2, -1)))
        scaled = step[:, t, None, None] * e
        _layer(dS, t).add_(summed(scaled.mT @ iterates[t]))
        _layer(dB, t).add_(summed(scaled.mT @ rows))
        dz += scaled @ _layer(B, t)
        g = e - scaled + scaled @ _layer(S, t)
    return _laid(dz, z), dS, dB, dtheta, dpsi, dstep


def attend_decode(
    q: Tensor,
    kc: Tensor,
    vc: Tensor,
    score_bias: Tensor | None,
    scale: float,
    S: Tensor,
    B: Tensor,
    theta: Tensor,
    psi: Tensor | None,
    step: Tensor,
    need_z: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    z, lse = attend(q, kc, vc, score_bias, scale)
    return decode(z, S, B, theta, psi, step), z if need_z else z.new_empty(0), lse


def attend_causal_decode(
    q: Tensor,
    kc: Tensor,
    vc: Tensor,
    k: Tensor,
    v: Tensor,
    score_bias: Tensor | None,
    key_mask: Tensor | None,
    scale: float,
    block_size: int,
    window_blocks: int,
    measurements_per_block: int,
    S: Tensor,
    B: Tensor,
    theta: Tensor,
    psi: Tensor | None,
    step: Tensor,
    need_z: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    numbers = scale, block_size, window_blocks, measurements_per_block
    z, lse = attend_causal(q, kc, vc, k, v, score_bias, key_mask, *numbers)
    return decode(z, S, B, theta, psi, step), z if need_z else z.new_empty(0), lse


def attend_prefix_decode(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    phi: Tensor,
    kc: Tensor,
    vc: Tensor,
    mass: Tensor,
    score_bias: Tensor | None,
    key_mask: Tensor | None,
    scale: float,
    signed: bool,
    S: Tensor,
    B: Tensor,
    theta: Tensor,
    psi: Tensor | None,
    step: Tensor,
    need_z: bool,
) -> tuple[Tensor, ...]:
    z, *rest = attend_prefix(q, k, v, phi, kc, vc, mass, score_bias, key_mask, scale, signed)
    return decode(z, S, B, theta, psi, step), z if need_z else z.new_empty(0), *rest


_IMPLEMENTATIONS = torch.library.Library("csat", "IMPL")
for _function in (
    *(project, project_backward, renormalise_rows, project_implicit, project_implicit_backward),
    *(attend, attend_backward, attend_causal, attend_causal_backward, attend_prefix, attend_prefix_backward),
    *(decode, decode_backward, attend_decode, attend_causal_decode, attend_prefix_decode),
):
    _IMPLEMENTATIONS.impl(_function.__name__, _announced(_function), "CompositeExplicitAutograd")
