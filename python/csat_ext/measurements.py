"""Measurement matrices Phi (M, N): how N tokens become M measurements (DCT, random signs, pooled segments, ...).

Two families (`Ensemble.averaging`):

- averaging: rows are non-negative and sum to 1. A measured key is a mean of keys, so scores keep their scale, and
  `score_bias` = log(mass), the mass being the number of tokens in a row, makes it count for as many. Attention over
  them is exact where the keys of a row are equal, and at M = N.
- signed: entries of variance 1/N, so measured keys keep the spread of a single key at any N. These are the ensembles of
  compressed sensing. Signed random measurements of *keys* do not approximate softmax attention at any M: with rows
  shared by keys and values the output tends to V^T grad L(s), L(s) = log E exp(phi . s), as M grows (Gaussian:
  V^T s / N, which is unnormalised linear attention). They are here because the paper defines them.

Column s of a random Phi depends on (seed, layer, head, row, s) alone (`csat_ext.philox`), apart from one scalar in N,
so any N works and every device and rank holds the same columns. Values are made in exact integers or float64 and cast
last. Nothing here waits for a device, and `torch.compile` and `torch.export` trace it with a symbolic N: a root of N is
`torch.sym_sqrt`, which is `math.sqrt` of an int (`math.sqrt` of a symbol fixes it to the traced length).

To add an ensemble: one function from `Layout`, decorated with `@_signed(name)` (values of variance 1/N) or
`@_averaging(name)` (integer token weights and their unit), its docstring saying what it is worth.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from csat_ext import philox

Anchor = str | int

# A counter row that no measurement reaches: draws that belong to a whole matrix instead of one of its rows.
_MATRIX_ROW = 2**32 - 1


@dataclass(frozen=True)
class Measurement:
    """A measurement matrix and what it adds to the scores.

    phi: (heads or 1, M, N), with a batch axis (B, heads or 1, M, N) where it was made for a key mask.
    score_bias: (heads or 1, M), or (B, heads or 1, M): log-mass of averaging rows, 0 for anchors, -inf for rows that
        hold no token; float32 (float64 with a float64 phi). None where every row's bias is 0 by construction.
    """

    phi: Tensor
    score_bias: Tensor | None


@dataclass(frozen=True)
class Part:
    """The piece of a Phi that is made: columns [start, stop) of n, heads [first, last) of those there are.

    This class is a Phi made in one place. Where several ranks hold consecutive columns of one Phi, a subclass lets them
    count together (`csat_ext.parallel.sequence`), so that each of them makes its columns of the very Phi that one rank
    would make. Counts are int64, so their sums are exact.
    """

    start: int
    stop: int
    first: int
    last: int

    def total(self, count: Tensor) -> Tensor:
        """The sum of a count over all columns, from the sum over those of this part."""
        return count

    def before_and_total(self, count: Tensor) -> tuple[Tensor, Tensor]:
        """The sum over the columns before `start`, and `total`."""
        return torch.zeros_like(count), count

    def all_columns(self, key_mask: Tensor) -> Tensor:
        """The mask (B, n) of all tokens, from that of the part's."""
        return key_mask


@dataclass(frozen=True)
class Layout:
    """What a builder knows: sizes, coordinates of the random draws, and which tokens are to be measured.

    m rows, n tokens and heads >= 1 in all, of which `part` is made: c columns; kept (B or 1, 1, 1, c) bool: False for
    masked tokens and anchors; grid: shape of the token grid, None in 1-D; coordinate (B or 1, 1, 1, c) int64: a token's
    place in the sequence or flattened grid, with whatever is left out of it closed up; extent (B or 1, 1, 1, 1) int64:
    how many places there are.
    """

    m: int
    n: int
    seed: int
    layer: int
    heads: int
    part: Part
    device: torch.device
    kept: Tensor
    coordinate: Tensor
    extent: Tensor
    grid: tuple[int, ...] | None
    head_shift: bool

    def rows(self) -> Tensor:
        """(m, 1) row numbers."""
        return torch.arange(self.m, dtype=torch.int64, device=self.device)[:, None]

    def tokens(self) -> Tensor:
        """(c,) positions of the part's tokens."""
        return torch.arange(self.part.start, self.part.stop, dtype=torch.int64, device=self.device)

    def head_numbers(self) -> Tensor:
        """(heads of the part,) numbers."""
        return torch.arange(self.part.first, self.part.last, dtype=torch.int64, device=self.device)

    def words(self, row: int | Tensor, position: int | Tensor) -> philox.Words:
        """Random words of shape (heads, ...) for rows and positions of shape (...) with two axes or none."""
        return philox.philox_bits(self.seed, self.layer, self.head_numbers()[:, None, None], row, position)


