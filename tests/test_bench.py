"""What `csat bench` counts, times, compares and draws; the times themselves are a fake clock's where they matter."""

from __future__ import annotations

import copy
import functools
import json
import subprocess
import sys
import time
import weakref
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch

from csat_ext import cli
from csat_ext.bench import compare, kernels, machine, revision, roofline
from csat_ext.bench.clock import Call, CPUClock, CUDAClock, clock_for, measure, rotations
from csat_ext.bench.kernels import OPS, PASSES, Grid, Problem
from csat_ext.bench.work import Sizes, causal_block, causal_scores, work

CPU = torch.device("cpu")
TINY = Grid((64, 32), (16, 8), (16,), ("float32",), (2, 1), heads=2, turns=4, copied=1 << 16, side=32)


class FakeClock:
    """Says what it is told, in order, and then again; runs every call."""

    def __init__(self, *seconds: float) -> None:
        self.said, self.seconds_to_say, self.rounds = 0, seconds, 0

    def prepare(self, call: Call) -> tuple[Call, str]:
        call()
        return call, "fake"

    def seconds(self, calls: Sequence[Call]) -> float:
        self.rounds += 1
        self.said += 1
        return self.seconds_to_say[(self.said - 1) % len(self.seconds_to_say)]

    def peak_bytes(self, call: Call) -> int:
        call()
        return 3 << 20


@pytest.fixture(scope="module")
def result() -> dict[str, Any]:
    return kernels.run(CPU, TINY, clock=FakeClock(1e-3, 2e-3, 3e-3, 4e-3), report=lambda line: None)


# ---- the clock -------------------------------------------------------------------------------------------------------


def test_cases_take_turns() -> None:
    order: list[str] = []

    class Noting(FakeClock):
        def seconds(self, calls: Sequence[Call]) -> float:
            for call in calls:
                call()
            return super().seconds(calls)

    cases = {name: [lambda name=name: order.append(name)] * 2 for name in "ab"}
    timings = measure(cases, Noting(1.0, 10.0, 3.0, 30.0, 2.0, 20.0), 3)
    assert order == ["a", "a", "b", "b"] * 3
    assert timings["a"].samples == (1, 3, 2) and timings["a"].median == 2 and timings["b"].median == 20
    assert timings["a"].spread == pytest.approx(1)
    with pytest.raises(ValueError, match="turns: 0"):
        measure(cases, FakeClock(1.0), 0)


def test_the_cpu_clock_measures_at_least_what_a_call_takes() -> None:
    assert CPUClock(1e-3).seconds([lambda: time.sleep(0.02)] * 2) >= 0.02


