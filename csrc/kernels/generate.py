"""Writes the files that instantiate the tensor-core kernels, one a (kernel, head dimension) for both dtypes, so that a
build compiles them side by side and reads the headers no more often than it must. Run it after a change of the table;
tests/test_build.py fails while a file differs.

    python csrc/kernels/generate.py
"""

from __future__ import annotations

from pathlib import Path

# Kernel -> the compile-time sizes it is made for (limits.h says which problem takes which). csrc/csat/<kernel>.cuh
# defines CSAT_<KERNEL>_INSTANCE(T, size).
MMA_FEATURES = (32, 64, 80, 96, 128)
KERNELS: dict[str, tuple[int, ...]] = {
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

TEMPLATE = """// Written by generate.py.
#define CSAT_INSTANTIATE
#include "csat/{kernel}.cuh"

namespace csat {{
CSAT_{macro}_INSTANCE(bf16, {size})
CSAT_{macro}_INSTANCE(f16, {size})
}}  // namespace csat
"""


def files() -> dict[str, str]:
    """Name and text of every file."""
    return {
        f"{kernel}_{size}.cu": TEMPLATE.format(kernel=kernel, macro=kernel.upper(), size=size)
        for kernel, sizes in KERNELS.items()
        for size in sizes
    }


if __name__ == "__main__":
    folder = Path(__file__).parent
    for name, text in files().items():
        (folder / name).write_text(text)
    for old in folder.glob("*.cu"):
        if old.read_text().startswith(TEMPLATE.split("\n")[0]) and old.name not in files():
            old.unlink()
