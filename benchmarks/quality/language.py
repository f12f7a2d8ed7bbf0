"""Language models over bytes: causal ones, and masked ones for attention that has no causal form (the paper's Table 1).

Bits per byte of the test text: causal, of every byte from those before it in its window; masked, of the bytes that were
hidden, from the others of the window. What is hidden are runs of `RUN` bytes, about `HIDDEN` of all (Devlin et al. 2019
hide 15 % of the words, Joshi et al. 2020 runs of them): the more are asked for, the fewer steps does it take until a
small model knows more than the frequencies of bytes.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, max_pool1d

from csat_ext.language import data
from csat_ext.language.model import BYTES, waves
from csat_ext.language.train import single_byte_bits

from .corpus import Text
from .model import Layer, Size, Trunk
from .task import Task

MASK = BYTES
HIDDEN, RUN = 0.3, 2


class ByteModel(nn.Module):
    """The trunk, its positions starting as sines and cosines, and a linear layer: (B, N) -> logits (B, N, 256)."""

    def __init__(self, layer: Layer, size: Size, hidden: int, tokens: int, seed: int) -> None:
        super().__init__()
        self.trunk = Trunk(layer, size, hidden, tokens, BYTES + 1, seed)
        with torch.no_grad():
            self.trunk.positions.copy_(waves(0, tokens, size.width))
        self.head = nn.Linear(size.width, BYTES)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(self.trunk(tokens))


def hidden_bytes(shape: tuple[int, int], generator: torch.Generator) -> Tensor:
    """Which bytes are hidden, (B, N) bool: runs begin anywhere, so that a byte is hidden with probability `HIDDEN`."""
    batch, tokens = shape
    begins = torch.rand(batch, 1, tokens + RUN - 1, generator=generator) < 1 - (1 - HIDDEN) ** (1 / RUN)
    return max_pool1d(begins.float(), RUN, 1)[:, 0] > 0


@dataclass(frozen=True)
class Language(Task):
    """Attributes:
    context: bytes of a window.
    causal: predict every byte from those before it, or those hidden from the others.
    judged: bytes of the validation and of the test text that are scored, the first ones.
    """

    text: Text
    context: int
    causal: bool
    judged: int

    lower_is_better = True
    worst = math.log2(BYTES)

    @property
    def name(self) -> str:
        return "language" if self.causal else "masked-language"

    @property
    def about(self) -> str:
        return self.text.about

    def _parts(self) -> tuple[Tensor, Tensor]:
        """The validation and the test text, as far as they are scored."""
        return self.text.validation[: self.judged], self.text.test[: self.judged]

    def facts(self) -> dict[str, Any]:
        validation, test = self._parts()
        single = single_byte_bits(data.Text(self.text.train, test, self.text.sha256))
        return {
            "tokens": self.context,
            "bytes": [len(self.text.train), len(validation), len(test)],
            "sha256": self.text.sha256,
            "single bytes": round(single, 4),
        }

    def to(self, device: torch.device | str) -> Language:
        parts = {name: getattr(self.text, name).to(device) for name in ("train", "validation", "test")}
        return replace(self, text=replace(self.text, **parts))

    def model(self, layer: Layer, size: Size, hidden: int, seed: int) -> ByteModel:
        if self.causal and size.taps:
            raise ValueError(f"taps: {size.taps} came, a causal model takes 0: it would see what it is asked for")
        return ByteModel(layer, size, hidden, self.context, seed)

    def batches(self, steps: int, batch: int, seed: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Windows that begin anywhere in the training text."""
        generator, train = torch.Generator().manual_seed(seed), self.text.train
        reach = torch.arange(self.context + 1)
        for _ in range(steps):
            starts = torch.randint(0, len(train) - self.context, (batch, 1), generator=generator)
            yield self.question(train[(starts + reach).to(train.device)].long(), generator)

    def question(self, windows: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Windows (B, context + 1) -> what the model sees and what it has to say, (B, context); -100: nothing."""
        if self.causal:
            return windows[:, :-1], windows[:, 1:]
        whole = windows[:, :-1]
        hidden = hidden_bytes((len(whole), self.context), generator).to(whole.device)
        return whole.masked_fill(hidden, MASK), whole.masked_fill(~hidden, -100)

    def loss(self, model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        return self._nats(model, batch, "mean")

    def _nats(self, model: nn.Module, batch: tuple[Tensor, Tensor], reduction: str) -> Tensor:
        seen, said = batch
        return cross_entropy(model(seen).float().flatten(0, 1), said.flatten(), reduction=reduction)

    def scores(self, model: nn.Module, batch: int) -> dict[str, Any]:
        validation, test = (self.bits_per_byte(model, part, batch) for part in self._parts())
        return {"validation": validation, "test": test}

    def bits_per_byte(self, model: nn.Module, text: Tensor, batch: int) -> float:
        """Mean over the bytes asked for in consecutive windows; what is hidden is the same for every model."""
        generator = torch.Generator().manual_seed(0)
        total = count = 0.0
        for windows in text.unfold(0, self.context + 1, self.context).split(batch):
            question = self.question(windows.long(), generator)
            total += float(self._nats(model, question, "sum"))
            count += int((question[1] >= 0).sum())
        return total / count / math.log(2)