def test_the_cpu_clock_gives_the_mean_call_of_a_round(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its time is one that only the calls let pass."""
    from torch.utils import benchmark

    now = [0.0]

    def call(seconds: float) -> Call:
        return lambda: now.__setitem__(0, now[0] + seconds)

    monkeypatch.setattr(benchmark, "Timer", functools.partial(benchmark.Timer, timer=lambda: now[0]))
    assert CPUClock(1e-3).seconds([call(1.0), call(2.0), call(6.0)]) == pytest.approx(3.0)


def test_a_replayed_graph_keeps_the_tensors_that_it_reads(monkeypatch: pytest.MonkeyPatch) -> None:
    graph = mock.MagicMock()
    for name in ("Stream", "current_stream", "stream", "graph", "synchronize"):
        monkeypatch.setattr(torch.cuda, name, mock.MagicMock())
    monkeypatch.setattr(torch.cuda, "CUDAGraph", lambda: graph)
    x = torch.ones(3)
    alive = weakref.ref(x)
    replay, timer = CUDAClock().prepare(lambda x=x: x + 1)
    del x
    replay()
    assert timer == "cuda graph" and graph.replay.call_count == 1 and alive() is not None


def test_peak_memory_is_what_tensors_hold_at_once() -> None:
    x = torch.ones(1 << 16)

    def three_of_which_two_live() -> torch.Tensor:
        return (x + 1) + 1

    assert CPUClock().peak_bytes(three_of_which_two_live) == pytest.approx(2 * x.nbytes, rel=0.01)


def test_rotated_inputs_do_not_fit_the_cache() -> None:
    assert rotations(1 << 20, 32 << 20) == 64 and rotations(1 << 30, 32 << 20) == 2
    assert rotations(1 << 20, 300 << 20, most=8) == 8
    assert rotations(3 << 20, 32 << 20) * (3 << 20) >= 2 * (32 << 20)
    with pytest.raises(ValueError, match="meta"):
        clock_for(torch.device("meta"))


# ---- the work --------------------------------------------------------------------------------------------------------


def test_work_is_that_of_the_formulas() -> None:
    s = Sizes(pairs=6, n=100, m=10, d=4, atoms=8, layers=3, size=4)
    assert work("project", s).flops == 6 * 2 * 10 * 100 * 4
    assert work("attend", s).flops == 2 * work("project", s).flops
    assert work("decode", s).flops == 6 * 2 * 100 * (3 * 8 * 4 + 2 * 8 * 8 + 4 * 8)
    assert work("attend_decode", s).flops == work("attend", s).flops + work("decode", s).flops
    tokens, measured, phi = 6 * 100 * 4, 6 * 10 * 4, 10 * 100
    assert work("project", s).moved == pytest.approx(4 * (tokens + measured + phi))
    assert work("measure", s).moved == pytest.approx(4 * (2 * tokens + 2 * measured + phi))
    fused, apart = work("attend_decode", s).moved, work("attend", s).moved + work("decode", s).moved
    assert apart - fused == pytest.approx(4 * tokens)  # z written and read again, less the z that is kept for backward


@pytest.mark.parametrize("n,m", [(96, 32), (100, 32), (20, 32), (40, 1)])
def test_work_of_the_causal_form_is_that_of_the_scores_that_are_seen(n: int, m: int) -> None:
    from csat_ext import _composite

    rows = causal_block(m)
    q, kc = torch.zeros(1, 1, n, 2), torch.zeros(1, 1, n // m * rows, 2)
    bias = _composite._of_tokens(q, kc, q, q, None, None, (m, 0, rows))[2]
    assert int(bias.isfinite().sum()) == causal_scores(n, m)
    s = Sizes(pairs=3, n=n, m=m, d=4, atoms=1, layers=1, size=2)
    forward, backward = work("attend_causal", s), work("attend_causal_backward", s)
    assert forward.flops == 3 * 2 * 2 * causal_scores(n, m) * 4 and 2 * backward.flops == 5 * forward.flops
    assert forward.moved == 3 * (2 * 4 * (4 * n + 2 * (n // m) * rows) + 4 * n)
    assert 2 * forward.moved - backward.moved == 3 * 4 * n  # both read what the other writes, but for lse


def test_work_of_the_prefix_form_is_that_of_a_running_state() -> None:
    """Forward: the state of keys and of values, scores, sums of values. Backward: those but the last again, dw, dq, dk,
    dv, the state's two gradients and two products for dphi."""
    s = Sizes(pairs=3, n=50, m=8, d=4, atoms=6, layers=2, size=2)
    product = 3 * 2 * 50 * 8 * 4
    forward, backward = work("attend_prefix", s), work("attend_prefix_backward", s)
    assert forward.flops == 4 * product and backward.flops == 11 * product
    assert forward.moved == 3 * (2 * (4 * 50 * 4 + 50 * 8) + 4 * 50)
    assert work("attend_prefix_decode", s).flops == forward.flops + work("decode", s).flops


@pytest.mark.parametrize("op", ["project", "attend", "decode", "attend_decode"])
def test_the_flops_of_a_matrix_product_agree_with_torchs_counter(op: str) -> None:
    """The composite in plain torch does the counted products and no others."""
    from torch.utils.flop_counter import FlopCounterMode

    from csat_ext import _composite

    p = Problem(op, n=64, m=16, width=8, layers=2, heads=2)
    _, shapes = kernels.function_of(p, CPU)
    leaves = [x.detach() for x in kernels.inputs_of(p, shapes, CPU, 0)]
    plain = {
        "project": lambda x: _composite.project(x, torch.ones(1, 2, 16, 64), None),
        "attend": lambda q, kc, vc: _composite.attend(q, kc, vc, None, 1.0),
        "decode": _composite.decode,
        "attend_decode": lambda q, kc, vc, *w: _composite.attend_decode(q, kc, vc, None, 1.0, *w, True),
    }
    with FlopCounterMode(display=False) as counter:
        plain[op](*leaves)
    first_layer = 2 * 2 * 64 * 8 * 8 if "decode" in op else 0  # S a_0 = 0, which plain torch multiplies out
    assert counter.get_total_flops() == kernels.work_of(p, "forward").flops + first_layer


# ---- the kernels -----------------------------------------------------------------------------------------------------


def test_the_grid_is_a_star_without_repeats() -> None:
    problems = TINY.problems(["attend", "decode"])
    assert len(problems) == len(set(problems)) == 3 + 4
    assert all(p.m <= p.n for p in kernels.grid_for(CPU).problems(OPS))
    short = kernels.grid_for(CPU, quick=True).problems(OPS)
    assert {p.op for p in short} == set(OPS) and len(short) == 2 * len(OPS)


@pytest.mark.parametrize("op", OPS)
def test_every_op_runs_every_pass(op: str) -> None:
    p = Problem(op, n=32, m=8, width=16, layers=2, heads=2)
    function, shapes = kernels.function_of(p, CPU)
    leaves = kernels.inputs_of(p, shapes, CPU, 0)
    forward, backward, both = (kernels.call_of(function, leaves, direction) for direction in PASSES)
    out = forward()
    assert not out.requires_grad and bool(out.isfinite().all()) and float(out.abs().max()) > 0
    for again in range(2):  # the kept graph can be run through again
        torch.manual_seed(again)
        assert [g.shape for g in backward()] == [x.shape for x in leaves] == [g.shape for g in both()]
    assert all(float(g.abs().max()) > 0 for g in both())


def test_rates_and_shares_of_a_row(result: dict[str, Any]) -> None:
    limits = result["ceilings"]
    assert limits["copy TB/s"] == pytest.approx(2 * TINY.copied / 1e-3 / 1e12)
    assert {(r["op"], r["pass"]) for r in result["rows"]} == {(op, direction) for op in OPS for direction in PASSES}
    for r in result["rows"]:
        assert r["median_ms"] in r["samples_ms"] or len(r["samples_ms"]) % 2 == 0
        assert r["TFLOP/s"] == pytest.approx(r["of product"] * limits["product TFLOP/s"]["float32"])
        assert r["TB/s"] == pytest.approx(r["of copy"] * limits["copy TB/s"])
        assert r["timer"] == "fake" and r["peak_MiB"] == 3 and r["sets"] >= 2
    assert result["machine"]["torch"] == torch.__version__
    json.dumps(result)


def test_ceilings_are_the_best_of_before_and_after() -> None:
    before = {"copy TB/s": 2.0, "product TFLOP/s": {"float32": 5.0}}
    after = {"copy TB/s": 1.0, "product TFLOP/s": {"float32": 6.0}}
    assert kernels.best_ceilings(before, after) == {
        "copy TB/s": 2.0,
        "product TFLOP/s": {"float32": 6.0},
        "drift": pytest.approx(1.0),
    }


def test_what_memory_does_not_take_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "free_bytes", lambda device: 1 << 10)
    said: list[str] = []
    result = kernels.run(CPU, TINY, ["attend"], clock=FakeClock(1.0), report=said.append)
    assert result["rows"] == [] and len(result["skipped"]) == len(said) == 3
    assert "MiB wanted" in result["skipped"][0]["reason"]
    with pytest.raises(ValueError, match="nothing was measured"):
        kernels.measured("cpu", quick=True, ops=["project"], tokens=[512], report=said.append)


