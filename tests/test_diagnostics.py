"""Diagnostics against the properties that define them."""

from __future__ import annotations

import math

import pytest
import torch

from csat_ext import csat_attention, implicit_measurement, reference
from csat_ext import diagnostics as d
from csat_ext.implicit import IMPLICIT
from csat_ext.measurements import measurement
from csat_ext.reference.solvers import Recovery


def randn(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def hadamard(n):
    H = torch.ones(1, 1, dtype=torch.float64)
    while H.shape[0] < n:
        H = torch.cat([torch.cat([H, H], 1), torch.cat([H, -H], 1)])
    return H / math.sqrt(n)


def orthonormal(n):
    return torch.linalg.qr(randn(n, n)).Q


# --- coherence and RIP -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_coherence_of_known_matrices(dtype):
    eps = 100 * torch.finfo(dtype).eps
    assert float(d.mutual_coherence(orthonormal(12).to(dtype))) < eps
    for n in (4, 16, 64):  # two orthonormal bases, Donoho & Huo 2001
        A = torch.cat([torch.eye(n, dtype=dtype), hadamard(n).to(dtype)], 1)
        assert float(d.mutual_coherence(A)) == pytest.approx(1 / math.sqrt(n), abs=eps)
    mercedes = torch.tensor([[0.0, math.sqrt(3) / 2, -math.sqrt(3) / 2], [1.0, -0.5, -0.5]], dtype=dtype)
    assert float(d.mutual_coherence(mercedes)) == pytest.approx(d.welch_bound(2, 3), abs=eps) == pytest.approx(0.5)


def test_coherence_ignores_lengths_and_signs_and_takes_batches():
    A = randn(3, 8, 20)
    mu = d.mutual_coherence(A)
    assert mu.shape == (3,) and mu.dtype == torch.float64
    scaled = A * torch.linspace(-3, 4, 20, dtype=torch.float64)  # no value is 0
    torch.testing.assert_close(d.mutual_coherence(scaled), mu)
    for index in range(3):
        torch.testing.assert_close(d.mutual_coherence(A[index]), mu[index])
    assert bool((mu >= d.welch_bound(8, 20)).all()) and bool((mu <= 1).all())
    assert float(d.mutual_coherence(torch.cat([A[0], -2 * A[0][:, :1]], 1))) == pytest.approx(1.0)


def test_rip_of_orthonormal_is_zero_and_of_scaled_is_the_scale():
    Q = orthonormal(16)
    for k in (1, 4, 16):
        assert float(d.empirical_rip(Q, k, trials=50)) < 1e-12
        assert float(d.empirical_rip(2 * Q, k, trials=50)) == pytest.approx(3.0)
        assert float(d.empirical_rip(Q / 2, k, trials=50)) == pytest.approx(0.75)


def test_rip_of_pairs_is_the_coherence():
    """delta_2 of unit columns is mu; all 66 pairs of 12 columns are drawn almost surely in 3,000 trials."""
    A = randn(6, 12)
    A = A / torch.linalg.vector_norm(A, dim=0)
    assert float(d.empirical_rip(A, 2, trials=3000)) == pytest.approx(float(d.mutual_coherence(A)))


def test_rip_grows_with_trials_and_is_one_for_dependent_columns():
    A = randn(2, 10, 30) / math.sqrt(10)
    few, many = d.empirical_rip(A, 3, trials=10, seed=5), d.empirical_rip(A, 3, trials=600, seed=5)
    assert few.shape == (2,) and bool((many >= few).all()) and bool((many > 0).all())
    torch.testing.assert_close(d.empirical_rip(A, 3, trials=600, seed=5), many, rtol=0, atol=0)
    assert bool((d.empirical_rip(A, 11, trials=5) >= 1).all())  # more columns than rows


def test_rip_lower_bound_is_the_formula():
    assert pytest.approx(0.2817, abs=1e-3) == d.RIP_CONSTANT
    assert d.rip_lower_bound(1000, 10) == math.ceil(10 * math.log(100) / (2 * math.log(math.sqrt(24) + 1)))
    bounds = [d.rip_lower_bound(4096, k) for k in (1, 4, 16, 64)]
    assert bounds == sorted(bounds) and bounds[0] >= 1


def test_welch_bound_of_a_basis_is_zero():
    assert d.welch_bound(8, 8) == d.welch_bound(9, 8) == 0.0


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: d.mutual_coherence([[1.0]]), TypeError, "A must be a Tensor"),
        (lambda: d.mutual_coherence(torch.ones(2, 2, dtype=torch.int64)), TypeError, "A must be float32"),
        (lambda: d.mutual_coherence(torch.ones(3)), ValueError, "A must be non-empty"),
        (lambda: d.mutual_coherence(torch.ones(3, 1)), ValueError, "two columns"),
        (lambda: d.mutual_coherence(torch.zeros(3, 3)), ValueError, "no zero column"),
        (lambda: d.mutual_coherence(torch.full((3, 3), math.nan)), ValueError, "finite"),
        (lambda: d.empirical_rip(torch.ones(3, 3), 0), ValueError, r"k must be in 1\.\.3"),
        (lambda: d.empirical_rip(torch.ones(3, 3), 4), ValueError, r"k must be in 1\.\.3"),
        (lambda: d.empirical_rip(torch.ones(3, 3), 2, trials=0), ValueError, "trials"),
        (lambda: d.empirical_rip(torch.ones(3, 3), 2.0), TypeError, "k must be an int"),
        (lambda: d.rip_lower_bound(10, 6), ValueError, r"k must be in 1\.\.5"),
        (lambda: d.welch_bound(0, 6), ValueError, "rows"),
        (lambda: d.measured_sparsity(torch.ones(2, 3)), ValueError, r"\(B, H, N, P\)"),
        (lambda: d.measured_sparsity(torch.ones(1, 1, 2, 3, dtype=torch.int64)), TypeError, "floating"),
        (lambda: d.measured_sparsity(torch.ones(1, 1, 2, 3), threshold=-1.0), ValueError, "threshold"),
        (lambda: d.phase_transition("gaussian", "lasso"), ValueError, "solver must be one of"),
        (lambda: d.phase_transition("no such ensemble", "omp"), ValueError, "no such ensemble"),
        (lambda: d.phase_transition("gaussian", deltas=(0.0,)), ValueError, "deltas"),
        (lambda: d.phase_transition("gaussian", rhos=()), ValueError, "rhos"),
        (lambda: d.phase_transition("gaussian", trials=0), ValueError, "trials"),
        (lambda: d.phase_transition(lambda m, n, seed: torch.ones(n, m), n=8), ValueError, "ensemble must return"),
        (lambda: d.phase_transition("gaussian", deltas=torch.tensor([0.5, 2.0])), ValueError, "deltas must be"),
        (lambda: d.phase_transition("gaussian", deltas=torch.tensor(0.5)), TypeError, "deltas must be a non-empty seq"),
        (lambda: d.phase_transition("gaussian", rhos=torch.ones(2, 2)), TypeError, "rhos must be a non-empty sequence"),
        (lambda: d.phase_transition("gaussian", rhos=0.5), TypeError, "rhos must be a non-empty sequence"),
        (lambda: d.donoho_tanner(0.5), TypeError, "delta must be a Tensor, got float"),
        (
            lambda: d.donoho_tanner(torch.tensor([0.0, 2.0])),
            ValueError,
            r"delta must lie in \(0, 1\], got \[0.0, 2.0\]",
        ),
        (lambda: d.donoho_tanner(torch.tensor(math.nan)), ValueError, "delta must lie in"),
        (lambda: d.token_attributions(torch.ones(2, 3), torch.ones(4, 5)), ValueError, "agree in M"),
        (lambda: d.token_attributions(torch.ones(3), torch.ones(3, 5)), ValueError, "two axes"),
        (lambda: d.token_attributions(torch.ones(2, 3), [1.0]), TypeError, "phi_v"),
    ],
)
def test_bad_input_is_refused(call, error, message):
    with pytest.raises(error, match=message):
        call()


