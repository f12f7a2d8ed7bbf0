"""The one script for a GPU that is lent for half an hour: builds, tests, times, and keeps what it has if it is killed.

    python benchmarks/gpu_check.py                                  # every stage, within --seconds
    python benchmarks/gpu_check.py --stage ops --folder FOLDER      # one of them

Stages: `build` (in place, for this device), `tests` (tests/gpu with its primitives, the operator's tests on cuda),
`ops` (each operator beside the ceilings of the device), `attention` (the whole against scaled_dot_product_attention
over all tokens, forward and training step, and what LISTA adds), `sanitize` (compute-sanitizer over a few tests). Each
runs in a process of its own; FOLDER/gpu_check_<device>.json is written after each, and after every group of figures.

Sizes are those of `kernel_budgets.py`: 64 pairs of 16 heads in bfloat16, Phi shared and frozen, three layers of LISTA
with P = D tied. FLOPs, least bytes, the clock and the ceilings are those of `csat bench kernels`: an operator's share
is the least time that the ceilings of the same process allow over the time it took. K and V are projected together.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from itertools import product
from pathlib import Path
from typing import Any

import torch
from baselines.sdpa import FullAttention
from deadline import Deadline
from kernel_budgets import HEADS, LAYERS, MEASUREMENTS, PAIRS, TOKENS, WIDTHS, budget, choices, floor_ms
from machine import header
from torch import Tensor

from csat_ext.bench.clock import COLD, Clock, CUDAClock, cache_bytes, measure
from csat_ext.bench.work import Work, causal_block

ROOT = Path(__file__).resolve().parents[1]
PYTHONPATH = os.pathsep.join(filter(None, (str(ROOT / "python"), os.environ.get("PYTHONPATH"))))
ENVIRONMENT = {**os.environ, "PYTHONPATH": PYTHONPATH}
Run = Callable[[], Any]
Result = dict[str, Any]


class Report:
    """The result file: one entry a stage, on disk as soon as it is put. Stages of earlier runs stay."""

    def __init__(self, folder: Path, device: str) -> None:
        self.path = folder / f"gpu_check_{re.sub(r'[^A-Za-z0-9]+', '_', device)}.json"
        self.device = device

    def stages(self) -> dict[str, Result]:
        return json.loads(self.path.read_text())["stages"] if self.path.exists() else {}

    def put(self, stage: str, result: Result) -> None:
        whole = {"device": self.device, "stages": self.stages() | {stage: {"machine": header(), **result}}}
        text = json.dumps(whole, indent=1).replace(str(ROOT), ".")  # a result file names no path of a machine
        text = re.sub(r"/(?:tmp|root|home|work)/[^\s\"'\\]*", "PATH", text)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.path.write_text(text + "\n")


def command(arguments: Sequence[str], deadline: Deadline, **environment: str) -> tuple[int | None, str]:
    """Exit status, None where it was stopped for time, and what it printed."""
    try:
        done = subprocess.run(
            arguments,
            cwd=ROOT,
            env=ENVIRONMENT | environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            timeout=max(deadline.left(), 1),
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


def build(deadline: Deadline) -> Iterator[Result]:
    """The libraries in place, machine code for this device alone; without nvcc those that are there, if they load."""
    loads = [sys.executable, "-c", "import sys; from csat_ext import _library; sys.exit(not _library.CUDA.kernels)"]
    if find_tool("nvcc") is None:
        there = command(loads, deadline)[0] == 0
        found = "the libraries that were there are used" if there else "and no library with CUDA kernels loads"
        yield {"status": "skipped" if there else "failed", "reason": f"no nvcc on this machine, {found}"}
        return
    major, minor = torch.cuda.get_device_capability()
    arch = os.environ.get("CSAT_CUDA_ARCHS", f"{major}{minor}{'a' if major >= 9 else ''}")
    setup = [sys.executable, "setup.py", "build_ext", "--inplace"]
    status, output = command(setup, deadline, CSAT_WITH_CUDA="1", CSAT_CUDA_ARCHS=arch)
    if status == 0:
        status, output = command(loads, deadline)
    yield {"status": outcome(status), "archs": arch, "output": "" if status == 0 else output[-3000:]}


def pytest_result(status: int | None, output: str) -> Result:
    lines = output.splitlines()
    failed = [line[:300] for line in lines if re.match(r"(FAILED|ERROR) ", line)]
    return {"status": outcome(status), "summary": lines[-1] if lines else "", "failed": failed[:40]}


PYTEST = (sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider")
# Most of a test is its reference in float64 on the CPU.
ABREAST = ("-n", str(min(12, os.cpu_count() or 1))) if find_spec("xdist") else ()


def tests(deadline: Deadline) -> Iterator[Result]:
    operators = ("operator", "implicit", "causal", "varlen")
    suites = {
        "primitives": ["tests/gpu/test_primitives.py"],  # compiled once: by one process
        "gpu": [*ABREAST, "tests/gpu/test_gpu.py"],
        "operator": [*ABREAST, *(f"tests/test_{name}.py" for name in operators), "-k", "cuda"],
    }
    result: Result = {}
    for name, selection in suites.items():
        result[name] = pytest_result(*command([*PYTEST, *selection], deadline))
        print(f"  {name}: {result[name]['summary']}", flush=True)
        passed = all(suite["status"] == "passed" for suite in result.values())
        yield {"status": "passed" if passed else "failed", **result}


# One of each family of kernels; racecheck makes a kernel a hundred times slower.
SANITIZED = (
    *("project-grouped-in-parts", "project_backward-per-head-masked", "renormalise_rows-shared"),
    "project_implicit-rademacher-per-head-masked",
    *("project_implicit-srht-per-head-masked", "project_implicit-pool-per-head-masked", "attend-D32", "attend-D128"),
    *(
        "attend_causal-no-window",
        "attend_causal_backward-grouped-masked",
        "attend_causal_backward-D64",
        "attend_causal_backward-D128",
        "attend_causal_decode-D64-P128",
        "attend_prefix-grouped-masked",
        "attend_prefix_backward-grouped-masked",
        "attend_prefix-D128-signed",
        "attend_prefix_decode-D64-P64",
        "attend_prefix_decode-D64-P128",
        "attend-streamed",
        "attend-wide",
        "attend_backward-D80",
        "attend_backward-D128",
        "decode-P128",
        "decode-wide",
    ),
    *("decode_backward-P64", "decode_backward-P128", "attend_decode-D64-P128", "attend_decode-D128-P64"),
)


def sanitize(deadline: Deadline) -> Iterator[Result]:
    tool = find_tool("compute-sanitizer")
    if tool is None:
        yield {"status": "skipped", "reason": "no compute-sanitizer on this machine"}
        return
    selection = [f"tests/gpu/test_gpu.py::test_agrees_with_float64[{label}-torch.bfloat16]" for label in SANITIZED]
    result: Result = {}
    for check in ("memcheck", "racecheck"):
        run = [tool, "--tool", check, "--error-exitcode", "9", *PYTEST, "--timeout=0", *selection]
        # without torch's cache every tensor is an allocation of its own, whose end memcheck knows
        status, output = command(run, deadline, PYTORCH_NO_CUDA_MEMORY_CACHING="1")
        found = [line for line in output.splitlines() if line.startswith("=========")]
        result[check] = {"status": outcome(status), "report": found[:60] + found[60:][-5:]}
        print(f"  {check}: {outcome(status)}, {found[-1] if found else output[-200:]}", flush=True)
        passed = all(part["status"] == "passed" for part in result.values())
        yield {"status": "passed" if passed else "failed", **result}


# ---- times -----------------------------------------------------------------------------------------------------------


def milliseconds(cases: dict[str, list[Run]], clock: Clock, turns: int) -> dict[str, float]:
    """Median of every case, a list of runs on rotated inputs; the cases take turns."""
    prepared = {name: [clock.prepare(run)[0] for run in runs] for name, runs in cases.items()}
    return {name: 1e3 * timing.median for name, timing in measure(prepared, clock, turns).items()}


def rates(asked: Work, ms: float, ceiling: dict[str, float]) -> Result:
    """A time with its rates, and its share of what the ceilings allow."""
    least, limit = floor_ms(asked, **ceiling)
    figures = {"ms": ms, "tflops": asked.flops / ms / 1e9, "terabytes": asked.moved / ms / 1e9}
    return {**figures, "floor_ms": least, "limit": limit, "share": least / ms}


def ceilings(clock: Clock) -> dict[str, float]:
    from csat_ext.bench import kernels

    device = torch.device("cuda")
    found = kernels.ceilings(device, ["bfloat16"], clock, kernels.grid_for(device))
    return {"tflops": found["product TFLOP/s"]["bfloat16"], "terabytes": found["copy TB/s"]}


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

    def sets(self) -> int:
        """Sets of inputs, one of whose tensors of tokens all together are `COLD` times the cache."""
        one = 2 * self.pairs * self.n * self.d
        return max(1, -(-int(COLD * cache_bytes(torch.device(self.device))) // one))

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
    """One run of every operator of a training step, backward operators themselves and not through autograd."""
    csat, phi, decoder, tau = torch.ops.csat, p.phi(), p.decoder(), p.d**-0.5
    q, k, v, dz = (p.rows(p.n) for _ in range(4))
    kc, vc = p.rows(p.m), p.rows(p.m)
    z, lse = csat.attend(q, kc, vc, None, tau)
    blocks = p.n // p.m * causal_block(p.m)
    causal = (q, p.rows(blocks), p.rows(blocks), k, v, None, None)
    numbers = tau, p.m, 0, causal_block(p.m)
    z_causal, lse_causal = csat.attend_causal(*causal, *numbers)
    f32, shape = torch.float32, q.shape[:2]
    sums = [torch.zeros(*shape, *of, device=p.device) for of in ((p.m, p.d), (p.m, p.d), (p.m,))]
    own_phi = p.randn(*shape, p.n, p.m, dtype=f32).softmax(-1).to(q.dtype)
    prefix = (q, k, v, own_phi, *sums, None, None)
    _, lse_prefix, *ends = csat.attend_prefix(*prefix, tau, False)
    of_ends = [torch.zeros_like(end) for end in ends]
    return {
        "project": lambda: [csat.project(x, phi, None) for x in (k, v)],
        "project_backward": lambda: [
            csat.project_backward(dy, x, phi, None, True, False) for dy, x in ((kc, k), (vc, v))
        ],
        "attend": lambda: csat.attend(q, kc, vc, None, tau),
        "attend_decode": lambda: csat.attend_decode(q, kc, vc, None, tau, *decoder, True),
        "attend_backward": lambda: csat.attend_backward(dz, q, kc, vc, None, z, lse, tau),
        "decode_backward": lambda: csat.decode_backward(dz, z, *decoder),
        "attend_causal": lambda: csat.attend_causal(*causal, *numbers),
        "attend_causal_backward": lambda: csat.attend_causal_backward(dz, *causal, z_causal, lse_causal, *numbers),
        "attend_prefix": lambda: csat.attend_prefix(*prefix, tau, False),
        "attend_prefix_decode": lambda: csat.attend_prefix_decode(*prefix, tau, False, *decoder, True),
        "attend_prefix_backward": lambda: csat.attend_prefix_backward(dz, *of_ends, *prefix, lse_prefix, tau, False),
    }


def operator_rows(p: Problem, clock: Clock, ceiling: dict[str, float]) -> list[Result]:
    chosen = choices(p.m, p.d, p.d, "cuda" if p.device == "cuda" else "sm_90")
    sets = [operations(p) for _ in range(p.sets())]
    times = milliseconds({op: [runs[op] for runs in sets] for op in sets[0]}, clock, turns=5)
    return [
        {
            "op": op,
            "family": chosen.get(op, chosen["project"])[0],
            **p.sizes(),
            **rates(budget(op, p.n, p.m, p.d), ms, ceiling),
        }
        for op, ms in times.items()
    ]


def few_heads(p: Problem, clock: Clock) -> Result:
    """`project` of few heads, whose tokens go in parts, beside a plain batched product."""
    sets = [(p.rows(p.n), p.phi()) for _ in range(p.sets())]
    runs = {
        "project_ms": [lambda x=x, phi=phi: torch.ops.csat.project(x, phi, None) for x, phi in sets],
        "matmul_ms": [lambda x=x, phi=phi: phi @ x for x, phi in sets],
    }
    return {"pairs": p.pairs, **p.sizes(), **milliseconds(runs, clock, turns=5)}


def forward_and_training(
    function: Callable[..., Tensor], sets: Sequence[Sequence[Tensor]], clock: Clock
) -> dict[str, float]:
    """Milliseconds of function(*leaves), and with the gradients of all leaves, the first of the output's shape."""

    def forward(leaves: Sequence[Tensor]) -> Tensor:
        with torch.no_grad():
            return function(*leaves)

    def training(leaves: Sequence[Tensor]) -> tuple[Tensor, ...]:
        return torch.autograd.grad(function(*leaves), leaves, leaves[0].detach())

    tracked = [[t.detach().requires_grad_() for t in leaves] for leaves in sets]
    runs: dict[str, list[Run]] = {
        "forward": [lambda s=s: forward(s) for s in sets],
        "training": [lambda s=s: training(s) for s in tracked],
    }
    return milliseconds(runs, clock, turns=5)


