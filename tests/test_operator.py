"""`csat_attention` on every backend: accuracy against float64, the operator's identities, odd shapes."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
import torch
from conftest import EMULATED, Backend, assert_accurate, rms
from operator_cases import Case, make_inputs, plain_torch_attention
from torch.nn.functional import scaled_dot_product_attention

from csat_ext import LinearDecoder, SparseDecoder, reference

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
CASES = [
    Case(),
    Case(decoder="sparse"),
    Case(decoder="untied", decoder_heads=4, bias=True),
    Case(decoder="linear", rank=8),
    Case(decoder="sparse", rank=8, atoms=17, mask=True, bias=True),
    Case(kv_heads=2, phi_heads=0, decoder="sparse"),
    Case(kv_heads=1, phi_heads=4, mask=True),
    Case(kv_heads=2, phi_heads=2, phi_batch=2, signed=True, mask=True, separate_phi_v=True),
    Case(batch=1, heads=1, kv_heads=1, phi_heads=1, queries=1, tokens=1, m=1, d=1, dv=1),
    Case(batch=1, heads=2, kv_heads=2, phi_heads=0, queries=257, tokens=130, m=129, d=40, dv=72),
    Case(tokens=33, m=33, d=8, dv=8, queries=5, decoder="sparse", atoms=64, layers=1),
]


def cotangent(exact: torch.Tensor) -> torch.Tensor:
    """Half the output, half noise: gradients that sum over everything (a step size) do not cancel to nothing."""
    noise = torch.randn(exact.shape, generator=torch.Generator().manual_seed(7))
    return exact.detach() / (rms(exact.detach()) or 1.0) + noise


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_output_and_gradients_against_float64(kernels: Backend, case: Case, dtype: torch.dtype) -> None:
    inputs = make_inputs(case)
    if dtype != torch.float32:
        inputs = inputs.with_settled_thresholds()
    inputs = inputs.rounded_to(dtype)
    weight = cotangent(inputs.call(reference.csat_attention)).to(dtype)
    exact, exact_grads = inputs.gradients(reference.csat_attention, weight)
    plain, plain_grads = inputs.as_dtype(dtype).gradients(plain_torch_attention, weight)
    got, grads = inputs.as_dtype(dtype, kernels.device).gradients(kernels.csat_attention, weight)
    assert got.dtype == dtype
    assert_accurate("output", got, exact, plain)
    for name, gradient in grads.items():
        if name == "theta" and dtype != torch.float32:
            continue  # - sum e sign(a) at theta = 0 jumps with the sign of a rounded coefficient
        assert_accurate(f"gradient of {name}", gradient.to(dtype), exact_grads[name], plain_grads[name].to(dtype))


def test_float64_agrees_with_the_reference_to_rounding() -> None:
    from csat_ext import csat_attention

    for case in CASES:
        inputs = make_inputs(case).as_dtype(torch.float64)
        weight = torch.randn(inputs.call(reference.csat_attention).shape, dtype=torch.float64)
        exact, exact_grads = inputs.gradients(reference.csat_attention, weight)
        got, grads = inputs.gradients(csat_attention, weight)
        torch.testing.assert_close(got, exact, rtol=1e-10, atol=1e-12)
        for name in grads:
            torch.testing.assert_close(grads[name], exact_grads[name], rtol=1e-9, atol=1e-11)


def qkv(
    n: int = 24, nq: int = 10, d: int = 8, heads: int = 2, batch: int = 2, seed: int = 0
) -> tuple[torch.Tensor, ...]:
    g = torch.Generator().manual_seed(seed)
    return tuple(torch.randn(batch, heads, rows, d, generator=g) for rows in (nq, n, n))


def segments(n: int, borders: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
    """Averages of the segments between borders, and log of their lengths."""
    edges = [0, *borders, n]
    phi = torch.zeros(len(edges) - 1, n)
    for j, (a, b) in enumerate(pairwise(edges)):
        phi[j, a:b] = 1 / (b - a)
    return phi, (1 / phi.amax(-1)).log()


def close(a: torch.Tensor, b: torch.Tensor, tolerance: float = 2e-5) -> bool:
    return torch.allclose(a.cpu(), b.cpu(), rtol=tolerance, atol=tolerance)


def test_identity_phi_is_exact_attention(backend: Backend) -> None:
    q, k, v = (backend.to(t).requires_grad_() for t in qkv(n=17))
    out = backend.csat_attention(q, k, v, backend.to(torch.eye(17)))
    exact = scaled_dot_product_attention(q, k, v)
    assert close(out, exact)
    weight = torch.randn_like(exact)
    for ours, theirs in zip(
        torch.autograd.grad(out, (q, k, v), weight), torch.autograd.grad(exact, (q, k, v), weight), strict=True
    ):
        assert close(ours, theirs)


def test_constant_keys_in_unequal_segments_are_exact_with_log_mass_only(backend: Backend) -> None:
    q, k, v = qkv(n=24)
    phi, log_mass = segments(24, [3, 5, 14])
    k = (phi > 0).float().T @ k[..., :4, :]
    exact = scaled_dot_product_attention(q, k, v)
    args = [backend.to(t) for t in (q, k, v, phi)]
    assert close(backend.csat_attention(*args, score_bias=backend.to(log_mass)), exact)
    assert not close(backend.csat_attention(*args), exact, 1e-2)


def test_row_stochastic_phi_keeps_constants_and_ignores_a_shift_of_the_keys(backend: Backend) -> None:
    q, k, v = qkv()
    phi = torch.softmax(torch.randn(2, 7, 24), -1)
    ones = backend.csat_attention(*(backend.to(t) for t in (q, k, torch.ones_like(v), phi)))
    assert close(ones, torch.ones_like(q))
    out = backend.csat_attention(*(backend.to(t) for t in (q, k, v, phi)))
    shifted = backend.csat_attention(*(backend.to(t) for t in (q, k + torch.randn(8), v, phi)))
    assert close(out, shifted, 1e-4)
    signed = torch.randn(7, 24) / 24**0.5
    a, b = (backend.csat_attention(*(backend.to(t) for t in (q, kk, v, signed))) for kk in (k, k + 3.0))
    assert not close(a, b, 1e-2)


def test_zero_query_weighs_measurements_by_the_bias_alone(backend: Backend) -> None:
    q, k, v = qkv()
    phi, bias = torch.softmax(torch.randn(7, 24), -1), torch.randn(2, 7)
    out = backend.csat_attention(
        *(backend.to(t) for t in (torch.zeros_like(q), k, v, phi)), score_bias=backend.to(bias)
    )
    expected = (torch.softmax(bias, -1)[:, None] @ (phi @ v)).expand_as(out.cpu())
    assert close(out, expected)


def test_feature_sensing_is_a_linear_map_of_z(backend: Backend) -> None:
    q, k, v = qkv()
    phi, f = torch.softmax(torch.randn(7, 24), -1), torch.randn(5, 8)
    args = [backend.to(t) for t in (q, k, v, phi)]
    z = backend.csat_attention(*args).cpu()
    assert close(backend.csat_attention(*args, feature_sensing=backend.to(f)), z @ f.T, 1e-4)


@pytest.mark.parametrize("layers", [1, 2, 5])
def test_decoder_identities(backend: Backend, layers: int) -> None:
    q, k, v = qkv()
    phi = torch.softmax(torch.randn(7, 24), -1)
    args = [backend.to(t) for t in (q, k, v, phi)]
    z = backend.csat_attention(*args)
    psi = torch.linalg.qr(torch.randn(8, 8))[0].contiguous()

    def decode(theta: torch.Tensor) -> torch.Tensor:
        s, b = torch.eye(8) - psi.T @ psi, psi.T.contiguous()
        decoder = SparseDecoder(*(backend.to(t) for t in (s[None], b[None], theta, psi)))
        return backend.csat_attention(*args, decoder=decoder)

    assert close(decode(torch.zeros(layers, 8)), z)
    assert close(decode(torch.full((layers, 8), math.inf)), torch.zeros_like(z))


def test_zero_threshold_is_linear_and_equals_its_matrix(backend: Backend) -> None:
    inputs = make_inputs(Case(decoder="untied", layers=2))
    inputs.leaves["theta"] = torch.zeros_like(inputs.leaves["theta"])
    inputs = inputs.as_dtype(torch.float32, backend.device)
    out = inputs.call(backend.csat_attention)
    s, b, psi, g = (inputs.leaves[n].detach() for n in ("S", "B", "psi", "step"))
    first = g[0] * b[0]
    second = first + g[1] * ((s[1] - torch.eye(33, device=s.device)) @ first + b[1])
    linear = LinearDecoder((psi @ second).T.contiguous())
    leaves = {n: t.detach() for n, t in inputs.leaves.items()}
    expected = backend.csat_attention(leaves["query"], leaves["key"], leaves["value"], leaves["phi_k"], decoder=linear)
    assert close(out, expected, 1e-4)


def test_scale_moves_between_query_and_scale(backend: Backend) -> None:
    q, k, v = qkv()
    phi = torch.softmax(torch.randn(7, 24), -1)
    args = [backend.to(t) for t in (k, v, phi)]
    a = backend.csat_attention(backend.to(4 * q), *args, scale=0.25)
    assert close(a, backend.csat_attention(backend.to(q), *args, scale=1.0))
    assert close(
        backend.csat_attention(backend.to(q), *args), backend.csat_attention(backend.to(q), *args, scale=8**-0.5)
    )


def test_permuting_tokens_with_the_columns_of_phi_changes_nothing(backend: Backend) -> None:
    q, k, v = qkv()
    phi, order = torch.softmax(torch.randn(2, 7, 24), -1), torch.randperm(24)
    a = backend.csat_attention(*(backend.to(t) for t in (q, k, v, phi)))
    b = backend.csat_attention(
        *(backend.to(t.contiguous()) for t in (q, k[..., order, :], v[..., order, :], phi[..., order]))
    )
    assert close(a, b)


@pytest.mark.parametrize("signed", [False, True])
def test_a_masked_token_is_a_removed_token(backend: Backend, signed: bool) -> None:
    q, k, v = qkv(batch=1)
    raw = torch.randn(2, 5, 24)
    phi = raw / 24**0.5 if signed else torch.softmax(raw, -1)
    keep = torch.rand(24) < 0.6
    keep[0] = True
    kept = phi[..., keep]
    kept = kept * math.sqrt(24 / int(keep.sum())) if signed else kept / kept.sum(-1, keepdim=True)
    expected = backend.csat_attention(*(backend.to(t.contiguous()) for t in (q, k[:, :, keep], v[:, :, keep], kept)))
    k, v = k.clone(), v.clone()
    k[:, :, ~keep], v[:, :, ~keep] = math.nan, math.inf
    leaves = [backend.to(t).requires_grad_() for t in (q, k, v, phi)]
    out = backend.csat_attention(*leaves, key_mask=backend.to(keep[None]))
    assert close(out, expected)
    for gradient in torch.autograd.grad(out.sum(), leaves):
        assert bool(gradient.isfinite().all())
    assert bool(
        (
            torch.autograd.grad(backend.csat_attention(*leaves, key_mask=backend.to(keep[None])).sum(), leaves[1])[0][
                :, :, ~keep
            ]
            == 0
        ).all()
    )


def test_all_masked_gives_zero_and_an_empty_segment_no_nan(backend: Backend) -> None:
    q, k, v = qkv(batch=2)
    phi, log_mass = segments(24, [6, 12, 18])
    mask = torch.ones(2, 24, dtype=torch.bool)
    mask[0], mask[1, 6:12] = False, False
    leaves = [backend.to(t).requires_grad_() for t in (q, k, v, phi, log_mass)]
    out = backend.csat_attention(*leaves[:4], score_bias=leaves[4], key_mask=backend.to(mask))
    assert bool((out[0] == 0).all())
    three = phi[[0, 2, 3]]
    expected = backend.csat_attention(*(backend.to(t[1:]) for t in (q, k, v)), backend.to(three))
    assert close(out[1:], expected)
    for gradient in torch.autograd.grad(out.sum(), leaves):
        assert bool(gradient.isfinite().all())


def test_grouped_queries_equal_repeated_heads(backend: Backend) -> None:
    q, k, v = (backend.to(t) for t in qkv(heads=6))
    phi = backend.to(torch.softmax(torch.randn(6, 7, 24), -1))
    few_k, few_v = k[:, ::3], v[:, ::3]
    grouped = backend.csat_attention(q, few_k, few_v, phi)
    repeated = backend.csat_attention(q, few_k.repeat_interleave(3, 1), few_v.repeat_interleave(3, 1), phi)
    assert close(grouped, repeated)


def test_strided_views_are_taken(backend: Backend) -> None:
    packed = backend.to(torch.randn(2, 24, 3, 4, 8)).requires_grad_()
    q, k, v = packed.permute(2, 0, 3, 1, 4)
    phi = backend.to(torch.softmax(torch.randn(4, 7, 24), -1))
    out = backend.csat_attention(q, k, v, phi)
    again = backend.csat_attention(q.contiguous(), k.contiguous(), v.contiguous(), phi)
    assert torch.equal(out, again)
    weight = torch.randn_like(out)
    assert close(torch.autograd.grad(out, packed, weight)[0], torch.autograd.grad(again, packed, weight)[0])


@pytest.mark.parametrize("batch,queries", [(0, 5), (2, 0)])
def test_empty_batch_and_no_queries(backend: Backend, batch: int, queries: int) -> None:
    inputs = make_inputs(Case(batch=batch, queries=queries, decoder="sparse")).as_dtype(torch.float32, backend.device)
    out = inputs.call(backend.csat_attention)
    assert out.shape == (batch, 4, queries, 24)
    grads = torch.autograd.grad(out.sum(), list(inputs.leaves.values()))
    assert all(bool((g == 0).all()) for g in grads)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_scores_of_ten_thousand_stay_finite(backend: Backend, dtype: torch.dtype) -> None:
    q, k, v = (backend.to(t, dtype) for t in qkv(d=16))
    q, k = 100 * q, 100 * k
    leaves = [t.detach().requires_grad_() for t in (q, k, v)]
    phi = backend.to(torch.softmax(3 * torch.randn(2, 7, 24), -1))
    out = backend.csat_attention(*leaves, phi, scale=1.0)
    assert bool(out.isfinite().all()) and float(out.abs().max()) < 10
    assert all(bool(g.isfinite().all()) for g in torch.autograd.grad(out.sum(), leaves))


def test_gradcheck_of_every_argument() -> None:
    from csat_ext import csat_attention

    sizes = {"heads": 2, "kv_heads": 1, "queries": 3, "tokens": 6, "m": 3, "d": 3, "dv": 4, "rank": 3, "atoms": 5}
    case = Case(**sizes, phi_heads=2, decoder="untied", layers=2, bias=True, mask=True, separate_phi_v=True)
    inputs = make_inputs(case, seed=3)
    names = list(inputs.leaves)

    def function(*leaves: torch.Tensor) -> torch.Tensor:
        return type(inputs)(case, dict(zip(names, leaves, strict=True)), inputs.key_mask).call(csat_attention)

    leaves = [t.requires_grad_() for t in inputs.leaves.values()]
    assert torch.autograd.gradcheck(function, leaves, eps=1e-6, atol=1e-7, rtol=1e-4)


def test_tied_gradients_are_the_sum_of_untied(backend: Backend) -> None:
    tied = make_inputs(Case(decoder="sparse")).as_dtype(torch.float32, backend.device)
    untied = make_inputs(Case(decoder="sparse"))
    for name in ("S", "B"):
        untied.leaves[name] = untied.leaves[name].repeat(3, 1, 1)
    untied = untied.as_dtype(torch.float32, backend.device)
    weight = torch.randn(2, 4, 63, 24)
    out, grads = tied.gradients(backend.csat_attention, weight)
    same, free = untied.gradients(backend.csat_attention, weight)
    assert close(out, same)
    for name in ("S", "B"):
        torch.testing.assert_close(grads[name], free[name].sum(0, keepdim=True), rtol=1e-4, atol=1e-3)


def test_bitwise_equal_from_run_to_run(kernels: Backend) -> None:
    # The emulator runs alike by itself; there the order of threads is changed (test_emulated.py).
    queries = 40 if kernels.name in EMULATED else 300
    inputs = make_inputs(Case(queries=queries, decoder="sparse", bias=True)).as_dtype(torch.float32, kernels.device)
    weight = torch.randn(2, 4, queries, 24)
    runs = [inputs.gradients(kernels.csat_attention, weight) for _ in range(2)]
    assert torch.equal(runs[0][0], runs[1][0])
    assert all(torch.equal(runs[0][1][n], runs[1][1][n]) for n in inputs.leaves)


@pytest.mark.parametrize(("phi_heads", "sensing_heads"), [(4, 2), (2, 4), (2, 2)])
def test_query_heads_have_what_belongs_to_their_key_head(kernels: Backend, phi_heads: int, sensing_heads: int) -> None:
    """Phi and F of different numbers of heads, and a row that the mask leaves empty in the first head alone."""
    q, k, v = torch.randn(2, 4, 5, 8), torch.randn(2, 2, 12, 8), torch.randn(2, 2, 12, 8)
    phi, f, mask = torch.rand(phi_heads, 3, 12), torch.randn(sensing_heads, 5, 8), torch.ones(2, 12, dtype=torch.bool)
    phi[0, 1, 4:], mask[:, :4] = 0, False
    exact = reference.csat_attention(*(x.double() for x in (q, k, v, phi)), feature_sensing=f.double(), key_mask=mask)
    tensors = (kernels.to(x) for x in (q, k, v, phi))
    got = kernels.csat_attention(*tensors, feature_sensing=kernels.to(f), key_mask=kernels.to(mask))
    assert close(got, exact.float())
