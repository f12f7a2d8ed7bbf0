"""`csat_attention` and its decoders: every check of the public contract, then `torch.ops.csat`.

The operator in two halves, so that integrations can work between them (an all-reduce over sequence shards, a gain per
head): `measure` compresses K and V to m measurements, `recover` attends over them and decodes every row.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from csat_ext import ops as _ops  # noqa: F401  (registers fakes, autograd and autocast of torch.ops.csat)
from csat_ext.causal import BlockState, Measure, PrefixState, attend_blocks, attend_prefixes
from csat_ext.implicit import ImplicitMeasurement, implicit_measurement
from csat_ext.reference.attention import has_values, repeat_heads
from csat_ext.reference.causal import FORMS

_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


@dataclass(frozen=True, eq=False)
class SparseDecoder:
    """Weights of the unrolled sparse decoder (`csat_ext.reference.decode`; LISTA, Gregor and LeCun 2010).

    ``a_0 = 0``; ``u_t = a_t + step_t ((S_t - I) a_t + B_t z)``; ``a_{t+1} = sign(u_t) max(|u_t| - theta_t, 0)``;
    output ``c = Psi a_T``. Every tensor may carry a head axis in front (1 or H).

    Args:
        S: (1 or T, P, P). First axis 1: tied over the layers.
        B: (1 or T, P, R).
        theta: (T, P), soft thresholds, not negative.
        psi: (Dv, P), the dictionary; None: the identity, Dv = P, without its product.
        step: (T,), 1 when absent.

    All tensors share one device and are contiguous; each is float32 or has the dtype of the query.
    ``check_values=False`` skips reading theta (on a GPU the check synchronises once; a compiled graph always skips
    it).

    Raises:
        TypeError: not a floating point tensor.
        ValueError: a shape, device or layout that does not fit, a NaN or negative theta.
    """

    S: Tensor
    B: Tensor
    theta: Tensor
    psi: Tensor | None
    step: Tensor | None = None
    check_values: bool = True

    def __post_init__(self) -> None:
        for name, dims in (("S", 3), ("B", 3), ("theta", 2), ("psi", 2), ("step", 1)):
            value = getattr(self, name)
            if name in ("psi", "step") and value is None:
                continue
            _check_parameter(f"decoder.{name}", value, (dims, dims + 1))
        layers, atoms = self.theta.shape[-2:]
        rank = self.B.shape[-1]
        _check_sizes("decoder.theta", self.theta, 2, {-2: ("T", None), -1: ("P", None)}, least=1)
        _check_sizes("decoder.S", self.S, 3, {-3: ("1 or T", (1, layers)), -2: ("P", (atoms,)), -1: ("P", (atoms,))})
        _check_sizes(
            "decoder.B", self.B, 3, {-3: ("1 or T", (1, layers)), -2: ("P", (atoms,)), -1: ("R", (rank,))}, least=1
        )
        if self.psi is not None:
            _check_sizes("decoder.psi", self.psi, 2, {-2: ("Dv", None), -1: ("P", (atoms,))}, least=1)
        if self.step is not None:
            _check_sizes("decoder.step", self.step, 1, {-1: ("T", (layers,))})
        _check_heads(self)
        for name in ("S", "B", "psi", "step"):
            value = getattr(self, name)
            if value is not None and value.device != self.theta.device:
                raise ValueError(
                    f"decoder.{name} is on {value.device}, decoder.theta on {self.theta.device}: one device is needed"
                )
        if self.check_values and has_values(self.theta):
            _check_thresholds(self.theta)

    @property
    def heads(self) -> int:
        """Size of the head axis: 1 when the weights are shared by all heads."""
        return max(t.shape[0] if t.dim() > d else 1 for t, d in self._with_dims())

    def _with_dims(self) -> list[tuple[Tensor, int]]:
        pairs = (self.S, 3), (self.B, 3), (self.theta, 2), (self.psi, 2), (self.step, 1)
        return [(t, d) for t, d in pairs if t is not None]

    def with_head_axis(self) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor]:
        """(S, B, theta, psi, step), each with a head axis of one common size, step filled in: what the ops take."""
        heads = self.heads

        def expanded(t: Tensor, d: int) -> Tensor:
            return (t if t.dim() > d else t.unsqueeze(0)).expand(heads, *t.shape[t.dim() - d :])

        psi = None if self.psi is None else expanded(self.psi, 2)
        step = torch.ones_like(self.theta[..., 0]) if self.step is None else self.step
        return expanded(self.S, 3), expanded(self.B, 3), expanded(self.theta, 2), psi, expanded(step, 1)


@dataclass(frozen=True, eq=False)
class LinearDecoder:
    """The control of the sparse decoder: ``c = z W``.

    Args:
        weight: (R, Dv) or (1 or H, R, Dv), float32 or the dtype of the query, contiguous.
    """

    weight: Tensor

    def __post_init__(self) -> None:
        _check_parameter("decoder.weight", self.weight, (2, 3))
        _check_sizes("decoder.weight", self.weight, 2, {-2: ("R", None), -1: ("Dv", None)}, least=1)


Decoder = SparseDecoder | LinearDecoder
Phi = Tensor | ImplicitMeasurement


def csat_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    phi_k: Phi | None = None,
    phi_v: Phi | None = None,
    *,
    decoder: Decoder | None = None,
    feature_sensing: Tensor | None = None,
    scale: float | None = None,
    score_bias: Tensor | None = None,
    key_mask: Tensor | None = None,
    is_causal: bool = False,
    causal: str | None = None,
    block_size: int | None = None,
    measurements_per_block: int | None = None,
    window_blocks: int = 0,
    signed: bool = False,
) -> Tensor:
    """Compressed sensing attention (Kiruluta, Raju and Burity 2025; formulas in `csat_ext.reference`).

    ``Kc = Phi_K K``, ``Vc = Phi_V V F^T``, ``Z = softmax(scale Q Kc^T + score_bias) Vc``, then the decoder on every
    row of Z. The paper writes Z_i = Phi_V Psi alpha_i with shapes that do not match; here tokens are measured by Phi,
    features by F, and the decoder inverts F Psi.

    Args:
        query: (B, H, Nq, D); float32, bfloat16, float16, or float64 on CPU. Any strides.
        key: (B, Hk, N, D), Hk divides H (grouped-query attention). Same dtype and device as the query.
        value: (B, Hk, N, Dv).
        phi_k: measurement matrix of the keys, (M, N), (1, Hk or H, M, N without the batch axis) or with a batch axis
            (1 or B, 1, Hk or H, M, N); M <= N; float32 or the dtype of the query; contiguous. Or an
            `ImplicitMeasurement`, whose matrix is never in memory; its ``score_bias`` is to be passed like any other.
        phi_v: the same for the values; ``phi_k`` when absent.
        decoder: `SparseDecoder`, `LinearDecoder` or None (the output is Z).
        feature_sensing: F, (R, Dv) or (1, Hk or H, R, Dv), R <= Dv; absent is F = I.
        scale: tau, a finite number; 1 / sqrt(D) when absent.
        score_bias: (M,), (1 or H, M) or (1 or B, 1 or H, M); 0 when absent, -inf switches a measurement off.
        key_mask: (B, N) bool, True = keep. A masked token is never read, and the rows of Phi are renormalised: a row
            without negative entries keeps its sum, any other is multiplied by sqrt(N / kept). Rows left empty get
            bias -inf. An `ImplicitMeasurement` becomes that of the same name for this mask
            (`ImplicitMeasurement.masked`: pools then divide the kept tokens); one made for a mask takes no other.
        is_causal: must be False without ``causal``: a measurement mixes tokens along the sequence, the future too.
        causal: the exact causal form, for as many queries as tokens; None: every query sees every token.

            - ``"block"`` (`csat_ext.reference.causal_block`): query t sees the r measurements of each finished block of
              Bk tokens and, exactly, the tokens up to t of its own block and the ``window_blocks`` before it, in one
              softmax. phi_k, phi_v and score_bias are those of a block: (r, Bk), (1, Hk or H, r, Bk), and (r,),
              (1 or H, r). Without phi_k: means of r equal segments, biased by the log of the tokens in each.
            - ``"prefix"`` (`csat_ext.reference.causal_prefix`): query t attends over measurements of the tokens up to
              t. phi_k holds what each token adds, (1 or B, 1, Hk or H, N, M) or without the leading axes, not negative
              unless ``signed``; any strides; the log of the running mass is added to ``score_bias``.

            The state that runs along the sequence is float32 (float64).
        block_size, measurements_per_block: Bk and r of the block form, needed where phi_k is absent.
        window_blocks: w of the block form.
        signed: for the prefix form: phi_k has entries of both signs and variance 1. Sums are divided by the square root
            of the number of tokens instead of by their mass.

    Returns:
        (B, H, Nq, Dv), or (B, H, Nq, R) without a decoder; dtype of the query. 0 where every token is masked.

    Raises:
        TypeError: an argument of the wrong kind or dtype.
        ValueError: shapes, devices or values that do not fit. The message names the argument, what came and what is
        accepted.
    """
    check_form(causal, is_causal, block_size, measurements_per_block, window_blocks, signed)
    if causal is not None:
        return continue_causal(
            None, query, key, value, phi_k, phi_v, causal=causal, block_size=block_size,
            measurements_per_block=measurements_per_block, window_blocks=window_blocks, signed=signed, decoder=decoder,
            feature_sensing=feature_sensing, scale=scale, score_bias=score_bias, key_mask=key_mask,
        )[0]  # fmt: skip
    query, key, value = autocast_inputs(query, key, value)
    check_attention(query, key, value)
    if phi_k is None:
        raise TypeError("phi_k must be a torch.Tensor or an ImplicitMeasurement, got None")
    for name, phi in (("phi_k", phi_k), ("phi_v", phi_v)):
        _check_compresses(name, phi, key)
    kc, vc, score_bias = measure(key, value, phi_k, phi_v, feature_sensing, score_bias, key_mask, heads=query.shape[1])
    return recover(query, kc, vc, decoder=decoder, scale=scale, score_bias=score_bias)


def measure(
    key: Tensor,
    value: Tensor,
    phi_k: Phi,
    phi_v: Phi | None = None,
    feature_sensing: Tensor | None = None,
    score_bias: Tensor | None = None,
    key_mask: Tensor | None = None,
    *,
    heads: int,
    renormalise: bool = True,
    whole: tuple[Tensor, Tensor] | None = None,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """First half of `csat_attention`: (Kc, Vc, score bias) from K and V. Arguments as there; ``heads`` is H.

    ``renormalise=False``: Phi and the bias were made for this ``key_mask`` (`measurement(..., key_mask=)`); masked
    tokens are skipped and nothing else is done.

    N may be below M: measurements of consecutive pieces of K and V, with those columns of Phi, add up to those of the
    whole. ``whole``: the Phi (1 or B, Hp, M, n) and key mask (B, n) to renormalise for, of which these are a piece.

    Returns:
        Kc (B, Hc, M, D), Vc (B, Hc, M, R) with Hc = Hk or H, and the score bias (1 or B, 1 or H, M), in which rows of
        Phi that ``key_mask`` left empty are -inf, or None.
    """
    _refuse_forward_mode(key, value)
    if key_mask is not None:
        checked_mask(key_mask, key)
    mask = key_mask if renormalise else None
    rows_k = _measurement_rows("phi_k", phi_k, key, heads, mask, whole)
    rows_v = rows_k if phi_v is None else _measurement_rows("phi_v", phi_v, value, heads, mask, whole)
    if rows_v.m != rows_k.m:
        raise ValueError(f"phi_v has {rows_v.m} measurements, phi_k has {rows_k.m}: they must agree")
    bias = canonical_bias(score_bias, key, heads, rows_k.m)
    kc, vc = rows_k.project(key, key_mask), rows_v.project(value, key_mask)
    if rows_k.empty is not None:
        bias = _silence(bias, rows_k.empty, heads)
    if feature_sensing is not None:
        vc = _sense_features(vc, feature_sensing, value, heads)
    return *_match_heads(kc, vc, heads), bias


def recover(
    query: Tensor,
    kc: Tensor,
    vc: Tensor,
    *,
    decoder: Decoder | None = None,
    scale: float | None = None,
    score_bias: Tensor | None = None,
) -> Tensor:
    """Second half of `csat_attention`: attend over Kc (B, Hc, M, D) and Vc (B, Hc, M, R), decode every row."""
    _refuse_forward_mode(query, kc, vc)
    tau = _canonical_scale(scale, query)
    _check_decoder(decoder, query, vc)
    if isinstance(decoder, SparseDecoder):
        weights = decoder.with_head_axis()
        need_z = torch.is_grad_enabled()
        return torch.ops.csat.attend_decode(query, kc, vc, score_bias, tau, *weights, need_z)[0]
    z = torch.ops.csat.attend(query, kc, vc, score_bias, tau)[0]
    return z if decoder is None else _product(z, decoder.weight.to(z.dtype))


CausalState = BlockState | PrefixState


def continue_causal(
    state: CausalState | None,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    phi_k: Phi | Measure | None,
    phi_v: Phi | None = None,
    *,
    causal: str,
    block_size: int | None = None,
    measurements_per_block: int | None = None,
    window_blocks: int = 0,
    signed: bool = False,
    decoder: Decoder | None = None,
    feature_sensing: Tensor | None = None,
    scale: float | None = None,
    score_bias: Tensor | None = None,
    key_mask: Tensor | None = None,
    prefix_name: str = "phi_k",
) -> tuple[Tensor, CausalState]:
    """`csat_attention(..., causal=)` of tokens that come after those of ``state`` (None: after nothing), whose masks,
    phi and so on are those of the new tokens. Returns the rows and the state after them. The block form also takes a
    function that measures blocks as ``phi_k``, beside their size. ``prefix_name`` is what the caller calls the phi of
    the prefix form."""
    _refuse_forward_mode(query, key, value)
    query, key, value = autocast_inputs(query, key, value)
    check_attention(query, key, value)
    if query.shape[2] != key.shape[2]:
        raise ValueError(
            f"query has {query.shape[2]} tokens, key {key.shape[2]}: a causal form has one query for each token"
        )
    if key_mask is not None:
        checked_mask(key_mask, key)
    tau, heads = _canonical_scale(scale, query), query.shape[1]
    weights = None
    if isinstance(decoder, SparseDecoder) and feature_sensing is None:
        _check_decoder(decoder, query, value)
        weights = decoder.with_head_axis()
    if causal == "block":
        size, measure_blocks = _block_measure(
            phi_k, phi_v, score_bias, block_size, measurements_per_block, heads, query.device
        )
        assert not isinstance(state, PrefixState)
        with no_autocast(query.device.type):
            z, after = attend_blocks(
                query, key, value, key_mask, state, measure_blocks,
                block_size=size, window_blocks=window_blocks, scale=tau, decoder=weights,
            )  # fmt: skip
        return z if weights else _decode_rows(query, z, decoder, feature_sensing, key), after
    if phi_v is not None:
        raise ValueError("phi_v came, None is accepted with causal='prefix': it measures keys and values alike")
    phi = canonical_prefix(prefix_name, phi_k, key, heads, signed)
    bias = canonical_bias(score_bias, key, heads, phi.shape[3])
    assert not isinstance(state, BlockState)
    with no_autocast(query.device.type):
        z, sums = attend_prefixes(
            query, key, value, phi, bias, key_mask, state, signed=signed, scale=tau, decoder=weights
        )
    return z if weights else _decode_rows(query, z, decoder, feature_sensing, key), sums


def _decode_rows(
    query: Tensor, z: Tensor, decoder: Decoder | None, feature_sensing: Tensor | None, key: Tensor
) -> Tensor:
    """The rows z (B, H, Nq, Dv) of unsensed values, sensed and decoded: F commutes with every sum over tokens."""
    if feature_sensing is not None:
        z = _sense_features(z, feature_sensing, key.new_empty((*key.shape[:3], z.shape[3])), query.shape[1])
    _check_decoder(decoder, query, z)
    if isinstance(decoder, SparseDecoder):
        return torch.ops.csat.decode(z, *decoder.with_head_axis())
    return z if decoder is None else _product(z, decoder.weight.to(z.dtype))


def _block_measure(
    phi_k: Phi | Measure | None,
    phi_v: Phi | None,
    score_bias: Tensor | None,
    block_size: int | None,
    measurements_per_block: int | None,
    heads: int,
    device: torch.device,
) -> tuple[int, Measure]:
    """The block size, and what measures a batch of blocks."""
    if callable(phi_k) and block_size is not None:
        return block_size, phi_k
    sizes = {"measurements_per_block": measurements_per_block, "block_size": block_size}
    if phi_k is not None:
        phi = _checked_block_phi(phi_k, phi_v, score_bias, sizes)
        size = phi.n if isinstance(phi, ImplicitMeasurement) else phi.shape[-1]
        return size, lambda k, v, mask: measure(k, v, phi, phi_v, None, score_bias, mask, heads=heads)
    if phi_v is not None or score_bias is not None:
        raise ValueError("phi_v and score_bias come with a phi_k; without one the pool of a block has its own")
    if block_size is None or measurements_per_block is None or measurements_per_block > block_size:
        raise ValueError(f"causal='block' without phi_k needs 1 <= measurements_per_block <= block_size, got {sizes}")
    pool = implicit_measurement("pool", measurements_per_block, block_size, device=device)

    def measure_blocks(k: Tensor, v: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None]:
        own = pool if mask is None else pool.masked(mask)
        return measure(k, v, own, None, None, own.score_bias, mask, heads=heads, renormalise=False)

    return block_size, measure_blocks


# ---- the pieces of `measure` ----------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class _Rows:
    """A checked Phi and what a key mask makes of its rows.

    phi: (1 or B, Hp, M, N), or implicit and then made for the mask. ratio (B, Hp, M): factor of every row of a matrix;
    empty (B, Hp, M) bool: the rows that hold no kept token. Both None without a mask to renormalise for.
    """

    phi: Phi
    m: int
    ratio: Tensor | None = None
    empty: Tensor | None = None

    def project(self, x: Tensor, key_mask: Tensor | None) -> Tensor:
        if isinstance(self.phi, ImplicitMeasurement):
            return self.phi.project(x)
        measured = torch.ops.csat.project(x, self.phi, key_mask)
        return measured if self.ratio is None else (measured * self.ratio.unsqueeze(-1)).to(measured.dtype)


def _measurement_rows(
    name: str, phi: Phi, x: Tensor, heads: int, key_mask: Tensor | None, whole: tuple[Tensor, Tensor] | None
) -> _Rows:
    if not isinstance(phi, ImplicitMeasurement):
        phi = _canonical_phi(name, phi, x, heads)
        if key_mask is None:
            return _Rows(phi, phi.shape[-2])
        factor, _ = torch.ops.csat.renormalise_rows(*(whole or (phi, key_mask)))
        return _Rows(phi, phi.shape[-2], factor, factor == 0)
    _check_implicit(name, phi, x, heads)
    if key_mask is None:
        return _Rows(phi, phi.m)
    if phi.key_mask is not None:
        raise ValueError(f"{name} was made for a key mask; accepted beside key_mask: one made without")
    phi = phi.masked(key_mask)
    assert phi.score_bias is not None
    return _Rows(phi, phi.m, empty=phi.score_bias == -math.inf)


def _silence(bias: Tensor | None, empty: Tensor, heads: int) -> Tensor:
    """Score bias with -inf at the rows of Phi that hold no token; empty is (B, Hp, M)."""
    if empty.shape[1] not in (1, heads):
        empty = empty.repeat_interleave(heads // empty.shape[1], dim=1)
    dtype = torch.float32 if bias is None else bias.dtype
    start = torch.zeros((), dtype=dtype, device=empty.device) if bias is None else bias
    return torch.where(empty, torch.full((), -math.inf, dtype=dtype, device=empty.device), start)


def _product(z: Tensor, weight: Tensor) -> Tensor:
    """z (B, H, N, R) times weight (R, Dv) or (1 or H, R, Dv). Where the heads of a token lie side by side, all tokens
    go into one product for each head, which reads z in its place: a batch of B * H products would copy and keep it."""
    if z.stride(1) >= z.stride(2):
        return z @ weight
    if weight.dim() == 2 or weight.shape[0] == 1:
        return (z.transpose(1, 2) @ weight.reshape(weight.shape[-2:])).transpose(1, 2)
    return (z.transpose(0, 1).flatten(1, 2) @ weight).unflatten(1, (z.shape[0], z.shape[2])).transpose(0, 1)


def _sense_features(vc: Tensor, feature_sensing: Tensor, value: Tensor, heads: int) -> Tensor:
    """Vc F^T: (B, Hc, M, Dv) -> (B, Hc or H, M, R)."""
    _check_parameter("feature_sensing", feature_sensing, (2, 3))
    _check_dtype_device("feature_sensing", feature_sensing, value, "value")
    rank, width = feature_sensing.shape[-2:]
    if width != value.shape[-1] or not 1 <= rank <= width:
        raise ValueError(
            f"feature_sensing has shape {tuple(feature_sensing.shape)}; accepted: (R, {value.shape[-1]}) with "
            f"1 <= R <= {value.shape[-1]}, with or without a head axis in front"
        )
    f = feature_sensing if feature_sensing.dim() == 3 else feature_sensing.unsqueeze(0)
    if f.shape[0] not in (1, value.shape[1], heads):
        raise ValueError(
            f"feature_sensing has {f.shape[0]} heads; accepted: 1, {value.shape[1]} (keys) or {heads} (queries)"
        )
    if f.shape[0] != 1 and f.shape[0] != vc.shape[1]:
        vc = repeat_heads(vc, heads)
        f = f if f.shape[0] == heads else f.repeat_interleave(heads // f.shape[0], dim=0)
    return vc @ f.to(vc.dtype).mT


def _match_heads(kc: Tensor, vc: Tensor, heads: int) -> tuple[Tensor, Tensor]:
    """One head count for both: the ops read K and V measurements through one grouped head index."""
    if kc.shape[1] == vc.shape[1]:
        return kc, vc
    return repeat_heads(kc, heads), repeat_heads(vc, heads)


# ---- checks ---------------------------------------------------------------------------------------------------------


def _check_tensor(name: str, value: object) -> None:
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} must be a torch.Tensor, got {type(value).__name__}")
    if value.is_nested or value.layout != torch.strided:
        layout = "nested" if value.is_nested else value.layout
        raise TypeError(f"{name} must be a dense tensor, got a {layout} one")


def _check_parameter(name: str, value: object, dims: tuple[int, ...]) -> None:
    _check_tensor(name, value)
    assert isinstance(value, Tensor)
    if value.dtype not in _DTYPES:
        raise TypeError(f"{name} has dtype {value.dtype}; accepted: float32 or the dtype of the query")
    if value.dim() not in dims:
        raise ValueError(f"{name} has shape {tuple(value.shape)}; accepted: {' or '.join(map(str, dims))} dimensions")
    if not value.is_contiguous():
        raise ValueError(f"{name} is not contiguous (strides {value.stride()}); pass {name}.contiguous()")


def _check_dtype_device(name: str, value: Tensor, like: Tensor, like_name: str) -> None:
    if value.dtype not in (torch.float32, like.dtype):
        raise TypeError(f"{name} has dtype {value.dtype}; accepted: float32 or {like.dtype}, the dtype of {like_name}")
    if value.device != like.device:
        raise ValueError(f"{name} is on {value.device}, {like_name} on {like.device}: one device is needed")


def _check_sizes(
    name: str, value: Tensor, dims: int, accepted: dict[int, tuple[str, tuple[int, ...] | None]], least: int = 0
) -> None:
    for axis, (label, sizes) in accepted.items():
        size = value.shape[axis]
        if (sizes is not None and size not in sizes) or size < least:
            expected = f"at least {least}" if sizes is None else " or ".join(map(str, sizes))
            raise ValueError(
                f"{name} has shape {tuple(value.shape)}; axis {axis} ({label}) must be {expected}, got {size}"
            )


def _check_heads(decoder: SparseDecoder) -> None:
    heads = decoder.heads
    for name, dims in (("S", 3), ("B", 3), ("theta", 2), ("psi", 2), ("step", 1)):
        value = getattr(decoder, name)
        if value is not None and value.dim() > dims and value.shape[0] not in (1, heads):
            raise ValueError(
                f"decoder.{name} has {value.shape[0]} heads where another weight has {heads}; accepted: 1 or {heads}"
            )


def _check_thresholds(theta: Tensor) -> None:
    theta = theta.detach()
    if not bool((theta >= 0).all()):
        bad = "NaN" if bool(theta.isnan().any()) else f"{float(theta.min()):g}"
        raise ValueError(f"decoder.theta holds {bad}; accepted: soft thresholds >= 0")


def autocast_inputs(*tensors: Tensor) -> tuple[Tensor, ...]:
    """Under autocast the inputs take its dtype, as those of a matrix product do; parameters stay as they are."""
    device = tensors[0].device.type if isinstance(tensors[0], Tensor) else "cpu"
    if not autocasts(device):
        return tensors
    dtype = torch.get_autocast_dtype(device)
    return tuple(t.to(dtype) if _is_autocast(t) else t for t in tensors)


def no_autocast(device_type: str) -> AbstractContextManager[Any]:
    return torch.autocast(device_type, enabled=False) if device_type in ("cpu", "cuda") else nullcontext()


def autocasts(device_type: str) -> bool:
    """Whether autocast is on, on a device type that csat has a rule for."""
    return device_type in ("cpu", "cuda") and torch.is_autocast_enabled(device_type)


def _is_autocast(value: object) -> bool:
    """float64 is left alone, as everywhere in torch's autocast."""
    return isinstance(value, Tensor) and value.is_floating_point() and value.dtype != torch.float64


