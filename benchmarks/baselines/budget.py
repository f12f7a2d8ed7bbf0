"""The sizes that every baseline gets: equal shapes, and one number m for what each of them compresses to."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Budget:
    """Attributes:
    tokens, heads, width: N, H and D of q, k, v.
    m: rows of Linformer's projections, features of Performer, landmarks of Nystromformer, keys in Longformer's window,
        measurements of the stock composition.
    seed: of what a method draws.
    """

    tokens: int
    heads: int
    width: int
    m: int
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("tokens", "heads", "width", "m"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}: {getattr(self, name)} came, at least 1 is accepted")
        if self.m > self.tokens:
            raise ValueError(f"m: {self.m} came, at most the {self.tokens} tokens are accepted")
