"""The CUDA kernels' own sources, emulated on the CPU (tests/emulator): right results, and nothing to report.

Sizes are odd and small: tails of every tile, padding of every panel, a head axis that is shared, strides of every kind.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from conftest import assert_accurate
from emulator import build
from emulator.backend import EmulatedOps, EmulationError, as_cpu_kernels
from operator_cases import plain_torch_attend_prefix_backward, plain_torch_decode_backward, settled_decode
from torch import Tensor

from csat_ext import SparseDecoder, _composite, csat_attention, reference

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
SEEDS = [0, 7]


@pytest.fixture(scope="session")
def library() -> Any:
    if reason := build.why_not_buildable():
        pytest.skip(reason)
    return build.build()


@pytest.fixture(params=SEEDS, ids=lambda seed: f"seed{seed}")
def ops(request: pytest.FixtureRequest, library: Any) -> EmulatedOps:
    return EmulatedOps(library, seed=request.param)


def _map(function: Callable[[Tensor], Tensor], values: tuple[Any, ...]) -> list[Any]:
    return [function(v) if isinstance(v, Tensor) and v.is_floating_point() else v for v in values]


def check(ops: EmulatedOps, name: str, *arguments: Any) -> Any:
    """Runs an operator emulated, in float64 and in plain torch of the same dtype, and applies the tolerance rule."""
    got = getattr(ops, name)(*arguments)
    exact = getattr(_composite, name)(*_map(Tensor.double, arguments))
    plain = getattr(_composite, name)(*arguments)
    if name == "attend_prefix_backward" and ops.counters.mma:
        plain = plain_torch_attend_prefix_backward(*arguments)
    assert ops.counters.accesses > 0, "the kernels were built without the checks"
    # Scores of the prefix form pass through 16 bits on the tensor cores, and so do the sums over them that its backward
    # takes; what is kept of them in float32 is no better.
    through = {"attend_prefix": (1,), "attend_prefix_decode": (2,), "attend_prefix_backward": range(3, 8)}.get(name, ())
    rounded = dict.fromkeys(through, arguments[0].dtype) if ops.counters.mma else {}
    if isinstance(got, Tensor):
        assert_accurate(name, got, exact, plain)
    else:
        for i, (a, b, c) in enumerate(zip(got, exact, plain, strict=True)):
            finite = b.isfinite()
            assert torch.equal(a.isfinite(), finite), f"{name}[{i}]"
            assert_accurate(f"{name}[{i}]", a[finite], b[finite], c[finite], rounded.get(i))
    return got


def _strided(x: Tensor) -> Tensor:
    """The same values as a view of (B, N, H, D) with gaps."""
    wide = torch.full((x.shape[0], x.shape[2], x.shape[1], x.shape[3] + 3), math.nan, dtype=x.dtype)
    view = wide[..., 1:-2].transpose(1, 2)
    return view.copy_(x)


def _tokens(generator: torch.Generator, dtype: torch.dtype, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=generator).to(dtype)


def _attend_inputs(
    generator: torch.Generator, dtype: torch.dtype, sizes: tuple[int, ...], bias: str
) -> tuple[Any, ...]:
    batch, heads, key_heads, queries, measurements, head_dim, features = sizes
    q = _tokens(generator, dtype, batch, heads, queries, head_dim)
    kc = _tokens(generator, dtype, batch, key_heads, measurements, head_dim)
    vc = _tokens(generator, dtype, batch, key_heads, measurements, features)
    score_bias = None
    if bias != "none":
        score_bias = torch.randn(1, heads, measurements, generator=generator)
        if bias == "masked":
            score_bias[:, 0] = -math.inf
            score_bias[:, -1, ::2] = -math.inf
    return q, kc, vc, score_bias, head_dim**-0.5


def _decoder(generator: torch.Generator, sizes: tuple[int, ...]) -> list[Tensor]:
    heads, layers, s_layers, b_layers, coefficients, features, outputs = sizes
    return [
        torch.randn(heads, s_layers, coefficients, coefficients, generator=generator) * 0.3 / math.sqrt(coefficients),
        torch.randn(heads, b_layers, coefficients, features, generator=generator) / math.sqrt(features),
        torch.rand(heads, layers, coefficients, generator=generator) * 0.2,
        torch.randn(heads, outputs, coefficients, generator=generator),
        0.5 + torch.rand(heads, layers, generator=generator),
    ]


# batch, heads, key heads, queries, measurements, head dim, features
ATTEND = [
    (1, 2, 1, 35, 13, 20, 24),
    (2, 1, 1, 9, 131, 7, 5),
    (1, 1, 1, 1, 1, 1, 1),
    (1, 1, 1, 17, 65, 80, 66),
    (1, 1, 1, 9, 13, 130, 5),
]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("sizes", ATTEND, ids=str)
def test_attend(ops: EmulatedOps, generator: torch.Generator, sizes: tuple[int, ...], dtype: torch.dtype) -> None:
    inputs = _attend_inputs(generator, dtype, sizes, "finite" if sizes[4] > 13 else "masked")
    z, lse = check(ops, "attend", *inputs)
    check(ops, "attend_backward", _tokens(generator, dtype, *z.shape), *inputs[:4], z, lse, inputs[4])
    assert (ops.counters.mma > 0) == (dtype != torch.float32 and max(sizes[5:]) <= 128)


# What the tensor-core kernels of attend's backward have beyond those: every padded size, one to eight warps, slabs of
# measurements, ranges of queries, their tails; on Hopper one and two warpgroups, of 64 and of 128 measurements.
BACKWARD = [
    (1, 1, 1, 3, 5, 8, 20),
    (1, 2, 2, 5, 257, 32, 8),
    (1, 4, 1, 270, 13, 16, 32),
    (1, 1, 1, 33, 300, 40, 64),
    (1, 1, 1, 70, 256, 64, 64),
    (2, 2, 1, 31, 20, 64, 40),
    (1, 2, 1, 33, 131, 80, 72),
    (2, 4, 2, 39, 40, 96, 20),
    (1, 2, 1, 31, 131, 128, 100),
    (1, 1, 1, 37, 128, 90, 128),
    (1, 2, 1, 100, 100, 64, 33),
    (1, 1, 1, 20, 400, 48, 64),
    (2, 2, 1, 70, 50, 128, 100),
]


@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
@pytest.mark.parametrize("sizes", BACKWARD, ids=str)
def test_attend_backward_on_tensor_cores(
    ops: EmulatedOps, generator: torch.Generator, sizes: tuple[int, ...], dtype: torch.dtype, capability: int
) -> None:
    ops.compute_capability = capability
    inputs = _attend_inputs(generator, dtype, sizes, "masked" if sizes[1] > 1 else "none")
    z, lse = _composite.attend(*inputs)
    check(ops, "attend_backward", _tokens(generator, dtype, *z.shape), *inputs[:4], z, lse, inputs[4])
    assert ops.counters.mma > 0


def test_products_of_the_backward_are_warpgroups_on_hopper_alone(library: Any, generator: torch.Generator) -> None:
    """A product of a warp is 16 x 8 x 16, one of a warpgroup 64 x 64 x 16 or, of three of the five, against 32 queries,
    64 x 32 x 16. Scores, dP and dvc are started once more after the last of the two tiles."""
    inputs = _attend_inputs(generator, torch.bfloat16, (1, 1, 1, 64, 128, 64, 64), "none")
    z, lse = _composite.attend(*inputs)
    products = {}
    for capability in (80, 90):
        ops = EmulatedOps(library, compute_capability=capability)
        ops.attend_backward(z, *inputs[:4], z, lse, inputs[4])
        products[capability] = ops.counters.mma
    matrix = products[80] // 5
    assert products[90] == 2 * matrix // 32 + 3 * matrix // 16 + matrix // 16 + matrix // 64


@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.parametrize("measurements", [50, 300])
@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
def test_values_that_are_alike(
    library: Any, generator: torch.Generator, dtype: torch.dtype, measurements: int, capability: int
) -> None:
    """Gradients of the scores are small differences then: the rounding of z must not show in them."""
    q, kc, vc, bias, scale = _attend_inputs(generator, dtype, (1, 1, 1, 9, measurements, 16, 16), "finite")
    vc = (3 + vc / 32).to(dtype)
    z, lse = _composite.attend(q, kc, vc, bias, scale)
    arguments = _tokens(generator, dtype, *z.shape), q, kc, vc, bias, z, lse, scale
    got = EmulatedOps(library, compute_capability=capability).attend_backward(*arguments)
    exact = _composite.attend_backward(*_map(Tensor.double, arguments))
    plain = _composite.attend_backward(*arguments)
    for i in range(3):  # plain torch in float32 misses the limit of float32 for the fourth, dbias
        assert_accurate(f"attend_backward[{i}]", got[i], exact[i], plain[i])


# batch, heads, heads of kc, of k, queries, tokens; block size, window, measurements of a block; those of earlier
# tokens; head dim, features
CAUSAL = [
    (1, 2, 1, 2, 150, 150, 16, 0, 3, 0, 20, 24),
    (2, 2, 2, 1, 70, 90, 8, 2, 2, 5, 7, 5),
    (1, 1, 1, 1, 1, 41, 8, 1, 8, 130, 16, 33),
    (1, 1, 1, 1, 9, 9, 32, 0, 4, 0, 1, 1),
    (1, 2, 1, 1, 300, 300, 1, 3, 1, 0, 64, 64),
    (1, 1, 1, 1, 200, 230, 64, 1, 30, 7, 128, 40),
    (1, 2, 1, 1, 33, 40, 40, 0, 40, 0, 80, 72),
    (1, 1, 1, 1, 70, 70, 33, 0, 9, 0, 90, 96),
    (1, 1, 1, 1, 20, 30, 8, 1, 2, 0, 130, 9),
    # Of the backward on tensor cores: heads of a group one after the other, slabs, ranges of the queries.
    (1, 4, 2, 1, 261, 333, 16, 2, 5, 3, 32, 27),
    (2, 2, 1, 2, 139, 139, 16, 0, 16, 0, 64, 57),
    (1, 2, 2, 1, 131, 140, 24, 2, 11, 1, 120, 128),
]


def _causal_inputs(generator: torch.Generator, dtype: torch.dtype, sizes: tuple[int, ...], masked: bool) -> Any:
    batch, heads, measured_heads, token_heads, queries, tokens, *numbers, earlier, head_dim, features = sizes
    size, window, rows = numbers
    count = earlier + rows * max(tokens // size - window, 0)
    attend = (batch, heads, measured_heads, queries, count, head_dim, features)
    q, kc, vc, bias, scale = _attend_inputs(generator, dtype, attend, "masked" if masked and heads > 1 else "none")
    k, v = (_tokens(generator, dtype, batch, token_heads, tokens, d) for d in (head_dim, features))
    keep = torch.rand(batch, tokens, generator=generator) < 0.7 if masked else None
    return q, kc, vc, k, v, bias, keep, scale, *numbers


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("sizes", CAUSAL, ids=str)
def test_attend_causal(
    library: Any, generator: torch.Generator, sizes: tuple[int, ...], dtype: torch.dtype, masked: bool
) -> None:
    ops = EmulatedOps(library, seed=3 if masked else 0, compute_capability=90 if masked else 80)
    *inputs, size, window, rows = _causal_inputs(generator, dtype, sizes, masked)
    q, kc, vc, k, v, bias, keep, scale = inputs
    if keep is not None:  # a masked token is never read
        k, v = (x.masked_fill(~keep[:, None, :, None], math.nan) for x in (k, v))
    tensors = _strided(q), _strided(kc), _strided(vc), _strided(k), _strided(v), bias, keep
    z, lse = check(ops, "attend_causal", *tensors, scale, size, window, rows)
    assert (ops.counters.mma > 0) == (dtype != torch.float32 and max(sizes[-2:]) <= 128)
    dz = _strided(_tokens(generator, dtype, *z.shape))
    gradients = check(ops, "attend_causal_backward", dz, *tensors, z, lse, scale, size, window, rows)
    assert (ops.counters.mma > 0) == (dtype != torch.float32 and max(sizes[-2:]) <= 128)
    if keep is not None:
        masked_out = ~keep[:, None, :, None]
        assert all(bool((d.masked_select(masked_out) == 0).all()) for d in gradients[3:5])


# batch, heads, heads of k, of phi, batch of phi; tokens, measurements, head dim, features
PREFIX = [
    (2, 2, 2, 2, 2, 131, 13, 20, 24),
    (1, 2, 1, 1, 1, 65, 130, 7, 5),
    (1, 4, 2, 4, 1, 64, 70, 66, 33),
    (1, 1, 1, 1, 1, 1, 2, 1, 1),
    (1, 2, 1, 2, 1, 33, 5, 130, 9),
    (1, 4, 2, 1, 1, 140, 40, 48, 48),
]


def _prefix_inputs(
    generator: torch.Generator, dtype: torch.dtype, sizes: tuple[int, ...], masked: bool, signed: bool
) -> tuple[Any, ...]:
    batch, heads, key_heads, phi_heads, phi_batch, tokens, m, head_dim, features = sizes
    state_heads = max(key_heads, phi_heads)
    attend = (batch, heads, key_heads, tokens, m, head_dim, features)
    q, _, _, bias, scale = _attend_inputs(generator, dtype, attend, "masked" if masked and heads > 1 else "none")
    k, v = (_tokens(generator, dtype, batch, key_heads, tokens, d) for d in (head_dim, features))
    phi, before = (torch.randn(b, h, n, m, generator=generator) for b, h, n in (
        (phi_batch, phi_heads, tokens), (batch, state_heads, 5)
    ))  # fmt: skip
    phi, before = (x.sign() if signed else x.softmax(-1) for x in (phi, before))
    if masked and not signed and m > 2:
        phi[:, :, :7, m // 2 :], before[..., m // 2 :] = 0, 0  # measurements without mass at first
    mass = torch.full((batch, 1, 1), 5.0) if signed else before.sum(2)
    sums = [before.mT @ torch.randn(batch, state_heads, 5, d, generator=generator) for d in (head_dim, features)]
    keep = torch.rand(batch, tokens, generator=generator) < 0.7 if masked else None
    return q, k, v, phi.to(dtype) if masked else phi, *sums, mass, bias, keep, scale, signed


@pytest.mark.parametrize(("signed", "masked"), [(False, False), (False, True), (True, True)])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("sizes", PREFIX, ids=str)
def test_attend_prefix(
    library: Any, generator: torch.Generator, sizes: tuple[int, ...], dtype: torch.dtype, signed: bool, masked: bool
) -> None:
    if (dtype == torch.float16 and not signed) or (dtype == torch.bfloat16 and not masked):
        pytest.skip("what differs between dtypes, another form or test_attend_prefix_on_tensor_cores has too")
    ops = EmulatedOps(library, seed=3 if masked else 0, compute_capability=90)
    q, k, v, phi, *rest, keep, scale, _ = _prefix_inputs(generator, dtype, sizes, masked, signed)
    if keep is not None:  # a masked token is never read
        k, v = (x.masked_fill(~keep[:, None, :, None], math.nan) for x in (k, v))
    tensors = _strided(q), _strided(k), _strided(v), _strided(phi), *rest, keep
    z, lse, *ends = check(ops, "attend_prefix", *tensors, scale, signed)
    assert (ops.counters.mma > 0) == (dtype != torch.float32 and max(sizes[-2:]) <= 128)
    of_ends = [torch.randn(x.shape, generator=generator) for x in ends]
    dz = _strided(_tokens(generator, dtype, *z.shape))
    exact_lse = _composite.attend_prefix(*_map(Tensor.double, tensors), scale, signed)[1].float()
    arguments = dz, *of_ends, *tensors
    gradients = check(ops, "attend_prefix_backward", *arguments, exact_lse, scale, signed)
    own = ops.attend_prefix_backward(*arguments, lse, scale, signed)  # of 16 bits' accuracy on tensor cores
    assert (ops.counters.mma > 0) == (dtype != torch.float32 and max(sizes[-2:]) <= 128)
    for i, (a, b) in enumerate(zip(own, gradients, strict=True)):
        assert_accurate(f"attend_prefix_backward[{i}] from its own lse", a, b, dtype=dtype)
    if keep is not None:
        masked_out = ~keep[:, None, :, None]
        assert all(bool((d.masked_select(masked_out) == 0).all()) for d in gradients[1:4])


# What the tensor-core kernel has beyond those: several chunks of 128 tokens, stretches of 32 measurements and blocks of
# 64 of them, both widths, one slot or two (capability 80 has less shared memory).
PREFIX_MMA = [
    (1, 2, 1, 1, 1, 300, 70, 64, 64),
    (1, 1, 1, 1, 1, 129, 33, 128, 100),
    (2, 2, 1, 2, 2, 257, 64, 40, 64),
    (1, 2, 2, 1, 1, 128, 65, 72, 16),
]


@pytest.mark.parametrize(
    ("dtype", "signed", "masked"),
    [
        *((torch.bfloat16, signed, False) for signed in (False, True)),
        *((torch.float16, signed, True) for signed in (False, True)),
    ],
    ids=str,
)
@pytest.mark.parametrize("sizes", PREFIX_MMA, ids=str)
def test_attend_prefix_on_tensor_cores(
    library: Any, generator: torch.Generator, sizes: tuple[int, ...], dtype: torch.dtype, signed: bool, masked: bool
) -> None:
    ops = EmulatedOps(library, seed=5, compute_capability=90 if sizes[6] % 2 else 80)
    q, k, v, *rest, keep, scale, _ = _prefix_inputs(generator, dtype, sizes, masked, signed)
    if keep is not None:
        k, v = (x.masked_fill(~keep[:, None, :, None], math.nan) for x in (k, v))
    z, _, *ends = check(ops, "attend_prefix", q, k, v, *rest, keep, scale, signed)
    assert ops.counters.mma > 0
    of_ends = [torch.randn(x.shape, generator=generator) for x in ends]
    data = q, k, v, *rest, keep
    exact_lse = _composite.attend_prefix(*_map(Tensor.double, data), scale, signed)[1].float()
    dz = _tokens(generator, dtype, *z.shape)
    check(ops, "attend_prefix_backward", dz, *of_ends, *data, exact_lse, scale, signed)


@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
def test_attend_prefix_after_a_million_tokens(library: Any, generator: torch.Generator, dtype: torch.dtype) -> None:
    """Sums beyond what 16 bits hold: means go to the tensor cores, and weights of single tokens are tiny."""
    q, k, v, phi, kc, vc, mass, bias, _, scale, _ = _prefix_inputs(generator, dtype, PREFIX_MMA[0], False, False)
    many = 200_000.0
    data = q, k, v, phi, kc * many, vc * many, mass * many, bias, None
    ops = EmulatedOps(library)
    z, lse, *ends = check(ops, "attend_prefix", *data, scale, False)
    assert all(bool(x.isfinite().all()) for x in (z, lse, *ends))
    of_ends = [torch.zeros_like(x) for x in ends]
    exact_lse = _composite.attend_prefix(*_map(Tensor.double, data), scale, False)[1].float()
    dz = _tokens(generator, dtype, *z.shape)
    arguments = dz, *of_ends, *data, exact_lse, scale, False
    exact = _composite.attend_prefix_backward(*_map(Tensor.double, arguments))
    for i, (a, b) in enumerate(zip(ops.attend_prefix_backward(*arguments), exact, strict=True)):
        if dtype == torch.float16 and i in (1, 2):
            continue  # gradients of single tokens among so many are below the smallest numbers of fp16
        assert_accurate(f"attend_prefix_backward[{i}]", a, b, dtype=dtype)  # plain torch in 16 bits has no such sums


def test_prefix_masses_that_are_subnormal(library: Any, generator: torch.Generator) -> None:
    """What a softmax leaves of a distant logit: too little to be seen, and no row may become NaN by it."""
    q, k, v, phi, *_, scale, _ = _prefix_inputs(generator, torch.bfloat16, PREFIX_MMA[0], False, False)
    phi = phi.bfloat16()
    phi[..., 0::3], phi[..., 1::3] = 1e-39, 2e-40
    state = [torch.zeros(1, 1, *s) for s in ((70, 64), (70, 64), (70,))]
    data = q, k, v, phi, *state, None, None
    ops = EmulatedOps(library)
    z, lse, *ends = check(ops, "attend_prefix", *data, scale, False)
    of_ends = [torch.zeros_like(x) for x in ends]
    gradients = ops.attend_prefix_backward(z, *of_ends, *data, lse, scale, False)
    assert all(bool(x.isfinite().all()) for x in (z, lse, *ends, *gradients) if x is not None)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_prefix_values_that_are_alike(library: Any, generator: torch.Generator, dtype: torch.dtype) -> None:
    """A mean of equal values is that value, however phi is rounded: masses are those of the rounded phi."""
    q, k, v, phi, *_, scale, _ = _prefix_inputs(generator, dtype, PREFIX_MMA[0], False, False)
    v = torch.full_like(v, 1.5)
    state = [torch.zeros(1, 1, *s) for s in ((70, 64), (70, 64), (70,))]
    z = EmulatedOps(library).attend_prefix(q, k, v, phi.float(), *state, None, None, scale, False)[0]
    assert (z.float() - 1.5).abs().max() <= 1.5 * torch.finfo(dtype).eps


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_attend_prefix_in_parts_is_the_same(library: Any, generator: torch.Generator, dtype: torch.dtype) -> None:
    """Batch elements and key heads that go together in one call, and each in a call of its own, bit for bit."""
    ops = EmulatedOps(library)
    *data, bias, keep, scale, signed = _prefix_inputs(generator, dtype, PREFIX[0], True, False)
    together = ops.attend_prefix(*data, bias, keep, scale, signed)
    for b in range(2):
        alone = ops.attend_prefix(*(x[b : b + 1] for x in data), bias, keep[b : b + 1], scale, signed)
        assert all(torch.equal(x[b : b + 1], y) for x, y in zip(together, alone, strict=True))


@pytest.mark.parametrize("width", [64, 128])
def test_bank_conflicts_of_the_prefix_form(library: Any, generator: torch.Generator, width: int) -> None:
    inputs = _prefix_inputs(generator, torch.float16, (1, 2, 1, 1, 1, 200, 70, width, width), True, False)
    ops = EmulatedOps(library, count_bank_conflicts=True)
    _check_bank_conflicts(ops, "attend_prefix", *inputs)
    z, lse, *ends = _composite.attend_prefix(*inputs)
    _check_bank_conflicts(ops, "attend_prefix_backward", z, *ends, *inputs[:-2], lse, *inputs[-2:])


def test_order_of_threads_does_not_matter_to_the_prefix_form(library: Any, generator: torch.Generator) -> None:
    inputs = _prefix_inputs(generator, torch.bfloat16, (1, 4, 2, 2, 1, 260, 40, 48, 64), True, False)
    weights = _decoder(generator, (4, 2, 1, 1, 50, 64, 30))
    z, lse, *ends = _composite.attend_prefix(*inputs)
    of_inputs = 1 - z, *ends, *inputs[:-2], lse, *inputs[-2:]
    emulated = (EmulatedOps(library, seed=seed) for seed in (0, 1, 2))
    first, *others = (
        (*ops.attend_prefix_decode(*inputs, *weights, True), *ops.attend_prefix_backward(*of_inputs))
        for ops in emulated
    )
    assert all(torch.equal(a, b) for other in others for a, b in zip(first, other, strict=True))


def _assert_pair(
    library: Any, ops: EmulatedOps, attend: str, inputs: Sequence[Any], weights: Sequence[Tensor], one_kernel: bool
) -> None:
    """`attend`_decode gives what `attend` and decode give one after the other, to the bit, from `one_kernel` or two."""
    out, *rest = check(ops, f"{attend}_decode", *inputs, *weights, True)
    fused_launches = ops.counters.launches
    alone = getattr(ops, attend)(*inputs)
    attend_launches = ops.counters.launches
    assert all(torch.equal(a, b) for a, b in zip(rest, alone, strict=True))
    if one_kernel:
        plain = EmulatedOps(library, compute_capability=80)  # on 90 decode alone sums in the order of warpgroups
        assert torch.equal(out, plain.decode(rest[0], *weights))
        weights_packed = fused_launches - attend_launches  # copies to vector rows: no kernel beyond
        assert weights_packed < plain.counters.launches
    else:
        assert torch.equal(out, ops.decode(rest[0], *weights))
        assert fused_launches == attend_launches + ops.counters.launches
    again = getattr(ops, f"{attend}_decode")(*inputs, *weights, False)
    assert torch.equal(again[0], out) and again[1].shape == (0,)
    assert all(torch.equal(a, b) for a, b in zip(again[2:], alone[1:], strict=True))


# Sizes of PREFIX, then heads, layers, layers of S, layers of B, coefficients, outputs of the decoder; whether it is one
# kernel in 16 bits.
PREFIX_DECODE = [
    ((1, 2, 1, 2, 1, 150, 13, 20, 24), (1, 3, 1, 1, 33, 16), True),
    ((1, 2, 1, 1, 1, 131, 33, 64, 60), (2, 2, 2, 2, 128, 50), True),
    ((1, 1, 1, 1, 1, 130, 70, 128, 100), (1, 2, 1, 1, 64, 128), True),
    ((1, 1, 1, 1, 1, 1, 2, 8, 8), (1, 1, 1, 1, 8, 8), True),
    ((1, 1, 1, 1, 1, 40, 5, 128, 100), (1, 2, 1, 1, 70, 128), False),
    ((1, 2, 1, 1, 1, 40, 5, 32, 32), (2, 2, 1, 1, 256, 32), False),
]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("sizes,decoder,fused", PREFIX_DECODE, ids=str)
def test_attend_prefix_decode(
    library: Any,
    generator: torch.Generator,
    sizes: tuple[int, ...],
    decoder: tuple[int, ...],
    fused: bool,
    dtype: torch.dtype,
) -> None:
    ops = EmulatedOps(library, seed=13, compute_capability=90)
    inputs = _prefix_inputs(generator, dtype, sizes, True, False)
    heads, layers, s_layers, b_layers, coefficients, outputs = decoder
    weights = _decoder(generator, (heads, layers, s_layers, b_layers, coefficients, sizes[-1], outputs))
    _assert_pair(library, ops, "attend_prefix", inputs, weights, fused and dtype != torch.float32)


SIXTEEN_BITS = [torch.bfloat16, torch.float16]


@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
def test_causal_values_that_are_alike(library: Any, generator: torch.Generator, dtype: torch.dtype) -> None:
    """As above. dq is summed before its shift is known."""
    *data, bias, _, scale = _causal_inputs(generator, dtype, (1, 2, 1, 1, 70, 70, 16, 1, 5, 0, 16, 16), True)[:8]
    data[2], data[4] = ((3 + v / 32).to(dtype) for v in (data[2], data[4]))
    numbers = scale, 16, 1, 5
    z, lse = _composite.attend_causal(*data, bias, None, *numbers)
    arguments = _tokens(generator, dtype, *z.shape), *data, bias, None, z, lse, *numbers
    got = EmulatedOps(library).attend_causal_backward(*arguments)
    exact = _composite.attend_causal_backward(*_map(Tensor.double, arguments))
    plain = _composite.attend_causal_backward(*arguments)
    for i in range(5):
        assert_accurate(f"attend_causal_backward[{i}]", got[i], exact[i], plain[i])


@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
def test_order_of_threads_does_not_matter_to_the_causal_form(
    library: Any, generator: torch.Generator, dtype: torch.dtype
) -> None:
    *inputs, size, window, rows = _causal_inputs(generator, dtype, (1, 4, 2, 2, 261, 270, 16, 1, 12, 3, 64, 40), True)
    results = []
    for seed in (0, 1, 2):
        ops = EmulatedOps(library, seed=seed)
        z, lse = ops.attend_causal(*inputs, size, window, rows)
        *tensors, scale = inputs
        results.append((z, lse, *ops.attend_causal_backward(1 - z, *tensors, z, lse, scale, size, window, rows)))
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@pytest.mark.parametrize("width", [64, 128])
def test_bank_conflicts_of_the_causal_form(library: Any, generator: torch.Generator, width: int) -> None:
    sizes = (1, 2, 1, 2, 150, 150, 16, 1, 16, 0, width, width)
    *tensors, scale, size, window, rows = _causal_inputs(generator, torch.float16, sizes, True)
    z, lse = _composite.attend_causal(*tensors, scale, size, window, rows)
    ops = EmulatedOps(library, count_bank_conflicts=True)
    _check_bank_conflicts(ops, "attend_causal", *tensors, scale, size, window, rows)
    _check_bank_conflicts(ops, "attend_causal_backward", z, *tensors, z, lse, scale, size, window, rows)


# Every compiled size with its padding, measurements resident, resident without a second stage, and streamed; runs of
# units that end inside a block.
MMA_ATTEND = [
    (1, 2, 1, 70, 130, 64, 64),
    (1, 1, 1, 300, 70, 32, 30),
    (1, 2, 2, 33, 40, 80, 72),
    (1, 1, 1, 40, 257, 96, 90),
    (2, 1, 1, 50, 33, 128, 128),
    (1, 1, 1, 20, 600, 128, 100),
]


def _on_tensor_cores(ops: EmulatedOps) -> bool:
    return ops.counters.mma > 0


@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.parametrize("dtype", SIXTEEN_BITS, ids=str)
@pytest.mark.parametrize("sizes", MMA_ATTEND, ids=str)
def test_attend_on_tensor_cores(
    library: Any, generator: torch.Generator, sizes: tuple[int, ...], dtype: Any, capability: int
) -> None:
    """On 90 D = 64 and 128 take warpgroup products, with an odd and an even number of units a block."""
    ops = EmulatedOps(library, seed=5, compute_capability=capability)
    check(ops, "attend", *_attend_inputs(generator, dtype, sizes, "masked"))
    assert _on_tensor_cores(ops)


@pytest.mark.parametrize("scale", [0.2, 0.0, -0.2])
@pytest.mark.parametrize("measurements", [192, 150])
def test_attend_on_hopper_follows_peaks_that_grow(
    library: Any, generator: torch.Generator, measurements: int, scale: float
) -> None:
    """By more and by less than the slack within which z keeps its scale, from chunk to chunk; scales of every sign."""
    q, kc, vc, *_ = _attend_inputs(generator, torch.bfloat16, (1, 1, 1, 70, measurements, 64, 64), "none")
    kc[:, :, 64:128] *= 2
    kc[:, :, 128:] *= torch.linspace(0, 8, measurements - 128)[:, None].to(kc.dtype)
    check(EmulatedOps(library, compute_capability=90), "attend", q, kc, vc, None, scale)


# heads, heads of k, queries, measurements, head dim, features: rings of four chunks and of three; rounds in which every
# warpgroup has a unit and in which some have none; blocks that go on to another pair in the middle of a ring.
STREAMED = [
    (2, 1, 70, 600, 128, 100),
    (1, 1, 900, 530, 128, 128),
    (3, 1, 450, 1100, 120, 128),
    (1, 1, 520, 700, 64, 64),
    (3, 3, 140, 1500, 50, 57),
]


@pytest.mark.parametrize("dtype", SIXTEEN_BITS, ids=str)
@pytest.mark.parametrize("sizes", STREAMED, ids=str)
def test_attend_on_hopper_streams_measurements_that_do_not_fit(
    library: Any, generator: torch.Generator, sizes: tuple[int, ...], dtype: torch.dtype
) -> None:
    heads, _, queries, m, head_dim, _ = sizes
    inputs = _attend_inputs(generator, dtype, (1, *sizes), "masked" if heads > 1 else "none")
    ops = EmulatedOps(library, compute_capability=90)
    expected = check(ops, "attend", *inputs)
    units, chunks, feature = heads * -(-queries // 64), -(-m // 64), 64 if head_dim <= 64 else 128
    assert ops.counters.mma == units * chunks * (feature + 64) // 16  # products of a warpgroup
    shuffled = EmulatedOps(library, seed=5, compute_capability=90).attend(*inputs)
    assert all(torch.equal(a, b) for a, b in zip(expected, shuffled, strict=True))


def test_attend_on_hopper_takes_expanded_tensors(library: Any, generator: torch.Generator) -> None:
    """Axes of stride 0, which tensor copies do not know: heads, batch elements, rows."""
    ops = EmulatedOps(library, compute_capability=90)
    q = _tokens(generator, torch.bfloat16, 1, 2, 70, 64).expand(2, 2, 70, 64)
    kc = _tokens(generator, torch.bfloat16, 2, 1, 90, 64).expand(2, 2, 90, 64)
    vc = _tokens(generator, torch.bfloat16, 2, 2, 1, 64).expand(2, 2, 90, 64)
    got = check(ops, "attend", q, kc, vc, None, 0.125)
    expected = ops.attend(q.contiguous(), kc.contiguous(), vc.contiguous(), None, 0.125)
    assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))


def test_sizes_beyond_the_tensor_cores_run_on_the_others(library: Any, generator: torch.Generator) -> None:
    ops = EmulatedOps(library)
    z, _ = check(ops, "attend", *_attend_inputs(generator, torch.bfloat16, (1, 2, 1, 9, 13, 132, 24), "finite"))
    check(ops, "decode", z, *_decoder(generator, (1, 2, 1, 1, 260, 24, 18)))
    assert not _on_tensor_cores(ops)


# heads, layers, layers of S, layers of B, coefficients, features, outputs
MMA_DECODERS = [
    (1, 3, 1, 1, 64, 64, 64),
    (2, 3, 1, 1, 128, 64, 60),
    (1, 2, 1, 2, 100, 80, 70),
    (1, 2, 1, 1, 256, 64, 33),
]


@pytest.mark.parametrize("dtype", SIXTEEN_BITS, ids=str)
@pytest.mark.parametrize("sizes", MMA_DECODERS, ids=str)
def test_decode_on_tensor_cores(library: Any, generator: torch.Generator, sizes: tuple[int, ...], dtype: Any) -> None:
    ops = EmulatedOps(library, seed=5, compute_capability=90 if sizes[4] > 128 else 80)  # for the shared memory
    check(ops, "decode", _tokens(generator, dtype, 1, 2, 41, sizes[5]), *_decoder(generator, sizes))
    assert _on_tensor_cores(ops)


# batch, heads, queries; the decoder's sizes. Every compiled size with its padding, S and B tied or not.
WARPGROUP_DECODERS = [
    ((1, 1, 1), (1, 1, 1, 1, 5, 24, 30)),
    ((2, 2, 70), (2, 3, 3, 3, 64, 17, 60)),
    ((1, 3, 1100), (3, 2, 1, 1, 20, 64, 18)),  # three groups of rows; a warpgroup walks several tiles
    ((1, 2, 800), (1, 3, 1, 3, 100, 60, 64)),
    ((1, 1, 1100), (1, 4, 4, 4, 128, 40, 64)),  # and without room for the next one
    ((2, 1, 90), (1, 3, 1, 1, 33, 128, 80)),
    ((1, 2, 70), (1, 3, 1, 1, 128, 128, 128)),
    ((1, 2, 90), (2, 3, 3, 1, 65, 70, 100)),
]


@pytest.mark.parametrize("dtype", SIXTEEN_BITS, ids=str)
@pytest.mark.parametrize("shape,sizes", WARPGROUP_DECODERS, ids=str)
def test_decode_on_warpgroups(
    library: Any, generator: torch.Generator, shape: tuple[int, int, int], sizes: tuple[int, ...], dtype: Any
) -> None:
    ops = EmulatedOps(library, seed=5, compute_capability=90)
    check(ops, "decode", _tokens(generator, dtype, *shape, sizes[5]), *_decoder(generator, sizes))
    assert _on_tensor_cores(ops)


def test_products_of_decode_are_warpgroups_on_hopper(library: Any, generator: torch.Generator) -> None:
    """Of 64 rows, P = 64, three layers: B z, S a_1, S a_2, psi a_3, each 4 of 64 x 64 x 16."""
    ops = EmulatedOps(library, compute_capability=90)
    ops.decode(_tokens(generator, torch.bfloat16, 1, 1, 64, 64), *_decoder(generator, (1, 3, 1, 1, 64, 64, 64)))
    assert ops.counters.mma == 16


@pytest.mark.parametrize("sizes", [(2, 3, 1, 1, 64, 24, 33), (1, 2, 2, 2, 128, 24, 72)], ids=str)
def test_decode_on_warpgroups_is_the_same_from_any_layout(
    library: Any, generator: torch.Generator, sizes: tuple[int, ...]
) -> None:
    """Gaps between elements, (B, N, H, D), axes of stride 0, weights in 16 bits, any order of threads: bitwise."""
    one = _tokens(generator, torch.float16, 1, 2, 1, sizes[5])
    z, weights = one.expand(2, 2, 90, sizes[5]), [w.half().float() for w in _decoder(generator, sizes)]
    row = EmulatedOps(library, compute_capability=90).decode(one, *weights)
    views = [z, z.contiguous(), _strided(z), z.transpose(1, 2).contiguous().transpose(1, 2)]
    for seed, view in enumerate(views):
        ops = EmulatedOps(library, seed=seed, compute_capability=90)
        for parameters in (weights, [w.half() for w in weights], [w.mT.contiguous().mT for w in weights]):
            assert torch.equal(ops.decode(view, *parameters), row.expand(2, 2, 90, sizes[6]))


# heads, layers, layers of S, layers of B, coefficients (and outputs), features; of every family and compiled size.
WITHOUT_PSI = [(1, 3, 1, 1, 64, 64), (2, 2, 1, 1, 33, 24), (1, 3, 3, 3, 100, 60), (1, 2, 1, 1, 128, 128)]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.parametrize("sizes", WITHOUT_PSI, ids=str)
def test_without_psi_it_is_the_identity(
    library: Any, generator: torch.Generator, sizes: tuple[int, ...], capability: int, dtype: torch.dtype
) -> None:
    """Bit for bit what the identity matrix gives, and every gradient but that of psi."""
    ops = EmulatedOps(library, seed=5, compute_capability=capability)
    atoms = sizes[4]
    S, B, theta, psi, step = _decoder(generator, (*sizes, atoms))
    identity = torch.eye(atoms).expand_as(psi)
    z, dc = _tokens(generator, dtype, 1, 2, 70, sizes[5]), _tokens(generator, dtype, 1, 2, 70, atoms)
    assert torch.equal(ops.decode(z, S, B, theta, None, step), ops.decode(z, S, B, theta, identity, step))
    pairs = [ops.decode_backward(dc, z, S, B, theta, own, step) for own in (None, identity)]
    for name, a, b in zip(("dz", "dS", "dB", "dtheta", "dpsi", "dstep"), *pairs, strict=True):
        assert a.shape == (0,) if name == "dpsi" else torch.equal(a, b), name
    inputs = _attend_inputs(generator, dtype, (1, 2, 1, 40, 20, sizes[5], sizes[5]), "finite")
    for need_z in (True, False):
        fused = [ops.attend_decode(*inputs, S, B, theta, own, step, need_z) for own in (None, identity)]
        assert all(torch.equal(a, b) for a, b in zip(*fused, strict=True))


def test_without_psi_its_products_are_not_made(library: Any, generator: torch.Generator) -> None:
    """Of 64 rows, P = 64, two layers: B z, S a_1, each 4 of 64 x 64 x 16; back all but g and dpsi, 2 of 10."""
    ops = EmulatedOps(library, compute_capability=90)
    dc, z, S, B, theta, _, step = _settled_decode(generator, torch.bfloat16, (1, 1, 64), (1, 2, 1, 1, 64, 64, 64))
    ops.decode(z, S, B, theta, None, step)
    assert ops.counters.mma == 8
    ops.decode_backward(dc, z, S, B, theta, None, step)
    assert ops.counters.mma == 32


# sizes of attend, of the decoder: one kernel; a pair, because z leaves no registers; a pair whose decoder is too large;
# one kernel that keeps B z on Hopper; one that does not
FUSED = [
    ((1, 2, 1, 75, 70, 64, 64), (2, 3, 1, 1, 128, 64, 50)),
    ((1, 2, 2, 33, 40, 128, 100), (1, 2, 2, 1, 64, 100, 128)),
    ((1, 2, 1, 20, 13, 32, 24), (1, 2, 1, 1, 260, 24, 18)),
    ((1, 1, 1, 330, 200, 40, 64), (1, 3, 1, 1, 64, 64, 60)),
    ((2, 1, 1, 65, 30, 100, 128), (1, 3, 1, 3, 50, 128, 100)),
]


@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.parametrize("attend,decoder", FUSED, ids=str)
def test_fused_on_tensor_cores_equals_the_pair(
    library: Any, generator: torch.Generator, attend: tuple[int, ...], decoder: tuple[int, ...], capability: int
) -> None:
    ops = EmulatedOps(library, seed=5, compute_capability=capability)
    inputs, weights = _attend_inputs(generator, torch.bfloat16, attend, "finite"), _decoder(generator, decoder)
    for need_z in (True, False):
        out, z, lse = ops.attend_decode(*inputs, *weights, need_z)
        assert _on_tensor_cores(ops) or decoder[4] > 256
        pair_z, pair_lse = ops.attend(*inputs)
        assert torch.equal(out, ops.decode(pair_z, *weights))
        assert torch.equal(lse, pair_lse)
        assert torch.equal(z, pair_z) if need_z else z.shape == (0,)


def test_attend_takes_strided_tensors_and_no_bias(ops: EmulatedOps, generator: torch.Generator) -> None:
    q, kc, vc, _, scale = _attend_inputs(generator, torch.bfloat16, (2, 2, 2, 11, 9, 12, 10), "none")
    strided = _strided(q), _strided(kc), _strided(vc), None, scale
    z, lse = check(ops, "attend", *strided)
    assert torch.equal(z, ops.attend(q, kc, vc, None, scale)[0])
    check(ops, "attend_backward", _strided(_tokens(generator, q.dtype, *z.shape)), *strided[:4], z, lse, scale)


@pytest.mark.parametrize("width", [24, 20])
@pytest.mark.parametrize(
    ("dtype", "capability"), [(torch.float32, 90), (torch.float16, 80), (torch.float16, 90)], ids=str
)
def test_rows_are_read_and_written_where_they_lie(
    library: Any, generator: torch.Generator, dtype: torch.dtype, capability: int, width: int
) -> None:
    """The heads of a token side by side, as a layer has them: bitwise what contiguous rows give, lying as those do."""
    ops, rows, m = EmulatedOps(library, compute_capability=capability), 37, 9
    q, kc, vc, bias, scale = attend = _attend_inputs(generator, dtype, (2, 2, 2, rows, m, width, width), "finite")
    k, v, dz = (_tokens(generator, dtype, 2, 2, rows, width) for _ in range(3))
    weights, phi = _decoder(generator, (1, 2, 1, 1, 16, width, width)), _tokens(generator, dtype, 1, 2, m, rows)
    blocks = 8, 1, 3  # three measurements of each of three blocks
    causal = q, kc, vc, k, v, bias, None, scale, *blocks
    prefix = _prefix_inputs(generator, dtype, (2, 2, 2, 2, 1, rows, m, width, width), False, False)
    z, lse = ops.attend(*attend)
    z_causal, lse_causal = ops.attend_causal(*causal)
    lse_prefix = ops.attend_prefix(*prefix)[1]
    calls: dict[str, tuple[Any, ...]] = {
        "project_backward": (kc, k, phi, None, True, False),
        "attend": attend,
        "attend_decode": (*attend, *weights, True),
        "attend_backward": (dz, q, kc, vc, bias, z, lse, scale),
        "attend_causal": causal,
        "attend_causal_decode": (*causal, *weights, True),
        "attend_causal_backward": (dz, *causal[:7], z_causal, lse_causal, scale, *blocks),
        "attend_prefix": prefix,
        "attend_prefix_decode": (*prefix, *weights, True),
        "attend_prefix_backward": (dz, *prefix[4:7], *prefix[:9], lse_prefix, scale, False),
        "decode": (z, *weights),
        "decode_backward": (dz, z, *weights),
    }

    def is_rows(x: Any) -> bool:
        return isinstance(x, Tensor) and x.shape == (2, 2, rows, width)

    for name, arguments in calls.items():
        beside = [x.transpose(1, 2).contiguous().transpose(1, 2) if is_rows(x) else x for x in arguments]
        results = [getattr(ops, name)(*given) for given in (arguments, beside)]
        assert ops.counters.mma > 0 or dtype == torch.float32 or name == "project_backward", name
        pairs = zip(*((r,) if isinstance(r, Tensor) else r for r in results), strict=True)
        for i, (a, b) in enumerate(pairs):
            assert torch.equal(a, b), f"{name}[{i}]"
            assert not is_rows(a) or (a.is_contiguous() and b.stride(1) == width), f"{name}[{i}]"


# heads, layers, layers of S, layers of B, coefficients, features, outputs
DECODERS = [(1, 3, 1, 1, 33, 24, 18), (2, 2, 2, 2, 17, 24, 70), (2, 1, 1, 1, 5, 24, 1), (1, 3, 1, 3, 66, 24, 24)]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("sizes", DECODERS, ids=str)
def test_decode(ops: EmulatedOps, generator: torch.Generator, sizes: tuple[int, ...], dtype: torch.dtype) -> None:
    z, weights = _tokens(generator, dtype, 2, 2, 9, 24), _decoder(generator, sizes)
    out = check(ops, "decode", z, *weights)
    if dtype == torch.float32:
        check(ops, "decode_backward", _tokens(generator, dtype, *out.shape), z, *weights)


def _settled_decode(
    generator: torch.Generator, dtype: torch.dtype, shape: tuple[int, int, int], sizes: tuple[int, ...]
) -> tuple[Tensor, ...]:
    weights = _decoder(generator, sizes)
    return settled_decode(_tokens(generator, dtype, *shape, sizes[5]), weights, generator)


def check_decode_backward(ops: EmulatedOps, dc: Tensor, z: Tensor, *weights: Tensor) -> tuple[Tensor, ...]:
    """The tolerance rule against a decoder of stock torch operations in the dtype of z, parameters' gradients too."""
    got = ops.decode_backward(dc, z, *weights)
    exact = _composite.decode_backward(*(t.double() for t in (dc, z, *weights)))
    plain = plain_torch_decode_backward(dc, z, *weights)
    for name, a, b, c in zip(("dz", "dS", "dB", "dtheta", "dpsi", "dstep"), got, exact, plain, strict=True):
        assert_accurate(name, a.to(z.dtype), b, c)
    return got


