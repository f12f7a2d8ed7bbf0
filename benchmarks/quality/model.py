"""The transformer of every table but the captions', and how it gets equal parameters under each form of attention."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from mechanisms import Block, LayerShape
from torch import Tensor, nn

from csat_ext.language.model import waves

Layer = Callable[[LayerShape], nn.Module]


@dataclass(frozen=True)
class Size:
    """Of the model; `hidden` is the width of its MLPs before parameters are made equal, `m` as in `LayerShape`.

    taps: positions around its own, an odd number, that a depthwise convolution behind the embedding shows to a token,
    of pixels as many rows and columns of them, the same for every form; 0: none. Pixels' positions then begin as waves.
    """

    layers: int
    width: int
    heads: int
    hidden: int
    m: int
    taps: int = 0

    def shape(self, tokens: int, seed: int, layer: int) -> LayerShape:
        return LayerShape(self.width, self.heads, tokens, self.m, seed, layer)


Grid = tuple[int, int]
"""Rows and columns of an image whose pixels are the tokens."""


def grid_waves(grid: Grid, width: int) -> Tensor:
    """Sines and cosines of the row, then of the column, (tokens, width)."""
    rows, columns = (waves(0, count, width // 2) for count in grid)
    every = rows[:, None].expand(*grid, -1), columns[None].expand(*grid, -1)
    return torch.cat(every, -1).flatten(0, 1)


class Near(nn.Module):
    """x (B, N, width) + a depthwise convolution of it along the tokens, or over rows and columns of a grid of them."""

    def __init__(self, width: int, taps: int, grid: Grid | None) -> None:
        super().__init__()
        kind = nn.Conv1d if grid is None else nn.Conv2d
        self.shape = (-1,) if grid is None else grid
        self.convolution = kind(width, width, taps, padding=taps // 2, groups=width)

    def forward(self, x: Tensor, keep: Tensor | None) -> Tensor:
        seen = x if keep is None else x * keep[..., None]
        return x + self.convolution(seen.mT.unflatten(2, self.shape)).flatten(2).mT


class Trunk(nn.Module):
    """Embedding of tokens and positions, what is near if the size has taps, pre-norm blocks, a norm: tokens (B, N)
    integers -> (B, N, width)."""

    def __init__(
        self,
        layer: Layer,
        size: Size,
        hidden: int,
        tokens: int,
        vocabulary: int,
        seed: int,
        grid: Grid | None = None,
    ) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocabulary, size.width)
        self.positions = nn.Parameter(0.02 * torch.randn(tokens, size.width))
        shapes = [size.shape(tokens, seed, i) for i in range(size.layers)]
        self.blocks = nn.ModuleList(Block(layer(shape), size.width, hidden) for shape in shapes)
        self.norm = nn.LayerNorm(size.width)
        self.near = Near(size.width, size.taps, grid) if size.taps else None
        if size.taps and grid is not None:
            with torch.no_grad():
                self.positions.copy_(grid_waves(grid, size.width))

    def forward(self, tokens: Tensor, keep: Tensor | None = None) -> Tensor:
        x = self.embedding(tokens.int()) + self.positions
        if self.near is not None:
            x = self.near(x, keep)
        for block in self.blocks:
            x = block(x, keep)
        return self.norm(x)


def equal_hidden(counts: dict[str, int], size: Size) -> dict[str, int]:
    """Widths of the MLPs with which all have the parameters of the largest, to less than one unit of each MLP.

    counts: name -> parameters with `size.hidden`. What a mechanism does not spend on itself it gets as MLP.
    """
    unit = size.layers * (2 * size.width + 1)  # weights in, out and the bias of one hidden unit of every block
    most = max(counts.values())
    return {name: size.hidden + round((most - own) / unit) for name, own in counts.items()}
