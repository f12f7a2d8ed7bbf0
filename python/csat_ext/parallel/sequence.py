"""Sequence parallelism by measurements: every rank measures its tokens, one all-reduce of (M, D + R) per head.

``Phi K = sum over ranks of Phi_r K_r``, Phi_r being the columns of Phi at the rank's tokens, and the same for V. Every
rank then attends from its own queries over all M measurements. Bytes do not depend on the number of tokens.

The sum feeds different rows on every rank, so its derivative is a sum over ranks as well (dL/dX_r = sum_s dL_s/dY);
both run while the queries are projected (forward) or their projection is differentiated (backward). What a rank
computes for a parameter is its share: gradients of parameters are to be *summed* over the ranks of the group.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.distributed.device_mesh import DeviceMesh

from csat_ext.measurements import Part
from csat_ext.module import CSATCore, Parallel

Group = dist.ProcessGroup | DeviceMesh


def process_group(group: Group) -> dist.ProcessGroup:
    """The group itself, or that of a one-dimensional DeviceMesh.

    Raises:
        ValueError: a mesh of several dimensions (take one: ``mesh["sp"]``), or a group without this rank.
        TypeError: neither.
    """
    if isinstance(group, DeviceMesh):
        if group.ndim != 1:
            names = group.mesh_dim_names
            raise ValueError(
                f"group: a DeviceMesh of {group.ndim} dimensions {names} came, one is accepted: mesh[name]"
            )
        return group.get_group()
    if group is dist.GroupMember.NON_GROUP_MEMBER:
        raise ValueError("group: this rank is not a member of the group that came")
    if not isinstance(group, dist.ProcessGroup):
        raise TypeError(f"group: {group!r} came, a ProcessGroup or a one-dimensional DeviceMesh is accepted")
    return group


def token_range(n: int, rank: int, ranks: int) -> range:
    """The tokens of one rank: ceil(n / ranks) each, the last ranks what is left (as `torch.chunk` and DTensor do)."""
    each = -(-n // ranks)
    return range(min(rank * each, n), min((rank + 1) * each, n))


def shard_lengths(
    tokens: tuple[int, ...], group: dist.ProcessGroup, length: int | None, device: torch.device
) -> list[tuple[int, ...]]:
    """How many tokens each rank of the group holds of each of several sequences, from how many this rank holds: as
    `token_range` has it where the length, that of all of them, is known, else asked for.

    Raises ValueError where this rank has another number of tokens than the length gives it.
    """
    ranks, rank = group.size(), group.rank()
    if length is None:
        return _asked_lengths(tokens, group, device)
    lengths = tuple(len(token_range(length, r, ranks)) for r in range(ranks))
    for own in tokens:
        if lengths[rank] != own:
            raise ValueError(f"rank {rank} of {ranks} holds {own} tokens; length = {length} gives it {lengths[rank]}")
    return [lengths] * len(tokens)


@torch.compiler.disable
def _asked_lengths(tokens: tuple[int, ...], group: dist.ProcessGroup, device: torch.device) -> list[tuple[int, ...]]:
    return [tuple(lengths) for lengths in _gathered(torch.tensor(tokens, device=device), group).T.tolist()]


def _gathered(own: Tensor, group: dist.ProcessGroup) -> Tensor:
    """The tensors of all ranks, of one shape, stacked."""
    everyone = [torch.empty_like(own, memory_format=torch.contiguous_format) for _ in range(group.size())]
    dist.all_gather(everyone, own.contiguous(), group=group)
    return torch.stack(everyone)


def gather_tokens(tokens: Tensor, lengths: tuple[int, ...], group: dist.ProcessGroup) -> Tensor:
    """A mask (B, own tokens) of every rank, as one (B, n)."""
    padded = nn.functional.pad(tokens.to(torch.uint8), (0, max(lengths) - tokens.shape[1]))
    shards = zip(_gathered(padded, group), lengths, strict=True)
    return torch.cat([mask[:, :own] for mask, own in shards], dim=1).bool()


@dataclass(frozen=True)
class TokensOfRank(Part):
    """The columns of Phi at one rank's tokens; its counts are those of all ranks.

    lengths belong to what identifies a part: every rank then finds or misses its remembered Phi together with the
    others, which take part in making it.
    """

    lengths: tuple[int, ...]
    group: dist.ProcessGroup = field(compare=False, repr=False)

    @property
    def n(self) -> int:
        return sum(self.lengths)

    def total(self, count: Tensor) -> Tensor:
        total = count.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(total, group=self.group)
        return total

    def before_and_total(self, count: Tensor) -> tuple[Tensor, Tensor]:
        counts = _gathered(count, self.group)
        return counts[: self.group.rank()].sum(0), counts.sum(0)

    def all_columns(self, key_mask: Tensor) -> Tensor:
        return gather_tokens(key_mask, self.lengths, self.group)


class SequenceParallel:
    """`CSATCore.parallel` of a layer whose tokens are spread over ranks in order, any number on each.

    Queries (x) and context are the rank's own (queries that all ranks hold alike would give the context P times its
    gradient); the key mask is (B, own tokens). Everything that counts tokens
    (segments of pools, masses, anchors, exact attention when n <= m) counts those of all ranks: under a key mask three
    or four all-reduces of B to B H m integers, without one once for every length.

    Args:
        group: a ProcessGroup or a one-dimensional DeviceMesh.
        length: tokens of the context on all ranks, spread as `token_range` has it. When absent the ranks tell each
            other what they hold at every call, which waits for the device.

    Raises:
        TypeError, ValueError: as `process_group`; a length below 1.
    """

    def __init__(self, group: Group, length: int | None = None) -> None:
        if length is not None and length < 1:
            raise ValueError(f"length must be at least 1, got {length}")
        self.group, self.length = process_group(group), length

    def __deepcopy__(self, memo: dict[int, Any]) -> SequenceParallel:
        return self  # a process group has no copy

    def heads(self, count: int) -> range:
        return range(count)

    def own(self, weight: Tensor) -> Tensor:
        return weight

    def part(self, core: CSATCore, tokens: int, device: torch.device) -> TokensOfRank:
        """This rank's columns of Phi."""
        (lengths,), heads = shard_lengths((tokens,), self.group, self.length, device), core.key_heads
        start = sum(lengths[: self.group.rank()])
        return TokensOfRank(start, start + tokens, heads.start, heads.stop, lengths, self.group)

    def attend(
        self, core: CSATCore, queries: Callable[[], Tensor], k: Tensor, v: Tensor, key_mask: Tensor | None
    ) -> Tensor:
        part = self.part(core, k.shape[2], k.device)
        kc, vc, bias = core.measured(k, v, key_mask, part.n, part)
        under_way = SumOverRanks(torch.cat([kc, vc], dim=-1), self.group)
        q = queries()
        kc, vc = under_way.result().split([kc.shape[-1], vc.shape[-1]], dim=-1)
        return core.rows(q, kc.contiguous(), vc.contiguous(), bias)


