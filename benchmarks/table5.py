"""Table 5 of the paper: time and memory of a 12-layer, 512-wide, 8-head model as n grows, beside the paper's ratios.

    python benchmarks/table5.py                     # the device that is there: cuda in bfloat16, else cpu in float32
    python benchmarks/table5.py --quick             # two short lengths, one turn
    python benchmarks/table5.py --seconds 90        # what no time is left for is listed under "left_out"
    python benchmarks/table5.py --mlp 0 --compile   # attention alone; torch.compile'd LISTA too, which takes a while

What is in the model: 12 pre-norm residual blocks x + attention(LayerNorm(x)) with q, k, v and output projections and
biases, and nothing else (`--mlp 0`); then the same where each block also has x + W2 gelu(W1 LayerNorm(x)) of 4 x 512
(`--mlp 4`). No embedding, head, dropout, mask or optimizer: they cost the same under every mechanism. One call is the
forward pass and the gradients of the input and of all parameters, for a fixed gradient of the output.

Memory is that of the weights and buffers plus the most that one call holds at once. The mechanisms of one length take
turns; on CUDA a call is replayed as a graph where the graphs of all of them fit into memory, else launched, between
events. The file is written after every turn.
"""

from __future__ import annotations

import argparse
import gc
import json
import math
import statistics
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from deadline import Deadline
from machine import header
from mechanisms import NAMES, Block, LayerShape, attention_layer
from torch import nn

from csat_ext._library import CUDA
from csat_ext.bench.clock import Call, Clock, CPUClock, CUDAClock, Timing
from csat_ext.bench.kernels import DTYPES, free_bytes

HERE = Path(__file__).parent
DEFAULT = ("full", "full, scores kept", "linformer", "performer", "stock", "stock + LISTA", "csat", "csat + LISTA")
LENGTHS = {
    "cuda": (512, 1024, 2048, 4096, 8192, 16384, 32768, 65536),
    "cpu": (512, 1024, 2048, 4096, 8192),
}
PAPER = {"time": 2.5, "memory": 2.7}
"""Full over CSAT in the paper's Table 5, where CSAT is slower than Linformer and Performer. Its CSAT decodes by LISTA;
which full attention it ran is not said, so both stand here: torch's fused one and one that keeps its n^2 scores."""
MIB = 2**20
LENGTH_SHARE = 4
"""No turn is begun once the turns of a length have taken this part of the time that is left."""
SAMPLE = 0.02
FITTED = 4
"""Lengths that a growth exponent is fitted over: the longest that were measured."""


@dataclass(frozen=True)
class Settings:
    """What is measured; `mlp` lists hidden widths over the model's, 0 for blocks of attention alone."""

    device: str
    dtype: str
    lengths: tuple[int, ...]
    mechanisms: tuple[str, ...] = DEFAULT
    mlp: tuple[int, ...] = (0,)
    batch: int = 1
    layers: int = 12
    width: int = 512
    heads: int = 8
    m: int = 128
    turns: int = 5
    quick: bool = False


# ---- the model -------------------------------------------------------------------------------------------------------


def model(name: str, n: int, mlp: int, settings: Settings) -> nn.Sequential:
    """The blocks under one mechanism."""
    blocks = []
    for layer in range(settings.layers):
        shape = LayerShape(settings.width, settings.heads, n, settings.m, layer=layer)
        blocks.append(Block(attention_layer(name, shape), settings.width, mlp * settings.width))
    return share_equal_buffers(nn.Sequential(*blocks).to(settings.device, DTYPES[settings.dtype]))


def share_equal_buffers(blocks: nn.Sequential) -> nn.Sequential:
    """One copy of what is equal in all layers (the composition's Phi), as one who writes a model by hand would have."""
    first = dict(blocks[0].named_buffers())
    for block in blocks[1:]:
        for name, buffer in list(block.named_buffers()):
            if name in first and torch.equal(buffer, first[name]):
                owner, _, own = name.rpartition(".")
                setattr(block.get_submodule(owner), own, first[name])
    return blocks


