"""The generator: published answers, independence of shape and global state, and the distributions drawn from it."""

import math

import pytest
import torch
import torch.fx.experimental.proxy_tensor

from csat_ext import philox
from csat_ext.philox import philox_bits

ONES = 0xFFFFFFFF

# Random123 kat_vectors, philox4x32 with 10 rounds: counter, key, answer.
KNOWN = [
    ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    ((ONES,) * 4, (ONES, ONES), (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xA4093822, 0x299F31D0),
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
]


@pytest.mark.parametrize(("counter", "key", "answer"), KNOWN)
def test_random123_known_answers(counter, key, answer):
    position, row, head, layer = counter
    words = philox_bits(key[0] | key[1] << 32, layer, head, row, position)
    assert tuple(int(word) for word in words) == answer


def _python_philox(counter, key):
    """The generator over plain Python integers, from the paper's definition."""
    c, k = list(counter), list(key)
    for _ in range(10):
        p0, p1 = 0xD2511F53 * c[0], 0xCD9E8D57 * c[2]
        c = [(p1 >> 32) ^ c[1] ^ k[0], p1 & ONES, (p0 >> 32) ^ c[3] ^ k[1], p0 & ONES]
        k = [(k[0] + 0x9E3779B9) & ONES, (k[1] + 0xBB67AE85) & ONES]
    return c


def test_tensors_agree_with_python_integers_and_broadcast():
    heads, rows, positions = torch.tensor([0, 7])[:, None, None], torch.tensor([1, ONES, 5])[:, None], torch.arange(4)
    words = philox_bits(2**64 - 3, 9, heads, rows, positions)
    assert all(word.shape == (2, 3, 4) and word.dtype == torch.int64 for word in words)
    for h, r, p in [(0, 0, 0), (1, 1, 3), (1, 2, 2)]:
        expected = _python_philox((p, int(rows[r]), int(heads[h]), 9), (2**32 - 3, ONES))
        assert [int(word[h, r, p]) for word in words] == expected


def test_it_is_one_operator_for_the_compiler():
    """Traced as its rounds, Inductor would unfold them into more than a million operations."""
    heads, rows, positions = torch.arange(2)[:, None, None], torch.arange(3)[:, None], torch.arange(5)
    torch.library.opcheck(torch.ops.csat_ext.philox.default, (positions, rows, heads, torch.tensor(7), 1, 2))
    traced = torch.fx.experimental.proxy_tensor.make_fx(lambda p: philox_bits(1, 0, 0, 0, p)[0])(positions)
    assert sum(node.target == torch.ops.csat_ext.philox.default for node in traced.graph.nodes) == 1
    assert not any("mul" in node.name for node in traced.graph.nodes)


def test_long_draws_are_those_of_their_parts():
    row = torch.arange(3)[:, None]
    long = torch.stack(philox_bits(1, 0, 0, row, torch.arange(50_000)))
    part = torch.stack(philox_bits(1, 0, 0, row, torch.arange(21_000, 22_000)))
    assert torch.equal(long[..., 21_000:22_000], part)
    assert torch.stack(philox_bits(1, 0, 0, 0, torch.arange(0))).shape == (4, 0)


def test_neither_global_seed_nor_default_dtype_matters():
    before = torch.stack(philox_bits(5, 0, 0, 0, torch.arange(9)))
    draws = philox.normal(philox_bits(5, 0, 0, 0, torch.arange(9)))
    state = torch.random.get_rng_state()
    torch.set_default_dtype(torch.bfloat16)
    try:
        torch.manual_seed(123)
        inner_state = torch.random.get_rng_state()
        assert torch.equal(torch.stack(philox_bits(5, 0, 0, 0, torch.arange(9))), before)
        again = philox.normal(philox_bits(5, 0, 0, 0, torch.arange(9)))
        assert torch.equal(torch.random.get_rng_state(), inner_state)
    finally:
        torch.set_default_dtype(torch.float32)
        torch.random.set_rng_state(state)
    assert again.dtype == torch.float64
    assert torch.equal(again, draws)


def test_distributions():
    words = philox_bits(1, 2, 3, 4, torch.arange(200_000))
    u, x, s = philox.uniform(words[0], words[1]), philox.normal(words), philox.sign(words)
    assert u.min() > 0
    assert u.max() < 1
    tolerance = 5 / math.sqrt(200_000)  # five standard errors of a unit-variance mean
    assert abs(u.mean() - 0.5) < tolerance * math.sqrt(1 / 12)
    assert abs(x.mean()) < tolerance
    assert abs(x.var() - 1) < tolerance * math.sqrt(2)
    assert abs((x**4).mean() - 3) < tolerance * math.sqrt(96)
    assert abs(s.double().mean()) < tolerance
    assert set(s.unique().tolist()) == {-1, 1}


def test_uniform_stays_open_at_both_ends():
    low, high = torch.tensor(0), torch.tensor(ONES)
    assert 0 < float(philox.uniform(low, low)) < 2**-52
    assert float(philox.uniform(high, high)) == 1 - 2**-53


@pytest.mark.parametrize("name", ["layer", "head", "row", "position"])
@pytest.mark.parametrize(
    ("value", "error"),
    [(-1, ValueError), (2**32, ValueError), (1.0, TypeError), (True, TypeError), (torch.ones(2), TypeError)],
)
def test_bad_coordinates(name, value, error):
    coordinates = {"layer": 0, "head": 0, "row": 0, "position": 0, name: value}
    with pytest.raises(error, match=name):
        philox_bits(0, **coordinates)


@pytest.mark.parametrize(("seed", "error"), [(-1, ValueError), (2**64, ValueError), (0.5, TypeError), ("1", TypeError)])
def test_bad_seed(seed, error):
    with pytest.raises(error, match="seed"):
        philox_bits(seed, 0, 0, 0, 0)
