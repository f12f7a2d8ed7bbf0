"""Backends that every operator test runs on, and the tolerance rule they all meet."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

import csat_ext
from csat_ext import reference

RMS_LIMIT = {torch.bfloat16: 1e-2, torch.float16: 2e-3, torch.float32: 1e-5, torch.float64: 1e-12}


@dataclass(frozen=True)
class Backend:
    """One way to compute `csat_attention`."""

    name: str
    csat_attention: Callable[..., Tensor]
    device: torch.device

    def to(self, tensor: Tensor | None, dtype: torch.dtype | None = None) -> Any:
        return None if tensor is None else tensor.to(device=self.device, dtype=dtype or tensor.dtype)


def _backend(name: str) -> Backend:
    if name == "reference":
        return Backend(name, reference.csat_attention, torch.device("cpu"))
    if name == "cuda" and not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    return Backend(name, csat_ext.csat_attention, torch.device(name))


@pytest.fixture(params=["reference", "cpu", "cuda"])
def backend(request: pytest.FixtureRequest) -> Backend:
    return _backend(request.param)


@pytest.fixture(params=["cpu", "cuda"])
def kernels(request: pytest.FixtureRequest) -> Backend:
    """The backends that are not the oracle itself."""
    return _backend(request.param)


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


def assert_accurate(name: str, got: Tensor, exact: Tensor, plain: Tensor | None = None) -> None:
    """The tolerance rule: RMS error over RMS under the dtype's limit, and at most twice that of plain torch in that
    dtype.

    A quarter of the limit is allowed on top of twice: for a gradient of three numbers plain torch's error is luck.
    """
    assert got.shape == exact.shape, f"{name}: shape {tuple(got.shape)}, expected {tuple(exact.shape)}"
    got, exact = got.detach(), exact.detach()
    assert bool(got.isfinite().all()), f"{name}: not finite"
    limit = RMS_LIMIT[got.dtype]
    error, size = rms(got.double().cpu() - exact.double()), rms(exact)
    if plain is not None:
        of_plain = rms(plain.detach().double().cpu() - exact.double())
        assert error <= 2 * of_plain + limit * 0.25 * max(size, 1e-12), (
            f"{name}: error {error:.3e}, plain torch {of_plain:.3e}"
        )
    assert error <= limit * max(size, 1e-12) + 1e-30, f"{name}: RMS ratio {error / max(size, 1e-30):.3e} over {limit}"
