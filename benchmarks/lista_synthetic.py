"""Learned sparse recovery on the problem of the LISTA literature, through the decoder of this library.

Chen, Liu, Wang & Yin 2018 and Liu, Chen, Wang & Yin 2019: A (250, 500) Gaussian with unit columns, coefficients nonzero
with probability 0.1 and then standard normal, z = A a without noise, T = 16 layers. The error is the NMSE,
10 log10(sum |a' - a|^2 / sum |a|^2) in dB, over 1,000 held-out vectors. Every learned method is trained with Adam on
fresh vectors, in float32, first layer by layer (a new layer starts as a copy of the last one), then all T layers
together while the rate decays along a cosine. theta and step have one value a layer. No method uses the papers' support
selection, which the operator does not have.

    python benchmarks/lista_synthetic.py                       # all methods; they are written as they finish
    python benchmarks/lista_synthetic.py --methods alista      # one method, the others of the file are kept
    python benchmarks/lista_synthetic.py --quick --output FILE # a small problem, seconds

What is trained is the operator itself: every estimate and every gradient goes through ``torch.ops.csat.decode``.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import machine
import torch
from torch import Tensor

import csat_ext.ops  # noqa: F401  (loads torch.ops.csat)
from csat_ext.reference import lista, solvers

RESULT = Path(__file__).parent / "results" / "lista_synthetic.json"


@dataclass(frozen=True)
class Problem:
    rows: int = 250
    atoms: int = 500
    density: float = 0.1
    layers: int = 16
    test_vectors: int = 1000
    seed: int = 0

    def matrix(self) -> Tensor:
        A = torch.randn(self.rows, self.atoms, generator=torch.Generator().manual_seed(self.seed))
        return A / torch.linalg.vector_norm(A, dim=0)

    def draw(self, count: int, A: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """(a, z): ``count`` Bernoulli-Gaussian vectors and their measurements."""
        values = torch.randn(count, self.atoms, generator=generator)
        a = values * (torch.rand(count, self.atoms, generator=generator) < self.density)
        return a, a @ A.mT


@dataclass(frozen=True)
class Schedule:
    """Steps of Adam. Rates of the matrices; those of log theta and step are ``scalars`` times as large."""

    per_layer: int
    together: int
    rate: float
    batch: int = 128
    scalars: float = 20.0
    clip: float = 1.0  # norm of the matrices' gradient

    def shortened(self, factor: float) -> Schedule:
        count = (max(1, round(steps * factor)) for steps in (self.per_layer, self.together))
        return replace(self, per_layer=next(count), together=next(count))


Row = dict[str, Any]  # of the result file: about, nmse_db per layer, ...
Assemble = Callable[[Sequence[Tensor], Tensor, Tensor], lista.DecoderWeights]


@dataclass(frozen=True)
class Method:
    """A learned decoder: its matrices at the start, and the weights made of (matrices, theta (T, P), step (T,))."""

    about: str
    matrices: Callable[[Tensor], list[Tensor]]
    weights: Callable[[Tensor], Assemble]
    schedule: Schedule


def _free(A: Tensor) -> Assemble:
    psi = torch.eye(A.shape[1])[None]

    def assemble(matrices: Sequence[Tensor], theta: Tensor, step: Tensor) -> lista.DecoderWeights:
        S, B = matrices
        return lista.DecoderWeights(S[None, None], B[None, None], theta[None], psi, step[None])

    return assemble


def _free_start(A: Tensor) -> list[Tensor]:
    start = lista.ista_weights(A, lam=0.1, iterations=1)
    return [start.S[0, 0].clone(), start.B[0, 0].clone()]


def _alista(A: Tensor) -> Assemble:
    W = lista.analytic_weight(A)
    return lambda matrices, theta, step: lista.alista_weights(A, theta, step, W)


METHODS = {
    "alista": Method(
        "ALISTA: W analytic; theta and step learned (2 T numbers)",
        lambda A: [],
        _alista,
        Schedule(per_layer=150, together=6000, rate=1e-3),
    ),
    "coupled_tied": Method(
        "coupled, tied: S = I - W^T A, B = W^T; W, theta, step learned, W from the analytic one",
        lambda A: [lista.analytic_weight(A)],
        lambda A: lambda matrices, theta, step: lista.coupled_weights(matrices[0], A, theta, step),
        Schedule(per_layer=150, together=5000, rate=5e-4),
    ),
    "lista_tied": Method(
        "LISTA, tied: free S and B from ISTA's; theta and step learned",
        _free_start,
        _free,
        Schedule(per_layer=100, together=16000, rate=4e-4),
    ),
}


def decode(z: Tensor, weights: lista.DecoderWeights) -> Tensor:
    """Rows z (rows, R) through the library's decoder: (rows, P)."""
    return torch.ops.csat.decode(z[None, None], *weights)[0, 0]


