"""Loads the compiled libraries and knows what was loaded, what was not, and why.

`_C` holds the operator schemas, the CPU kernels and the Python bindings; without it nothing runs and importing this
module raises. `_cuda` holds the CUDA kernels; it is loaded only where the running torch has CUDA, and its absence is
recorded. No CUDA context is made here.
"""

from __future__ import annotations

import platform
from pathlib import Path
from typing import NamedTuple

import torch

_FOLDER = Path(__file__).resolve().parent

try:
    import csat_ext._C as _C
except ImportError as error:
    raise ImportError(
        f"csat_ext: the compiled library csat_ext._C could not be loaded from {_FOLDER} ({error}). Build it with "
        "`pip install .` in the project's folder, or in place with `python setup.py build_ext --inplace`; "
        "csat_ext.reference works without it."
    ) from error


class Backend(NamedTuple):
    """Whether csat's kernels run for a device type, and the reason."""

    kernels: bool
    reason: str


def _load_cuda() -> Backend:
    if torch.version.cuda is None:
        return Backend(False, f"torch {torch.__version__} is built without CUDA")
    found = sorted(_FOLDER.glob("_cuda*.so"))
    if not found:
        return Backend(False, "csat_ext was built without CUDA (build with nvcc and a CUDA torch, or CSAT_WITH_CUDA=1)")
    try:
        torch.ops.load_library(str(found[0]))
    except OSError as error:
        return Backend(False, f"{found[0].name} could not be loaded: {error}")
    return Backend(True, f"{found[0].name} is loaded")


CUDA: Backend = _load_cuda()


def backend_of(device_type: str) -> str:
    """What runs the csat operators on tensors of this device type, and why: one line."""
    if device_type == "cpu":
        return f"C++ kernels ({_C.build_info()['instruction_set']})"
    if device_type == "cuda" and CUDA.kernels:
        return f"CUDA kernels: {CUDA.reason}"
    reason = CUDA.reason if device_type == "cuda" else f"csat_ext has no kernels for {device_type}"
    return f"plain torch: {reason}"


def build_facts() -> dict[str, str]:
    """Versions, compiled architectures, devices, and which backend runs and why, as lines of text by name."""
    built = _C.build_info()
    revision = f" ({built['revision']})" if built["revision"] else ""
    return {
        "csat_ext": f"{built['version']}{revision}, built on torch {built['torch']} with {built['compiler']}",
        "torch": f"{torch.__version__}, CUDA {torch.version.cuda or 'none'}",
        "python": f"{platform.python_version()} on {platform.platform()}",
        "dtypes": ", ".join(built["dtypes"]),
        "cuda build": torch.ops.csat.cuda_build_info() if CUDA.kernels else "not loaded",
        "devices": ", ".join(["cpu", *_cuda_devices()]),
        "cpu tensors": backend_of("cpu"),
        "cuda tensors": backend_of("cuda"),
    }


def _cuda_devices() -> list[str]:
    if not torch.cuda.is_available():
        return []
    devices = []
    for index in range(torch.cuda.device_count()):
        p = torch.cuda.get_device_properties(index)
        devices.append(f"cuda:{index} {p.name} (sm_{p.major}{p.minor}, {p.total_memory / 2**30:.0f} GiB)")
    return devices
