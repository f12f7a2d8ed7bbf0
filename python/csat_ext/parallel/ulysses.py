"""Sequence parallelism by heads: DeepSpeed Ulysses around CSAT (Jacobs et al. 2023, arXiv 2309.14509).

All-to-alls give every rank all tokens of its share of the heads and back again; it measures with those heads' rows of
the whole Phi. Bytes grow with the tokens of a rank. It is here for models that already run under Ulysses, and as the
baseline of `csat_ext.parallel.sequence`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from csat_ext.measurements import Part
from csat_ext.module import CSATCore
from csat_ext.parallel.sequence import Group, gather_tokens, process_group, shard_lengths


class UlyssesParallel:
    """`CSATCore.parallel` of a layer whose tokens are spread over ranks and whose heads are scattered meanwhile.

    Same call as under `SequenceParallel`: each rank's own x, context and key mask, any number of tokens on each;
    gradients of parameters are to be summed over the group.

    Args:
        group: a ProcessGroup or a one-dimensional DeviceMesh; its size divides the number of heads.
        length: tokens on all ranks, spread as `token_range` has it, where x and context are of one length. When absent
            the ranks tell each other what they hold at every call, which waits for the device.
    """

    def __init__(self, group: Group, length: int | None = None) -> None:
        from deepspeed import comm

        self.group, self.length = process_group(group), length
        if not comm.is_initialized():
            comm.init_distributed(verbose=False)

    def __deepcopy__(self, memo: dict[int, Any]) -> UlyssesParallel:
        return self

    def heads(self, count: int) -> range:
        ranks, rank = self.group.size(), self.group.rank()
        if count % ranks:
            raise ValueError(f"Ulysses scatters {count} heads over {ranks} ranks: the first must be a multiple")
        return range(rank * count // ranks, (rank + 1) * count // ranks)

    def own(self, weight: Tensor) -> Tensor:
        heads = self.heads(weight.shape[0])
        return weight[heads.start : heads.stop]

    def attend(
        self, core: CSATCore, queries: Callable[[], Tensor], k: Tensor, v: Tensor, key_mask: Tensor | None
    ) -> Tensor:
        from deepspeed.sequence.layer import DistributedAttention

        q = queries()
        of_q, of_k = shard_lengths((q.shape[2], k.shape[2]), self.group, self.length, k.device)
        mask = None if key_mask is None else gather_tokens(key_mask, of_k, self.group)
        part = Part(0, sum(of_k), core.key_heads.start, core.key_heads.stop)

        def local(q: Tensor, k: Tensor, v: Tensor) -> Tensor:  # (B, ranks * longest shard, own heads, D)
            q, k, v = (_packed(t, own).transpose(1, 2) for t, own in ((q, of_q), (k, of_k), (v, of_k)))
            rows = core.rows(q, *core.measured(k, v, mask, part.stop, part))
            return _padded(rows.unflatten(-1, (len(core.heads), -1)), of_q)

        parts = ((q, of_q), (k, of_k), (v, of_k))
        sent = [nn.functional.pad(t.transpose(1, 2), (0, 0, 0, 0, 0, max(own) - t.shape[2])) for t, own in parts]
        rows = DistributedAttention(local, self.group, scatter_idx=2, gather_idx=1)(*sent, 0)
        return rows[:, : q.shape[2]].flatten(2)


def _packed(x: Tensor, lengths: tuple[int, ...]) -> Tensor:
    """(B, ranks * longest, ..) without what fills the shorter shards up: (B, n, ..)."""
    if min(lengths) == max(lengths):
        return x
    shards = x.unflatten(1, (len(lengths), max(lengths)))
    return torch.cat([shards[:, rank, :own] for rank, own in enumerate(lengths)], dim=1)


def _padded(x: Tensor, lengths: tuple[int, ...]) -> Tensor:
    """(B, n, ..) with every shard filled up with zeros again: (B, ranks * longest, ..)."""
    if min(lengths) == max(lengths):
        return x.contiguous()
    longest = max(lengths)
    return torch.cat(
        [nn.functional.pad(shard, (0, 0, 0, 0, 0, longest - shard.shape[1])) for shard in x.split(lengths, dim=1)],
        dim=1,
    )