def _refuse_forward_mode(*tensors: object) -> None:
    """torch's rules for operators of others know no tangents: they would be zeros, and nobody would be told."""
    if torch.compiler.is_compiling():
        return
    is_dual: Callable[[Tensor], bool]
    transform = torch._C._functorch.peek_interpreter_stack()
    if transform is not None and transform.key() == torch._C._functorch.TransformType.Jvp:
        is_dual = torch._C._functorch.is_functorch_wrapped_tensor
    elif forward_ad._current_level >= 0:
        is_dual = _has_tangent
    else:
        return
    for x in tensors:
        if isinstance(x, Tensor) and is_dual(x):
            raise NotImplementedError(
                "forward-mode derivatives (torch.func.jvp, jacfwd, torch.autograd.forward_ad) came; accepted: reverse "
                "mode, or csat_ext.reference for both"
            )


def _has_tangent(x: Tensor) -> bool:
    return forward_ad.unpack_dual(x).tangent is not None


def check_attention(query: Tensor, key: Tensor, value: Tensor) -> None:
    for name, tensor in (("query", query), ("key", key), ("value", value)):
        _check_tensor(name, tensor)
        if tensor.dtype not in _DTYPES:
            raise TypeError(f"{name} has dtype {tensor.dtype}; accepted: float32, bfloat16, float16 or float64 (CPU)")
        if tensor.dim() != 4:
            raise ValueError(f"{name} has shape {tuple(tensor.shape)}; accepted: (batch, heads, tokens, features)")
        if tensor.dtype != query.dtype:
            raise TypeError(f"{name} has dtype {tensor.dtype}, query has {query.dtype}: they must agree")
        if tensor.device != query.device:
            raise ValueError(f"{name} is on {tensor.device}, query on {query.device}: one device is needed")
        if tensor.shape[0] != query.shape[0]:
            raise ValueError(f"{name} has batch size {tensor.shape[0]}, query has {query.shape[0]}: they must agree")
    if query.dtype == torch.float64 and query.device.type == "cuda":
        raise TypeError("query has dtype torch.float64; accepted on CUDA: float32, bfloat16, float16")
    if key.shape[-1] != query.shape[-1]:
        raise ValueError(f"key has {key.shape[-1]} features, query has {query.shape[-1]}: they must agree")
    if query.shape[-1] < 1 or value.shape[-1] < 1:
        raise ValueError(f"query and value need at least one feature, got {query.shape[-1]} and {value.shape[-1]}")
    if value.shape[1:3] != key.shape[1:3]:
        raise ValueError(
            f"value has (heads, tokens) {tuple(value.shape[1:3])}, key has {tuple(key.shape[1:3])}: they must agree"
        )
    if key.shape[1] < 1 or query.shape[1] % key.shape[1]:
        raise ValueError(
            f"query has {query.shape[1]} heads, key {key.shape[1]}: the first must be a multiple of the second"
        )