def test_ops_and_devices_that_are_not_there() -> None:
    with pytest.raises(ValueError, match="'attent'"):
        kernels.run(CPU, TINY, ["attent"])
    if not torch.cuda.is_available():
        with pytest.raises(ValueError, match="no CUDA device"):
            kernels.measured("cuda")


# ---- comparisons -----------------------------------------------------------------------------------------------------


def quiet(result: dict[str, Any]) -> dict[str, Any]:
    result = copy.deepcopy(result)
    result["machine"] |= {"load": 0.0, "revision": "0" * 40}
    return result


def scaled(result: dict[str, Any], factor: float) -> dict[str, Any]:
    """The first row's samples times a factor."""
    result = quiet(result)
    result["rows"][0]["samples_ms"] = [factor * ms for ms in result["rows"][0]["samples_ms"]]
    return result


def test_slower_and_faster_by_more_than_the_spread(result: dict[str, Any]) -> None:
    base = quiet(result)
    base["rows"][0]["samples_ms"] = [9.0, 10.0, 10.0, 11.0]
    slow, fast, same = (compare.compare(base, scaled(base, f)) for f in (1.3, 0.7, 1.03))
    assert [c.ratio for c in slow.of("slower")] == [pytest.approx(1.3)] and not slow.of("faster") and not slow.doubts
    assert len(fast.of("faster")) == 1 and not same.of("slower")
    assert str(slow).startswith("slower: project forward n=64") and "1 slower" in str(slow)
    assert len(same.of("equal within the spread")) == len(base["rows"])


