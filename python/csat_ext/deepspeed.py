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

import dataclasses
import difflib
import importlib
import importlib.util
import inspect
import json
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from torch import nn

from csat_ext.config import CSATConfig, refuse_unknown
from csat_ext.module import CSATAttention, parameter_groups
from csat_ext.parallel import FORMS, shard_sequence

SECTION = "csat_attention"
BUILDER = "CSATAttentionBuilder"

Converter = Callable[[nn.Module, CSATConfig], nn.Module]


@dataclass(frozen=True)
class CSATSection:
    """The `csat_attention` section; every other key of it is a field of `CSATConfig`.

    Attributes:
        enabled: False leaves the model as it is. A section without the key is enabled.
        layers: shell patterns of module names, alternatives joined by `|`; each of them must match something.
        threshold_lr_scale: learning rate of the decoder's thresholds over that of the other parameters.
        attention: what each chosen module becomes.
        sequence_parallel: how layers work together where ``mpu`` spreads the tokens over ranks: a name from
            `csat_ext.parallel.FORMS`.
    """

    enabled: bool = False
    layers: str = "*"
    threshold_lr_scale: float = 10.0
    attention: CSATConfig = field(default_factory=CSATConfig)
    sequence_parallel: str = "measurements"

    @property
    def patterns(self) -> list[str]:
        """The alternatives of `layers`."""
        return [pattern.strip() for pattern in self.layers.split("|")]


def read_section(ds_config: str | Path | dict[str, Any]) -> CSATSection:
    """The `csat_attention` section of a DeepSpeed config; disabled where there is none.

    DeepSpeed accepts unknown top-level keys without a word, so that a misspelt section would train full attention:
    a key that comes near the section's name is refused.

    Args:
        ds_config: the config as a dict, or the path of its JSON file.

    Raises:
        FileNotFoundError: the file does not exist.
        ValueError: malformed JSON, a near miss of the section's name, an unknown key or a wrong value in it.
        TypeError: the config or its section is not a mapping.
    """
    ds_config = load_json(ds_config)
    for key in ds_config:
        if key != SECTION and _near_miss(key):
            raise ValueError(f"DeepSpeed config: unknown section {key!r}; did you mean {SECTION!r}?")
    if SECTION not in ds_config:
        return CSATSection()
    section = ds_config[SECTION]
    if not isinstance(section, dict):
        raise TypeError(f"{SECTION}: {section!r} came, a mapping is accepted")
    own = tuple(f.name for f in dataclasses.fields(CSATSection) if f.name != "attention")
    chosen: dict[str, Any] = {"enabled": True} | {key: section[key] for key in section if key in own}
    rest = {key: value for key, value in section.items() if key not in own}
    refuse_unknown(rest, (*own, *(f.name for f in dataclasses.fields(CSATConfig))), SECTION)
    _check_own(chosen)
    return CSATSection(**chosen, attention=CSATConfig.from_dict(rest, SECTION))


def load_json(config: str | Path | dict[str, Any]) -> dict[str, Any]:
    """A DeepSpeed config as a dict. Raises FileNotFoundError, ValueError (malformed) or TypeError (not a mapping)."""
    if isinstance(config, (str, Path)):
        path = Path(config)
        if not path.is_file():
            raise FileNotFoundError(f"DeepSpeed config: no file {path}")
        try:
            config = json.loads(path.read_text(), object_pairs_hook=_unique_keys)
        except (json.JSONDecodeError, UnicodeDecodeError) as error:
            raise ValueError(f"DeepSpeed config: {path} is not valid JSON: {error}") from error
    if not isinstance(config, dict):
        raise TypeError(f"DeepSpeed config: {type(config).__name__} came, a mapping is accepted")
    return config


def apply(model: nn.Module, section: CSATSection) -> list[str]:
    """Replaces, in place, the attention modules that the section chooses; their Parameter objects are reused.

    Runs before `deepspeed.initialize`, so that the optimizer sees the new parameters. The i-th replaced module gets
    `attention.layer + i`, so that random measurements differ between layers.

    Returns:
        The names of the replaced modules, in the model's order.

    Raises:
        ValueError: a pattern that matches no attention module, or one that matches a causal one (measurements mix
            tokens along the sequence, so that the future would reach the past).
    """
    if not section.enabled:
        return []
    convertible = {name: module for name, module in model.named_modules() if name and _converter(module) is not None}
    for pattern in section.patterns:
        if not any(fnmatchcase(name, pattern) for name in convertible):
            found = ", ".join(convertible) or "none"
            raise ValueError(f"{SECTION}.layers: {pattern!r} matches no attention module; this model has: {found}")
    chosen = [name for name in convertible if any(fnmatchcase(name, pattern) for pattern in section.patterns)]
    causal = [name for name in chosen if getattr(convertible[name], "causal", False)]
    if causal:
        raise ValueError(
            f"{SECTION}.layers: {section.layers!r} chooses the causal {', '.join(causal)}; measurements mix the future "
            "into the past, so name the other modules only"
        )
    for index, name in enumerate(chosen):
        old = convertible[name]
        converter = _converter(old)
        assert converter is not None
        new = converter(old, section.attention.replace(layer=section.attention.layer + index))
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, new.train(old.training))
    return chosen