def check_form(
    causal: str | None,
    is_causal: bool,
    block_size: int | None,
    measurements_per_block: int | None,
    window_blocks: int,
    signed: bool,
) -> None:
    for flag, switch in (("is_causal", is_causal), ("signed", signed)):
        if not isinstance(switch, bool):
            raise TypeError(f"{flag} must be False or True, got {switch!r}")
    if causal not in (None, *FORMS):
        raise ValueError(f"causal = {causal!r} came; accepted: None, {', '.join(map(repr, FORMS))}")
    if is_causal and causal is None:
        raise ValueError(
            "is_causal=True came, False is accepted: a measurement mixes tokens along the sequence and would leak the "
            "future into the past; the exact causal forms are causal='block' and causal='prefix'"
        )
    sizes = (("block_size", block_size, 1), ("measurements_per_block", measurements_per_block, 1))
    for name, value, least in (*sizes, ("window_blocks", window_blocks, 0)):
        if value is None:
            continue
        if isinstance(value, bool) or not isinstance(value, int):
            raise TypeError(f"{name} must be an int, got {value!r}")
        if value < least:
            raise ValueError(f"{name} must be at least {least}, got {value}")
        if causal != "block" and value:
            raise ValueError(f"{name} = {value} belongs to causal='block', got causal = {causal!r}")
    if signed and causal != "prefix":
        raise ValueError(f"signed=True belongs to causal='prefix', got causal = {causal!r}")


