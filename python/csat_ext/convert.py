"""Conversion of one attention module of another framework: which are recognised, and what each becomes.

A replacement keeps the projections of the module it replaces, under their names and as the same Parameter objects: the
optimizer, ZeRO-3's partitioning and the keys of old checkpoints go on to hold, and fused projections (``qkv``,
``in_proj_weight``) stay fused. Between them stands a `CSATCore`. Recognition is by class name and by structure, so that
neither timm nor transformers is imported here.

Masks are translated to one key mask per batch element, (B, N) bool; whatever cannot be (a causal mask, a bias per pair
of tokens) is refused by name, for a measurement mixes tokens along the sequence. Dropout behind the output projection
is carried over. Dropout of attention probabilities has no counterpart: `csat_ext.deepspeed.apply` refuses it unless the
section says ``"attention_dropout": "omit"``.
"""

from __future__ import annotations

import inspect
import math
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from csat_ext.config import CSATConfig
from csat_ext.module import CSATAttention, CSATCore
from csat_ext.reference.attention import has_values

Converter = Callable[[nn.Module, CSATConfig], nn.Module]


@dataclass(frozen=True)
class Family:
    """Attention modules of one form.

    Attributes:
        name: what users call it.
        recognises: whether a module is of this form.
        convert: the replacement; raises ValueError naming what it cannot take over.
        dropout: dropout rate of the attention probabilities of a module.
    """

    name: str
    recognises: Callable[[nn.Module], bool]
    convert: Converter
    dropout: Callable[[Any], float]


def family(module: nn.Module) -> Family | None:
    """The form of an attention module, a registered one first; None where nothing can convert it."""
    if isinstance(module, CSATCore):
        return None
    for kind in type(module).__mro__:
        if kind in _REGISTERED:
            return _REGISTERED[kind]
    return next((known for known in FAMILIES if known.recognises(module)), None)


def register_converter(kind: type[nn.Module], converter: Converter) -> None:
    """Teaches conversion another attention class: `converter(module, config)` returns the replacement, which is called
    as the module was. What the class does beyond attention (masks, dropout) is the converter's to keep or to refuse."""
    _REGISTERED[kind] = Family(kind.__name__, lambda module: isinstance(module, kind), converter, lambda module: 0.0)


def is_causal(module: Any, *owners: nn.Module) -> bool:
    """Whether a module, or what is known of its `owners`, says that position i sees positions <= i only.

    Args:
        module: an attention module.
        owners: the modules that hold it, from the inside out, as far as they are known.
    """
    config_of = type(getattr(module, "config", None)).__name__
    said = getattr(module, "causal", False) or getattr(module, "is_causal", False) or config_of in _CAUSAL_CONFIGS
    return bool(said) or _in_causal_decoder(module, owners)


def _in_causal_decoder(module: nn.Module, owners: tuple[nn.Module, ...]) -> bool:
    """Whether it is the self-attention of BLIP's text decoder. Its class, its config and `is_decoder` in that config
    are those of BLIP's text encoders too, which look both ways: the model around it alone tells."""
    if type(module).__name__ != "BlipTextSelfAttention":
        return False
    decodes = any(type(owner).__name__ == "BlipTextLMHeadModel" for owner in owners)
    return decodes and not any(getattr(owner, "crossattention", None) in owners for owner in owners)


# ---- masks -----------------------------------------------------------------------------------------------------------


