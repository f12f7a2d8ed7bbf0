"""`CSATConfig`: the one description of a CSAT layer, shared by the module, the DeepSpeed section and conversion."""

from __future__ import annotations

import dataclasses
import difflib
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from csat_ext.dictionaries import DICTIONARIES
from csat_ext.measurements import BY_POSITION, ENSEMBLES
from csat_ext.reference.causal import FORMS

DECODERS = ("none", "linear", "ista", "lista", "lista_untied", "alista")
"""Decoders that `CSATAttention` builds:

- ``none``: the output is Z.
- ``linear``: c = z W, the control every quality table carries.
- ``ista``: fixed weights S = I - A^T A / L, B = A^T / L, learned thresholds only.
- ``lista``: coupled and tied, S = I - W^T A, B = W^T with W, step and thresholds learned (the default).
- ``lista_untied``: free S_t, B_t, thresholds a layer (the paper's LISTA without weight tying).
- ``alista``: W fixed analytically, only step and thresholds learned.
"""

AnchorPosition = int | str


def refuse_unknown(keys: Mapping[str, Any], accepted: tuple[str, ...], where: str) -> None:
    """Raise `ValueError` for the first key that is not accepted, naming the nearest accepted one."""
    for key in keys:
        if key not in accepted:
            near = difflib.get_close_matches(str(key), accepted, n=1, cutoff=0.5)
            hint = f"; did you mean {near[0]!r}?" if near else "."
            raise ValueError(f"{where}: unknown key {key!r}{hint} Accepted: {', '.join(accepted)}")