@dataclass(frozen=True)
class Ensemble:
    """One way to make a Phi.

    name: what users write. averaging: rows are means (else signed, variance 1/N). options: which of `grid` and
    `head_shift` it takes. summary: its docstring, the honest note included.
    build: from a `Layout`; signed: (heads or 1, m, c) float64 values; averaging: int64 token weights, broadcastable to
    (B, heads, m, c), and the integer that stands for one whole token; heads and columns c are those of the part.
    """

    name: str
    averaging: bool
    options: frozenset[str]
    summary: str
    build: Callable[[Layout], Any]


ENSEMBLES: dict[str, Ensemble] = {}

_Signed = Callable[[Layout], Tensor]
_Averaging = Callable[[Layout], tuple[Tensor, int]]


def _signed(name: str) -> Callable[[_Signed], _Signed]:
    def register(build: _Signed) -> _Signed:
        ENSEMBLES[name] = Ensemble(name, False, frozenset(), build.__doc__ or "", build)
        return build

    return register


def _averaging(name: str, *options: str) -> Callable[[_Averaging], _Averaging]:
    def register(build: _Averaging) -> _Averaging:
        ENSEMBLES[name] = Ensemble(name, True, frozenset(options), build.__doc__ or "", build)
        return build

    return register


def measurement(
    ensemble: str,
    m: int,
    n: int,
    *,
    seed: int = 0,
    layer: int = 0,
    heads: int | None = None,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str | None = None,
    anchors: Sequence[Anchor] = (),
    grid: Sequence[int] | None = None,
    head_shift: bool = False,
    key_mask: Tensor | None = None,
    part: Part | None = None,
) -> Measurement:
    """Makes Phi and its score bias.

    Args:
        ensemble: a name in `ENSEMBLES`.
        m: number of measurements, anchors included; 1 <= m <= n and m > len(anchors).
        n: number of tokens, masked ones included.
        seed: 0 <= seed < 2**64. layer: 0 <= layer < 2**32.
        heads: how many heads get a Phi of their own; None is one. Deterministic ensembles return one for all.
        dtype: of phi. device: None is the device of the key mask, else torch's default.
        anchors: tokens kept exact as one-hot rows, put first in the order given, mass 1 (bias 0), and taken out of the
            other rows: "first", "last", or ints counted over the valid tokens (negative: from the end). One that names
            the token of an earlier anchor, or that a key mask has left no token for, is an empty row: zeros, bias -inf.
        grid: (h, w) or (t, h, w): the tokens form a grid, row-major, whose product is n, or n less the anchors where
            those (a CLS token) stand outside it; then anchors are positions, whatever the mask. Only for ensembles
            with the option.
        head_shift: head h of H shifts the inner borders of its segments by (h + 1/2) / H - 1/2 segments, in every axis;
            the outermost borders stay. Only for ensembles with the option.
        key_mask: (B, n) bool, True = keep. The result gets a batch axis, zero columns for masked tokens, and is
            renormalised: averaging rows sum to 1 over the rest and their mass counts the rest; signed rows are
            multiplied by sqrt(n / n_kept). 1-D pools divide the valid tokens only (grids keep their cells). A row
            without a token gets zeros and bias -inf, never NaN.
        part: which columns and heads to make, all when absent; key_mask then has the part's columns, (B, c). The score
            bias always counts all n tokens.

    Note:
        `csat_attention(..., key_mask=)` renormalises signed rows itself: give it the phi made *without* a key mask.
        For averaging phi its renormalisation of an already renormalised phi changes nothing.

    Raises:
        ValueError, TypeError: naming the argument, what came and what is accepted.
    """
    chosen = lookup(ensemble)
    anchors = check_draw(m, n, seed, layer, heads, anchors)
    if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
        raise TypeError(f"dtype must be a floating-point torch.dtype, got {dtype!r}")
    checked_grid = check_options(chosen, grid, head_shift, n, anchors)
    device = resolve_device(device if device is not None or key_mask is None else key_mask.device)
    part = Part(0, n, 0, 1 if heads is None else heads) if part is None else part
    valid = valid_tokens(key_mask, part.stop - part.start, device)

    outside = checked_grid is not None and math.prod(checked_grid) != n
    anchor_rows = one_hot_rows(anchors, n, torch.ones_like(valid) if outside else valid, key_mask is not None, part)
    anchored = anchor_rows.any(dim=2, keepdim=True)
    anchor_rows = anchor_rows & valid
    kept = valid & ~anchored
    in_line = ~anchored if outside else (torch.ones_like(kept) if checked_grid is not None else kept)
    coordinate, extent = _numbered(in_line, part)
    layout = Layout(
        m=m - len(anchors), n=n, seed=seed, layer=layer, heads=1 if heads is None else heads, part=part, device=device,
        kept=kept, coordinate=coordinate, extent=extent, grid=checked_grid, head_shift=head_shift,
    )  # fmt: skip
    phi, bias = _averaging_rows(chosen, layout) if chosen.averaging else _signed_rows(chosen, layout)

    if anchors:
        shape = [max(a, b) for a, b in zip(phi.shape[:2], anchor_rows.shape[:2], strict=True)]
        parts = [anchor_rows.to(torch.float64), phi]
        phi = torch.cat([part.expand(*shape, -1, -1) for part in parts], dim=2)
        biases = [_empty_is_minus_infinity(part.total(anchor_rows.long().sum(-1)) > 0), bias]
        bias = torch.cat([part.expand(*shape, -1) for part in biases], dim=2)
    if key_mask is None:
        phi, bias = phi[0], bias[0]
    keeps_bias = chosen.averaging or anchors or key_mask is not None
    bias_dtype = torch.float64 if dtype == torch.float64 else torch.float32
    return Measurement(phi.to(dtype), bias.to(bias_dtype) if keeps_bias else None)