def step_of(blocks: nn.Module, n: int, settings: Settings) -> Call:
    """The forward pass and the gradients of the input and the parameters."""
    place: dict[str, Any] = {"device": settings.device, "dtype": DTYPES[settings.dtype]}
    x = torch.randn(settings.batch, n, settings.width, **place).requires_grad_()
    weight = torch.randn(settings.batch, n, settings.width, **place)
    leaves = [x, *blocks.parameters()]
    return lambda: torch.autograd.grad(blocks(x), leaves, weight)


# ---- one length ------------------------------------------------------------------------------------------------------


@dataclass
class Case:
    """One mechanism at one length."""

    mechanism: str
    n: int
    mlp: int
    call: Call
    parameters: int
    weights_bytes: int
    peak_bytes: int
    estimate: float
    timer: str
    samples: list[float] = field(default_factory=list)

    def calls(self) -> list[Call]:
        """Enough of them for a sample of `SAMPLE` seconds, ten at most."""
        return [self.call] * max(1, min(10, int(SAMPLE / max(self.estimate, 1e-6))))

    def row(self) -> dict[str, Any]:
        timing = Timing(tuple(self.samples))
        return {
            "mechanism": self.mechanism,
            "mlp": self.mlp,
            "n": self.n,
            "median_ms": 1e3 * timing.median,
            "spread_ms": 1e3 * timing.spread,
            "memory_MiB": (self.weights_bytes + self.peak_bytes) / MIB,
            "weights_MiB": self.weights_bytes / MIB,
            "parameters": self.parameters,
            "timer": self.timer,
            "samples_ms": [1e3 * s for s in self.samples],
        }


def make_case(name: str, n: int, mlp: int, settings: Settings, clock: Clock) -> Case:
    """The case, run twice: once to warm up, once to see what it holds and how long it takes, roughly."""
    blocks = model(name, n, mlp, settings)
    call = step_of(blocks, n, settings)
    held = sum({t.data_ptr(): t.nbytes for t in (*blocks.parameters(), *blocks.buffers())}.values())
    parameters = sum(p.numel() for p in blocks.parameters())
    call()
    start = time.perf_counter()
    peak = clock.peak_bytes(call)
    timer = "cuda events" if settings.device == "cuda" else "torch.utils.benchmark"
    return Case(name, n, mlp, call, parameters, held, peak, time.perf_counter() - start, timer)


def capture(cases: Sequence[Case], clock: Clock, device: torch.device) -> None:
    """Graphs for all of them where their memory allows it, for none of them otherwise."""
    clear(device)
    together = 1.3 * sum(case.peak_bytes for case in cases)
    if device.type != "cuda" or together > 0.8 * free_bytes(device):
        return
    for case in cases:
        clear(device)
        case.call, case.timer = clock.prepare(case.call)


def clear(device: torch.device) -> None:
    gc.collect()
    if device.type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.empty_cache()


# ---- all lengths -----------------------------------------------------------------------------------------------------


