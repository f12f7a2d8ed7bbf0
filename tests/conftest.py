"""Backends that every operator test runs on, and the tolerance rule they all meet."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from emulator import build
from emulator.backend import EmulatedOps, as_cpu_kernels
from torch import Tensor

import csat_ext
from csat_ext import reference

# Backends of the emulator -> compute capability: what runs on Ampere, and Hopper's own kernels.
EMULATED = {"emulated": 80, "emulated_sm_90": 90}
# Problems are so small that a second thread only waits for the first, and beside other processes for most of the time.
# Threads have a test of their own: test_ops.test_deterministic_for_any_number_of_threads.
os.environ.setdefault("OMP_NUM_THREADS", "1")  # of processes that tests start
torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
RMS_LIMIT = {torch.bfloat16: 1e-2, torch.float16: 2e-3, torch.float32: 1e-5, torch.float64: 1e-12}


@dataclass(frozen=True)
class Backend:
    """One way to compute `csat_attention`."""

    name: str
    csat_attention: Callable[..., Tensor]
    device: torch.device

    def to(self, tensor: Tensor | None, dtype: torch.dtype | None = None) -> Any:
        return None if tensor is None else tensor.to(device=self.device, dtype=dtype or tensor.dtype)


@contextlib.contextmanager
def _running(name: str) -> Iterator[Backend]:
    if name == "reference":
        yield Backend(name, reference.csat_attention, torch.device("cpu"))
    elif name in EMULATED:
        # The kernels' own CUDA sources, compiled for the emulator, in place of the CPU kernels for the whole test.
        if reason := build.why_not_buildable():
            pytest.skip(reason)
        with as_cpu_kernels(EmulatedOps(build.build(), compute_capability=EMULATED[name])):
            yield Backend(name, csat_ext.csat_attention, torch.device("cpu"))
    elif name == "cuda" and not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    else:
        yield Backend(name, csat_ext.csat_attention, torch.device(name))


@pytest.fixture(params=["reference", "cpu", *EMULATED, "cuda"])
def backend(request: pytest.FixtureRequest) -> Iterator[Backend]:
    with _running(request.param) as running:
        yield running


@pytest.fixture(params=["cpu", *EMULATED, "cuda"])
def kernels(request: pytest.FixtureRequest) -> Iterator[Backend]:
    """The backends that are not the oracle itself."""
    with _running(request.param) as running:
        yield running


@pytest.fixture
def generator() -> torch.Generator:
    return torch.Generator().manual_seed(1234)


@pytest.fixture(autouse=True)
def poisoned_memory(request: pytest.FixtureRequest) -> Iterator[None]:
    """Fresh memory holds NaN, so that an element nobody wrote is seen."""
    if request.node.get_closest_marker("own_memory"):
        yield
        return
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    fill = torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.utils.deterministic.fill_uninitialized_memory = fill
    torch.use_deterministic_algorithms(before[0], warn_only=before[1])


def rms(tensor: Tensor) -> float:
    return float(tensor.double().square().mean().sqrt()) if tensor.numel() else 0.0


def assert_accurate(
    name: str, got: Tensor, exact: Tensor, plain: Tensor | None = None, dtype: torch.dtype | None = None
) -> None:
    """The tolerance rule: RMS error over RMS under the dtype's limit, and at most twice that of plain torch in that
    dtype; ``dtype``: of the arithmetic, where the result is kept in a wider one.

    A quarter of the limit is allowed on top of twice: for a gradient of three numbers plain torch's error is luck.
    """
    assert got.shape == exact.shape, f"{name}: shape {tuple(got.shape)}, expected {tuple(exact.shape)}"
    got, exact = got.detach(), exact.detach()
    assert bool(got.isfinite().all()), f"{name}: not finite"
    limit = RMS_LIMIT[dtype or got.dtype]
    error, size = rms(got.double().cpu() - exact.double()), rms(exact)
    if plain is not None:
        of_plain = rms(plain.detach().double().cpu() - exact.double())
        assert error <= 2 * of_plain + limit * 0.25 * max(size, 1e-12), (
            f"{name}: error {error:.3e}, plain torch {of_plain:.3e}"
        )
    assert error <= limit * max(size, 1e-12) + 1e-30, f"{name}: RMS ratio {error / max(size, 1e-30):.3e} over {limit}"