@dataclass(frozen=True)
class CSATConfig:
    """Everything that defines a CSAT attention layer apart from its width.

    Attributes:
        measurements: m, the number of measurements in all, anchors included; of each block with ``causal="block"``.
        ensemble: a name from `csat_ext.measurements.ENSEMBLES`.
        anchors: token positions measured exactly, by their own one-hot row: ``"first"``, ``"last"`` or integers
            (negative from the end). Counted in ``measurements``; under a key mask they are the first and last *valid*
            token.
        grid: shape of the tokens after the anchors for pooling in 2-D (h, w) or 3-D (t, h, w); ``None`` pools in 1-D.
        head_shift: shift the pool's segments from head to head, so that heads see different borders.
        learned: Phi (and the score bias) are parameters that start at the ensemble; needs ``length``, the one
            sequence length of keys that the layer then takes.
        length: the key length of a learned Phi.
        seed: seed of the counter-based generator, below 2**63; with ``layer`` it determines every fixed Phi on every
            device.
        layer: index of the layer in its model, so that layers draw different columns from one seed.
        share_kv: K and V share Phi. When False, V has an independent one (paper: Phi_K and Phi_V); note that for signed
            ensembles the output then tends to 0 (see `csat_ext.measurements`).
        log_mass: add log(mass) of averaging rows to the scores, which makes constant segments exact.
        gain: a learned gain per head on the score scale, 1 at the start.
        decoder: one of `DECODERS`.
        iterations: T, the unrolled layers of the decoder.
        dictionary: a name from `csat_ext.dictionaries.DICTIONARIES` for Psi, or ``"learned"``.
        atoms: P, the number of dictionary atoms; ``None`` takes the head width.
        threshold: initial soft threshold; 0 starts the decoder as the identity.
        feature_rank: R, rows of the feature sensing F (R, Dv); ``None`` is F = I.
        exact_when_short: keys no longer than ``measurements`` are attended exactly (Phi = I). When False such a call
            is an error.
        causal: ``"block"`` or ``"prefix"``: causal self-attention in that form (`csat_ext.csat_attention`); ``None``:
            every query sees every token. What is said of a sequence above holds for each block of the block form:
            ensemble, anchors, a learned Phi with ``length = block_size``. The prefix form has no anchors.
        block_size: Bk, tokens of a block of the block form.
        window_blocks: w, whole blocks seen exactly before the query's own one.
        content: for the prefix form: what token s adds to the measurements is phi_s = softmax(W k_s) with W learned;
            when False it is column s of the ensemble, one of `csat_ext.measurements.BY_POSITION`.
    """

    measurements: int = 64
    ensemble: str = "pool"
    anchors: tuple[AnchorPosition, ...] = ("first", "last")
    grid: tuple[int, ...] | None = None
    head_shift: bool = True
    learned: bool = False
    length: int | None = None
    seed: int = 0
    layer: int = 0
    share_kv: bool = True
    log_mass: bool = True
    gain: bool = True
    decoder: str = "lista"
    iterations: int = 3
    dictionary: str = "identity"
    atoms: int | None = None
    threshold: float = 0.0
    feature_rank: int | None = None
    exact_when_short: bool = True
    causal: str | None = None
    block_size: int | None = None
    window_blocks: int = 0
    content: bool = True

    def __post_init__(self) -> None:
        _check_types(self)
        _check_choice("ensemble", self.ensemble, tuple(ENSEMBLES))
        _check_choice("decoder", self.decoder, DECODERS)
        _check_choice("dictionary", self.dictionary, tuple(DICTIONARIES))
        for name in ("measurements", "iterations", "length", "atoms", "feature_rank", "block_size"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        for name, bits in (("seed", 63), ("layer", 32)):  # an int64 of the state dict; a word of the counter
            if not 0 <= getattr(self, name) < 2**bits:
                raise ValueError(f"{name} must be in [0, 2**{bits}), got {getattr(self, name)}")
        if not (math.isfinite(self.threshold) and self.threshold >= 0):
            raise ValueError(f"threshold must be finite and at least 0, got {self.threshold}")
        if self.learned and self.length is None:
            raise ValueError("learned=True needs length, the one sequence length of keys that a learned Phi takes")
        if self.length is not None and not self.learned:
            raise ValueError(f"length = {self.length} belongs to learned=True: a fixed Phi takes any length")
        if self.ensemble == "learned" and not self.learned:
            raise ValueError("ensemble='learned' starts a learned Phi: it needs learned=True and length")
        if self.feature_rank is not None and self.decoder == "none":
            raise ValueError("feature_rank needs a decoder that leads back to the features: decoder='none' is none")
        if self.learned and not self.share_kv:
            raise ValueError("learned=True shares one Phi between K and V: share_kv=False is not accepted with it")
        _check_positions(self)
        _check_causal(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any], where: str = "CSATConfig") -> CSATConfig:
        """Build a config from a mapping such as a JSON section; lists stand for tuples.

        Raises:
            ValueError: an unknown key (the nearest known one is named) or a value out of range.
            TypeError: a value of the wrong type, or no mapping. Both start with ``where``.
        """
        if not isinstance(values, Mapping):
            raise TypeError(f"{where}: {values!r} came, a mapping is accepted")
        refuse_unknown(values, tuple(field.name for field in dataclasses.fields(cls)), where)
        plain: dict[str, Any] = {key: tuple(v) if isinstance(v, list) else v for key, v in values.items()}
        try:
            return cls(**plain)
        except (TypeError, ValueError) as error:
            raise type(error)(f"{where}: {error}") from error

    def to_dict(self) -> dict[str, Any]:
        """The config as plain JSON values; `from_dict` restores it."""
        return {k: list(v) if isinstance(v, tuple) else v for k, v in dataclasses.asdict(self).items()}

    def replace(self, **changes: Any) -> CSATConfig:
        """A copy with some fields changed, checked anew."""
        return dataclasses.replace(self, **changes)


