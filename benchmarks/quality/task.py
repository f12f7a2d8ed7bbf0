"""What a table trains on: data, the model that they need, and the figures that the model is judged by."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from .model import Layer, Size


class Task(ABC):
    """Attributes:
    name: of the task.
    about: what it is, for the reader of a table.
    lower_is_better: of two scores.
    worst: score of a run whose loss became no number.
    """

    name: str
    about: str
    lower_is_better: bool = False
    worst: float = 0.0

    @abstractmethod
    def facts(self) -> dict[str, Any]:
        """What the result file says of the data; runs on other facts are not put into one file."""

    @abstractmethod
    def to(self, device: torch.device | str) -> Task:
        """The task with its data on a device."""

    @abstractmethod
    def model(self, layer: Layer, size: Size, hidden: int, seed: int) -> nn.Module:
        """The model with a form of attention and MLPs of that hidden width; `seed` is that of what a layer draws."""

    @abstractmethod
    def batches(self, steps: int, batch: int, seed: int) -> Iterator[Any]:
        """What every step trains on, by the seed alone."""

    @abstractmethod
    def loss(self, model: nn.Module, batch: Any) -> Tensor:
        """The scalar that a step lowers."""

    @abstractmethod
    def scores(self, model: nn.Module, batch: int) -> dict[str, Any]:
        """`validation`, which chooses the rate, `test`, and whatever else the table shows; nothing is learnt."""