def full_attention(p: Problem, clock: Clock) -> dict[str, dict[str, float] | None]:
    """Backend -> milliseconds of attention over all tokens; None where this torch has it not for this device."""
    sets = [[p.rows(p.n) for _ in range(3)] for _ in range(p.sets())]
    result: dict[str, dict[str, float] | None] = {}
    for backend in ("flash", "cudnn"):
        try:
            result[backend] = forward_and_training(FullAttention(backend), sets, clock)
        except RuntimeError as error:
            print(f"  SDPA {backend}: {str(error).splitlines()[0]}", flush=True)
            result[backend] = None
    return result


FORWARD = ("project", "attend_decode")
TRAINING = (*FORWARD, "attend_backward", "decode_backward", "project_backward")


def attention_row(p: Problem, clock: Clock, ceiling: dict[str, float], full: dict[str, Any]) -> Result:
    from csat_ext import SparseDecoder, csat_attention

    phi = p.phi()

    # As the module has it by default: psi is the identity. `operations` has the kernels with a matrix.
    def whole(q: Tensor, k: Tensor, v: Tensor, S: Tensor, B: Tensor, theta: Tensor, step: Tensor) -> Tensor:
        return csat_attention(q, k, v, phi, decoder=SparseDecoder(S, B, theta, None, step, check_values=False))

    def leaves() -> list[Tensor]:
        S, B, theta, _, step = p.decoder()
        return [*(p.rows(p.n) for _ in range(3)), S, B, theta, step]

    sets = [leaves() for _ in range(p.sets())]
    ours = forward_and_training(whole, sets, clock)
    plain = forward_and_training(lambda q, k, v: csat_attention(q, k, v, phi), [own[:3] for own in sets], clock)
    row: Result = p.sizes() | {"psi": "identity"}
    for name, parts in (("forward", FORWARD), ("training", TRAINING)):
        asked = sum((budget(op, p.n, p.m, p.d, psi=False) for op in parts), Work(0.0, 0.0))
        row[name] = rates(asked, ours[name], ceiling) | {
            "lista_over_attention": ours[name] / plain[name] - 1,
            "speed_over_sdpa": {b: times[name] / ours[name] if times else None for b, times in full.items()},
            "sdpa_ms": {b: times[name] if times else None for b, times in full.items()},
        }
    return row