@pytest.mark.parametrize(
    ("place", "value", "message"),
    [
        (("machine", "cpu"), "another", "cpu is"),
        (("machine", "threads"), 99, "threads is"),
        (("machine", "torch"), "1.0", "torch is"),
        (("settings", "quick"), True, "quick is False in the base and True"),
        (("schema",), 0, "schema"),
        (("rows", 0, "timer"), "cuda events", "timer is"),
        (("rows", 0, "FLOP/byte"), 1.0, "FLOP/byte"),
        (("rows", 0, "samples_ms"), [1.0, 2.0], "2 samples"),
    ],
)
def test_what_cannot_be_compared_is_refused(
    result: dict[str, Any], place: tuple[str | int, ...], value: Any, message: str
) -> None:
    other = quiet(result)
    inner: Any = other
    for step in place[:-1]:
        inner = inner[step]
    inner[place[-1]] = value
    with pytest.raises(ValueError, match=message):
        compare.compare(quiet(result), other)


def test_rows_that_only_one_has_are_named_and_none_in_common_is_refused(result: dict[str, Any]) -> None:
    base, new = quiet(result), quiet(result)
    new["rows"] = new["rows"][1:]
    compared = compare.compare(base, new)
    assert len(compared.only_base) == 1 and f"only in the base: {compared.only_base[0]}" in str(compared)
    base["rows"] = base["rows"][:1]
    with pytest.raises(ValueError, match="no row in common"):
        compare.compare(base, new)
    base["rows"] *= 2
    with pytest.raises(ValueError, match="twice"):
        compare.compare(base, new)


def test_doubts_are_said(result: dict[str, Any]) -> None:
    base, new = quiet(result), quiet(result)
    base["machine"]["load"] = 50.0
    new["machine"]["revision"] += "+"
    new["ceilings"]["copy TB/s"] *= 0.5
    new["ceilings"]["drift"] = 0.4
    doubts = "\n".join(compare.compare(base, new).doubts)
    for words in ("busy at the end of the base", "uncommitted", "ceiling of copy is 0.50 x", "moved by 40%"):
        assert words in doubts


def test_other_files_are_refused(tmp_path: Path) -> None:
    (tmp_path / "other.json").write_text("[1]")
    with pytest.raises(ValueError, match="is no result file of csat bench kernels"):
        compare.load(tmp_path / "other.json")


# ---- revisions -------------------------------------------------------------------------------------------------------