class Table:
    """Rows by length and what was left out; `save` gets the whole result after every turn."""

    def __init__(self, settings: Settings, clock: Clock, deadline: Deadline, save: Callable[[dict[str, Any]], None]):
        self.settings, self.clock, self.deadline, self.save = settings, clock, deadline, save
        self.rows: list[dict[str, Any]] = []
        self.left_out: list[dict[str, Any]] = []
        self.last: dict[tuple[str, int], tuple[int, float, int]] = {}  # (mechanism, mlp): n, seconds, bytes of a call
        self.too_large: set[tuple[str, int]] = set()
        self.machine = header()

    def run(self) -> dict[str, Any]:
        for n in self.settings.lengths:
            for mlp in self.settings.mlp:
                self.measure_length(n, mlp)
        self.save(self.result())
        return self.result()

    def measure_length(self, n: int, mlp: int) -> None:
        device = torch.device(self.settings.device)
        cases = [case for name in self.settings.mechanisms if (case := self.case(name, n, mlp)) is not None]
        try:
            capture(cases, self.clock, device)
        except torch.OutOfMemoryError:  # the graphs so far hold too much: this length is launched
            cases.clear()
            clear(device)
            cases = [case for name in self.settings.mechanisms if (case := self.case(name, n, mlp)) is not None]
        self.take_turns(cases)
        cases.clear()
        clear(device)

    def case(self, name: str, n: int, mlp: int) -> Case | None:
        """None, and an entry of `left_out`, where time or memory do not allow it."""
        if (name, mlp) in self.too_large:
            self.leave_out(name, n, mlp, "memory: a shorter length did not fit")
            return None
        if self.would_be_killed(name, n, mlp):
            self.leave_out(name, n, mlp, "memory: what is free here may not hold it")
            return None
        expected = self.expected(name, n, mlp)
        if expected > self.deadline.left():
            self.leave_out(name, n, mlp, f"time: {expected:.0f} s wanted, {self.deadline.left():.0f} s left")
            return None
        try:
            case = make_case(name, n, mlp, self.settings, self.clock)
        except torch.OutOfMemoryError:
            self.too_large.add((name, mlp))
            self.leave_out(name, n, mlp, "memory: torch.OutOfMemoryError")
        except RuntimeError as error:  # a mechanism that does not run here leaves the others their rows
            self.leave_out(name, n, mlp, f"{type(error).__name__}: {str(error).splitlines()[0]}")
        else:
            self.last[name, mlp] = n, case.estimate, case.peak_bytes
            return case
        clear(torch.device(self.settings.device))
        return None

    def expected(self, name: str, n: int, mlp: int) -> float:
        """Seconds that a case takes at least, if its time grows with n^2 from the last length on: four calls."""
        before = self.last.get((name, mlp))
        return 1.0 if before is None else 4 * before[1] * (n / before[0]) ** 2

    def would_be_killed(self, name: str, n: int, mlp: int) -> bool:
        """Whether the memory of the last length, grown with n^2, is not there. On CUDA torch says so when it is tried;
        on CPU the system ends the process."""
        before = self.last.get((name, mlp))
        device = torch.device(self.settings.device)
        if before is None or device.type == "cuda":
            return False
        return before[2] * (n / before[0]) ** 2 > 0.7 * free_bytes(device)

    def leave_out(self, name: str, n: int, mlp: int, reason: str) -> None:
        self.left_out.append({"mechanism": name, "mlp": mlp, "n": n, "reason": reason})
        print(f"n={n} mlp={mlp} {name}: left out, {reason}", flush=True)

    def take_turns(self, cases: Sequence[Case]) -> None:
        start = time.monotonic()
        for turn in range(self.settings.turns):
            if turn and time.monotonic() - start > self.deadline.left() / LENGTH_SHARE:
                break
            for case in cases:
                case.samples.append(self.clock.seconds(case.calls()))
            if cases:
                self.save(self.result([case.row() for case in cases]))
        new = [case.row() for case in cases]
        self.rows += new
        for row in new:
            print("n={n} mlp={mlp} {mechanism}: {median_ms:.2f} ms, {memory_MiB:.0f} MiB, {timer}".format(**row))

    def result(self, running: Iterable[dict[str, Any]] = ()) -> dict[str, Any]:
        rows = [*self.rows, *running]
        return {
            "machine": self.machine,
            "settings": asdict(self.settings),
            "paper, full over csat": PAPER,
            "full over each": ratios(rows),
            "growth": growth(rows),
            "left_out": self.left_out,
            "rows": rows,
        }


# ---- what the rows say -----------------------------------------------------------------------------------------------


