"""`benchmarks/gpu_check.py` where there is no GPU: its formulas, its file, what it does when something is missing."""

from __future__ import annotations

import json
import struct
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from csat_ext import _composite
from csat_ext.bench.clock import Call
from csat_ext.bench.work import Work

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT / "benchmarks"), str(ROOT / "tests" / "gpu")]

import gpu_check  # noqa: E402
from kernel_budgets import PAIRS, budget, opcodes, wrong_code  # noqa: E402
from operator_calls import calls  # noqa: E402

SMALL = gpu_check.Problem(24, 5, 16, pairs=4, heads=2, device="cpu")
CEILING = {"tflops": 800.0, "terabytes": 4.0}


class FakeClock:
    """Runs every call and says what it is told, in order, five turns of each."""

    def __init__(self, *milliseconds: float) -> None:
        self.said = [ms / 1e3 for ms in milliseconds]
        self.turns = 0

    def prepare(self, call: Call) -> tuple[Call, str]:
        call()
        return call, "fake"

    def seconds(self, calls: Sequence[Call]) -> float:
        self.turns += 1
        return self.said[(self.turns - 1) % len(self.said)]

    def peak_bytes(self, call: Call) -> int:
        return 0


# ---- formulas --------------------------------------------------------------------------------------------------------


def products(run: Callable[..., Any], *arguments: Any) -> int:
    """FLOPs of the matrix products of a function, as torch counts them."""
    with FlopCounterMode(display=False) as counter:
        run(*arguments)
    return counter.get_total_flops()


@pytest.mark.parametrize("psi", [True, False])
def test_flops_of_backward_operators_are_those_of_plain_torch(psi: bool) -> None:
    n, m, d = 96, 32, 64
    p = gpu_check.Problem(n, m, d, device="meta")
    q, kc, phi, decoder, lse = p.rows(n), p.rows(m), p.phi(), p.decoder(), torch.empty(4, 16, n, device="meta")
    decoder = decoder if psi else (*decoder[:3], None, decoder[4])
    counted = {
        "project_backward": 2 * products(_composite.project_backward, kc, q, phi, None, True, False),  # K and V
        "attend_backward": products(_composite.attend_backward, q, q, kc, kc, None, q, lse, 0.1),
        "decode_backward": products(_composite.decode_backward, q, q, *decoder),
    }
    of_zero = 3 * 2 * p.pairs * n * d * d  # S a_0 and its two products, which kernels leave out: a_0 = 0
    for op, flops in counted.items():
        assert flops == budget(op, n, m, d, psi).flops + (of_zero if op == "decode_backward" else 0), op


def test_bytes_are_every_tensor_once() -> None:
    n, m, d = 96, 32, 64
    rows, measured, weights, lse = 2 * PAIRS * n * d, 2 * PAIRS * m * d, 3 * 2 * d * d, 4 * PAIRS * n
    blocks, phi = 2 * PAIRS * (n // m) * (m // 16) * d, 2 * PAIRS * n * m
    moved = {op: budget(op, n, m, d).moved for op in gpu_check.operations(SMALL)}
    assert moved == {
        "project": 2 * rows + 2 * measured + 2 * m * n,
        "project_backward": 2 * rows + 2 * measured + 2 * m * n,
        "attend": 2 * rows + 2 * measured + lse,
        "attend_decode": 3 * rows + 2 * measured + lse + weights,
        "attend_backward": 4 * rows + 4 * measured + lse,
        "decode_backward": 3 * rows + 2 * weights,
        "attend_causal": 4 * rows + 2 * blocks + lse,
        "attend_causal_backward": 8 * rows + 4 * blocks + lse,
        "attend_prefix": 4 * rows + phi + lse,
        "attend_prefix_decode": 5 * rows + phi + lse + weights,
        "attend_prefix_backward": 7 * rows + phi + 2 * phi + lse,  # dphi has four bytes
    }


@pytest.mark.parametrize("flops,moved,limit,least", [(8e12, 4e9, "products", 10.0), (8e9, 4e12, "memory", 1000.0)])
def test_rates(flops: float, moved: float, limit: str, least: float) -> None:
    figures = gpu_check.rates(Work(flops, moved), 2000.0, CEILING)
    assert figures["limit"] == limit
    assert figures["floor_ms"] == pytest.approx(least)
    assert figures["share"] == pytest.approx(least / 2000)
    assert figures["tflops"] == pytest.approx(flops / 2e12)
    assert figures["terabytes"] == pytest.approx(moved / 2e12)


def test_small_problems_take_turns_on_enough_inputs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_check, "cache_bytes", lambda device: 50 << 20)
    assert gpu_check.Problem(4096, 128, 64, device="cpu").sets() == 4  # 32 MiB a tensor, 100 MiB are cold
    assert gpu_check.Problem(65536, 128, 64, device="cpu").sets() == 1


# ---- what is timed, and the form of the file ------------------------------------------------------------------------


@pytest.fixture
def one_set(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_check, "cache_bytes", lambda device: 1)