# --- sparsity --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_sparsity_of_known_heads(dtype):
    a = torch.zeros(2, 4, 3, 16, dtype=dtype)
    a[:, 0, :, 5] = -7.0  # one nonzero
    a[:, 1] = 0.5  # all equal
    a[:, 2, :, :4] = 2.0  # a quarter; head 3 stays empty
    result = d.measured_sparsity(a)
    accumulated = torch.float64 if dtype == torch.float64 else torch.float32
    close = {"atol": 1e-6, "rtol": 0}
    torch.testing.assert_close(result.zeros, torch.tensor([15 / 16, 0, 0.75, 1], dtype=accumulated), **close)
    torch.testing.assert_close(result.hoyer, torch.tensor([1, 0, 2 / 3, 1], dtype=accumulated), **close)
    torch.testing.assert_close(result.effective, torch.tensor([1, 16, 4, 0], dtype=accumulated), atol=1e-5, rtol=0)


def test_sparsity_threshold_counts_small_ones_as_zeros_and_scale_does_not_matter():
    a = randn(1, 1, 50, 32)
    result = d.measured_sparsity(a, threshold=0.5)
    assert float(result.zeros) == pytest.approx(float((a.abs() <= 0.5).double().mean()))
    torch.testing.assert_close(d.measured_sparsity(10 * a, threshold=5.0).hoyer, result.hoyer)
    torch.testing.assert_close(d.measured_sparsity(10 * a).effective, d.measured_sparsity(a).effective)


