"""Counter-based random bits: Philox4x32-10 (Salmon et al., "Parallel Random Numbers: As Easy as 1, 2, 3", SC 2011).

A draw is a pure function of its coordinates, so a measurement matrix needs no storage: any device, rank or length gives
the same column. Nothing here touches torch's generators, and everything is int64 arithmetic on 32-bit words, so the
bits are equal on every device; `torch.compile` takes it with symbolic sizes.

Generator version 1 (`GENERATOR_VERSION`), which a checkpoint stores beside its seed:

- key = the 64-bit seed, low word first,
- counter = (position, row, head, layer), one 32-bit word each, in this order,
- `uniform`, `normal` and `sign` read the four output words as their docstrings say.

The floating-point draws are float64. `uniform` and `sign` are exact and equal everywhere; `normal` goes through log and
cos, whose last bit may differ between devices (the cast to float32 hides nearly all of it).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

GENERATOR_VERSION = 1

_ROUNDS = 10
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_WEYL = (0x9E3779B9, 0xBB67AE85)
_WORD = 0xFFFFFFFF

_CPU_CHUNK = 2**16  # draws at a time: the dozen temporaries of a round stay in the cache

Words = tuple[Tensor, Tensor, Tensor, Tensor]


def philox_bits(seed: int, layer: int | Tensor, head: int | Tensor, row: int | Tensor, position: int | Tensor) -> Words:
    """Four words of random bits for every coordinate.

    Args:
        seed: the key, 0 <= seed < 2**64.
        layer, head, row, position: the counter: ints or integer tensors that broadcast against each other, values in
            [0, 2**32). The values of a tensor are not looked at (that would wait for the device).

    Returns:
        Four int64 tensors of the broadcast shape (0-dimensional for four ints), values in [0, 2**32).

    Raises:
        TypeError: a coordinate or the seed is not an integer.
        ValueError: an int is out of its range.
    """
    check_unsigned("seed", seed, 64)
    coordinates = {"position": position, "row": row, "head": head, "layer": layer}
    counter = [_as_word(name, value) for name, value in coordinates.items()]
    words = _philox(*counter, seed & _WORD, seed >> 32)
    return words[0], words[1], words[2], words[3]


# An operator of its own, because Inductor inlines elementwise graphs: each round reads its words twice, so ten rounds
# would unfold into more than a million operations and compile for minutes.
@torch.library.custom_op("csat_ext::philox", mutates_args=())
def _philox(c0: Tensor, c1: Tensor, c2: Tensor, c3: Tensor, k0: int, k1: int) -> Tensor:
    """(4, ...) int64 words from counter words that broadcast and the two key words."""
    like = c0 ^ c1 ^ c2 ^ c3
    # What lies elsewhere is a number (`_as_word`): said to the device anew, for a copy would wait for it.
    counter = [word if word.device == like.device else like.new_full((), word.item()) for word in (c0, c1, c2, c3)]
    counter = [word.expand_as(like).reshape(-1) for word in counter]
    words = like.new_empty((4, like.numel()))
    size = _CPU_CHUNK if like.device.type == "cpu" else max(like.numel(), 1)
    for start in range(0, like.numel(), size):
        part = slice(start, start + size)
        for word, value in zip(words, _rounds([word[part] for word in counter], k0, k1), strict=True):
            word[part] = value
    return words.reshape(4, *like.shape)


def _rounds(counter: list[Tensor], k0: int, k1: int) -> list[Tensor]:
    c0, c1, c2, c3 = counter
    for _ in range(_ROUNDS):
        high0, low0 = _multiply(_MULTIPLIERS[0], c0)
        high1, low1 = _multiply(_MULTIPLIERS[1], c2)
        c0, c1, c2, c3 = high1 ^ c1 ^ k0, low1, high0 ^ c3 ^ k1, low0
        k0, k1 = (k0 + _WEYL[0]) & _WORD, (k1 + _WEYL[1]) & _WORD
    return [c0, c1, c2, c3]


@_philox.register_fake
def _(c0: Tensor, c1: Tensor, c2: Tensor, c3: Tensor, k0: int, k1: int) -> Tensor:
    word = c0 ^ c1 ^ c2 ^ c3
    return word.new_empty((4, *word.shape))


def uniform(high: Tensor, low: Tensor) -> Tensor:
    """Two words to a float64 in the open interval (0, 1): (x + 1/2) / 2**52 with x their leading 52 bits. Exact."""
    return ((high << 20 | low >> 12).to(torch.float64) + 0.5) * 2.0**-52


def normal(words: Words) -> Tensor:
    """Four words to a float64 N(0, 1) draw (Box-Muller): sqrt(-2 ln u) cos(2 pi v), u from words 0, 1, v from 2, 3."""
    radius = torch.sqrt(-2.0 * torch.log(uniform(words[0], words[1])))
    return radius * torch.cos(2.0 * math.pi * uniform(words[2], words[3]))


def sign(words: Words) -> Tensor:
    """Four words to an int64 +1 or -1: minus where the leading bit of word 0 is set."""
    return 1 - 2 * (words[0] >> 31)


def _multiply(constant: int, word: Tensor) -> tuple[Tensor, Tensor]:
    """High and low word of a 32 x 32 bit product, through 16-bit halves so that no int64 overflows."""
    first = constant * (word & 0xFFFF)
    second = constant * (word >> 16) + (first >> 16)
    return second >> 16, (second & 0xFFFF) << 16 | first & 0xFFFF


def _as_word(name: str, value: int | Tensor) -> Tensor:
    if isinstance(value, Tensor):
        if value.dtype.is_floating_point or value.dtype.is_complex or value.dtype == torch.bool:
            raise TypeError(f"{name} must be an int or an integer tensor, got a tensor of {value.dtype}")
        return value.to(torch.int64)
    check_unsigned(name, value, 32)
    # A 0-dimensional CPU tensor takes part in arithmetic with tensors of any device.
    return torch.scalar_tensor(value, dtype=torch.int64, device="cpu")


def check_unsigned(name: str, value: int, bits: int) -> None:
    """TypeError unless value is an int, ValueError unless 0 <= value < 2**bits; both name it."""
    if isinstance(value, bool) or not isinstance(value, (int, torch.SymInt)):
        raise TypeError(f"{name} must be an int, got {type(value).__name__}")
    if not 0 <= value < 2**bits:
        raise ValueError(f"{name} must be in [0, 2**{bits}), got {value}")