# batch, heads, queries; heads of the decoder, layers, layers of S, layers of B, coefficients, features, outputs
ON_TENSOR_CORES = [
    ((1, 1, 1), (1, 1, 1, 1, 5, 24, 1)),
    ((2, 2, 9), (1, 3, 1, 1, 33, 24, 18)),
    ((1, 2, 40), (2, 2, 2, 1, 64, 64, 64)),
    ((1, 1, 70), (1, 4, 1, 4, 100, 17, 40)),
    ((1, 1, 33), (1, 2, 2, 2, 128, 70, 24)),
    ((1, 1, 35), (1, 3, 3, 3, 128, 40, 64)),
    ((1, 2, 17), (2, 2, 1, 2, 200, 24, 100)),  # psi takes the place of B in shared memory
    ((1, 1, 20), (1, 2, 2, 2, 256, 64, 33)),
    ((1, 1, 700), (1, 1, 1, 1, 40, 24, 70)),  # two chunks; a warp walks two tiles of the first
    ((1, 3, 150), (3, 2, 2, 1, 128, 8, 8)),  # three groups of rows, two chunks
]
ON_CORES = [((1, 2, 9), (1, 2, 1, 1, 260, 24, 18)), ((1, 2, 9), (2, 2, 2, 2, 17, 130, 24))]
ON_WARPGROUPS = [
    ((1, 1, 1), (1, 1, 1, 1, 5, 24, 1)),
    ((2, 2, 9), (1, 3, 1, 1, 33, 24, 18)),
    ((2, 2, 70), (2, 2, 1, 1, 64, 17, 64)),
    ((1, 3, 300), (1, 1, 1, 1, 40, 24, 60)),  # a team walks several tiles, the next one on its way
    ((1, 2, 40), (1, 5, 1, 1, 64, 64, 64)),  # and without room for it
    ((1, 2, 40), (1, 3, 1, 1, 128, 128, 128)),
    ((2, 2, 90), (2, 2, 1, 1, 100, 60, 70)),
    ((1, 1, 700), (1, 1, 1, 1, 65, 24, 70)),  # two chunks
]