def register_converter(kind: type[nn.Module], converter: Converter) -> None:
    """Teaches `apply` another attention class: `converter(module, config)` returns the replacement."""
    _CONVERTERS[kind] = converter


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

    An ``mpu`` with sequence-parallel groups (`deepspeed.runtime.sequence_parallel.parallel_state_sp`) spreads the
    tokens of the replaced modules over them, and the engine's gradients are made right (`csat_ext.parallel.engine`).

    Raises:
        ValueError: parameters of the replaced modules that `model_parameters` or `optimizer` lacks: they were
            collected before the replacement; a setup of several ranks that would train wrongly (docs/parallel.md); or
            as `read_section` and `apply`.
        TypeError, FileNotFoundError: as `read_section`.
    """
    import deepspeed

    from csat_ext.parallel import engine, tensor

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
    if replaced:
        engine.refuse_scalars(model)
    split = tensor.prepare_autotp(model, replaced, ds_config)
    if replaced and hasattr(mpu, "get_sequence_parallel_group"):
        if split != ds_config:
            raise ValueError("tensor_parallel and an mpu with sequence-parallel groups came: one of them is accepted")
        shard_sequence(model, mpu.get_sequence_parallel_group(), section.sequence_parallel)
    if optimizer is None and model_parameters is None:
        model_parameters = _groups(model, ds_config, section)
    elif model_parameters is not None:
        model_parameters = [{**g, "params": list(g["params"])} if isinstance(g, dict) else g for g in model_parameters]
        _check_trained(model, replaced, "model_parameters", model_parameters)
    elif hasattr(optimizer, "param_groups"):
        _check_trained(model, replaced, "optimizer", optimizer.param_groups)
    made = deepspeed.initialize(
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
        tensor.finish_autotp(model, replaced)
    engine.reconcile(made[0])
    return made


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


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    keys = [key for key, _ in pairs]
    for key in keys:
        if keys.count(key) > 1:
            raise ValueError(f"DeepSpeed config: the key {key!r} stands twice")
    return dict(pairs)


def _near_miss(key: str) -> bool:
    plain = re.sub(r"[^a-z]", "", key.lower())
    name = SECTION.replace("_", "")
    return (
        "csat" in plain or "compressedsensing" in plain or bool(difflib.get_close_matches(plain, [name], cutoff=0.85))
    )


def _check_own(chosen: dict[str, Any]) -> None:
    accepted = {"enabled": (bool, "true or false"), "layers": (str, "a pattern such as 'vision.*|decoder.*.cross*'")}
    for key, (kind, words) in accepted.items():
        if key in chosen and not isinstance(chosen[key], kind):
            raise TypeError(f"{SECTION}.{key}: {chosen[key]!r} came, {words} is accepted")
    if "layers" in chosen and not all(pattern.strip() for pattern in chosen["layers"].split("|")):
        raise ValueError(f"{SECTION}.layers: {chosen['layers']!r} has an empty alternative")
    form = chosen.get("sequence_parallel", "measurements")
    if form not in FORMS:
        raise ValueError(f"{SECTION}.sequence_parallel: {form!r} came, one of {', '.join(FORMS)} is accepted")
    scale = chosen.get("threshold_lr_scale", 1.0)
    if isinstance(scale, bool) or not isinstance(scale, (int, float)) or not scale > 0:
        raise ValueError(f"{SECTION}.threshold_lr_scale: {scale!r} came, a positive number is accepted")


_CONVERTERS: dict[type[nn.Module], Converter] = {}
_PROJECTIONS = ("q_proj", "k_proj", "v_proj", "out_proj")


def _converter(module: nn.Module) -> Converter | None:
    for kind in type(module).__mro__:
        if kind in _CONVERTERS:
            return _CONVERTERS[kind]
    if isinstance(module, CSATAttention) or not hasattr(module, "num_heads"):
        return None
    # The same four projections are not enough: the replacement is called as the module was.
    called = inspect.signature(type(module).forward).parameters
    named = all(isinstance(getattr(module, name, None), nn.Linear) for name in _PROJECTIONS)
    return _from_projections if named and "context" in called else None


def _from_projections(module: Any, config: CSATConfig) -> nn.Module:
    """Any attention made of q_proj, k_proj, v_proj, out_proj (torch.nn.Linear) and num_heads, called like ours."""
    embed_dim, kv_dim = module.q_proj.in_features, module.k_proj.in_features
    expected = dict(zip(_PROJECTIONS, (embed_dim, kv_dim, kv_dim, embed_dim), strict=True))
    for name, width in expected.items():
        linear = getattr(module, name)
        if (linear.in_features, linear.out_features) != (width, embed_dim):
            raise ValueError(
                f"{SECTION}.layers: {type(module).__name__}.{name} maps {linear.in_features} features to "
                f"{linear.out_features}; accepted: {width} to {embed_dim} (grouped keys need a converter of their own)"
            )
    new = CSATAttention(embed_dim, module.num_heads, config, kv_dim=kv_dim)
    new.to(device=module.q_proj.weight.device)
    for name in _PROJECTIONS:  # the Linear itself: its Parameter objects keep their ZeRO-3 bookkeeping
        setattr(new, name, getattr(module, name))
    return new


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
