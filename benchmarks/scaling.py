"""When does CSAT pay? Time of CSAT over time of full attention, forward and backward, as n grows: ratios, side by side.

For every n the rivals take turns in one process, so that what disturbs one disturbs all; the median of each is taken.
The rivals are torch's `scaled_dot_product_attention` and the strongest composition of stock parts: the same
attention on K and V projected by a matrix product.

    python benchmarks/scaling.py
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
from machine import header
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from csat_ext import SparseDecoder, csat_attention, measurement
from csat_ext.reference import ista_weights

HERE = Path(__file__).parent
LENGTHS = (256, 512, 1024, 2048, 4096, 8192)
Attention = Callable[[Tensor, Tensor, Tensor], Tensor]


def rivals(m: int, n: int, heads: int, width: int) -> dict[str, Attention]:
    """What is timed, by name."""
    drawn = measurement("pool", m, n, heads=heads, head_shift=True)
    weights = ista_weights(torch.eye(width), 0.0, 3, psi=torch.eye(width))
    decoder = SparseDecoder(*(weight.contiguous() for weight in weights))
    bias = drawn.score_bias
    assert bias is not None

    def composed(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        mask = bias[None, :, None, :]  # of three dimensions it would have no fused kernel
        return scaled_dot_product_attention(q, drawn.phi @ k, drawn.phi @ v, mask)

    return {
        "sdpa": scaled_dot_product_attention,
        "sdpa on projected k, v": composed,
        "csat": lambda q, k, v: csat_attention(q, k, v, drawn.phi, score_bias=bias),
        "csat + LISTA (T = 3)": lambda q, k, v: csat_attention(q, k, v, drawn.phi, score_bias=bias, decoder=decoder),
    }


def step(attention: Attention, leaves: list[Tensor], weight: Tensor) -> float:
    """Seconds of one forward and backward pass."""
    start = time.perf_counter()
    torch.autograd.grad(attention(*leaves), leaves, weight)
    return time.perf_counter() - start


def compare(n: int, arguments: argparse.Namespace) -> dict[str, float]:
    """Median seconds of every rival at length n."""
    shape = (1, arguments.heads, n, arguments.width)
    leaves = [torch.randn(shape, requires_grad=True) for _ in range(3)]
    weight = torch.randn(shape)
    contestants = rivals(arguments.m, n, arguments.heads, arguments.width)
    times: dict[str, list[float]] = {name: [] for name in contestants}
    for repeat in range(arguments.repeats + 1):
        for name, attention in contestants.items():
            seconds = step(attention, leaves, weight)
            if repeat:  # the first round warms up
                times[name].append(seconds)
    return {name: statistics.median(values) for name, values in times.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--m", type=int, default=128)
    parser.add_argument("--heads", type=int, default=8)
    parser.add_argument("--width", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--output", type=Path, default=HERE / "results" / "scaling.json")
    arguments = parser.parse_args()
    torch.manual_seed(0)
    ratios = {}
    for n in LENGTHS:
        seconds = compare(n, arguments)
        ratios[str(n)] = {name: round(value / seconds["sdpa"], 3) for name, value in seconds.items()}
        print(n, ratios[str(n)], flush=True)
    shape = {"batch": 1, "heads": arguments.heads, "width": arguments.width, "m": arguments.m, "dtype": "float32"}
    result = {"machine": header(), "shape": shape, "time over sdpa, forward and backward": ratios}
    arguments.output.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