def _checked_block_phi(
    phi_k: object, phi_v: Phi | None, score_bias: Tensor | None, sizes: dict[str, int | None]
) -> Phi:
    """phi_k, checked for what `measure` cannot see, to which every block is a batch element."""
    for name, value, dims in (("phi_k", phi_k, 3), ("phi_v", phi_v, 3), ("score_bias", score_bias, 2)):
        if isinstance(value, Tensor) and not dims - 1 <= value.dim() <= dims:
            raise ValueError(
                f"{name} has shape {tuple(value.shape)}; accepted with causal='block': that of one block, "
                f"{'(r,) or (heads, r)' if name == 'score_bias' else '(r, Bk) or (heads, r, Bk)'}"
            )
    if isinstance(phi_k, ImplicitMeasurement):
        found = phi_k.m, phi_k.n
    else:
        _check_tensor("phi_k", phi_k)
        assert isinstance(phi_k, Tensor)
        found = phi_k.shape[-2], phi_k.shape[-1]
    for (name, given), size in zip(sizes.items(), found, strict=True):
        if given not in (None, size):
            raise ValueError(f"{name} = {given} came with a phi_k of {size}: they must agree")
    if found[0] > found[1] or not found[1]:
        raise ValueError(f"phi_k has m = {found[0]} measurements of a block of {found[1]} tokens; accepted: m <= n")
    return phi_k


