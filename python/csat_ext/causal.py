"""The two exact causal forms (formulas: `csat_ext.reference.causal_block` and `causal_prefix`).

Both continue from a state that stands for all tokens before: the parallel form continues from nothing, decoding is a
continuation by one token. No scores are kept: the backward pass computes them again. Work and memory for each head, E
being the r N / Bk measurements of finished blocks:

| form | multiplications, forward | kept for the backward pass | state of decoding |
|---|---|---|---|
| block | N (r N / Bk + (w + 1) Bk) D | q, k, v, E D | E (2 D + 1) + 2 (w + 1) Bk D |
| prefix | N (2 M + C) (D + Dv), C tokens a chunk | q, k, v, N M | M (D + Dv + 1) |

Both are operators of their own, `torch.ops.csat.attend_causal` and `torch.ops.csat.attend_prefix`, and with a sparse
decoder behind them `attend_causal_decode` and `attend_prefix_decode`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from csat_ext._composite import accumulate_dtype

Measure = Callable[[Tensor, Tensor, Tensor | None], tuple[Tensor, Tensor, Tensor | None]]
"""From blocks of keys, of values (blocks, Hk, Bk, D) and of the key mask (blocks, Bk) to Kc (blocks, Hc, r, D), Vc and
the score bias (1 or blocks, 1 or H, r): `functional.measure`."""


class BlockState(NamedTuple):
    """What the block form remembers: measurements of the blocks that left the window, and the tokens since."""

    kc: Tensor  # (B, Hc, E, D)
    vc: Tensor  # (B, Hc, E, Dv)
    bias: Tensor  # (B, H, E)
    k: Tensor  # (B, Hk, n, D), the first one at the start of a block
    v: Tensor  # (B, Hk, n, Dv)
    keep: Tensor | None  # (B, n) bool; None: no token of these is masked


class PrefixState(NamedTuple):
    """What the prefix form remembers: sums over all tokens, in float32 (float64). Hs is Hk, or H for a phi of H."""

    kc: Tensor  # (B, Hs, M, D), sum of phi_sj k_s
    vc: Tensor  # (B, Hs, M, Dv), sum of phi_sj v_s
    mass: Tensor  # (B, Hs, M), sum of phi_sj; signed: (B, 1, 1), the number of tokens


def attend_blocks(
    q: Tensor,  # (B, H, n, D)
    k: Tensor,  # (B, Hk, n, D)
    v: Tensor,  # (B, Hk, n, Dv)
    key_mask: Tensor | None,  # (B, n)
    state: BlockState | None,
    measure: Measure,
    *,
    block_size: int,
    window_blocks: int,
    scale: float,
    decoder: tuple[Tensor | None, ...] | None = None,
) -> tuple[Tensor, BlockState]:  # z (B, H, n, Dv), dtype of q; the state after these tokens
    """Block form: n new tokens over everything up to each of them; with the weights of a decoder its rows in place of
    z."""
    keep = key_mask
    if state is not None:
        keep = _joined_masks(state, key_mask, k)
        k, v = torch.cat([state.k, k], 2), torch.cat([state.v, v], 2)
    count = max(k.shape[2] // block_size - window_blocks, 0)  # blocks that have left the window of the next token
    end = count * block_size
    kc, vc, bias = _measured_blocks(measure, k[:, :, :end], v[:, :, :end], _first(keep, end), block_size, q)
    fresh = kc.shape[2]
    if state is not None:
        kc, vc, bias = (_joined(*pair) for pair in ((state.kc, kc), (state.vc, vc), (state.bias, bias)))
    after = BlockState(kc, vc, bias, k[:, :, end:], v[:, :, end:], None if keep is None else keep[:, end:])
    per_block = fresh // count if count else 1
    arguments = q, kc, vc, k, v, bias, keep, scale, block_size, window_blocks, per_block
    if decoder is None:
        return torch.ops.csat.attend_causal(*arguments)[0], after
    return torch.ops.csat.attend_causal_decode(*arguments, *decoder, torch.is_grad_enabled())[0], after


def _measured_blocks(
    measure: Measure, k: Tensor, v: Tensor, keep: Tensor | None, size: int, q: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Kc (B, Hc, E, D), Vc and the bias (B, H, E) of whole blocks, which meet Phi as a batch of their own."""
    batch, blocks = k.shape[0], k.shape[2] // size

    def apart(x: Tensor) -> Tensor:
        return x.unflatten(2, (blocks, size)).transpose(1, 2).flatten(0, 1)

    kc, vc, bias = measure(apart(k), apart(v), None if keep is None else keep.reshape(batch * blocks, size))
    shape = (batch * blocks, q.shape[1], kc.shape[2])
    start = torch.zeros(shape, dtype=accumulate_dtype(q.dtype), device=q.device)
    bias = start if bias is None else start + bias
    kc, vc = (x.unflatten(0, (batch, blocks)).transpose(1, 2).flatten(2, 3) for x in (kc, vc))
    return kc, vc, bias.unflatten(0, (batch, blocks)).transpose(1, 2).flatten(2, 3)


def attend_prefixes(
    q: Tensor,  # (B, H, n, D)
    k: Tensor,  # (B, Hk, n, D)
    v: Tensor,  # (B, Hk, n, Dv)
    phi: Tensor,  # (1 or B, 1, Hk or H, n, M)
    score_bias: Tensor | None,  # (1 or B, 1 or H, M)
    key_mask: Tensor | None,  # (B, n)
    state: PrefixState | None,
    *,
    signed: bool,
    scale: float,
    decoder: tuple[Tensor | None, ...] | None = None,
) -> tuple[Tensor, PrefixState]:  # z (B, H, n, Dv), dtype of q; the state after these tokens
    """Prefix form: two causal linear attentions, q k -> phi and softmax phi -> v, around the softmax over M; with the
    weights of a decoder its rows in place of z."""
    if state is None:
        batch, heads, m = k.shape[0], max(k.shape[1], phi.shape[1]), phi.shape[3]
        shapes = (batch, heads, m, k.shape[3]), (batch, heads, m, v.shape[3]), (batch, heads, m)
        if signed:
            shapes = *shapes[:2], (batch, 1, 1)
        state = PrefixState(*(torch.zeros(s, dtype=accumulate_dtype(q.dtype), device=q.device) for s in shapes))
    arguments = q, k, v, phi, *state, score_bias, key_mask, scale, signed
    if decoder is None:
        z, _, *sums = torch.ops.csat.attend_prefix(*arguments)
        return z, PrefixState(*sums)
    c, _, _, *sums = torch.ops.csat.attend_prefix_decode(*arguments, *decoder, torch.is_grad_enabled())
    return c, PrefixState(*sums)


# ---- what the block form needs ---------------------------------------------------------------------------------------


def _joined(past: Tensor, new: Tensor) -> Tensor:
    return torch.cat([past, new], 2) if new.shape[2] else past


def _joined_masks(state: BlockState, new: Tensor | None, k: Tensor) -> Tensor | None:
    if state.keep is None and new is None:
        return None
    lengths = (state.keep, state.k.shape[2]), (new, k.shape[2])
    ones = [m if m is not None else torch.ones((k.shape[0], n), dtype=torch.bool, device=k.device) for m, n in lengths]
    return torch.cat(ones, 1)


def _first(mask: Tensor | None, n: int) -> Tensor | None:
    return None if mask is None else mask[:, :n]
