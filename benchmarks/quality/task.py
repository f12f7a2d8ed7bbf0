"""What a classification task is: rows of small integers, which of them count, and a label for each row."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


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


@dataclass(frozen=True)
class Task:
    """Attributes:
    vocabulary: tokens are below it.
    about: what it is, for the reader of a table.
    """

    name: str
    about: str
    classes: int
    vocabulary: int
    train: Split
    validation: Split
    test: Split

    @property
    def tokens(self) -> int:
        return self.train.tokens.shape[1]

    def majority(self) -> float:
        """Accuracy on the test split of the label that is most frequent in the train split."""
        label = self.train.labels.bincount(minlength=self.classes).argmax()
        return float((self.test.labels == label).double().mean())


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