def canonical_prefix(name: str, phi: object, key: Tensor, heads: int, signed: bool) -> Tensor:
    """phi of the prefix form, checked, with all axes: (1 or B, Hp, N, M)."""
    _check_tensor(name, phi)
    assert isinstance(phi, Tensor)
    _check_dtype_device(name, phi, key, "the query")
    came, (batch, of_keys, n) = tuple(phi.shape), key.shape[:3]
    phi = phi.reshape((1,) * (4 - phi.dim()) + came)
    accepted = (1, batch), (1, of_keys, heads), (n,)
    fits = phi.dim() == 4 and len(came) > 1 and phi.shape[3] > 0
    if not fits or any(size not in sizes for size, sizes in zip(phi.shape[:3], accepted, strict=True)):
        raise ValueError(
            f"{name} has shape {came}; accepted with causal='prefix': (1 or {batch}, 1, {of_keys} or {heads}, {n}, M), "
            "the leading axes may be missing"
        )
    # Elsewhere than on a CPU looking at the values would wait for the device.
    if not signed and phi.device.type == "cpu" and has_values(phi) and bool((phi.detach() < 0).any()):
        raise ValueError(f"{name} has negative entries; accepted: entries >= 0, or signed=True")
    return phi


def _check_compresses(name: str, phi: Phi | None, key: Tensor) -> None:
    """m <= n, which holds for the whole Phi only: one rank's columns of it may be fewer than its rows."""
    if isinstance(phi, Tensor) and phi.dim() >= 2 and phi.shape[-1] == key.shape[2] < phi.shape[-2]:
        m, n = phi.shape[-2:]
        raise ValueError(f"{name} has m = {m} measurements of n = {n} tokens; accepted: 1 <= m <= n")