def rows_over_places(
    ensemble: str, rows: int, heads: int, seed: int, layer: int, counts: Tensor, anchors: Tensor
) -> Tensor:
    """Phi of the ensemble over the tokens that running counts keep, one-hot rows of the anchors in front.

    The dense form of `torch.ops.csat.project_implicit`: float64, (B or 1, heads, A + rows, n). counts (B or 1, n + 1):
    how many tokens before s are kept, so that token s is the counts[s]-th of them if counts[s + 1] > counts[s];
    anchors (B or 1, A): token numbers, none of them kept, or -1 for an empty row. Pools shift their segments per head.
    """
    counts = counts.long()[:, None, None]
    tokens = torch.arange(counts.shape[-1] - 1, dtype=torch.int64, device=counts.device)
    chosen = lookup(ensemble)
    layout = Layout(
        m=rows, n=tokens.shape[0], seed=seed % 2**64, layer=layer, heads=heads,
        part=Part(0, tokens.shape[0], 0, heads), device=counts.device,
        kept=counts[..., 1:] > counts[..., :-1], coordinate=counts[..., :-1], extent=counts[..., -1:],
        grid=None, head_shift=True,
    )  # fmt: skip
    phi, _ = _averaging_rows(chosen, layout) if chosen.averaging else _signed_rows(chosen, layout)
    one_hot = (anchors.long()[:, None, :, None] == tokens).to(torch.float64)
    batch = max(phi.shape[0], one_hot.shape[0])
    return torch.cat([part.expand(batch, heads, -1, -1) for part in (one_hot, phi)], dim=2)


BY_POSITION = ("bucket", "gaussian", "rademacher", "srht", "count_sketch")
"""The ensembles whose column s depends on (seed, layer, head, s) and m alone, but for a factor in n."""


