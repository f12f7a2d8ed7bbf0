"""Measurements whose matrix is never in memory.

`ImplicitMeasurement` stands for the Phi that `csat_ext.measurement` makes of the same arguments, with the same draws
and borders, and goes where `csat_attention` takes a Phi. What it needs in memory is tokens and measurements.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from csat_ext import ops as _ops  # noqa: F401  (registers fakes, autograd and autocast of torch.ops.csat)
from csat_ext.measurements import (
    Anchor,
    Measurement,
    check_draw,
    check_options,
    lookup,
    measurement,
    one_hot_rows,
    resolve_device,
    segment_edges,
    valid_tokens,
)

IMPLICIT = ("rademacher", "srht", "pool")
"""The ensembles with such a form. Pools on a grid keep their matrix: a cell is no contiguous run of tokens."""


@dataclass(frozen=True, eq=False)
class ImplicitMeasurement:
    """A Phi (B or 1, heads, m, n) that is not in memory, made by `implicit_measurement` from the first ten fields.

    heads: of Phi, 1 where all heads share one. anchors: as ints.
    counts: (B or 1, n + 1) int32, how many tokens before s the rows after the anchors measure; None: all of them.
    anchor_tokens: (B or 1, A) int32, the tokens of the first A rows, -1 for an empty row; None: no anchors.
    score_bias: as in `Measurement`, float32.
    """

    ensemble: str
    m: int
    n: int
    seed: int
    layer: int
    heads: int
    anchors: tuple[int, ...]
    head_shift: bool
    device: torch.device
    key_mask: Tensor | None
    counts: Tensor | None
    anchor_tokens: Tensor | None
    score_bias: Tensor | None

    def project(self, x: Tensor) -> Tensor:
        """Phi x: (B, Hx, n, D) to (B, max(Hx, heads), m, D), dtype of x; heads is 1 or a multiple of Hx. Tokens that
        the key mask leaves out are not read."""
        seed = self.seed - (self.seed >> 63 << 64)  # the op's int is signed
        rows = self.m - len(self.anchors)
        places = (self.counts, self.anchor_tokens)
        return torch.ops.csat.project_implicit(x, *places, self.ensemble, rows, self.heads, seed, self.layer)

    def masked(self, key_mask: Tensor) -> ImplicitMeasurement:
        """The measurement of the same name where other tokens are left out; key_mask (B, n) bool, True = keep."""
        return implicit_measurement(
            self.ensemble,
            self.m,
            self.n,
            seed=self.seed,
            layer=self.layer,
            heads=self.heads,
            anchors=self.anchors,
            head_shift=self.head_shift,
            key_mask=key_mask,
        )

    def dense(self, dtype: torch.dtype = torch.float32) -> Measurement:
        """The matrix after all."""
        return measurement(
            self.ensemble,
            self.m,
            self.n,
            seed=self.seed,
            layer=self.layer,
            heads=self.heads,
            dtype=dtype,
            device=self.device,
            anchors=self.anchors,
            head_shift=self.head_shift,
            key_mask=self.key_mask,
        )


def implicit_measurement(
    ensemble: str,
    m: int,
    n: int,
    *,
    seed: int = 0,
    layer: int = 0,
    heads: int | None = None,
    device: torch.device | str | None = None,
    anchors: Sequence[Anchor] = (),
    head_shift: bool = False,
    key_mask: Tensor | None = None,
) -> ImplicitMeasurement:
    """What `csat_ext.measurement` makes of the same arguments, without the matrix.

    Args:
        ensemble: a name in `IMPLICIT`.
        m, n, seed, layer, heads, device, anchors, head_shift, key_mask: as in `csat_ext.measurement`; n < 2**31 - 1.

    Raises:
        ValueError, TypeError: naming the argument, what came and what is accepted.
    """
    chosen = lookup(ensemble)
    if ensemble not in IMPLICIT:
        raise ValueError(f"ensemble {ensemble!r} has no implicit form; accepted: {', '.join(IMPLICIT)}")
    anchor_places = check_draw(m, n, seed, layer, heads, anchors)
    if n >= 2**31 - 1:  # the kernels count tokens in int32
        raise ValueError(f"n must be below 2**31 - 1 in an implicit form, got {n}")
    check_options(chosen, None, head_shift, n, anchor_places)
    device = resolve_device(device if device is not None or key_mask is None else key_mask.device)
    phi_heads = 1 if heads is None or (chosen.averaging and not head_shift) else heads
    valid = valid_tokens(key_mask, n, device)
    counts, anchor_tokens = None, None
    if anchor_places or key_mask is not None:
        one_hot = one_hot_rows(anchor_places, n, valid, key_mask is not None)
        kept = valid & ~one_hot.any(2, keepdim=True)
        counts = torch.nn.functional.pad(kept[:, 0, 0].cumsum(-1), (1, 0)).to(torch.int32)
        if anchor_places:
            present = (one_hot & valid).any(-1)
            anchor_tokens = torch.where(present, one_hot.to(torch.uint8).argmax(-1), -1)[:, 0].to(torch.int32)
    rows = m - len(anchor_places)
    # (B or 1, heads, m)
    bias = _score_bias(chosen.averaging, rows, n, phi_heads, device, counts, anchor_tokens)
    if bias is not None and key_mask is None:
        bias = bias[0]
    return ImplicitMeasurement(
        ensemble, m, n, seed, layer, phi_heads, anchor_places, head_shift, device, key_mask, counts, anchor_tokens, bias
    )  # fmt: skip


def _score_bias(
    averaging: bool,
    rows: int,
    n: int,
    heads: int,
    device: torch.device,
    counts: Tensor | None,
    anchor_tokens: Tensor | None,
) -> Tensor | None:
    """`Measurement.score_bias`: the log-mass of a segment is that of its length, no weights are needed."""
    if not averaging and counts is None:
        return None
    extent = torch.full((1, 1, 1), n, device=device) if counts is None else counts[:, None, -1:].long()
    if averaging:
        edges, unit = segment_edges(rows, heads, device)
        bias = torch.log((edges[:, 1:] - edges[:, :-1]).to(torch.float64) * extent / unit)
    else:
        bias = torch.where(extent > 0, 0.0, -math.inf).to(torch.float64).expand(-1, heads, rows)
    if anchor_tokens is not None:
        of_anchors = torch.where(anchor_tokens >= 0, 0.0, -math.inf).to(torch.float64)[:, None]
        bias = torch.cat([of_anchors.expand(-1, heads, -1), bias], dim=-1)
    return bias.to(torch.float32)
