"""Writes the files of this folder, which instantiate the kernels' templates: those of tensor cores one a (kernel, size)
for both dtypes, the others one a (kernel, dtype), so that a build compiles them side by side and reads the headers no
more often than it must. Run it after a change of the tables; tests/test_build.py fails while a file differs.

    python csrc/kernels/instances/generate.py
"""

from __future__ import annotations

from pathlib import Path

# Kernel on tensor cores -> the compile-time sizes it is made for (limits.h says which problem takes which).
# csrc/csat/<kernel>.cuh defines CSAT_<KERNEL>_INSTANCE(T, size).
MMA_FEATURES = (32, 64, 80, 96, 128)
SIZES: dict[str, tuple[int, ...]] = {
    "forward_mma": MMA_FEATURES,
    "forward_wgmma": (64, 128),
    "attend_causal_mma": MMA_FEATURES,
    "attend_causal_backward_mma": MMA_FEATURES,
    "attend_prefix_mma": (64, 128),
    "attend_prefix_backward_mma": (64, 128),
    "decode_wgmma": (64, 128),
    "attend_backward_mma": MMA_FEATURES,
    "attend_backward_wgmma": (64, 128),
    "decode_backward_mma": (64, 128, 256),
    "decode_backward_wgmma": (64, 128),
}
# Kernels of the SIMT family: csrc/csat/instances.h defines CSAT_<KERNEL>_INSTANCES(prefix, T).
SIMT = ("forward", "attend_causal", "attend_prefix", "attend_backward", "decode_backward")
DTYPES = {"f32": "float", "bf16": "bf16", "f16": "f16"}

TEMPLATE = """// Written by generate.py.
#define CSAT_INSTANTIATE
#include "csat/{header}"

namespace csat {{
{instances}
}}  // namespace csat
"""


def mma_file(kernel: str, size: int) -> str:
    lines = (f"CSAT_{kernel.upper()}_INSTANCE({dtype}, {size})" for dtype in ("bf16", "f16"))
    return TEMPLATE.format(header=f"{kernel}.cuh", instances="\n".join(lines))


def simt_file(kernel: str, dtype: str) -> str:
    return TEMPLATE.format(header="instances.h", instances=f"CSAT_{kernel.upper()}_INSTANCES(, {DTYPES[dtype]})")


def files() -> dict[str, str]:
    """Name and text of every file."""
    return {
        **{f"{kernel}_{size}.cu": mma_file(kernel, size) for kernel, sizes in SIZES.items() for size in sizes},
        **{f"{kernel}_{dtype}.cu": simt_file(kernel, dtype) for kernel in SIMT for dtype in DTYPES},
    }


if __name__ == "__main__":
    folder = Path(__file__).parent
    for name, text in files().items():
        (folder / name).write_text(text)
    for path in folder.glob("*.cu"):
        if path.name not in files():
            path.unlink()