def columns_by_position(
    ensemble: str, m: int, start: int, stop: int, *, seed: int, layer: int, heads: int, device: torch.device
) -> Tensor:
    """What the tokens [start, stop) add to the m measurements of a prefix (`csat_ext.reference.causal_prefix`).

    (heads, stop - start, m), float32: 0 and 1 of an averaging ensemble, of variance 1 of a signed one.
    """
    chosen = lookup(ensemble)
    if ensemble not in BY_POSITION:
        raise ValueError(f"ensemble {ensemble!r} depends on the length; accepted: {', '.join(BY_POSITION)}")
    place = torch.arange(start, stop, dtype=torch.int64, device=device)[None, None, None]
    layout = Layout(
        m=m,
        n=1,
        seed=seed,
        layer=layer,
        heads=heads,
        part=Part(start, stop, 0, heads),
        device=device,
        kept=place >= 0,
        coordinate=place,
        extent=place[..., :1],
        grid=None,
        head_shift=False,
    )  # fmt: skip  (n = 1: the factor in n is 1)
    columns = chosen.build(layout)
    values = columns[0][0] / columns[1] if chosen.averaging else columns
    return values.to(torch.float32).mT.contiguous()


def measurement_matrix(
    ensemble: str,
    m: int,
    n: int,
    *,
    seed: int,
    heads: int | None = None,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str | None = None,
    **options: Any,
) -> Tensor:
    """Phi alone: (m, n), or (heads, m, n) where `heads` is given.

    Options: `layer`, `anchors`, `grid`, `head_shift`, as in `measurement`, whose errors are raised.
    """
    accepted = {"layer", "anchors", "grid", "head_shift"}
    if unknown := sorted(set(options) - accepted):
        raise TypeError(f"measurement_matrix got unknown options {unknown}; accepted: {sorted(accepted)}")
    phi = measurement(ensemble, m, n, seed=seed, heads=heads, dtype=dtype, device=device, **options).phi
    return phi[0] if heads is None else phi.expand(heads, -1, -1).contiguous()


# --- averaging ensembles ---------------------------------------------------------------------------------------------


@_averaging("pool", "grid", "head_shift")
def _pool(layout: Layout) -> tuple[Tensor, int]:
    """Means of contiguous segments (cells of a grid in 2-D and 3-D), fractional at the borders.

    In 1-D segment j covers [j L / m, (j + 1) L / m) of the L tokens measured, and a token's weight is its overlap with
    it. On a grid the m rows are the cells of `cell_grid`, row-major. The nearest to softmax attention of the
    fixed ensembles where neighbouring tokens are alike (benchmarks/results/ensembles.json), and exact for keys that are
    constant in each segment.
    """
    if layout.grid is None:
        return _overlaps(layout, layout.coordinate, layout.extent, layout.m)
    cells = cell_grid(layout.m, layout.grid)
    weights, unit = torch.ones((), dtype=torch.int64, device=layout.device), 1
    strides = [math.prod(layout.grid[axis + 1 :]) for axis in range(len(cells))]
    for axis, (size, count) in enumerate(zip(layout.grid, cells, strict=True)):
        place = layout.coordinate // strides[axis] % size
        overlap, axis_unit = _overlaps(layout, place, size, count)
        # Row j of the result is cell (j_0, j_1, ..): one axis of cells at a time, flattened row-major.
        weights = overlap if axis == 0 else (weights[..., :, None, :] * overlap[..., None, :, :]).flatten(-3, -2)
        unit *= axis_unit
    return weights, unit


@_averaging("bucket")
def _bucket(layout: Layout) -> tuple[Tensor, int]:
    """Random buckets per head, averaged: every stretch of m tokens is dealt to the m buckets in a random order.

    Bucket sizes differ by at most one, none is empty, and m = n is a permutation (exact attention). It loses to `pool`
    where neighbours are alike (benchmarks/results/ensembles.json); it is meant for tokens whose order says nothing, as
    every head deals them out differently.
    """
    first, last = layout.part.start // layout.m, -(-layout.part.stop // layout.m)  # the stretches that the part meets
    positions = torch.arange(first * layout.m, last * layout.m, dtype=torch.int64, device=layout.device)
    words = layout.words(0, positions[None, :])
    keys = (words[0] << 31 | words[1] >> 1).unflatten(-1, (last - first, layout.m))  # (heads, 1, stretches, m)
    dealt = keys.argsort(dim=-1, stable=True).flatten(-2)
    bucket = dealt[..., layout.part.start - first * layout.m : layout.part.stop - first * layout.m]
    return (bucket == layout.rows()).long()[None], 1


