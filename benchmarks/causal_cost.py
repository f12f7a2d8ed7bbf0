"""What a token costs as the context grows: the causal forms beside full causal attention, forward and backward.

Every form at every length takes turns in one process, so that what disturbs one disturbs all; the least of each is
taken, on one thread. It is divided by the number of tokens and by that of the same form at the shortest length: 1 is
flat. Beside it the time over that of `scaled_dot_product_attention(is_causal=True)` at the same length.

    python benchmarks/causal_cost.py
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from machine import header
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from csat_ext import csat_attention

HERE = Path(__file__).parent
LENGTHS = (1024, 2048, 4096, 8192)
R, M = 16, 64  # measurements of a block, of the prefix form
Attention = Callable[[Tensor, Tensor, Tensor], Tensor]


def prefix(phi: Tensor, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return csat_attention(q, k, v, phi, causal="prefix")


def rivals(n: int) -> dict[str, Attention]:
    """What is timed, by name. The second block form takes the block of least work, Bk = sqrt(r n)."""
    block = partial(csat_attention, causal="block", measurements_per_block=R)
    least = max(R, 2 ** round(0.5 * torch.tensor(float(R * n)).log2().item()))
    return {
        "sdpa": partial(scaled_dot_product_attention, is_causal=True),
        "block, Bk = 128": partial(block, block_size=128),
        "block, Bk = sqrt(r n)": partial(block, block_size=least),
        "prefix": partial(prefix, torch.randn(n, M).softmax(-1)),
    }


def seconds(attention: Attention, leaves: list[Tensor], weight: Tensor) -> float:
    """Of one forward and backward pass."""
    start = time.perf_counter()
    torch.autograd.grad(attention(*leaves), leaves, weight)
    return time.perf_counter() - start


def measured(arguments: argparse.Namespace) -> dict[str, dict[int, float]]:
    """Least seconds of every rival at every length."""
    times: dict[str, dict[int, list[float]]] = {}
    inputs = {}
    for n in LENGTHS:
        shape = (1, arguments.heads, n, arguments.width)
        inputs[n] = rivals(n), [torch.randn(shape, requires_grad=True) for _ in range(3)], torch.randn(shape)
    for repeat in range(arguments.repeats + 1):
        for n, (contestants, leaves, weight) in inputs.items():
            for name, attention in contestants.items():
                took = seconds(attention, leaves, weight)
                if repeat:  # the first round warms up
                    times.setdefault(name, {}).setdefault(n, []).append(took)
    return {name: {n: min(of_length) for n, of_length in own.items()} for name, own in times.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--heads", type=int, default=2)
    parser.add_argument("--width", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--output", type=Path, default=HERE / "results" / "causal_cost.json")
    arguments = parser.parse_args()
    torch.manual_seed(0)
    torch.set_num_threads(1)
    times, shortest = measured(arguments), LENGTHS[0]
    growth = {
        name: {str(n): round(t / n / (own[shortest] / shortest), 2) for n, t in own.items()}
        for name, own in times.items()
    }
    ratio = {
        name: {str(n): round(t / times["sdpa"][n], 3) for n, t in own.items()}
        for name, own in times.items()
        if name != "sdpa"
    }
    shape = {"batch": 1, "heads": arguments.heads, "width": arguments.width, "r": R, "m": M, "dtype": "float32"}
    result = {
        "machine": header(),
        "shape": shape,
        f"time a token over that at n = {shortest}, forward and backward": growth,
        "time over sdpa, forward and backward": ratio,
    }
    print(json.dumps(result, indent=1))
    arguments.output.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
