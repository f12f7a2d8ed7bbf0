"""The decoding benchmark: bytes by formula, fillings, ratios of a fake clock; and the full cache beside it."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import pytest
import torch

sys.path.append(str(Path(__file__).resolve().parents[1] / "benchmarks"))
import decoding

from csat_ext.language.cache import KVCache

HEADS, WIDTH, N = 2, 4, 4 * decoding.BK


def test_filled_at_once_is_filled_token_by_token() -> None:
    decoding.check_filling(HEADS, WIDTH)


def test_a_filling_of_other_bytes_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    right = decoding.block
    monkeypatch.setattr(decoding, "block", lambda size, n, *shape: right(size, n + size if n else 0, *shape))
    with pytest.raises(AssertionError, match="block, Bk = 128: "):
        decoding.check_filling(HEADS, WIDTH)


def test_ratios_are_the_full_cache_over_each_form(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = {"full": iter((9.0, 8.0)), "block, Bk = 128": iter((2.0, 3.0)), "prefix": iter((1.0, 1.0))}
    clock["block, Bk = sqrt(r n)"] = iter((4.0, 4.0))
    monkeypatch.setattr(decoding, "seconds", lambda form, cache, tokens: next(clock[form]))
    arguments = argparse.Namespace(heads=HEADS, width=WIDTH, turns=2)
    row = decoding.row(N, decoding.measured(N, arguments))
    held = 2 * HEADS * WIDTH * 4  # key and value of a token
    finished = HEADS * decoding.R * (2 * WIDTH + 1) * 4  # what a finished block leaves
    assert decoding.least_work(N) == 64
    assert row["bytes"] == {
        "full": N * held,
        "block, Bk = 128": 4 * finished + 127 * held,  # the 128th token finishes the fifth block
        "block, Bk = sqrt(r n)": max(8 * finished + 63 * held, 9 * finished),
        "prefix": HEADS * decoding.M * (2 * WIDTH + 1) * 4,
    }
    over = {name: ratio["full time over it"] for name, ratio in row["ratios"].items()}
    assert over == {"block, Bk = 128": 4.0, "block, Bk = sqrt(r n)": 2.0, "prefix": 8.0}
    sizes = row["bytes"]
    assert row["ratios"]["prefix"]["full memory over it"] == round(sizes["full"] / sizes["prefix"], 1)


def test_the_full_cache_grows_without_changing_what_it_holds() -> None:
    q, k, v = torch.randn(3, 1, HEADS, 20, WIDTH, dtype=torch.float64)
    cache, rows = KVCache(), []
    for part in torch.arange(20).split([3, 1, 1, 9, 1, 5]):
        rows.append(cache.step(q[:, :, part], k[:, :, part], v[:, :, part]))
    expected = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
    torch.testing.assert_close(torch.cat(rows, 2), expected)
    assert (cache.length, cache.nbytes) == (20, 2 * HEADS * 20 * WIDTH * 8)
    held = KVCache.holding(k[:, :, :19], v[:, :, :19])
    last = held.step(q[:, :, 19:], k[:, :, 19:], v[:, :, 19:])
    torch.testing.assert_close(last, expected[:, :, 19:])