def key_mask(name: str, mask: Tensor, batch: int, tokens: int, *, true_keeps: bool = True) -> Tensor:
    """One key mask for each batch element, from a mask that is the same for every head and query.

    Args:
        name: the argument that errors name.
        mask: broadcastable to (B, H, Nq, N): bool, or added to the scores (0 keeps, at most -1e4 masks).
        batch: B.
        tokens: N.
        true_keeps: what True of a bool mask means.

    Returns:
        (B, N) bool, True = keep.

    Raises:
        ValueError: the shape, a mask that differs between queries or heads (a causal one does), or other values.
        RuntimeError: the same values while a compiler traces, when the graph runs.
    """
    mask = mask.reshape((1,) * (4 - mask.dim()) + mask.shape)
    if mask.dim() != 4 or mask.shape[0] not in (1, batch) or mask.shape[-1] != tokens:
        raise ValueError(
            f"{name} has shape {tuple(mask.shape)}; accepted: broadcastable to (batch, heads, queries, tokens) with "
            f"batch = {batch}, tokens = {tokens}"
        )
    for axis in (1, 2):
        first = mask.narrow(axis, 0, 1)
        if mask.shape[axis] > 1 and mask.stride(axis) != 0:
            _demand(
                (mask == first).all(),
                f"{name} differs between {'heads' if axis == 1 else 'queries'}, as a causal mask does; accepted: one "
                "mask for all of them (measurements mix tokens along the sequence)",
            )
        mask = first
    mask = mask[:, 0, 0]
    if mask.dtype == torch.bool:
        keep = mask if true_keeps else ~mask
    else:
        keep = mask == 0
        _demand(
            (keep | (mask <= -1e4)).all(),
            f"{name} holds scores to be added; accepted: 0 for a token to keep and -1e4 or less for one to mask",
        )
    return keep.expand(batch, tokens)


def _demand(condition: Tensor, message: str) -> None:
    if not has_values(condition):
        torch._assert_async(condition, message)
    elif not bool(condition):
        raise ValueError(message)


# ---- replacements ----------------------------------------------------------------------------------------------------


class ConvertedAttention(CSATCore):
    """The children and parameters of an attention module, under their own names, around a `CSATCore`.

    Args:
        module: the module to replace.
        config: what is computed.
        num_heads, head_dim: of queries, keys and values alike.
        scale: factor of the module's scores; only 1 / sqrt(head_dim) is accepted.
    """

    def __init__(
        self,
        module: nn.Module,
        config: CSATConfig,
        num_heads: int,
        head_dim: int,
        scale: float | None = None,
    ) -> None:
        if config.causal is not None:
            raise ValueError(f"causal = {config.causal!r} came, None is accepted: converted attention looks both ways")
        super().__init__(num_heads, head_dim, config)
        _refuse_scale(scale, head_dim)
        like = next(module.parameters())
        self.to(device=like.device, dtype=like.dtype)
        for name, child in module.named_children():
            if name not in _ATTENTION_DROPOUT:
                self.add_module(name, child)
        for name, parameter in module.named_parameters(recurse=False):
            self.register_parameter(name, parameter)

    def _heads(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (-1, self.head_dim)).transpose(1, 2)

    def _split_fused(self, qkv: Tensor) -> tuple[Tensor, ...]:
        """(B, N, 3 H D) -> three views (B, H, N, D)."""
        return qkv.unflatten(-1, (3, self.num_heads, self.head_dim)).permute(2, 0, 3, 1, 4).unbind(0)