# --- phase transition ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("solver", ["basis_pursuit", "omp"])
def test_phase_transition_corners(solver):
    """Many measurements of few nonzeros are recovered, few measurements of many are not (Donoho & Tanner 2009)."""
    settings = {"n": 64, "deltas": (0.3, 0.9), "rhos": (0.05, 0.95), "trials": 8}
    result = d.phase_transition("gaussian", solver, **settings)
    assert result.success.shape == (2, 2) and (result.ensemble, result.solver) == ("gaussian", solver)
    assert float(result.success[1, 0]) == 1.0 and float(result.success[0, 1]) == 0.0
    assert bool((result.success.diff(dim=1) <= 0).all()) and bool((result.success.diff(dim=0) >= 0).all())
    torch.testing.assert_close(
        d.phase_transition("gaussian", solver, **settings).success, result.success, rtol=0, atol=0
    )
    torch.testing.assert_close(result.delta, torch.tensor([19, 58], dtype=torch.float64) / 64)


def test_phase_transition_takes_any_matrix_and_solver():
    def identity(m, n, seed):
        return torch.eye(m, n)

    def back_projection(z, A, k):
        assert A.shape == (8, 8) and z.shape == (5, 8) and k == 4
        return z @ A

    result = d.phase_transition(identity, back_projection, n=8, deltas=(1.0,), rhos=(0.5,), trials=5)
    assert float(result.success) == 1.0
    assert (result.ensemble, result.solver) == ("identity", "back_projection")


def test_phase_transition_takes_tensors():
    fractions = {"n": 16, "trials": 2, "seed": 1}
    given = {
        name: torch.tensor(values, dtype=torch.float64) for name, values in (("deltas", [0.5]), ("rhos", [0.1, 0.5]))
    }
    of_tensors = d.phase_transition("gaussian", "omp", **given, **fractions)
    of_lists = d.phase_transition("gaussian", "omp", deltas=[0.5], rhos=[0.1, 0.5], **fractions)
    assert torch.equal(of_tensors.success, of_lists.success) and torch.equal(of_tensors.rho, of_lists.rho)


