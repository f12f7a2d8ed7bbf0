"""The one script for a GPU that is lent for half an hour: builds, tests, times, and keeps what it has if it is killed.

    python benchmarks/gpu_check.py                                  # every stage, within --seconds
    python benchmarks/gpu_check.py --stage ops --folder FOLDER      # one of them

Stages: `build` (in place, for this device), `tests` (tests/gpu with its primitives, the operator's tests on cuda),
`ops` (each operator beside the ceilings of the device), `attention` (the whole against scaled_dot_product_attention
over all tokens, forward and training step, and what LISTA adds), `sanitize` (compute-sanitizer over a few tests). Each
runs in a process of its own; FOLDER/gpu_check_<device>.json is written after each, and after every group of figures.

Sizes, FLOPs and least bytes are those of `kernel_budgets.py`: 64 pairs of 16 heads in bfloat16, Phi shared and frozen,
three layers of LISTA with P = D tied. A time is a median over CUDA events, the L2 cache overwritten before each run and
the stream kept busy until the host has launched everything. The ceilings, a large copy and a large matrix product, are
measured in the same process: an operator's share is the least time that they allow over the time it took.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from kernel_budgets import HEADS, LAYERS, MEASUREMENTS, PAIRS, TOKENS, WIDTHS, budget, choices, floor_ms
from machine import header
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from csat_ext.bench.work import Work

ROOT = Path(__file__).resolve().parents[1]
PYTHONPATH = os.pathsep.join(filter(None, (str(ROOT / "python"), os.environ.get("PYTHONPATH"))))
ENVIRONMENT = {**os.environ, "PYTHONPATH": PYTHONPATH}
Run = Callable[[], Any]
Timer = Callable[[Run], float]  # milliseconds
Result = dict[str, Any]


class Clock:
    """Seconds left of those that the run may take."""

    def __init__(self, seconds: float) -> None:
        self._end = time.monotonic() + seconds

    def left(self) -> float:
        return max(self._end - time.monotonic(), 0.0)


class Report:
    """The result file: one entry a stage, on disk as soon as it is put. Stages of earlier runs stay."""

    def __init__(self, folder: Path, device: str) -> None:
        self.path = folder / f"gpu_check_{re.sub(r'[^A-Za-z0-9]+', '_', device)}.json"
        self.device = device

    def stages(self) -> dict[str, Result]:
        return json.loads(self.path.read_text())["stages"] if self.path.exists() else {}

    def put(self, stage: str, result: Result) -> None:
        machine = header() | {"command": f"python benchmarks/gpu_check.py --stage {stage}"}
        whole = {"device": self.device, "stages": self.stages() | {stage: {"machine": machine, **result}}}
        text = json.dumps(whole, indent=1).replace(str(ROOT), ".")  # a result file names no path of a machine
        text = re.sub(r"/(?:tmp|root|home|work)/[^\s\"'\\]*", "PATH", text)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.path.write_text(text + "\n")


def command(arguments: Sequence[str], clock: Clock, **environment: str) -> tuple[int | None, str]:
    """Exit status, None where it was stopped for time, and what it printed."""
    try:
        done = subprocess.run(
            arguments,
            cwd=ROOT,
            env=ENVIRONMENT | environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            timeout=max(clock.left(), 1),
        )
        return done.returncode, done.stdout.decode(errors="replace")
    except subprocess.TimeoutExpired as stopped:
        return None, (stopped.stdout or b"").decode(errors="replace")


def outcome(status: int | None) -> str:
    return "stopped" if status is None else ("failed" if status else "passed")


# ---- build, tests, sanitizer -----------------------------------------------------------------------------------------


def find_tool(name: str) -> str | None:
    """A tool of the CUDA toolkit: on the path or in CUDA_HOME."""
    home = Path(os.environ.get("CUDA_HOME", "/usr/local/cuda")) / "bin" / name
    return shutil.which(name) or (str(home) if home.exists() else None)


def build(clock: Clock) -> Iterator[Result]:
    """The libraries in place, machine code for this device alone; without nvcc those that are there, if they load."""
    loads = [sys.executable, "-c", "import sys; from csat_ext import _library; sys.exit(not _library.CUDA.kernels)"]
    if find_tool("nvcc") is None:
        there = command(loads, clock)[0] == 0
        found = "the libraries that were there are used" if there else "and no library with CUDA kernels loads"
        yield {"status": "skipped" if there else "failed", "reason": f"no nvcc on this machine, {found}"}
        return
    major, minor = torch.cuda.get_device_capability()
    arch = os.environ.get("CSAT_CUDA_ARCHS", f"{major}{minor}{'a' if major >= 9 else ''}")
    setup = [sys.executable, "setup.py", "build_ext", "--inplace"]
    status, output = command(setup, clock, CSAT_WITH_CUDA="1", CSAT_CUDA_ARCHS=arch)
    if status == 0:
        status, output = command(loads, clock)
    yield {"status": outcome(status), "archs": arch, "output": "" if status == 0 else output[-3000:]}


def pytest_result(status: int | None, output: str) -> Result:
    lines = output.splitlines()
    failed = [line[:300] for line in lines if re.match(r"(FAILED|ERROR) ", line)]
    return {"status": outcome(status), "summary": lines[-1] if lines else "", "failed": failed[:40]}


PYTEST = (sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider")


def tests(clock: Clock) -> Iterator[Result]:
    suites = {"gpu": ["tests/gpu"], "operator": ["tests/test_operator.py", "-k", "cuda"]}
    result: Result = {}
    for name, selection in suites.items():
        result[name] = pytest_result(*command([*PYTEST, *selection], clock))
        print(f"  {name}: {result[name]['summary']}", flush=True)
        passed = all(suite["status"] == "passed" for suite in result.values())
        yield {"status": "passed" if passed else "failed", **result}


# One of each family of kernels; racecheck makes a kernel a hundred times slower.
SANITIZED = (
    *("project-grouped-in-parts", "project_backward-per-head-masked", "project_implicit-rademacher-per-head-masked"),
    *("project_implicit-srht-per-head-masked", "project_implicit-pool-per-head-masked", "attend-D32", "attend-D128"),
    *("attend-streamed", "attend-wide", "attend_backward-D80", "attend_backward-D128", "decode-P128", "decode-wide"),
    *("decode_backward-P64", "decode_backward-P128", "attend_decode-D64-P128", "attend_decode-D128-P64"),
)


def sanitize(clock: Clock) -> Iterator[Result]:
    tool = find_tool("compute-sanitizer")
    if tool is None:
        yield {"status": "skipped", "reason": "no compute-sanitizer on this machine"}
        return
    selection = [f"tests/gpu/test_gpu.py::test_agrees_with_float64[{label}-torch.bfloat16]" for label in SANITIZED]
    result: Result = {}
    for check in ("memcheck", "racecheck"):
        run = [tool, "--tool", check, "--error-exitcode", "9", *PYTEST, "--timeout=0", *selection]
        # without torch's cache every tensor is an allocation of its own, whose end memcheck knows
        status, output = command(run, clock, PYTORCH_NO_CUDA_MEMORY_CACHING="1")
        found = [line for line in output.splitlines() if line.startswith("=========")]
        result[check] = {"status": outcome(status), "report": found[:60] + found[60:][-5:]}
        print(f"  {check}: {outcome(status)}, {found[-1] if found else output[-200:]}", flush=True)
        passed = all(part["status"] == "passed" for part in result.values())
        yield {"status": "passed" if passed else "failed", **result}


# ---- times -----------------------------------------------------------------------------------------------------------


class EventTimer:
    """Median time of a run on the device, without its launches."""

    def __init__(self) -> None:
        self._flush = torch.empty(256 << 20, dtype=torch.uint8, device="cuda")

    def __call__(self, run: Run) -> float:
        for _ in range(2):
            run()
        first = self._once(run)
        return statistics.median(self._once(run) for _ in range(max(3, min(30, int(200 / first)))))

    def _once(self, run: Run) -> float:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        self._flush.zero_()
        torch.cuda._sleep(4_000_000)  # cycles, about 2 ms, in which the host launches what is timed
        start.record()
        run()
        end.record()
        end.synchronize()
        return start.elapsed_time(end)


def ceilings(timer: Timer, device: str = "cuda", side: int = 8192, elements: int = 1 << 31) -> dict[str, float]:
    """TFLOP/s of a large product of random bfloat16 and TB/s, read and written, of a large copy."""
    a, b = (torch.randn(side, side, device=device).bfloat16() for _ in range(2))
    source = torch.empty(elements, dtype=torch.uint8, device=device).random_()
    target = torch.empty_like(source)
    return {
        "tflops": 2.0 * side**3 / timer(lambda: a @ b) / 1e9,
        "terabytes": 2.0 * elements / timer(lambda: target.copy_(source)) / 1e9,
    }


def rates(asked: Work, ms: float, ceiling: dict[str, float]) -> Result:
    """A time with its rates, and its share of what the ceilings allow."""
    least, limit = floor_ms(asked, **ceiling)
    figures = {"ms": ms, "tflops": asked.flops / ms / 1e9, "terabytes": asked.moved / ms / 1e9}
    return {**figures, "floor_ms": least, "limit": limit, "share": least / ms}


@dataclass(frozen=True)
class Problem:
    """One size, and its tensors in bfloat16."""

    n: int
    m: int
    d: int
    pairs: int = PAIRS
    heads: int = HEADS
    device: str = "cuda"

    def sizes(self) -> dict[str, int]:
        return {"n": self.n, "m": self.m, "d": self.d}

    def randn(self, *shape: int, scale: float = 1.0, dtype: torch.dtype = torch.bfloat16) -> Tensor:
        return torch.randn(shape, device=self.device, dtype=dtype) * scale

    def rows(self, count: int) -> Tensor:
        return self.randn(self.pairs // self.heads, self.heads, count, self.d)

    def phi(self) -> Tensor:
        return self.randn(1, 1, self.m, self.n).softmax(-1)

    def decoder(self) -> tuple[Tensor, ...]:
        """S, B, theta, psi and step as `torch.ops.csat` takes them."""
        d, f32 = self.d, torch.float32
        S = torch.eye(d, device=self.device) + self.randn(1, 1, d, d, scale=0.3 * d**-0.5, dtype=f32)
        B, psi = self.randn(1, 1, d, d, scale=d**-0.5, dtype=f32), self.randn(1, d, d, scale=d**-0.5, dtype=f32)
        theta = 0.05 + self.randn(1, LAYERS, d, scale=0.1, dtype=f32).abs()
        return S, B, theta, psi, torch.ones(1, LAYERS, device=self.device)


def operations(p: Problem) -> dict[str, Run]:
    """One run of every operator of a training step; K and V are measured, and their gradients taken, together."""
    csat, phi, decoder, tau = torch.ops.csat, p.phi(), p.decoder(), p.d**-0.5
    q, k, v, dz = (p.rows(p.n) for _ in range(4))
    kc, vc = p.rows(p.m), p.rows(p.m)
    z, lse = csat.attend(q, kc, vc, None, tau)
    return {
        "project": lambda: [csat.project(x, phi, None) for x in (k, v)],
        "project_backward": lambda: [
            csat.project_backward(dy, x, phi, None, True, False) for dy, x in ((kc, k), (vc, v))
        ],
        "attend": lambda: csat.attend(q, kc, vc, None, tau),
        "attend_decode": lambda: csat.attend_decode(q, kc, vc, None, tau, *decoder, True),
        "attend_backward": lambda: csat.attend_backward(dz, q, kc, vc, None, z, lse, tau),
        "decode_backward": lambda: csat.decode_backward(dz, z, *decoder),
    }


def operator_rows(p: Problem, timer: Timer, ceiling: dict[str, float]) -> list[Result]:
    chosen = choices(p.m, p.d, p.d, "cuda" if p.device == "cuda" else "sm_90")
    rows = []
    for op, run in operations(p).items():
        family = chosen.get(op, chosen["project"])[0]
        figures = rates(budget(op, p.n, p.m, p.d), timer(run), ceiling)
        rows.append({"op": op, "family": family, **p.sizes(), **figures})
    return rows


def few_heads(p: Problem, timer: Timer) -> Result:
    """`project` of few heads, whose tokens go in parts, beside a plain batched product."""
    x, phi = p.rows(p.n), p.phi()
    ours, plain = timer(lambda: torch.ops.csat.project(x, phi, None)), timer(lambda: phi @ x)
    return {"pairs": p.pairs, **p.sizes(), "ms": ours, "matmul_ms": plain}


def forward_and_training(function: Callable[..., Tensor], leaves: Sequence[Tensor], timer: Timer) -> dict[str, float]:
    """Milliseconds of function(*leaves), and with the gradients of all of its leaves."""
    with torch.no_grad():
        forward = timer(lambda: function(*leaves))
        weight = torch.randn_like(leaves[0])
    leaves = [t.detach().requires_grad_() for t in leaves]
    return {"forward": forward, "training": timer(lambda: torch.autograd.grad(function(*leaves), leaves, weight))}


def sdpa(backend: SDPBackend) -> Callable[..., Tensor]:
    def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        with sdpa_kernel(backend):
            return scaled_dot_product_attention(q, k, v)

    return attention


SDPA = {"flash": SDPBackend.FLASH_ATTENTION, "cudnn": SDPBackend.CUDNN_ATTENTION}


def full_attention(p: Problem, timer: Timer) -> dict[str, dict[str, float] | None]:
    """Backend -> milliseconds of attention over all tokens; None where this torch has it not for this device."""
    qkv, result = [p.rows(p.n) for _ in range(3)], {}
    for name, backend in SDPA.items():
        try:
            result[name] = forward_and_training(sdpa(backend), qkv, timer)
        except RuntimeError as error:
            print(f"  SDPA {name}: {str(error).splitlines()[0]}", flush=True)
            result[name] = None
    return result


FORWARD = ("project", "attend_decode")
TRAINING = (*FORWARD, "attend_backward", "decode_backward", "project_backward")


def attention_row(p: Problem, timer: Timer, ceiling: dict[str, float], full: dict[str, Any]) -> Result:
    from csat_ext import SparseDecoder, csat_attention

    qkv, phi = [p.rows(p.n) for _ in range(3)], p.phi()
    weights = [w[0] for w in p.decoder()]

    def whole(q: Tensor, k: Tensor, v: Tensor, *w: Tensor) -> Tensor:
        return csat_attention(q, k, v, phi, decoder=SparseDecoder(*w, check_values=False))

    ours = forward_and_training(whole, [*qkv, *weights], timer)
    plain = forward_and_training(lambda q, k, v: csat_attention(q, k, v, phi), qkv, timer)
    row: Result = p.sizes()
    for name, ops in (("forward", FORWARD), ("training", TRAINING)):
        asked = sum((budget(op, p.n, p.m, p.d) for op in ops), Work(0.0, 0.0))
        row[name] = rates(asked, ours[name], ceiling) | {
            "lista_over_attention": ours[name] / plain[name] - 1,
            "speed_over_sdpa": {b: times[name] / ours[name] if times else None for b, times in full.items()},
            "sdpa_ms": {b: times[name] if times else None for b, times in full.items()},
        }
    return row


def load_kernels() -> None:
    """Raises RuntimeError where `torch.ops.csat` would not run on the device by its own kernels."""
    sys.path.insert(0, str(ROOT / "python"))
    from csat_ext import _library, ops  # noqa: F401  (registers torch.ops.csat)

    if not _library.CUDA.kernels:
        raise RuntimeError(_library.CUDA.reason)


def by_size(clock: Clock, left_out: list[dict[str, int]], **sizes: Any) -> Iterator[Problem]:
    """Every published size, the short ones first; those for which no time was left go to `left_out`."""
    for n in TOKENS:
        for d in WIDTHS:
            for m in MEASUREMENTS:
                p = Problem(n, m, d, **sizes)
                if clock.left() < 5:
                    left_out.append(p.sizes())
                    continue
                yield p


def ops(clock: Clock) -> Iterator[Result]:
    load_kernels()
    timer = EventTimer()
    result: Result = {"ceilings": ceilings(timer), "left_out": [], "few_heads": [], "rows": []}
    yield result
    for pairs in (1, 4, 16):
        result["few_heads"].append(few_heads(Problem(TOKENS[-1], 256, 64, pairs, pairs), timer))
    for p in by_size(clock, result["left_out"]):
        result["rows"] += operator_rows(p, timer, result["ceilings"])
        for row in result["rows"][-6:]:
            print(
                "  {op:16} {family:7} n={n:<6} m={m:<4} d={d:<4} {ms:9.4f} ms, {share:.2f} of the floor".format(**row)
            )
        yield result


def attention(clock: Clock) -> Iterator[Result]:
    load_kernels()
    timer = EventTimer()
    result: Result = {"ceilings": ceilings(timer), "left_out": [], "rows": []}
    full: dict[tuple[int, int], Any] = {}
    for p in by_size(clock, result["left_out"]):
        if (p.n, p.d) not in full:  # m is nothing to attention over all tokens
            full[p.n, p.d] = full_attention(p, timer)
        row = attention_row(p, timer, result["ceilings"], full[p.n, p.d])
        result["rows"].append(row)
        for name in ("forward", "training"):
            part = row[name]
            print(f"  {name:8} {p.sizes()} {part['ms']:9.4f} ms, over SDPA {part['speed_over_sdpa']}", flush=True)
        yield result


# ---- running them ----------------------------------------------------------------------------------------------------

STAGES: dict[str, Callable[[Clock], Iterator[Result]]] = {
    "build": build,
    "tests": tests,
    "ops": ops,
    "attention": attention,
    "sanitize": sanitize,
}


def run_stage(stage: str, report: Report, clock: Clock) -> bool:
    """Runs a stage here; what it yields is on disk at once. False where it failed."""
    start, result = time.monotonic(), {}
    try:
        for result in STAGES[stage](clock):
            report.put(stage, {"status": "running", **result})
        result = {"status": "left out sizes" if result.get("left_out") else "passed", **result}
    except Exception as error:  # whatever it is, the other stages run
        result = {**result, "status": "failed", "reason": f"{type(error).__name__}: {str(error)[:2000]}"}
    report.put(stage, result | {"seconds": round(time.monotonic() - start, 1)})
    print(f"{stage}: {result['status']} {result.get('reason', '')}", flush=True)
    return result["status"] not in ("failed", "stopped")


def run_apart(stage: str, report: Report, clock: Clock) -> bool:
    """Runs a stage in a process of its own: a kernel that fails spoils the device for that process alone."""
    arguments = ["--stage", stage, "--folder", str(report.path.parent), "--seconds", f"{clock.left():.0f}"]
    try:
        done = subprocess.run([sys.executable, __file__, *arguments], timeout=clock.left() + 15)
        return done.returncode == 0
    except subprocess.TimeoutExpired:
        report.put(stage, {**report.stages().get(stage, {}), "status": "failed", "reason": "stopped for time"})
        return False


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--stage", nargs="+", choices=list(STAGES), default=list(STAGES))
    parser.add_argument("--seconds", type=float, default=570, help="for all stages together (default: 570)")
    parser.add_argument("--folder", type=Path, default=ROOT / "benchmarks" / "results")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> int:
    given = parse(arguments)
    if not torch.cuda.is_available():
        print("gpu_check: no CUDA device here; nothing was measured", file=sys.stderr)
        return 1
    clock, report = Clock(given.seconds), Report(given.folder.resolve(), torch.cuda.get_device_name())
    run = run_stage if len(given.stage) == 1 else run_apart
    passed = [run(stage, report, clock) for stage in given.stage]
    print(report.path)
    return 0 if all(passed) else 1


if __name__ == "__main__":
    sys.exit(main())