@pytest.mark.parametrize("dtype", SIXTEEN_BITS, ids=str)
@pytest.mark.parametrize("shape,sizes", ON_WARPGROUPS, ids=str)
def test_decode_backward_on_warpgroups(
    library: Any,
    generator: torch.Generator,
    shape: tuple[int, int, int],
    sizes: tuple[int, ...],
    dtype: torch.dtype,
) -> None:
    ops = EmulatedOps(library, seed=5, compute_capability=90)
    check_decode_backward(ops, *_settled_decode(generator, dtype, shape, sizes))


def test_products_of_decode_backward_are_warpgroups_on_hopper(library: Any, generator: torch.Generator) -> None:
    """Of 64 rows, P = 64, two layers: B z, S a_1, g, es S, dS, two of dB, two of dz, dpsi, each 4 of 64 x 64 x 16."""
    ops = EmulatedOps(library, compute_capability=90)
    ops.decode_backward(*_settled_decode(generator, torch.bfloat16, (1, 1, 64), (1, 2, 1, 1, 64, 64, 64)))
    assert ops.counters.mma == 40


@pytest.mark.parametrize("dtype", SIXTEEN_BITS, ids=str)
@pytest.mark.parametrize("size", [64, 128])
def test_decode_backward_on_warpgroups_recomputes_the_iterates(
    library: Any, generator: torch.Generator, size: int, dtype: torch.dtype
) -> None:
    """Those of decode and attend_decode, bit for bit: a coefficient at its threshold is on in all passes or off."""
    ops = EmulatedOps(library, seed=5, compute_capability=90)
    S, B, theta, psi, step = _decoder(generator, (1, 3, 1, 1, size, size, size))
    inputs = _attend_inputs(generator, dtype, (1, 1, 1, size, 20, size, size), "finite")
    coefficients, z, _ = ops.attend_decode(*inputs, S, B, theta, torch.eye(size)[None], step, True)
    assert torch.equal(ops.decode(z, S, B, theta, torch.eye(size)[None], step), coefficients)
    dpsi = ops.decode_backward(torch.eye(size, dtype=dtype)[None, None], z, S, B, theta, psi, step)[4]
    assert bool((coefficients == 0).any())
    assert torch.equal(dpsi[0].to(dtype), coefficients[0, 0])