@_averaging("learned", "grid", "head_shift")
def _learned(layout: Layout) -> tuple[Tensor, int]:
    """Initial value of a learned Phi: `pool`.

    A learned Phi belongs to one length, and with few data it can overfit.
    """
    return _pool(layout)


# --- signed ensembles ------------------------------------------------------------------------------------------------


@_signed("gaussian")
def _gaussian(layout: Layout) -> Tensor:
    """Entries N(0, 1/n), the paper's. Not an approximation of softmax attention (benchmarks/results/ensembles.json): as
    m grows the output tends to V^T s / n (unnormalised linear attention)."""
    return philox.normal(layout.words(layout.rows(), layout.tokens())) / torch.sym_sqrt(layout.n)


@_signed("rademacher")
def _rademacher(layout: Layout) -> Tensor:
    """Signs / sqrt(n). Not an approximation of softmax attention (benchmarks/results/ensembles.json): as m grows the
    output tends to V^T tanh(s / sqrt(n)) / sqrt(n)."""
    return philox.sign(layout.words(layout.rows(), layout.tokens())).to(torch.float64) / torch.sym_sqrt(layout.n)


@_signed("srht")
def _srht(layout: Layout) -> Tensor:
    """Subsampled randomised Hadamard transform: sign_s (-1)^popcount(i_j & s) / sqrt(n), i_j = (a j + c) mod 2^62.

    a is odd, so i_j mod 2^k is a permutation for every k and rows are orthogonal where n is a power of two (nearly so
    elsewhere). Not an approximation of softmax attention (benchmarks/results/ensembles.json).
    """
    word = layout.words(_MATRIX_ROW, 0)
    start, step_low = word[0], word[1] | 1
    # n < 2^32, so of i_j only the low 32 bits matter, and of a and c as well; 16-bit halves keep the product in int64.
    rows = layout.rows()
    product = step_low * (rows & 0xFFFF) + ((step_low * (rows >> 16) & 0xFFFF) << 16)
    parity = (product + start) & 0xFFFFFFFF & layout.tokens()
    for shift in (16, 8, 4, 2, 1):
        parity = parity ^ (parity >> shift)
    signs = philox.sign(layout.words(0, layout.tokens()[None, :]))
    return (signs * (1 - 2 * (parity & 1))).to(torch.float64) / torch.sym_sqrt(layout.n)


@_signed("count_sketch")
def _count_sketch(layout: Layout) -> Tensor:
    """Every token goes to one random row with a random sign; entries 0 or +-sqrt(m / n), of variance 1/n. Not an
    approximation of softmax attention (benchmarks/results/ensembles.json)."""
    words = layout.words(0, layout.tokens()[None, :])
    row = words[1] * layout.m >> 32
    values = philox.sign(words).to(torch.float64) * torch.sym_sqrt(layout.m / layout.n)
    return torch.where(row == layout.rows(), values, 0.0)


@_signed("dct")
def _dct(layout: Layout) -> Tensor:
    """Low-pass DCT-II: the first m rows of the orthonormal cosine transform. Deterministic. Its row 0 alone is an
    average; not an approximation of softmax attention (benchmarks/results/ensembles.json)."""
    return dct_rows(layout.rows(), layout.n, layout.tokens())[None]


@_signed("haar")
def _haar(layout: Layout) -> Tensor:
    """The first m rows, coarse to fine, of an orthonormal Haar transform, for every n. Deterministic. Not an
    approximation of softmax attention: signed, as `dct`."""
    return haar_rows(layout.rows(), layout.n, layout.tokens())[None]


# --- orthonormal transforms, shared with the dictionaries ------------------------------------------------------------


