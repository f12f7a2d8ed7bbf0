"""The `csat_attention` section of a DeepSpeed JSON: its schema, its defaults, and what it does to a model."""

from __future__ import annotations

import dataclasses
import difflib
import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from torch import nn

from csat_ext import convert
from csat_ext.config import CSATConfig, refuse_unknown
from csat_ext.module import CSATCore
from csat_ext.parallel import FORMS

SECTION = "csat_attention"

AUTO = ("measurements", "anchors", "grid")
"""Keys of the attention that may be "auto": filled from the image and patch size that the model states."""

AUTO_CELL = 2
"""With "auto", a measurement covers 2 x 2 patches, and the extra tokens are exact, as in the job of `examples/`."""


@dataclass(frozen=True)
class CSATSection:
    """The `csat_attention` section; every other key of it is a field of `CSATConfig`.

    Attributes:
        enabled: False leaves the model as it is. A section without the key is enabled.
        layers: shell patterns of module names, alternatives joined by `|`; each of them must match something.
            ``"auto"``: every attention that can be converted, causal ones left out.
        types: class names, such as ``["CLIPAttention"]``, or families (``"torch"``, ``"timm"``, ``"transformers"``);
            absent: any.
        indices: which of the modules that `layers` and `types` leave, in the model's order: a list of positions
            (negative from the end) or a slice such as ``"1:-1"`` or ``"::2"``; absent: all.
        hybrid: sections of the same form within this one, for other settings (or, with ``"enabled": false``, full
            attention) in some of the chosen layers. The first that names a layer decides; keys it lacks are inherited.
        attention_dropout: ``"refuse"`` a layer that drops attention probabilities out, or ``"omit"`` that dropout.
        threshold_lr_scale: learning rate of the decoder's thresholds over that of the other parameters.
        sequence_parallel: how layers work together where ``mpu`` spreads the tokens over ranks: a name from
            `csat_ext.parallel.FORMS`.
        attention: what each chosen module becomes.
        auto: the fields of `attention` that the model fills (`AUTO`).
    """

    enabled: bool = False
    layers: str = "*"
    types: tuple[str, ...] = ()
    indices: tuple[int, ...] | str | None = None
    hybrid: tuple[CSATSection, ...] = ()
    attention_dropout: str = "refuse"
    threshold_lr_scale: float = 10.0
    sequence_parallel: str = "measurements"
    attention: CSATConfig = field(default_factory=CSATConfig)
    auto: tuple[str, ...] = ()

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
    return _parse(ds_config[SECTION], SECTION) if SECTION in ds_config else CSATSection()


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


def apply(model: nn.Module, section: CSATSection | str | Path | dict[str, Any]) -> list[str]:
    """Replaces, in place, the attention modules that the section chooses; their Parameter objects are reused.

    Runs before `deepspeed.initialize`, so that the optimizer sees the new parameters; before, inside or after
    `deepspeed.zero.Init`.

    Args:
        model: any module that holds attention modules of the families of `csat_ext.convert`.
        section: a section that was read, or a DeepSpeed config or its path (`read_section`).

    Returns:
        The names of the replaced modules, in the model's order: the first one where a module has several, as it is
        replaced under all of them.

    Raises:
        ValueError: what `choose` or a converter refuses; the model is then as it was.
        TypeError, FileNotFoundError: as `read_section`.
    """
    section = section if isinstance(section, CSATSection) else read_section(section)
    new = {name: _converted(model, name, config) for name, config in choose(model, section).items()}
    sites = _sites(model)
    for name, replacement in new.items():
        replacement.train(sites[name].module.training)
        for alias in sites[name].names:
            parent, _, child = alias.rpartition(".")
            setattr(model.get_submodule(parent), child, replacement)
    for encoder in model.modules():
        if isinstance(encoder, nn.TransformerEncoder) and any(isinstance(m, CSATCore) for m in encoder.modules()):
            encoder.use_nested_tensor = False  # of its inference path, which a measurement of padded keys does not take
    return list(new)


