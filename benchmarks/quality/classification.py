"""Classification: rows of small integers, which of them count, a label for each row, and the classifier."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from .model import Grid, Layer, Size, Trunk
from .task import Task


@dataclass(frozen=True)
class Split:
    """tokens (count, N) uint8; keep (count, N) bool, True = counts, or None where all do; labels (count,) int64."""

    tokens: Tensor
    keep: Tensor | None
    labels: Tensor

    def __len__(self) -> int:
        return len(self.labels)

    def to(self, device: torch.device | str) -> Split:
        keep = None if self.keep is None else self.keep.to(device)
        return Split(self.tokens.to(device), keep, self.labels.to(device))


class Classifier(nn.Module):
    """The trunk, the mean of the kept tokens, a linear layer.

    tokens (B, N) integers, keep (B, N) bool or None -> logits (B, classes).
    """

    def __init__(self, trunk: Trunk, classes: int) -> None:
        super().__init__()
        self.trunk, self.head = trunk, nn.Linear(trunk.positions.shape[1], classes)

    def forward(self, tokens: Tensor, keep: Tensor | None) -> Tensor:
        x = self.trunk(tokens, keep)
        if keep is None:
            return self.head(x.mean(1))
        weight = keep.to(x.dtype)
        return self.head((x * weight[..., None]).sum(1) / weight.sum(1, keepdim=True).clamp_min(1))


@dataclass(frozen=True)
class Classification(Task):
    """Attributes:
    vocabulary: tokens are below it.
    references: what a reader compares with -> its accuracy on the test split.
    grid: rows and columns where tokens are the pixels of an image.
    """

    name: str
    about: str
    classes: int
    vocabulary: int
    train: Split
    validation: Split
    test: Split
    references: dict[str, float] = field(default_factory=dict)
    grid: Grid | None = None

    @property
    def tokens(self) -> int:
        return self.train.tokens.shape[1]

    def majority(self) -> float:
        """Accuracy on the test split of the label that is most frequent in the train split."""
        return most_frequent(self.train, self.test, lambda part: torch.zeros_like(part.labels))

    def facts(self) -> dict[str, Any]:
        found: dict[str, Any] = {
            "tokens": self.tokens,
            "examples": [len(part) for part in (self.train, self.validation, self.test)],
            "majority": self.majority(),
            "chance": 1 / self.classes,
        }
        if self.train.keep is not None:
            found["median tokens"] = int(self.train.keep.sum(1).median())
        if self.references:
            found["references"] = self.references
        return found

    def to(self, device: torch.device | str) -> Classification:
        parts = {name: getattr(self, name).to(device) for name in ("train", "validation", "test")}
        return replace(self, **parts)

    def model(self, layer: Layer, size: Size, hidden: int, seed: int) -> Classifier:
        trunk = Trunk(layer, size, hidden, self.tokens, self.vocabulary, seed, self.grid)
        return Classifier(trunk, self.classes)

    def batches(self, steps: int, batch: int, seed: int) -> Iterator[Tensor]:
        """Rows: permutations of all the examples, one after the other."""
        generator = torch.Generator().manual_seed(seed)
        left = torch.empty(0, dtype=torch.int64)
        for _ in range(steps):
            while len(left) < batch:
                left = torch.cat((left, torch.randperm(len(self.train), generator=generator)))
            yield left[:batch].to(self.train.labels.device)
            left = left[batch:]

    def loss(self, model: nn.Module, batch: Tensor) -> Tensor:
        return cross_entropy(_logits(model, self.train, batch).float(), self.train.labels[batch])

    def scores(self, model: nn.Module, batch: int) -> dict[str, Any]:
        return {
            "validation": accuracy(model, self.validation, batch),
            "test": accuracy(model, self.test, batch),
        }


def _logits(model: nn.Module, split: Split, rows: Tensor | slice) -> Tensor:
    keep = None if split.keep is None else split.keep[rows]
    return model(split.tokens[rows], keep)


def accuracy(model: nn.Module, split: Split, batch: int) -> float:
    """Share of the examples whose label has the largest logit."""
    right = 0
    for start in range(0, len(split), batch):
        rows = slice(start, start + batch)
        right += int((_logits(model, split, rows).argmax(-1) == split.labels[rows]).sum())
    return right / len(split)


def most_frequent(train: Split, test: Split, cue: Callable[[Split], Tensor]) -> float:
    """Accuracy on the test split of the label that is most frequent in the train split beside an equal cue.

    cue: split -> small integers (count,), all that is looked at.
    """
    seen, asked = cue(train), cue(test)
    counts = torch.zeros(int(torch.cat((seen, asked)).max()) + 1, int(train.labels.max()) + 1)
    counts.index_put_((seen, train.labels), torch.ones(len(train)), accumulate=True)
    return float((counts.argmax(1)[asked] == test.labels).double().mean())


def splits_of(tokens: Tensor, keep: Tensor | None, labels: Tensor, sizes: tuple[int, int, int]) -> list[Split]:
    """Train, validation and test of the given sizes, in this order."""
    if sum(sizes) > len(labels):
        raise ValueError(f"sizes: {sizes} came, {len(labels)} examples are there")
    parts, start = [], 0
    for size in sizes:
        rows = slice(start, start + size)
        parts.append(Split(tokens[rows], None if keep is None else keep[rows], labels[rows]))
        start += size
    return parts
