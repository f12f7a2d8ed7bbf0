"""The one classifier of every table, and how it gets an equal number of parameters under each mechanism."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from baselines import parameters
from mechanisms import Block, LayerShape
from torch import Tensor, nn

Layer = Callable[[LayerShape], nn.Module]


@dataclass(frozen=True)
class Size:
    """Of the classifier; `hidden` is the width of its MLPs before parameters are made equal, `m` as in `LayerShape`."""

    layers: int
    width: int
    heads: int
    hidden: int
    m: int


class Classifier(nn.Module):
    """Embedding of tokens and positions, pre-norm blocks, the mean of the kept tokens, a linear layer.

    tokens (B, N) integers, keep (B, N) bool or None -> logits (B, classes).
    """

    def __init__(self, layer: Layer, size: Size, hidden: int, tokens: int, vocabulary: int, classes: int, seed: int):
        super().__init__()
        self.embedding = nn.Embedding(vocabulary, size.width)
        self.positions = nn.Parameter(0.02 * torch.randn(tokens, size.width))
        shapes = [LayerShape(size.width, size.heads, tokens, size.m, seed, i) for i in range(size.layers)]
        self.blocks = nn.ModuleList(Block(layer(shape), size.width, hidden) for shape in shapes)
        self.norm, self.head = nn.LayerNorm(size.width), nn.Linear(size.width, classes)

    def forward(self, tokens: Tensor, keep: Tensor | None) -> Tensor:
        x = self.embedding(tokens.int()) + self.positions
        for block in self.blocks:
            x = block(x, keep)
        x = self.norm(x)
        if keep is None:
            return self.head(x.mean(1))
        weight = keep.to(x.dtype)
        return self.head((x * weight[..., None]).sum(1) / weight.sum(1, keepdim=True).clamp_min(1))


def count(layer: Layer, size: Size, hidden: int, tokens: int, vocabulary: int, classes: int) -> int:
    """Parameters of the classifier; nothing is computed."""
    with torch.random.fork_rng(devices=[]):
        return parameters(Classifier(layer, size, hidden, tokens, vocabulary, classes, seed=0))


def equal_hidden(counts: dict[str, int], size: Size) -> dict[str, int]:
    """Widths of the MLPs with which all have the parameters of the largest, to less than one unit of each MLP.

    counts: name -> parameters with `size.hidden`. What a mechanism does not spend on itself it gets as MLP.
    """
    unit = size.layers * (2 * size.width + 1)  # weights in, out and the bias of one hidden unit of every block
    most = max(counts.values())
    return {name: size.hidden + round((most - own) / unit) for name, own in counts.items()}