@pytest.mark.parametrize("dtype", SIXTEEN_BITS, ids=str)
@pytest.mark.parametrize("shape,sizes", ON_TENSOR_CORES + ON_CORES, ids=str)
def test_decode_backward_in_16_bits(
    library: Any,
    generator: torch.Generator,
    shape: tuple[int, int, int],
    sizes: tuple[int, ...],
    dtype: torch.dtype,
) -> None:
    ops = EmulatedOps(library, seed=5, compute_capability=90 if sizes[4] > 128 else 80)  # for the shared memory
    check_decode_backward(ops, *_settled_decode(generator, dtype, shape, sizes))
    assert _on_tensor_cores(ops) == ((shape, sizes) in ON_TENSOR_CORES)


@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.parametrize("theta", [0.0, math.inf])
@pytest.mark.parametrize("step", [0.0, 1.0])
def test_decode_backward_at_the_ends_of_thresholds_and_steps(
    ops: EmulatedOps, generator: torch.Generator, theta: float, step: float, capability: int
) -> None:
    """No threshold, every coefficient off, a layer that changes nothing: its step still has a gradient."""
    ops.compute_capability = capability
    dc, z, S, B, thresholds, psi, steps = _settled_decode(generator, torch.bfloat16, (1, 1, 9), (1, 3, 1, 1, 20, 8, 8))
    steps[:, 1] = step
    got = check_decode_backward(ops, dc, z, S, B, torch.full_like(thresholds, theta), psi, steps)
    assert bool((got[-1] != 0).all()) == (theta == 0)
    assert all(bool((g == 0).all()) == (theta > 0) for g in got[:-1])


