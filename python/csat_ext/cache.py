"""What is kept of tokens that come one after the other: `CSATCache`, a causal form of `csat_attention` token by token,
for generation, and `MeasurementStream`, the measurements of a growing sequence that others look at as a whole."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, TypeVar

import torch
from torch import Tensor

from csat_ext._composite import accumulate_dtype
from csat_ext.causal import BlockState, PrefixState
from csat_ext.functional import (
    CausalState,
    Decoder,
    Phi,
    autocast_inputs,
    canonical_bias,
    canonical_prefix,
    check_attention,
    check_form,
    checked_mask,
    continue_causal,
    no_autocast,
    recover,
)
from csat_ext.reference.attention import repeat_heads
from csat_ext.reference.causal import FORMS

Continuation = Callable[
    [CausalState | None, int, Tensor, Tensor, Tensor, Tensor | None, Tensor | None], tuple[Tensor, CausalState]
]
"""From the state, the tokens it stands for, query, key, value, phi and key mask: rows and the state after them."""


class _Memory:
    """A state that stands for all tokens so far. It is never written in place, so that clones and beams share it."""

    def __init__(self, causal: str, **settings: Any) -> None:
        self.causal, self._settings = causal, {"kind": type(self).__name__, "causal": causal, **settings}
        self._state: CausalState | None = None
        self._length = 0

    @property
    def length(self) -> int:
        """Tokens so far, masked ones included."""
        return self._length

    @property
    def nbytes(self) -> int:
        """Memory of what is kept."""
        return sum(t.nbytes for t in self._state or () if t is not None)

    def reorder(self, index: Tensor) -> None:
        """Batch element i becomes what index[i] was: the surviving beams of a search. index: (any number,) int64."""
        if not isinstance(index, Tensor) or index.dtype not in (torch.int64, torch.int32) or index.dim() != 1:
            got = f"{tuple(index.shape)} {index.dtype}" if isinstance(index, Tensor) else type(index).__name__
            raise TypeError(f"index must be a tensor of one dimension, int64 or int32, got {got}")
        if self._state is not None:
            self._state = _mapped(lambda t: t.index_select(0, index), self._state)

    def clone(self: _M) -> _M:
        """Another that goes on by itself from here."""
        return copy.copy(self)

    def state_dict(self) -> dict[str, Any]:
        """Plain tensors and numbers, which `load_state_dict` of one of the same arguments continues from."""
        fields = {} if self._state is None else self._state._asdict()
        return {**self._settings, "length": self._length, **fields}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Raises ValueError for the state of another form or other arguments, and for keys that are missing or
        unknown."""
        fields = dict(state_dict)
        settings = {name: fields.pop(name, None) for name in self._settings}
        length = fields.pop("length", None)
        kind = BlockState if self.causal == "block" else PrefixState
        if settings != self._settings:
            raise ValueError(f"state_dict has {_listed(settings)}; accepted: {_listed(self._settings)}")
        if not isinstance(length, int) or (fields and set(fields) != set(kind._fields)):
            raise ValueError(
                f"state_dict has length = {length!r} and {sorted(fields)}; accepted: an int and {sorted(kind._fields)}"
            )
        self._state, self._length = kind(**fields) if fields else None, length


_M = TypeVar("_M", bound=_Memory)