def test_donoho_tanner_curve():
    delta = torch.linspace(0.02, 1, 60, dtype=torch.float64)
    rho = d.donoho_tanner(delta)
    assert bool((rho.diff() > 0).all())
    # Donoho & Tanner 2009: about 0.3858 at delta = 0.5; at delta = 1 everything is determined.
    assert float(d.donoho_tanner(torch.tensor(0.5))) == pytest.approx(0.3858, abs=2e-3)
    assert float(rho[-1]) == pytest.approx(1.0, abs=1e-3)


def test_plot_is_written(tmp_path):
    success = torch.tensor([[1.0, 0.0], [1.0, 0.5]], dtype=torch.float64)
    axis = torch.tensor([0.3, 0.8], dtype=torch.float64)
    result = d.PhaseTransition(axis, axis, success, 64, 8, 1e-2, 0, "gaussian", "omp")
    for name in ("transition.png", "transition.svg"):
        d.plot_phase_transition(result, tmp_path / name)
        assert (tmp_path / name).stat().st_size > 1000


def test_recovery_is_what_the_named_solvers_unwrap():
    z, A = randn(2, 6), randn(6, 8)
    for solve in d.SOLVERS.values():
        assert isinstance(solve(z, A, 2), torch.Tensor) and not isinstance(solve(z, A, 2), Recovery)


