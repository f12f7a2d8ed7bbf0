"""DeepSpeed integration: the `csat_attention` section of a DeepSpeed JSON, `initialize`, and the op builder.

```json
{"train_batch_size": 64,
 "csat_attention": {"enabled": true, "layers": "vision.*|decoder.*.cross*", "measurements": 64, "decoder": "lista"}}
```

`initialize` has the signature of `deepspeed.initialize`: it reads the section, replaces the attention modules whose
names match `layers`, and hands the rest to DeepSpeed. `apply` does the replacement alone. Importing this module
imports neither DeepSpeed nor a compiled library.
"""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import create_selective_checkpoint_contexts

from csat_ext.config import CSATConfig
from csat_ext.convert import family
from csat_ext.convert import register_converter as register_converter
from csat_ext.module import CSATCore, parameter_groups
from csat_ext.section import SECTION, CSATSection, choose, load_json, read_section

BUILDER = "CSATAttentionBuilder"


def apply(model: nn.Module, section: CSATSection | str | Path | dict[str, Any]) -> list[str]:
    """Replaces, in place, the attention modules that the section chooses; their Parameter objects are reused.

    Runs before `deepspeed.initialize`, so that the optimizer sees the new parameters; before, inside or after
    `deepspeed.zero.Init`.

    Args:
        model: any module that holds attention modules of the families of `csat_ext.convert`.
        section: a section that was read, or a DeepSpeed config or its path (`read_section`).

    Returns:
        The names of the replaced modules, in the model's order.

    Raises:
        ValueError: what `csat_ext.section.choose` or a converter refuses; the model is then as it was.
        TypeError, FileNotFoundError: as `read_section`.
    """
    section = section if isinstance(section, CSATSection) else read_section(section)
    new = {name: _converted(model, name, config) for name, config in choose(model, section).items()}
    for name, replacement in new.items():
        parent, _, child = name.rpartition(".")
        replacement.train(model.get_submodule(name).training)
        setattr(model.get_submodule(parent), child, replacement)
    for encoder in model.modules():
        if isinstance(encoder, nn.TransformerEncoder) and any(isinstance(m, CSATCore) for m in encoder.modules()):
            encoder.use_nested_tensor = False  # of its inference path, which a measurement of padded keys does not take
    return list(new)


def _converted(model: nn.Module, name: str, config: CSATConfig) -> nn.Module:
    old = model.get_submodule(name)
    form = family(old)
    assert form is not None
    try:
        return form.convert(old, config)
    except ValueError as error:
        raise ValueError(f"{SECTION}.layers: {name} ({type(old).__name__}): {error}") from error


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
    own learning rate. `model.parameters()`, a generator, is read after the replacement and therefore complete.

    Raises:
        ValueError: parameters of the replaced modules that `model_parameters` or `optimizer` lacks: they were
            collected before the replacement; or as `read_section` and `apply`.
        TypeError, FileNotFoundError: as `read_section`.
    """
    import deepspeed

    if model is None:
        raise TypeError("model: None came, an nn.Module is accepted")
    config = config if config is not None else config_params
    if config is None:
        config = getattr(args, "deepspeed_config", None)
    if config is None:
        raise TypeError("config: None came, a dict or the path of a DeepSpeed JSON is accepted")
    register()
    ds_config = load_json(config)
    section = read_section(ds_config)
    replaced = apply(model, section)
    if optimizer is None and model_parameters is None:
        model_parameters = _groups(model, ds_config, section)
    elif model_parameters is not None:
        model_parameters = [{**g, "params": list(g["params"])} if isinstance(g, dict) else g for g in model_parameters]
        _check_trained(model, replaced, "model_parameters", model_parameters)
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
        config=ds_config,
        mesh_param=mesh_param,
    )
    _mend_universal_loading(ds_optimizer, model_parameters)
    return engine, ds_optimizer, loader, scheduler


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


def register() -> None:
    """Makes DeepSpeed know `CSATAttentionBuilder`: `create_op_builder`, `deepspeed.ops.op_builder` and `ds_report`.

    DeepSpeed has no entry point for third parties: a CUDA accelerator looks names up in a class dictionary, the
    CPU one in a chain of ifs, which is wrapped. Idempotent.
    """
    import deepspeed.ops.op_builder as op_builder
    from deepspeed.accelerator import get_accelerator
    from deepspeed.git_version_info import installed_ops
    from deepspeed.ops.op_builder.all_ops import ALL_OPS

    accelerator = get_accelerator()
    if accelerator.get_op_builder(BUILDER) is None or getattr(op_builder, BUILDER, None) is None:
        builder = _builder_class()
        if hasattr(accelerator, "class_dict"):
            accelerator._lazy_init_class_dict()
            accelerator.class_dict[BUILDER] = builder
        else:
            known = accelerator.get_op_builder
            accelerator.get_op_builder = lambda name: builder if name == BUILDER else known(name)
        setattr(op_builder, BUILDER, builder)
        ALL_OPS[builder.NAME] = builder()
        installed_ops[builder.NAME] = builder().is_prebuilt()


def _builder_class() -> Any:
    from deepspeed.ops.op_builder.builder import OpBuilder

    class CSATAttentionBuilder(OpBuilder):
        """Hands DeepSpeed the library that is installed with this package; nothing is built at run time."""

        BUILD_VAR = "DS_BUILD_CSAT_ATTENTION"
        NAME = SECTION

        def __init__(self, name: str = NAME) -> None:
            super().__init__(name=name)

        def absolute_name(self) -> str:
            return "csat_ext._C"

        def sources(self) -> list[str]:
            return []

        def is_prebuilt(self) -> bool:
            """Whether the compiled library is there; one that is there but does not load raises its own error."""
            return importlib.util.find_spec(self.absolute_name()) is not None

        def is_compatible(self, verbose: bool = False) -> bool:
            return self.is_prebuilt()

        def load(self, verbose: bool = True) -> Any:
            # The stock load() compares recorded torch versions; the stable ABI makes that comparison wrong.
            if not self.is_prebuilt():
                raise ImportError(f"{self.absolute_name()} is not built: reinstall csat_ext with a C++ compiler")
            return importlib.import_module(self.absolute_name())

    return CSATAttentionBuilder


def _check_trained(model: nn.Module, replaced: list[str], argument: str, groups: list[Any]) -> None:
    """Raises ValueError where a replaced module's parameter is in none of the groups (tensors or dicts of them)."""
    params = [p for group in groups for p in (group["params"] if isinstance(group, dict) else [group])]
    known = {id(p) for p in params}
    inside = ((f"{name}.{key}", p) for name in replaced for key, p in model.get_submodule(name).named_parameters())
    missing = [name for name, p in inside if p.requires_grad and id(p) not in known]
    if missing:
        raise ValueError(
            f"{argument} lacks {len(missing)} parameters of the replaced modules, such as {missing[0]}: never trained; "
            f"call csat_ext.deepspeed.apply before collecting them, or leave {argument} out"
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
    params = ds_config.get("optimizer", {}).get("params", {})
    if "lr" not in params:
        return [p for p in model.parameters() if p.requires_grad]
    return parameter_groups(
        model,
        lr=float(params["lr"]),
        weight_decay=float(params.get("weight_decay", 0.0)),
        threshold_lr_scale=section.threshold_lr_scale,
    )