class CSATCache(_Memory):
    """What a causal form remembers of the tokens so far, and the rows of the tokens that come.

    Any split of a sequence into `prefill` and `step` calls gives the rows of the parallel form. For each batch element
    and key head the block form keeps r measurements of every block behind the window and at most (w + 1) Bk tokens, in
    the dtype of the keys; the prefix form keeps M (D + Dv + 1) numbers in float32 (float64), however long the sequence.
    A token costs the work of attending over what is kept.

    Nothing here carries gradients.

    Args:
        causal: ``"block"`` or ``"prefix"``.
        phi_k, phi_v, block_size, measurements_per_block, window_blocks, signed, decoder, feature_sensing, scale,
            score_bias: as in `csat_attention`, except that the phi of the prefix form comes with its tokens.

    Raises:
        TypeError, ValueError: naming the argument, what came and what is accepted; sizes that only tokens show, when
        tokens come.
    """

    def __init__(
        self,
        causal: str,
        phi_k: Phi | None = None,
        phi_v: Phi | None = None,
        *,
        block_size: int | None = None,
        measurements_per_block: int | None = None,
        window_blocks: int = 0,
        signed: bool = False,
        decoder: Decoder | None = None,
        feature_sensing: Tensor | None = None,
        scale: float | None = None,
        score_bias: Tensor | None = None,
    ) -> None:
        check_form(causal, False, block_size, measurements_per_block, window_blocks, signed)
        if causal is None:
            raise ValueError(f"causal = None came; accepted: {', '.join(map(repr, FORMS))}")
        if causal == "prefix" and (phi_k is not None or phi_v is not None):
            raise ValueError("phi_k and phi_v came; with causal='prefix' a phi comes with its tokens")
        call = partial(
            continue_causal, causal=causal, block_size=block_size, measurements_per_block=measurements_per_block,
            window_blocks=window_blocks, signed=signed, decoder=decoder, feature_sensing=feature_sensing, scale=scale,
            score_bias=score_bias, prefix_name="phi",
        )  # fmt: skip

        def continuation(
            state: CausalState | None, length: int, q: Tensor, k: Tensor, v: Tensor, phi: Tensor | None,
            key_mask: Tensor | None,
        ) -> tuple[Tensor, CausalState]:  # fmt: skip
            if causal == "block" and phi is not None:
                raise ValueError("phi came, None is accepted with causal='block': all blocks have that of the cache")
            return call(state, q, k, v, phi if causal == "prefix" else phi_k, phi_v, key_mask=key_mask)

        sizes = {"block_size": block_size, "measurements_per_block": measurements_per_block}
        self._begin(causal, continuation, None, window_blocks=window_blocks, signed=signed, **sizes)

    @classmethod
    def over(cls, causal: str, continuation: Continuation, owner: object, **settings: Any) -> CSATCache:
        """A cache of what the layer ``owner`` computes, which must take any split of a sequence. States are exchanged
        with caches of equal ``settings``."""
        cache = cls.__new__(cls)
        cache._begin(causal, continuation, owner, **settings)
        return cache

    def _begin(self, causal: str, continuation: Continuation, owner: object, **settings: Any) -> None:
        super().__init__(causal, **settings)
        self._continue = continuation
        self.owner = owner

    def prefill(
        self, query: Tensor, key: Tensor, value: Tensor, phi: Tensor | None = None, *, key_mask: Tensor | None = None
    ) -> Tensor:
        """`step` with the first tokens. Raises ValueError where tokens have come before."""
        if self._length:
            raise ValueError(f"prefill takes the first tokens, {self._length} have come; step takes the next ones")
        return self.step(query, key, value, phi, key_mask=key_mask)

    @torch.no_grad()
    def step(
        self, query: Tensor, key: Tensor, value: Tensor, phi: Tensor | None = None, *, key_mask: Tensor | None = None
    ) -> Tensor:
        """The rows (B, H, n, Dv) of the next n tokens, n = 1 in generation.

        Args:
            query: (B, H, n, D); key: (B, Hk, n, D); value: (B, Hk, n, Dv).
            phi: prefix form: (1 or B, 1, Hk or H, n, M), as in `csat_attention`, of these tokens.
            key_mask: (B, n) bool of these tokens, True = keep.

        Raises:
            TypeError, ValueError: as `csat_attention`; tokens that do not continue those before.
        """
        query, key, value = autocast_inputs(query, key, value)
        if self._state is not None:
            _check_continues(self._state, query, key, value)
        rows, state = self._continue(self._state, self._length, query, key, value, phi, key_mask)
        self._state = _mapped(_compact, state)
        self._length += query.shape[2]
        return rows


