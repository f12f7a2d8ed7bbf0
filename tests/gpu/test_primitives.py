"""Every word of csrc/csat/prims.cuh: the device against the emulator, and the emulator against the formula.

`primitives.cu` is compiled twice, by nvcc and for the emulator (tests/emulator). Without a device its emulation still
runs, and nvcc, where there is one, still compiles it for every architecture.
"""

from __future__ import annotations

import re
import shutil
import subprocess
from collections.abc import Callable
from ctypes import CDLL, byref, c_char_p, c_int, c_void_p
from pathlib import Path

import pytest
import torch
from emulator import build
from torch import Tensor

ROOT = Path(__file__).resolve().parents[2]
SOURCE = Path(__file__).with_name("primitives.cu")
ARCHITECTURES = ["compute_80,code=[sm_80,compute_80]", "compute_90a,code=sm_90a"]


class Primitives:
    """The cases of one build of primitives.cu, and their results on given numbers."""

    def __init__(self, library: Path) -> None:
        self._library = CDLL(str(library))
        self._library.csat_case.restype = c_char_p
        self._library.csat_run_case.restype = c_char_p
        self.cases: dict[str, tuple[int, bool, int, int]] = {}
        hopper, inputs, outputs = c_int(), c_int(), c_int()
        while name := self._library.csat_case(len(self.cases), byref(hopper), byref(inputs), byref(outputs)):
            self.cases[name.decode()] = len(self.cases), bool(hopper.value), inputs.value, outputs.value

    def input(self, name: str) -> Tensor:
        x = torch.randn(self.cases[name][2], generator=torch.Generator().manual_seed(7))
        if name == "elementwise":
            x[:9] = torch.tensor([0.0, -0.0, torch.inf, -torch.inf, torch.nan, 1e-40, 3e38, 1 + 2**-11, 1 + 2**-9])
        return x

    def run(self, name: str, x: Tensor) -> Tensor:
        index, _, inputs, outputs = self.cases[name]
        assert x.numel() == inputs and x.is_contiguous()
        y = torch.empty(outputs)
        problem = self._library.csat_run_case(index, c_void_p(x.data_ptr()), c_void_p(y.data_ptr()))
        assert not problem, problem.decode()
        return y


# ---- the formulas


def elementwise(x: Tensor) -> Tensor:
    def rounded(value: Tensor, dtype: torch.dtype) -> Tensor:
        return value.to(dtype).float()

    pairs = [rounded(v, dtype) for dtype in (torch.bfloat16, torch.float16) for v in (x, x / 3)]

    def soft_threshold(u: Tensor, theta: float) -> Tensor:
        return (u.abs() - theta).clamp(min=0).copysign(u)

    soft, third = soft_threshold(x, 0.5), soft_threshold(-x / 3, 0.1)
    packed = [rounded(v, torch.bfloat16) for v in (soft, third)]
    packed += [rounded(v.clamp(min=0).copysign(sign), torch.float16) for v, sign in ((x, -x), (1 - x, x))]
    bits = x.view(torch.int32)
    tf32 = torch.where(x.isfinite(), (bits + 0x1000) & ~0x1FFF, bits).view(torch.float32)
    plain = [rounded(x, torch.bfloat16), rounded(x, torch.float16), x]
    normal = torch.where(x.abs() < 2**-126, 0.0, x.abs())  # NaN stays
    of_magnitude = normal.log2(), x.abs().log(), x.abs().sqrt()
    return torch.cat([*plain, *pairs, x.exp(), x.exp2(), *of_magnitude, soft, x.clamp(min=0), x / 3, tf32, *packed])


