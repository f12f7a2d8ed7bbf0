"""ListOps (Nangia and Bowman 2018) with the settings of the Long Range Arena (Tay et al. 2021): nested MIN, MAX, MED
and SM (sum modulo 10) of digits, the label being the value.

A node is an operator with probability 1/4 above the greatest depth, else a digit; an operator has 2 to `arguments`
arguments. MED is the median, rounded towards 0. As in LRA the parentheses of the binary tree are left out, a length
is the number of digits, operators and closing brackets, expressions outside the lengths are drawn anew, and no
expression is there twice.
"""

from __future__ import annotations

import csv
import random
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from .classification import Classification, Split, most_frequent, splits_of

OPERATORS = ("MIN", "MAX", "MED", "SM")
PADDING, DIGIT, OPEN = 0, 1, 11
"""Tokens: 0 padding, 1 + digit, 11 + operator, 15 the closing bracket."""
CLOSE = OPEN + len(OPERATORS)
NESTED = 0.25
SYMBOLS = {
    **{str(digit): DIGIT + digit for digit in range(10)},
    **{f"[{operator}": OPEN + i for i, operator in enumerate(OPERATORS)},
    "]": CLOSE,
}
FILES = ("basic_train.tsv", "basic_val.tsv", "basic_test.tsv")


@dataclass(frozen=True)
class Sizes:
    """LRA's: depth and number of arguments at most, length in between (both excluded)."""

    depth: int = 10
    arguments: int = 10
    shortest: int = 500
    longest: int = 2000


def value_of(operator: str, arguments: list[int]) -> int:
    if operator == "SM":
        return sum(arguments) % 10
    return {"MIN": min, "MAX": max, "MED": lambda a: int(statistics.median(a))}[operator](arguments)


def expression(rng: random.Random, sizes: Sizes, depth: int = 1) -> tuple[list[int], int]:
    """Tokens and value of a random expression; one longer than `sizes.longest` is cut off, with a value that is not
    its own."""
    if depth >= sizes.depth or rng.random() >= NESTED:
        digit = rng.randrange(10)
        return [DIGIT + digit], digit
    tokens, values = [0], []
    for _ in range(rng.randint(2, sizes.arguments)):
        inner, value = expression(rng, sizes, depth + 1)
        tokens += inner
        values.append(value)
        if len(tokens) >= sizes.longest:
            break
    operator = rng.randrange(len(OPERATORS))
    tokens[0] = OPEN + operator
    return [*tokens, CLOSE], value_of(OPERATORS[operator], values)


def padded(expressions: Sequence[Sequence[int]], longest: int) -> torch.Tensor:
    """(count, longest) uint8."""
    rows = torch.full((len(expressions), longest), PADDING, dtype=torch.uint8)
    for row, tokens in zip(rows, expressions, strict=True):
        row[: len(tokens)] = torch.tensor(tokens, dtype=torch.uint8)
    return rows


def listops(sizes: Sizes, counts: tuple[int, int, int], seed: int = 0) -> Classification:
    """Train, validation and test examples, all different."""
    rng = random.Random(seed)
    drawn: dict[tuple[int, ...], int] = {}
    while len(drawn) < sum(counts):
        tokens, value = expression(rng, sizes)
        if sizes.shortest < len(tokens) < sizes.longest:
            drawn[tuple(tokens)] = value
    rows = padded(list(drawn), sizes.longest)
    about = (
        f"ListOps, depth {sizes.depth}, 2 to {sizes.arguments} arguments, {sizes.shortest} to {sizes.longest} tokens"
        f"{' (the settings of LRA)' if sizes == Sizes() else ' (easier than the settings of LRA)'}"
    )
    return _task(about, splits_of(rows, rows != PADDING, torch.tensor(list(drawn.values())), counts))


def lra_listops(folder: Path, counts: tuple[int, int, int]) -> Classification:
    """The first examples of LRA's own files.

    Raises:
        ValueError: a file is not there, is another or has too few examples.
    """
    parts, longest = [], Sizes().longest
    for name, count in zip(FILES, counts, strict=True):
        sources, labels = _read(folder / name, count)
        rows = padded(sources, longest)
        parts += splits_of(rows, rows != PADDING, torch.tensor(labels), (count, 0, 0))[:1]
    return _task("ListOps, the files of LRA", parts)


def _task(about: str, parts: list[Split]) -> Classification:
    """What the first operator alone tells of the value stands beside the scores: MIN is often 0, MAX often 9."""
    train, _, test = parts
    first = most_frequent(train, test, lambda part: part.tokens[:, 0].long())
    references = {"the most frequent label beside the first operator": first}
    return Classification("listops", about, 10, CLOSE + 1, *parts, references)


def _read(path: Path, count: int) -> tuple[list[list[int]], list[int]]:
    """Tokens and values of the first lines after the head, the parentheses left out."""
    sources, labels = [], []
    try:
        with path.open(newline="") as lines:
            for row in csv.DictReader(lines, delimiter="\t"):
                sources.append([SYMBOLS[word] for word in row["Source"].split() if word not in "()"])
                labels.append(int(row["Target"]))
                if len(labels) == count:
                    break
    except OSError as error:
        raise ValueError(f"{path.name}: not in {path.parent} ({error.strerror})") from None
    except KeyError as error:
        raise ValueError(
            f"{path.name}: {error} came; a head Source, Target and ListOps below it are accepted"
        ) from None
    return sources, labels
