"""Bytes on the wire of one attention layer under sequence parallelism: a model on paper, and a count of what is sent.

What one rank sends in a forward and a backward pass; an all-reduce of S bytes over P ranks sends 2 (P - 1) / P S (ring
or halving-doubling; none sends less), an all-to-all (P - 1) / P S.

- CSAT sums (M, D + R) per head in float32, forward and backward: nothing in it is the number of tokens.
- Ulysses sends Q, K, V and the output, n / P tokens each, and their gradients.
- Ring attention (Liu, Zaharia and Abbeel 2023, arXiv 2310.01889) passes K and V on P - 1 times; again in the backward
  pass, with dK and dV in float32, which also go home.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

_SUMMED = 4
"""Bytes of an element of measurements under a sum, and of dK and dV on their way round: float32."""


@dataclass(frozen=True)
class Layer:
    """An attention layer of batch B with H heads of width D; m measurements, R features of the measured values (D when
    absent), elements of so many bytes."""

    batch: int
    heads: int
    width: int
    measurements: int
    rank: int | None = None
    element: int = 2

    def tokens(self, count: float) -> float:
        """Bytes of one of Q, K, V for so many tokens."""
        return self.batch * self.heads * self.width * self.element * count


def csat_bytes(layer: Layer, n: int, ranks: int) -> float:
    """Sent by one rank of `SequenceParallel` whose length is known; the same for every n."""
    per_head = layer.measurements * (layer.width + (layer.rank or layer.width)) * _SUMMED
    return 2 * 2 * (ranks - 1) / ranks * layer.batch * layer.heads * per_head


def ulysses_bytes(layer: Layer, n: int, ranks: int) -> float:
    """Sent by one rank of DeepSpeed Ulysses; it takes no more ranks than heads."""
    return 2 * 4 * (ranks - 1) / ranks * layer.tokens(n / ranks)


def ring_bytes(layer: Layer, n: int, ranks: int) -> float:
    """Sent by one rank of ring attention."""
    kv = 2 * layer.tokens(n / ranks)
    return 2 * (ranks - 1) * kv + ranks * kv * _SUMMED / layer.element


class SentBytes(TorchDispatchMode):
    """Counts, in ``sent``, what this rank sends in collectives and sends of torch.distributed while the mode is on.

    ``ranks`` is the size of the group; collectives are counted by the algorithms above. On CPU backward passes are
    counted as well; on CUDA they run in other threads.
    """

    def __init__(self, ranks: int) -> None:
        super().__init__()
        self.ranks, self.sent, self.calls = ranks, 0.0, 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "c10d":
            self._count(func._opname, args)
        return func(*args, **(kwargs or {}))

    def _count(self, name: str, args: Any) -> None:
        others = self.ranks - 1
        if name == "allreduce_":
            self._add(2 * others / self.ranks, args[0])
        elif name == "alltoall_base_":
            self._add(others / self.ranks, [args[1]])
        elif name == "allgather_":
            self._add(others, args[1])
        elif name == "send":
            self._add(1, args[0])
        elif name != "recv_":
            raise NotImplementedError(f"bytes of c10d.{name} are not known")

    def _add(self, factor: float, tensors: list[Tensor]) -> None:
        self.calls += 1
        self.sent += factor * sum(tensor.numel() * tensor.element_size() for tensor in tensors)