def nmse(estimate: Tensor, truth: Tensor) -> float:
    error = (estimate.double() - truth.double()).square().sum() / truth.double().square().sum()
    return 10 * math.log10(float(error))


class Training:
    """One method on one problem; ``run`` yields the NMSE per layer on the test vectors at every checkpoint."""

    def __init__(self, problem: Problem, method: Method) -> None:
        self.problem, self.schedule = problem, method.schedule
        self.A = problem.matrix()
        self.matrices = [matrix.clone().requires_grad_() for matrix in method.matrices(self.A)]
        self.assemble = method.weights(self.A)
        self.generator = torch.Generator().manual_seed(problem.seed + 1)
        self.test = problem.draw(problem.test_vectors, self.A, torch.Generator().manual_seed(problem.seed + 2))
        self.log_theta, self.step = torch.full((1,), math.log(0.1)), torch.ones(1)

    def weights(self) -> lista.DecoderWeights:
        theta = self.log_theta.exp()[:, None].expand(-1, self.problem.atoms)
        return self.assemble(self.matrices, theta, self.step)

    def run(self, checkpoint: int = 500) -> Iterator[Row]:
        started, trained = time.perf_counter(), 0
        for depth in range(1, self.problem.layers + 1):
            if depth > 1:
                self.log_theta = torch.cat([self.log_theta, self.log_theta[-1:] + math.log(0.8)]).detach()
                self.step = torch.cat([self.step, self.step[-1:]]).detach()
            last = depth == self.problem.layers
            steps = self.schedule.together if last else self.schedule.per_layer
            for first in range(0, steps, checkpoint):
                count = min(checkpoint, steps - first)
                if first == 0:
                    optimiser = self._optimiser()
                self._steps(optimiser, first, count, steps, floor=1e-3 if last else 0.1)
                trained += count
                if last or first + count == steps:
                    seconds = round(time.perf_counter() - started, 1)
                    yield {"layers": depth, "steps": trained, "seconds": seconds, "nmse_db": self.evaluate()}

    def evaluate(self) -> list[float]:
        truth, z = self.test
        with torch.no_grad():
            weights = self.weights()
            depths = range(1, self.step.shape[0] + 1)
            return [round(nmse(decode(z, weights.first_layers(depth)), truth), 2) for depth in depths]

    def _optimiser(self) -> torch.optim.Adam:
        scalars = [self.log_theta.requires_grad_(), self.step.requires_grad_()]
        rates = [self.schedule.rate] * len(self.matrices) + [self.schedule.rate * self.schedule.scalars] * 2
        groups = [{"params": [p], "lr": r, "peak": r} for p, r in zip([*self.matrices, *scalars], rates, strict=True)]
        return torch.optim.Adam(groups)

    def _steps(self, optimiser: torch.optim.Adam, first: int, count: int, total: int, floor: float) -> None:
        for index in range(first, first + count):
            for group in optimiser.param_groups:
                cosine = (1 + math.cos(math.pi * index / total)) / 2
                group["lr"] = group["peak"] * (floor + (1 - floor) * cosine)
            truth, z = self.problem.draw(self.schedule.batch, self.A, self.generator)
            loss = (decode(z, self.weights()) - truth).square().sum() / truth.square().sum()
            optimiser.zero_grad()
            loss.backward()
            if self.matrices:
                torch.nn.utils.clip_grad_norm_(self.matrices, self.schedule.clip)
            optimiser.step()