def _canonical_phi(name: str, phi: Tensor, x: Tensor, heads: int) -> Tensor:
    """phi with batch and head axes, (1 or B, Hp, M, N), checked against the tokens x (B, Hk, N, D)."""
    _check_parameter(name, phi, (2, 3, 4))
    _check_dtype_device(name, phi, x, "the query")
    m, n = phi.shape[-2:]
    if n != x.shape[2]:
        raise ValueError(f"{name} has {n} columns, key has {x.shape[2]} tokens: they must agree")
    if m < 1:
        raise ValueError(f"{name} has m = {m} measurements; accepted: 1 <= m <= n")
    phi = phi.reshape((1,) * (4 - phi.dim()) + phi.shape)
    if phi.shape[1] not in (1, x.shape[1], heads):
        raise ValueError(f"{name} has {phi.shape[1]} heads; accepted: 1, {x.shape[1]} (keys) or {heads} (queries)")
    if phi.shape[0] not in (1, x.shape[0]):
        raise ValueError(f"{name} has batch size {phi.shape[0]}; accepted: 1 or {x.shape[0]}")
    return phi


def _check_implicit(name: str, phi: ImplicitMeasurement, x: Tensor, heads: int) -> None:
    if phi.n != x.shape[2]:
        raise ValueError(f"{name} measures {phi.n} tokens, key has {x.shape[2]}: they must agree")
    if phi.heads not in (1, x.shape[1], heads):
        raise ValueError(f"{name} has {phi.heads} heads; accepted: 1, {x.shape[1]} (keys) or {heads} (queries)")
    for tensor in (phi.counts, phi.anchor_tokens):
        if tensor is not None and tensor.shape[0] not in (1, x.shape[0]):
            raise ValueError(f"{name} has batch size {tensor.shape[0]}; accepted: 1 or {x.shape[0]}")
        if tensor is not None and tensor.device != x.device:
            raise ValueError(f"{name} is on {tensor.device}, the query on {x.device}: one device is needed")