def _converted(model: nn.Module, name: str, config: CSATConfig) -> nn.Module:
    old = model.get_submodule(name)
    form = convert.family(old)
    assert form is not None
    try:
        return form.convert(old, config)
    except ValueError as error:
        raise ValueError(f"{SECTION}.layers: {name} ({type(old).__name__}): {error}") from error


# ---- choice ----------------------------------------------------------------------------------------------------------


def choose(model: nn.Module, section: CSATSection) -> dict[str, CSATConfig]:
    """What each chosen module of the model becomes, by name, in the model's order.

    The i-th gets `attention.layer + i`, so that random measurements differ between layers.

    Raises:
        ValueError: naming the key of the section: a pattern, type or index that chooses nothing, a causal module, a
            dropout of attention probabilities, an ``"auto"`` that the model does not answer.
    """
    if not section.enabled:
        return {}
    found, beside = _sites(model), _passed_over(model)
    chosen = _select(found, section, SECTION, beside)
    sections = dict.fromkeys(chosen, section)
    for position, entry in reversed(list(enumerate(section.hybrid))):
        where = f"{SECTION}.hybrid[{position}]"
        sections |= dict.fromkeys(_select({name: found[name] for name in chosen}, entry, where, beside), entry)
    converted = {name: entry for name, entry in sections.items() if entry.enabled}
    if not converted:
        raise ValueError(f"{SECTION}.hybrid: it leaves full attention in every chosen layer; set enabled to false")
    _refuse_causal(found, list(converted), section)
    _refuse_dropout(found, converted)
    return {
        name: _filled(model, name, entry).replace(layer=entry.attention.layer + index)
        for index, (name, entry) in enumerate(converted.items())
    }


@dataclass(frozen=True)
class _Site:
    """An attention module that can be converted.

    Attributes:
        module: the module.
        names: all its names: a module that the model holds at several places is one layer.
        causal: whether the module or what holds it says that it is causal.
    """

    module: nn.Module
    names: tuple[str, ...]
    causal: bool

    def matches(self, pattern: str) -> bool:
        return any(fnmatchcase(name, pattern) for name in self.names)


def _sites(model: nn.Module) -> dict[str, _Site]:
    """The attention modules of the model by their first names, in the model's order."""
    names: dict[nn.Module, list[str]] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        names.setdefault(module, []).append(name)
    return {
        own[0]: _Site(module, tuple(own), any(convert.is_causal(*_outwards(model, name)) for name in own))
        for module, own in names.items()
        if own[0] and convert.family(module) is not None
    }


def _outwards(model: nn.Module, name: str) -> list[nn.Module]:
    """The module of that name and those that hold it, from the inside out."""
    parts = name.split(".")
    return [model, *(model.get_submodule(".".join(parts[: i + 1])) for i in range(len(parts)))][::-1]


def _passed_over(model: nn.Module) -> str:
    """What errors add on attention that no pattern can choose: the model itself, and what was replaced before."""
    if convert.family(model) is not None:
        return f"; the model itself is an attention module ({type(model).__name__}): pass the module that holds it"
    done = [name or "the model itself" for name, module in model.named_modules() if isinstance(module, CSATCore)]
    return f"; already converted: {', '.join(done)}" if done else ""


def _select(found: dict[str, _Site], section: CSATSection, where: str, beside: str) -> list[str]:
    """Names that `layers`, then `types`, then `indices` leave; `beside` ends the error where there are none."""
    if section.layers == "auto":
        names = [name for name, site in found.items() if not site.causal]
    else:
        for pattern in section.patterns:
            if not any(site.matches(pattern) for site in found.values()):
                had = ", ".join(name for site in found.values() for name in site.names) or "none"
                raise ValueError(
                    f"{where}.layers: {pattern!r} matches no attention module; this model has: {had}{beside}"
                )
        names = [name for name, site in found.items() if any(site.matches(pattern) for pattern in section.patterns)]
    classes = {name: type(found[name].module) for name in names}
    kinds = {name: {k.__name__ for k in classes[name].__mro__} | {_family(found[name].module)} for name in names}
    for kind in section.types:
        if not any(kind in kinds[name] for name in names):
            had = ", ".join(sorted({classes[name].__name__ for name in names})) or "none"
            raise ValueError(f"{where}.types: no chosen attention module is a {kind!r}; there are: {had}")
    names = [name for name in names if not section.types or kinds[name] & set(section.types)]
    names = _take(names, section.indices, where)
    if not names:
        raise ValueError(
            f"{where}.layers: {section.layers!r} matches no attention module that can be converted{beside}"
        )
    return names