def _is_int(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


_Test = tuple[Callable[[Any], bool], str]
_TYPES: dict[str, _Test] = {
    **dict.fromkeys(("measurements", "seed", "layer", "iterations", "window_blocks"), (_is_int, "an int")),
    **dict.fromkeys(
        ("length", "atoms", "feature_rank", "block_size"), (lambda v: v is None or _is_int(v), "an int or None")
    ),
    **dict.fromkeys(("ensemble", "decoder", "dictionary"), (lambda v: isinstance(v, str), "a str")),
    **dict.fromkeys(
        ("head_shift", "learned", "share_kv", "log_mass", "gain", "exact_when_short", "content"),
        (lambda v: isinstance(v, bool), "a bool"),
    ),
    "threshold": (_is_number, "a float"),
    "causal": (lambda v: v is None or isinstance(v, str), "a str or None"),
    "anchors": (
        lambda v: isinstance(v, tuple) and all(_is_int(a) or isinstance(a, str) for a in v),
        "a tuple of 'first', 'last' or ints",
    ),
    "grid": (lambda v: v is None or (isinstance(v, tuple) and all(map(_is_int, v))), "a tuple of ints or None"),
}


def _check_types(config: CSATConfig) -> None:
    for name, (accepted, description) in _TYPES.items():
        value = getattr(config, name)
        if not accepted(value):
            raise TypeError(f"{name} must be {description}, got {value!r} ({type(value).__name__})")


def _check_choice(name: str, value: str, accepted: tuple[str, ...]) -> None:
    if value not in accepted:
        near = difflib.get_close_matches(value, accepted, n=1, cutoff=0.5)
        hint = f"; did you mean {near[0]!r}?" if near else "."
        raise ValueError(f"{name}: unknown value {value!r}{hint} Accepted: {', '.join(accepted)}")


def _check_positions(config: CSATConfig) -> None:
    for anchor in config.anchors:
        if isinstance(anchor, str) and anchor not in ("first", "last"):
            raise ValueError(f"anchors: {anchor!r} is not a position. Accepted: 'first', 'last' or an int")
    if len(config.anchors) >= config.measurements:
        raise ValueError(
            f"anchors: {len(config.anchors)} exact tokens leave none of the {config.measurements} measurements "
            "to the ensemble"
        )
    if config.grid is not None:
        if len(config.grid) not in (1, 2, 3) or min(config.grid) < 1:
            raise ValueError(f"grid must have 1 to 3 positive sides, got {config.grid}")
        if "grid" not in ENSEMBLES[config.ensemble].options:
            takers = sorted(e.name for e in ENSEMBLES.values() if "grid" in e.options)
            raise ValueError(f"grid is an option of the ensembles {takers}, not of {config.ensemble!r}")


def _check_causal(config: CSATConfig) -> None:
    form = config.causal
    if form is not None:
        _check_choice("causal", form, FORMS)
    if config.window_blocks < 0:
        raise ValueError(f"window_blocks must be at least 0, got {config.window_blocks}")
    for name in ("block_size", "window_blocks"):
        if form != "block" and getattr(config, name):
            raise ValueError(f"{name} = {getattr(config, name)} belongs to causal='block', got causal = {form!r}")
    if not config.content and form != "prefix":
        raise ValueError(f"content=False belongs to causal='prefix', got causal = {form!r}")
    if form is not None and config.grid is not None:
        raise ValueError(
            f"grid = {config.grid} is the shape of a whole sequence; accepted with causal = {form!r}: None"
        )
    if form == "block":
        size = config.block_size
        if size is None or config.measurements > size or config.length not in (None, size):
            raise ValueError(
                f"causal='block' needs measurements <= block_size, and length = block_size for a learned Phi; got "
                f"measurements = {config.measurements}, block_size = {size}, length = {config.length}"
            )
    if form == "prefix":
        for name, accepted in (("learned", False), ("share_kv", True), ("log_mass", True)):
            if getattr(config, name) is not accepted:
                raise ValueError(f"{name} = {not accepted} came; accepted with causal='prefix': {accepted}")
        if not config.content and config.ensemble not in BY_POSITION:
            raise ValueError(
                f"ensemble: {config.ensemble!r} depends on the length of the sequence; accepted with causal='prefix' "
                f"and content=False: {', '.join(BY_POSITION)}"
            )
