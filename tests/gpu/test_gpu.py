"""The CUDA kernels on a device: accuracy, determinism, streams, graphs, masks, long tensors. Skipped without one."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from conftest import assert_accurate, rms
from operator_calls import (
    RESULTS,
    Call,
    Values,
    as_tuple,
    attend_causal_decode_calls,
    attend_decode_calls,
    attend_prefix_decode_calls,
    calls,
    decoder_weights,
    project_calls,
)
from operator_cases import settled_decoder
from torch import Tensor

import csat_ext
from csat_ext import _composite, _library

csat = torch.ops.csat
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
LABELS = [str(call) for call in calls(torch.float32)]

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
    pytest.mark.skipif(not _library.CUDA.kernels, reason=_library.CUDA.reason),
]


@pytest.fixture(autouse=True)
def full_float32() -> Any:
    """float32 products in full float32, as the limits assume."""
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = False
    yield
    torch.backends.cuda.matmul.allow_tf32 = before


def run(call: Call) -> tuple[Tensor, ...]:
    return as_tuple(getattr(csat, call.op)(*call.to("cuda")))


def pick(label: str, dtype: torch.dtype) -> Call:
    return next(call for call in calls(dtype) if str(call) == label)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("label", LABELS)
def test_agrees_with_float64(label: str, dtype: torch.dtype) -> None:
    call = pick(label, dtype)
    got = run(call)
    declared = as_tuple(getattr(_composite, call.op)(*call.args))
    assert [(t.dtype, t.shape) for t in got] == [(t.dtype, t.shape) for t in declared]
    call.assert_accurate(got)


@pytest.mark.parametrize("label", LABELS)
def test_bitwise_deterministic(label: str) -> None:
    call = pick(label, torch.bfloat16)
    first = run(call)
    for _ in range(3):
        junk = torch.full((1 << 22,), torch.nan, device="cuda")  # other workspace contents, other addresses
        again = run(call)
        del junk
        for name, a, b in zip(RESULTS[call.op], first, again, strict=True):
            assert torch.equal(a.view(torch.uint8), b.view(torch.uint8)), f"{call} {name}"


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_masked_tokens_are_never_read(dtype: torch.dtype) -> None:
    for call in project_calls(dtype):
        at_x = 0 if call.op == "project" else 1
        keep = call.args[at_x + 2]
        if keep is None:
            continue
        junk = list(call.to("cuda"))
        junk[at_x] = junk[at_x].masked_fill(~keep.cuda()[:, None, :, None], torch.nan)
        for clean, got in zip(run(call), as_tuple(getattr(csat, call.op)(*junk)), strict=True):
            assert torch.equal(clean, got), str(call)


def close(name: str, got: Tensor, expected: Tensor, bitwise: bool) -> None:
    """Equal, or where kernels of two families sum in their own order, within the tolerance of the dtype."""
    if bitwise:
        assert torch.equal(got, expected), name
    else:
        finite = expected.isfinite()
        assert torch.equal(got[~finite], expected[~finite]), name
        assert_accurate(name, got[finite].cpu(), expected[finite].double().cpu())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_fused_equals_attend_then_decode(dtype: torch.dtype) -> None:
    properties = torch.cuda.get_device_properties(0)
    device = 10 * properties.major + properties.minor, properties.shared_memory_per_block_optin
    for call in attend_decode_calls(dtype):
        args = call.to("cuda")
        out, z, lse = csat.attend_decode(*args)
        expected_z, expected_lse = csat.attend(*args[:5])
        fused, attend, decode = (call.family(k, *device) for k in ("attend_decode", "attend", "decode"))
        alike = fused in ("pair", attend)
        close(f"{call} lse", lse, expected_lse, alike)
        close(f"{call} c", out, csat.decode(expected_z, *args[5:10]), fused == "pair" or fused == attend == decode)
        if args[10]:
            close(f"{call} z", z, expected_z, alike)
        else:
            assert z.shape == (0,)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_causal_fused_equals_attend_causal_then_decode(dtype: torch.dtype) -> None:
    properties = torch.cuda.get_device_properties(0)
    device = 10 * properties.major + properties.minor, properties.shared_memory_per_block_optin
    for call in attend_causal_decode_calls(dtype):
        args = call.to("cuda")
        out, z, lse = csat.attend_causal_decode(*args)
        expected_z, expected_lse = csat.attend_causal(*args[:11])
        fused, decode = (call.family(k, *device) for k in ("attend_causal_decode", "decode"))
        assert torch.equal(lse, expected_lse), str(call)
        close(f"{call} c", out, csat.decode(expected_z, *args[11:16]), fused in ("pair", decode))
        assert torch.equal(z, expected_z) if args[16] else z.shape == (0,), str(call)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_prefix_fused_equals_attend_prefix_then_decode(dtype: torch.dtype) -> None:
    properties = torch.cuda.get_device_properties(0)
    device = 10 * properties.major + properties.minor, properties.shared_memory_per_block_optin
    for call in attend_prefix_decode_calls(dtype):
        args = call.to("cuda")
        out, z, *rest = csat.attend_prefix_decode(*args)
        expected_z, *expected = csat.attend_prefix(*args[:11])
        fused, decode = (call.family(k, *device) for k in ("attend_prefix_decode", "decode"))
        assert all(torch.equal(a, b) for a, b in zip(rest, expected, strict=True)), str(call)
        close(f"{call} c", out, csat.decode(expected_z, *args[11:16]), fused in ("pair", decode))
        assert torch.equal(z, expected_z) if args[16] else z.shape == (0,), str(call)


def training_step(q: Tensor, k: Tensor, v: Tensor, phi: Tensor, decoder: Any) -> tuple[Tensor, ...]:
    out = csat_ext.csat_attention(q, k, v, phi, decoder=decoder)
    leaves = [q, k, v, phi, decoder.S, decoder.B, decoder.theta, decoder.psi]
    return out, *torch.autograd.grad(0.01 * out.float().square().sum(), leaves)


def training_inputs(dtype: torch.dtype) -> tuple[Any, ...]:
    """Values and Phi are positive, so that the decoder is far from its thresholds (`settled_decoder`)."""
    values = Values(dtype)
    q, k, v = (values.strided(2, 4, n, 32).cuda() for n in (100, 130, 130))
    phi = torch.rand(4, 20, 130, generator=torch.Generator().manual_seed(1)).softmax(-1).cuda().requires_grad_()
    weights = decoder_weights(values, 1, 3, 1, 1, 64, 32, 32, torch.float32)
    settled = settled_decoder(weights, dtype, torch.Generator().manual_seed(2))
    S, B, theta, psi, _ = (w[0].cuda().requires_grad_() for w in settled)
    q, k, v = (t.requires_grad_() for t in (q, k, v.abs() + 0.5))
    return q, k, v, phi, csat_ext.SparseDecoder(S, B, theta, psi)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_training_step_is_bitwise_deterministic(dtype: torch.dtype) -> None:
    inputs = training_inputs(dtype)
    first = training_step(*inputs)
    for _ in range(3):
        junk = torch.full((1 << 22,), torch.nan, device="cuda")
        again = training_step(*inputs)
        del junk
        assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))


@pytest.mark.own_memory  # a captured graph owns its memory
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_training_step_in_a_cuda_graph(dtype: torch.dtype) -> None:
    inputs = training_inputs(dtype)
    eager = [t.detach() for t in training_step(*inputs)]  # a graph that lives on ties its leaves to the legacy stream
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        training_step(*inputs)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = training_step(*inputs)
    for _ in range(2):
        for t in captured:
            t.detach().fill_(torch.nan)
        graph.replay()
        torch.cuda.synchronize()
        for a, b in zip(eager, captured, strict=True):
            assert torch.isfinite(b).all()
            # cuBLAS may choose another kernel under capture, where its workspace is another one.
            assert rms(a.double() - b.double()) <= (1e-5 if dtype == torch.float32 else 1e-2) * rms(a)


@pytest.mark.own_memory
@torch.no_grad()
def test_a_layer_in_a_cuda_graph_keeps_its_phi() -> None:
    layer = csat_ext.CSATAttention(64, 4, csat_ext.CSATConfig(measurements=16, ensemble="gaussian")).cuda()
    x = torch.randn(2, 200, 64, device="cuda")
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        expected = layer(x)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = layer(x)
    for n in range(201, 240):  # more lengths than a layer remembers
        layer(x.new_full((1, n, 64), torch.nan))
    graph.replay()
    assert rms(captured.double() - expected.double()) <= 1e-5 * rms(expected)


@pytest.mark.parametrize("label", LABELS)
def test_a_thread_that_has_no_context_yet(label: str) -> None:
    """As autograd's may be: its memory is there already, so that the operator's own calls are the first ones."""
    call = pick(label, torch.bfloat16)
    expected, arguments = run(call), call.to("cuda")
    torch.cuda.synchronize()
    with ThreadPoolExecutor(1) as fresh:
        got = as_tuple(fresh.submit(getattr(csat, call.op), *arguments).result())
    assert all(torch.equal(a.view(torch.uint8), b.view(torch.uint8)) for a, b in zip(got, expected, strict=True))


def test_runs_on_the_current_stream() -> None:
    call = pick("attend_decode-shared", torch.float32)
    expected = run(call)
    args = call.to("cuda")
    source = args[0].clone()
    args[0].zero_()
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(20_000_000)
        args[0].copy_(source)
        got = csat.attend_decode(*args)
    stream.synchronize()
    for a, b in zip(expected, got, strict=True):
        assert torch.equal(a, b)


def test_no_host_synchronisation() -> None:
    prepared = [(call, call.to("cuda")) for call in calls(torch.bfloat16)]
    for call, args in prepared:
        getattr(csat, call.op)(*args)
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for call, args in prepared:
            getattr(csat, call.op)(*args)
    finally:
        torch.cuda.set_sync_debug_mode(before)


def test_decode_backward_goes_in_chunks() -> None:
    """More saved iterates than the workspace may hold: rows go in chunks, parameter gradients are their sum."""
    values = Values(torch.float32)
    weights = decoder_weights(values, 1, 4, 1, 1, 128, 32, 32, torch.float32)
    z, dc = values(1, 1, 100_000, 32), values(1, 1, 100_000, 32)
    whole = csat.decode_backward(*(t.cuda() for t in (dc, z, *weights)))
    halves = [
        csat.decode_backward(*(t.cuda() for t in (dc[:, :, part], z[:, :, part], *weights)))
        for part in (slice(0, 50_000), slice(50_000, None))
    ]
    assert_accurate("dz", whole[0].cpu(), torch.cat([h[0] for h in halves], 2).cpu())
    for name, got, a, b in zip(RESULTS["decode_backward"][1:], whole[1:], halves[0][1:], halves[1][1:], strict=True):
        assert_accurate(name, got.cpu(), (a.double() + b.double()).cpu())


@pytest.mark.slow
@pytest.mark.own_memory
def test_more_than_2_to_the_31_elements() -> None:
    free, _ = torch.cuda.mem_get_info()
    if free < 24 << 30:
        pytest.skip(f"needs 24 GiB of free device memory, {free >> 30} GiB are free")
    queries = (1 << 31) // 64 + 1000
    q = torch.zeros(1, 1, queries, 64, device="cuda", dtype=torch.bfloat16)
    q[:, :, -1000:].normal_()
    values = Values(torch.bfloat16)
    kc, vc = values(1, 1, 5, 64).cuda(), values(1, 1, 5, 64).cuda()
    z, lse = csat.attend(q, kc, vc, None, 0.125)
    tail, tail_lse = csat.attend(q[:, :, -1000:], kc, vc, None, 0.125)
    assert torch.equal(z[:, :, -1000:], tail)
    assert torch.equal(lse[:, :, -1000:], tail_lse)


def test_a_size_out_of_range_is_refused_by_name() -> None:
    values = Values(torch.float32)
    z = values(1, 1, 4, 8).cuda()
    weights = [w.cuda() for w in decoder_weights(values, 1, 1, 1, 1, 1030, 8, 8, torch.float32)]
    with pytest.raises((ValueError, RuntimeError), match="coefficient count P above 1024"):
        csat.decode(z, *weights)


def test_tensors_on_two_devices_are_refused() -> None:
    call = pick("attend-plain", torch.float32)
    args = list(call.to("cuda"))
    args[1] = args[1].cpu()
    with pytest.raises((ValueError, RuntimeError), match="kc must be on cuda"):
        csat.attend(*args)