def test_revisions_are_measured_base_new_new_base(result: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    order: list[str] = []
    factors = iter((1.0, 2.0, 2.0, 1.2))

    class Built:
        def __enter__(self) -> Path:
            return Path("base")

        def __exit__(self, *_: object) -> None:
            pass

    def measured(tree: Path, arguments: dict[str, Any]) -> dict[str, Any]:
        order.append(tree.name)
        return scaled(result, next(factors))

    monkeypatch.setattr(revision, "checkout", lambda: Path("new"))
    monkeypatch.setattr(revision, "built", lambda root, name: Built())
    monkeypatch.setattr(revision, "build", lambda tree: order.append(f"build {tree.name}"))
    monkeypatch.setattr(revision, "measured", measured)
    base, new = revision.beside("HEAD", {}, report=lambda line: None)
    assert order == ["build new", "base", "new", "new", "base"]
    one, other = base["rows"][0], new["rows"][0]
    assert len(one["samples_ms"]) == len(other["samples_ms"]) == 2 * TINY.turns
    assert other["median_ms"] == pytest.approx(2 * result["rows"][0]["median_ms"])
    assert other["TFLOP/s"] == pytest.approx(result["rows"][0]["TFLOP/s"] / 2)


def test_revisions_need_a_checkout_that_knows_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = Path(__file__).resolve().parents[1]
    if (root / ".git").exists():
        with (
            pytest.raises(ValueError, match="'no-such-revision' is neither a file nor a revision"),
            revision.built(root, "no-such-revision"),
        ):
            pass
    (tmp_path / "setup.py").write_text("raise SystemExit('no compiler here')")
    with pytest.raises(ValueError, match="no compiler here"):
        revision.build(tmp_path)
    monkeypatch.setattr(revision, "checkout", lambda: None)
    with pytest.raises(ValueError, match="installed"):
        revision.beside("HEAD", {})


def test_the_measuring_code_runs_over_a_package_without_it(tmp_path: Path) -> None:
    """An earlier csat_ext without `bench`: this package linked, that folder left out."""
    import csat_ext

    package = tmp_path / "python" / "csat_ext"
    package.mkdir(parents=True)
    for path in Path(csat_ext.__path__[0]).iterdir():
        if path.name not in ("bench", "__pycache__"):
            (package / path.name).symlink_to(path)
    arguments = {"device": "cpu", "quick": True, "ops": ["project_pool"], "tokens": [128]}
    result = revision.measured(tmp_path, arguments)
    assert [r["pass"] for r in result["rows"]] == list(PASSES) and result["settings"]["quick"]
    assert all(row["sets"] <= kernels.grid_for(CPU, quick=True).sets for row in result["rows"])
    with pytest.raises(ValueError, match="'nonsense' came"):
        revision.measured(tmp_path, arguments | {"ops": ["nonsense"]})


# ---- header, picture, command ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("argv", "expected"),
    [
        (["/opt/venv/bin/csat", "bench", "--output", "/data/x/r.json"], "csat bench --output r.json"),
        (["/opt/venv/bin/csat", "--output=/data/r.json"], "csat --output=r.json"),
        (["/elsewhere/script.py", "--n", "3"], "python script.py --n 3"),
        ([str(Path(__file__).resolve().parents[1] / "benchmarks" / "x.py")], "python benchmarks/x.py"),
    ],
)
def test_the_header_names_no_path_of_the_machine(argv: list[str], expected: str) -> None:
    assert machine._command(argv) == expected


def test_the_scripts_take_the_header_from_the_package() -> None:
    folder = Path(__file__).resolve().parents[1] / "benchmarks"
    code = "import machine, csat_ext.bench.machine as home; assert machine.header is home.header"
    subprocess.run([sys.executable, "-c", code], cwd=folder, check=True)


def test_the_roofline_shows_every_op(result: dict[str, Any], tmp_path: Path) -> None:
    points = roofline.points(result, "float32", "forward")
    assert set(points) == set(OPS) and all(len(line) >= 2 for line in points.values())
    row = next(r for r in result["rows"] if r["op"] == "attend" and r["pass"] == "forward" and r["n"] == 32)
    assert points["attend"][0][:2] == (row["FLOP/byte"], row["TFLOP/s"])
    roofline.draw(result, tmp_path / "roof.png")
    assert (tmp_path / "roof.png").stat().st_size > 10_000
    with pytest.raises(ValueError, match="no row of dtype 'float16'"):
        roofline.draw(result, tmp_path / "none.png", dtype="float16")


def test_the_commands(
    result: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    base, output = tmp_path / "base.json", tmp_path / "new.json"
    base.write_text(json.dumps(quiet(result)))
    slow = scaled(result, 100.0)

    def run(*arguments: str) -> tuple[int, str]:
        monkeypatch.setattr(sys, "argv", ["csat", "bench", *arguments])
        with pytest.raises(SystemExit) as stopped:
            cli.main()
        code = stopped.value.code
        return (0 if code is None else code), capsys.readouterr().out  # type: ignore[return-value]

    monkeypatch.setattr(kernels, "measured", lambda *args, **kwargs: slow)
    code, said = run("kernels", "--base", str(base), "--output", str(output))
    assert code == 1 and "slower: project forward" in said and json.loads(output.read_text())["rows"] == slow["rows"]
    assert run("compare", str(base), str(base))[0] == 0
    assert run("roofline", str(output), "--output", str(tmp_path / "roof.png"), "--pass", "both")[0] == 0
    code, _ = run("kernels", "--base", "no-such-revision", "--output", str(output))
    assert "no-such-revision" in str(code) or "installed" in str(code)


def test_the_larger_of_both_spreads_decides() -> None:
    wide, narrow = compare.Timing((1.0, 2.0, 3.0)), compare.Timing((2.6, 2.6, 2.6))
    for one, other in ((wide, narrow), (narrow, wide)):
        assert compare.Change("row", one, other).verdict == "equal within the spread"
