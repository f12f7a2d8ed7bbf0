"""One command for a GPU machine: builds the CUDA kernels if needed, runs the GPU tests, times every operator.

    python benchmarks/gpu_check.py                            # build, tests, timings -> results/gpu_check_<device>.json
    python benchmarks/gpu_check.py --skip-tests --output FILE

Each operator is timed forward and backward with CUDA events (median of `--repeats`, after a warm-up, with the L2 cache
overwritten in between) beside plain torch on the same tensors in the same process: scaled_dot_product_attention over
all tokens for the whole of csat attention, eager matrix products for the parts. Figures are ratios; the times hold for
the device in the header alone.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import statistics
import subprocess
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from machine import header
from torch import Tensor

ROOT = Path(__file__).resolve().parents[1]
DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}


@dataclass(frozen=True)
class Sizes:
    batch: int = 8
    heads: int = 12
    tokens: int = 4096
    m: int = 256
    dim: int = 64
    atoms: int = 128
    layers: int = 8


def build() -> None:
    """Builds `_C` and `_cuda` in place unless the CUDA kernels load already."""
    check = "import sys; from csat_ext import _library; sys.exit(not _library.CUDA.kernels)"
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "python")}
    if subprocess.run([sys.executable, "-c", check], env=environment, stderr=subprocess.DEVNULL).returncode == 0:
        return
    command = [sys.executable, "setup.py", "build_ext", "--inplace"]
    subprocess.run(command, cwd=ROOT, env={**environment, "CSAT_WITH_CUDA": "1"}, check=True)


def run_tests() -> dict[str, Any]:
    """The GPU tests, and the operator suite, whose `cuda` backend is skipped elsewhere."""
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "tests/gpu", "tests/test_operator.py"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "python")}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    lines = done.stdout.splitlines()
    failed = [line for line in lines if re.match(r"(FAILED|ERROR) ", line)]
    return {"passed": done.returncode == 0, "summary": lines[-1] if lines else done.stderr[-500:], "failed": failed}


def milliseconds(f: Callable[[], Any], repeats: int) -> float:
    flush = torch.empty(256 << 20, dtype=torch.uint8, device="cuda")
    for _ in range(3):
        f()
    times = []
    for _ in range(repeats):
        flush.zero_()
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        f()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end))
    return statistics.median(times)


def forward_backward(f: Callable[..., Any], leaves: list[Tensor], repeats: int) -> dict[str, float]:
    """Times f(*leaves), and f with the gradients of all of its leaves."""
    with torch.no_grad():
        forward = milliseconds(lambda: f(*leaves), repeats)
    leaves = [t.detach().requires_grad_() for t in leaves]
    weight = torch.randn_like(f(*leaves))
    both = milliseconds(lambda: torch.autograd.grad(f(*leaves), leaves, weight, allow_unused=True), repeats)
    return {"forward_ms": forward, "training_ms": both}


def plain_decode(z: Tensor, S: Tensor, B: Tensor, theta: Tensor, psi: Tensor, step: Tensor) -> Tensor:
    S, B, theta, psi, step = (t.to(z.dtype) for t in (S, B, theta, psi, step))
    bz, a = z @ B[:, 0].mT, 0.0
    for t in range(theta.shape[1]):
        drift = bz if t == 0 else a @ S[:, 0].mT + bz - a
        u = a + step[:, t, None, None] * drift
        a = u.sign() * (u.abs() - theta[:, t, None]).relu()
    return a @ psi.mT


Function = Callable[..., Tensor]


def comparisons(s: Sizes, dtype: torch.dtype) -> dict[str, tuple[Function, Function, list[Tensor], float]]:
    """Name -> (csat, plain torch, arguments, FLOP of the forward)."""
    csat = torch.ops.csat
    generator = torch.Generator("cuda").manual_seed(0)

    def randn(*shape: int, scale: float = 1.0, dtype: torch.dtype = dtype) -> Tensor:
        return (scale * torch.randn(shape, device="cuda", generator=generator)).to(dtype)

    q, k, v = (randn(s.batch, s.heads, s.tokens, s.dim) for _ in range(3))
    phi = randn(1, s.heads, s.m, s.tokens).softmax(-1)
    kc, vc = (randn(s.batch, s.heads, s.m, s.dim) for _ in range(2))
    S = torch.eye(s.atoms, device="cuda")
    S = S + randn(1, 1, s.atoms, s.atoms, scale=0.3 * s.atoms**-0.5, dtype=torch.float32)
    B = randn(1, 1, s.atoms, s.dim, scale=s.dim**-0.5, dtype=torch.float32)
    theta = 0.05 + 0.1 * randn(1, s.layers, s.atoms, dtype=torch.float32).abs()
    psi = randn(1, s.dim, s.atoms, scale=s.atoms**-0.5, dtype=torch.float32)
    decoder = [S, B, theta, psi, torch.ones(1, s.layers, device="cuda")]
    scale, rows = s.dim**-0.5, s.batch * s.heads * s.tokens
    sdpa = torch.nn.functional.scaled_dot_product_attention
    project_flop = 2.0 * rows * s.m * s.dim
    attend_flop = 4.0 * rows * s.m * s.dim
    decode_flop = 2.0 * rows * s.atoms * ((s.layers - 1) * s.atoms + 2 * s.dim)

    def whole(q: Tensor, k: Tensor, v: Tensor, phi: Tensor, *decoder: Tensor) -> Tensor:
        compressed = (csat.project(x, phi, None) for x in (k, v))
        return csat.attend_decode(q, *compressed, None, scale, *decoder, True)[0]

    return {
        "project": (lambda x, phi: csat.project(x, phi, None), lambda x, phi: phi @ x, [k, phi], project_flop),
        "attend": (
            lambda q, kc, vc: csat.attend(q, kc, vc, None, scale)[0],
            lambda q, kc, vc: sdpa(q, kc, vc),
            [q, kc, vc],
            attend_flop,
        ),
        "decode": (csat.decode, plain_decode, [q, *decoder], decode_flop),
        "attend_decode": (
            lambda q, kc, vc, *decoder: csat.attend_decode(q, kc, vc, None, scale, *decoder, True)[0],
            lambda q, kc, vc, *decoder: plain_decode(sdpa(q, kc, vc), *decoder),
            [q, kc, vc, *decoder],
            attend_flop + decode_flop,
        ),
        "csat attention against sdpa over all tokens": (
            whole,
            lambda q, k, v, *_: sdpa(q, k, v),
            [q, k, v, phi, *decoder],
            2 * project_flop + attend_flop + decode_flop,
        ),
    }


def timings(s: Sizes, dtype: torch.dtype, repeats: int) -> list[dict[str, Any]]:
    rows = []
    for name, (ours, plain, arguments, flop) in comparisons(s, dtype).items():
        a, b = forward_backward(ours, arguments, repeats), forward_backward(plain, arguments, repeats)
        rows.append(
            {
                "op": name,
                **a,
                "forward_tflops": flop / a["forward_ms"] / 1e9,
                "plain_forward_ms": b["forward_ms"],
                "plain_training_ms": b["training_ms"],
                "forward_speed_ratio": b["forward_ms"] / a["forward_ms"],
                "training_speed_ratio": b["training_ms"] / a["training_ms"],
            }
        )
        ratio = b["forward_ms"] / a["forward_ms"]
        print(f"  {name:<46} {a['forward_ms']:8.3f} ms, {ratio:.2f} times the speed of plain torch", flush=True)
    return rows


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--skip-tests", action="store_true")
    parser.add_argument("--repeats", type=int, default=20)
    parser.add_argument("--tokens", type=int, nargs="+", default=[1024, 4096, 16384])
    parser.add_argument("--dtypes", nargs="+", choices=list(DTYPES), default=["bfloat16", "float32"])
    parser.add_argument("--output", type=Path)
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        print("gpu_check: no CUDA device here; nothing was measured", file=sys.stderr)
        return 1
    build()
    sys.path.insert(0, str(ROOT / "python"))
    import csat_ext.ops  # noqa: F401  (loads torch.ops.csat)

    device = torch.cuda.get_device_name()
    result: dict[str, Any] = {**header(), "cuda_build": torch.ops.csat.cuda_build_info()}
    name = f"gpu_check_{re.sub(r'[^A-Za-z0-9]+', '_', device)}.json"
    output = arguments.output or ROOT / "benchmarks" / "results" / name
    if not arguments.skip_tests:
        result["tests"] = run_tests()
        print(result["tests"]["summary"])
    result["timings"] = []
    for name in arguments.dtypes:
        for tokens in arguments.tokens:
            sizes = Sizes(tokens=tokens)
            print(f"{name}, {tokens} tokens")
            rows = timings(sizes, DTYPES[name], arguments.repeats)
            result["timings"].append({"dtype": name, "sizes": asdict(sizes), "ops": rows})
            output.write_text(json.dumps(result, indent=1) + "\n")
    return 0 if arguments.skip_tests or result["tests"]["passed"] else 1


if __name__ == "__main__":
    sys.exit(main())
