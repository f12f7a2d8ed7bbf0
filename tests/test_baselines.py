"""Each baseline of the benchmarks has the property that defines it in its paper."""

from __future__ import annotations

import math
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from csat_ext import SparseDecoder, csat_attention

sys.path.append(str(Path(__file__).resolve().parents[1] / "benchmarks"))
from baselines import BASELINES, Budget, parameters
from baselines.composed import ComposedStock, lista
from baselines.linformer import Linformer
from baselines.longformer import SlidingWindow, banded_attention
from baselines.nystromformer import Nystromformer, iterative_pinv, landmarks
from baselines.performer import Performer, log_features, orthogonal_features
from baselines.sdpa import FullAttention
from baselines.window import CausalWindow

B, H, N, D = 2, 3, 37, 8
BUDGET = Budget(tokens=N, heads=H, width=D, m=8)
ALMOST = {"rtol": 1e-9, "atol": 1e-9}


def tokens(dtype: torch.dtype = torch.float64, n: int = N, scale: float = 1.0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(3)
    return [scale * torch.randn(B, H, n, D, generator=generator, dtype=dtype) for _ in range(3)]


def key_mask() -> Tensor:
    keep = torch.rand(B, N, generator=torch.Generator().manual_seed(5)) < 0.7
    keep[:, 4] = True
    return keep


def masked_attention(q: Tensor, k: Tensor, v: Tensor, allowed: Tensor | None = None) -> Tensor:
    """softmax over the allowed keys, written out; 0 where there are none."""
    scores = q @ k.mT / math.sqrt(q.shape[-1])
    if allowed is not None:
        scores = scores.masked_fill(~allowed, -torch.inf)
    return scores.softmax(-1).nan_to_num(0) @ v


def eager(name: str) -> nn.Module:
    """The baseline in float64; nothing is compiled."""
    made = ComposedStock(BUDGET, compiled=False) if name == "stock composition" else BASELINES[name](BUDGET)
    return made.double()


RUNNING = [name for name in BASELINES if name != "sdpa efficient"]  # which torch has on CUDA alone


@pytest.mark.parametrize("name", RUNNING)
@pytest.mark.parametrize("masked", [False, True])
def test_shapes_and_gradients(name: str, masked: bool) -> None:
    q, k, v = (x.requires_grad_() for x in tokens())
    out = eager(name)(q, k, v, key_mask() if masked else None)
    assert out.shape == q.shape and out.dtype == q.dtype
    gradients = torch.autograd.grad(out.square().sum(), [q, k, v])
    assert all(bool(g.isfinite().all()) and float(g.abs().max()) > 0 for g in gradients)


@pytest.mark.parametrize("name", RUNNING)
def test_masked_tokens_change_nothing(name: str) -> None:
    keep = key_mask()
    q, k, v = tokens()
    baseline = eager(name)
    wild = [torch.where(keep[:, None, :, None], x, 1e3) for x in (k, v)]
    torch.testing.assert_close(
        baseline(q.where(keep[:, None, :, None], 0.0), k, v, keep),
        baseline(q.where(keep[:, None, :, None], 0.0), *wild, keep),
        **ALMOST,
    )


@pytest.mark.parametrize("name", RUNNING)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_lower_precision_stays_near_float64(name: str, dtype: torch.dtype) -> None:
    inputs = [x.to(dtype) for x in tokens()]
    exact = eager(name)(*(x.double() for x in inputs))
    got = eager(name).float()(*inputs)
    assert got.dtype == dtype
    error = (got.double() - exact).norm() / exact.norm()
    assert error < (3e-2 if dtype == torch.bfloat16 else 1e-4)


def test_parameters_are_counted() -> None:
    counted = {name: parameters(make(BUDGET)) for name, make in BASELINES.items()}
    decoder = D * D + D * D + 3 * D + D * D + 3
    assert counted == {name: 0 for name in BASELINES} | {
        "linformer": 2 * 8 * N,
        "nystromformer": 35 * H,
        "stock composition": decoder,
    }


@pytest.mark.parametrize("sizes", [{"m": 0}, {"m": N + 1}, {"heads": 0}])
def test_budgets_that_cannot_be(sizes: dict[str, int]) -> None:
    with pytest.raises(ValueError, match=next(iter(sizes))):
        Budget(**{"tokens": N, "heads": H, "width": D, "m": 8} | sizes)


# ---- full attention --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", [None, "flash", "math"])
def test_sdpa_is_softmax_attention(backend: str | None) -> None:
    q, k, v = tokens()
    keep = key_mask()
    torch.testing.assert_close(FullAttention(backend)(q, k, v), masked_attention(q, k, v), **ALMOST)
    expected = masked_attention(q, k, v, keep[:, None, None, :])
    torch.testing.assert_close(FullAttention(backend)(q, k, v, keep), expected, **ALMOST)


def test_a_backend_that_is_not_there_is_not_replaced() -> None:
    with pytest.raises(RuntimeError):
        FullAttention("efficient")(*tokens())
    with pytest.raises(ValueError, match="'flesh'"):
        FullAttention("flesh")


# ---- Linformer -------------------------------------------------------------------------------------------------------


def test_linformer_with_the_identity_is_full_attention() -> None:
    q, k, v = tokens()
    linformer = Linformer(Budget(N, H, D, m=N)).double()
    nn.init.eye_(linformer.key_projection)
    nn.init.eye_(linformer.value_projection)
    torch.testing.assert_close(linformer(q, k, v), masked_attention(q, k, v), **ALMOST)


def test_linformer_attends_to_projected_tokens_with_rank_m() -> None:
    q, k, v = tokens()
    linformer = Linformer(BUDGET).double()
    e, f = linformer.key_projection, linformer.value_projection
    torch.testing.assert_close(linformer(q, k, v), masked_attention(q, e @ k, f @ v), **ALMOST)
    whole = linformer(q, k, torch.eye(N, dtype=q.dtype).expand(B, H, N, N))  # the attention matrix itself
    assert int(torch.linalg.matrix_rank(whole).max()) <= BUDGET.m


def test_linformer_takes_fewer_tokens_and_refuses_more() -> None:
    linformer = Linformer(BUDGET).double()
    assert linformer(*tokens(n=20)).shape == (B, H, 20, D)
    with pytest.raises(ValueError, match=f"{N + 1} tokens"):
        linformer(*tokens(n=N + 1))


# ---- Performer -------------------------------------------------------------------------------------------------------


def test_performer_features_are_orthogonal_in_blocks() -> None:
    omega = orthogonal_features(20, D, seed=1).double()
    assert omega.shape == (20, D)
    for block in omega.split(D):
        products = block @ block.mT
        torch.testing.assert_close(products, products.diagonal().diag(), rtol=0, atol=1e-5)
    assert float(orthogonal_features(4000, D, seed=2).square().mean()) == pytest.approx(1, abs=0.03)


def test_performer_estimates_the_softmax_kernel_without_bias() -> None:
    """The mean over independent draws is exp(q . k / sqrt(D)), within four standard errors at every pair."""
    q, k, _ = (x[0, 0, :5] for x in tokens())
    draws = torch.stack(
        [
            log_features(q, omega).exp() @ log_features(k, omega).exp().mT / len(omega)
            for omega in (orthogonal_features(D, D, seed=s).double() for s in range(4000))
        ]
    )
    error = (draws.mean(0) - (q @ k.mT / math.sqrt(D)).exp()).abs()
    assert bool((error < 4 * draws.std(0) / math.sqrt(len(draws))).all())


def test_performer_converges_to_softmax_attention() -> None:
    q, k, v = tokens(scale=0.35)
    exact = masked_attention(q, k, v)

    def error(m: int) -> float:
        performer = Performer(Budget(m, H, D, m=m))
        return float((performer(q, k, v) - exact).norm() / exact.norm())

    assert error(16384) < 0.01 and error(16384) < error(256) / 4


# ---- Longformer ------------------------------------------------------------------------------------------------------


def band(half: int, n: int = N) -> Tensor:
    place = torch.arange(n)
    return (place[:, None] - place).abs() <= half


@pytest.mark.parametrize("half", [0, 1, 5, 12, 40])
@pytest.mark.parametrize("n", [1, 12, N])
def test_the_band_is_masked_attention(half: int, n: int) -> None:
    q, k, v = tokens(n=n)
    torch.testing.assert_close(banded_attention(q, k, v, half), masked_attention(q, k, v, band(half, n)), **ALMOST)


@pytest.mark.parametrize("form", ["flex", "banded"])
def test_both_forms_of_the_window_are_masked_attention(form: str) -> None:
    q, k, v = tokens(torch.float32)
    keep = key_mask()
    keep[0, :20] = False  # queries that reach no key
    window = SlidingWindow(BUDGET, form)
    torch.testing.assert_close(window(q, k, v), masked_attention(q, k, v, band(4)), rtol=1e-4, atol=1e-5)
    expected = masked_attention(q, k, v, band(4) & keep[:, None, None, :])
    torch.testing.assert_close(window(q, k, v, keep), expected, rtol=1e-4, atol=1e-5)


# ---- causal ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize(("block", "before"), [(5, 1), (5, 0), (64, 0), (1, 2)])
def test_the_causal_window_is_masked_attention(block: int, before: int, masked: bool) -> None:
    q, k, v = tokens()
    mask = key_mask() if masked else None
    at = torch.arange(N)
    allowed = (at <= at[:, None]) & (at >= (at[:, None] // block - before) * block)
    if mask is not None:
        allowed = allowed & mask[:, None, None, :]
        k, v = (x.masked_fill(~mask[:, None, :, None], torch.nan) for x in (k, v))
    expected = masked_attention(q, *(x.nan_to_num(0) for x in (k, v)), allowed)
    torch.testing.assert_close(CausalWindow(block, before)(q, k, v, mask), expected, **ALMOST)


@pytest.mark.parametrize("masked", [False, True])
def test_causal_sdpa_is_masked_attention(masked: bool) -> None:
    q, k, v = tokens()
    mask = key_mask() if masked else None
    allowed = torch.ones(N, N, dtype=torch.bool).tril()
    if mask is not None:
        allowed = allowed & mask[:, None, None, :]
    seen = allowed.any(-1, keepdim=True)  # torch leaves rows of nothing to its backends
    out = FullAttention(causal=True)(q, k, v, mask)
    torch.testing.assert_close(
        torch.where(seen, out, 0), torch.where(seen, masked_attention(q, k, v, allowed), 0), **ALMOST
    )


def test_an_unknown_form_is_refused() -> None:
    with pytest.raises(ValueError, match="'sparse'"):
        SlidingWindow(BUDGET, "sparse")


# ---- Nystromformer ---------------------------------------------------------------------------------------------------


def test_as_many_landmarks_as_tokens_give_exact_attention() -> None:
    """A A^+ A = A."""
    q, k, v = tokens(scale=2.0)
    k = k + q  # well conditioned: every query prefers its own key
    exact = masked_attention(q, k, v)
    nystrom = Nystromformer(Budget(N, H, D, m=N), iterations=40, kernel=None)
    torch.testing.assert_close(nystrom(q, k, v), exact, rtol=1e-6, atol=1e-6)


def test_nystrom_is_the_product_of_three_softmaxes() -> None:
    q, k, v = tokens()
    q_marks, k_marks = landmarks(q, 8), landmarks(k, 8)
    soft = [(a @ b.mT / math.sqrt(D)).softmax(-1) for a, b in ((q, k_marks), (q_marks, k_marks), (q_marks, k))]
    expected = soft[0] @ torch.linalg.pinv(soft[1]) @ soft[2] @ v
    torch.testing.assert_close(
        Nystromformer(BUDGET, iterations=40, kernel=None)(q, k, v), expected, rtol=1e-5, atol=1e-5
    )


def test_the_iteration_finds_the_pseudo_inverse() -> None:
    a = torch.randn(2, 6, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64).softmax(-1)
    torch.testing.assert_close(iterative_pinv(a, 40), torch.linalg.pinv(a), rtol=1e-6, atol=1e-6)


def test_landmarks_are_means_of_the_kept_tokens() -> None:
    x, keep = tokens()[0], key_mask()
    keep[0, :5] = False
    got = landmarks(x, 8, keep)
    for b in range(B):
        for segment in range(8):
            kept = x[b, :, 5 * segment : 5 * segment + 5][:, keep[b, 5 * segment : 5 * segment + 5]]
            expected = kept.mean(1) if kept.shape[1] else torch.zeros(H, D, dtype=x.dtype)
            torch.testing.assert_close(got[b, :, segment], expected, **ALMOST)


def test_the_skip_connection_needs_an_odd_kernel() -> None:
    with pytest.raises(ValueError, match="kernel: 4"):
        Nystromformer(BUDGET, kernel=4)


# ---- the stock composition -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("layers", [0, 3])
def test_the_composition_is_csat(layers: int, masked: bool) -> None:
    q, k, v = tokens()
    composed = ComposedStock(BUDGET, layers=layers, compiled=False).double()
    keep = key_mask() if masked else None
    with torch.no_grad():
        for weight in composed.decoder:
            weight.add_(0.1 * torch.rand_like(weight))
        decoder = SparseDecoder(*(w.contiguous() for w in composed.decoder)) if layers else None
        expected = csat_attention(q, k, v, composed.phi, score_bias=composed.score_bias, key_mask=keep, decoder=decoder)
    torch.testing.assert_close(composed(q, k, v, keep), expected, **ALMOST)


def test_the_composition_has_the_fused_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    """A rival that torch takes for its unfused form would be a weaker one than it is."""
    fused = torch.nn.functional.scaled_dot_product_attention
    chosen: list[int] = []

    def spied(q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Tensor:
        chosen.append(torch._fused_sdp_choice(q, k, v, bias))
        return fused(q, k, v, bias)

    monkeypatch.setattr("baselines.composed.scaled_dot_product_attention", spied)
    q, k, v = (x.requires_grad_() for x in tokens(torch.float32))
    ComposedStock(BUDGET, layers=0)(q, k, v)
    assert chosen == [torch.nn.attention.SDPBackend.FLASH_ATTENTION.value]


@pytest.mark.parametrize("name", ["performer", "nystromformer", "linformer", "stock composition"])
def test_autocast_changes_nothing_for_bfloat16_tokens(name: str) -> None:
    """What is to be in float32 stays in it."""
    made = eager(name).float()
    q, k, v = (x.bfloat16() for x in tokens(torch.float32))
    with torch.autocast("cpu", torch.bfloat16):
        got = made(q, k, v, key_mask())
    assert got.dtype == torch.bfloat16 and torch.equal(got, made(q, k, v, key_mask()))


def test_its_decoder_compiles_in_one_graph() -> None:
    composed = ComposedStock(BUDGET, compiled=False)
    z = tokens(torch.float32)[0]
    traced = torch.compile(lista, fullgraph=True, backend="eager")
    torch.testing.assert_close(traced(z, *composed.decoder), lista(z, *composed.decoder))
