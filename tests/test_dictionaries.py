"""Dictionaries: unit columns, orthonormal where they say so, determinism, errors."""

import math

import pytest
import torch

from csat_ext.dictionaries import DICTIONARIES, dictionary

F64 = torch.float64
SQUARE = sorted(name for name, kind in DICTIONARIES.items() if kind.square)


def test_the_registry():
    assert sorted(DICTIONARIES) == ["dct", "haar", "identity", "learned", "overcomplete", "random"]
    assert SQUARE == ["dct", "haar", "identity"]
    assert all(len(kind.summary) > 20 for kind in DICTIONARIES.values())


@pytest.mark.parametrize("kind", sorted(DICTIONARIES))
@pytest.mark.parametrize("dim", [1, 2, 7, 64])
def test_columns_have_norm_one(kind, dim):
    psi = dictionary(kind, dim, dtype=F64)
    assert psi.shape == (dim, 2 * dim if kind == "overcomplete" else dim)
    assert psi.is_contiguous()
    torch.testing.assert_close(psi.norm(dim=0), torch.ones(psi.shape[1], dtype=F64), rtol=1e-14, atol=0)


@pytest.mark.parametrize("kind", [*SQUARE, "learned"])
@pytest.mark.parametrize("dim", [1, 2, 3, 24, 64])
def test_square_ones_are_orthonormal(kind, dim):
    psi = dictionary(kind, dim, dtype=F64)
    for gram in (psi.T @ psi, psi @ psi.T):
        torch.testing.assert_close(gram, torch.eye(dim, dtype=F64), rtol=0, atol=1e-14)


@pytest.mark.parametrize(("dim", "atoms"), [(8, 16), (8, 13), (8, 40), (3, 4)])
def test_overcomplete_is_a_tight_frame(dim, atoms):
    psi = dictionary("overcomplete", dim, atoms, dtype=F64)
    if atoms == 2 * dim:
        torch.testing.assert_close(psi @ psi.T, 2 * torch.eye(dim, dtype=F64), rtol=0, atol=1e-13)
        coherence = (psi.T @ psi - torch.eye(atoms, dtype=F64)).abs().max()
        assert coherence <= math.sqrt(2 / dim) + 1e-12
    assert torch.linalg.matrix_rank(psi) == dim


def test_random_columns_depend_on_their_number_alone():
    few, many = (dictionary("random", 16, atoms, seed=5, dtype=F64) for atoms in (4, 30))
    assert torch.equal(few, many[:, :4])
    assert not torch.equal(few, dictionary("random", 16, 4, seed=6, dtype=F64))
    coherence = (many.T @ many - torch.eye(30, dtype=F64)).abs().max()
    assert coherence < 0.9


def test_learned_starts_at_the_identity_or_at_what_fits():
    assert torch.equal(dictionary("learned", 6), torch.eye(6))
    assert torch.equal(dictionary("learned", 6, 12), dictionary("overcomplete", 6, 12))
    assert torch.equal(dictionary("learned", 6, 3, seed=2), dictionary("random", 6, 3, seed=2))


def test_values_do_not_depend_on_torch_state():
    before = dictionary("overcomplete", 8)
    torch.set_default_dtype(torch.bfloat16)
    try:
        after = dictionary("overcomplete", 8)
    finally:
        torch.set_default_dtype(torch.float32)
    assert torch.equal(before, after)
    assert torch.equal(dictionary("dct", 8, dtype=torch.bfloat16), dictionary("dct", 8, dtype=F64).to(torch.bfloat16))


@pytest.mark.parametrize(
    ("arguments", "options", "error", "message"),
    [
        (("fourier", 8), {}, ValueError, "kind must be one of .*fourier"),
        (("dct", 0), {}, ValueError, "dim must be at least 1"),
        (("dct", 8.0), {}, TypeError, "dim must be an int"),
        (("dct", 8, 9), {}, ValueError, "atoms must equal dim = 8"),
        (("overcomplete", 8, 8), {}, ValueError, "atoms must exceed dim = 8"),
        (("random", 8, 0), {}, ValueError, "atoms must be at least 1"),
        (("random", 8), {"seed": -1}, ValueError, "seed"),
        (("identity", 8), {"dtype": torch.int64}, TypeError, "dtype"),
    ],
)
def test_bad_input_is_named(arguments, options, error, message):
    with pytest.raises(error, match=message):
        dictionary(*arguments, **options)
