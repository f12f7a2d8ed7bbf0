"""Measurements without a matrix: equal to the matrix on every backend, whatever is masked, and never of its size."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from conftest import Backend, assert_accurate
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from csat_ext import CSATAttention, CSATConfig, csat_attention, implicit_measurement, measurement, reference
from csat_ext.implicit import IMPLICIT

SEED = 2**63 + 5  # beyond the range of a signed integer
DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]

# batch, heads of x, heads of Phi, tokens, measurements, features
SIZES = [
    (3, 2, 1, 77, 13, 9),
    (2, 2, 2, 45, 18, 16),
    (1, 2, 4, 100, 5, 40),
    (1, 1, 1, 700, 70, 24),
    (2, 1, 1, 9, 9, 5),
    (1, 1, 1, 1300, 1100, 3),  # more than one transform of tokens, and rows that share a place in it
    (1, 1, 1, 1, 1, 1),
]


def options(ensemble: str, sizes: tuple[int, ...], masked: bool) -> dict[str, Any]:
    """Arguments of a measurement; one batch element has no token left, one fewer than segments."""
    batch, _, heads, tokens, m, _ = sizes
    mask = None
    if masked:
        mask = torch.rand(batch, tokens, generator=torch.Generator().manual_seed(2)) > 0.3
        mask[-1] = False
        if batch > 2:
            mask[1, 4:] = False
    anchors = ("first", "last") if m > 9 else (-1,) if m > 4 else ()
    shift = {"head_shift": True} if ensemble == "pool" else {}
    return {"seed": SEED, "layer": 3, "heads": heads, "anchors": anchors, "key_mask": mask, **shift}


def tokens_of(sizes: tuple[int, ...], dtype: torch.dtype, mask: Tensor | None, generator: torch.Generator) -> Tensor:
    """(B, Hx, N, D), strided, NaN where masked."""
    batch, heads, _, tokens, _, width = sizes
    x = torch.randn(batch, tokens, heads, width, generator=generator).to(dtype).transpose(1, 2)
    return x if mask is None else torch.where(mask[:, None, :, None], x, torch.nan)


def by_matrix(phi: Tensor, x: Tensor, mask: Tensor | None) -> Tensor:
    return reference.project(x, phi if phi.dim() == 4 else phi[None], mask)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("sizes", SIZES, ids=str)
@pytest.mark.parametrize("ensemble", IMPLICIT)
def test_the_projection_is_that_of_the_matrix(
    kernels: Backend,
    ensemble: str,
    sizes: tuple[int, ...],
    masked: bool,
    dtype: torch.dtype,
    generator: torch.Generator,
) -> None:
    if dtype == torch.float64 and kernels.name != "cpu":
        pytest.skip("float64 belongs to the CPU")
    if kernels.name == "emulated_sm_90" and sizes[3] > 50:
        pytest.skip("kernels that never ask for the device; the smaller sizes show that")
    arguments = options(ensemble, sizes, masked)
    mask, n, m = arguments["key_mask"], sizes[3], sizes[4]
    x = tokens_of(sizes, dtype, mask, generator)
    phi = implicit_measurement(ensemble, m, n, **{**arguments, "key_mask": kernels.to(mask)}, device=kernels.device)
    leaf = kernels.to(x).requires_grad_()
    y = phi.project(leaf)
    weight = torch.randn(y.shape, generator=generator).to(dtype)
    (dx,) = torch.autograd.grad(y, leaf, kernels.to(weight))

    expected = {}
    for name, wide in (("exact", torch.float64), ("plain", dtype)):
        matrix = measurement(ensemble, m, n, dtype=torch.float64, **arguments).phi.to(wide)
        double = x.to(wide).detach().requires_grad_()
        out = by_matrix(matrix, double, mask)
        expected[name] = out, torch.autograd.grad(out, double, weight.to(wide))[0]
    assert_accurate("y", y, expected["exact"][0], expected["plain"][0])
    assert_accurate("dx", dx, expected["exact"][1], expected["plain"][1])
    if mask is not None:
        assert bool((dx.cpu().transpose(1, 2)[~mask] == 0).all())


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("sizes", SIZES, ids=str)
@pytest.mark.parametrize("ensemble", IMPLICIT)
def test_the_score_bias_and_the_dense_form_are_those_of_the_matrix(
    ensemble: str, sizes: tuple[int, ...], masked: bool
) -> None:
    arguments = options(ensemble, sizes, masked)
    phi, matrix = (f(ensemble, sizes[4], sizes[3], **arguments) for f in (implicit_measurement, measurement))
    assert torch.equal(phi.dense().phi, matrix.phi)
    for bias in (phi.score_bias, phi.dense().score_bias):
        assert (bias is None) == (matrix.score_bias is None)
        if bias is not None:
            torch.testing.assert_close(bias, matrix.score_bias, rtol=0, atol=0)


def inputs(generator: torch.Generator, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor]:
    shapes = ((2, 4, 11, 12), (2, 2, 37, 12), (2, 2, 37, 10))
    q, k, v = (torch.randn(shape, generator=generator).to(dtype) for shape in shapes)
    return q, k, v


@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("ensemble", IMPLICIT)
def test_attention_takes_it_for_phi(
    kernels: Backend, ensemble: str, masked: bool, dtype: torch.dtype, generator: torch.Generator
) -> None:
    """Outputs and gradients of K and V; Phi_V of another seed; a mask given to the call makes the Phi of that mask."""
    mask = torch.rand(2, 37, generator=generator) > 0.3 if masked else None
    q, k, v = inputs(generator, dtype)
    draws = [{"seed": seed, "heads": 4, "anchors": ("first",)} for seed in (3, 4)]
    matrices = [measurement(ensemble, 7, 37, key_mask=mask, dtype=torch.float64, **draw) for draw in draws]
    bias = matrices[0].score_bias
    if mask is not None:
        k, v = (torch.where(mask[:, None, :, None], t, torch.nan) for t in (k, v))

    def gradients(call: Callable[..., Tensor], wide: torch.dtype, device: torch.device) -> list[Tensor]:
        leaves = [t.to(device, wide).requires_grad_() for t in (q, k, v)]
        out = call(*leaves)
        return [out, *torch.autograd.grad(out.float().square().sum(), leaves)]

    def exact(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        kc, vc = (by_matrix(m.phi.to(q.dtype), t, mask) for m, t in zip(matrices, (k, v), strict=True))
        scores = bias.to(q.dtype) if bias is not None else None
        return reference.attend(q, kc, vc, scores, 12**-0.5)[0]

    phis = [implicit_measurement(ensemble, 7, 37, device=kernels.device, **draw) for draw in draws]
    given = None if bias is None else kernels.to(bias.float())
    got = gradients(
        lambda q, k, v: csat_attention(q, k, v, *phis, score_bias=given, key_mask=kernels.to(mask)),
        dtype,
        kernels.device,
    )
    cpu = torch.device("cpu")
    for name, a, b, c in zip(
        ("out", "dq", "dk", "dv"), got, gradients(exact, torch.float64, cpu), gradients(exact, dtype, cpu), strict=True
    ):
        assert_accurate(name, a, b, c)


class LargestTensor(TorchDispatchMode):
    """Elements of the largest tensor that any operation returned."""

    elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, tuple | list) else (out,):
            if isinstance(tensor, Tensor):
                self.elements = max(self.elements, tensor.untyped_storage().nbytes() // tensor.element_size())
        return out


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("ensemble", IMPLICIT)
def test_the_module_makes_no_matrix(ensemble: str, masked: bool) -> None:
    """Nothing in a training step is as large as one Phi."""
    n, m = 3000, 64
    module = CSATAttention(8, 2, CSATConfig(measurements=m, ensemble=ensemble))
    x = torch.randn(1, n, 8, requires_grad=True)
    mask = torch.arange(n)[None] < 2500 if masked else None
    query = torch.randn(1, 5, 8)
    with LargestTensor() as largest:
        module(query, x, key_mask=mask).square().sum().backward()
    assert 0 < largest.elements <= 8 * n < m * n


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("share_kv", [True, False])
@pytest.mark.parametrize("ensemble", IMPLICIT)
def test_the_module_computes_what_its_measurement_says(
    ensemble: str, share_kv: bool, masked: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = CSATAttention(24, 3, CSATConfig(measurements=8, ensemble=ensemble, share_kv=share_kv, seed=5))
    x = torch.randn(2, 41, 24)
    mask = torch.arange(41) < torch.tensor([[41], [29]]) if masked else None
    out = module(x, key_mask=mask)
    monkeypatch.setattr(CSATAttention, "_has_matrix", True)
    torch.testing.assert_close(out, module(x, key_mask=mask), rtol=1e-4, atol=1e-5)


@pytest.mark.own_memory
@pytest.mark.parametrize("ensemble", IMPLICIT)
def test_compiles_fullgraph_once_for_all_lengths_and_masks(ensemble: str) -> None:
    torch._dynamo.reset()
    module = CSATAttention(24, 3, CSATConfig(measurements=8, ensemble=ensemble, decoder="none"))
    compiled = torch.compile(module, fullgraph=True, dynamic=True, backend="aot_eager")
    with torch._dynamo.config.patch(recompile_limit=1, fail_on_recompile_limit_hit=True):
        for n in (20, 33, 47):
            x, mask = torch.randn(2, n, 24), torch.arange(n) < torch.tensor([[n], [n - 7]])
            out = compiled(x, key_mask=mask)
            torch.testing.assert_close(out, module(x, key_mask=mask), rtol=1e-4, atol=1e-5)
            out.sum().backward()


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"ensemble": "gaussian"}, ValueError, "ensemble 'gaussian' has no implicit form; accepted: rademacher"),
        ({"ensemble": "nothing"}, ValueError, "ensemble must be one of"),
        ({"m": 38}, ValueError, "m must be at most n"),
        ({"n": 2**31 - 1}, ValueError, r"n must be below 2\*\*31 - 1 in an implicit form, got 2147483647"),
        ({"n": 2**31}, ValueError, r"n must be below 2\*\*31 - 1"),
        ({"m": 1, "anchors": ("last",)}, ValueError, "m must exceed the number of anchors"),
        ({"anchors": ("middle",)}, ValueError, "anchors must hold"),
        ({"seed": -1}, ValueError, "seed must be in"),
        ({"heads": 0}, ValueError, "heads must be at least 1"),
        ({"ensemble": "rademacher", "head_shift": True}, ValueError, "head_shift is an option of the ensembles"),
        ({"key_mask": torch.ones(2, 36, dtype=torch.bool)}, ValueError, "key_mask must have shape"),
        ({"key_mask": torch.ones(2, 37)}, TypeError, "key_mask must be a bool tensor"),
    ],
)
def test_wrong_arguments_are_named(changes: dict[str, Any], error: type[Exception], message: str) -> None:
    arguments: dict[str, Any] = {"ensemble": IMPLICIT[0], "m": 5, "n": 37, **changes}
    with pytest.raises(error, match=message):
        implicit_measurement(arguments.pop("ensemble"), arguments.pop("m"), arguments.pop("n"), **arguments)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"n": 36}, "phi_k measures 36 tokens, key has 37"),
        ({"heads": 3}, "phi_k has 3 heads; accepted: 1, 2"),
        ({"key_mask": torch.ones(3, 37, dtype=torch.bool)}, "phi_k has batch size 3; accepted: 1 or 2"),
        ({"anchors": ("last",), "device": "meta"}, "phi_k is on meta"),
    ],
)
def test_attention_names_what_does_not_fit(changes: dict[str, Any], message: str, generator: torch.Generator) -> None:
    arguments = {"n": 37, **changes}
    phi = implicit_measurement("rademacher", 5, arguments.pop("n"), **arguments)
    with pytest.raises(ValueError, match=message):
        csat_attention(*inputs(generator), phi)


def test_two_masks_and_unequal_measurements_are_refused(generator: torch.Generator) -> None:
    mask = torch.ones(2, 37, dtype=torch.bool)
    phi = implicit_measurement("rademacher", 5, 37, key_mask=mask)
    with pytest.raises(ValueError, match="phi_k was made for a key mask"):
        csat_attention(*inputs(generator), phi, key_mask=mask)
    with pytest.raises(ValueError, match="phi_v has 6 measurements, phi_k has 5"):
        csat_attention(*inputs(generator), phi, implicit_measurement("rademacher", 6, 37))


def test_a_masked_row_is_silenced_whatever_the_bias(generator: torch.Generator) -> None:
    mask = torch.ones(2, 37, dtype=torch.bool)
    mask[1] = False
    phi = implicit_measurement("rademacher", 5, 37, anchors=("first",))
    out = csat_attention(*inputs(generator), phi, key_mask=mask)
    assert bool((out[1] == 0).all()) and bool(out[0].isfinite().all())
    masked = phi.masked(mask).score_bias
    assert masked is not None and bool((masked[1] == -math.inf).all()) and bool((masked[0] == 0).all())


@pytest.mark.parametrize("ensemble", IMPLICIT)
def test_another_mask_changes_nothing_else(ensemble: str, generator: torch.Generator) -> None:
    sizes = SIZES[1]
    named, mask = options(ensemble, sizes, False), torch.rand(2, 45, generator=generator) > 0.3
    of_mask = implicit_measurement(ensemble, 18, 45, **{**named, "key_mask": mask})
    masked = implicit_measurement(ensemble, 18, 45, **named).masked(mask)
    x = tokens_of(sizes, torch.float32, mask, generator)
    assert torch.equal(masked.project(x), of_mask.project(x))
    assert masked.score_bias is not None and of_mask.score_bias is not None
    assert torch.equal(masked.score_bias, of_mask.score_bias)
    assert torch.equal(masked.dense().phi, of_mask.dense().phi)
