"""`csat_ext.explain`: what it says is what runs."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from emulator import build
from emulator.backend import EmulatedOps
from torch import Tensor

import csat_ext
from csat_ext import LinearDecoder, SparseDecoder, explain, implicit_measurement


def _inputs(nq: int, m: int, d: int, r: int, dtype: torch.dtype = torch.bfloat16) -> tuple[Tensor, ...]:
    query, key = torch.randn(1, 2, nq, d).to(dtype), torch.randn(1, 2, 3 * m, d).to(dtype)
    return query, key, torch.randn(1, 2, 3 * m, r).to(dtype), torch.rand(m, 3 * m).softmax(-1)


def _decoder(layers: int, atoms: int, rank: int, outputs: int) -> SparseDecoder:
    weights = torch.randn(1, atoms, atoms) * 0.01, torch.randn(1, atoms, rank), torch.rand(layers, atoms)
    return SparseDecoder(*weights, torch.randn(outputs, atoms))


# queries, m, D, R; layers, P, R, Dv; family on sm_80 and on sm_90
PROBLEMS = [
    ((9, 12, 64, 64), (2, 64, 64, 64), "mma", "wgmma"),
    ((9, 12, 80, 64), (2, 100, 64, 64), "mma", "mma"),
    ((9, 12, 128, 128), (2, 128, 128, 100), "pair", "pair"),
    ((9, 12, 130, 20), (1, 20, 20, 20), "pair", "pair"),
    ((9, 12, 130, 20), (1, 260, 20, 20), "simt", "simt"),
]


@pytest.mark.parametrize("capability,column", [(80, 2), (90, 3)])
@pytest.mark.parametrize("problem", PROBLEMS, ids=str)
def test_it_says_what_the_launch_functions_do(problem: tuple[Any, ...], capability: int, column: int) -> None:
    if reason := build.why_not_buildable():
        pytest.skip(reason)
    q, k, v, phi = _inputs(*problem[0])
    decoder = _decoder(*problem[1])
    said = explain(q, k, v, phi, decoder=decoder, device=f"sm_{capability}")
    assert said["attend_decode"].family == problem[column]
    ops = EmulatedOps(build.build(), compute_capability=capability)
    ops.attend_decode(q, k[:, :, :12], v[:, :, :12], None, 0.1, *decoder.with_head_axis(), False)
    assert (ops.counters.mma > 0) == (said["attend_decode"].family != "simt")
    z = torch.randn(1, 2, 9, problem[1][2]).to(q.dtype)
    dc = torch.randn(1, 2, 9, problem[1][3]).to(q.dtype)
    ops.decode_backward(dc, z, *decoder.with_head_axis())
    assert (ops.counters.mma > 0) == (said["decode_backward"].family != "simt")


@pytest.mark.parametrize("d,family", [(64, "wgmma"), (80, "mma"), (128, "wgmma"), (130, "simt")])
def test_gradients_on_hopper(d: int, family: str) -> None:
    q, k, v, phi = _inputs(9, 12, d, d)
    choice = explain(q, k, v, phi, device="sm_90")["attend_backward"]
    assert choice.family == family and choice.shared_bytes > 0
    assert ("wgmma" in dict(choice.refused)) == (family != "wgmma")
    older = explain(q, k, v, phi, device="sm_80")["attend_backward"]
    assert dict(older.refused)["wgmma"] == "wgmma belongs to compute capability 9.0"


@pytest.mark.parametrize(
    "sizes,reason",
    [
        ({"P": 128, "R": 128, "Dv": 100, "T": 3}, None),
        ({"P": 128, "R": 64, "Dv": 64, "T": 4, "Ts": 4, "Tb": 4}, None),
        ({"P": 129}, "coefficient count P above 128"),
        ({"R": 129}, "R or Dv above 128"),
        ({"P": 128, "R": 128, "T": 3, "Ts": 3, "Tb": 3}, "the decoder's weights exceed the shared memory of a block"),
    ],
)
def test_decode_alone_on_hopper(sizes: dict[str, int], reason: str | None) -> None:
    from csat_ext._library import _C

    problem = dict.fromkeys(("B", "H", "Nq", "D", "Hk", "M", "R", "Hd", "T", "Ts", "Tb", "P", "Dv"), 1) | sizes
    call = ("decode", "wgmma", problem, "bfloat16", "float32")
    refused, shared_bytes = _C.can_run(*call, 90, 227 * 1024)
    assert refused == reason and (shared_bytes > 0) == (reason is None)
    assert _C.can_run(*call, 80, 163 * 1024)[0] == "wgmma belongs to compute capability 9.0"


@pytest.mark.parametrize("kernel", ["attend", "decode", "attend_decode", "attend_backward", "decode_backward"])
def test_what_keeps_warpgroup_products_from_a_hopper(kernel: str) -> None:
    """Code for sm_90a that was not built would trap, and a tensor map has no axis of 0."""
    from csat_ext._library import _C

    problem = dict.fromkeys(("B", "H", "Nq", "D", "Hk", "M", "R", "Hd", "T", "Ts", "Tb", "P", "Dv"), 1)
    hopper = 90, 227 * 1024

    def reason(**sizes: int) -> str | None:
        return _C.can_run(kernel, "wgmma", problem | sizes, "float16", "float32", *hopper)[0]

    assert reason() is None
    without = _C.can_run(kernel, "wgmma", problem, "float16", "float32", *hopper, wgmma_code=False)[0]
    assert without == "the library is built without code for sm_90a"
    read = {name for name in ("D", "R", "Dv") if reason(**{name: 0}) == "D, R or Dv is 0"}
    of_attend, of_decode = {"D", "R"} if "attend" in kernel else set(), {"R", "Dv"} if "decode" in kernel else set()
    assert read == of_attend | of_decode


@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.parametrize(
    "dtype,width,family",
    [
        (torch.bfloat16, 64, "mma"),
        (torch.float16, 120, "mma"),
        (torch.float16, 130, "simt"),
        (torch.float32, 64, "simt"),
    ],
)
def test_the_causal_block_form(dtype: torch.dtype, width: int, family: str, capability: int) -> None:
    """What is said of attend_causal and of its backward is what the launch functions do."""
    if reason := build.why_not_buildable():
        pytest.skip(reason)
    q, k, v = (torch.randn(1, 2, 36, width).to(dtype) for _ in range(3))
    said = explain(q, k, v, causal="block", block_size=8, measurements_per_block=3, device=f"sm_{capability}")
    assert [choice.op for choice in said] == ["project_implicit", "attend_causal", "attend_causal_backward"]
    ops = EmulatedOps(build.build(), compute_capability=capability)
    kc, vc = k[:, :, :12], v[:, :, :12]
    arguments = q, kc, vc, k, v, None, None
    z, lse = ops.attend_causal(*arguments, 0.1, 8, 0, 3)
    for op in ("attend_causal", "attend_causal_backward"):
        assert said[op].family == family and said[op].shared_bytes > 0
        assert dict(said[op].refused)["wgmma"] == "no wgmma kernel of this op"
        assert (ops.counters.mma > 0) == (family == "mma")
        ops.attend_causal_backward(z, *arguments, z, lse, 0.1, 8, 0, 3)
    if family == "simt":
        reason = "float32: the tensor cores take bf16 and fp16" if width == 64 else "D or R above 128"
        assert dict(said["attend_causal_backward"].refused)["mma"] == reason


def test_causal_backward_needs_room_for_its_tiles() -> None:
    q = torch.empty(1, 2, 36, 128, dtype=torch.bfloat16, device="meta")
    phi = torch.empty(3, 8, device="meta")
    choice = explain(q, q, q, phi, causal="block", window_blocks=1, device="sm_89")["attend_causal_backward"]
    assert choice.family == "simt" and "exceed the shared memory" in dict(choice.refused)["mma"]


def test_the_causal_forms_decoder() -> None:
    q, k, v, _ = _inputs(36, 12, 96, 96)
    phi, decoder = torch.rand(3, 8), _decoder(2, 128, 96, 96)
    fused = explain(q, k, v, phi, decoder=decoder, causal="block", device="sm_90")
    backward = ["attend_causal_backward", "decode_backward"]
    assert [choice.op for choice in fused] == ["project", "attend_causal_decode", *backward]
    assert fused["attend_causal_decode"].family == "mma"
    smaller = explain(q, k, v, phi, decoder=decoder, causal="block", device="sm_80")["attend_causal_decode"]
    assert smaller.family == "pair" and "weights exceed the shared memory" in dict(smaller.refused)["mma"]
    wide = explain(q, k, v, phi, decoder=_decoder(2, 200, 96, 96), causal="block", device="sm_80")
    assert [choice.op for choice in wide] == ["project", "attend_causal_decode", "attend_causal", "decode", *backward]
    assert dict(wide["attend_causal_decode"].refused)["mma"] == "coefficient count P above 128 in the fused kernel"
    sensed = {"decoder": _decoder(2, 64, 40, 96), "feature_sensing": torch.rand(40, 96)}
    apart = explain(q, k, v, phi, causal="block", device="sm_80", **sensed)
    assert [choice.op for choice in apart] == ["project", "attend_causal", "decode", *backward]


def test_the_prefix_form() -> None:
    q, k, v, _ = _inputs(36, 12, 32, 32)
    phi = torch.rand(36, 12)
    explained = explain(q, k, v, phi, causal="prefix", device="sm_90")
    assert [(c.op, c.family) for c in explained] == [("attend_prefix", "mma"), ("attend_prefix_backward", "mma")]
    assert explained["attend_prefix"].refused == (("wgmma", "no wgmma kernel of this op"),)
    large = torch.empty(1, 2, 36, 128, dtype=torch.bfloat16, device="meta")
    backward = explain(large, large, large, phi, causal="prefix", device="sm_80")["attend_prefix_backward"]
    assert backward.family == "simt" and "exceeds the shared memory" in dict(backward.refused)["mma"]
    whole = (x.float() for x in (q, k, v))
    assert explain(*whole, phi, causal="prefix", device="sm_90")["attend_prefix"].family == "simt"
    wide = torch.empty(1, 2, 36, 1025, device="meta")
    assert explain(wide, wide, wide, phi, causal="prefix", device="sm_80")["attend_prefix"].family == "none"


def test_the_prefix_forms_decoder() -> None:
    q, k, v, _ = _inputs(36, 12, 32, 32)
    phi, backward = torch.rand(36, 12), ["attend_prefix_backward", "decode_backward"]
    said = explain(q, k, v, phi, decoder=_decoder(2, 128, 32, 32), causal="prefix", device="sm_90")
    assert [c.op for c in said] == ["attend_prefix_decode", *backward] and said["attend_prefix_decode"].family == "mma"
    many = explain(q, k, v, phi, decoder=_decoder(2, 200, 32, 32), causal="prefix", device="sm_90")
    assert [c.op for c in many] == ["attend_prefix_decode", "attend_prefix", "decode", *backward]
    sensed = {"decoder": _decoder(2, 64, 20, 32), "feature_sensing": torch.rand(20, 32)}
    apart = explain(q, k, v, phi, causal="prefix", device="sm_90", **sensed)
    assert [c.op for c in apart] == ["attend_prefix", "decode", *backward]


@pytest.mark.parametrize(
    "changes,error,message",
    [
        ({}, TypeError, "phi_k must be a torch.Tensor"),
        ({"causal": "prefix"}, TypeError, "phi_k must be a torch.Tensor, got NoneType"),
        ({"causal": "blocks"}, ValueError, "causal = 'blocks' came"),
        ({"causal": "block"}, ValueError, "needs 1 <= measurements_per_block <= block_size"),
        ({"causal": "block", "block_size": 4, "measurements_per_block": 5}, ValueError, "measurements_per_block = 5"),
        ({"causal": "block", "block_size": 4, "phi_k": torch.rand(2, 8)}, ValueError, "block_size = 4 came with"),
        ({"window_blocks": 1, "phi_k": torch.rand(2, 8)}, ValueError, "window_blocks = 1 belongs to causal='block'"),
    ],
)
def test_causal_arguments_that_do_not_fit(changes: dict[str, Any], error: type[Exception], message: str) -> None:
    q, k, v, _ = _inputs(36, 12, 32, 32)
    with pytest.raises(error, match=message):
        explain(q, k, v, **{"phi_k": None, "device": "sm_80", **changes})


@pytest.mark.parametrize(
    "changes,error,message",
    [
        (
            {"query": torch.rand(2, 9, 32)},
            ValueError,
            r"query has shape \(2, 9, 32\); accepted: \(batch, heads, tokens",
        ),
        ({"value": torch.rand(2, 9, 32)}, ValueError, "value has shape"),
        (
            {"key": torch.ones(1, 2, 36, 32, dtype=torch.int64)},
            TypeError,
            "key has dtype torch.int64; accepted: float32",
        ),
        ({"query": torch.ones(1, 2, 9, 32, dtype=torch.int32)}, TypeError, "query has dtype torch.int32; accepted"),
        ({"query": [1.0]}, TypeError, "query must be a torch.Tensor, got list"),
    ],
)
def test_tensors_that_no_kernel_takes(changes: dict[str, Any], error: type[Exception], message: str) -> None:
    q, k, v, phi = _inputs(9, 12, 32, 32)
    with pytest.raises(error, match=message):
        explain(**{"query": q, "key": k, "value": v, "phi_k": phi, "device": "sm_80", **changes})


def test_every_family_before_the_chosen_one_has_a_reason() -> None:
    q, k, v, phi = _inputs(9, 12, 200, 200, torch.float32)
    choice = explain(q, k, v, phi, device="sm_90")["attend"]
    assert choice.family == "simt"
    assert dict(choice.refused) == {
        "wgmma": "float32: the tensor cores take bf16 and fp16",
        "mma": "float32: the tensor cores take bf16 and fp16",
    }
    assert "not mma: float32" in str(choice)
    wide = explain(*(t.to("meta") for t in _inputs(9, 12, 2000, 20)), device="sm_80")["attend"]
    assert wide.family == "none" and dict(wide.refused)["simt"] == "head dimension D above 1024"


def test_a_linear_decoder_and_an_implicit_phi() -> None:
    q, k, v, _ = _inputs(9, 12, 32, 32)
    phi = implicit_measurement("pool", 12, 36)
    said = explain(q, k, v, phi, decoder=LinearDecoder(torch.eye(32)), device="sm_80")
    assert [choice.op for choice in said] == ["project_implicit", "attend", "attend_backward"]
    assert said["project_implicit"].family == "simt"
    signs = explain(q, k, v, implicit_measurement("rademacher", 12, 36), device="sm_80")
    assert signs["project_implicit"].family == "mma"
    with pytest.raises(KeyError, match="decode"):
        said["decode"]


def test_devices() -> None:
    inputs = _inputs(9, 12, 32, 32)
    on_cpu = explain(*inputs)
    assert on_cpu.device.startswith("cpu: C++ kernels") and not tuple(on_cpu)
    with pytest.raises(ValueError, match=r"sm_75.*sm_80"):
        explain(*inputs, device="sm_75")
    with pytest.raises(ValueError, match=r"device 'foo': accepted are .*sm_80.* and torch devices"):
        explain(*inputs, device="foo")
    assert explain(*(t.double() for t in inputs), device="sm_90")["attend"].family == "none"


def test_bad_arguments_of_the_table_name_what_is_accepted() -> None:
    from csat_ext._library import _C

    good: dict[str, Any] = {"kernel": "attend", "family": "mma", "sizes": {"D": 64}, "dtype": "float16"}
    good |= {"weights": "float32", "capability": 80, "shared_bytes": 166912}
    reason, shared_bytes = _C.can_run(**good)
    assert reason is None and 0 < shared_bytes <= good["shared_bytes"]
    for name, accepted in (("kernel", "attend_backward"), ("family", "wgmma"), ("dtype", "bfloat16")):
        with pytest.raises(ValueError, match=rf"{name} must be one of .*{accepted}.*; got 'no'"):
            _C.can_run(**(good | {name: "no"}))
    assert csat_ext.__all__.count("explain") == 1


def test_causal_forms_attend_to_the_values_before_they_are_sensed() -> None:
    q, k, v = (torch.randn(1, 2, 36, width).bfloat16() for width in (64, 64, 200))
    block = {"causal": "block", "block_size": 8, "measurements_per_block": 3}
    said = explain(q, k, v, feature_sensing=torch.randn(64, 200), device="sm_80", **block)  # type: ignore[arg-type]
    assert {said[op].family for op in ("attend_causal", "attend_causal_backward")} == {"simt"}
    assert explain(q, k, v[..., :64], device="sm_80", **block)["attend_causal"].family == "mma"  # type: ignore[arg-type]