def dct_rows(rows: Tensor, n: int, tokens: Tensor) -> Tensor:
    """Rows (m, 1) of the orthonormal DCT-II of length n, float64: sqrt((2 - [j = 0]) / n) cos(pi j (2 s + 1) / 2 n),
    at the tokens (c,) s."""
    odd = 2 * tokens + 1
    angle = (rows * odd % (4 * n)).to(torch.float64) * (math.pi / (2 * n))  # reduced exactly, as integers
    amplitude = torch.sqrt((2 - (rows == 0).long()).to(torch.float64) / n)
    return torch.cos(angle) * amplitude


def haar_rows(rows: Tensor, n: int, token: Tensor) -> Tensor:
    """Rows (m, 1) of an orthonormal Haar transform of any length n, float64 (unbalanced Haar on dyadic borders), at
    the tokens (c,).

    Level l splits [0, n) at floor(k n / 2^l). Row 0 is constant; row 2^l + k compares the two halves [a, c), [c, b) of
    node k of level l: +sqrt((b - c) / ((c - a)(b - a))) and -sqrt((c - a) / ((b - c)(b - a))). On the last level,
    2^l <= n < 2^(l + 1), nodes hold one token or two, and the rows are those of the nodes with two, in order.
    """
    device = rows.device
    powers = torch.ones(32, dtype=torch.int64, device=device) << torch.arange(32, dtype=torch.int64, device=device)
    level = (powers <= rows).sum(-1, keepdim=True) - 1
    level = level.clamp_min(0)
    last = ((powers <= n).sum() - 1).clamp_min(0)
    nodes = torch.ones_like(level) << level
    node = rows - nodes
    pairs = (n - nodes).clamp_min(1)  # on the last level: how many nodes hold two tokens
    node = torch.where(level == last, -(-((node + 1) * nodes) // pairs) - 1, node)
    left, middle, right = node * n // nodes, (2 * node + 1) * n // (2 * nodes), (node + 1) * n // nodes
    low, high = (middle - left).clamp_min(1).to(torch.float64), (right - middle).clamp_min(1).to(torch.float64)
    wavelet = torch.where(token < middle, torch.sqrt(high / low), -torch.sqrt(low / high)) / torch.sqrt(low + high)
    wavelet = torch.where((token >= left) & (token < right), wavelet, 0.0)
    return torch.where(rows == 0, torch.sym_sqrt(1 / n), wavelet)


# --- the one place where rows are normalised -------------------------------------------------------------------------


def _averaging_rows(ensemble: Ensemble, layout: Layout) -> tuple[Tensor, Tensor]:
    """phi = weight / mass and bias = log(mass), over the kept tokens; (B or 1, heads or 1, m, n) and without n."""
    weights, unit = ensemble.build(layout)
    weights = torch.where(layout.kept, weights, 0)
    mass = layout.part.total(weights.sum(-1, keepdim=True))
    phi = weights.to(torch.float64) / mass.clamp_min(1).to(torch.float64)
    return phi, torch.log(mass[..., 0].to(torch.float64) / unit)


def _signed_rows(ensemble: Ensemble, layout: Layout) -> tuple[Tensor, Tensor]:
    """phi times sqrt(n / n_kept) over the kept tokens, bias 0 (-inf for a row of zeros); shapes as above."""
    count = layout.part.total(layout.kept.long().sum(-1, keepdim=True)).clamp_min(1)
    scale = torch.sqrt(layout.n / count.to(torch.float64))
    phi = torch.where(layout.kept, ensemble.build(layout) * scale, 0.0)
    return phi, _empty_is_minus_infinity(layout.part.total((phi != 0).long().sum(-1)) > 0)


def _empty_is_minus_infinity(filled: Tensor) -> Tensor:
    return torch.where(filled, 0.0, -math.inf).to(torch.float64)


# --- pooling ---------------------------------------------------------------------------------------------------------


def cell_grid(m: int, grid: Sequence[int]) -> tuple[int, ...]:
    """The grid of m cells laid over a grid of tokens: the factorisation of m with no axis finer than the tokens whose
    cells are nearest to cubes, that is with the least variance of log(tokens per cell side); ties take the first in
    lexicographic order.

    Raises ValueError where m has no such factorisation (a prime m above every side, for one).
    """
    divisors = [d for d in range(1, m + 1) if m % d == 0]
    choices = itertools.product(*([d for d in divisors if d <= side] for side in grid))
    fitting = [cells for cells in choices if math.prod(cells) == m]
    if not fitting:
        raise ValueError(f"m: {m} pooled cells do not form a grid inside grid={tuple(grid)}; choose another m")

    def distortion(cells: tuple[int, ...]) -> float:
        sides = [math.log(side / count) for side, count in zip(grid, cells, strict=True)]
        mean = sum(sides) / len(sides)
        return round(sum((side - mean) ** 2 for side in sides), 12)

    return min(fitting, key=distortion)


def _overlaps(layout: Layout, place: Tensor, extent: int | Tensor, segments: int) -> tuple[Tensor, int]:
    """Overlap of the token interval [place, place + 1) with each segment of [0, extent), in exact integers.

    The unit of length is 1 / (2 H m) token, so that the border (j + s_h) extent / m with s_h = (2 h + 1 - H) / (2 H) is
    a whole number. place (B or 1, 1, 1, n); extent an int or (B or 1, 1, 1, 1). Returns (B or 1, H or 1, m, n), unit.
    """
    edges, unit = segment_edges(segments, layout.heads if layout.head_shift else 1, layout.device)
    if layout.head_shift:
        edges = edges[layout.part.first : layout.part.last]
    edges = edges[None, :, :, None] * extent
    low, high = edges[:, :, :-1], edges[:, :, 1:]
    overlap = torch.minimum((place + 1) * unit, high) - torch.maximum(place * unit, low)
    return overlap.clamp_min(0), unit


def segment_edges(segments: int, heads: int, device: torch.device) -> tuple[Tensor, int]:
    """Borders of the segments of [0, 1) per head, (heads, segments + 1) int64, in the unit 1 / (2 heads segments)."""
    border = torch.arange(segments + 1, dtype=torch.int64, device=device)
    shift = 2 * torch.arange(heads, dtype=torch.int64, device=device)[:, None] + 1 - heads
    inner = (border > 0) & (border < segments)
    return 2 * heads * border + torch.where(inner, shift, 0), 2 * heads * segments


# --- anchors and masks -----------------------------------------------------------------------------------------------


def _numbered(chosen: Tensor, part: Part) -> tuple[Tensor, Tensor]:
    """Each token's number among the chosen (B or 1, 1, 1, c) of all columns, and how many of those there are."""
    before, total = part.before_and_total(chosen.long().sum(-1, keepdim=True))
    return chosen.long().cumsum(-1) - 1 + before, total


def valid_tokens(key_mask: Tensor | None, n: int, device: torch.device) -> Tensor:
    """(B or 1, 1, 1, n) bool."""
    if key_mask is None:
        return (torch.arange(n, dtype=torch.int64, device=device) >= 0)[None, None, None]
    if not isinstance(key_mask, Tensor) or key_mask.dtype != torch.bool:
        got = key_mask.dtype if isinstance(key_mask, Tensor) else type(key_mask).__name__
        raise TypeError(f"key_mask must be a bool tensor (True = keep), got {got}")
    if key_mask.dim() != 2 or key_mask.shape[1] != n:
        raise ValueError(f"key_mask must have shape (B, n) with n = {n}, got {tuple(key_mask.shape)}")
    if key_mask.device.type != device.type:
        raise ValueError(f"key_mask is on {key_mask.device}, but device is {device}")
    return key_mask[:, None, None, :]


def one_hot_rows(anchors: tuple[int, ...], n: int, valid: Tensor, masked: bool, part: Part | None = None) -> Tensor:
    """(B or 1, 1, A, c) bool one-hot rows; an anchor that repeats an earlier one or does not exist is an empty row."""
    if not masked and (outside := [anchor for anchor in anchors if not -n <= anchor < n]):
        raise ValueError(f"anchors {outside} do not exist among n = {n} tokens")
    rank, count = _numbered(valid, Part(0, n, 0, 1) if part is None else part)
    targets = [count + anchor if anchor < 0 else torch.zeros_like(count) + anchor for anchor in anchors]
    if not targets:
        return valid[:, :, :0]
    target = torch.cat(targets, dim=2)  # (B or 1, 1, A, 1)
    order = torch.arange(len(anchors), dtype=torch.int64, device=valid.device)
    earlier = order[None, :] < order[:, None]
    repeated = ((target == target.mT) & earlier).any(-1, keepdim=True)
    return valid & (rank == target) & ~repeated


def resolve_device(device: torch.device | str | None) -> torch.device:
    """None is torch's default device (asked for in a way that torch.compile traces and `zero.Init` does not patch)."""
    if device is None:
        return torch.scalar_tensor(0, dtype=torch.int64).device
    if isinstance(device, torch.device):
        return device
    try:
        return torch.device(device)
    except (RuntimeError, TypeError) as error:
        raise ValueError(f"device must be a torch.device or its name, got {device!r}") from error


# --- checks ----------------------------------------------------------------------------------------------------------


def lookup(ensemble: str) -> Ensemble:
    if not isinstance(ensemble, str) or ensemble not in ENSEMBLES:
        raise ValueError(f"ensemble must be one of {sorted(ENSEMBLES)}, got {ensemble!r}")
    return ENSEMBLES[ensemble]


def check_draw(m: int, n: int, seed: int, layer: int, heads: int | None, anchors: Sequence[Anchor]) -> tuple[int, ...]:
    """Checks what every draw needs; returns the anchors as ints."""
    for name, value in (("m", m), ("n", n), ("heads", 1 if heads is None else heads)):
        philox.check_unsigned(name, value, 32)
        if value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}")
    if m > n:
        raise ValueError(f"m must be at most n: got m = {m} measurements of n = {n} tokens")
    philox.check_unsigned("seed", seed, 64)
    philox.check_unsigned("layer", layer, 32)
    return _check_anchors(anchors, m)


def _check_anchors(anchors: Sequence[Anchor], m: int) -> tuple[int, ...]:
    if isinstance(anchors, str) or not isinstance(anchors, Sequence):
        raise TypeError(f"anchors must be a sequence such as ('first', 'last'), got {anchors!r}")
    named: dict[Anchor, int] = {"first": 0, "last": -1}
    for anchor in anchors:
        if isinstance(anchor, bool) or not (isinstance(anchor, int) or anchor in tuple(named)):
            raise ValueError(f"anchors must hold 'first', 'last' or ints, got {anchor!r}")
    if len(anchors) >= m:
        raise ValueError(f"m must exceed the number of anchors: got m = {m} with {len(anchors)} anchors")
    return tuple(anchor if isinstance(anchor, int) else named[anchor] for anchor in anchors)


def check_options(
    ensemble: Ensemble, grid: Sequence[int] | None, head_shift: bool, n: int, anchors: tuple[int, ...]
) -> tuple[int, ...] | None:
    if not isinstance(head_shift, bool):
        raise TypeError(f"head_shift must be a bool, got {head_shift!r}")
    for option, given in (("grid", grid is not None), ("head_shift", head_shift)):
        if given and option not in ensemble.options:
            takers = sorted(e.name for e in ENSEMBLES.values() if option in e.options)
            raise ValueError(f"{option} is an option of the ensembles {takers}, not of {ensemble.name!r}")
    if grid is None:
        return None
    if not isinstance(grid, Sequence):
        raise TypeError(f"grid must be a sequence such as (h, w), got {grid!r}")
    sides = tuple(grid)
    if len(sides) not in (1, 2, 3) or any(isinstance(s, bool) or not isinstance(s, int) or s < 1 for s in sides):
        raise ValueError(f"grid must be 1 to 3 positive ints such as (h, w), got {grid!r}")
    distinct = len({anchor % n for anchor in anchors})
    if math.prod(sides) not in (n, n - distinct):
        accepted = f"n = {n}" + (f" or n - {distinct} anchors" if anchors else "")
        raise ValueError(f"grid {sides} holds {math.prod(sides)} tokens; its product must be {accepted}")
    return sides