class ConvertedTorchAttention(ConvertedAttention):
    """In the place of `torch.nn.MultiheadAttention`. Attention weights are not returned: there are none over tokens."""

    # Sends torch.nn's transformer layers past their fused inference path, which would attend densely with
    # in_proj_weight behind this module's back.
    _qkv_same_embed_dim = False
    in_proj_weight: Tensor
    in_proj_bias: Tensor | None
    out_proj: nn.Linear

    def __init__(self, module: nn.MultiheadAttention, config: CSATConfig) -> None:
        for name in ("bias_k", "bias_v"):
            if getattr(module, name) is not None:
                raise ValueError(f"{name} is set; accepted: add_bias_kv=False")
        if module.add_zero_attn:
            raise ValueError("add_zero_attn is True; accepted: False")
        super().__init__(module, config, module.num_heads, module.head_dim)
        self.batch_first, self.embed_dim = module.batch_first, module.embed_dim
        self._fused = module.in_proj_weight is not None
        if module.in_proj_bias is None:
            self.register_parameter("in_proj_bias", None)

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, None]:
        """As `torch.nn.MultiheadAttention.forward`; the weights of the returned pair are None, and `need_weights` is
        answered by a warning.

        Raises:
            ValueError: is_causal, or a mask that differs between queries or heads.
        """
        if is_causal:
            raise ValueError("is_causal=True came, False is accepted: a measurement would mix the future into the past")
        if need_weights:
            warnings.warn("need_weights=True: compressed attention returns None for them", stacklevel=2)
        q, k, v = (self._heads(self._batch_first(t)) for t in self._project(query, key, value))
        out = self.out_proj(self.attend(q, k, v, self._keep(key_padding_mask, attn_mask, k.shape[0], k.shape[2])))
        if query.dim() == 2:
            return out.squeeze(0), None
        return (out if self.batch_first else out.transpose(0, 1)), None

    def _batch_first(self, x: Tensor) -> Tensor:
        return x.unsqueeze(0) if x.dim() == 2 else x if self.batch_first else x.transpose(0, 1)

    def _project(self, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, ...]:
        if not self._fused:
            weights: tuple[Any, ...] = (self.q_proj_weight, self.k_proj_weight, self.v_proj_weight)
        elif query is key and key is value:
            return F.linear(query, self.in_proj_weight, self.in_proj_bias).chunk(3, dim=-1)
        else:
            weights = self.in_proj_weight.chunk(3)
        biases = (None,) * 3 if self.in_proj_bias is None else self.in_proj_bias.chunk(3)
        return tuple(F.linear(*args) for args in zip((query, key, value), weights, biases, strict=True))

    def _keep(self, padding: Tensor | None, attn_mask: Tensor | None, batch: int, tokens: int) -> Tensor | None:
        keep = None
        if padding is not None:  # (B, N), or (N) for an input without a batch
            wide = padding.reshape(-1, 1, 1, padding.shape[-1])
            keep = key_mask("key_padding_mask", wide, batch, tokens, true_keeps=False)
        if attn_mask is not None:  # (Nq, N) or (B H, Nq, N)
            wide = attn_mask.unflatten(0, (batch, self.num_heads)) if attn_mask.dim() == 3 else attn_mask
            shown = key_mask("attn_mask", wide, batch, tokens, true_keeps=False)
            keep = shown if keep is None else keep & shown
        return keep


class ConvertedTimmAttention(ConvertedAttention):
    """In the place of `timm.layers.Attention`: fused qkv, optional norms of queries, keys and output, optional gate."""

    qkv: nn.Linear
    gate: nn.Linear | None
    proj: nn.Linear
    proj_drop: nn.Dropout

    def __init__(self, module: Any, config: CSATConfig) -> None:
        super().__init__(module, config, module.num_heads, module.head_dim, scale=module.scale)
        for name in ("q_norm", "k_norm", "norm", "gate"):  # older releases of timm lack some
            if name not in self._modules:
                setattr(self, name, None)

    def forward(self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False) -> Tensor:
        """As `timm.layers.Attention.forward`: (B, N, C) -> (B, N, C). Raises ValueError for what is not a key mask."""
        if is_causal:
            raise ValueError("is_causal=True came, False is accepted: a measurement would mix the future into the past")
        keep = None if attn_mask is None else key_mask("attn_mask", attn_mask, x.shape[0], x.shape[1])
        q, k, v = self._split_fused(self.qkv(x))
        q, k = _optional(self.q_norm, q), _optional(self.k_norm, k)
        out = _optional(self.norm, self.attend(q, k, v, keep))
        if self.gate is not None:
            out = out * self.gate(x).sigmoid()
        return self.proj_drop(self.proj(out))