def warps(x: Tensor) -> Tensor:
    t = torch.arange(64)
    warp, quad = x.view(2, 32, 1), x.view(16, 4, 1)
    four = (x.view(16, 4) * torch.tensor([1.0, 2.0, 3.0, 4.0])).sum(1, keepdim=True)
    rows = [
        x[t ^ 5],
        *(warp.sum(1).expand(2, 32), warp.amax(1).expand(2, 32)),
        *(quad.sum(1).expand(16, 4), quad.amax(1).expand(16, 4)),
        *(four.expand(16, 4), x[t ^ 3], (t % 32).float(), (t // 32).float()),
        (x > 2).view(2, 32).any(1, keepdim=True).expand(2, 32),
    ]
    return torch.cat([row.reshape(64) for row in rows])


def async_copies(x: Tensor) -> Tensor:
    first, second = x.view(2, 32, 4)
    copied = torch.arange(4) < torch.arange(32)[:, None] % 5
    return torch.cat([first.flatten().flip(0), (second * copied).flatten().flip(0)])


def matrices(tile: Tensor) -> Tensor:
    """A tile (16, 16) as (4 matrices, 32 lanes, 2): matrix i holds rows i % 2 * 8 on, columns i // 2 * 8 on."""
    return tile.view(2, 8, 2, 8).permute(2, 0, 1, 3).reshape(4, 32, 2)


def load_matrices(x: Tensor) -> Tensor:
    tile = x.bfloat16().float().view(2, 8, 2, 8)
    forms = [matrices(tile), matrices(tile.transpose(1, 3))]
    return torch.stack(forms * 2).flatten()


def store_matrices(x: Tensor) -> Tensor:
    tile = x.half().float().view(2, 2, 8, 8).permute(1, 2, 0, 3)
    return torch.cat([tile.flatten(), tile.transpose(1, 3).flatten()])


def warp_product(x: Tensor, dtype: torch.dtype) -> Tensor:
    a, b = x.to(dtype).double().view(24, 16).split([16, 8])
    return 1 + a @ b.mT


def warp_product_tf32(x: Tensor) -> Tensor:
    rounded = ((x.view(torch.int32) + 0x1000) & ~0x1FFF).view(torch.float32)
    a, b = rounded.double().view(24, 8).split([16, 8])
    return 1 + a @ b.mT


def tensor_box(x: Tensor, dtype: torch.dtype, *start: int) -> Tensor:
    """Rows of 128 bytes from `start` (outermost axis first) on, piece p of row r at p ^ (r % 8), zeros outside."""
    size = torch.finfo(dtype).bits // 8
    row, column = torch.arange(16)[:, None], torch.arange(128 // size)
    piece = 16 // size
    column = (column // piece ^ row % 8) * piece + column % piece
    matrix = x.to(dtype).float().view(2, 3, 21, 72)[tuple(([0, 0, *start])[-4:-2])]
    row, column = row + start[-2], column + start[-1]
    inside = (row >= 0) & (row < 21) & (column >= 0) & (column < 72)
    return torch.where(inside, matrix[row.clamp(0, 20), column.clamp(0, 71)], 0.0)


def wgmma(x: Tensor, dtype: torch.dtype, columns: int, left: str, right: str) -> Tensor:
    a, b = x.to(dtype).double().split([64 * 128, columns * 128])
    a = a.view(128, 64).mT if left == "columns" else a.view(64, 128)
    return a @ (b.view(128, columns) if right == "columns" else b.view(columns, 128).mT)


DTYPES = {"bf16": torch.bfloat16, "f16": torch.float16}
FORMULAS: dict[str, Callable[[Tensor], Tensor]] = {
    "elementwise": elementwise,
    "warps": warps,
    "async_copies": async_copies,
    "load_matrices": load_matrices,
    "warp_product bf16": lambda x: warp_product(x, torch.bfloat16),
    "warp_product f16": lambda x: warp_product(x, torch.float16),
    "warp_product_tf32": warp_product_tf32,
    "named_barriers": lambda x: x.view(3, 32).flip(1),
    "store_matrices": store_matrices,
    "mbarriers": lambda x: x.view(2, 64).flip(1),
    "bulk_copies": lambda x: 2 * x,
    "registers": lambda x: torch.cat([x[:128] + 1, x[128:] - 1]),
    "tensor_box bf16 2": lambda x: tensor_box(x, torch.bfloat16, -3, 40),
    "tensor_box f16 3": lambda x: tensor_box(x, torch.float16, 1, 12, 8),
    "tensor_box float 4": lambda x: tensor_box(x, torch.float32, 1, 2, 5, -8),
}
for case in (
    *("bf16 16 registers rows", "f16 32 registers rows", "bf16 64 registers rows", "f16 80 registers rows"),
    *("bf16 96 registers rows", "f16 128 registers rows", "bf16 256 registers rows"),
    *("f16 64 registers columns", "bf16 128 registers columns", "f16 256 registers columns"),
    *("f16 16 rows rows", "bf16 32 columns rows", "f16 64 columns columns", "bf16 80 rows rows"),
    *("f16 96 columns rows", "bf16 128 rows columns", "f16 256 rows rows"),
):
    dtype, columns, left, right = case.split()
    FORMULAS[f"wgmma {case}"] = lambda x, d=DTYPES[dtype], n=int(columns), a=left, b=right: wgmma(x, d, n, a, b)


def assert_same(name: str, got: Tensor, expected: Tensor) -> None:
    """Bitwise where numbers only move; else to what float32 sums in any order and the library's functions promise."""
    expected = expected.float().flatten()
    computes = name.startswith(("elementwise", "warps", "warp_product", "wgmma"))
    rtol, atol = (1e-6, 1e-4 if "wgmma" in name else 1e-5) if computes else (0.0, 0.0)
    torch.testing.assert_close(got, expected, rtol=rtol, atol=atol, equal_nan=True)


# ---- the two builds


@pytest.fixture(scope="session")
def emulated() -> Primitives:
    if reason := build.why_not_buildable():
        pytest.skip(reason)
    return Primitives(build.build("emulated_primitives"))


@pytest.fixture(scope="session")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> Primitives:
    if (nvcc := shutil.which("nvcc")) is None:
        pytest.skip("no nvcc")
    library = tmp_path_factory.mktemp("primitives") / "libprimitives.so"
    flags = ["-std=c++20", "-O3", "-shared", "-Xcompiler", "-fPIC", "-Werror", "all-warnings", f"-I{ROOT / 'csrc'}"]
    code = [f"-gencode=arch={architecture}" for architecture in ARCHITECTURES]
    done = subprocess.run([nvcc, *flags, *code, str(SOURCE), "-o", str(library)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-4000:]
    return Primitives(library)


def test_every_word_is_at_work() -> None:
    """No word of prims.cuh is left out of primitives.cu; two serve words alone."""
    words = set(re.findall(r"CSAT_DEVICE [\w:]+ (\w+)(?:<\w+>)?\(", (ROOT / "csrc" / "csat" / "prims.cuh").read_text()))
    assert {"mma_m16n8k16", "wgmma_k16_shared", "tensor_copy_4d", "soft_threshold"} <= words
    used = set(re.findall(r"\b(\w+)(?:<[^<>()]*>)?\(", SOURCE.read_text()))
    assert words - used == {"pin", "shared_address"}


def test_ptx_and_intrinsics_stay_in_prims() -> None:
    """Kernels are written in its words; comments may name the instructions behind them."""
    words = {"__global__", "__launch_bounds__", "__grid_constant__", "__syncthreads"}  # as in CUDA, of prims.cuh's list
    outside = {}
    for path in (ROOT / "csrc").rglob("*"):
        if path.suffix in (".cuh", ".cu") and path.name != "prims.cuh":
            code = re.sub(r"//.*", "", path.read_text())
            found = set(re.findall(r"\basm\b|\b__[a-z]\w*", code)) - words
            if found:
                outside[path.name] = found
    assert not outside


def test_every_case_has_a_formula(emulated: Primitives) -> None:
    assert emulated.cases.keys() == FORMULAS.keys()


@pytest.mark.parametrize("name", FORMULAS)
def test_emulator_agrees_with_the_formula(emulated: Primitives, name: str) -> None:
    x = emulated.input(name)
    assert_same(name, emulated.run(name, x), FORMULAS[name](x))


def test_compiles_for_every_architecture(compiled: Primitives) -> None:
    assert compiled.cases.keys() == FORMULAS.keys()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("name", FORMULAS)
def test_device_agrees_with_the_emulator(emulated: Primitives, compiled: Primitives, name: str) -> None:
    if compiled.cases[name][1] and torch.cuda.get_device_capability()[0] != 9:
        pytest.skip("needs compute capability 9.0")
    x = emulated.input(name)
    assert_same(name, compiled.run(name, x), emulated.run(name, x))
