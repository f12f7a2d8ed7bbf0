"""`torch.ops.csat.*` against the formulas in plain torch and float64: values, gradients, registrations, bad input."""

from __future__ import annotations

import os
import subprocess
import sys
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from operator_cases import plain_torch_attend_prefix
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

import csat_ext.ops  # noqa: F401  (registers fakes, autograd and autocast)
from csat_ext import _composite, reference

csat = torch.ops.csat
REFUSED = (ValueError, RuntimeError)  # from torch 2.15 on what a stable-ABI op throws arrives as RuntimeError
DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
RMS_LIMIT = {torch.bfloat16: 1e-2, torch.float16: 2e-3, torch.float32: 1e-5, torch.float64: 1e-12}


# ---- the operators as formulas ---------------------------------------------------------------------------------------


def naive_project(x: Tensor, phi: Tensor, key_mask: Tensor | None) -> Tensor:
    heads = max(x.shape[1], phi.shape[1])
    if key_mask is not None:
        x = torch.where(key_mask[:, None, :, None], x, torch.zeros_like(x))
    return phi @ x.repeat_interleave(heads // x.shape[1], 1)


def naive_attend(q: Tensor, kc: Tensor, vc: Tensor, bias: Tensor | None, scale: float) -> Tensor:
    kc, vc = (t.repeat_interleave(q.shape[1] // t.shape[1], 1) for t in (kc, vc))
    scores = scale * (q @ kc.mT)
    if bias is not None:
        scores = scores + bias.unsqueeze(-2)
        empty = bias.isneginf().all(-1)[..., None, None]
        scores = torch.where(empty, torch.zeros_like(scores), scores)
        return torch.where(empty, 0.0, scores.softmax(-1)) @ vc
    return scores.softmax(-1) @ vc


def naive_decode(z: Tensor, S: Tensor, B: Tensor, theta: Tensor, psi: Tensor, step: Tensor) -> Tensor:
    a = z.new_zeros((*z.shape[:-1], theta.shape[-1]))
    for t in range(theta.shape[1]):
        S_t, B_t = (w[:, t if w.shape[1] > 1 else 0] for w in (S, B))
        u = a + step[:, t, None, None] * (a @ S_t.mT + z @ B_t.mT - a)
        a = u.sign() * (u.abs() - theta[:, t, None]).relu()
    return a @ psi.mT


def naive_attend_decode(q, kc, vc, bias, scale, *weights):  # type: ignore[no-untyped-def]
    return naive_decode(naive_attend(q, kc, vc, bias, scale), *weights)


# ---- inputs ----------------------------------------------------------------------------------------------------------


def randn(*shape: int, seed: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def decoder(
    r: int, p: int, dv: int, layers: int = 3, heads: int = 1, s_layers: int = 1, b_layers: int = 1, dtype=torch.float64
) -> list[Tensor]:
    S = torch.eye(p, dtype=torch.float64) + 0.3 * randn(heads, s_layers, p, p, seed=11) / p**0.5
    B = randn(heads, b_layers, p, r, seed=12) / r**0.5
    theta = 0.05 + 0.1 * randn(heads, layers, p, seed=13).abs()
    psi = randn(heads, dv, p, seed=14) / p**0.5
    step = 1 + 0.2 * randn(heads, layers, seed=15)
    return [t.to(dtype) for t in (S, B, theta, psi, step)]


def attend_inputs(b=2, h=4, hk=2, nq=63, m=33, d=17, r=19, dtype=torch.float64) -> list[Tensor]:  # type: ignore[no-untyped-def]
    shapes = ((b, h, nq, d), (b, hk, m, d), (b, hk, m, r))
    return [randn(*shape, seed=i, dtype=dtype) for i, shape in enumerate(shapes)]


def prefix_inputs(
    b: int = 2, h: int = 4, hk: int = 2, hp: int = 2, bp: int = 2, n: int = 203, m: int = 13, d: int = 9, r: int = 7,
    signed: bool = False, dtype: torch.dtype = torch.float64,
) -> list[Any]:  # fmt: skip
    """q, k, v, phi and the state of a prefix before them; phi and the state in the accumulation type."""
    q, k, v = (randn(b, x, n, y, seed=i, dtype=dtype) for i, (x, y) in enumerate(((h, d), (hk, d), (hk, r))))
    phi, before, hs = randn(bp, hp, n, m, seed=3), randn(b, max(hk, hp), 20, m, seed=4), max(hk, hp)
    phi, before = (x.sign() if signed else (2 * x).softmax(-1) for x in (phi, before))
    mass = torch.full((b, 1, 1), 20.0) if signed else before.sum(2)
    state = before.mT @ randn(b, hs, 20, d, seed=5), before.mT @ randn(b, hs, 20, r, seed=6), mass
    return [q, k, v, *(x.to(lse_dtype(dtype)) for x in (phi, *state))]


def strided(t: Tensor) -> Tensor:
    """The same values as a (B, H, N, D) view of (B, N, H, D) storage."""
    return t.transpose(1, 2).contiguous().transpose(1, 2)


# ---- values and gradients --------------------------------------------------------------------------------------------


def rms(t: Tensor) -> float:
    return float(t.detach().double().square().mean().sqrt()) if t.numel() else 0.0


def assert_close(name: str, got: Tensor, exact: Tensor, dtype: torch.dtype) -> None:
    assert got.shape == exact.shape, name
    assert got.isfinite().all(), f"{name} is not finite"
    error, size = rms(got.double() - exact), rms(exact)
    assert error <= RMS_LIMIT[dtype] * size + 1e-14, f"{name}: RMS ratio {error / max(size, 1e-30):.2e}"


def compare(op: Callable[..., Any], naive: Callable[..., Tensor], args: list[Any], dtype: torch.dtype) -> None:
    """Output and every gradient of `op` against `naive` in float64 on the same (rounded) values."""
    leaves = [i for i, a in enumerate(args) if isinstance(a, Tensor) and a.is_floating_point()]
    ours, exact = list(args), list(args)
    for i in leaves:
        ours[i] = args[i].detach().requires_grad_()
        exact[i] = args[i].detach().double().requires_grad_()
    out, expected = op(*ours), naive(*exact)
    assert_close("output", out, expected, dtype)
    assert out.dtype == dtype
    weight = randn(*out.shape, seed=99, dtype=dtype)
    got = torch.autograd.grad(out, [ours[i] for i in leaves], weight)
    wanted = torch.autograd.grad(
        expected, [exact[i] for i in leaves], weight.double(), allow_unused=True, materialize_grads=True
    )
    for i, a, b in zip(leaves, got, wanted, strict=True):
        assert a.dtype == args[i].dtype
        # A parameter's gradient sums over all rows; one in low precision is rounded once more.
        assert_close(f"gradient of argument {i}", a, b, dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("heads", [(2, 1), (2, 2), (2, 4), (1, 3)], ids=str)
@pytest.mark.parametrize("tokens", [1, 63, 257])
def test_project(dtype: torch.dtype, heads: tuple[int, int], tokens: int) -> None:
    x = strided(randn(2, heads[0], tokens, 18, seed=1, dtype=dtype))
    phi = randn(1 if heads[1] < 4 else 2, heads[1], 7, tokens, seed=2, dtype=dtype) / 4
    compare(csat.project, naive_project, [x, phi, None], dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_project_never_reads_masked_tokens(dtype: torch.dtype) -> None:
    mask = randn(3, 200, seed=5) > 0.3
    mask[1] = False
    x, phi = randn(3, 2, 200, 9, seed=1, dtype=dtype), randn(1, 2, 5, 200, seed=2, dtype=dtype) / 8
    clean = torch.where(mask[:, None, :, None], x, torch.zeros_like(x))
    compare(lambda x, phi: csat.project(x, phi, mask), lambda x, phi: naive_project(x, phi, mask), [clean, phi], dtype)

    junk = torch.where(mask[:, None, :, None], x, torch.full_like(x, float("nan")))
    assert torch.equal(csat.project(junk, phi, mask), csat.project(clean, phi, mask))
    dy = randn(3, 2, 5, 9, seed=3, dtype=dtype)
    for a, b in zip(
        csat.project_backward(dy, junk, phi, mask, True, True),
        csat.project_backward(dy, clean, phi, mask, True, True),
        strict=True,
    ):
        assert torch.equal(a, b)
    dx = csat.project_backward(dy, junk, phi, mask, True, False)[0]
    assert (dx[~mask[:, None, :].expand(3, 2, 200)] == 0).all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("bias_shape", [None, (1, 1), (1, 4), (2, 1), (2, 4)], ids=str)
def test_attend(dtype: torch.dtype, bias_shape: tuple[int, int] | None) -> None:
    q, kc, vc = attend_inputs(dtype=dtype)
    bias = None if bias_shape is None else randn(*bias_shape, 33, seed=7, dtype=dtype)
    args = [strided(q), strided(kc), strided(vc), bias, 0.25]
    compare(lambda *a: csat.attend(*a)[0], naive_attend, args, dtype)


@pytest.mark.parametrize("rows", [1, 257])
@pytest.mark.parametrize("m", [2, 130])
def test_attend_odd_sizes(rows: int, m: int) -> None:
    q, kc, vc = attend_inputs(b=1, h=3, hk=1, nq=rows, m=m, d=5, r=3, dtype=torch.float32)
    compare(lambda *a: csat.attend(*a)[0], naive_attend, [q, kc, vc, None, 0.4], torch.float32)


def test_attend_one_measurement() -> None:
    """The softmax over one score is 1: z is the value and the scores have no gradient."""
    q, kc, vc = (t.requires_grad_() for t in attend_inputs(m=1, hk=4, dtype=torch.float32))
    z = csat.attend(q, kc, vc, None, 0.4)[0]
    assert torch.equal(z, vc.expand_as(z))
    dq, dkc, dvc = torch.autograd.grad(z.sum(), (q, kc, vc))
    torch.testing.assert_close(dvc, torch.full_like(dvc, 63.0))
    assert dq.abs().max() < 1e-5 and dkc.abs().max() < 1e-4


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_attend_causal_of_the_last_queries(dtype: torch.dtype) -> None:
    """A few queries have a kernel of their own, whose chunks end inside the measurements and the window."""
    q, kc, vc = attend_inputs(b=2, h=4, hk=2, nq=700, m=300, d=17, r=19, dtype=dtype)
    k, v = randn(2, 1, 700, 17, seed=4, dtype=dtype), randn(2, 1, 700, 19, seed=5, dtype=dtype)
    bias, mask = randn(1, 4, 300, seed=7), randn(2, 700, seed=8) > -1
    junk = v.masked_fill(~mask[:, None, :, None], float("nan"))
    numbers = 0.3, 100, 3, 60  # 4 blocks have left the window, 60 measurements are of earlier tokens
    for some, values in ((mask, junk), (None, v)):
        z, lse = csat.attend_causal(q, kc, vc, k, values, bias.to(lse_dtype(dtype)), some, *numbers)
        for count in (1, 5, 8):
            last = csat.attend_causal(q[:, :, -count:], kc, vc, k, values, bias.to(lse_dtype(dtype)), some, *numbers)
            torch.testing.assert_close(last[0], z[:, :, -count:])
            torch.testing.assert_close(last[1], lse[:, :, -count:])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_attend_causal_decode(dtype: torch.dtype) -> None:
    """attend_causal and decode one after the other, to the bit; gradients too, whether z is kept or computed again."""
    q, kc, vc = attend_inputs(b=2, h=4, hk=2, nq=90, m=23, d=17, r=12, dtype=dtype)
    k, v = randn(2, 1, 100, 17, seed=4, dtype=dtype), randn(2, 1, 100, 12, seed=5, dtype=dtype)
    bias, mask = randn(1, 4, 23, seed=7).to(lse_dtype(dtype)), randn(2, 100, seed=8) > -1
    weights = decoder(12, 21, 14, 3, 4, 3, 1, lse_dtype(dtype))
    numbers = 0.3, 16, 1, 4  # 5 blocks have left the window, 3 measurements are of earlier tokens

    def fused(*leaves: Tensor, need_z: bool) -> tuple[Tensor, Tensor, Tensor]:
        return csat.attend_causal_decode(*leaves[:6], mask, *numbers, *leaves[6:], need_z)

    def apart(*leaves: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        z, lse = csat.attend_causal(*leaves[:6], mask, *numbers)
        return csat.decode(z, *leaves[6:]), z, lse

    leaves = [t.requires_grad_() for t in (q, kc, vc, k, v, bias, *weights)]
    expected = apart(*leaves)
    weight = randn(*expected[0].shape, seed=99, dtype=dtype)
    gradients = torch.autograd.grad(expected[0], leaves, weight)
    for need_z in (True, False):
        out, z, lse = fused(*leaves, need_z=need_z)
        assert torch.equal(out, expected[0]) and torch.equal(lse, expected[2])
        assert torch.equal(z, expected[1]) if need_z else z.shape == (0,)
        assert not z.requires_grad and not lse.requires_grad
        for a, b in zip(torch.autograd.grad(out, leaves, weight), gradients, strict=True):
            assert torch.equal(a, b)


# H, Hk, Hp, Bp, n: chunks of tokens with a tail, one token, two
PREFIXES = [(4, 2, 2, 2, 203), (4, 2, 1, 1, 97), (4, 2, 4, 1, 96), (3, 1, 3, 2, 2), (3, 3, 3, 2, 1), (4, 1, 2, 2, 1)]


def prefix_result(op: Callable[..., Any], result: int, mask: Tensor | None, signed: bool) -> Callable[..., Tensor]:
    """One result of q, k, v, phi, kc, vc, mass, bias; a mass of integers is no leaf of a comparison."""
    return lambda *a: op(*a[:6], a[6].to(a[4].dtype), a[7], mask, 0.3, signed)[result]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("signed", [False, True])
@pytest.mark.parametrize("sizes", PREFIXES, ids=str)
def test_attend_prefix(dtype: torch.dtype, signed: bool, sizes: tuple[int, ...]) -> None:
    h, hk, hp, bp, n = sizes
    q, k, v, phi, kc, vc, mass = prefix_inputs(2, h, hk, hp, bp, n, signed=signed, dtype=dtype)
    bias, keep = randn(1, h, 13, seed=7).to(phi.dtype), randn(2, n, seed=8) > -1
    data = [strided(q), strided(k), strided(v), phi, kc, vc, mass.long() if signed else mass]
    for some_bias, mask in ((bias, keep), (None, None)):
        for result in range(1 if dtype.itemsize == 2 else 4 if signed else 5):
            if result != 1:  # the log-sum-exp has no gradient
                rivals = (
                    prefix_result(op, result, mask, signed) for op in (csat.attend_prefix, plain_torch_attend_prefix)
                )
                compare(*rivals, [*data, some_bias], dtype)
        exact = plain_torch_attend_prefix(*(x.double() for x in (q, k, v, phi, kc, vc, mass)), None, mask, 0.3, signed)
        got = csat.attend_prefix(q, k, v, phi, kc, vc, mass, None, mask, 0.3, signed)
        for name, a, b in zip(("lse", "kc", "vc", "mass"), got[1:], exact[1:], strict=True):
            assert a.dtype == phi.dtype
            assert_close(name, a, b, dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("signed", [False, True])
def test_attend_prefix_decode(dtype: torch.dtype, signed: bool) -> None:
    """attend_prefix and decode one after the other, to the bit; gradients of rows and of the state behind too, whether
    z is kept or computed again."""
    q, k, v, phi, kc, vc, mass = prefix_inputs(2, 4, 2, 4, 1, 97, signed=signed, dtype=dtype)
    bias, keep = randn(1, 4, 13, seed=7).to(phi.dtype), randn(2, 97, seed=8) > -1
    weights = decoder(v.shape[3], 21, 14, 3, 4, 3, 1, lse_dtype(dtype))
    numbers = keep, 0.3, signed

    def fused(*leaves: Tensor, need_z: bool) -> tuple[Tensor, ...]:
        return csat.attend_prefix_decode(*leaves[:6], mass, leaves[6], *numbers, *leaves[7:], need_z)

    def apart(*leaves: Tensor) -> tuple[Tensor, ...]:
        z, *rest = csat.attend_prefix(*leaves[:6], mass, leaves[6], *numbers)
        return csat.decode(z, *leaves[7:]), z, *rest

    leaves = [t.requires_grad_() for t in (q, k, v, phi, kc, vc, bias, *weights)]
    if not signed:
        mass.requires_grad_()
    ends = 0, 3, 4
    expected = apart(*leaves)
    given = [randn(*expected[i].shape, seed=90 + i).to(expected[i].dtype) for i in ends]
    gradients = torch.autograd.grad([expected[i] for i in ends], leaves, given)
    for need_z in (True, False):
        got = fused(*leaves, need_z=need_z)
        assert all(torch.equal(got[i], expected[i]) for i in (0, 2, 3, 4, 5))
        assert torch.equal(got[1], expected[1]) if need_z else got[1].shape == (0,)
        assert [x.requires_grad for x in got] == [True, False, False, True, True, not signed]
        for a, b in zip(torch.autograd.grad([got[i] for i in ends], leaves, given), gradients, strict=True):
            assert torch.equal(a, b)


def test_attend_prefix_continues_with_gradients() -> None:
    """In parts of any length as at once; what comes after a state reaches the tokens before it."""
    *data, kc, vc, mass = (x.requires_grad_() for x in prefix_inputs(n=203))
    bias, keep = randn(2, 1, 13, seed=7).requires_grad_(), randn(2, 203, seed=8) > -1
    leaves = [*data, kc, vc, mass, bias]

    def whole(cuts: tuple[int, ...]) -> list[Tensor]:
        state: tuple[Tensor, ...] = kc, vc, mass
        rows = []
        for start, stop in zip((0, *cuts), (*cuts, 203), strict=True):
            z, _, *state = csat.attend_prefix(
                *(x[:, :, start:stop] for x in data), *state, bias, keep[:, start:stop], 0.3, False
            )
            rows.append(z)
        z = torch.cat(rows, 2)
        return [z, *state, *torch.autograd.grad(z.sin().sum() + sum(x.square().sum() for x in state), leaves)]

    at_once = whole(())
    for cuts in ((1,), (96, 97, 97, 192), (50, 150)):
        torch.testing.assert_close(whole(cuts), at_once)


def test_attend_prefix_never_reads_masked_tokens() -> None:
    q, k, v, *rest = prefix_inputs(dtype=torch.float32)
    keep = randn(2, 203, seed=8) > -0.5
    masked = ~keep[:, None, :, None]
    rest[0] = rest[0].clone()
    outputs = []
    for junk in (0.0, torch.nan):
        data = [x.masked_fill(masked, junk) for x in (k, v, rest[0])]
        leaves = [x.requires_grad_() for x in (q.clone(), *data)]
        results = csat.attend_prefix(*leaves, *rest[1:], None, keep, 0.3, False)
        gradients = torch.autograd.grad(results[0].sum() + results[2].sum() + results[4].sum(), leaves)
        assert all(bool((g.masked_select(masked) == 0).all()) for g in gradients[1:])
        outputs.append([*results, *gradients])
    assert all(torch.equal(a, b) for a, b in zip(*outputs, strict=True))


@pytest.mark.parametrize("signed", [False, True])
def test_attend_prefix_without_anything_to_look_at(signed: bool) -> None:
    """Nothing before, the first tokens masked or without mass: z = 0, lse = -inf. Without some columns: left out."""
    q, k, v, phi, *state = prefix_inputs(n=11, signed=signed)
    state = [torch.zeros_like(x) for x in state]
    keep = torch.arange(11).expand(2, 11) > 2
    bias = torch.zeros(1, 4, 13, dtype=torch.float64)
    bias[0, 1], bias[0, 2, ::2] = -torch.inf, -torch.inf
    if not signed:
        phi = phi.index_fill(3, torch.tensor([0, 5]), 0.0)
        phi[:, :, :5] = 0
    empty = 3 if signed else 5
    leaves = [x.requires_grad_() for x in (q, k, v, phi)]
    z, lse, *_ = csat.attend_prefix(*leaves, *state, bias, keep, 0.3, signed)
    expected, expected_lse, *_ = plain_torch_attend_prefix(*leaves, *state, bias, keep, 0.3, signed)
    assert bool((z[:, :, :empty] == 0).all()) and bool(lse[:, :, :empty].isneginf().all())
    assert bool((z[:, 1] == 0).all()) and bool(lse[:, 0, empty:].isfinite().all())
    torch.testing.assert_close((z, lse), (expected, expected_lse))
    got, wanted = (torch.autograd.grad(x.sin().sum(), leaves) for x in (z, expected))
    torch.testing.assert_close(got, wanted)


def lse_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def test_attend_log_sum_exp() -> None:
    q, kc, vc = attend_inputs()
    bias = randn(1, 4, 33, seed=7)
    lse = csat.attend(q, kc, vc, bias, 0.25)[1]
    scores = 0.25 * q @ kc.repeat_interleave(2, 1).mT + bias.unsqueeze(-2)
    torch.testing.assert_close(lse, scores.logsumexp(-1))
    assert csat.attend(q.bfloat16(), kc.bfloat16(), vc.bfloat16(), None, 0.25)[1].dtype == torch.float32


def test_attend_rows_without_a_measurement() -> None:
    """Some biases -inf: left out. All of them: z = 0, lse = -inf, gradients 0, even from vc that is not finite."""
    q, kc, vc = attend_inputs()
    bias = randn(1, 4, 33, seed=7)
    bias[0, 0] = -float("inf")
    bias[0, 1, ::2] = -float("inf")
    compare(
        lambda q, k, v: csat.attend(q, k, v, bias, 0.25)[0],
        lambda q, k, v: naive_attend(q, k, v, bias, 0.25),
        [q, kc, vc],
        torch.float64,
    )
    leaves = [t.clone().requires_grad_() for t in (q, kc, vc, bias)]
    z, lse = csat.attend(*leaves, 0.25)
    assert (z[:, 0] == 0).all() and lse[:, 0].isneginf().all() and lse[:, 1:].isfinite().all()
    gradients = torch.autograd.grad(z.sum(), leaves)
    assert all(g.isfinite().all() for g in gradients)
    assert (gradients[0][:, 0] == 0).all() and (gradients[3][0, 0] == 0).all()
    single = torch.full((1, 1, 33), -float("inf"), dtype=torch.float64)
    assert (csat.attend(q, kc, torch.full_like(vc, float("nan")), single, 0.25)[0] == 0).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_attend_large_scores_stay_finite(dtype: torch.dtype) -> None:
    q, kc, vc = attend_inputs(dtype=dtype)
    q, kc = 100 * q.sign(), 100 * kc.sign()
    z, lse = csat.attend(q, kc, vc, None, 1.0)
    assert z.isfinite().all() and lse.isfinite().all() and lse.max() > 1e4
    assert_close("z", z, naive_attend(q.double(), kc.double(), vc.double(), None, 1.0), dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layers", [(1, 1, 1), (3, 1, 1), (3, 3, 1), (3, 1, 3), (3, 3, 3)], ids=str)
@pytest.mark.parametrize("heads", [1, 3])
def test_decode(dtype: torch.dtype, layers: tuple[int, int, int], heads: int) -> None:
    z = strided(randn(2, 3, 61, 12, seed=1, dtype=dtype))
    weights = decoder(12, 21, 14, layers[0], heads, layers[1], layers[2])
    parameter = torch.float64 if dtype == torch.float64 else torch.float32
    compare(csat.decode, naive_decode, [z, *(w.to(parameter) for w in weights)], dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("need_z", [True, False])
def test_attend_decode(dtype: torch.dtype, need_z: bool) -> None:
    q, kc, vc = attend_inputs(nq=257, r=12, dtype=dtype)
    parameter = torch.float64 if dtype == torch.float64 else torch.float32
    bias = randn(1, 4, 33, seed=7, dtype=parameter)
    weights = decoder(12, 21, 14, 3, 4, 3, 1, parameter)
    op = lambda *a: csat.attend_decode(*a, need_z)[0]  # noqa: E731
    # In low precision z is rounded before it is decoded: an iterate near its threshold may change sides against the
    # exact one, so only the values are held to the tolerance of one rounding.
    if dtype in (torch.float64, torch.float32):
        compare(op, naive_attend_decode, [q, kc, vc, bias, 0.25, *weights], dtype)
    exact = [t.double() for t in (q, kc, vc, bias)], [w.double() for w in weights]
    out, z, lse = csat.attend_decode(q, kc, vc, bias, 0.25, *weights, need_z)
    assert_close("out", out, naive_attend_decode(*exact[0], 0.25, *exact[1]), dtype)
    separate_z, separate_lse = csat.attend(q, kc, vc, bias, 0.25)
    assert torch.equal(out, csat.decode(separate_z, *weights))  # z is rounded on the way: both passes see the same one
    assert torch.equal(lse, separate_lse)
    assert torch.equal(z, separate_z) if need_z else z.shape == (0,)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("tied", [True, False])
def test_without_psi_it_is_the_identity(dtype: torch.dtype, tied: bool) -> None:
    layers = 1 if tied else 3
    S, B, theta, _, step = decoder(14, 21, 21, heads=2, s_layers=layers, b_layers=layers, dtype=dtype)
    identity = torch.eye(21, dtype=dtype).expand(2, -1, -1)
    z, dc = randn(2, 2, 50, 14, seed=1, dtype=dtype), randn(2, 2, 50, 21, seed=2, dtype=dtype)
    assert torch.equal(csat.decode(z, S, B, theta, None, step), csat.decode(z, S, B, theta, identity, step))
    pairs = [csat.decode_backward(dc, z, S, B, theta, psi, step) for psi in (None, identity)]
    for name, a, b in zip(("dz", "dS", "dB", "dtheta", "dpsi", "dstep"), *pairs, strict=True):
        assert a.shape == (0,) if name == "dpsi" else torch.equal(a, b), name
    leaves = [t.clone().requires_grad_() for t in (z, S, B, theta, step)]
    out = csat.decode(*leaves[:4], None, leaves[4])
    for gradient, expected in zip(torch.autograd.grad(out, leaves, dc), [*pairs[0][:4], pairs[0][5]], strict=True):
        assert torch.equal(gradient, expected.to(dtype))
    q, kc, vc = attend_inputs(b=2, h=2, hk=1, r=14, dtype=dtype)
    fused = [csat.attend_decode(q, kc, vc, None, 0.25, S, B, theta, psi, step, True) for psi in (None, identity)]
    assert all(torch.equal(a, b) for a, b in zip(*fused, strict=True))


def test_without_psi_the_registrations_hold() -> None:
    S, B, theta, _, step = (w.requires_grad_() for w in decoder(3, 4, 4, 2))
    z = randn(1, 2, 5, 3, seed=1).requires_grad_()
    torch.library.opcheck(torch.ops.csat.decode.default, (z, S, B, theta, None, step))
    q, kc, vc = (t.requires_grad_() for t in attend_inputs(1, 2, 1, 5, 4, 3, 3))
    arguments = (q, kc, vc, None, 0.5, S, B, theta, None, step, True)
    torch.library.opcheck(torch.ops.csat.attend_decode.default, arguments)
    assert torch.autograd.gradcheck(lambda *w: csat.decode(*w[:4], None, w[4]), (z, S, B, theta, step))


def test_parameters_may_mix_dtypes() -> None:
    q, kc, vc = attend_inputs(r=12, dtype=torch.bfloat16)
    S, B, theta, psi, step = decoder(12, 21, 14)
    mixed = [S.bfloat16(), B.float(), theta.bfloat16(), psi.float(), step.bfloat16()]
    leaves = [w.requires_grad_() for w in mixed]
    out = csat.attend_decode(q, kc, vc, randn(1, 1, 33, seed=1).float(), 0.25, *leaves, True)[0]
    gradients = torch.autograd.grad(out.float().sum(), leaves)
    assert [g.dtype for g in gradients] == [w.dtype for w in mixed]
    with pytest.raises(REFUSED, match="S must be float32 or bfloat16"):
        csat.attend_decode(q, kc, vc, None, 0.25, S.double(), *mixed[1:], True)


def test_empty_tensors() -> None:
    weights = decoder(4, 6, 5, dtype=torch.float32)
    for b, nq, m in [(0, 3, 2), (2, 0, 2), (2, 3, 0)]:
        q, kc, vc = attend_inputs(b=b, nq=nq, m=m, d=3, r=4, dtype=torch.float32)
        leaves = [t.requires_grad_() for t in (q, kc, vc)] + [w.clone().requires_grad_() for w in weights]
        out, z, lse = csat.attend_decode(*leaves[:3], None, 1.0, *leaves[3:], True)
        assert out.shape == (b, 4, nq, 5) and z.shape == (b, 4, nq, 4) and (m > 0 or lse.isneginf().all())
        assert all((g == 0).all() for g in torch.autograd.grad(out.sum(), leaves))
        tokens = [t.requires_grad_() for t in prefix_inputs(b=b, bp=b, n=nq, m=m, dtype=torch.float32)]
        z, lse, *state = csat.attend_prefix(*tokens, None, None, 1.0, False)
        assert z.shape == (b, 4, nq, 7) and (m > 0 or ((z == 0).all() and lse.isneginf().all()))
        gradients = torch.autograd.grad(z.sum() + sum(t.sum() for t in state), tokens)
        assert all(g.isfinite().all() for g in gradients) and [t.shape for t in state] == [t.shape for t in tokens[4:]]
    x, phi = torch.randn(2, 1, 0, 3, requires_grad=True), torch.randn(1, 1, 4, 0, requires_grad=True)
    y = csat.project(x, phi, None)
    assert (y == 0).all() and y.shape == (2, 1, 4, 3)
    assert [g.shape for g in torch.autograd.grad(y.sum(), (x, phi))] == [x.shape, phi.shape]


# ---- registrations ---------------------------------------------------------------------------------------------------


def samples(dtype: torch.dtype = torch.float64, grad: bool = True) -> dict[str, tuple[Any, tuple[Any, ...]]]:
    """One call of every differentiable op."""
    leaf = lambda t: t.to(dtype).requires_grad_(grad)  # noqa: E731
    q, kc, vc = (leaf(t) for t in attend_inputs(1, 2, 1, 5, 4, 3, 3))
    bias = leaf(randn(1, 2, 4, seed=7))
    weights = [leaf(w) for w in decoder(3, 4, 3, 2, 2, 2, 1)]
    mask = torch.tensor([[True, True, False, True, True, False]])
    counts = torch.tensor([[0, 0, 1, 1, 2, 3, 4], [0, 1, 2, 3, 3, 3, 3]], dtype=torch.int32)
    anchors = torch.tensor([[0], [-1]], dtype=torch.int32)
    implicit = (leaf(randn(2, 2, 6, 3, seed=6)), counts, anchors, "rademacher", 3, 4, -7, 2)
    # 5 queries of 7 tokens in blocks of 2, 2 of which have left the window of the next token; 2 earlier measurements
    k, v = leaf(randn(1, 2, 7, 3, seed=8)), leaf(randn(1, 2, 7, 3, seed=9))
    local = torch.tensor([[True, True, False, True, True, False, True]])
    causal = (q, kc, vc, k, v, bias, local, 0.5, 2, 1, 1)
    prefixes = {}
    for name, signed in (("attend_prefix", False), ("attend_prefix, signed", True)):
        tokens = prefix_inputs(1, 2, 1, 2, 1, 5, 4, 3, 3, signed)
        leaves = [leaf(x) for x in tokens[:6]]
        mass = tokens[6].to(dtype) if signed else leaf(tokens[6])
        prefixes[name] = csat.attend_prefix.default, (*leaves, mass, bias, local[:, :5], 0.5, signed)
    return {
        "project": (csat.project.default, (leaf(randn(1, 2, 6, 3, seed=3)), leaf(randn(1, 4, 4, 6, seed=4)), mask)),
        "project_implicit": (csat.project_implicit.default, implicit),
        "attend": (csat.attend.default, (q, kc, vc, bias, 0.5)),
        "attend_causal": (csat.attend_causal.default, causal),
        **prefixes,
        "decode": (csat.decode.default, (leaf(randn(1, 2, 5, 3, seed=5)), *weights)),
        "attend_decode": (csat.attend_decode.default, (q, kc, vc, bias, 0.5, *weights, True)),
        "attend_causal_decode": (csat.attend_causal_decode.default, (*causal, *weights, True)),
        "attend_prefix_decode": (csat.attend_prefix_decode.default, (*prefixes["attend_prefix"][1], *weights, True)),
    }


@pytest.mark.parametrize("name", list(samples()))
def test_gradcheck(name: str) -> None:
    op, args = samples()[name]

    def first(*a: Any) -> Tensor:
        out = op(*a)
        return out if isinstance(out, Tensor) else out[0]

    assert torch.autograd.gradcheck(first, args)
    with pytest.raises(NotImplementedError, match="differentiable once"):
        leaves = [a for a in args if isinstance(a, Tensor) and a.requires_grad]
        first_order = torch.autograd.grad(first(*args).square().sum(), leaves[0], create_graph=True)[0]
        first_order.sum().backward()


@pytest.mark.own_memory
@pytest.mark.parametrize("name", list(samples()))
def test_opcheck(name: str) -> None:
    op, args = samples(torch.float32)[name]
    torch.library.opcheck(op, args)


@pytest.mark.parametrize("lay", [Tensor.contiguous, strided], ids=["contiguous", "heads side by side"])
@pytest.mark.parametrize("name", list(samples()))
def test_rows_lie_as_those_that_they_come_from(name: str, lay: Callable[[Tensor], Tensor]) -> None:
    """Results and gradients, in the kernels, in plain torch and in the fakes; what measures lies contiguous."""
    op, args = samples(torch.float32)[name]
    data = [a.detach() if isinstance(a, Tensor) else a for a in args]
    laid = [lay(a) if isinstance(a, Tensor) and a.dim() == 4 else a for a in data]
    plain = getattr(_composite, op._schema.name.removeprefix("csat::"))

    def gradients(*args: Any) -> tuple[Tensor, ...]:
        leaves = [a.requires_grad_() for a in args if isinstance(a, Tensor) and a.dim() == 4]
        out = op(*args)
        out = out if isinstance(out, Tensor) else out[0]
        return torch.autograd.grad(out, leaves, torch.ones_like(out))

    for call in (op, gradients):
        results = call(*laid)
        with FakeTensorMode() as mode:
            fakes = call(*(mode.from_tensor(a) if isinstance(a, Tensor) else a for a in laid))
        others = [fakes] if call is gradients else [fakes, plain(*laid)]
        for other in others:
            pairs = zip(*((r,) if isinstance(r, Tensor) else r for r in (results, other)), strict=True)
            assert all(got.stride() == known.stride() for got, known in pairs)
        rows = (results,) if isinstance(results, Tensor) else results
        if "project" not in name:
            assert rows[0].stride(1) == (rows[0].shape[2:].numel() if lay is Tensor.contiguous else rows[0].shape[3])
        elif call is gradients:
            assert rows[0].stride(1) == (rows[0].shape[3] if lay is strided or "implicit" in name else 18)


@pytest.mark.own_memory
def test_opcheck_of_backward_ops() -> None:
    plain = lambda args: tuple(a.detach() if isinstance(a, Tensor) else a for a in args)  # noqa: E731
    all_samples = samples(torch.float32)
    x, phi, mask = plain(all_samples["project"][1])
    torch.library.opcheck(csat.project_backward.default, (torch.randn(1, 4, 4, 3), x, phi, mask, True, False))
    _, counts, anchors, ensemble, _, *draw = plain(all_samples["project_implicit"][1])
    backward = (torch.randn(2, 4, 4, 3), counts, anchors, ensemble, *draw, 2, 6)
    torch.library.opcheck(csat.project_implicit_backward.default, backward)
    q, kc, vc, bias, scale = plain(all_samples["attend"][1])
    z, lse = csat.attend(q, kc, vc, bias, scale)
    torch.library.opcheck(csat.attend_backward.default, (z, q, kc, vc, bias, z, lse, scale))
    torch.library.opcheck(csat.attend_backward.default, (z, q, kc, vc, None, z, lse, scale))
    *data, bias, mask, scale, size, window, rows = plain(all_samples["attend_causal"][1])
    z, lse = csat.attend_causal(*data, bias, mask, scale, size, window, rows)
    for b, m in ((bias, mask), (None, None)):
        arguments = (z, *data, b, m, z, lse, scale, size, window, rows)
        torch.library.opcheck(csat.attend_causal_backward.default, arguments)
    for name in ("attend_prefix", "attend_prefix, signed"):
        *data, bias, mask, scale, signed = plain(all_samples[name][1])
        z, lse, *state = csat.attend_prefix(*data, bias, mask, scale, signed)
        for b, m in ((bias, mask), (None, None)):
            arguments = (z, *state, *data, b, m, lse, scale, signed)
            torch.library.opcheck(csat.attend_prefix_backward.default, arguments)
    z, *weights = plain(all_samples["decode"][1])
    torch.library.opcheck(csat.decode_backward.default, (torch.randn(1, 2, 5, 3), z, *weights))


@pytest.mark.own_memory
def test_compile_fullgraph_one_graph_for_all_lengths() -> None:
    weights = [w.requires_grad_() for w in decoder(8, 12, 8, 2, 1, 1, 1, torch.float32)]

    def whole(q: Tensor, x: Tensor, phi: Tensor, mask: Tensor) -> Tensor:
        kc = csat.project(x, phi, mask)
        out = csat.attend_decode(q, kc, kc, None, 0.3, *weights, True)[0]
        return out + csat.attend(q, kc, kc, None, 0.3)[0]

    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(whole, fullgraph=True, dynamic=True, backend=counter)
    with torch._dynamo.config.patch(recompile_limit=1, fail_on_recompile_limit_hit=True):
        for n in (40, 57, 129, 256):
            q, x = randn(2, 3, n, 8, seed=n, dtype=torch.float32), randn(2, 3, n + 3, 8, seed=1, dtype=torch.float32)
            phi, mask = randn(1, 1, 6, n + 3, seed=2, dtype=torch.float32), randn(2, n + 3, seed=3) > 0
            out = compiled(q.requires_grad_(), x, phi, mask)
            expected = whole(q, x, phi, mask)
            torch.testing.assert_close(out, expected)
            got, wanted = (torch.autograd.grad(t.square().sum(), [q, *weights]) for t in (out, expected))
            torch.testing.assert_close(got, wanted)
    assert counter.frame_count == 1


def test_autocast_casts_data_and_leaves_parameters() -> None:
    samples32 = samples(torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        for name, (op, args) in samples32.items():
            out = op(*args)
            first = out if isinstance(out, Tensor) else out[0]
            assert first.dtype == torch.bfloat16, name
            leaves = [a for a in args if isinstance(a, Tensor) and a.requires_grad]
            gradients = torch.autograd.grad(first.float().sum(), leaves)
            assert all(g.dtype == torch.float32 for g in gradients), name
    op, args = samples32["project"]
    x, phi, mask = args
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(op(x, phi, mask), op(x.bfloat16(), phi, mask))


def test_plain_torch_backward_agrees_with_the_kernels() -> None:
    from csat_ext import _composite

    _, (x, phi, mask) = samples(grad=False)["project"]
    calls: list[tuple[str, tuple[Any, ...]]] = []
    calls.append(("project_backward", (randn(1, 4, 4, 3, seed=8), x, phi, mask, True, True)))
    _, counts, anchors, ensemble, _, *draw = samples(grad=False)["project_implicit"][1]
    backward = (randn(2, 4, 4, 3, seed=8), counts, anchors, ensemble, *draw, 2, 6)
    calls.append(("project_implicit_backward", backward))
    _, (q, kc, vc, bias, scale) = samples(grad=False)["attend"]
    z, lse = csat.attend(q, kc, vc, bias, scale)
    calls.append(("attend_backward", (torch.ones_like(z), q, kc, vc, bias, z, lse, scale)))
    *data, bias, mask, scale, size, window, rows = samples(grad=False)["attend_causal"][1]
    for b, m in ((bias, mask), (None, None)):
        z, lse = csat.attend_causal(*data, b, m, scale, size, window, rows)
        arguments = (torch.ones_like(z), *data, b, m, z, lse, scale, size, window, rows)
        calls.append(("attend_causal_backward", arguments))
    for name in ("attend_prefix", "attend_prefix, signed"):
        *data, bias, mask, scale, signed = samples(grad=False)[name][1]
        for b, m in ((bias, mask), (None, None)):
            z, lse, *state = csat.attend_prefix(*data, b, m, scale, signed)
            calls.append(("attend_prefix_backward", (z, *state, *data, b, m, lse, scale, signed)))
    z, *per_head = samples(grad=False)["decode"][1]
    for weights in (per_head, decoder(3, 4, 3, 2, 1, 1, 2)):
        calls.append(("decode_backward", (randn(1, 2, 5, 3, seed=9), z, *weights)))
    for name, arguments in calls:
        torch.testing.assert_close(getattr(_composite, name)(*arguments), getattr(csat, name)(*arguments))


def test_deterministic_for_any_number_of_threads() -> None:
    q, kc, vc = attend_inputs(b=2, h=4, hk=2, nq=600, m=40, d=32, r=32, dtype=torch.float32)
    x, phi = randn(2, 4, 700, 32, seed=1, dtype=torch.float32), randn(1, 1, 40, 700, seed=2, dtype=torch.float32)
    weights = decoder(32, 48, 32, 4, 1, 1, 4, torch.float32)
    prefix = prefix_inputs(n=500, dtype=torch.float32)

    def run() -> list[Tensor]:
        leaves = [t.clone().requires_grad_() for t in (q, kc, vc, x, phi, *weights)]
        out = csat.attend_decode(*leaves[:3], None, 0.2, *leaves[5:], True)[0]
        y = csat.project(leaves[3], leaves[4], None)
        drawn = csat.project_implicit(leaves[3], None, None, "rademacher", 40, 4, 7, 2)
        causal = (*leaves[:3], leaves[3], leaves[3], None, None, 0.2, 50, 4, 4)  # 10 blocks have left
        near = csat.attend_causal(*causal)[0]
        fused = csat.attend_causal_decode(*causal, *leaves[5:], True)[0]
        tokens = [t.clone().requires_grad_() for t in prefix]
        of_prefix = csat.attend_prefix(*tokens, None, None, 0.3, False)
        rows = out, near, y, drawn, fused
        gradients = torch.autograd.grad(sum(t.square().sum() for t in rows), leaves)
        of_tokens = torch.autograd.grad(sum(t.square().sum() for t in (of_prefix[0], *of_prefix[2:])), tokens)
        return [*rows, *gradients, *of_prefix, *of_tokens]

    before = torch.get_num_threads()
    try:
        results = []
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            results.append(run())
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@pytest.mark.parametrize("capability", ["default", "avx2"])
def test_every_instruction_set(capability: str) -> None:
    """The kernels of smaller processors, in a process where torch and csat are bounded to them."""
    environment = {**os.environ, "ATEN_CPU_CAPABILITY": capability}
    code = "from csat_ext import _C; print(_C.build_info()['instruction_set'])"
    chosen = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert chosen.stdout.strip() in ("baseline", capability)
    selected = ["-k", "gradcheck or odd_sizes or without_a_measurement or large_scores or test_attend_decode"]
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *selected, __file__]
    result = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout


@pytest.mark.parametrize("name", list(samples()))
def test_device_without_kernels_runs_plain_torch_with_one_warning(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from csat_ext import _composite

    op, args = samples(grad=False)[name]
    monkeypatch.setattr(_composite, "_warned", set())
    with pytest.warns(UserWarning, match="csat_ext on cpu tensors"):
        got = op._op_dk(torch._C.DispatchKey.CompositeExplicitAutograd, *args)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        op._op_dk(torch._C.DispatchKey.CompositeExplicitAutograd, *args)
    torch.testing.assert_close(got, op(*args))


# ---- rows under a key mask -------------------------------------------------------------------------------------------


def rows_and_mask(phi_batch: int, dtype: torch.dtype, tokens: int = 130) -> tuple[Tensor, Tensor]:
    """Averaging and signed rows by turns, one of zeros, one emptied by the first mask; the last mask keeps nothing."""
    phi = randn(phi_batch, 2, tokens, 7, seed=1, dtype=dtype).mT
    phi[:, :, ::2] = phi[:, :, ::2].abs() + 0.1
    phi[:, :, 3] = 0
    phi[:, :, 4, 5:] = 0
    mask = randn(6, tokens, seed=2) > -0.5
    mask[0, :5], mask[-1] = False, False
    return phi, mask


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("phi_batch", [1, 6])
def test_renormalise_rows(phi_batch: int, dtype: torch.dtype) -> None:
    phi, mask = rows_and_mask(phi_batch, dtype)
    factor, mass = csat.renormalise_rows(phi, mask)
    expected, empty = reference.renormalise_rows(phi, mask)
    assert factor.dtype == mass.dtype == expected.dtype and torch.equal(factor == 0, empty)
    assert empty.any() and not empty.all() and empty[-1].all() and empty[0, :, 4].all()
    torch.testing.assert_close(factor, expected)
    averages = (phi >= 0).all(-1).expand_as(empty) & ~empty
    kept = (phi.to(mass.dtype) * mask.to(mass.dtype)[:, None, None]).sum(-1)
    torch.testing.assert_close(mass, torch.where(averages, kept, 0))


@pytest.mark.parametrize("phi_batch", [1, 6])
def test_gradients_of_renormalise_rows(phi_batch: int) -> None:
    phi, mask = rows_and_mask(phi_batch, torch.float64, tokens=8)
    phi[:, :, 3] = 0.3  # at 0 an entry is on the border between averaging and signed rows, and so in row 4
    phi[:, :, 4, 5:] = 0.2
    phi.requires_grad_()
    assert torch.autograd.gradcheck(csat.renormalise_rows, (phi, mask))
    assert torch.autograd.gradgradcheck(csat.renormalise_rows, (phi, mask))
    got, expected = (f(phi, mask)[0].square().sum() for f in (csat.renormalise_rows, reference.renormalise_rows))
    torch.testing.assert_close(*(torch.autograd.grad(t, phi)[0] for t in (got, expected)))


@pytest.mark.own_memory
@pytest.mark.parametrize("phi_batch", [1, 6])
def test_opcheck_of_renormalise_rows(phi_batch: int) -> None:
    phi, mask = rows_and_mask(phi_batch, torch.float32)
    torch.library.opcheck(csat.renormalise_rows.default, (phi.requires_grad_(), mask))


@pytest.mark.filterwarnings("ignore:csat_ext on cpu tensors")
def test_plain_torch_renormalises_rows_alike() -> None:
    phi, mask = rows_and_mask(1, torch.float32)
    composite = csat.renormalise_rows.default._op_dk(torch._C.DispatchKey.CompositeExplicitAutograd, phi, mask)
    for got, expected in zip(composite, csat.renormalise_rows(phi, mask), strict=True):
        torch.testing.assert_close(got, expected)


# ---- bad input -------------------------------------------------------------------------------------------------------


def full_calls() -> dict[str, dict[str, Any]]:
    """A valid call of every op by argument name, float32."""
    s = samples(torch.float32, grad=False)
    project = dict(zip(("x", "phi", "key_mask"), s["project"][1], strict=True))
    attend = dict(zip(("q", "kc", "vc", "score_bias", "scale"), s["attend"][1], strict=True))
    implicit_names = ("x", "counts", "anchors", "ensemble", "rows", "heads", "seed", "layer")
    implicit = dict(zip(implicit_names, s["project_implicit"][1], strict=True))
    places = {name: implicit[name] for name in ("counts", "anchors")}
    draw = {name: implicit[name] for name in ("ensemble", "heads", "seed", "layer")}
    dy = randn(2, 4, 4, 3, seed=8).float()
    names = ("S", "B", "theta", "psi", "step")
    decode = dict(zip(("z", *names), s["decode"][1], strict=True))
    z, lse = csat.attend(*attend.values())
    sizes = ("block_size", "window_blocks", "measurements_per_block")
    causal_names = ("q", "kc", "vc", "k", "v", "score_bias", "key_mask", "scale", *sizes)
    causal = dict(zip(causal_names, s["attend_causal"][1], strict=True))
    z_causal, lse_causal = csat.attend_causal(*causal.values())
    tensors, numbers = list(causal.items())[:7], list(causal.items())[7:]
    state = ("kc", "vc", "mass")
    prefix_names = ("q", "k", "v", "phi", *state, "score_bias", "key_mask", "scale", "signed")
    prefix = dict(zip(prefix_names, s["attend_prefix"][1], strict=True))
    z_prefix, lse_prefix, *end = csat.attend_prefix(*prefix.values())
    of_prefix = {"dz": z_prefix, **dict(zip((f"d{name}_end" for name in state), end, strict=True))}
    leading, last = list(prefix.items())[:9], list(prefix.items())[9:]
    return {
        "project": project,
        "project_backward": {"dy": randn(1, 4, 4, 3, seed=8).float(), **project, "need_dx": True, "need_dphi": True},
        "renormalise_rows": {"phi": randn(2, 3, 4, 6, seed=8).float(), "key_mask": project["key_mask"].expand(2, -1)},
        "project_implicit": implicit,
        "project_implicit_backward": {"dy": dy, **places, **draw, "x_heads": 2, "tokens": 6},
        "attend": attend,
        "attend_backward": {"dz": z, **dict(list(attend.items())[:4]), "z": z, "lse": lse, "scale": 0.5},
        "attend_causal": causal,
        "attend_causal_backward": {"dz": z_causal, **dict(tensors), "z": z_causal, "lse": lse_causal, **dict(numbers)},
        "attend_prefix": prefix,
        "attend_prefix_backward": {**of_prefix, **dict(leading), "lse": lse_prefix, **dict(last)},
        "decode": decode,
        "decode_backward": {"dc": randn(1, 2, 5, 3, seed=9).float(), **decode},
        "attend_decode": {**attend, **{n: decode[n] for n in names}, "need_z": True},
        "attend_causal_decode": {**causal, **{n: decode[n] for n in names}, "need_z": True},
        "attend_prefix_decode": {**prefix, **{n: decode[n] for n in names}, "need_z": True},
    }


CALLS = full_calls()
TENSOR_ARGUMENTS = [(op, name) for op, call in CALLS.items() for name, a in call.items() if isinstance(a, Tensor)]


def refused(op: str, name: str, value: Any) -> str:
    with pytest.raises(REFUSED) as caught:
        getattr(csat, op)(**{**CALLS[op], name: value})
    return str(caught.value)


# Axes that no other argument fixes in the calls above.
FREE_AXES = {
    ("project", "x", 3),
    ("project", "phi", 2),
    ("renormalise_rows", "phi", 1),
    ("renormalise_rows", "phi", 2),
    ("project_implicit", "x", 3),
    ("project_implicit", "anchors", 1),
    ("project_implicit_backward", "dy", 2),
    ("project_implicit_backward", "dy", 3),
    ("attend", "q", 2),
    ("attend", "vc", 3),
    ("decode", "z", 0),
    ("decode", "z", 2),
    ("decode", "psi", 1),
    ("attend_decode", "q", 2),
    ("attend_decode", "psi", 1),
    ("attend_causal_decode", "psi", 1),
    ("attend_prefix_decode", "psi", 1),
}
# The first tensor of an op sets the dtype, so that another argument is named when it differs.
SETS_DTYPE = {
    *(("project", "x"), ("renormalise_rows", "phi")),
    *(("project_implicit", "x"), ("project_implicit_backward", "dy")),
    *(("attend", "q"), ("attend_causal", "q"), ("decode", "z"), ("attend_decode", "q")),
    *(("attend_causal_decode", "q"), ("attend_prefix_decode", "q")),
    *(("attend", "q"), ("attend_causal", "q"), ("attend_prefix", "q"), ("decode", "z"), ("attend_decode", "q")),
}


@pytest.mark.parametrize(("op", "name"), TENSOR_ARGUMENTS)
def test_wrong_argument_is_named(op: str, name: str) -> None:
    good = CALLS[op][name]
    message = refused(op, name, good.unsqueeze(0))
    assert f"csat::{op}: {name} must have" in message and str(tuple(good.unsqueeze(0).shape)) in message
    assert "Long" in refused(op, name, good.to(torch.int64))
    if (op, name) not in SETS_DTYPE:
        other = torch.float16 if good.dtype != torch.bool else torch.float32
        assert name in refused(op, name, good.to(other))


@pytest.mark.parametrize(("op", "name"), TENSOR_ARGUMENTS)
def test_wrong_size_is_refused(op: str, name: str) -> None:
    """Three more along one axis contradicts another argument, or is an axis that nothing else fixes."""
    good = CALLS[op][name]
    for axis in range(good.dim()):
        sizes = list(good.shape)
        sizes[axis] += 3
        grown = good.new_ones(sizes)
        if (op, name, axis) in FREE_AXES:
            getattr(csat, op)(**{**CALLS[op], name: grown})
        else:
            assert f"csat::{op}: " in refused(op, name, grown)


@pytest.mark.parametrize(("op", "name"), TENSOR_ARGUMENTS)
def test_other_device_is_refused(op: str, name: str) -> None:
    assert "must be on" in refused(op, name, CALLS[op][name].to("meta"))


@pytest.mark.parametrize("scale", [float("nan"), float("inf")])
def test_scale_must_be_finite(scale: float) -> None:
    assert "scale must be finite" in refused("attend", "scale", scale)


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("ensemble", "gaussian", "ensemble must be"),
        ("rows", 0, "rows must be in"),
        ("heads", 3, "heads must be 1 or a multiple of the 2 heads of x; got 3"),
        ("layer", 2**32, "layer must be in"),
    ],
)
def test_wrong_draws_are_named(name: str, value: Any, message: str) -> None:
    assert message in refused("project_implicit", name, value)
    if name != "rows":
        assert message in refused("project_implicit_backward", name, value)


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("scale", float("nan"), "scale must be finite"),
        ("block_size", 0, "block_size must be in [1, 2^31 - 2]; got 0"),
        ("window_blocks", -1, "window_blocks must be in [0, 2^31 - 2]; got -1"),
        ("measurements_per_block", 0, "measurements_per_block must be in [1, 2^31 - 2]; got 0"),
        ("measurements_per_block", 3, "kc must have 3 measurements for each of the 2 blocks that left the window"),
        ("q", torch.zeros(1, 2, 8, 3), "k must have a token for each of the 8 queries"),
    ],
)
def test_wrong_windows_are_named(name: str, value: Any, message: str) -> None:
    assert message in refused("attend_causal", name, value)
    if name != "q":
        assert message in refused("attend_causal_backward", name, value)


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("scale", float("inf"), "scale must be finite; got inf"),
        ("signed", True, "mass must have shape (B, 1, 1) with size 1 on axis 1; got shape (1, 2, 4)"),
        ("phi", torch.zeros(1, 3, 5, 4), "phi must have 1 head or a multiple of the 1 heads of k that divides the 2"),
        ("kc", torch.zeros(1, 1, 4, 3), "kc must have shape (B, max(Hk, Hp), M, D) with size 2 on axis 1"),
        ("mass", torch.zeros(1, 2, 4).bfloat16(), "mass must be float32 (the accumulation dtype); got bfloat16"),
    ],
)
def test_wrong_prefixes_are_named(name: str, value: Any, message: str) -> None:
    assert message in refused("attend_prefix", name, value)
    assert message in refused("attend_prefix_backward", name, value)


def test_head_counts_and_layers() -> None:
    assert "phi must have 1 head or a multiple of the 2 heads of x" in refused(
        "project", "phi", torch.zeros(1, 3, 4, 6)
    )
    call = {**CALLS["attend"], "kc": torch.zeros(1, 3, 4, 3), "vc": torch.zeros(1, 3, 4, 3)}
    with pytest.raises(REFUSED, match="kc must have a number of heads that divides the 2 heads of q"):
        csat.attend(**call)
    call = {**CALLS["attend_causal"], "k": torch.zeros(1, 3, 7, 3), "v": torch.zeros(1, 3, 7, 3)}
    with pytest.raises(REFUSED, match="k must have a number of heads that divides the 2 heads of q"):
        csat.attend_causal(**call)
    call = {**CALLS["attend_prefix"], "k": torch.zeros(1, 3, 5, 3), "v": torch.zeros(1, 3, 5, 3)}
    with pytest.raises(REFUSED, match="k must have a number of heads that divides the 2 heads of q"):
        csat.attend_prefix(**call)
    assert "theta must have shape" in refused("decode", "theta", torch.zeros(2, 0, 4))
    assert "S must have shape" in refused("decode", "S", torch.zeros(2, 5, 4, 4))
    with pytest.raises(REFUSED, match=r"x must have shape .* with size 1 or more"):
        csat.project(torch.zeros(1, 0, 6, 3), torch.zeros(1, 1, 4, 6), None)


def test_pybind_module_is_the_same_ops() -> None:
    from csat_ext import _C

    for name, call in CALLS.items():
        if name.endswith("_backward"):
            continue
        torch.testing.assert_close(getattr(_C, name)(*call.values()), getattr(csat, name)(**call), rtol=0, atol=0)
        torch.testing.assert_close(getattr(_C, name)(**call), getattr(csat, name)(**call), rtol=0, atol=0)
    with pytest.raises(REFUSED, match="csat::project: x must have 4 dimensions"):
        _C.project(torch.zeros(3), torch.zeros(3), None)
