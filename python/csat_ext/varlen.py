"""Ragged batches: sequences of different lengths packed one after the other, without padding."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from csat_ext.functional import Decoder, autocast_inputs, check_attention, check_form, csat_attention, measure, recover
from csat_ext.measurements import Measurement, measurement

_OPTIONS = frozenset({"seed", "layer", "dtype", "device", "anchors", "head_shift"})  # of `measurement`, per example


def csat_attention_varlen(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    phi_k: Tensor | None = None,
    phi_v: Tensor | None = None,
    *,
    decoder: Decoder | None = None,
    feature_sensing: Tensor | None = None,
    scale: float | None = None,
    score_bias: Tensor | None = None,
    causal: str | None = None,
    block_size: int | None = None,
    measurements_per_block: int | None = None,
    window_blocks: int = 0,
    signed: bool = False,
) -> Tensor:
    """`csat_attention` of every example by itself, the examples lying packed in one row of tokens.

    Example i is the tokens [cu_seqlens[i], cu_seqlens[i + 1]). Examples of one length are computed as one batch, and
    nothing is padded, so that the work is that of the tokens there are; the price is one launch of every kernel for
    each different length, a copy of the tokens of a batch, and one wait for lengths that are on a GPU.

    Args:
        query: (tokens of the queries, H, D). key: (tokens, Hk, D). value: (tokens, Hk, Dv). Any strides.
        cu_seqlens_q, cu_seqlens_k: (examples + 1,) int32 or int64: 0, rising to the number of tokens. An example may be
            empty; one without keys gives rows of 0 (before the decoder). Equal where causal.
        phi_k, phi_v: as in `csat_attention`, without the batch axis and with its token axis packed as well, as
            `measurement_varlen` makes them: (M, tokens), (1, Hk or H, M, tokens without the batch axis), also for
            examples shorter than M; with causal="prefix" (tokens, M), (1, Hk or H, tokens, M). With causal="block" that
            of a block, shared.
        score_bias: (M,), (1 or H, M), or one for each example, (examples, 1 or H, M). With causal="block" that of a
            block, shared: (r,), (1 or H, r).
        decoder, feature_sensing, scale, causal, block_size, measurements_per_block, window_blocks, signed: as in
            `csat_attention`.

    Returns:
        (tokens of the queries, H, Dv), (.., H, R) without a decoder; dtype of the query, which autocast sets as it does
        that of the key and the value.

    Raises:
        TypeError, ValueError: naming the argument, what came and what is accepted.
    """
    check_form(causal, False, block_size, measurements_per_block, window_blocks, signed)
    for name, tensor in (("query", query), ("key", key), ("value", value)):
        _check_tensor(name, tensor, (3,), "(tokens, heads, features)")
    if value.shape[0] != key.shape[0]:
        raise ValueError(f"value has {value.shape[0]} tokens, key has {key.shape[0]}: they must agree")
    of_q, of_k = _ranges("cu_seqlens_q", cu_seqlens_q, query), _ranges("cu_seqlens_k", cu_seqlens_k, key)
    if len(of_q) != len(of_k) or (causal is not None and of_q != of_k):
        raise ValueError(
            f"cu_seqlens_q holds {len(of_q)} examples, cu_seqlens_k {len(of_k)}; accepted: as many, and with a causal "
            "form the same lengths"
        )
    query, key, value = autocast_inputs(query, key, value)
    phis = [_packed_phi(name, phi, causal, key) for name, phi in (("phi_k", phi_k), ("phi_v", phi_v))]
    biases = _biases(score_bias, len(of_k), causal)
    alike: dict[tuple[int, int], list[int]] = {}  # lengths -> examples
    for i, (at_q, at_k) in enumerate(zip(of_q, of_k, strict=True)):
        alike.setdefault((at_q.stop - at_q.start, at_k.stop - at_k.start), []).append(i)
    form: dict[str, Any] = {
        "causal": causal, "block_size": block_size, "measurements_per_block": measurements_per_block,
        "window_blocks": window_blocks, "signed": signed,
    }  # fmt: skip
    rows: dict[int, Tensor] = {}
    for examples in alike.values():
        keys = [of_k[i] for i in examples]
        q, k, v = _batch(query, [of_q[i] for i in examples]), _batch(key, keys), _batch(value, keys)
        phi, of_v = (None if p is None else p(keys) for p in phis)
        bias = biases(examples)
        options: dict[str, Any] = {"decoder": decoder, "scale": scale, "score_bias": bias}
        if causal is None:  # not csat_attention, which wants no more measurements than tokens
            check_attention(q, k, v)
            if phi is None:
                raise TypeError("phi_k must be a torch.Tensor, got None")
            kc, vc, options["score_bias"] = measure(k, v, phi, of_v, feature_sensing, bias, heads=q.shape[1])
            out = recover(q, kc, vc, **options)
        else:
            out = csat_attention(q, k, v, phi, of_v, feature_sensing=feature_sensing, **options, **form)
        rows |= zip(examples, out.transpose(1, 2), strict=True)
    return torch.cat([rows[i] for i in range(len(of_q))])


def _batch(packed: Tensor, at: Sequence[slice]) -> Tensor:
    """(examples, heads, n, features) of examples of one length; a view where it is one example."""
    if len(at) == 1:
        return packed[at[0]].transpose(0, 1).unsqueeze(0)
    return torch.stack([packed[tokens] for tokens in at]).transpose(1, 2)


def measurement_varlen(
    ensemble: str, m: int, cu_seqlens: Tensor, *, heads: int | None = None, **options: Any
) -> Measurement:
    """The Phi of every example for `csat_attention_varlen`, side by side: that of `measurement` for its own length, and
    Phi = I (exact attention) where it has no more than m tokens.

    Args:
        ensemble, m, heads: as in `measurement`; so are the options seed, layer, dtype, device, anchors, head_shift.
            No grid: pools of images are laid over their tokens in order. No key mask: what is packed has no padding.
        cu_seqlens: (examples + 1,) int32 or int64, starting at 0; on the device of the result unless `device` says so.

    Returns:
        phi (heads or 1, m, tokens) and score_bias (examples, heads or 1, m), -inf for the rows that a short example
        leaves empty.

    Raises:
        TypeError, ValueError: naming the argument, what came and what is accepted.
    """
    if unknown := sorted(options.keys() - _OPTIONS):
        raise TypeError(f"measurement_varlen got unknown options {unknown}; accepted: {sorted(_OPTIONS)}")
    lengths = [at.stop - at.start for at in _ranges("cu_seqlens", cu_seqlens, None)]
    options = {"device": cu_seqlens.device, **options}
    template = measurement(ensemble, m, m, heads=heads, **options).phi
    made: dict[int, tuple[Tensor, Tensor]] = {}
    for n in set(lengths):
        if n <= m:
            eye = torch.eye(m, n, dtype=template.dtype, device=template.device)
            phi = eye.expand(template.shape[0], -1, -1)
            empty = torch.arange(m, device=template.device) >= n
            bias = torch.zeros(m, device=template.device).masked_fill(empty, -math.inf)
        else:
            one = measurement(ensemble, m, n, heads=heads, **options)
            phi = one.phi
            bias = torch.zeros(m, device=phi.device) if one.score_bias is None else one.score_bias
        made[n] = phi, bias.expand(template.shape[0], m)
    phis, biases = zip(*(made[n] for n in lengths), strict=True)
    return Measurement(torch.cat(phis, -1), torch.stack(biases))


# ---- checks ----------------------------------------------------------------------------------------------------------


def _check_tensor(name: str, value: object, dims: tuple[int, ...], accepted: str) -> None:
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} must be a torch.Tensor, got {type(value).__name__}")
    if value.dim() not in dims:
        raise ValueError(f"{name} has shape {tuple(value.shape)}; accepted: {accepted}")


def _ranges(name: str, cu_seqlens: Tensor, packed: Tensor | None) -> list[slice]:
    """The tokens of every example; reads cu_seqlens."""
    _check_tensor(name, cu_seqlens, (1,), "(examples + 1,)")
    if cu_seqlens.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"{name} has dtype {cu_seqlens.dtype}; accepted: torch.int32 or torch.int64")
    ends = cu_seqlens.tolist()
    if len(ends) < 2:
        raise ValueError(f"{name} holds {ends}; accepted: one number more than there are examples, at least two")
    total = ends[-1] if packed is None else packed.shape[0]
    if ends[0] != 0 or ends[-1] != total or ends != sorted(ends):
        which = "" if packed is None else f", {total}"
        raise ValueError(f"{name} holds {ends}; accepted: 0, rising to the number of tokens{which}")
    return [slice(a, b) for a, b in itertools.pairwise(ends)]


def _packed_phi(
    name: str, phi: Tensor | None, causal: str | None, key: Tensor
) -> Callable[[Sequence[slice]], Tensor] | None:
    """From the tokens of examples of one length to their phi."""
    if phi is None:
        return None
    _check_tensor(name, phi, (2, 3), "two axes, or three with the heads in front")
    if causal == "block":
        return lambda at: phi
    axis = -1 if causal is None else -2
    if phi.shape[axis] != key.shape[0]:
        raise ValueError(f"{name} has {phi.shape[axis]} tokens on axis {axis}, key has {key.shape[0]}: they must agree")
    with_heads = phi if phi.dim() == 3 else phi.unsqueeze(0)
    return lambda at: torch.stack([with_heads.narrow(axis, s.start, s.stop - s.start) for s in at])


def _biases(score_bias: Tensor | None, examples: int, causal: str | None) -> Callable[[Sequence[int]], Tensor | None]:
    """From some examples to their score bias."""
    if score_bias is None:
        return lambda chosen: None
    _check_tensor("score_bias", score_bias, (1, 2, 3), "(M,), (1 or H, M) or (examples, 1 or H, M)")
    if score_bias.dim() < 3:
        return lambda chosen: score_bias
    if causal == "block":
        raise ValueError(
            f"score_bias has shape {tuple(score_bias.shape)}; accepted with causal='block': that of one block, (r,) or "
            "(heads, r), which all examples share"
        )
    if score_bias.shape[0] != examples:
        raise ValueError(
            f"score_bias has shape {tuple(score_bias.shape)}; accepted: one for each of {examples} examples"
        )
    return lambda chosen: torch.stack([score_bias[i] for i in chosen])
