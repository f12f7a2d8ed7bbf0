"""What the tests of this folder compare: a layer on one rank, and the same layer with its tokens spread over ranks."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from csat_ext import CSATAttention, CSATConfig

WIDTH, HEADS = 16, 4


def layer(
    dtype: torch.dtype = torch.float64, kv_dim: int | None = None, kv_heads: int | None = None, **config: Any
) -> CSATAttention:
    """The same one on every rank."""
    torch.manual_seed(0)
    config = {"measurements": 5, "threshold": 0.01} | config
    attention = CSATAttention(WIDTH, HEADS, CSATConfig(**config), kv_dim=kv_dim, kv_heads=kv_heads)
    with torch.no_grad():
        for name, p in attention.named_parameters():
            if "proj" not in name:
                p += 0.05 * torch.rand_like(p)  # heads and layers that differ
    return attention.to(dtype)


def shards(tensor: Tensor | None, lengths: Sequence[int]) -> Any:
    """This rank's tokens (dim 1)."""
    return None if tensor is None else tensor.split(list(lengths), dim=1)[dist.get_rank()].clone()


def chunks(n: int, ranks: int) -> tuple[int, ...]:
    each = -(-n // ranks)
    return tuple(max(0, min(each, n - rank * each)) for rank in range(ranks))


def summed(tensor: Tensor | None, like: Tensor) -> Tensor:
    total = torch.zeros_like(like) if tensor is None else tensor.clone()
    dist.all_reduce(total)
    return total


def worst(got: Tensor, expected: Tensor) -> float:
    """The largest error, over the largest number where that is above 1."""
    assert got.shape == expected.shape, (got.shape, expected.shape)
    if not got.numel():
        return 0.0
    return float((got - expected).abs().max() / expected.abs().max().clamp(min=1))


def errors(
    attention: CSATAttention,
    parallel: Any,
    x: Tensor,
    lengths: Sequence[int],
    context: Tensor | None = None,
    context_lengths: Sequence[int] = (),
    key_mask: Tensor | None = None,
) -> dict[str, float]:
    """Largest errors of outputs, gradients of inputs and of parameters summed over ranks, against one rank."""
    weight = torch.randn_like(x)
    inputs = {"x": x, "context": context}
    whole = {name: t.clone().requires_grad_() for name, t in inputs.items() if t is not None}
    attention.zero_grad()
    expected = attention(**whole, key_mask=key_mask)
    (expected * weight).sum().backward()
    gradients = {name: p.grad.clone() for name, p in attention.named_parameters() if p.grad is not None}
    attention.zero_grad()

    key_lengths = context_lengths if context is not None else lengths
    own = {name: shards(t, lengths if name == "x" else key_lengths).requires_grad_() for name, t in whole.items()}
    own = {name: t.detach().requires_grad_() for name, t in own.items()}
    attention.parallel = parallel
    try:
        got = attention(**own, key_mask=shards(key_mask, key_lengths))
        (got * shards(weight, lengths)).sum().backward()
    finally:
        attention.parallel = None
    found = {"output": worst(got, shards(expected, lengths))}
    for name, t in own.items():
        found[f"d{name}"] = worst(t.grad, shards(whole[name].grad, lengths if name == "x" else key_lengths))
    for name, p in attention.named_parameters():
        if name in gradients:
            found[name] = worst(summed(p.grad, p), gradients[name])
    return found
