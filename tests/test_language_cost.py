"""The cost of a training step as the context grows: equal parameters, ratios of a fake clock, the page of its file."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

sys.path.append(str(Path(__file__).resolve().parents[1] / "benchmarks"))
import language_cost

from csat_ext.bench import tables
from csat_ext.bench.clock import Call
from csat_ext.language.config import ATTENTION
from csat_ext.language.model import LanguageModel, parameters


class FakeClock:
    """Every form takes its number of seconds, less in the second turn; MiB likewise."""

    def __init__(self, context: int) -> None:
        self.order = iter([context * s for s in (4.0, 2.0, 1.0)] + [context * s for s in (3.0, 1.0, 1.0)])
        self.bytes = iter((8 << 20, 4 << 20, 2 << 20))

    def prepare(self, call: Call) -> tuple[Call, str]:
        return call, "fake"

    def seconds(self, calls: Sequence[Call]) -> float:
        return next(self.order)

    def peak_bytes(self, call: Call) -> int:
        return next(self.bytes)


def test_a_step_has_a_gradient_for_every_parameter_and_models_are_equal() -> None:
    counts = []
    for form in ATTENTION:
        model = LanguageModel(language_cost.sizes(form))
        gradients = language_cost.step_of(model, 160, torch.device("cpu"))()
        assert len(gradients) == len(list(model.parameters()))
        assert all(g.isfinite().all() for g in gradients) and sum(float(g.abs().sum()) > 0 for g in gradients) > 20
        counts.append(parameters(model))
    assert max(counts) - min(counts) < 1e-3 * max(counts)


def test_ratios_are_of_the_least_times_and_the_page_says_them(tmp_path: Path) -> None:
    models = {form: LanguageModel(language_cost.sizes(form)) for form in ATTENTION}
    rows = [
        language_cost.measured(n, models, FakeClock(slow), torch.device("cpu"), turns=2)
        for n, slow in ((64, 1), (128, 4))
    ]
    assert rows[0]["tokens a second"] == {"sdpa": 21.333, "block": 64.0, "prefix": 64.0}
    found = language_cost.ratios(rows)
    assert found["block"]["128"] == {
        "sdpa time over it": 3.0,
        "sdpa memory over it": 2.0,
        "time a token over its own at the first": 2.0,
    }
    settings = {"dtype": "float32", "layers": 4, "width": 256, "heads": 4}
    settings |= {"block_size": 128, "measurements_per_block": 16, "m": 64}
    machine = {"device": "cpu", "cpu": "x", "cores": 2, "date": "2026-01-02", "command": "c"}
    result = {"machine": machine, "settings": settings, "rows": rows, "ratios": found}
    (tmp_path / "language_cost_cpu.json").write_text(json.dumps(result))
    page = tables.language_cost(tables.Results(tmp_path, "r"), "language_cost_cpu")
    assert "| `block`: memory, `sdpa` over it | 2.00 | 2.00 |" in page
    assert "| `prefix`: time a token over its own at 64 | 1.00 | 2.00 |" in page
