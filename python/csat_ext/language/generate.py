"""Text from a prompt, byte by byte, through the caches of the model's attention."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from csat_ext.language.model import LanguageModel


@dataclass(frozen=True)
class Generated:
    """The new bytes, and the memory of all caches after the last of them."""

    text: bytes
    cache_bytes: int


@torch.no_grad()
def generate(model: LanguageModel, prompt: bytes, count: int, temperature: float = 0.0, seed: int = 0) -> Generated:
    """Continues a prompt by `count` bytes: the caches take up the prompt at once, then every new byte.

    Args:
        model: in evaluation mode.
        prompt: at least one byte.
        count: how many bytes, at least 1.
        temperature: logits are divided by it before a byte is drawn; 0 takes the most probable byte.
        seed: of the draws.

    Raises:
        ValueError: naming the argument that is out of range.
    """
    if not prompt:
        raise ValueError("prompt: '' came, at least one byte is accepted")
    if count < 1:
        raise ValueError(f"bytes: {count} came, at least 1 is accepted")
    if not (math.isfinite(temperature) and temperature >= 0):
        raise ValueError(f"temperature: {temperature} came, a finite number of at least 0 is accepted")
    draws = torch.Generator().manual_seed(seed)
    device = model.embedding.weight.device
    caches, text, tokens = model.new_caches(), bytearray(), torch.tensor([list(prompt)])
    for _ in range(count):
        logits = model.logits(tokens.to(device), caches)[0, -1]
        text.append(_next(logits.float().cpu(), temperature, draws))
        tokens = torch.tensor([[text[-1]]])
    return Generated(bytes(text), sum(cache.nbytes for cache in caches))


def _next(logits: Tensor, temperature: float, draws: torch.Generator) -> int:
    if temperature == 0:
        return int(logits.argmax())
    return int(torch.multinomial(torch.softmax(logits / temperature, -1), 1, generator=draws))
