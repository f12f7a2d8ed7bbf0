"""Attention layers by name: every mechanism that the tables compare, between equal projections.

A layer maps x (B, N, width) and an optional key_mask (B, N) bool, True = keep, to (B, N, width): q, k, v and output
projections with biases, the mechanism between them; keys and values come from a `context` where one is given. The
baselines stand in `baselines/`, CSAT is `csat_ext`'s module.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import machine  # noqa: F401  (csat_ext of a checkout that was never installed)
import torch
from baselines import BASELINES, Budget
from baselines.composed import ComposedStock
from baselines.longformer import SlidingWindow
from baselines.sdpa import FullAttention
from baselines.window import CausalWindow
from torch import Tensor, nn
from torch.nn.functional import gelu

from csat_ext import CSATAttention, CSATConfig

CSAT: dict[str, dict[str, Any]] = {
    "csat": {"decoder": "none"},
    "csat + linear": {"decoder": "linear"},
    "csat + LISTA": {"decoder": "lista"},
}
"""The forms of CSAT by what differs from `csat_config`; the linear decoder is the control of every quality table."""


@dataclass(frozen=True)
class LayerShape:
    """Attributes:
    width, heads: of the layer; a head has width // heads features.
    tokens: N, the length that mechanisms with parameters or tables for each position are made for.
    m: what each mechanism compresses to (`baselines.Budget`).
    seed, layer: of what a mechanism draws; layers draw different numbers from one seed.
    """

    width: int
    heads: int
    tokens: int
    m: int
    seed: int = 0
    layer: int = 0

    def budget(self) -> Budget:
        return Budget(self.tokens, self.heads, self.width // self.heads, self.m, self.seed + 1000 * self.layer)


class Projected(nn.Module):
    """A baseline between the projections that `CSATAttention` has."""

    def __init__(self, mechanism: nn.Module, width: int, heads: int) -> None:
        super().__init__()
        self.heads, self.mechanism = heads, mechanism
        self.q_proj, self.k_proj, self.v_proj, self.out_proj = (nn.Linear(width, width) for _ in range(4))

    def forward(self, x: Tensor, context: Tensor | None = None, *, key_mask: Tensor | None = None) -> Tensor:
        context = x if context is None else context
        pairs = ((self.q_proj, x), (self.k_proj, context), (self.v_proj, context))
        q, k, v = (proj(source).unflatten(-1, (self.heads, -1)).transpose(1, 2) for proj, source in pairs)
        return self.out_proj(self.mechanism(q, k, v, key_mask).transpose(1, 2).flatten(2))


class NoAttention(nn.Module):
    """Adds nothing: with it a block is its MLP, and what a model still learns it learns without attention."""

    def forward(self, x: Tensor, context: Tensor | None = None, *, key_mask: Tensor | None = None) -> Tensor:
        return torch.zeros_like(x)


class Block(nn.Module):
    """x + attention(norm(x)), then x + mlp(norm(x)) with a GELU between where `hidden` is not 0.

    x (B, N, width) to the same shape; key_mask (B, N) goes to the attention.
    """

    def __init__(self, attention: nn.Module, width: int, hidden: int) -> None:
        super().__init__()
        self.norm, self.attention, self.hidden = nn.LayerNorm(width), attention, hidden
        if hidden:
            self.mlp_norm = nn.LayerNorm(width)
            self.inner, self.outer = nn.Linear(width, hidden), nn.Linear(hidden, width)

    def forward(self, x: Tensor, key_mask: Tensor | None = None) -> Tensor:
        x = x + self.attention(self.norm(x), key_mask=key_mask)
        return x + self.outer(gelu(self.inner(self.mlp_norm(x)))) if self.hidden else x


def csat_config(shape: LayerShape, **changes: Any) -> CSATConfig:
    """The pool of `ComposedStock`: m segments shifted per head with log-mass, no anchors; LISTA with T = 3."""
    common: dict[str, Any] = {"measurements": shape.m, "anchors": (), "seed": shape.seed, "layer": shape.layer}
    return CSATConfig(**(common | changes))


def csat_layer(shape: LayerShape, **changes: Any) -> CSATAttention:
    return CSATAttention(shape.width, shape.heads, csat_config(shape, **changes))


def _composed(layers: int, compiled: bool) -> Callable[[Budget], nn.Module]:
    return lambda budget: ComposedStock(budget, layers=layers, compiled=compiled)


MECHANISMS: dict[str, Callable[[Budget], nn.Module]] = {
    "full": BASELINES["sdpa"],
    "full, scores kept": BASELINES["sdpa math"],
    "linformer": BASELINES["linformer"],
    "performer": BASELINES["performer"],
    "longformer": BASELINES["longformer"],
    "longformer, banded": lambda budget: SlidingWindow(budget, "banded"),
    "nystromformer": BASELINES["nystromformer"],
    "stock": _composed(0, False),
    "stock + LISTA": _composed(3, False),
    "stock + LISTA, compiled": _composed(3, True),
}
"""The baselines by the names of the tables; "full, scores kept" has all n^2 of them in memory, "stock" is SDPA on K and
V projected by CSAT's own measurements, "longformer, banded" does without a compiler on CUDA too."""

NAMES = (*MECHANISMS, *CSAT)
NONE = "no attention"
"""The floor of a quality table: a form that is in no table of costs."""


def attention_layer(name: str, shape: LayerShape) -> nn.Module:
    """The layer of one of `NAMES`, or of `NONE`.

    Raises:
        ValueError: an unknown name.
    """
    if name == NONE:
        return NoAttention()
    if name in CSAT:
        return csat_layer(shape, **CSAT[name])
    if name not in MECHANISMS:
        raise ValueError(f"mechanism: {name!r} came; accepted: {', '.join((*NAMES, NONE))}")
    return Projected(MECHANISMS[name](shape.budget()), shape.width, shape.heads)


# ---- causal layers ---------------------------------------------------------------------------------------------------

BLOCKS, WINDOW_BLOCKS = 8, 1
"""The block form here: an eighth of the length a block, one whole block seen exactly before the query's own."""


def _block_form(shape: LayerShape, decoder: str) -> nn.Module:
    """m measurements of the whole length, m / `BLOCKS` of each block."""
    size = shape.tokens // BLOCKS
    form = {"causal": "block", "block_size": size, "window_blocks": WINDOW_BLOCKS, "measurements": shape.m // BLOCKS}
    return csat_layer(shape, decoder=decoder, **form)


CAUSAL: dict[str, Callable[[LayerShape], nn.Module]] = {
    "full": lambda shape: Projected(FullAttention(causal=True), shape.width, shape.heads),
    "window": lambda shape: Projected(CausalWindow(shape.tokens // BLOCKS, WINDOW_BLOCKS), shape.width, shape.heads),
    "csat, block": lambda shape: _block_form(shape, "none"),
    "csat, block + linear": lambda shape: _block_form(shape, "linear"),
    "csat, block + LISTA": lambda shape: _block_form(shape, "lista"),
    "csat, prefix": lambda shape: csat_layer(shape, decoder="none", causal="prefix"),
}
"""Position t sees positions up to t. "window" is what "csat, block" sees exactly, without its measurements: what the
block form is worth is what it has over this."""