def load_kernels() -> None:
    """Raises RuntimeError where `torch.ops.csat` would not run on the device by its own kernels."""
    from csat_ext import _library

    if not _library.CUDA.kernels:
        raise RuntimeError(_library.CUDA.reason)


def by_size(deadline: Deadline, left_out: list[dict[str, int]]) -> Iterator[Problem]:
    """Every published size, the short ones first; those for which no time was left go to `left_out`."""
    for n, d, m in product(TOKENS, WIDTHS, MEASUREMENTS):
        p = Problem(n, m, d)
        if deadline.left() < 5:
            left_out.append(p.sizes())
        else:
            yield p


def ops(deadline: Deadline) -> Iterator[Result]:
    load_kernels()
    clock = CUDAClock()
    result: Result = {"ceilings": ceilings(clock), "left_out": [], "few_heads": [], "rows": []}
    yield result
    for pairs in (1, 4, 16):
        result["few_heads"].append(few_heads(Problem(TOKENS[-1], 256, 64, pairs, pairs), clock))
    for p in by_size(deadline, result["left_out"]):
        rows = operator_rows(p, clock, result["ceilings"])
        result["rows"] += rows
        for row in rows:
            print(
                "  {op:16} {family:7} n={n:<6} m={m:<4} d={d:<4} {ms:9.4f} ms, {share:.2f} of the floor".format(**row)
            )
        yield result


