"""The script for the paper's Table 5: what it runs, how it ends, what its rows say; the times are a fake clock's."""

from __future__ import annotations

import dataclasses
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

sys.path.append(str(Path(__file__).resolve().parents[1] / "benchmarks"))
import table5
from deadline import Deadline
from mechanisms import NAMES, LayerShape, attention_layer

from csat_ext.bench.clock import Call

TINY = table5.Settings("cpu", "float32", (16, 32, 64), ("full", "csat"), layers=2, width=16, heads=2, m=8, turns=2)


class FakeClock:
    """Seconds: 1, 2, 3, ...; bytes: 1 MiB."""

    def __init__(self) -> None:
        self.calls = 0

    def prepare(self, call: Call) -> tuple[Call, str]:
        return call, "fake"

    def seconds(self, calls: Sequence[Call]) -> float:
        self.calls += 1
        return float(self.calls)

    def peak_bytes(self, call: Call) -> int:
        call()
        return 1 << 20


def table(settings: table5.Settings = TINY, seconds: float = 1e6, saved: list[Any] | None = None) -> table5.Table:
    keep = [] if saved is None else saved
    return table5.Table(settings, FakeClock(), Deadline(seconds), lambda result: keep.append(json.dumps(result)))


@pytest.mark.parametrize("name", [name for name in NAMES if "compiled" not in name])
@pytest.mark.parametrize("mlp", [0, 2])
def test_every_mechanism_differentiates_every_parameter(name: str, mlp: int) -> None:
    blocks = table5.model(name, 16, mlp, TINY)
    x, *parameters = table5.step_of(blocks, 16, TINY)()
    assert x.shape == (1, 16, 16) and len(parameters) == len(list(blocks.parameters()))
    assert float(x.abs().max()) > 0


def test_layers_have_equal_projections_and_draw_different_features() -> None:
    shape = LayerShape(16, 2, 16, 8)
    sizes = {name: p.shape for name, p in attention_layer("full", shape).named_parameters()}
    for name in ("performer", "csat", "csat + LISTA"):
        other = {k: p.shape for k, p in attention_layer(name, shape).named_parameters() if "proj" in k}
        assert other == sizes
    first, second = (attention_layer("performer", dataclasses.replace(shape, layer=i)) for i in (0, 1))
    assert not torch.equal(first.mechanism.omega, second.mechanism.omega)
    with pytest.raises(ValueError, match="'atention'"):
        attention_layer("atention", shape)


def test_equal_buffers_of_layers_are_held_once() -> None:
    blocks = table5.model("stock", 32, 0, TINY)
    assert len({t.data_ptr() for name, t in blocks.named_buffers() if name.endswith("phi")}) == 1
    assert len(blocks) > 1
    case = table5.make_case("stock", 32, 0, TINY, FakeClock())
    one = sum(t.nbytes for t in blocks[0].buffers())
    assert case.weights_bytes == sum(p.nbytes for p in blocks.parameters()) + one


def test_mechanisms_take_turns_and_every_turn_is_on_disk() -> None:
    saved: list[str] = []
    result = table(dataclasses.replace(TINY, lengths=(16,)), saved=saved).run()
    full, csat = result["rows"]
    assert full["samples_ms"] == [1e3, 3e3] and csat["samples_ms"] == [2e3, 4e3]
    assert full["median_ms"] == 2e3 and full["memory_MiB"] == pytest.approx(1 + full["weights_MiB"])
    assert full["weights_MiB"] == pytest.approx(4 * full["parameters"] / 2**20)
    first = json.loads(saved[0])
    assert len(saved) == 3 and [len(row["samples_ms"]) for row in first["rows"]] == [1, 1]
    assert json.loads(saved[-1])["rows"] == result["rows"]
    (ratio,) = result["full over each"]
    assert ratio["time"] == pytest.approx(2 / 3) and ratio["mechanism"] == "csat"