def canonical_bias(bias: Tensor | None, key: Tensor, heads: int, m: int) -> Tensor | None:
    if bias is None:
        return None
    _check_parameter("score_bias", bias, (1, 2, 3))
    _check_dtype_device("score_bias", bias, key, "the query")
    came = tuple(bias.shape)
    bias = bias.reshape((1,) * (3 - bias.dim()) + bias.shape)
    if bias.shape[2] != m or bias.shape[1] not in (1, heads) or bias.shape[0] not in (1, key.shape[0]):
        raise ValueError(
            f"score_bias has shape {came}; accepted: ({m},), (1 or {heads}, {m}) or "
            f"(1 or {key.shape[0]}, 1 or {heads}, {m})"
        )
    return bias


def checked_mask(mask: Tensor, key: Tensor) -> Tensor:
    """key_mask itself, if it fits the keys (B, heads, N, D): (B, N) bool on their device."""
    _check_tensor("key_mask", mask)
    if mask.dtype != torch.bool:
        raise TypeError(f"key_mask has dtype {mask.dtype}; accepted: torch.bool, True = keep (additive masks are not)")
    if mask.shape != (key.shape[0], key.shape[2]):
        raise ValueError(
            f"key_mask has shape {tuple(mask.shape)}; accepted: (batch, tokens) = {(key.shape[0], key.shape[2])}; "
            "masks per query or per head cannot be applied to measurements"
        )
    if mask.device != key.device:
        raise ValueError(f"key_mask is on {mask.device}, key on {key.device}: one device is needed")
    return mask


