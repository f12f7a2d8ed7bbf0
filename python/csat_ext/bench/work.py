"""Floating-point operations and least bytes of every op: the floor of any implementation.

As the formulas of docs/architecture.md count them, not as kernels pad them. Bytes are those of an implementation that
keeps the probabilities, the iterates and A out of memory, each tensor read or written once.
"""

from __future__ import annotations

from dataclasses import dataclass

CAUSAL_RATIO = 16
"""Tokens for each measurement of a block in the problems of attend_causal, whose blocks have m tokens."""


@dataclass(frozen=True)
class Sizes:
    """pairs: B H. n, m, d: tokens, measurements, D = R = Dv. atoms, layers: P and T of the decoder, its S and B tied.

    For attend_causal m is the size of a block, of which `CAUSAL_RATIO` tokens share a measurement; the window is empty.
    attend_prefix is counted as one pass over the tokens with a running state; every pair has a phi and its gradient.
    size: bytes of a number; Phi and the decoder are shared by all pairs. psi: whether the dictionary is a matrix, False
    for the identity.
    """

    pairs: int
    n: int
    m: int
    d: int
    atoms: int
    layers: int
    size: int = 2
    psi: bool = True


@dataclass(frozen=True)
class Work:
    flops: float
    moved: float

    def __add__(self, other: Work) -> Work:
        return Work(self.flops + other.flops, self.moved + other.moved)

    @property
    def intensity(self) -> float:
        """FLOPs for every byte."""
        return self.flops / self.moved


def _lista(s: Sizes) -> float:
    """FLOPs of one pair: B z in every layer, S a in every layer but the first, where a is 0, and psi a once."""
    return 2 * s.n * (s.layers * s.atoms * s.d + (s.layers - 1) * s.atoms * s.atoms) + _synthesis(s)


def _synthesis(s: Sizes) -> float:
    return 2 * s.n * s.d * s.atoms if s.psi else 0.0


def causal_block(m: int) -> int:
    """Measurements of a block of m tokens."""
    return max(m // CAUSAL_RATIO, 1)


def causal_scores(n: int, m: int) -> int:
    """Scores of n queries over the measurements of finished blocks of m tokens and the tokens of their own."""
    blocks, rest = divmod(n, m)
    near = blocks * m * (m + 1) // 2 + rest * (rest + 1) // 2
    far = causal_block(m) * (m * blocks * (blocks - 1) // 2 + rest * blocks)
    return near + far


def work(op: str, s: Sizes) -> Work:
    """Of one op over all pairs. "measure" is project of k and of v in one pass over Phi; "..._backward" is with respect
    to the tensors, Phi being fixed; that of decode recomputes the iterates, not the output; "project_<ensemble>" has no
    Phi in memory.

    Raises:
        KeyError: an unknown op.
    """
    row, measured, lse = s.n * s.d, s.m * s.d, 4 * s.n
    weights = s.atoms * s.atoms + (2 if s.psi else 1) * s.atoms * s.d
    product, phi, decoder = 2 * s.m * row, s.m * s.n, weights / s.pairs
    scores, blocks = 2 * causal_scores(s.n, s.m) * s.d, s.n // s.m * causal_block(s.m) * s.d
    transforms = 10 * -(-s.m // 512) + s.m / 1024
    counts = {
        "project": (product, s.size * (row + measured + phi / s.pairs)),
        "project_backward": (product, s.size * (row + measured + phi / s.pairs)),
        "measure": (2 * product, s.size * (2 * row + 2 * measured + phi / s.pairs)),
        "measure_backward": (2 * product, s.size * (2 * row + 2 * measured + phi / s.pairs)),
        "project_pool": (row, s.size * (row + measured)),
        "project_srht": (row * transforms, s.size * (row + measured)),
        "project_rademacher": (product, s.size * (row + measured)),
        "attend": (2 * product, s.size * (2 * row + 2 * measured) + lse),
        "attend_backward": (5 * product, s.size * (4 * row + 4 * measured) + lse),
        "attend_causal": (2 * scores, s.size * (4 * row + 2 * blocks) + lse),
        "attend_causal_backward": (5 * scores, s.size * (8 * row + 4 * blocks) + lse),
        "attend_prefix": (4 * product, s.size * (4 * row + phi) + lse),
        "attend_prefix_backward": (11 * product, s.size * (7 * row + phi) + 4 * phi + lse),
        "attend_prefix_decode": (4 * product + _lista(s), s.size * (5 * row + phi + decoder) + lse),
        "decode": (_lista(s), s.size * (2 * row + decoder)),
        "decode_backward": (3 * _lista(s) - _synthesis(s), s.size * 3 * row + 4 * decoder),
        "attend_decode": (2 * product + _lista(s), s.size * (3 * row + 2 * measured + decoder) + lse),
    }
    flops, moved = counts[op]
    return Work(s.pairs * flops, s.pairs * moved)