def _family(module: nn.Module) -> str:
    family = convert.family(module)
    assert family is not None
    return family.name


def _take(names: list[str], indices: tuple[int, ...] | str | None, where: str) -> list[str]:
    if indices is None:
        return names
    if isinstance(indices, str):
        taken = names[slice(*(int(part) if part else None for part in indices.split(":")))]
        if not taken:
            raise ValueError(f"{where}.indices: {indices!r} takes none of the {len(names)} modules")
        return taken
    for index in indices:
        if not -len(names) <= index < len(names):
            raise ValueError(f"{where}.indices: {index} came; there are {len(names)} modules: {', '.join(names)}")
    positions = {index % len(names) for index in indices}
    return [name for position, name in enumerate(names) if position in positions]


def _refuse_causal(found: dict[str, _Site], names: list[str], section: CSATSection) -> None:
    causal = [name for name in names if found[name].causal]
    if causal:
        raise ValueError(
            f"{SECTION}.layers: {section.layers!r} chooses the causal {', '.join(causal)}; measurements mix the future "
            'into the past, so name the other modules only, or write "auto"'
        )


def _refuse_dropout(found: dict[str, _Site], converted: dict[str, CSATSection]) -> None:
    for name, entry in converted.items():
        family = convert.family(found[name].module)
        assert family is not None
        rate = family.dropout(found[name].module)
        if rate > 0 and entry.attention_dropout != "omit":
            raise ValueError(
                f"{SECTION}.attention_dropout: {name} drops attention probabilities out at rate {rate}, which has no "
                'counterpart here; set that rate to 0, or write "attention_dropout": "omit" to train without it'
            )


# ---- "auto" ----------------------------------------------------------------------------------------------------------


