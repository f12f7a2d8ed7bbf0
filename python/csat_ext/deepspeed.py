"""DeepSpeed integration: the `csat_attention` section of a DeepSpeed JSON, `initialize`, and the op builder.

```json
{"train_batch_size": 64,
 "csat_attention": {"enabled": true, "layers": "vision.*|decoder.*.cross*", "measurements": 64, "decoder": "lista"}}
```

`initialize` has the signature of `deepspeed.initialize`: it reads the section, replaces the attention modules whose
names match `layers`, and hands the rest to DeepSpeed. `apply` does the replacement alone. Importing this module makes
DeepSpeed, where it is installed, know the op builder (`csat_ext.op_builder`); no CUDA context is made.
"""

from __future__ import annotations

import importlib.util
import inspect
import os
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import create_selective_checkpoint_contexts

from csat_ext.convert import register_converter as register_converter
from csat_ext.module import parameter_groups
from csat_ext.op_builder import register
from csat_ext.parallel import shard_sequence
from csat_ext.section import SECTION as SECTION
from csat_ext.section import CSATSection, apply, load_json, read_section


def initialize(
    args: Any = None,
    model: nn.Module | None = None,
    optimizer: Any = None,
    model_parameters: Any = None,
    training_data: Any = None,
    lr_scheduler: Any = None,
    distributed_port: int = 29500,
    mpu: Any = None,
    dist_init_required: bool | None = None,
    collate_fn: Any = None,
    config: str | Path | dict[str, Any] | None = None,
    mesh_param: Any = None,
    config_params: str | Path | dict[str, Any] | None = None,
) -> tuple[Any, Any, Any, Any]:
    """`deepspeed.initialize` after `apply`: same arguments, same return value (engine, optimizer, loader, scheduler).

    Where neither `optimizer` nor `model_parameters` is given, the JSON's optimizer gets the groups of
    `csat_ext.module.parameter_groups`: no weight decay on norms, biases and thresholds, and the thresholds'
    own learning rate. `model.parameters()`, a generator, is read after the replacement and therefore complete, but
    all of one group: a warning says so where the section states `threshold_lr_scale`.

    An ``mpu`` with sequence-parallel groups (`deepspeed.runtime.sequence_parallel.parallel_state_sp`) spreads the
    tokens of the replaced modules over them, and the engine's gradients are made right (`csat_ext.parallel.engine`).

    Raises:
        ValueError: parameters of the replaced modules that `model_parameters` or `optimizer` lacks: they were
            collected before the replacement; `lr` or `weight_decay` of the JSON's optimizer that is no number, such
            as "auto"; a setup of several ranks that would train wrongly (docs/parallel.md); or as `read_section` and
            `apply`.
        TypeError, FileNotFoundError: as `read_section`.
    """
    import deepspeed

    from csat_ext.parallel.engine import reconcile, refuse_scalars
    from csat_ext.parallel.tensor import finish_autotp, prepare_autotp

    if model is None:
        raise TypeError("model: None came, an nn.Module is accepted")
    config = config if config is not None else config_params
    if config is None:
        config = getattr(args, "deepspeed_config", None)
    if config is None:
        raise TypeError("config: None came, a dict or the path of a DeepSpeed JSON is accepted")
    ds_config = load_json(config)
    section = read_section(ds_config)
    if optimizer is None:
        _check_rates(ds_config)
    replaced = apply(model, section)
    if replaced:
        refuse_scalars(model)
    split = prepare_autotp(model, replaced, ds_config)
    if replaced and hasattr(mpu, "get_sequence_parallel_group"):
        if split != ds_config:
            raise ValueError("tensor_parallel and an mpu with sequence-parallel groups came: one of them is accepted")
        _choose_device()
        shard_sequence(model, mpu.get_sequence_parallel_group(), section.sequence_parallel)
    if optimizer is None and model_parameters is None:
        model_parameters = _groups(model, ds_config, section)
    elif model_parameters is not None:
        model_parameters = [{**g, "params": list(g["params"])} if isinstance(g, dict) else g for g in model_parameters]
        _check_trained(model, replaced, "model_parameters", model_parameters)
        _warn_of_one_rate(model, replaced, ds_config, model_parameters)
    elif hasattr(optimizer, "param_groups"):
        _check_trained(model, replaced, "optimizer", optimizer.param_groups)
    engine, ds_optimizer, loader, scheduler = deepspeed.initialize(
        args=args,
        model=model,
        optimizer=optimizer,
        model_parameters=model_parameters,
        training_data=training_data,
        lr_scheduler=lr_scheduler,
        distributed_port=distributed_port,
        mpu=mpu,
        dist_init_required=dist_init_required,
        collate_fn=collate_fn,
        config=split,
        mesh_param=mesh_param,
    )
    if split != ds_config:
        finish_autotp(model, replaced)
    reconcile(engine)
    _mend_universal_loading(ds_optimizer, model_parameters)
    return engine, ds_optimizer, loader, scheduler


def _choose_device() -> None:
    """The device of this rank, which `deepspeed.initialize` would choose too, but after the ranks have compared their
    seeds: NCCL takes an object from the current device, and no rank but the first has its own in the first one."""
    from deepspeed.accelerator import get_accelerator

    if "LOCAL_RANK" in os.environ:
        get_accelerator().set_device(int(os.environ["LOCAL_RANK"]))