# --- attributions ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kv_heads", [1, 2, 4])
@pytest.mark.parametrize("masked", [False, True])
def test_attributions_are_a_distribution_and_times_v_give_z(kv_heads, masked):
    """For a row-stochastic Phi, with and without a mask, for grouped keys."""
    B, H, N, D, m = 2, 4, 20, 6, 5
    q, k, v = randn(B, H, 9, D), randn(B, kv_heads, N, D, seed=1), randn(B, kv_heads, N, 3, seed=2)
    pool = measurement("pool", m, N, seed=0, heads=H, dtype=torch.float64)
    mask = None
    if masked:
        mask = torch.ones(B, N, dtype=torch.bool)
        mask[0, 12:] = False
        mask[1, ::3] = False
        k, v = k.clone(), v.clone()
        for tensor in (k, v):
            tensor.transpose(1, 2)[~mask] = math.nan
    phi, bias = pool.phi, pool.score_bias
    arguments = {"score_bias": bias, "key_mask": mask}
    shares = d.csat_attribution(q, k, phi, **arguments)
    assert shares.shape == (B, H, 9, N) and bool((shares >= 0).all())
    torch.testing.assert_close(shares.sum(-1), torch.ones(B, H, 9, dtype=torch.float64))
    if mask is not None:
        assert torch.count_nonzero(shares.transpose(2, 3).transpose(1, 2)[~mask]) == 0
    values = torch.nan_to_num(v).repeat_interleave(H // kv_heads, dim=1)
    expected = reference.csat_attention(q, k, v, phi, **arguments)
    torch.testing.assert_close(shares @ values, expected)


@pytest.mark.parametrize("ensemble", IMPLICIT)
@pytest.mark.parametrize("made_for_the_mask", [None, False, True])
def test_attributions_of_a_measurement_without_a_matrix(ensemble, made_for_the_mask):
    """Times V they are what `csat_attention` makes of it; with a mask, given beside it or its own."""
    B, H, N, D, m = 2, 4, 20, 6, 5
    q, k, v = randn(B, H, 9, D), randn(B, 2, N, D, seed=1), randn(B, 2, N, 3, seed=2)
    mask = torch.arange(B * N).reshape(B, N) % 3 > 0
    if made_for_the_mask is not None:
        for tensor in (k, v):
            tensor.transpose(1, 2)[~mask] = math.nan
    own = {"key_mask": mask} if made_for_the_mask else {}
    phi_k, phi_v = (implicit_measurement(ensemble, m, N, seed=s, heads=2, anchors=("last",), **own) for s in (0, 1))
    bias = phi_k.score_bias.repeat_interleave(H // phi_k.heads, dim=-2)
    arguments = {"score_bias": bias, "key_mask": mask if made_for_the_mask is False else None}
    for phis in ((phi_k,), (phi_k, phi_v)):
        shares = d.csat_attribution(q, k, *phis, **arguments)
        values = torch.nan_to_num(v).repeat_interleave(2, dim=1)
        torch.testing.assert_close(shares @ values, csat_attention(q, k, v, *phis, **arguments), rtol=1e-5, atol=1e-6)
    if made_for_the_mask:
        with pytest.raises(ValueError, match="phi_k was made for a key mask; accepted beside key_mask"):
            d.csat_attribution(q, k, phi_k, key_mask=mask)


def test_attributions_of_chosen_rows_scale_and_another_phi_v():
    q, k, v = randn(1, 2, 7, 4), randn(1, 2, 10, 4, seed=1), randn(1, 2, 10, 4, seed=2)
    phi_k, phi_v = randn(2, 3, 10, seed=3), randn(3, 10, seed=4)  # signed: attributions are signed and still give Z
    every = d.csat_attribution(q, k, phi_k, phi_v, scale=0.3)
    torch.testing.assert_close(every @ v, reference.csat_attention(q, k, v, phi_k, phi_v, scale=0.3))
    for rows in ([4, 0], torch.tensor([4, 0])):
        torch.testing.assert_close(d.csat_attribution(q, k, phi_k, phi_v, rows=rows, scale=0.3), every[:, :, [4, 0]])
    assert d.csat_attribution(q, k, phi_k, rows=[]).shape == (1, 2, 0, 10)


def test_attributions_of_exact_attention_are_the_attention():
    q, k = randn(1, 1, 4, 8), randn(1, 1, 6, 8, seed=1)
    expected = torch.softmax(q @ k.mT / math.sqrt(8), -1)
    torch.testing.assert_close(d.csat_attribution(q, k, torch.eye(6, dtype=torch.float64)), expected)
    torch.testing.assert_close(d.token_attributions(expected, torch.eye(6, dtype=torch.float64)), expected)


def test_attributions_of_nothing_are_zero():
    q, k = randn(1, 1, 4, 8), randn(1, 1, 6, 8, seed=1)
    phi = torch.full((2, 6), 1 / 6, dtype=torch.float64)
    assert torch.count_nonzero(d.csat_attribution(q, k, phi, key_mask=torch.zeros(1, 6, dtype=torch.bool))) == 0


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"query": [1.0]}, TypeError, "query must be a floating Tensor"),
        ({"query": torch.ones(2, 5, 4)}, ValueError, "query must have four axes"),
        ({"key": torch.ones(1, 3, 6, 4)}, ValueError, "key must be"),
        ({"key": torch.ones(1, 2, 6, 5)}, ValueError, "key must be"),
        ({"phi_k": torch.ones(3, 7)}, ValueError, "phi_k must be .* N = 6"),
        ({"phi_k": torch.ones(3, 3, 6)}, ValueError, "divisor of 2"),
        ({"phi_v": torch.ones(6)}, ValueError, "phi_v must be"),
        ({"phi_v": torch.ones(4, 6)}, ValueError, "agree in M"),
        ({"phi_k": torch.ones(3, 6, dtype=torch.int64)}, TypeError, "phi_k must be a floating"),
        ({"rows": [5]}, ValueError, r"rows must be a list of indices in 0\.\.4"),
        ({"rows": [-1]}, ValueError, "rows"),
        ({"key_mask": torch.ones(1, 5, dtype=torch.bool)}, ValueError, "key_mask must be bool of shape"),
        ({"key_mask": torch.ones(1, 6)}, ValueError, "key_mask must be bool"),
    ],
)
def test_bad_attribution_arguments_are_refused(change, error, message):
    good = {"query": torch.ones(1, 2, 5, 4), "key": torch.ones(1, 2, 6, 4), "phi_k": torch.ones(3, 6)}
    with pytest.raises(error, match=message):
        d.csat_attribution(**{**good, **change})