class ConvertedHuggingFaceAttention(ConvertedAttention):
    """In the place of the attention of a transformers encoder: ViT, CLIP, BERT, BLIP and those that share their form.

    Returns the pair (output, None): like transformers' own SDPA attention it has no weights to return.
    """

    def __init__(self, module: Any, config: CSATConfig) -> None:
        heads, head_dim = _first(module, "num_heads", "num_attention_heads"), _first(module, *_HEAD_WIDTHS)
        scale = next((getattr(module, name) for name in _SCALES if hasattr(module, name)), None)
        names = _projection_names(module)
        assert names is not None
        super().__init__(module, config, heads, head_dim, scale=scale)
        self._names = names

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        encoder_hidden_states: Tensor | None = None,
        encoder_attention_mask: Tensor | None = None,
        cache: Any = None,
        **kwargs: Any,
    ) -> tuple[Tensor, None]:
        """hidden_states (B, Nq, C) attends to encoder_hidden_states (B, N, C') or to itself.

        Masks are (B, N), or broadcastable to (B, H, Nq, N) and the same for every head and query; bool with True =
        keep, or added to the scores. A cache of cross-attention is not used: its keys are measured anew.

        Raises:
            ValueError: a causal mask, a cache of self-attention, or a keyword that changes what attention means.
        """
        context = hidden_states if encoder_hidden_states is None else encoder_hidden_states
        if encoder_hidden_states is None and cache is not None:
            raise ValueError("cache came, None is accepted: measurements of keys that grow are not kept")
        _refuse_keywords(kwargs)
        mask = encoder_attention_mask if encoder_attention_mask is not None else attention_mask
        keep = None
        if mask is not None:
            wide = mask[:, None, None] if mask.dim() == 2 else mask
            keep = key_mask("attention_mask", wide, context.shape[0], context.shape[1])
        q, k, v = self._project(hidden_states, context)
        rows = self.attend(q, k, v, keep)
        return (rows if self._names.out is None else self.get_submodule(self._names.out)(rows)), None

    def _project(self, x: Tensor, context: Tensor) -> tuple[Tensor, ...]:
        projections = [self.get_submodule(name) for name in self._names.qkv]
        if len(projections) == 1:
            return self._split_fused(projections[0](x))
        return tuple(self._heads(p(t)) for p, t in zip(projections, (x, context, context), strict=True))


def _refuse_scale(scale: Any, head_dim: int) -> None:
    """Raises ValueError for a factor of the scores other than 1 / sqrt(head_dim); None is that factor."""
    try:
        value = head_dim**-0.5 if scale is None else float(scale)
    except (TypeError, ValueError):
        value = math.nan
    if not abs(value - head_dim**-0.5) <= 1e-6 * head_dim**-0.5:
        raise ValueError(f"the scale of its scores is {scale}; accepted: 1 / sqrt({head_dim})")


def _optional(module: Any, x: Tensor) -> Tensor:
    return x if module is None else module(x)


def _refuse_keywords(kwargs: dict[str, Any]) -> None:
    for name, value in kwargs.items():
        if value is not None and value is not False and name not in _BOOKKEEPING:
            raise ValueError(
                f"{name} came ({type(value).__name__}); compressed attention cannot honour it: None is accepted"
            )


# ---- recognition -----------------------------------------------------------------------------------------------------

_PROJECTIONS = ("q_proj", "k_proj", "v_proj", "out_proj")
_HEAD_WIDTHS = ("head_dim", "attention_head_size")
_ATTENTION_DROPOUT = ("attn_drop", "attention_dropout", "dropout")
_SCALES = ("scaling", "scale")
_CAUSAL_CONFIGS = ("CLIPTextConfig",)
_BOOKKEEPING = (
    "use_cache",
    "return_dict",
    "output_hidden_states",
    "num_items_in_batch",
)  # of a model, not of attention
_HUGGING_FACE = (
    ("ViT", "DeiT", "ViTMAE", "ViTMSN", "IJepa", "Dinov2", "Dinov2WithRegisters", "CLIP", "Siglip", "Blip", "Blip2"),
    ("Bert", "Roberta", "XLMRoberta", "Electra", "Camembert", "BlipText"),
)
_HUGGING_FACE_NAMES = frozenset(
    [f"{name}Attention" for name in _HUGGING_FACE[0]]
    + [f"{name}{kind}Attention" for name in _HUGGING_FACE[1] for kind in ("Self", "Cross")]
)


@dataclass(frozen=True)
class _Names:
    """Names of the projections of a transformers attention: three, or one fused; None: no output projection."""

    qkv: tuple[str, ...]
    out: str | None


def _projection_names(module: nn.Module) -> _Names | None:
    """The projections of a module whose other children, if any, are dropout alone."""
    children = dict(module.named_children())
    for qkv in (_PROJECTIONS[:3], ("query", "key", "value"), ("qkv",)):
        out = next((name for name in ("o_proj", "out_proj", "projection") if name in children), None)
        known = [*qkv, *([] if out is None else [out])]
        rest = [child for name, child in children.items() if name not in known]
        if all(isinstance(children.get(name), nn.Linear) for name in known):
            return _Names(qkv, out) if all(isinstance(child, nn.Dropout) for child in rest) else None
    return None