@pytest.mark.parametrize("dtype", SIXTEEN_BITS, ids=str)
@pytest.mark.parametrize("sizes", [(1, 3, 1, 1, 100, 24, 40), (1, 2, 2, 2, 128, 50, 40), (1, 2, 1, 1, 200, 24, 40)])
def test_decode_backward_recomputes_the_iterates_of_decode(
    library: Any, generator: torch.Generator, sizes: tuple[int, ...], dtype: torch.dtype
) -> None:
    """Bit for bit: a coefficient at its threshold is on in both passes or off in both."""
    ops = EmulatedOps(library, seed=5, compute_capability=90)  # for the shared memory
    S, B, theta, psi, step = _decoder(generator, sizes)
    z = _tokens(generator, dtype, 1, 1, sizes[6], sizes[5])
    coefficients = ops.decode(z, S, B, theta, torch.eye(64, sizes[4])[None], step)
    assert _on_tensor_cores(ops)
    one_row_each = torch.eye(sizes[6], dtype=dtype)[None, None]
    dpsi = ops.decode_backward(one_row_each, z, S, B, theta, psi, step)[4]
    assert torch.equal(dpsi[0, :, :64].to(dtype), coefficients[0, 0])


@pytest.mark.parametrize("capability,b_layers", [(80, 2), (90, 1)])
def test_decode_backward_takes_strided_tensors(
    ops: EmulatedOps, generator: torch.Generator, capability: int, b_layers: int
) -> None:
    ops.compute_capability = capability
    dc, z, *weights = _settled_decode(generator, torch.float16, (2, 2, 11), (2, 2, 1, b_layers, 33, 9, 7))
    plain = ops.decode_backward(dc, z, *weights)
    transposed = [w.mT.contiguous().mT for w in weights[:2]]
    strided = ops.decode_backward(_strided(dc), _strided(z), *transposed, *weights[2:])
    assert all(torch.equal(a, b) for a, b in zip(plain, strided, strict=True))