class SumOverRanks:
    """The sum of ``local`` over the ranks of a group, under way until `result` is asked for.

    bfloat16 and float16 are summed in float32: the ranks' measurements are partial sums.
    """

    def __init__(self, local: Tensor, group: dist.ProcessGroup) -> None:
        self.group, self.dtype = group, local.dtype
        self.work: Any = None
        wide = local if local.dtype in (torch.float32, torch.float64) else local.float()
        self._total = _begin(wide, self)

    def result(self) -> Tensor:
        return _end(self._total, self).to(self.dtype)

    def launch(self, local: Tensor) -> Tensor:
        total = local.clone(memory_format=torch.contiguous_format)
        self.work = dist.all_reduce(total, group=self.group, async_op=True)
        return total


class _Begin(torch.autograd.Function):
    """Forward starts the sum, backward waits for that of the gradients, which `_End` started."""

    @staticmethod
    def forward(ctx: Any, local: Tensor, under_way: SumOverRanks) -> Tensor:
        ctx.under_way = under_way
        return under_way.launch(local)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        ctx.under_way.work.wait()
        return grad, None


class _End(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, total: Tensor, under_way: SumOverRanks) -> Tensor:
        under_way.work.wait()
        ctx.under_way = under_way
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return ctx.under_way.launch(grad), None


# A compiler that looked inside would see the started sum as an unchanged input: the graph breaks here instead.
@torch.compiler.disable
def _begin(local: Tensor, under_way: SumOverRanks) -> Tensor:
    return _Begin.apply(local, under_way)


@torch.compiler.disable
def _end(total: Tensor, under_way: SumOverRanks) -> Tensor:
    return _End.apply(total, under_way)


def token_mean(values: Tensor, group: Group) -> Tensor:
    """The mean over the values of all ranks, whose gradients sum to its gradient; ranks may hold different numbers.

    A mean of the ranks' own means would weigh the tokens of a short shard more. Summed and divided in float32 (float64
    stays), as `Tensor.mean` is: float16 ends at 65,504 tokens. In the dtype of the values.
    """
    group = process_group(group)
    wide = torch.promote_types(values.dtype, torch.float32)
    count = torch.full((), values.numel(), dtype=torch.float64, device=values.device)  # no copy that waits
    dist.all_reduce(count, group=group)
    own = values.sum(dtype=wide) / count.to(wide)
    mean = own.detach().clone()
    dist.all_reduce(mean, group=group)
    mean = own + (mean - own.detach())
    return mean.to(values.dtype) if values.is_floating_point() else mean


def check_same_measurements(model: nn.Module, group: dist.ProcessGroup) -> None:
    """Raises ValueError, on every rank, where the ranks of the group would measure differently: no one broadcasts a
    seed."""
    own = {
        name: (module.measurement_key.tolist(), module.config.to_dict())
        for name, module in model.named_modules()
        if isinstance(module, CSATCore)
    }
    everyone: list[Any] = [None] * group.size()
    dist.all_gather_object(everyone, own, group=group)
    for rank, other in enumerate(everyone):
        if other != everyone[0]:
            names = sorted(name for name in {*other, *everyone[0]} if other.get(name) != everyone[0].get(name))
            different = [name or "the model itself" for name in names]
            raise ValueError(
                f"ranks 0 and {rank} of the group differ in the seed, layer number or config of {', '.join(different)}"
                ": they would measure differently; build the model from one config on every rank"
            )


def parallelise(model: nn.Module, parallel: Parallel, group: dist.ProcessGroup) -> list[str]:
    """Sets ``parallel`` of every CSAT layer of the model; the names of the layers.

    Raises ValueError, on every rank, where the model has none or `check_same_measurements` does.
    """
    check_same_measurements(model, group)
    layers = {name: module for name, module in model.named_modules() if isinstance(module, CSATCore)}
    if not layers:
        raise ValueError("the model has no CSATAttention; convert it first")
    for layer in layers.values():
        layer.parallel = parallel
    return list(layers)
