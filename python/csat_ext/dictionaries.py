"""Dictionaries Psi (Dv, P): the features of an output row as combinations of P atoms, its columns, all of norm 1.

Square ones (P = Dv) are orthonormal, so the decoder can start as the identity; the others have P > Dv or any P >= 1 and
need a threshold to pick among their atoms. Values are made in float64 and cast last; randomness is `csat_ext.philox`.

To add one: a function from `Atoms`, decorated with `@_register(name, square=..)`.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from csat_ext import philox
from csat_ext.measurements import dct_rows, haar_rows, resolve_device

# The counter's layer word for dictionaries: no attention layer has this number, so no Phi shares its draws.
_LAYER = 2**32 - 1


@dataclass(frozen=True)
class Atoms:
    """What a builder knows: features dim, atoms (columns), seed of random ones, and the device."""

    dim: int
    atoms: int
    seed: int
    device: torch.device

    def index(self, size: int) -> Tensor:
        """(size, 1) int64: 0 .. size - 1."""
        return torch.arange(size, dtype=torch.int64, device=self.device)[:, None]


@dataclass(frozen=True)
class Dictionary:
    """One way to make a Psi. square: P = Dv, orthonormal; summary: its docstring; default_atoms: P from Dv."""

    name: str
    square: bool
    summary: str
    default_atoms: Callable[[int], int]
    build: Callable[[Atoms], Tensor]


DICTIONARIES: dict[str, Dictionary] = {}

_Build = Callable[[Atoms], Tensor]


def _register(name: str, *, square: bool, redundancy: int = 1) -> Callable[[_Build], _Build]:
    def register(build: _Build) -> _Build:
        DICTIONARIES[name] = Dictionary(name, square, build.__doc__ or "", lambda dim: redundancy * dim, build)
        return build

    return register


def dictionary(
    kind: str,
    dim: int,
    atoms: int | None = None,
    *,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str | None = None,
) -> Tensor:
    """Psi of shape (dim, atoms).

    Args:
        kind: a name in `DICTIONARIES`: "identity", "dct", "haar" (orthonormal, atoms = dim), "random", "overcomplete",
            "learned".
        dim: Dv >= 1, features of an output row.
        atoms: P >= 1; None is dim, or 2 dim for "overcomplete".
        seed: of the random ones, 0 <= seed < 2**64.
        dtype: floating point. device: None is torch's default device.

    Raises:
        ValueError: an unknown kind, a size below 1, atoms that the kind cannot have.
        TypeError: a size that is no int, a dtype that is not floating point.
    """
    if kind not in DICTIONARIES:
        raise ValueError(f"kind must be one of {sorted(DICTIONARIES)}, got {kind!r}")
    chosen = DICTIONARIES[kind]
    _check_size("dim", dim)
    philox.check_unsigned("seed", seed, 64)
    if atoms is None:
        atoms = chosen.default_atoms(dim)
    _check_size("atoms", atoms)
    if chosen.square and atoms != dim:
        raise ValueError(f"atoms must equal dim = {dim} for the orthonormal kind {kind!r}, got {atoms}")
    if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
        raise TypeError(f"dtype must be a floating-point torch.dtype, got {dtype!r}")
    return chosen.build(Atoms(dim, atoms, seed, resolve_device(device))).to(dtype).contiguous()


@_register("identity", square=True)
def _identity(size: Atoms) -> Tensor:
    """Psi = I: sparsity in the features themselves."""
    return (size.index(size.dim) == size.index(size.dim).T).to(torch.float64)


@_register("dct", square=True)
def _dct(size: Atoms) -> Tensor:
    """Orthonormal DCT, column j of frequency j. Sparse for smooth rows, which a network's features are not."""
    return dct_rows(size.index(size.dim), size.dim, size.index(size.dim)[:, 0]).T


@_register("haar", square=True)
def _haar(size: Atoms) -> Tensor:
    """Orthonormal Haar wavelets of any dim, coarse to fine: sparse for piecewise constant rows."""
    return haar_rows(size.index(size.dim), size.dim, size.index(size.dim)[:, 0]).T


@_register("random", square=False)
def _random(size: Atoms) -> Tensor:
    """Independent Gaussian columns of norm 1, of any number. Column j depends on (seed, j, dim) alone."""
    words = philox.philox_bits(size.seed, _LAYER, 0, size.index(size.dim), size.index(size.atoms).T)
    columns = philox.normal(words)
    return columns / columns.norm(dim=0, keepdim=True)


@_register("overcomplete", square=False, redundancy=2)
def _overcomplete(size: Atoms) -> Tensor:
    """DCT atoms beside the identity for atoms = 2 dim, an oversampled DCT for any other number above dim.

    The first is a tight frame of coherence at most sqrt(2 / dim); neighbours of the second (frequencies j dim / atoms)
    grow alike as atoms grows.
    """
    if size.atoms <= size.dim:
        raise ValueError(f"atoms must exceed dim = {size.dim} for the kind 'overcomplete', got {size.atoms}")
    if size.atoms == 2 * size.dim:
        return torch.cat([_dct(size), _identity(size)], dim=1)
    odd = 2 * size.index(size.dim) + 1
    angle = (odd * size.index(size.atoms).T % (4 * size.atoms)).to(torch.float64) * (math.pi / (2 * size.atoms))
    columns = torch.cos(angle)
    return columns / columns.norm(dim=0, keepdim=True)


@_register("learned", square=False)
def _learned(size: Atoms) -> Tensor:
    """Initial value of a learned Psi: the identity where atoms = dim, `overcomplete` for more, `random` for fewer."""
    if size.atoms == size.dim:
        return _identity(size)
    return _overcomplete(size) if size.atoms > size.dim else _random(size)


def _check_size(name: str, value: int) -> None:
    philox.check_unsigned(name, value, 32)
    if value < 1:
        raise ValueError(f"{name} must be at least 1, got {value}")