def _is_ours(module: nn.Module) -> bool:
    # The same four projections are not enough: the replacement is called as the module was.
    named = hasattr(module, "num_heads") and all(
        isinstance(getattr(module, name, None), nn.Linear) for name in _PROJECTIONS
    )
    return named and "context" in inspect.signature(type(module).forward).parameters


def _from_projections(module: Any, config: CSATConfig) -> nn.Module:
    _refuse_extras(module)
    projections = (getattr(module, name) for name in _PROJECTIONS)
    new = CSATAttention.from_projections(*projections, num_heads=module.num_heads, config=config)
    for name in _SCALES:
        _refuse_scale(getattr(module, name, None), new.head_dim)
    return new


def _refuse_extras(module: nn.Module) -> None:
    """Raises ValueError for what the replacement would lack: a module is taken for ours by the four projections that
    it has, and may compute more than they do (norms of queries, dropout of the output, a learned temperature)."""
    beside = {name: child for name, child in module.named_children() if name not in _PROJECTIONS}
    extras = [f"{name} ({type(child).__name__})" for name, child in beside.items() if not _is_idle(name, child)]
    extras += [f"{name} (parameter)" for name, _ in module.named_parameters(recurse=False)]
    extras += [f"{name} (buffer)" for name, _ in module.named_buffers(recurse=False)]
    if extras:
        raise ValueError(
            f"it holds {', '.join(extras)} beside its projections, which the replacement would lack; accepted: "
            f"{', '.join(_PROJECTIONS)} and dropout of attention probabilities ({', '.join(_ATTENTION_DROPOUT)}) "
            "alone; csat_ext.deepspeed.register_converter takes a conversion of your own"
        )


def _is_idle(name: str, child: nn.Module) -> bool:
    """Whether a child does nothing, or is the dropout that the section decides about (`_dropout`)."""
    if isinstance(child, nn.Dropout):
        return child.p == 0 or name in _ATTENTION_DROPOUT
    return type(child) is nn.Identity


def _is_timm(module: nn.Module) -> bool:
    children = dict(module.named_children())
    required = {"qkv": nn.Linear, "proj": nn.Linear, "proj_drop": nn.Dropout}
    known = {*required, "q_norm", "k_norm", "norm", "gate", "attn_drop"}
    return (
        type(module).__name__ == "Attention"
        and type(module).__module__.startswith("timm.")
        and all(isinstance(children.get(name), kind) for name, kind in required.items())
        and known.issuperset(children)
        and hasattr(module, "head_dim")
    )


def _is_hugging_face(module: nn.Module) -> bool:
    """By the name of the very class: a subclass may compute something else."""
    kind = type(module)
    named = kind.__module__.startswith("transformers.") and kind.__name__ in _HUGGING_FACE_NAMES
    return named and _projection_names(module) is not None and next(module.parameters(recurse=False), None) is None


def _dropout(module: nn.Module) -> float:
    """Dropout rate of the attention probabilities: a number or a module, by the names that the frameworks use."""
    rates = [getattr(module, name) for name in _ATTENTION_DROPOUT if hasattr(module, name)]
    rates = [rate.p if isinstance(rate, nn.Dropout) else rate for rate in rates]
    return max((float(rate) for rate in rates if not isinstance(rate, nn.Module)), default=0.0)


def _first(module: Any, *names: str) -> int:
    return int(next(getattr(module, name) for name in names if hasattr(module, name)))


def _is_torch(module: nn.Module) -> bool:
    return type(module) is nn.MultiheadAttention


FAMILIES = (
    Family("csat_ext", _is_ours, _from_projections, _dropout),
    Family("torch", _is_torch, ConvertedTorchAttention, _dropout),  # type: ignore[arg-type]
    Family("timm", _is_timm, ConvertedTimmAttention, _dropout),
    Family("transformers", _is_hugging_face, ConvertedHuggingFaceAttention, _dropout),
)
"""What is recognised without registration."""

_REGISTERED: dict[type[nn.Module], Family] = {}
