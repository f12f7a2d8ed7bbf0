"""`csat bench kernels`: each op alone and the whole one, forward, backward and both, beside this machine's limits.

The problems are a star around one point: each of n, m, D, dtype and T runs through its values while the others stay.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from csat_ext import SparseDecoder, csat_attention, implicit_measurement, measurement
from csat_ext.bench.clock import MOST_SETS, Call, Clock, Timing, cache_bytes, clock_for, measure, rotations
from csat_ext.bench.machine import header
from csat_ext.bench.work import Sizes, Work, causal_block, work
from csat_ext.implicit import IMPLICIT

SCHEMA = 1
PASSES = ("forward", "backward", "both")
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
Function = Callable[..., Tensor]


@dataclass(frozen=True)
class Problem:
    """One op at one size; D = R = Dv = P = width, S and B tied, Phi shared by batch and heads.

    attend_causal has blocks of m tokens (`csat_ext.bench.work.Sizes`).
    """

    op: str
    n: int = 4096
    m: int = 128
    width: int = 64
    dtype: str = "float32"
    layers: int = 3
    batch: int = 1
    heads: int = 8

    def sizes(self) -> Sizes:
        size = DTYPES[self.dtype].itemsize
        return Sizes(self.batch * self.heads, self.n, self.m, self.width, self.width, self.layers, size)


@dataclass(frozen=True)
class Grid:
    """The values that each size runs through, the base point first; how many turns; most sets of inputs; sizes of the
    ceilings' tensors."""

    n: tuple[int, ...]
    m: tuple[int, ...]
    width: tuple[int, ...]
    dtype: tuple[str, ...]
    layers: tuple[int, ...]
    batch: int = 1
    heads: int = 8
    turns: int = 7
    sets: int = MOST_SETS
    copied: int = 256 << 20
    side: int = 2048

    def problems(self, ops: Iterable[str]) -> list[Problem]:
        axes = {name: getattr(self, name) for name in ("n", "m", "width", "dtype", "layers")}
        base = {name: values[0] for name, values in axes.items()} | {"batch": self.batch, "heads": self.heads}
        found: dict[Problem, None] = {}
        for op in ops:
            for name, values in axes.items():
                found |= {
                    Problem(op, **(base | {name: value})): None
                    for value in values
                    if name != "layers" or _has_layers(op)
                }
        return [problem for problem in found if problem.m <= problem.n]


def _has_layers(op: str) -> bool:
    return op in ("decode", "attend_decode", "csat_attention")


def grid_for(device: torch.device, *, quick: bool = False) -> Grid:
    """What is measured on this kind of device."""
    gpu = device.type == "cuda"
    lengths = (4096, 512, 1024, 2048, 8192, 16384, 32768, 65536)
    dtypes = ("bfloat16", "float16", "float32") if gpu else ("float32", "bfloat16")
    full = Grid(lengths, (128, 64, 256, 512), (64, 128), dtypes, (3, 1, 8))
    if gpu:
        full = dataclasses.replace(full, batch=4, heads=16, turns=15, copied=1 << 30, side=8192)
    if not quick:
        return full
    base = {name: getattr(full, name)[:1] for name in ("m", "width", "dtype", "layers")}
    return dataclasses.replace(
        full, n=(2048, 512), turns=5, sets=8, copied=full.copied // 4, side=full.side // 2, **base
    )


# ---- the ops ---------------------------------------------------------------------------------------------------------


def _project(phi: Tensor) -> Function:
    return lambda x: torch.ops.csat.project(x, phi, None)


def _implicit(ensemble: str, problem: Problem, device: torch.device) -> Function:
    return implicit_measurement(ensemble, problem.m, problem.n, device=device).project


def _attend(q: Tensor, kc: Tensor, vc: Tensor) -> Tensor:
    return torch.ops.csat.attend(q, kc, vc, None, q.shape[-1] ** -0.5)[0]