def _filled(model: nn.Module, name: str, section: CSATSection) -> CSATConfig:
    """The layer's config with its "auto" fields filled."""
    if not section.auto:
        return section.attention
    layout = _image_layout(model, name)
    if layout is None:
        raise ValueError(
            f'{SECTION}.{section.auto[0]}: "auto" needs the image and patch size of {name}, which the model does not '
            "state; write a value"
        )
    grid, extra = layout
    anchors = tuple(range(extra)) if extra > 1 else ("first",) * extra
    cells = math.prod(-(-side // AUTO_CELL) for side in grid)
    values = {"grid": grid, "anchors": anchors, "measurements": cells + extra}
    return section.attention.replace(**{key: values[key] for key in section.auto})


def _image_layout(model: nn.Module, name: str) -> tuple[tuple[int, int], int] | None:
    """(rows, columns) of the patches that an attention module sees, and how many tokens stand before them.

    timm states them on the model (`patch_embed`, `num_prefix_tokens`), transformers in the module's config, with the
    extra tokens as parameters of the embeddings.
    """
    for owner in _outwards(model, name):
        grid = getattr(getattr(owner, "patch_embed", None), "grid_size", None)
        if grid is not None:
            return (int(grid[0]), int(grid[1])), int(getattr(owner, "num_prefix_tokens", 0))
        embeddings = getattr(owner, "embeddings", None)
        config: Any = getattr(owner, "config", None)
        image, patch = (getattr(config, key, None) for key in ("image_size", "patch_size"))
        if embeddings is not None and isinstance(image, int) and isinstance(patch, int):
            side = image // patch
            own = embeddings.named_parameters(recurse=False)
            return (side, side), sum(_tokens(p) for n, p in own if n.endswith(_PREFIX_TOKENS))
    return None


_PREFIX_TOKENS = ("cls_token", "class_embedding", "distillation_token", "register_tokens")


def _tokens(parameter: nn.Parameter) -> int:
    """How many tokens a parameter of the embeddings holds: (E,) is one, (1, R, E) are R."""
    shape = getattr(parameter, "ds_shape", parameter.shape)  # ZeRO-3 leaves an empty tensor on the rank
    return int(shape[-2]) if len(shape) > 1 else 1


# ---- schema ----------------------------------------------------------------------------------------------------------


def _parse(section: Any, where: str, inherited: Mapping[str, Any] | None = None) -> CSATSection:
    """A section, or an entry of `hybrid`, whose settings fall back to the `inherited` ones."""
    if not isinstance(section, dict):
        raise TypeError(f"{where}: {section!r} came, a mapping is accepted")
    selection = ("enabled", "layers", "types", "indices")
    own = selection if inherited is not None else (*selection, "hybrid", "threshold_lr_scale", "sequence_parallel")
    accepted = (*own, "attention_dropout", *(f.name for f in dataclasses.fields(CSATConfig)))
    refuse_unknown(section, accepted, where)
    chosen: dict[str, Any] = {key: tuple(v) if isinstance(v, list) else v for key, v in section.items() if key in own}
    settings = {**(inherited or {}), **{key: value for key, value in section.items() if key not in own}}
    _check_own(section, where)
    entries = chosen.pop("hybrid", ())
    attention = {key: value for key, value in settings.items() if key != "attention_dropout"}
    auto = tuple(key for key in AUTO if attention.get(key) == "auto")
    if attention.get("causal") is not None:
        raise ValueError(
            f"{where}.causal: {attention['causal']!r} came, null is accepted: causal attention is not converted"
        )
    return CSATSection(
        enabled=chosen.pop("enabled", True),
        **chosen,
        hybrid=tuple(_parse(entry, f"{where}.hybrid[{i}]", settings) for i, entry in enumerate(entries)),
        attention_dropout=settings.get("attention_dropout", "refuse"),
        attention=CSATConfig.from_dict({k: v for k, v in attention.items() if k not in auto}, where),
        auto=auto,
    )


def _is_list_of(kind: type, value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(type(item) is kind for item in value)


def _is_choice_of_indices(value: Any) -> bool:
    if isinstance(value, str):
        return re.fullmatch(r"-?\d*:-?\d*(:-?[1-9]\d*)?", value) is not None
    return _is_list_of(int, value)


_OWN = {
    "enabled": (lambda v: isinstance(v, bool), "true or false"),
    "layers": (lambda v: isinstance(v, str), "a pattern such as 'vision.*|decoder.*.cross*', or 'auto'"),
    "types": (lambda v: _is_list_of(str, v), "a list of class names"),
    "indices": (_is_choice_of_indices, "a list of integers or a slice such as '1:-1'"),
    "hybrid": (lambda v: _is_list_of(dict, v), "a list of mappings"),
    "attention_dropout": (lambda v: v in ("refuse", "omit"), "'refuse' or 'omit'"),
    "sequence_parallel": (lambda v: v in tuple(FORMS), f"one of {', '.join(FORMS)}"),
}


def _check_own(chosen: dict[str, Any], where: str) -> None:
    for key, (accepts, words) in _OWN.items():
        if key in chosen and not accepts(chosen[key]):
            raise TypeError(f"{where}.{key}: {chosen[key]!r} came, {words} is accepted")
    if "layers" in chosen and not all(pattern.strip() for pattern in chosen["layers"].split("|")):
        raise ValueError(f"{where}.layers: {chosen['layers']!r} has an empty alternative")
    scale = chosen.get("threshold_lr_scale", 1.0)
    if isinstance(scale, bool) or not isinstance(scale, (int, float)) or not 0 < scale < math.inf:
        raise ValueError(f"{where}.threshold_lr_scale: {scale!r} came, a positive finite number is accepted")


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