def test_what_time_or_memory_does_not_allow_is_listed(monkeypatch: pytest.MonkeyPatch) -> None:
    assert [e["reason"][:5] for e in table(seconds=0).run()["left_out"]] == ["time:"] * 6
    make = table5.make_case

    def small(name: str, n: int, *rest: Any) -> Any:
        if name == "full" and n > 16:
            raise torch.OutOfMemoryError("too much")
        return make(name, n, *rest)

    monkeypatch.setattr(table5, "make_case", small)
    result = table().run()
    assert [(e["n"], e["mechanism"]) for e in result["left_out"]] == [(32, "full"), (64, "full")]
    assert [(r["n"], r["mechanism"]) for r in result["rows"]] == [
        (16, "full"),
        (16, "csat"),
        (32, "csat"),
        (64, "csat"),
    ]


def test_the_expected_time_grows_with_the_square_of_n() -> None:
    run = table()
    assert run.expected("full", 64, 0) == 1
    run.last["full", 0] = 16, 0.5, 1 << 30
    assert run.expected("full", 64, 0) == pytest.approx(4 * 0.5 * 16)


def test_on_cpu_no_length_is_begun_that_may_not_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    run = table()
    run.last["full", 0] = 16, 0.5, 1 << 30
    monkeypatch.setattr(table5, "free_bytes", lambda device: 5 << 30)
    assert not run.would_be_killed("full", 16, 0) and run.would_be_killed("full", 32, 0)
    assert not run.would_be_killed("csat", 1 << 20, 0)
    run.settings = dataclasses.replace(TINY, device="cuda")
    assert not run.would_be_killed("full", 32, 0)


def test_graphs_are_for_all_of_a_length_or_for_none(monkeypatch: pytest.MonkeyPatch) -> None:
    clock, cuda = FakeClock(), torch.device("cuda")
    cases = [table5.make_case(name, 16, 0, TINY, clock) for name in TINY.mechanisms]
    monkeypatch.setattr(table5, "clear", lambda device: None)
    monkeypatch.setattr(table5, "free_bytes", lambda device: 3 << 20)
    table5.capture(cases, clock, cuda)
    assert {case.timer for case in cases} == {"torch.utils.benchmark"}
    monkeypatch.setattr(table5, "free_bytes", lambda device: 4 << 20)
    table5.capture(cases, clock, cuda)
    assert {case.timer for case in cases} == {"fake"}


def test_growth_is_the_exponent_of_the_longest_lengths() -> None:
    lengths = (1, 2, 4, 8, 16)
    rows = [
        {"mechanism": "full", "mlp": 0, "n": n, "median_ms": 9.0 if n == 1 else n**2.0, "memory_MiB": 3 * n**1.5}
        for n in lengths
    ]
    (found,) = table5.growth(rows)
    assert found["over n"] == [2, 4, 8, 16]
    assert found["time"] == pytest.approx(2) and found["memory"] == pytest.approx(1.5)
    assert table5.growth(rows[:2]) == []


def test_the_command_chooses_by_the_device(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(table5, "CUDA", table5.CUDA.__class__(kernels=True, reason=""))
    on_gpu = table5.settings_of(table5.parse(["--quick", "--compile"]))
    assert (on_gpu.device, on_gpu.dtype, on_gpu.lengths, on_gpu.turns) == ("cuda", "bfloat16", (512, 1024), 1)
    assert on_gpu.mechanisms[-1] == "stock + LISTA, compiled" and on_gpu.layers == 12
    monkeypatch.setattr(table5, "CUDA", table5.CUDA.__class__(kernels=False, reason="not built"))
    with pytest.raises(SystemExit, match="not built"):
        table5.settings_of(table5.parse([]))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert table5.settings_of(table5.parse([])).dtype == "float32"
    with pytest.raises(SystemExit, match="no CUDA device"):
        table5.settings_of(table5.parse(["--device", "cuda"]))
    output = tmp_path / "t.json"
    small = ["--quick", "--n", "16", "--layers", "1", "--m", "8", "--mlp", "0", "--mechanisms", "full", "csat"]
    table5.main([*small, "--output", str(output)])
    result = json.loads(output.read_text())
    assert result["settings"]["quick"] and {row["mechanism"] for row in result["rows"]} == {"full", "csat"}
    assert all(row["median_ms"] > 0 and row["memory_MiB"] > 0 for row in result["rows"])