class MeasurementStream(_Memory):
    """Measurements of a growing sequence, a video say, for queries that look at all of it so far.

        Kc_j = sum_s phi_sj k_s / g_j,    Vc_j = sum_s phi_sj v_s / g_j,    g_j = sum_s phi_sj

    as in the last row of the prefix form (`csat_ext.reference.causal_prefix`), log g_j being the score bias; signed:
    g = sqrt(number of tokens), no bias. A frame costs O(m D) a token and touches no token before it; what is kept is
    M (D + Dv + 1) numbers a batch element and key head in float32 (float64), however long the sequence.
    Gradients flow through what has been appended: append under `torch.no_grad()` where no step trains it.

    Args:
        signed: phi has entries of both signs and variance 1.
    """

    def __init__(self, *, signed: bool = False) -> None:
        super().__init__("prefix", signed=signed)
        self.signed = signed

    @property
    def _sums(self) -> PrefixState | None:
        assert not isinstance(self._state, BlockState)
        return self._state

    def append(self, key: Tensor, value: Tensor, phi: Tensor, *, key_mask: Tensor | None = None) -> None:
        """Takes up n tokens more.

        Args:
            key: (B, Hk, n, D); value: (B, Hk, n, Dv), F applied where features are sensed.
            phi: (n, M), (1 or Hk, n, M) or (1 or B, 1 or Hk, n, M): what each token adds to each measurement, >= 0
                unless signed: softmax(W k), or `measurements.columns_by_position`.
            key_mask: (B, n) bool, True = keep; a masked token is left out of every sum.

        Raises:
            TypeError, ValueError: naming the argument, what came and what is accepted.
        """
        key, value = autocast_inputs(key, value)
        check_attention(key, key, value)
        phi = canonical_prefix("phi", phi, key, key.shape[1], self.signed)
        past = self._sums
        if past is not None:
            _check_continues(past, key, key, value)
            if key.shape[1] != past.kc.shape[1]:
                raise ValueError(f"key has {key.shape[1]} heads, the tokens before had {past.kc.shape[1]}")
            if phi.shape[3] != past.kc.shape[2]:
                raise ValueError(f"phi has {phi.shape[3]} measurements, the tokens before had {past.kc.shape[2]}")
        counted = torch.ones(1, 1, key.shape[2], 1, dtype=torch.bool, device=key.device)
        if key_mask is not None:
            counted = checked_mask(key_mask, key)[:, None, :, None]
            key, value, phi = (torch.where(counted, x, 0) for x in (key, value, phi))
        wide = accumulate_dtype(key.dtype)
        phi, counted = phi.to(wide), counted.to(wide).expand(key.shape[0], -1, -1, -1)
        mass = counted.sum(2) if self.signed else phi.expand(key.shape[0], key.shape[1], -1, -1).sum(2)
        with no_autocast(key.device.type):  # or a long sequence would be summed in 16 bits
            sums = phi.mT @ key.to(wide), phi.mT @ value.to(wide), mass
        self._state = PrefixState(*(sums if past is None else (a + b for a, b in zip(past, sums, strict=True))))
        self._length += key.shape[2]

    def measured(self) -> tuple[Tensor, Tensor, Tensor]:
        """Kc (B, Hk, M, D), Vc (B, Hk, M, Dv) and the score bias (B, Hk, M) of the tokens so far, in float32 (float64).

        Raises:
            ValueError: no token has come.
        """
        if self._sums is None:
            raise ValueError("measurements of no token were asked for; append comes first")
        kc, vc, mass = self._sums
        filled = mass > 0
        normal = torch.where(filled, mass, 1.0)  # (B, Hk, M), signed (B, 1, 1)
        if self.signed:
            normal = normal.sqrt()
        bias = torch.zeros_like(normal) if self.signed else normal.log()
        bias = bias.masked_fill(~filled, -math.inf).expand(kc.shape[:3])
        return kc / normal[..., None], vc / normal[..., None], bias

    def attend(
        self,
        query: Tensor,
        *,
        decoder: Decoder | None = None,
        scale: float | None = None,
        score_bias: Tensor | None = None,
    ) -> Tensor:
        """The rows (B, H, Nq, Dv) of queries over all tokens so far; arguments as in `csat_attention`, which gives the
        same for the whole sequence with the columns phi_s / g and the score bias log g. Zeros where every token so far
        is masked.

        Raises:
            TypeError, ValueError: naming the argument, what came and what is accepted; no token has come.
        """
        kc, vc, bias = self.measured()
        keys, values = kc.to(query.dtype), vc.to(query.dtype)
        check_attention(query, keys, values)
        own = canonical_bias(score_bias, keys, query.shape[1], kc.shape[2])
        bias = repeat_heads(bias, query.shape[1])
        bias = bias if own is None else bias + own
        return recover(query, keys, values, decoder=decoder, scale=scale, score_bias=bias.contiguous())


def _check_continues(state: CausalState, query: Tensor, key: Tensor, value: Tensor) -> None:
    """What a concatenation would promote or broadcast instead of refusing it."""
    for name, new, past in (("key", key, state.kc), ("value", value, state.vc)):
        if not isinstance(new, Tensor) or new.dim() != 4:
            continue  # refused where every call is
        if new.shape[0] != past.shape[0] or new.shape[3] != past.shape[3] or new.device != past.device:
            raise ValueError(
                f"{name} has shape {tuple(new.shape)} on {new.device}; the tokens before had batch size "
                f"{past.shape[0]} and {past.shape[3]} features on {past.device}"
            )
        if isinstance(state, BlockState) and new.shape[1] != state.k.shape[1]:
            raise ValueError(f"{name} has {new.shape[1]} heads, the tokens before had {state.k.shape[1]}")
    if isinstance(state, BlockState) and isinstance(key, Tensor) and key.dtype != state.k.dtype:
        raise TypeError(f"key has dtype {key.dtype}, the tokens before had {state.k.dtype}: they must agree")


def _listed(settings: Mapping[str, Any]) -> str:
    return ", ".join(f"{name} = {value!r}" for name, value in settings.items())


def _mapped(function: Callable[[Tensor], Tensor], state: CausalState) -> CausalState:
    tensors: dict[str, Any] = {name: None if t is None else function(t) for name, t in state._asdict().items()}
    return type(state)(**tensors)


def _compact(kept: Tensor) -> Tensor:
    """kept without the rest of the memory that it is a view of, which nobody knows while a compiler traces."""
    if torch.compiler.is_compiling():
        return kept.clone()
    return kept if kept.untyped_storage().nbytes() == kept.nbytes else kept.clone()