def attention(deadline: Deadline) -> Iterator[Result]:
    load_kernels()
    clock = CUDAClock(rounds_per_turn=1)  # attention over 65536 tokens takes a second
    result: Result = {"ceilings": ceilings(clock), "left_out": [], "rows": []}
    full: dict[tuple[int, int], Any] = {}
    for p in by_size(deadline, result["left_out"]):
        if (p.n, p.d) not in full:  # m is nothing to attention over all tokens
            full[p.n, p.d] = full_attention(p, clock)
        row = attention_row(p, clock, result["ceilings"], full[p.n, p.d])
        result["rows"].append(row)
        for name in ("forward", "training"):
            part = row[name]
            print(f"  {name:8} {p.sizes()} {part['ms']:9.4f} ms, over SDPA {part['speed_over_sdpa']}", flush=True)
        yield result


# ---- running them ----------------------------------------------------------------------------------------------------

STAGES: dict[str, Callable[[Deadline], Iterator[Result]]] = {
    "build": build,
    "tests": tests,
    "ops": ops,
    "attention": attention,
    "sanitize": sanitize,
}


def run_stage(stage: str, report: Report, deadline: Deadline) -> bool:
    """Runs a stage here; what it yields is on disk at once. False where it failed."""
    start, result = time.monotonic(), {}
    try:
        for result in STAGES[stage](deadline):
            report.put(stage, {"status": "running", **result})
        result = {"status": "left out sizes" if result.get("left_out") else "passed", **result}
    except Exception as error:  # whatever it is, the other stages run
        result = {**result, "status": "failed", "reason": f"{type(error).__name__}: {str(error)[:2000]}"}
    report.put(stage, result | {"seconds": round(time.monotonic() - start, 1)})
    print(f"{stage}: {result['status']} {result.get('reason', '')}", flush=True)
    return result["status"] not in ("failed", "stopped")


def run_apart(stage: str, report: Report, deadline: Deadline) -> bool:
    """Runs a stage in a process of its own: a kernel that fails spoils the device for that process alone."""
    arguments = ["--stage", stage, "--folder", str(report.path.parent), "--seconds", f"{deadline.left():.0f}"]
    try:
        done = subprocess.run([sys.executable, __file__, *arguments], timeout=deadline.left() + 15)
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
    deadline, report = Deadline(given.seconds), Report(given.folder.resolve(), torch.cuda.get_device_name())
    run = run_stage if len(given.stage) == 1 else run_apart
    passed = [run(stage, report, deadline) for stage in given.stage]
    print(report.path)
    return 0 if all(passed) else 1


if __name__ == "__main__":
    sys.exit(main())
