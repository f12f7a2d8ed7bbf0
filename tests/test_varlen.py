"""`csat_attention_varlen` is the loop over its examples, whatever their lengths."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from conftest import Backend
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from csat_ext import LinearDecoder, csat_attention, csat_attention_varlen, measurement, measurement_varlen

H, HK, D, DV, M = 4, 2, 8, 6, 5
LENGTHS = [23, 0, 1, 23, 5, 24]  # two of one length, one without tokens, two of no more than M
CU = torch.tensor([0, *LENGTHS]).cumsum(0).to(torch.int32)
TOTAL = sum(LENGTHS)


def packed(dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Tensor]:
    g = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(TOTAL, *s, generator=g, dtype=torch.float64) for s in ((H, D), (HK, D), (HK, DV)))
    return q.to(dtype), k.to(dtype), v.to(dtype)


def examples(*tensors: Tensor) -> list[list[Tensor]]:
    """Those with tokens, (1, heads, n, features) of each tensor."""
    bounds = CU.tolist()
    return [[t[a:b].transpose(0, 1)[None] for t in tensors] for a, b in itertools.pairwise(bounds) if b > a]


def joined(rows: list[Tensor]) -> Tensor:
    return torch.cat([r[0].transpose(0, 1) for r in rows])


@pytest.mark.parametrize("ensemble", ["pool", "bucket", "srht"])
def test_plain_examples_are_computed_by_themselves(kernels: Backend, ensemble: str) -> None:
    q, k, v = (kernels.to(x).requires_grad_() for x in packed(torch.float32))
    decoder = LinearDecoder(torch.randn(H, 4, DV).to(kernels.device))
    sensing = torch.randn(4, DV).to(kernels.device)
    options: dict[str, Any] = {"decoder": decoder, "feature_sensing": sensing}
    cu, settings = CU.to(kernels.device), {"seed": 3, "heads": HK, "device": kernels.device}
    phi = measurement_varlen(ensemble, M, cu, **settings)
    assert phi.score_bias is not None
    bias = phi.score_bias.repeat_interleave(H // phi.score_bias.shape[1], 1)  # one for each query head
    got = csat_attention_varlen(q, k, v, cu, cu, phi.phi, score_bias=bias, **options)
    rows = []
    for a, b, c in examples(q, k, v):
        n = a.shape[2]
        if n <= M:
            one, bias = torch.eye(n, device=kernels.device), None
        else:
            made = measurement(ensemble, M, n, **settings)
            one, bias = made.phi, made.score_bias
            bias = bias if bias is None or bias.shape[0] == 1 else bias.repeat_interleave(H // HK, 0)
        rows.append(csat_attention(a, b, c, one, score_bias=bias, **options))
    torch.testing.assert_close(got, joined(rows))
    grads = [torch.autograd.grad(x.sin().sum(), (q, k, v)) for x in (got, joined(rows))]
    for of_packed, of_loop in zip(*grads, strict=True):
        torch.testing.assert_close(of_packed, of_loop)


def test_short_examples_are_exact() -> None:
    q, k, v = packed()
    phi = measurement_varlen("pool", 64, CU, dtype=torch.float64)
    got = csat_attention_varlen(q, k, v, CU, CU, phi.phi, score_bias=phi.score_bias)
    expected = [scaled_dot_product_attention(*one, enable_gqa=True) for one in examples(q, k, v)]
    torch.testing.assert_close(got, joined(expected))


@pytest.mark.parametrize("form", ["block", "block pool", "prefix"])
def test_causal_examples_are_computed_by_themselves(form: str) -> None:
    q, k, v = packed()
    phi, per_example = None, [None] * len(LENGTHS)
    options: dict[str, Any] = {"causal": "block", "block_size": 8, "measurements_per_block": 3}
    if form == "block":
        phi, options = torch.rand(HK, 3, 8, dtype=torch.float64), {"causal": "block", "window_blocks": 1}
        per_example = [phi] * len(LENGTHS)
    if form == "prefix":
        phi, options = torch.rand(HK, TOTAL, M, dtype=torch.float64).softmax(-1), {"causal": "prefix"}
        per_example = [p[0] for (p,) in examples(phi.transpose(0, 1))]
    got = csat_attention_varlen(q, k, v, CU, CU, phi, **options)
    each = zip(examples(q, k, v), per_example, strict=False)
    torch.testing.assert_close(got, joined([csat_attention(*one, p, **options) for one, p in each]))


@pytest.mark.parametrize("causal", [None, "block"])
def test_autocast_is_that_of_csat_attention(causal: str | None) -> None:
    """Dtypes may differ, as they do after a projection under autocast beside one of another dtype."""
    n = 23
    q, k, v = (x[:n] for x in packed(torch.float32))
    k, cu = k.bfloat16(), torch.tensor([0, n])
    phi = torch.rand(M, 8 if causal else n)
    with torch.autocast("cpu", torch.bfloat16):
        got = csat_attention_varlen(q, k, v, cu, cu, phi, causal=causal)
        expected = csat_attention(*(x.transpose(0, 1)[None] for x in (q, k, v)), phi, causal=causal)
    assert got.dtype == torch.bfloat16
    torch.testing.assert_close(got, expected[0].transpose(0, 1))


@pytest.mark.parametrize(
    ("cu", "options", "error", "message"),
    [
        (
            CU[:1],
            {},
            ValueError,
            r"cu_seqlens holds \[0\]; accepted: one number more than there are examples, at least",
        ),
        (CU[1:], {}, ValueError, r"accepted: 0, rising to the number of tokens$"),
        (CU, {"key_mask": torch.ones(6, M)}, TypeError, r"measurement_varlen got unknown options \['key_mask'\]; acc"),
        (CU, {"grid": (1, M)}, TypeError, r"measurement_varlen got unknown options \['grid'\]; accepted: \['anchors'"),
    ],
)
def test_wrong_arguments_of_the_measurement_are_refused(
    cu: Tensor, options: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        measurement_varlen("pool", M, cu, **options)


def test_an_example_without_keys_gives_zeros_and_queries_may_differ_in_number() -> None:
    q, k, v = packed()
    of_q = torch.tensor([0, 2, 9, 9, 30, 32, TOTAL])  # the first and the fifth have as many queries, not keys
    phi = measurement_varlen("pool", M, CU, dtype=torch.float64)
    got = csat_attention_varlen(q, k, v, of_q, CU, phi.phi, score_bias=phi.score_bias)
    assert got.shape == (TOTAL, H, DV) and bool((got[2:9] == 0).all()) and bool((got[:2] != 0).all())


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"query": torch.randn(1, TOTAL, H, D)}, ValueError, "query has shape"),
        ({"key": None}, TypeError, "key must be a torch.Tensor"),
        ({"value": torch.randn(TOTAL - 1, HK, DV)}, ValueError, "value has 75 tokens, key has 76"),
        ({"cu_seqlens_q": CU.float()}, TypeError, "cu_seqlens_q has dtype torch.float32"),
        ({"cu_seqlens_k": CU[1:]}, ValueError, "cu_seqlens_k holds"),
        ({"cu_seqlens_k": CU[:-1]}, ValueError, "rising to the number of tokens, 76"),
        ({"cu_seqlens_k": CU.flip(0)}, ValueError, "cu_seqlens_k holds"),
        ({"cu_seqlens_k": CU[:0]}, ValueError, "cu_seqlens_k holds"),
        ({"cu_seqlens_k": CU[:1]}, ValueError, r"cu_seqlens_k holds \[0\]; accepted: one number more than there are"),
        ({"cu_seqlens_k": [0, TOTAL]}, TypeError, "cu_seqlens_k must be a torch.Tensor"),
        ({"cu_seqlens_q": torch.tensor([0, TOTAL])}, ValueError, "cu_seqlens_q holds 1 examples, cu_seqlens_k 6"),
        ({"phi_k": None}, TypeError, "phi_k must be a torch.Tensor"),
        ({"phi_k": torch.rand(M, TOTAL - 1)}, ValueError, "phi_k has 75 tokens on axis -1"),
        ({"phi_k": torch.rand(1, 1, M, TOTAL)}, ValueError, "phi_k has shape"),
        ({"phi_k": torch.rand(3, M, TOTAL)}, ValueError, "phi_k has 3 heads"),
        ({"score_bias": torch.zeros(5, H, M)}, ValueError, "one for each of 6 examples"),
        (
            {"causal": "block", "phi_k": torch.rand(3, 8), "score_bias": torch.zeros(6, 1, 3)},
            ValueError,
            r"score_bias has shape \(6, 1, 3\); accepted with causal='block': that of one block",
        ),
        ({"causal": "prefix"}, ValueError, "phi_k has 5 tokens on axis -2"),
        ({"causal": "blocks"}, ValueError, "causal = 'blocks' came"),
    ],
)
def test_wrong_arguments_are_refused_by_name(changes: dict[str, Any], error: type[Exception], message: str) -> None:
    q, k, v = packed(torch.float32)
    call: dict[str, Any] = {"query": q, "key": k, "value": v, "cu_seqlens_q": CU, "cu_seqlens_k": CU}
    with pytest.raises(error, match=message):
        csat_attention_varlen(**{**call, "phi_k": torch.rand(M, TOTAL), **changes})