@pytest.mark.usefixtures("one_set")
def test_rows_of_the_operators() -> None:
    rows = gpu_check.operator_rows(SMALL, FakeClock(2.0), CEILING)
    assert [row["op"] for row in rows] == list(gpu_check.operations(SMALL))
    for row in rows:
        assert row["ms"] == pytest.approx(2) and row["share"] == pytest.approx(row["floor_ms"] / 2)
        assert (row["n"], row["m"], row["d"]) == (24, 5, 16)
    families = {row["op"]: row["family"] for row in rows}
    assert families["project"] == families["project_backward"] == "cublas"
    assert families["attend_decode"] == families["decode_backward"] == "wgmma"
    json.dumps(rows)


@pytest.mark.usefixtures("one_set")
def test_row_of_the_whole_and_what_lista_adds() -> None:
    # forward and training step take turns, five with the decoder, five without
    clock = FakeClock(*[4.0, 12.0] * 5, *[3.0, 8.0] * 5)
    full = {"flash": {"forward": 8.0, "training": 6.0}, "cudnn": None}
    row = gpu_check.attention_row(SMALL, clock, CEILING, full)
    assert row["forward"]["ms"] == pytest.approx(4) and row["training"]["ms"] == pytest.approx(12)
    assert row["forward"]["lista_over_attention"] == pytest.approx(1 / 3)
    assert row["training"]["lista_over_attention"] == pytest.approx(0.5)
    assert row["forward"]["speed_over_sdpa"] == {"flash": pytest.approx(2), "cudnn": None}
    assert row["training"]["speed_over_sdpa"] == {"flash": pytest.approx(0.5), "cudnn": None}
    forward = sum(budget(op, 24, 5, 16, psi=False).flops for op in ("project", "attend_decode"))
    assert row["forward"]["tflops"] == pytest.approx(forward / 4e9)
    json.dumps(row)


@pytest.mark.usefixtures("one_set")
def test_few_heads_beside_a_plain_product() -> None:
    row = gpu_check.few_heads(SMALL, FakeClock(1.0, 2.0))
    assert row == {"pairs": 4, "n": 24, "m": 5, "d": 16, "project_ms": pytest.approx(1), "matmul_ms": pytest.approx(2)}


def test_a_training_step_takes_the_gradient_of_every_leaf(monkeypatch: pytest.MonkeyPatch) -> None:
    ran: dict[str, Any] = {}

    def milliseconds(cases: dict[str, list[Call]], clock: Any, turns: int) -> dict[str, float]:
        ran.update({name: [run() for run in runs] for name, runs in cases.items()})
        return dict.fromkeys(cases, 1.0)

    monkeypatch.setattr(gpu_check, "milliseconds", milliseconds)
    a, b = torch.randn(2, 3), torch.randn(2, 3)
    gpu_check.forward_and_training(lambda x, y: x * y, [[a, b]], FakeClock(1.0))
    assert torch.equal(ran["forward"][0], a * b) and not ran["forward"][0].requires_grad
    for got, wanted in zip(ran["training"][0], (a * b, a * a), strict=True):
        assert torch.equal(got, wanted)


def test_sizes_for_which_no_time_is_left_are_named() -> None:
    left_out: list[dict[str, int]] = []
    assert list(gpu_check.by_size(gpu_check.Deadline(0), left_out)) == []
    assert len(left_out) == 18 and left_out[0] == {"n": 4096, "m": 128, "d": 64}
    found = list(gpu_check.by_size(gpu_check.Deadline(1e6), []))
    assert [p.sizes() for p in found] == left_out


def test_the_file_keeps_other_stages_and_names_no_path(tmp_path: Path) -> None:
    report = gpu_check.Report(tmp_path, "NVIDIA H200 (x)")
    report.put("ops", {"rows": [1]})
    report.put("tests", {"failed": [f'File "{ROOT}/a.py", "/tmp/b" in \'/root/c\'\n/home/d\nend']})
    assert report.path.name == "gpu_check_NVIDIA_H200_x_.json"
    text = report.path.read_text()
    assert str(ROOT) not in text and not any(root in text for root in ("/tmp/", "/root/", "/home/"))
    stages = json.loads(text)["stages"]
    assert stages["ops"]["rows"] == [1] and stages["tests"]["failed"][0].endswith("\nend")
    assert all(stage["machine"]["torch"] == torch.__version__ for stage in stages.values())


# ---- when something is missing, fails or takes too long -------------------------------------------------------------


def test_stages_are_named_on_the_command_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert gpu_check.parse([]).stage == ["build", "tests", "ops", "attention", "sanitize"]
    given = gpu_check.parse(["--stage", "ops", "build", "--seconds", "30"])
    assert given.stage == ["ops", "build"] and given.seconds == 30
    with pytest.raises(SystemExit):
        gpu_check.parse(["--stage", "oops"])
    assert "invalid choice: 'oops'" in capsys.readouterr().err