def _attend_causal(problem: Problem) -> Function:
    numbers = problem.width**-0.5, problem.m, 0, causal_block(problem.m)

    def attend(q: Tensor, kc: Tensor, vc: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return torch.ops.csat.attend_causal(q, kc, vc, k, v, None, None, *numbers)[0]

    return attend


def _attend_prefix(problem: Problem, device: torch.device) -> Function:
    p = problem
    sums = [torch.zeros(p.batch, p.heads, p.m, *width, device=device) for width in ((p.width,), (p.width,), ())]
    generator = torch.Generator(device).manual_seed(0)
    draws = torch.randn(p.batch, p.heads, p.n, p.m, generator=generator, device=device)
    phi = draws.softmax(-1).to(DTYPES[p.dtype])

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return torch.ops.csat.attend_prefix(q, k, v, phi, *sums, None, None, p.width**-0.5, False)[0]

    return attend


def _attend_decode(q: Tensor, kc: Tensor, vc: Tensor, *decoder: Tensor) -> Tensor:
    need_z = torch.is_grad_enabled()
    return torch.ops.csat.attend_decode(q, kc, vc, None, q.shape[-1] ** -0.5, *decoder, need_z)[0]


def _whole(phi: Tensor) -> Function:
    def attention(q: Tensor, k: Tensor, v: Tensor, *weights: Tensor) -> Tensor:
        S, B, theta, psi, step = weights
        decoder = SparseDecoder(S, B, theta, psi, step, check_values=False)
        return csat_attention(q, k, v, phi, decoder=decoder)

    return attention


OPS = (
    "project",
    *(f"project_{ensemble}" for ensemble in IMPLICIT),
    "attend",
    "decode",
    "attend_decode",
    "attend_causal",
    "attend_prefix",
    "csat_attention",
)
"""What is timed: operators of `torch.ops.csat`, and `csat_ext.csat_attention`, which calls them all."""


def function_of(problem: Problem, device: torch.device) -> tuple[Function, list[tuple[int, ...]]]:
    """The op as a function of what it may be differentiated by, and the shapes of those: tokens, then the decoder.

    Raises:
        ValueError: an unknown op.
    """
    p, op = problem, problem.op
    tokens, measured = (p.batch, p.heads, p.n, p.width), (p.batch, p.heads, p.m, p.width)
    square = (1, p.width, p.width)
    decoder = [(1, *square), (1, *square), (1, p.layers, p.width), square, (1, p.layers)]
    phi = measurement("pool", p.m, p.n, dtype=DTYPES[p.dtype], device=device).phi
    if op == "project":
        return _project(phi[None]), [tokens]
    if op.removeprefix("project_") in IMPLICIT:
        return _implicit(op.removeprefix("project_"), p, device), [tokens]
    if op == "attend":
        return _attend, [tokens, measured, measured]
    if op == "decode":
        return torch.ops.csat.decode, [tokens, *decoder]
    if op == "attend_decode":
        return _attend_decode, [tokens, measured, measured, *decoder]
    if op == "attend_causal":
        blocks = (p.batch, p.heads, p.n // p.m * causal_block(p.m), p.width)
        return _attend_causal(p), [tokens, blocks, blocks, tokens, tokens]
    if op == "attend_prefix":
        return _attend_prefix(p, device), [tokens, tokens, tokens]
    if op == "csat_attention":
        return _whole(phi), [tokens, tokens, tokens, *decoder]
    raise ValueError(f"op: {op!r} came; accepted: {', '.join(OPS)}")


def inputs_of(problem: Problem, shapes: list[tuple[int, ...]], device: torch.device, seed: int) -> list[Tensor]:
    """Tokens of N(0, 1) in the problem's dtype; a float32 decoder whose iterates neither die nor grow."""
    generator = torch.Generator(device).manual_seed(seed)
    made = [torch.randn(shape, device=device, generator=generator) for shape in shapes]
    count = 5 if _has_layers(problem.op) else 0
    tokens = [x.to(DTYPES[problem.dtype]) for x in made[: len(made) - count]]
    decoder = made[len(made) - count :]
    if decoder:
        S, B, theta, psi, step = decoder
        decoder = [0.3 * S * problem.width**-0.5, B * problem.width**-0.5, 1e-3 * theta.abs(), psi, 0 * step + 1]
    return [x.detach().requires_grad_() for x in (*tokens, *decoder)]


def work_of(problem: Problem, direction: str) -> Work:
    """FLOPs and least bytes of the problem in one of `PASSES`."""
    sizes, op = problem.sizes(), problem.op
    if direction == "both":
        return work_of(problem, "forward") + work_of(problem, "backward")
    if op == "csat_attention":
        suffix = "" if direction == "forward" else "_backward"
        return work(f"measure{suffix}", sizes) + work_of(dataclasses.replace(problem, op="attend_decode"), direction)
    if direction == "forward" or op.removeprefix("project_") in IMPLICIT:  # the transpose costs what the op costs
        return work(op, sizes)
    if op == "attend_decode":
        return work("decode_backward", sizes) + work("attend_backward", sizes)
    return work(f"{op}_backward", sizes)


def call_of(function: Function, leaves: list[Tensor], direction: str) -> Call:
    """What one pass runs; for "backward" the graph is made here, once, and kept."""
    if direction == "forward":

        def forward() -> Tensor:
            with torch.no_grad():
                return function(*leaves)

        return forward
    weight = torch.randn_like(function(*leaves))
    if direction == "both":
        return lambda: torch.autograd.grad(function(*leaves), leaves, weight)
    out = function(*leaves)
    return lambda: torch.autograd.grad(out, leaves, weight, retain_graph=True)


# ---- the measurement -------------------------------------------------------------------------------------------------


def ceilings(device: torch.device, dtypes: Iterable[str], clock: Clock, grid: Grid) -> dict[str, Any]:
    """What this machine reaches now: TB/s of a large copy, TFLOP/s of a large matrix product in each dtype."""
    source = torch.zeros(grid.copied, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    calls = {"copy": [clock.prepare(lambda: target.copy_(source))[0]]}
    for dtype in dtypes:
        a = torch.randn(grid.side, grid.side, device=device).to(DTYPES[dtype])
        calls[dtype] = [clock.prepare(lambda a=a: a @ a)[0]]  # type: ignore[misc]
    best = {name: min(timing.samples) for name, timing in measure(calls, clock, max(grid.turns // 2, 2)).items()}
    copied = 2 * grid.copied / best.pop("copy") / 1e12
    return {"copy TB/s": copied, "product TFLOP/s": {d: 2 * grid.side**3 / s / 1e12 for d, s in best.items()}}


def best_ceilings(before: dict[str, Any], after: dict[str, Any]) -> dict[str, Any]:
    """The higher of each, and "drift": by how much the one that moved most differs between the two, as a share."""
    one, other = ({"copy": c["copy TB/s"], **c["product TFLOP/s"]} for c in (before, after))
    best = {name: max(one[name], other[name]) for name in one}
    drift = max(best[name] / min(one[name], other[name]) - 1 for name in one)
    return {"copy TB/s": best.pop("copy"), "product TFLOP/s": best, "drift": drift}


def row(problem: Problem, direction: str, timing: Timing, limits: Mapping[str, Any], **facts: Any) -> dict[str, Any]:
    """One line of the result file; shares are of the ceilings measured in the same run."""
    asked, seconds = work_of(problem, direction), timing.median
    rate, stream = asked.flops / seconds / 1e12, asked.moved / seconds / 1e12
    return {
        **dataclasses.asdict(problem),
        "pass": direction,
        "median_ms": 1e3 * seconds,
        "spread_ms": 1e3 * timing.spread,
        "TFLOP/s": rate,
        "TB/s": stream,
        "FLOP/byte": asked.intensity,
        "of product": rate / limits["product TFLOP/s"][problem.dtype],
        "of copy": stream / limits["copy TB/s"],
        **facts,
        "samples_ms": [1e3 * sample for sample in timing.samples],
    }


def free_bytes(device: torch.device) -> int:
    """Memory that is free now."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    with open("/proc/meminfo") as facts:
        kilobytes = next(line.split()[1] for line in facts if line.startswith("MemAvailable"))
    return int(kilobytes) << 10


class NotEnoughMemory(Exception):
    """A problem that this machine's memory does not take."""


def _prepared(
    problem: Problem, device: torch.device, clock: Clock, most_sets: int
) -> tuple[dict[str, list[Call]], dict[str, Any]]:
    """The calls of every pass on rotated inputs, and what is to be known of them."""
    function, shapes = function_of(problem, device)
    first = inputs_of(problem, shapes, device, seed=0)
    size = sum(x.nbytes for x in first)
    sets = rotations(size, cache_bytes(device), most_sets)
    most = free_bytes(device) // 2
    if 8 * size > most:  # inputs, gradients, output and what is kept of one pass, twice
        raise NotEnoughMemory(f"{8 * size >> 20} MiB wanted, half of the free memory is {most >> 20}")
    sets = max(2, min(sets, most // (8 * size)))
    rounds = [first, *(inputs_of(problem, shapes, device, seed=s) for s in range(1, sets))]
    facts: dict[str, Any] = {"sets": sets, "cold": sets * size >= cache_bytes(device)}
    calls: dict[str, list[Call]] = {}
    timers, peaks = {}, {}
    for direction in PASSES:
        plain = [call_of(function, leaves, direction) for leaves in rounds]
        prepared = [clock.prepare(call) for call in plain]
        calls[direction], timers[direction] = [call for call, _ in prepared], prepared[0][1]
        peaks[direction] = clock.peak_bytes(plain[0]) / 2**20
    return calls, facts | {"timer": timers, "peak_MiB": peaks}


def timings_of(
    problem: Problem, device: torch.device, clock: Clock, turns: int, most_sets: int = MOST_SETS
) -> dict[str, tuple[Timing, dict[str, Any]]]:
    """Timing of each pass, and what is to be known of it.

    Raises:
        NotEnoughMemory: before or while it is measured.
    """
    try:
        calls, facts = _prepared(problem, device, clock, most_sets)
        timings = measure(calls, clock, turns)
    except torch.OutOfMemoryError as error:
        raise NotEnoughMemory(str(error).splitlines()[0]) from None
    return {
        direction: (timing, {k: v[direction] if isinstance(v, dict) else v for k, v in facts.items()})
        for direction, timing in timings.items()
    }


def run(
    device: torch.device,
    grid: Grid,
    ops: Iterable[str] = OPS,
    *,
    clock: Clock | None = None,
    quick: bool = False,
    report: Callable[[str], None] = print,
) -> dict[str, Any]:
    """The whole measurement, ready for json.dump; a line for each problem goes to `report`.

    Raises:
        ValueError: an unknown op or device.
    """
    for op in ops:
        if op not in OPS:
            raise ValueError(f"op: {op!r} came; accepted: {', '.join(OPS)}")
    clock = clock or clock_for(device, quick=quick)
    before = ceilings(device, grid.dtype, clock, grid)
    found: list[tuple[Problem, str, Timing, dict[str, Any]]] = []
    skipped: list[dict[str, Any]] = []
    for problem in grid.problems(ops):
        try:
            timings = timings_of(problem, device, clock, grid.turns, grid.sets)
        except NotEnoughMemory as error:
            skipped.append({**dataclasses.asdict(problem), "reason": str(error)})
            report(f"{describe(problem)}: skipped, {error}")
            continue
        found += [(problem, direction, *timing) for direction, timing in timings.items()]
        times = [f"{d} {1e3 * t.median:.3g} ± {1e3 * t.spread:.2g} ms" for d, (t, _) in timings.items()]
        report(f"{describe(problem)}: {', '.join(times)}")
    limits = best_ceilings(before, ceilings(device, grid.dtype, clock, grid))
    rows = [row(problem, direction, timing, limits, **facts) for problem, direction, timing, facts in found]
    settings = {"device": device.type, "quick": quick, "turns": grid.turns}
    return {
        "schema": SCHEMA,
        "machine": header(),
        "settings": settings,
        "ceilings": limits,
        "rows": rows,
        "skipped": skipped,
    }


def measured(
    device: str,
    *,
    quick: bool = False,
    ops: Iterable[str] = (),
    tokens: Iterable[int] = (),
    report: Callable[[str], None] = print,
) -> dict[str, Any]:
    """`run` by names and numbers, as a command line has them: what is not given is this device's grid.

    Raises:
        ValueError: an unknown op, a device that is not there, or no problem with these tokens.
    """
    where = torch.device(device)
    if where.type == "cuda" and not torch.cuda.is_available():
        raise ValueError("device: cuda came, and torch sees no CUDA device")
    grid = grid_for(where, quick=quick)
    if given := tuple(tokens):
        grid = dataclasses.replace(grid, n=given)
    chosen = tuple(ops) or OPS
    result = run(where, grid, chosen, quick=quick, report=report)
    if not result["rows"]:
        raise ValueError(
            f"nothing was measured: n = {list(grid.n)}, m = {list(grid.m)}, {len(result['skipped'])} skipped"
        )
    return result


def describe(problem: Problem) -> str:
    depth = f" T={problem.layers}" if _has_layers(problem.op) else ""
    return f"{problem.op} n={problem.n} m={problem.m} D={problem.width} {problem.dtype}{depth}"
