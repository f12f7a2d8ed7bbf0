"""What a DeepSpeed engine does to layers that several ranks compute together: checked, corrected or refused.

Sequence parallelism needs the gradients of parameters *summed* over the sequence ranks and averaged over the others.
Found by running DeepSpeed 0.19 (tests/distributed/test_zero.py runs it again):

- ``mpu=parallel_state_sp``: right at ZeRO stages 0 to 2; at stage 3 the reduce-scatter averages over all ranks.
  Gradients are corrected where they enter the model.
- stage 3 with ``reduce_scatter: false``: parameters above ``reduce_bucket_size`` are scaled otherwise than the rest.
  Refused.
- ``data_parallel_size`` and ``sequence_parallel_size`` in the config, or ``mesh_param``: gradients are not summed over
  the sequence ranks at all. Refused.
- a group that DeepSpeed does not know of (a DeviceMesh): averaged over its ranks. Corrected.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping
from typing import Any

import torch.distributed as dist
from torch import Tensor, nn

from csat_ext.module import CSATCore
from csat_ext.parallel.sequence import SequenceParallel, check_same_measurements
from csat_ext.parallel.ulysses import UlyssesParallel

_RUN_WITH = "0.19."


def refuse_scalars(model: nn.Module) -> None:
    """Raises ValueError for parameters without dimensions: DeepSpeed flattens them into partitions and fails later."""
    scalars = [name for name, p in model.named_parameters() if p.dim() == 0 and not hasattr(p, "ds_shape")]
    if scalars:
        raise ValueError(
            f"DeepSpeed takes no 0-dimensional parameters, {', '.join(scalars)} came: give them shape (1,)"
        )


def reconcile(engine: Any) -> float:
    """Makes the engine's gradients right for its layers' sequence parallelism; the factor applied to them.

    Raises:
        ValueError: an engine that cannot give right gradients, or ranks whose seeds differ (buffers are not
            broadcast).
    """
    layers = [module for module in engine.module.modules() if isinstance(module, CSATCore)]
    if not layers:
        return 1.0
    check_same_measurements(engine.module, engine.seq_data_parallel_group)
    spread = [getattr(layer.parallel, "tokens", layer.parallel) for layer in layers]  # `HeadsOfRank` may have tokens
    shared = [parallel for parallel in spread if isinstance(parallel, SequenceParallel | UlyssesParallel)]
    if not shared:
        return 1.0
    tokens = shared[0].group
    stage = engine.zero_optimization_stage()
    _refuse(engine, tokens, stage)
    if stage == 3:
        _warn_of_other_versions()
    factor = tokens.size() / (1 if stage == 3 else engine.sequence_parallel_size)
    if factor != 1:
        engine.module.register_forward_hook(lambda module, args, output: _scale_gradients(output, factor))
    return factor


def _refuse(engine: Any, tokens: dist.ProcessGroup, stage: int) -> None:
    missing = {*dist.get_process_group_ranks(tokens)} - {*dist.get_process_group_ranks(engine.seq_data_parallel_group)}
    if missing:
        raise ValueError(
            f"DeepSpeed does not sum gradients over the sequence ranks {sorted(missing)} (data_parallel_size with "
            "sequence_parallel_size in the config, or mesh_param, makes groups without them): leave those keys out, "
            "call deepspeed.runtime.sequence_parallel.parallel_state_sp.initialize_sequence_parallel, pass it as mpu"
        )
    if stage == 3 and not engine.zero_reduce_scatter():
        raise ValueError(
            "zero_optimization.reduce_scatter: false came with stage 3 and sequence parallelism: DeepSpeed scales "
            "gradients of parameters above reduce_bucket_size otherwise than the rest; true is accepted"
        )


def _warn_of_other_versions() -> None:
    from deepspeed import __version__

    if not __version__.startswith(_RUN_WITH):
        warnings.warn(
            f"the gradient scale of ZeRO stage 3 under sequence parallelism was measured with DeepSpeed {_RUN_WITH}x "
            f"and is corrected for that; this is {__version__}: compare one step with stage 2",
            stacklevel=3,
        )


def _scale_gradients(output: Any, factor: float) -> None:
    for tensor in _tensors(output):
        if tensor.requires_grad:
            tensor.register_hook(lambda gradient: gradient * factor)


def _tensors(output: Any) -> Iterator[Tensor]:
    if isinstance(output, Tensor):
        yield output
    elif isinstance(output, Mapping):
        yield from (tensor for value in output.values() for tensor in _tensors(value))
    elif isinstance(output, list | tuple):
        yield from (tensor for value in output for tensor in _tensors(value))
