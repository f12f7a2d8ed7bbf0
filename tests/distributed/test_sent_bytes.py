"""Bytes that are counted against those of the model."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import torch
import torch.distributed as dist
from sharding import HEADS, WIDTH, layer

from csat_ext.parallel import SequenceParallel, UlyssesParallel
from csat_ext.parallel.traffic import Layer, SentBytes, csat_bytes, ulysses_bytes

if TYPE_CHECKING:
    from ranks import Ranks

pytest_plugins = ["ranks"]
pytestmark = pytest.mark.distributed
SHAPE = Layer(batch=2, heads=HEADS, width=WIDTH // HEADS, measurements=5, rank=3, element=4)


def sent(form: str, n: int) -> float:
    import deepspeed

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    ranks = dist.get_world_size()
    attention = layer(torch.float32, feature_rank=3)
    kind: Any = {"measurements": SequenceParallel, "ulysses": UlyssesParallel}[form]
    attention.parallel = kind(dist.group.WORLD, n)
    x = torch.randn(2, n // ranks, WIDTH, requires_grad=True)
    attention(x)
    counter = SentBytes(ranks)
    with counter:
        attention(x).sum().backward()
    return counter.sent


@pytest.mark.parametrize("n", [32, 96])
def test_counted_bytes_are_those_of_the_model(ranks: Ranks, n: int) -> None:
    assert ranks.run(sent, "measurements", n) == [csat_bytes(SHAPE, n, ranks.count)] * ranks.count
    assert ranks.run(sent, "ulysses", n) == [ulysses_bytes(SHAPE, n, ranks.count)] * ranks.count


def unknown() -> None:
    with SentBytes(2), pytest.raises(NotImplementedError, match=r"bytes of c10d\.broadcast_ are not known"):
        dist.broadcast(torch.zeros(1), src=0)


def test_a_collective_that_is_not_known_is_refused(two: Ranks) -> None:
    two.run(unknown)
