"""Tensor parallelism by heads, and DTensor inputs.

Every weight of `CSATAttention` beside its projections has a leading head axis, so a rank with a share of the heads
needs nothing of the others': its rows of Phi, gains, decoders. One all-reduce follows, that of the output projection.

- torch: ``parallelize_module(model, mesh, tensor_parallel_plan(model))``;
- DeepSpeed AutoTP: `csat_ext.deepspeed.initialize` with ``tensor_parallel`` in the config adds `autotp_rules`.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Placement, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import ColwiseParallel, ParallelStyle, RowwiseParallel, parallelize_module

from csat_ext.measurements import Part
from csat_ext.module import CSATAttention, CSATCore
from csat_ext.parallel.sequence import Group, SequenceParallel, process_group


class HeadsOfRank:
    """`CSATCore.parallel` of a layer whose heads are spread over ranks, in order, the same number on each.

    Args:
        group: a ProcessGroup or a one-dimensional DeviceMesh; its size divides the number of heads.
        tokens: where another group's ranks share the tokens as well.
    """

    def __init__(self, group: Group, tokens: SequenceParallel | None = None) -> None:
        self.group, self.tokens = process_group(group), tokens

    def __deepcopy__(self, memo: dict[int, Any]) -> HeadsOfRank:
        return self

    def heads(self, count: int) -> range:
        ranks, rank = self.group.size(), self.group.rank()
        if count % ranks:
            raise ValueError(f"{count} heads over {ranks} ranks came: the first must be a multiple of the second")
        return range(rank * count // ranks, (rank + 1) * count // ranks)

    def own(self, weight: Tensor) -> Tensor:
        if isinstance(weight, DTensor):
            return weight.to_local()
        heads = self.heads(weight.shape[0])
        return weight[heads.start : heads.stop]

    def attend(
        self, core: CSATCore, queries: Callable[[], Tensor], k: Tensor, v: Tensor, key_mask: Tensor | None
    ) -> Tensor:
        if self.tokens is not None:
            return self.tokens.attend(core, queries, k, v, key_mask)
        n, heads = k.shape[2], core.key_heads
        return core.rows(queries(), *core.measured(k, v, key_mask, n, Part(0, n, heads.start, heads.stop)))


# ---- torch: parallelize_module ---------------------------------------------------------------------------------------


class HeadParallel(ParallelStyle):
    """The style of a `CSATAttention` in a `parallelize_module` plan: x, context and output are replicated.

    Args:
        tokens: where the ranks of another dimension of the mesh share the tokens as well.

    Raises, when applied:
        TypeError: another module. ValueError: heads that the mesh does not divide.
    """

    def __init__(self, tokens: SequenceParallel | None = None) -> None:
        super().__init__()
        self.tokens = tokens

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        if not isinstance(module, CSATAttention):
            raise TypeError(f"HeadParallel: {type(module).__name__} came, a CSATAttention is accepted")
        parallel = HeadsOfRank(device_mesh, self.tokens)
        parallel.heads(module.kv_heads)
        plan: dict[str, ParallelStyle] = {name: ColwiseParallel() for name in ("q_proj", "k_proj", "v_proj")}
        parallelize_module(module, device_mesh, plan | {"out_proj": RowwiseParallel()})
        for name, weight in list(module.named_parameters(recurse=False)):
            shard = distribute_tensor(weight.data, device_mesh, [Shard(0)])
            module.register_parameter(name, nn.Parameter(shard, requires_grad=weight.requires_grad))
        module.parallel = parallel
        return module


def tensor_parallel_plan(model: nn.Module, tokens: SequenceParallel | None = None) -> dict[str, ParallelStyle]:
    """The part of a `parallelize_module` plan that concerns the `CSATAttention` modules inside the model."""
    return {name: HeadParallel(tokens) for name, module in model.named_modules() if isinstance(module, CSATAttention)}


# ---- torch: DTensor inputs -------------------------------------------------------------------------------------------


def accept_dtensors(model: nn.Module) -> list[str]:
    """Lets every `CSATAttention` of the model take DTensors, and return one placed as its x; the names of the layers.

    Each dimension of the mesh may hold x and context alike replicated, split by batch (``Shard(0)``) or, one of them,
    by tokens (``Shard(1)``): that whose ranks the layer's `SequenceParallel` has. Weights stay what they are; each rank
    has its share of their gradients, which are to be summed (`fully_shard` averages: see `token_mean`).
    """
    layers = {name: module for name, module in model.named_modules() if isinstance(module, CSATAttention)}
    for layer in layers.values():
        layer.register_forward_pre_hook(_to_local, with_kwargs=True, prepend=True)
        layer.register_forward_hook(_from_local, with_kwargs=True)
    return list(layers)


_PLACED_X = "_placed_x"


def _to_local(layer: nn.Module, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    assert isinstance(layer, CSATAttention)
    layer.__dict__.pop(_PLACED_X, None)  # of a call that failed
    tensors = [t for t in (*args, *kwargs.values()) if isinstance(t, Tensor)]
    if not any(isinstance(t, DTensor) for t in tensors):
        return args, kwargs
    placed = {(t.device_mesh, t.placements) if isinstance(t, DTensor) else None for t in tensors}
    if len(placed) > 1:
        raise ValueError("x, context and key_mask must all be DTensors of one mesh and alike placed, or none of them")
    x = args[0] if args else kwargs["x"]
    _check_placements(layer, x.device_mesh, x.placements)
    layer.__dict__[_PLACED_X] = x

    def local(value: Any) -> Any:
        return value.to_local() if isinstance(value, DTensor) else value

    return tuple(map(local, args)), {key: local(value) for key, value in kwargs.items()}


def _from_local(layer: nn.Module, args: Any, kwargs: dict[str, Any], output: Tensor) -> Tensor:
    x = layer.__dict__.pop(_PLACED_X, None)
    if x is None:
        return output
    stride = (x.shape[1] * x.shape[2], x.shape[2], 1)  # of the whole output, which has the shape of x
    placed = (x.device_mesh, x.placements)
    return DTensor.from_local(output.contiguous(), *placed, run_check=False, shape=x.shape, stride=stride)


def _check_placements(layer: CSATAttention, mesh: DeviceMesh, placements: Sequence[Placement]) -> None:
    by_tokens = [axis for axis, placement in enumerate(placements) if placement == Shard(1)]
    known = all(placement in (Replicate(), Shard(0), Shard(1)) for placement in placements)
    if not known or len(by_tokens) > 1:
        raise ValueError(
            f"x is placed as {tuple(placements)}; accepted: Replicate(), Shard(0) and, once, Shard(1), the tokens"
        )
    group = getattr(layer.parallel, "group", None)
    ranks = dist.get_process_group_ranks(mesh.get_group(by_tokens[0])) if by_tokens else None
    if ranks != (None if group is None else dist.get_process_group_ranks(group)):
        raise ValueError(
            f"x is placed as {tuple(placements)} and the layer's parallel is {layer.parallel}: tokens are split over a "
            "dimension of the mesh where, and only where, shard_sequence(model, mesh[name]) has its group"
        )


# ---- DeepSpeed AutoTP ------------------------------------------------------------------------------------------------


def autotp_rules(names: Sequence[str]) -> list[dict[str, Any]]:
    """``layer_specs`` of AutoTP's ``partition_config`` for the `CSATAttention` modules of those names.

    Q, K and V are split by heads; the other weights stay whole on every rank, which uses its heads' rows, and their
    gradients are summed.
    """
    layers = "|".join(re.escape(name) for name in names)
    weights = "gain|phi|score_bias|feature_sensing|psi|threshold|step|linear_weight|decoder_[wsb]"
    return [
        {"patterns": [rf"({layers})\.[qkv]_proj\.weight$"], "partition_type": "column"},
        {"patterns": [rf"({layers})\.out_proj\.weight$"], "partition_type": "row"},
        {"patterns": [rf"({layers})\.({weights})$"], "partition_type": "skip", "grad_allreduce": True},
    ]


def prepare_autotp(model: nn.Module, names: Sequence[str], ds_config: Mapping[str, Any]) -> dict[str, Any]:
    """The DeepSpeed config with `autotp_rules` for those layers, where it asks for tensor parallelism; else as it is.

    Raises ValueError without a ``partition_config`` for the rest of the model: AutoTP's guesses by names and classes
    split heads and sum no gradients of weights with a head axis.
    """
    section = ds_config.get("tensor_parallel", {})
    ranks = section.get("autotp_size", 0)
    if ranks <= 1 or not names:
        return dict(ds_config)
    if "partition_config" not in section:
        raise ValueError(
            "tensor_parallel: autotp_size came without partition_config: AutoTP would guess which weights to split; "
            "give layer_specs for the rest of the model, or {'use_default_specs': false} for none"
        )
    for name in names:
        layer = model.get_submodule(name)
        if not isinstance(layer, CSATAttention):
            raise ValueError(f"tensor_parallel: {name} became a {type(layer).__name__}; accepted: a CSATAttention")
        if layer.kv_heads % ranks:
            raise ValueError(f"tensor_parallel: {name} has {layer.kv_heads} key heads, autotp_size is {ranks}")
        layer.replaced = True  # type: ignore[assignment]  # AutoTP then leaves num_heads and embed_dim alone
    partition = dict(section["partition_config"])
    partition["layer_specs"] = autotp_rules(names) + list(partition.get("layer_specs", []))
    return {**ds_config, "tensor_parallel": {**section, "partition_config": partition}}


def finish_autotp(model: nn.Module, names: Sequence[str]) -> None:
    """Gives the layers that AutoTP has split the ranks' shares of their heads."""
    from deepspeed.utils import groups

    for name in names:
        layer = model.get_submodule(name)
        assert isinstance(layer, CSATAttention)
        layer.parallel = HeadsOfRank(groups.get_tensor_model_parallel_group())