def ratios(rows: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """Full attention over each mechanism of the same length, in time and memory: above 1 the mechanism is cheaper."""
    rows = list(rows)
    full = {(row["mlp"], row["n"]): row for row in rows if row["mechanism"] == "full"}
    found = []
    for row in rows:
        base = full.get((row["mlp"], row["n"]))
        if base is not None and base is not row:
            over = {"time": base["median_ms"] / row["median_ms"], "memory": base["memory_MiB"] / row["memory_MiB"]}
            found.append({k: row[k] for k in ("mechanism", "mlp", "n")} | over)
    return found


def exponent(points: Sequence[tuple[float, float]]) -> float:
    """Slope of the least-squares line through (log n, log value)."""
    x, y = ([math.log(v) for v in values] for values in zip(*points, strict=True))
    return statistics.linear_regression(x, y).slope


def growth(rows: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """Exponents of time and memory in n over the `FITTED` longest lengths of a mechanism, where it has three."""
    groups: dict[tuple[str, int], list[dict[str, Any]]] = {}
    for row in rows:
        groups.setdefault((row["mechanism"], row["mlp"]), []).append(row)
    found = []
    for (mechanism, mlp), of_one in groups.items():
        last = sorted(of_one, key=lambda row: row["n"])[-FITTED:]
        if len(last) >= 3:
            slopes = {
                name: exponent([(row["n"], row[key]) for row in last])
                for name, key in (("time", "median_ms"), ("memory", "memory_MiB"))
            }
            found.append({"mechanism": mechanism, "mlp": mlp, "over n": [row["n"] for row in last], **slopes})
    return found


# ---- the command -----------------------------------------------------------------------------------------------------


def settings_of(given: argparse.Namespace) -> Settings:
    device = given.device or ("cuda" if torch.cuda.is_available() else "cpu")
    if device == "cuda" and not torch.cuda.is_available():
        raise SystemExit("table5: --device cuda came, and torch sees no CUDA device")
    if device == "cuda" and not CUDA.kernels:
        raise SystemExit(f"table5: csat's kernels do not run on cuda: {CUDA.reason}")
    lengths = tuple(given.n) if given.n else LENGTHS[device][: 2 if given.quick else None]
    mechanisms = tuple(given.mechanisms)
    if given.compile:
        mechanisms += ("stock + LISTA, compiled",)
    return Settings(
        device=device,
        dtype=given.dtype or ("bfloat16" if device == "cuda" else "float32"),
        lengths=lengths,
        mechanisms=mechanisms,
        mlp=tuple(given.mlp),
        batch=given.batch or (4 if device == "cuda" else 1),
        layers=given.layers,
        m=given.m,
        turns=1 if given.quick else given.turns,
        quick=given.quick,
    )


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cpu", "cuda"), help="default: cuda where there is one")
    parser.add_argument("--dtype", choices=tuple(DTYPES), help="default: bfloat16 on cuda, float32 on cpu")
    parser.add_argument("--n", type=int, nargs="+", help=f"lengths; default: {LENGTHS}")
    parser.add_argument("--mechanisms", nargs="+", choices=NAMES, default=DEFAULT)
    parser.add_argument("--compile", action="store_true", help="adds the composition with LISTA under torch.compile")
    parser.add_argument("--mlp", type=int, nargs="+", default=(0, 4), help="hidden width over 512; 0: attention alone")
    parser.add_argument("--batch", type=int, help="default: 4 on cuda, 1 on cpu")
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--m", type=int, default=128)
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=math.inf, help="for the whole run")
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--output", type=Path, help="default: benchmarks/results/table5_<device>.json")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> None:
    given = parse(arguments)
    settings = settings_of(given)
    output = given.output or HERE / "results" / f"table5_{settings.device}.json"
    clock = CUDAClock(rounds_per_turn=1) if settings.device == "cuda" else CPUClock(0.01)
    torch.manual_seed(0)

    def save(result: dict[str, Any]) -> None:
        output.write_text(json.dumps(result, indent=1) + "\n")

    result = Table(settings, clock, Deadline(given.seconds), save).run()
    for line in result["full over each"]:
        print("full over {mechanism}, n={n}, mlp={mlp}: time {time:.2f}, memory {memory:.2f}".format(**line))
    for line in result["growth"]:
        print("growth of {mechanism}, mlp={mlp}: time n^{time:.2f}, memory n^{memory:.2f}".format(**line))
    print(f"the paper's full over csat: time {PAPER['time']}, memory {PAPER['memory']}; written: {output}")


if __name__ == "__main__":
    main()
