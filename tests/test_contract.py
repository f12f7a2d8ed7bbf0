"""Everything a caller can get wrong raises the named error, names the argument, and leaves the process alive."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import csat_ext
from csat_ext import LinearDecoder, SparseDecoder, csat_attention

B, H, HK, NQ, N, M, D, DV = 2, 4, 2, 5, 7, 3, 4, 6


def good() -> dict[str, Any]:
    """Arguments of a call that works."""
    return {
        "query": torch.randn(B, H, NQ, D),
        "key": torch.randn(B, HK, N, D),
        "value": torch.randn(B, HK, N, DV),
        "phi_k": torch.softmax(torch.randn(HK, M, N), -1),
        "phi_v": torch.softmax(torch.randn(M, N), -1),
        "score_bias": torch.zeros(H, M),
        "key_mask": torch.ones(B, N, dtype=torch.bool),
        "feature_sensing": torch.randn(DV, DV),
        "decoder": sparse(),
        "scale": 0.5,
    }


def sparse(**changes: Any) -> SparseDecoder:
    p, r, t = 5, DV, 2
    weights = {
        "S": torch.randn(1, p, p),
        "B": torch.randn(t, p, r),
        "theta": torch.rand(t, p),
        "psi": torch.randn(DV, p),
        "step": torch.ones(t),
    }
    return SparseDecoder(**{**weights, **changes})


def test_the_good_call_works() -> None:
    assert csat_attention(**good()).shape == (B, H, NQ, DV)


WRONG: list[tuple[str, Any, type[Exception], str]] = [
    ("query", None, TypeError, "query must be a torch.Tensor"),
    ("query", torch.randn(B, H, NQ), ValueError, "query has shape"),
    ("query", torch.zeros(B, H, NQ, D, dtype=torch.int64), TypeError, "query has dtype torch.int64"),
    ("query", torch.randn(B, H, NQ, D, dtype=torch.complex64), TypeError, "query has dtype"),
    ("query", torch.randn(B, 3, NQ, D), ValueError, "multiple"),
    ("key", torch.randn(B, HK, N, D + 1), ValueError, "key has 5 features"),
    ("key", torch.randn(B + 1, HK, N, D), ValueError, "key has batch size 3"),
    ("key", torch.randn(B, HK, N, D, dtype=torch.float64), TypeError, "key has dtype torch.float64"),
    ("key", torch.randn(B, HK, N, D, device="meta"), ValueError, "key is on meta"),
    ("value", torch.randn(B, HK, N + 1, DV), ValueError, "value has"),
    ("value", torch.randn(B, H, N, DV), ValueError, "value has"),
    ("value", torch.randn(B, HK, N, 0), ValueError, "at least one feature"),
    ("phi_k", torch.randn(M, N + 1), ValueError, "phi_k has 8 columns"),
    ("phi_k", torch.randn(N + 1, N), ValueError, "m = 8"),
    ("phi_k", torch.randn(0, N), ValueError, "m = 0"),
    ("phi_k", torch.randn(3, M, N), ValueError, "phi_k has 3 heads"),
    ("phi_k", torch.randn(3, 1, M, N), ValueError, "phi_k has batch size 3"),
    ("phi_k", torch.randn(N), ValueError, "phi_k has shape"),
    ("phi_k", torch.randn(N, M).T, ValueError, "phi_k is not contiguous"),
    ("phi_k", torch.randn(M, N).bfloat16(), TypeError, "phi_k has dtype"),
    ("phi_k", "pool", TypeError, "phi_k must be a torch.Tensor"),
    ("phi_v", torch.randn(M + 1, N), ValueError, "phi_v has 4 measurements"),
    ("phi_v", torch.randn(M, N, device="meta"), ValueError, "phi_v is on meta"),
    ("score_bias", torch.zeros(M + 1), ValueError, r"score_bias has shape \(4,\); accepted"),
    ("score_bias", torch.zeros(3, M), ValueError, "score_bias has shape"),
    ("score_bias", torch.zeros(B, H, NQ, M), ValueError, "score_bias has shape"),
    ("score_bias", torch.zeros(M, dtype=torch.int32), TypeError, "score_bias has dtype"),
    ("key_mask", torch.zeros(B, N), TypeError, "key_mask has dtype torch.float32"),
    ("key_mask", torch.ones(B, 1, 1, N, dtype=torch.bool), ValueError, "key_mask has shape"),
    ("key_mask", torch.ones(B, NQ, N, dtype=torch.bool), ValueError, "key_mask has shape"),
    ("key_mask", [[True] * N] * B, TypeError, "key_mask must be a torch.Tensor"),
    ("feature_sensing", torch.randn(DV, DV + 1), ValueError, "feature_sensing has shape"),
    ("feature_sensing", torch.randn(DV + 1, DV), ValueError, "feature_sensing has shape"),
    ("feature_sensing", torch.randn(3, DV, DV), ValueError, "feature_sensing has 3 heads"),
    ("decoder", "lista", TypeError, "decoder must be"),
    ("decoder", lambda: LinearDecoder(torch.randn(DV + 1, DV)), ValueError, "decoder.weight has shape"),
    ("decoder", lambda: LinearDecoder(torch.randn(3, DV, DV)), ValueError, "decoder.weight has shape"),
    ("decoder", lambda: sparse(B=torch.randn(1, 5, DV - 1)), ValueError, "decoder.B takes R = 5"),
    ("decoder", lambda: sparse(S=torch.randn(3, 1, 5, 5)), ValueError, "decoder has 3 heads"),
    ("decoder", lambda: sparse(S=torch.randn(5, 5)), ValueError, "decoder.S has shape"),
    ("decoder", lambda: sparse(S=torch.randn(3, 5, 5)), ValueError, "decoder.S has shape"),
    ("decoder", lambda: sparse(S=torch.randn(1, 5, 4)), ValueError, "decoder.S has shape"),
    ("decoder", lambda: sparse(S=torch.randn(1, 5, 5).mT), ValueError, "decoder.S is not contiguous"),
    ("decoder", lambda: sparse(S=torch.randn(1, 5, 5, dtype=torch.float64)), TypeError, "decoder.S has dtype"),
    ("decoder", lambda: sparse(S=torch.randn(1, 5, 5, device="meta")), ValueError, "decoder.S is on meta"),
    ("decoder", lambda: sparse(S=None), TypeError, "decoder.S must be a torch.Tensor"),
    ("decoder", lambda: sparse(theta=torch.full((2, 5), math.nan)), ValueError, "decoder.theta holds NaN"),
    ("decoder", lambda: sparse(theta=-torch.ones(2, 5)), ValueError, "decoder.theta holds -1"),
    ("decoder", lambda: sparse(theta=torch.ones(0, 5)), ValueError, "decoder.theta has shape"),
    ("decoder", lambda: sparse(psi=torch.randn(DV, 4)), ValueError, "decoder.psi has shape"),
    ("decoder", lambda: sparse(step=torch.ones(3)), ValueError, "decoder.step has shape"),
    ("decoder", lambda: sparse(step=1.0), TypeError, "decoder.step must be a torch.Tensor"),
    ("scale", "small", TypeError, "scale must be a float"),
    ("scale", True, TypeError, "scale must be a float"),
    ("scale", math.nan, ValueError, "scale must be finite"),
    ("scale", math.inf, ValueError, "scale must be finite"),
    ("is_causal", True, ValueError, "is_causal=True came, False is accepted"),
    ("is_causal", None, TypeError, "is_causal must be False or True, got None"),
    ("phi_k", torch.randn(M, N).to_sparse(), TypeError, "phi_k must be a dense tensor"),
    ("query", lambda: torch.nested.as_nested_tensor([torch.randn(H, 2, D)] * 2), TypeError, "query must be a dense"),
    ("decoder", lambda: LinearDecoder(torch.randn(DV, 0)), ValueError, "decoder.weight has shape"),
]


@pytest.mark.parametrize(
    "name,value,error,message", WRONG, ids=[f"{i}-{name}-{m[:30]}" for i, (name, _, _, m) in enumerate(WRONG)]
)
def test_one_wrong_argument(name: str, value: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        csat_attention(**{**good(), name: value() if isinstance(value, Callable) else value})  # type: ignore[arg-type]


def test_autocast_leaves_float64_alone() -> None:
    x, phi = torch.randn(1, 2, 6, 4, dtype=torch.float64), torch.softmax(torch.randn(3, 6), -1)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = csat_attention(x, x, x, phi)
    assert torch.equal(out, csat_attention(x, x, x, phi))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_float64_is_refused_on_cuda() -> None:
    x = torch.randn(1, 1, 4, 4, dtype=torch.float64, device="cuda")
    with pytest.raises(TypeError, match="float64"):
        csat_attention(x, x, x, torch.eye(4, device="cuda"))


shapes = st.lists(st.integers(0, 4), min_size=0, max_size=5)
dtypes = st.sampled_from([torch.float32, torch.float64, torch.bfloat16, torch.int32, torch.bool])


@st.composite
def tensors(draw: st.DrawFn) -> torch.Tensor:
    tensor = torch.zeros(draw(shapes), dtype=draw(dtypes))
    return tensor.mT if tensor.dim() > 1 and draw(st.booleans()) else tensor


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.sampled_from(sorted(set(good()) - {"decoder", "scale"})), tensors())
def test_any_tensor_in_any_place_works_or_raises_by_name(name: str, tensor: torch.Tensor) -> None:
    """Never a crash, never another exception: a result of the right shape, or an error that says which argument."""
    try:
        out = csat_attention(**{**good(), name: tensor})
    except (TypeError, ValueError) as error:
        assert any(argument in str(error) for argument in (*good(), "phi_k")), str(error)
    else:
        assert out.shape[:2] == (B, H)


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.sampled_from(["S", "B", "theta", "psi", "step"]), tensors())
def test_any_tensor_in_the_decoder_works_or_raises_by_name(name: str, tensor: torch.Tensor) -> None:
    try:
        csat_attention(**{**good(), "decoder": sparse(**{name: tensor})})
    except (TypeError, ValueError) as error:
        assert "decoder" in str(error)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.sampled_from(["query", "key", "value", "phi_k", "score_bias"]), st.sampled_from([math.nan, math.inf, -math.inf])
)
def test_values_that_are_not_finite_do_no_harm_to_the_process(name: str, value: float) -> None:
    call = good()
    call[name].view(-1)[0] = value
    assert csat_attention(**call).shape == (B, H, NQ, DV)


def test_every_public_name_is_listed_and_loads() -> None:
    assert set(csat_ext.__all__) <= set(dir(csat_ext))
    for name in csat_ext.__all__:
        assert getattr(csat_ext, name) is not None
    with pytest.raises(AttributeError, match="module 'csat_ext' has no attribute 'attention'"):
        _ = csat_ext.attention