def test_a_failing_stage_leaves_what_it_had(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    report, seen = gpu_check.Report(tmp_path, "gpu"), []

    def stage(deadline: gpu_check.Deadline) -> Any:
        yield {"rows": [1]}
        seen.append(report.stages()["ops"]["status"])
        raise ValueError("no luck")

    monkeypatch.setitem(gpu_check.STAGES, "ops", stage)
    assert not gpu_check.run_stage("ops", report, gpu_check.Deadline(9))
    entry = report.stages()["ops"]
    assert seen == ["running"]
    assert entry["status"] == "failed" and entry["reason"] == "ValueError: no luck" and entry["rows"] == [1]


@pytest.mark.parametrize("loads", [True, False])
def test_without_nvcc_a_library_that_is_there_serves(monkeypatch: pytest.MonkeyPatch, loads: bool) -> None:
    monkeypatch.setattr(gpu_check, "find_tool", lambda name: None)
    monkeypatch.setattr(gpu_check, "command", lambda *_: (0 if loads else 1, ""))
    (result,) = gpu_check.build(gpu_check.Deadline(9))
    assert result["status"] == ("skipped" if loads else "failed")
    assert result["reason"].startswith("no nvcc on this machine")
    (result,) = gpu_check.sanitize(gpu_check.Deadline(9))
    assert result == {"status": "skipped", "reason": "no compute-sanitizer on this machine"}


def test_both_sanitizers_run_and_their_reports_are_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    ran: list[str] = []

    def command(arguments: Any, deadline: gpu_check.Deadline, **environment: str) -> tuple[int, str]:
        ran.append(arguments[arguments.index("--tool") + 1])
        return (
            (9, "========= ERROR SUMMARY: 1 error\n1 passed") if ran[-1] == "racecheck" else (0, "=========\n1 passed")
        )

    monkeypatch.setattr(gpu_check, "find_tool", lambda name: name)
    monkeypatch.setattr(gpu_check, "command", command)
    *_, result = gpu_check.sanitize(gpu_check.Deadline(9))
    assert ran == ["memcheck", "racecheck"]
    assert result["status"] == "failed" and result["memcheck"]["status"] == "passed"
    assert result["racecheck"]["report"] == ["========= ERROR SUMMARY: 1 error"]


def test_a_command_is_stopped_when_time_is_up() -> None:
    code = "print('so far', flush=True); import time; time.sleep(3600)"
    status, output = gpu_check.command([sys.executable, "-c", code], gpu_check.Deadline(1))
    assert status is None and output in ("", "so far\n")  # a busy machine may not have come to the print
    assert gpu_check.outcome(status) == "stopped"


def test_what_a_stopped_command_had_printed_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    def run(arguments: Any, **options: Any) -> Any:
        raise subprocess.TimeoutExpired(arguments, options["timeout"], output=b"so far\n")

    monkeypatch.setattr(subprocess, "run", run)
    assert gpu_check.command(["sleeper"], gpu_check.Deadline(9)) == (None, "so far\n")


def test_failed_tests_are_listed() -> None:
    output = "...F\nFAILED tests/gpu/test_gpu.py::test_x - assert 0\nERROR tests/b.py\n1 failed, 3 passed in 2.0s"
    result = gpu_check.pytest_result(1, output)
    assert result["status"] == "failed" and result["summary"] == "1 failed, 3 passed in 2.0s"
    assert [line.split()[0] for line in result["failed"]] == ["FAILED", "ERROR"]


def test_what_is_sanitized_is_among_the_calls() -> None:
    labels = {str(call) for call in calls(torch.bfloat16)}
    assert set(gpu_check.SANITIZED) <= labels
    assert {label.split("-")[0] for label in gpu_check.SANITIZED} == {label.split("-")[0] for label in labels} - {
        "project_implicit_backward"
    }


def test_without_a_device_nothing_is_measured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert gpu_check.main(["--folder", str(tmp_path)]) == 1
    assert "no CUDA device here" in capsys.readouterr().err and not list(tmp_path.iterdir())


def test_opcodes_are_read_from_machine_code() -> None:
    """An ELF file of two sections: names, and a kernel of an HMMA and the first form of an HGMMA."""
    names, code = b"\0.shstrtab\0.text.k\0", struct.pack("<4Q", 0x081028723C, 0, 0x79F0, 0x23C)
    sections = (1, 64, len(names)), (11, 64 + len(names), len(code))  # name, place, bytes
    headers = b"".join(struct.pack("<IIQQQQ", name, 0, 0, 0, place, size) + bytes(24) for name, place, size in sections)
    table = 64 + len(names) + len(code)
    cubin = bytes(0x28) + struct.pack("<Q", table) + bytes(10) + struct.pack("<3H", 64, 2, 0) + names + code + headers
    assert list(opcodes(cubin)) == [("k", {0x23C, 0x9F0})]
    assert wrong_code("x_mma_kernel", {0x9F0}) == "no HMMA" and wrong_code("x_mma_kernel", {0x23C}) is None
    assert wrong_code("x_wgmma_kernel", {0x23C}) == "no HGMMA" and wrong_code("x_wgmma_kernel", {0x9F0}) is None
    assert wrong_code("copy_tokens", set()) is None and wrong_code("copy_tokens", {0x95C}) == "a trap"