@pytest.mark.parametrize("capability,s_layers", [(80, 2), (90, 1)])
def test_order_of_threads_does_not_matter_to_decode_backward(
    library: Any, generator: torch.Generator, capability: int, s_layers: int
) -> None:
    arguments = _settled_decode(generator, torch.bfloat16, (1, 2, 90), (1, 2, s_layers, 1, 128, 24, 24))
    emulated = (EmulatedOps(library, seed=seed, compute_capability=capability) for seed in (0, 1, 2))
    first, *others = (ops.decode_backward(*arguments) for ops in emulated)
    assert all(torch.equal(a, b) for other in others for a, b in zip(first, other, strict=True))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_fused_equals_the_pair(ops: EmulatedOps, generator: torch.Generator, dtype: torch.dtype) -> None:
    inputs = _attend_inputs(generator, dtype, (1, 2, 1, 19, 13, 16, 24), "finite")
    weights = _decoder(generator, DECODERS[1])
    out, z, lse = ops.attend_decode(*inputs, *weights, True)
    pair_z, pair_lse = ops.attend(*inputs)
    assert torch.equal(z, pair_z)
    assert torch.equal(lse, pair_lse)
    assert torch.equal(out, ops.decode(z, *weights))
    assert ops.attend_decode(*inputs, *weights, False)[1].shape == (0,)


