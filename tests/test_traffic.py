"""The table of docs/parallel.md is the model's, and the model is what was counted."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from csat_ext.parallel.traffic import Layer, csat_bytes, ring_bytes, ulysses_bytes

ROOT = Path(__file__).resolve().parents[1]


def test_the_page_the_result_file_and_the_model_agree() -> None:
    subprocess.run([sys.executable, ROOT / "benchmarks" / "traffic.py", "--check"], check=True)


def test_csat_sends_less_than_ulysses_above_two_measurements_a_token() -> None:
    layer = Layer(batch=3, heads=8, width=64, measurements=128)
    for ranks in (2, 8, 1024):
        even = 2 * 128 * ranks
        assert csat_bytes(layer, even, ranks) == pytest.approx(ulysses_bytes(layer, even, ranks))
        assert csat_bytes(layer, 2 * even, ranks) < ulysses_bytes(layer, 2 * even, ranks)


def test_what_depends_on_the_number_of_tokens() -> None:
    layer = Layer(batch=1, heads=2, width=16, measurements=8, rank=4)
    assert csat_bytes(layer, 1 << 20, 4) == csat_bytes(layer, 64, 4) == 4 * 3 / 4 * 2 * 8 * (16 + 4) * 4
    assert ring_bytes(layer, 128, 4) == 2 * ring_bytes(layer, 64, 4)
    assert ulysses_bytes(layer, 64, 4) < ring_bytes(layer, 64, 4)