def checkpoint_contexts(*ops: str) -> Callable[[], tuple[Any, Any]]:
    """Selective activation checkpointing by op name: the `context_fn` of `torch.utils.checkpoint.checkpoint`.

    The outputs of the named ops of `torch.ops.csat` (``"attend_decode"``, ``"project"``, ...) are kept, everything else
    inside the checkpointed function is computed anew in the backward pass.

    Raises:
        ValueError: a name that is no op.
    """
    known = sorted({name.removeprefix("csat::") for name in torch._C._dispatch_get_all_op_names() if "csat::" in name})
    for name in ops:
        if name not in known:
            raise ValueError(f"ops: {name!r} is not an op of torch.ops.csat; accepted: {', '.join(known)}")
    kept = [getattr(torch.ops.csat, name).default for name in ops]
    return partial(create_selective_checkpoint_contexts, kept)


def _check_trained(model: nn.Module, replaced: list[str], argument: str, groups: list[Any]) -> None:
    """Raises ValueError where a replaced module's parameter is in none of the groups (tensors or dicts of them)."""
    params = [p for group in groups for p in (group["params"] if isinstance(group, dict) else [group])]
    known = {id(p) for p in params}
    inside = ((f"{name}.{key}", p) for name in replaced for key, p in model.get_submodule(name).named_parameters())
    missing = [name for name, p in inside if p.requires_grad and id(p) not in known]
    if missing:
        raise ValueError(
            f"{argument} lacks {len(missing)} parameters of the replaced modules, such as {missing[0]}: never trained; "
            f"leave {argument} out, or collect them after csat_ext.deepspeed.apply and let the section say "
            '"enabled": false'
        )


def _warn_of_one_rate(model: nn.Module, replaced: list[str], ds_config: dict[str, Any], groups: list[Any]) -> None:
    """Warns where the section states a rate of the thresholds that parameters of a single group cannot have."""
    stated = ds_config.get(SECTION, {}).get("threshold_lr_scale")
    inside = (key for name in replaced for key, _ in model.get_submodule(name).named_parameters())
    if stated is not None and sum(isinstance(g, dict) for g in groups) < 2 and "threshold" in inside:
        warnings.warn(
            f"model_parameters: parameters of one group came, so that {SECTION}.threshold_lr_scale = {stated} has no "
            "effect and norms and biases decay as matrices do; leave model_parameters out",
            stacklevel=3,
        )


def _mend_universal_loading(ds_optimizer: Any, groups: Any) -> None:
    """Loading a universal checkpoint at ZeRO-3, DeepSpeed 0.19 is made for one parameter group: it gives all of them
    the settings of the first (the thresholds would lose their learning rate, norms and biases would decay) and one
    step counter, which every group then advances (Adam's bias correction would run ahead)."""
    name = "load_hp_checkpoint_state_from_checkpoint_dir_stage3"
    if not hasattr(ds_optimizer, name):
        return
    load = getattr(ds_optimizer, name)
    settings = [{k: v for k, v in g.items() if k != "params"} for g in groups or () if isinstance(g, dict)]

    def load_and_restore(*args: Any, **kwargs: Any) -> None:
        load(*args, **kwargs)
        for state in ds_optimizer.optimizer.state.values():
            if isinstance(state.get("step"), torch.Tensor):
                state["step"] = state["step"].clone()
        held = ds_optimizer.optimizer.param_groups
        if len(settings) == len(held):
            rate = held[0]["lr"] / settings[0]["lr"]  # of the schedule at that step, the same for every group
            for group, own in zip(held, settings, strict=True):
                group.update({**own, "lr": own["lr"] * rate})

    setattr(ds_optimizer, name, load_and_restore)


def _groups(model: nn.Module, ds_config: dict[str, Any], section: CSATSection) -> Any:
    rate = _rate(ds_config)
    if rate is None:
        return [p for p in model.parameters() if p.requires_grad]
    return parameter_groups(
        model,
        lr=rate,
        weight_decay=float(_optimizer_params(ds_config).get("weight_decay", 0.0)),
        threshold_lr_scale=section.threshold_lr_scale,
    )


def _optimizer_params(ds_config: dict[str, Any]) -> dict[str, Any]:
    return (ds_config.get("optimizer") or {}).get("params") or {}


def _check_rates(ds_config: dict[str, Any]) -> None:
    """Raises ValueError for a rate or weight decay that no group can be given."""
    params = _optimizer_params(ds_config)
    for key in ("lr", "weight_decay"):
        try:
            float(params.get(key, 0.0))
        except (TypeError, ValueError):
            raise ValueError(
                f"DeepSpeed config: optimizer.params.{key}: {params[key]!r} came, a number is accepted"
                + (' ("auto" is filled by transformers\' Trainer alone)' if params[key] == "auto" else "")
            ) from None


_DEFAULT_RATES = {"adagrad": 1e-2, **dict.fromkeys(("adam", "adamw", "lamb", "lion"), 1e-3)}
"""Rates of the optimizers of DeepSpeed 0.19 where the JSON states none, in lower case as DeepSpeed reads the type."""


def _rate(ds_config: dict[str, Any]) -> float | None:
    """The learning rate of the JSON's optimizer, its default where none is stated; None: no optimizer, or one whose
    default is not known here."""
    kind = str((ds_config.get("optimizer") or {}).get("type"))
    params = _optimizer_params(ds_config)
    if "lr" in params:
        return float(params["lr"])
    if kind.lower() in _DEFAULT_RATES:
        return _DEFAULT_RATES[kind.lower()]
    if kind.lower() == "muon":  # DeepSpeed's own, not that of torch, with a rate for each of its two algorithms
        return None
    of_torch = getattr(torch.optim, kind, None)  # what DeepSpeed takes for any other name
    if not (isinstance(of_torch, type) and issubclass(of_torch, torch.optim.Optimizer)):
        return None
    lr = inspect.signature(of_torch).parameters.get("lr")
    return None if lr is None or lr.default is lr.empty else float(lr.default)


if importlib.util.find_spec("deepspeed") is not None:
    register()