# Sizes of CAUSAL, then heads, layers, layers of S, layers of B, coefficients, outputs of the decoder; whether it is one
# kernel in 16 bits.
CAUSAL_DECODE = [
    ((1, 2, 1, 2, 150, 150, 16, 0, 3, 0, 20, 24), (1, 3, 1, 1, 33, 16), True),
    ((2, 2, 2, 1, 70, 90, 8, 2, 2, 5, 64, 60), (2, 3, 1, 3, 128, 50), True),
    ((1, 2, 1, 1, 300, 300, 16, 1, 3, 0, 64, 64), (2, 3, 3, 1, 64, 64), True),
    ((1, 1, 1, 1, 33, 40, 40, 0, 40, 0, 80, 72), (1, 2, 1, 1, 70, 80), True),
    ((1, 1, 1, 1, 1, 41, 8, 1, 8, 130, 90, 96), (1, 1, 1, 1, 100, 96), True),
    ((1, 2, 1, 1, 50, 50, 16, 1, 3, 0, 64, 64), (1, 2, 1, 1, 256, 64), False),
    ((1, 1, 1, 1, 50, 60, 16, 1, 3, 2, 128, 100), (1, 2, 1, 1, 64, 128), False),
]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("sizes,decoder,fused", CAUSAL_DECODE, ids=str)
def test_attend_causal_decode(
    library: Any,
    generator: torch.Generator,
    sizes: tuple[int, ...],
    decoder: tuple[int, ...],
    fused: bool,
    dtype: torch.dtype,
) -> None:
    ops = EmulatedOps(library, seed=11, compute_capability=90 if sizes[5] % 20 else 80)
    inputs = _causal_inputs(generator, dtype, sizes, True)
    heads, layers, s_layers, b_layers, coefficients, outputs = decoder
    weights = _decoder(generator, (heads, layers, s_layers, b_layers, coefficients, sizes[-1], outputs))
    _assert_pair(library, ops, "attend_causal", inputs, weights, fused and dtype != torch.float32)
    S, B, theta, psi, step = weights
    identity = torch.eye(coefficients).expand(psi.shape[0], -1, -1)
    without = [ops.attend_causal_decode(*inputs, S, B, theta, own, step, False)[0] for own in (None, identity)]
    assert torch.equal(*without)


# batch, heads of x, batch of phi, heads of phi, tokens, measurements, head dim
PROJECT = [(2, 2, 1, 1, 45, 13, 20), (2, 1, 2, 3, 11, 5, 7), (1, 2, 1, 4, 33, 3, 9), (1, 1, 1, 1, 1, 1, 1)]
# Products in parts of their depth: tokens (one head; a batch and heads that share; groups), and in the backward pass
# measurements and the features of everything that shares a Phi.
IN_PARTS = [(1, 1, 1, 1, 300, 13, 20), (2, 1, 2, 1, 131, 5, 7), (2, 2, 1, 4, 129, 70, 9), (3, 4, 1, 1, 9, 5, 24)]