def _canonical_scale(scale: float | None, query: Tensor) -> float:
    if scale is None:
        return float(query.shape[-1]) ** -0.5
    if isinstance(scale, bool) or not isinstance(scale, int | float):
        raise TypeError(f"scale must be a float or None, got {type(scale).__name__}")
    if not math.isfinite(scale):
        raise ValueError(f"scale must be finite, got {scale}")
    return float(scale)


def _check_decoder(decoder: Decoder | None, query: Tensor, vc: Tensor) -> None:
    if decoder is None:
        return
    heads, rank = query.shape[1], vc.shape[-1]
    if isinstance(decoder, LinearDecoder):
        weight = decoder.weight
        _check_dtype_device("decoder.weight", weight, query, "the query")
        if weight.shape[-2] != rank or (weight.dim() == 3 and weight.shape[0] not in (1, heads)):
            raise ValueError(
                f"decoder.weight has shape {tuple(weight.shape)}; accepted: ({rank}, Dv) or (1 or {heads}, {rank}, Dv)"
            )
        return
    if not isinstance(decoder, SparseDecoder):
        raise TypeError(f"decoder must be a SparseDecoder, a LinearDecoder or None, got {type(decoder).__name__}")
    for name in ("S", "B", "theta", "psi", "step"):
        weight = getattr(decoder, name)
        if weight is not None:
            _check_dtype_device(f"decoder.{name}", weight, query, "the query")
    if decoder.B.shape[-1] != rank:
        raise ValueError(
            f"decoder.B takes R = {decoder.B.shape[-1]} features, the measured values have {rank}: they must agree"
        )
    if decoder.heads not in (1, heads):
        raise ValueError(f"decoder has {decoder.heads} heads; accepted: 1 or {heads}")
