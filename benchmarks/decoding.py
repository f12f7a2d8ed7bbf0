"""What decoding costs as the context grows: memory of the cache and time of a token, beside a full cache of keys and
values.

One token at a time is stepped through the attention of one layer, on one thread. Contexts are not decoded from their
first token: every cache is filled at once with random numbers of the shapes that it has after so many tokens (states of
`CSATCache`, buffers of `KVCache`), which neither its memory nor the time of a step depends on. A short context is
filled token by token as well, and both fillings must have equal bytes. Memory is exact, the bytes of the tensors kept;
of the block form the most that it keeps while it steps through a block, whose tokens it holds until the block is whole.

A turn steps the block form through a whole block of tokens, so that the measurement of a finished block has its share,
and the full cache through fewer. All forms take turns at every length; the least mean of a turn is taken, in
seconds of the processor, which other work on the machine does not add to.

    python benchmarks/decoding.py
"""

from __future__ import annotations

import argparse
import json
import math
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

import torch
from machine import header
from torch import Tensor

from csat_ext import CSATCache
from csat_ext.language.cache import KVCache

HERE = Path(__file__).parent
LENGTHS = (1 << 12, 1 << 14, 1 << 16, 1 << 18, 1 << 20)
BK, R, M = 128, 16, 64  # tokens and measurements of a block; measurements of the prefix form
FULL_STEPS, PREFIX_STEPS = 4, 128  # of a turn
Cache: TypeAlias = CSATCache | KVCache


def full(n: int, heads: int, width: int) -> KVCache:
    """All keys and values of n tokens."""
    return KVCache.holding(*torch.randn(2, 1, heads, n, width))


def least_work(n: int) -> int:
    """Bk of the block form's least work, sqrt(r n), as a power of 2."""
    return int(max(R, 2 ** round(0.5 * math.log2(R * n))))


def block(size: int, n: int, heads: int, width: int) -> CSATCache:
    """r measurements of each of the finished blocks of n tokens."""
    cache = CSATCache("block", block_size=size, measurements_per_block=R)
    entries = n // size * R
    kc, vc = torch.randn(2, 1, heads, entries, width)
    bias = torch.full((1, heads, entries), size / R).log()
    k, v = torch.empty(2, 1, heads, 0, width)
    state = {"kc": kc, "vc": vc, "bias": bias, "k": k, "v": v, "keep": None}
    cache.load_state_dict({**cache.state_dict(), "length": n, **state})
    return cache


def prefix(n: int, heads: int, width: int) -> CSATCache:
    """The sums of n tokens, whose phi are means."""
    cache = CSATCache("prefix")
    kc, vc = torch.randn(2, 1, heads, M, width) * (n / M) ** 0.5
    state = {"kc": kc, "vc": vc, "mass": torch.full((1, heads, M), n / M)}
    cache.load_state_dict({**cache.state_dict(), "length": n, **state})
    return cache


class Form(NamedTuple):
    """fill: (n, heads, width) -> the cache after n tokens; steps: of a turn."""

    fill: Callable[[int, int, int], Cache]
    steps: int


def forms(n: int) -> dict[str, Form]:
    """What is measured after n tokens."""
    least = least_work(n)
    return {
        "full": Form(full, FULL_STEPS),
        "block, Bk = 128": Form(partial(block, BK), BK),
        "block, Bk = sqrt(r n)": Form(partial(block, least), least),
        "prefix": Form(prefix, PREFIX_STEPS),
    }


def stepped(name: str, cache: Cache, tokens: Tensor) -> int:
    """tokens (n, 3, 1, H, 1, D): query, key and value of each, one step each; returns the most bytes after a step."""
    phi, most = tokens.new_full((1, 1, 1, M), 1 / M), 0
    for q, k, v in tokens:
        cache.step(q, k, v, phi) if name == "prefix" else cache.step(q, k, v)
        most = max(most, cache.nbytes)
    return most


def seconds(name: str, cache: Cache, tokens: Tensor) -> float:
    """Of the processor, for one token, on average over a turn."""
    start = time.process_time()
    stepped(name, cache, tokens)
    return (time.process_time() - start) / len(tokens)


def check_filling(heads: int, width: int) -> None:
    """Filled at once or token by token, a cache has the same bytes."""
    n = 2 * BK
    for name, form in forms(n).items():
        by_token: Cache = KVCache() if name == "full" else form.fill(0, heads, width)
        stepped(name, by_token, torch.randn(n, 3, 1, heads, 1, width))
        at_once = form.fill(n, heads, width).nbytes
        if by_token.nbytes != at_once:
            raise AssertionError(f"{name}: {by_token.nbytes} bytes token by token, {at_once} at once")


def measured(n: int, arguments: argparse.Namespace) -> dict[str, dict[str, float]]:
    """Bytes, and the least seconds of a token, of every form after n tokens."""
    heads, width, kinds = arguments.heads, arguments.width, forms(n)
    caches = {name: form.fill(n, heads, width) for name, form in kinds.items()}
    size = {name: cache.nbytes for name, cache in caches.items()}
    tokens = torch.randn(max(form.steps for form in kinds.values()), 3, 1, heads, 1, width)
    for name, cache in caches.items():  # the buffers of the full cache grow now, not in a turn
        most = stepped(name, cache, tokens[: kinds[name].steps])
        size[name] = size[name] if name == "full" else max(size[name], most)
    turns: dict[str, list[float]] = {name: [] for name in kinds}
    for _ in range(arguments.turns):
        for name, cache in caches.items():
            turns[name].append(seconds(name, cache, tokens[: kinds[name].steps]))
    return {name: {"bytes": size[name], "seconds": min(turns[name])} for name in kinds}


def row(n: int, of_forms: dict[str, dict[str, float]]) -> dict[str, Any]:
    over = {
        form: {
            "full memory over it": round(of_forms["full"]["bytes"] / own["bytes"], 1),
            "full time over it": round(of_forms["full"]["seconds"] / own["seconds"], 2),
        }
        for form, own in of_forms.items()
        if form != "full"
    }
    return {"n": n, "bytes": {form: own["bytes"] for form, own in of_forms.items()}, "ratios": over}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--heads", type=int, default=2)
    parser.add_argument("--width", type=int, default=64)
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument("--lengths", type=int, nargs="+", default=list(LENGTHS), help=f"multiples of {BK}")
    parser.add_argument("--output", type=Path, default=HERE / "results" / "decoding.json")
    arguments = parser.parse_args()
    torch.manual_seed(0)
    torch.set_num_threads(1)
    check_filling(arguments.heads, arguments.width)
    found = {n: measured(n, arguments) for n in arguments.lengths}
    first = found[arguments.lengths[0]]
    result = {
        "machine": header(),
        "shape": {
            "batch": 1, "heads": arguments.heads, "width": arguments.width,
            "measurements_per_block": R, "m": M, "dtype": "float32", "filled": "at once, with random numbers",
        },
        "rows": [row(n, of_forms) for n, of_forms in found.items()],
        "time a token over that at the shortest context": {
            form: {str(n): round(own[form]["seconds"] / first[form]["seconds"], 2) for n, own in found.items()}
            for form in first
        },
    }  # fmt: skip
    print(json.dumps(result, indent=1))
    arguments.output.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