def classical(problem: Problem, many: int) -> dict[str, Row]:
    """ISTA and FISTA with T and with ``many`` iterations, each with the best lam of a few."""
    A = problem.matrix()
    truth, z = problem.draw(problem.test_vectors, A, torch.Generator().manual_seed(problem.seed + 2))
    rows: dict[str, Row] = {}
    for name in ("ista", "fista"):
        for iterations in (problem.layers, many):
            tried = {
                lam: _classical_curve(name, z, A, lam, iterations, truth) for lam in (0.2, 0.1, 0.05, 0.02, 0.01, 0.005)
            }
            lam = min(tried, key=lambda value: tried[value][-1])
            about = f"{name.upper()}, {iterations} iterations, lam = {lam} (best of {len(tried)})"
            rows[f"{name}_{iterations}"] = {"about": about, "nmse_db": tried[lam], "lam": lam}
    return rows


def _classical_curve(name: str, z: Tensor, A: Tensor, lam: float, iterations: int, truth: Tensor) -> list[float]:
    """NMSE per iteration (ISTA through the decoder: it is one), only the last one of a long run."""
    if name == "ista" and iterations <= 32:
        weights = lista.ista_weights(A, lam, iterations)
        return [round(nmse(decode(z, weights.first_layers(t)), truth), 2) for t in range(1, iterations + 1)]
    counts = range(1, iterations + 1) if iterations <= 32 else [iterations]
    solve = getattr(solvers, name)
    return [round(nmse(solve(z, A, lam, count).coefficients, truth), 2) for count in counts]


def plot(result: dict[str, dict[str, Row]], path: Path) -> None:
    """NMSE per layer of every method in ``result``."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.4, 4.4), layout="constrained")
    axes = figure.add_subplot()
    colours = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#000000")  # Okabe & Ito
    curves = [(name, row) for name, row in result["methods"].items() if len(row["nmse_db"]) > 1]
    for (name, row), colour, marker in zip(curves, colours, "os^Dv*x", strict=False):
        values = [0.0, *row["nmse_db"]]
        axes.plot(range(len(values)), values, color=colour, marker=marker, markersize=4, label=name)
    axes.set(xlabel="layer", ylabel="NMSE (dB)", title="Noiseless recovery, test vectors")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=130)


def save(path: Path, problem: Problem, rows: dict[str, Row]) -> None:
    """Merges ``rows`` into the file; rows of another problem are dropped."""
    old = json.loads(path.read_text()) if path.exists() else {}
    kept = old.get("methods", {}) if old.get("problem") == asdict(problem) else {}
    result = {"problem": asdict(problem), "methods": {**kept, **rows}}
    path.write_text(json.dumps(result, indent=1) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--methods", nargs="+", choices=["classical", *METHODS], default=["classical", *METHODS])
    parser.add_argument("--quick", action="store_true", help="32 x 64, T = 6, few steps: a check that it runs")
    parser.add_argument("--shorten", type=float, default=1.0, help="factor on all training steps")
    parser.add_argument("--output", type=Path, default=RESULT)
    arguments = parser.parse_args()
    if arguments.quick and arguments.output == RESULT:
        parser.error("--quick needs an --output of its own: it must not replace the measured result")

    problem = Problem(32, 64, 0.1, 6, 200) if arguments.quick else Problem()
    shorten = arguments.shorten * (0.02 if arguments.quick else 1.0)
    for name in arguments.methods:
        if name == "classical":
            rows = classical(problem, many=100 if arguments.quick else 300)
            save(arguments.output, problem, {key: {**row, "machine": machine.header()} for key, row in rows.items()})
            continue
        method = replace(METHODS[name], schedule=METHODS[name].schedule.shortened(shorten))
        train(name, method, problem, arguments.output)
    plot(json.loads(arguments.output.read_text()), arguments.output.with_suffix(".png"))


def train(name: str, method: Method, problem: Problem, output: Path) -> None:
    """Trains one method and writes its row at every checkpoint, so that an interrupted run leaves its best."""
    header = machine.header()
    history: list[Row] = []
    for point in Training(problem, method).run():
        history.append({**point, "nmse_db": point["nmse_db"][-1]})
        print(name, history[-1], flush=True)
        row = {"about": method.about, "nmse_db": point["nmse_db"], "schedule": asdict(method.schedule)}
        save(output, problem, {name: {**row, "history": history, "machine": header}})


if __name__ == "__main__":
    main()
