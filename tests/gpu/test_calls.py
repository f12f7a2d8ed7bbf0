"""What a GPU is tested with, looked at without one: the calls reach every family, and the CPU passes them."""

from __future__ import annotations

import pytest
import torch
from operator_calls import calls

csat = torch.ops.csat
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
# Compute capability -> shared memory of a block, and the families beside simt that 16-bit calls must reach.
AMPERE, HOPPER = (80, 163 * 1024), (90, 227 * 1024)
REACHED = {
    AMPERE: {
        "attend": {"mma"},
        "decode": {"mma"},
        "attend_decode": {"mma", "pair"},
        "attend_backward": {"mma"},
        "decode_backward": {"mma"},
        "attend_prefix": {"mma"},
        "attend_prefix_backward": {"mma"},
    },
    HOPPER: {
        "attend": {"wgmma", "mma"},
        "decode": {"wgmma", "mma"},
        "attend_decode": {"wgmma", "mma", "pair"},
        "attend_backward": {"wgmma", "mma"},
        "decode_backward": {"wgmma", "mma"},
        "attend_prefix": {"mma"},
        "attend_prefix_backward": {"mma"},
    },
}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("device", REACHED, ids=str)
def test_calls_reach_every_family(device: tuple[int, int], dtype: torch.dtype) -> None:
    expected = REACHED[device]
    reached: dict[str, set[str]] = {op: set() for op in expected}
    for call in calls(dtype):
        if call.op in expected:
            reached[call.op].add(call.family(call.op, *device))
    tensor_cores = dtype != torch.float32
    assert reached == {op: {"simt"} | (families if tensor_cores else set()) for op, families in expected.items()}


@pytest.mark.parametrize("dtype", DTYPES[:2], ids=str)
def test_the_cpu_passes_them(dtype: torch.dtype) -> None:
    """The calls are sound; the CPU's kernels have tests of their own, float16 and what is implicit among them."""
    for call in calls(dtype):
        if not call.op.startswith("project_implicit"):
            call.assert_accurate(getattr(csat, call.op)(*call.args))