def _project_inputs(generator: torch.Generator, dtype: torch.dtype, sizes: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    batch, x_heads, phi_batch, phi_heads, tokens, measurements, head_dim = sizes
    x = _tokens(generator, dtype, batch, x_heads, tokens, head_dim)
    return x, _tokens(generator, dtype, phi_batch, phi_heads, measurements, tokens)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("sizes", PROJECT + IN_PARTS, ids=str)
def test_project(ops: EmulatedOps, generator: torch.Generator, sizes: tuple[int, ...], dtype: torch.dtype) -> None:
    x, phi = _project_inputs(generator, dtype, sizes)
    batch, _, tokens, _ = x.shape
    mask = torch.rand(batch, tokens, generator=generator) > 0.2 if tokens > 1 else None
    y = check(ops, "project", x, phi, mask)
    check(ops, "project_backward", _tokens(generator, dtype, *y.shape), x, phi, mask, True, True)


@pytest.mark.parametrize(
    "sizes,launches",
    [
        ((1, 1, 1, 1, 300, 13, 20), 3),  # parts of one depth, what is left, their sum
        ((1, 1, 1, 1, 320, 13, 20), 2),  # nothing is left
        ((1, 2, 1, 2, 128, 13, 20), 4),  # two products, each in parts
        ((1, 2, 1, 2, 63, 13, 20), 1),  # together: parts would be too few
        ((4, 8, 1, 1, 512, 3, 4), 1),  # together: they are many
    ],
)
def test_depth_goes_in_parts_where_products_are_few(
    library: Any, generator: torch.Generator, sizes: tuple[int, ...], launches: int
) -> None:
    ops = EmulatedOps(library)
    check(ops, "project", *_project_inputs(generator, torch.float32, sizes), None)
    assert ops.counters.launches == launches


def test_parts_of_strided_tensors_and_the_order_of_threads(library: Any, generator: torch.Generator) -> None:
    """Bitwise: the sum has a fixed order, and a view read where it lies has the parts of a contiguous tensor."""
    x, phi = _project_inputs(generator, torch.bfloat16, (1, 2, 1, 2, 203, 9, 8))
    dy = _tokens(generator, torch.bfloat16, 1, 2, 9, 8)
    mask = torch.rand(1, 203, generator=generator) > 0.2
    results = [
        (ops.project(x_, phi_, mask_), *ops.project_backward(dy, x_, phi_, mask_, True, True))
        for ops in (EmulatedOps(library, seed=seed) for seed in (0, 1, 2))
        for x_, phi_ in ((x, phi), (_strided(x), phi.mT.contiguous().mT))
        for mask_ in (mask, None)
    ]
    for first, other in zip(results[:2] * 5, results[2:], strict=True):
        assert all(torch.equal(a, b) for a, b in zip(first, other, strict=True))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("sizes", [(6, 1, 2, 5, 150), (3, 3, 2, 4, 33), (1, 1, 1, 1, 1)], ids=str)
def test_renormalise_rows(
    ops: EmulatedOps, generator: torch.Generator, sizes: tuple[int, ...], dtype: torch.dtype
) -> None:
    batch, phi_batch, heads, rows, tokens = sizes
    phi = _strided(_tokens(generator, dtype, phi_batch, heads, rows, tokens))
    phi[:, :, ::2].abs_()  # rows that average
    phi[..., : tokens // 2] = 0
    mask = torch.rand(batch, tokens, generator=generator) > 0.3
    mask[0, tokens // 2 :] = False
    factor, _ = check(ops, "renormalise_rows", phi, mask)
    assert not factor[0].any() and (batch == 1 or factor.any())


# batch, heads of x, heads of phi, tokens, measurements, head dim
IMPLICIT = [(2, 2, 1, 1100, 5, 20), (1, 1, 3, 45, 13, 7), (3, 2, 2, 70, 66, 17), (1, 1, 1, 1, 1, 1)]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("sizes", IMPLICIT, ids=str)
@pytest.mark.parametrize("ensemble", ["rademacher", "srht", "pool"])
def test_project_implicit(
    ops: EmulatedOps, generator: torch.Generator, ensemble: str, sizes: tuple[int, ...], dtype: torch.dtype
) -> None:
    batch, x_heads, heads, tokens, measurements, head_dim = sizes
    x = _tokens(generator, dtype, batch, x_heads, tokens, head_dim)
    counts = anchors = None
    if tokens > 1:
        keep = torch.rand(batch, tokens, generator=generator) > 0.2
        keep[:, [0, -1]] = False
        counts = torch.nn.functional.pad(keep.cumsum(-1), (1, 0)).int()
        anchors = torch.tensor([[0, -1, tokens - 1]], dtype=torch.int32)
        x[:, :, 1:-1].masked_fill_(~keep[:, None, 1:-1, None], math.nan)
    draw = (ensemble, measurements, heads, -3, 2)
    y = check(ops, "project_implicit", _strided(x), counts, anchors, *draw)
    dy = _strided(_tokens(generator, dtype, *y.shape))
    check(ops, "project_implicit_backward", dy, counts, anchors, ensemble, heads, -3, 2, x_heads, tokens)


def _check_empty(ops: EmulatedOps, name: str, *arguments: Any) -> Any:
    """Every element written (memory of the emulator starts unwritten), and with what plain torch gives."""
    got = getattr(ops, name)(*arguments)
    for a, b in zip(
        *([t] if isinstance(t, Tensor) else t for t in (got, getattr(_composite, name)(*arguments))), strict=True
    ):
        assert torch.equal(a, b), name
    return got


@pytest.mark.parametrize("parameter", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    "sizes",
    [(0, 2, 1, 1, 5, 3, 4), (2, 2, 1, 4, 0, 3, 4), (2, 2, 1, 2, 5, 0, 4), (2, 2, 1, 4, 5, 0, 4), (2, 2, 2, 1, 5, 3, 0)],
)
def test_project_of_nothing_is_zero(library: Any, sizes: tuple[int, ...], parameter: torch.dtype) -> None:
    batch, x_heads, phi_batch, phi_heads, tokens, measurements, head_dim = sizes
    ops = EmulatedOps(library)
    x = torch.ones(batch, x_heads, tokens, head_dim, dtype=torch.bfloat16)
    phi = torch.ones(phi_batch, phi_heads, measurements, tokens, dtype=parameter)
    for mask in (None, torch.ones(batch, tokens, dtype=torch.bool)):
        y = _check_empty(ops, "project", x, phi, mask)
        _check_empty(ops, "project_backward", torch.ones_like(y), x, phi, mask, True, True)


@pytest.mark.parametrize("ensemble", ["rademacher", "srht", "pool"])
@pytest.mark.parametrize("sizes", [(0, 2, 5, 4), (2, 2, 0, 4), (2, 2, 5, 0)])
def test_project_implicit_of_nothing_is_zero(library: Any, sizes: tuple[int, ...], ensemble: str) -> None:
    ops = EmulatedOps(library)
    _, x_heads, tokens, _ = sizes
    x = torch.ones(sizes, dtype=torch.bfloat16)
    y = _check_empty(ops, "project_implicit", x, None, None, ensemble, 3, 4, 1, 0)
    _check_empty(ops, "project_implicit_backward", y, None, None, ensemble, 4, 1, 0, x_heads, tokens)
    masked = torch.zeros(1, tokens + 1, dtype=torch.int32)
    y = _check_empty(ops, "project_implicit", x * math.nan, masked, None, ensemble, 3, 1, 1, 0)
    dx = _check_empty(ops, "project_implicit_backward", y + 1, masked, None, ensemble, 1, 1, 0, x_heads, tokens)
    assert bool((y == 0).all()) and bool((dx == 0).all())


@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("batch,queries,measurements", [(0, 3, 4), (2, 0, 4), (2, 3, 0)])
def test_attend_and_decode_of_nothing_are_zero(
    library: Any, batch: int, queries: int, measurements: int, dtype: torch.dtype, capability: int
) -> None:
    ops = EmulatedOps(library, compute_capability=capability)
    q, kc, vc = (
        torch.ones(batch, 2, queries, 5, dtype=dtype),
        torch.ones(batch, 1, measurements, 5, dtype=dtype),
        torch.ones(batch, 1, measurements, 24, dtype=dtype),
    )
    for bias in (None, torch.zeros(1, 2, measurements)):
        z, lse = ops.attend(q, kc, vc, bias, 1.0)
        assert (z == (measurements > 0)).all()
        assert lse.isneginf().all() or measurements > 0
        gradients = _check_empty(ops, "attend_backward", torch.zeros_like(z), q, kc, vc, bias, z, lse, 1.0)
        assert all((g == 0).all() for g in gradients)
    for sizes in DECODERS[:2]:
        weights = _decoder(torch.Generator(), sizes)
        out = _check_empty(ops, "decode", torch.zeros_like(z), *weights)
        _check_empty(ops, "decode_backward", out, torch.zeros_like(z), *weights)


@pytest.mark.parametrize("measurements", [2, 300])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_rows_with_nothing_to_attend_to_are_zero_whatever_the_values_are(
    library: Any, dtype: torch.dtype, measurements: int
) -> None:
    ops = EmulatedOps(library)
    q, kc, vc = (torch.ones(1, 1, n, 4, dtype=dtype) for n in (3, measurements, measurements))
    vc[..., 0, :2] = torch.tensor([math.inf, math.nan])
    bias = torch.full((1, 1, measurements), -math.inf)
    z, lse = ops.attend(q, kc, vc, bias, 1.0)
    assert (z == 0).all() and lse.isneginf().all()
    assert all((g == 0).all() for g in ops.attend_backward(torch.ones_like(z), q, kc, vc, bias, z, lse, 1.0))


@pytest.mark.parametrize("theta", [-0.5, 0.0, 0.3, math.inf, math.nan])
def test_soft_threshold_is_the_cpu_kernels(library: Any, generator: torch.Generator, theta: float) -> None:
    """NaN thresholds of a diverged training show in the output, they do not pass for a sparse one."""
    S, B, thresholds, psi, step = _decoder(generator, DECODERS[0])
    arguments = torch.randn(1, 2, 9, 24, generator=generator), S, B, torch.full_like(thresholds, theta), psi, step
    out = EmulatedOps(library).decode(*arguments)
    assert torch.allclose(out, torch.ops.csat.decode(*arguments), rtol=1e-4, atol=1e-5, equal_nan=True)
    assert bool(out.isnan().all()) == math.isnan(theta)


@pytest.mark.filterwarnings("ignore:Warning only once for all operators")
def test_csat_attention_and_its_gradients(library: Any, generator: torch.Generator) -> None:
    """The public function with autograd, its every operator emulated, against the reference in float64."""
    sizes = {"query": (2, 4, 11, 12), "key": (2, 2, 19, 12), "value": (2, 2, 19, 10), "phi": (5, 19)}
    leaves = {name: torch.randn(shape, generator=generator) for name, shape in sizes.items()}
    leaves["phi"] = leaves["phi"].softmax(-1)
    mask = torch.rand(2, 19, generator=generator) > 0.2
    weights = [w[0] for w in _decoder(generator, (1, 2, 1, 1, 13, 10, 10))]
    cotangent = torch.randn(2, 4, 11, 10, generator=generator)

    def run(function: Any, dtype: torch.dtype) -> list[Tensor]:
        inputs = [t.to(dtype).requires_grad_() for t in (*leaves.values(), *weights)]
        out = function(*inputs[:4], decoder=SparseDecoder(*inputs[4:]), key_mask=mask)
        return [out, *torch.autograd.grad(out, inputs, cotangent.to(dtype))]

    exact, plain = run(reference.csat_attention, torch.float64), run(reference.csat_attention, torch.float32)
    ops = EmulatedOps(library, seed=3)
    with as_cpu_kernels(ops):
        got = run(csat_attention, torch.float32)
    assert ops.counters.launches > 0
    for i, tensors in enumerate(zip(got, exact, plain, strict=True)):
        assert_accurate(f"result {i}", *tensors)


@pytest.mark.parametrize("sizes", [ATTEND[0], (1, 2, 1, 290, 13, 16, 8), (1, 1, 1, 35, 300, 20, 40)], ids=str)
@pytest.mark.parametrize("dtype,capability", [*((t, 80) for t in DTYPES), (torch.bfloat16, 90)], ids=str)
def test_order_of_threads_does_not_matter(
    library: Any, generator: torch.Generator, dtype: torch.dtype, capability: int, sizes: tuple[int, ...]
) -> None:
    """Bitwise: reductions have a fixed order whatever the order of blocks, warps and lanes."""
    inputs = _attend_inputs(generator, dtype, sizes, "finite")
    results = []
    for seed in (0, 1, 2):
        ops = EmulatedOps(library, seed=seed, compute_capability=capability)
        z, lse = ops.attend(*inputs)
        results.append((z, lse, *ops.attend_backward(1 - z, *inputs[:4], z, lse, inputs[4])))
    for other in results[1:]:
        for first, second in zip(results[0], other, strict=True):
            assert torch.equal(first, second)


# Passes over shared memory above the least possible, as a share of all: what each operator's kernels may have.
BANK_CONFLICTS = {
    **{"attend": 0.0, "attend_backward": 0.001, "decode": 0.0, "decode_backward": 0.0, "attend_decode": 0.0},
    **{"attend_causal": 0.001, "attend_causal_backward": 0.001, "attend_prefix": 0.001},
    "attend_prefix_backward": 0.001,
}


def _check_bank_conflicts(ops: EmulatedOps, name: str, *arguments: Any) -> None:
    getattr(ops, name)(*arguments)
    conflicts, all_passes = ops.counters.bank_conflicts, ops.counters.shared_wavefronts
    assert all_passes > 0
    assert conflicts <= BANK_CONFLICTS[name] * all_passes, f"{name}: {conflicts} of {all_passes}"


@pytest.mark.parametrize("dtype", DTYPES[:2], ids=str)
def test_bank_conflicts(library: Any, generator: torch.Generator, dtype: torch.dtype) -> None:
    ops = EmulatedOps(library, count_bank_conflicts=True)
    inputs = _attend_inputs(generator, dtype, (1, 2, 1, 35, 70, 64, 64), "finite")
    weights = _decoder(generator, (1, 2, 1, 1, 64, 64, 64))
    z, lse = ops.attend(*inputs)
    calls: dict[str, tuple[Any, ...]] = {
        "attend": inputs,
        "attend_backward": (z, *inputs[:4], z, lse, inputs[4]),
        "decode": (z, *weights),
        "decode_backward": (z, z, *weights),
        "attend_decode": (*inputs, *weights, True),
    }
    for name, arguments in calls.items():
        _check_bank_conflicts(ops, name, *arguments)


@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.parametrize("sizes", [(1, 1, 1, 70, 300, 64, 64), (1, 1, 1, 70, 128, 128, 128)], ids=str)
def test_bank_conflicts_of_the_backward_on_tensor_cores(
    library: Any, generator: torch.Generator, sizes: tuple[int, ...], capability: int
) -> None:
    inputs = _attend_inputs(generator, torch.float16, sizes, "finite")
    z, lse = _composite.attend(*inputs)
    ops = EmulatedOps(library, count_bank_conflicts=True, compute_capability=capability)
    _check_bank_conflicts(ops, "attend_backward", z, *inputs[:4], z, lse, inputs[4])


@pytest.mark.parametrize("size", [64, 128])
def test_bank_conflicts_of_decode_backward_on_warpgroups(library: Any, generator: torch.Generator, size: int) -> None:
    ops = EmulatedOps(library, count_bank_conflicts=True, compute_capability=90)
    arguments = _settled_decode(generator, torch.float16, (1, 2, 150), (1, 3, 1, 1, size, size, size))
    _check_bank_conflicts(ops, "decode_backward", *arguments)


@pytest.mark.parametrize("sizes", [(1, 3, 1, 1, 64, 64, 64), (1, 2, 2, 2, 128, 64, 64), (1, 3, 1, 1, 128, 128, 128)])
def test_bank_conflicts_of_decode_on_warpgroups(
    library: Any, generator: torch.Generator, sizes: tuple[int, ...]
) -> None:
    ops = EmulatedOps(library, count_bank_conflicts=True, compute_capability=90)
    z = _tokens(generator, torch.float16, 1, 2, 150, sizes[5])
    _check_bank_conflicts(ops, "decode", z, *_decoder(generator, sizes))


def test_report_is_raised(library: Any, generator: torch.Generator) -> None:
    """A row of vc less than kc has: the read past its end is reported, with its place in the kernel."""
    q, kc, vc, _, scale = _attend_inputs(generator, torch.float32, (1, 1, 1, 9, 5, 8, 8), "none")
    with pytest.raises(EmulationError, match=r"out of bounds in .*read of device memory .*pack_kernel<float>"):
        EmulatedOps(library).attend(q, kc, vc[:, :, :4], None, scale)


def test_unsupported_sizes_are_refused(library: Any, generator: torch.Generator) -> None:
    inputs = _attend_inputs(generator, torch.float32, (1, 1, 1, 1, 2, 20000, 3), "none")
    with pytest.raises(EmulationError, match="outside the supported range"):
        EmulatedOps(library).attend(*inputs)
