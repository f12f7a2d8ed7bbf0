"""docs/results.md and `csat report`: pages of the result files and of nothing else."""

from __future__ import annotations

import json
import re
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest

from csat_ext import cli
from csat_ext.bench import pictures, report, tables
from csat_ext.bench.tables import Results

HERE = Path(__file__).resolve().parents[1] / "benchmarks" / "results"
MACHINE = {"device": "a GPU", "cpu": "a CPU", "cores": 2, "date": "2026-01-02T00:00:00", "command": "python x.py"}


def table5(full_ms: float = 10.0) -> dict[str, Any]:
    lengths = (512, 1024)
    rows = [
        {"mechanism": name, "mlp": 0, "n": n, "median_ms": ms * n / 512, "memory_MiB": 4.0 * ms}
        | {"samples_ms": [ms] * (3 if n == 512 else 1)}
        for name, ms in (("full", full_ms), ("full, scores kept", 20.0), ("csat + LISTA", 4.0))
        for n in lengths
    ]
    over = [{"mechanism": "csat + LISTA", "mlp": 0, "n": n, "time": full_ms / 4, "memory": 2.7} for n in lengths]
    settings = {
        "layers": 12,
        "width": 512,
        "heads": 8,
        "m": 128,
        "batch": 4,
        "dtype": "bfloat16",
        "quick": False,
        "turns": 3,
    }
    return {
        "machine": MACHINE,
        "settings": settings | {"mlp": [0]},
        "paper, full over csat": {"time": 2.5, "memory": 2.7},
        "full over each": over,
        "growth": [{"mechanism": "full", "mlp": 0, "over n": [512, 1024], "time": 1.0, "memory": 0.0}],
        "left_out": [{"mechanism": "full", "mlp": 0, "n": 2048, "reason": "memory: torch.OutOfMemoryError"}],
        "rows": rows,
    }


@pytest.fixture
def results(tmp_path: Path) -> Results:
    folder = tmp_path / "measured"
    folder.mkdir()
    (folder / "table5_cuda.json").write_text(json.dumps(table5()))
    shutil.copy(HERE / "scaling.json", folder)
    return Results(folder, "measured")


def test_the_page_says_what_the_files_say(results: Results) -> None:
    text = report.page(results, lambda name, drawer: f"{name}.png")
    assert "| csat + LISTA | 2.50 / 2.70 | 2.50 / 2.70 | - |" in text
    assert "| full | 10 ms, 40 MiB | 20 ms, 40 MiB | 1.00 / 0.00 |" in text
    assert "\nBlocks of attention alone:\n" in text
    assert "Left out for memory: full at n = 2048." in text
    assert "scores kept over `csat + LISTA` at n = 1024: 5.0 / 5.0." in text
    assert "of fewer where time ran out: 1 at n = 1024." in text
    assert "<sub>a GPU, 2026-01-02, `python x.py`, [table5_cuda.json](measured/table5_cuda.json)</sub>" in text
    assert re.findall(r"^## (.*)", text, re.M) == [report.SECTIONS[0].title, report.SECTIONS[1].title]
    assert "Pretraining" not in text  # no such file


def test_a_changed_file_disagrees_with_the_page_and_its_picture(results: Results, tmp_path: Path) -> None:
    page, folder = tmp_path / "results.md", tmp_path / "pictures"
    assert "results.md is not" in report.disagreements(results, page, folder)[-1]
    report.write_page(results, page, folder)
    assert report.disagreements(results, page, folder) == []
    drawn = {png.name: png.stat().st_mtime_ns for png in folder.iterdir()}
    assert set(drawn) == {"table5_cuda.png", "scaling.png"}
    (results.folder / "table5_cuda.json").write_text(json.dumps(table5(full_ms=8.0)))
    assert report.disagreements(results, page, folder) == [
        "table5_cuda.png was drawn from another table5_cuda.json",
        "results.md is not what the result files say",
    ]
    report.write_page(results, page, folder)
    assert report.disagreements(results, page, folder) == []
    assert (folder / "scaling.png").stat().st_mtime_ns == drawn["scaling.png"]  # what did not change is not drawn anew
    (folder / "stray.png").write_bytes(b"")
    assert report.disagreements(results, page, folder) == ["stray.png is on no page"]


def test_the_html_page_needs_no_other_file(
    results: Results, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "report.html"
    monkeypatch.setattr(sys, "argv", ["csat", "report", "--results", str(results.folder), "--output", str(output)])
    with pytest.raises(SystemExit) as stopped:
        cli.main()
    assert not stopped.value.code
    text = output.read_text()
    sources = re.findall(r'<img src="([^"]{0,30})', text)
    assert len(sources) == 2 and all(source.startswith("data:image/png;base64,") for source in sources)
    assert text.count("<table>") == 2 and "<td>2.50 / 2.70</td>" in text
    assert 'href="measured/table5_cuda.json"' in text and str(tmp_path) not in text


def test_every_result_file_makes_its_section() -> None:
    published = Results(HERE, "x")
    for section, names in report.found(published):
        for name in names:
            text = section.make(published, name)
            assert f"[{name}.json](x/{name}.json)" in text and "|" in text
            if section.drawer is not None:
                assert pictures.draw(published, name, section.drawer).startswith(b"\x89PNG")
        assert all((HERE / f"{kept}.png").is_file() for kept in section.kept)


def learnt(forms: list[str], rates: list[float], runs: list[dict[str, Any]]) -> dict[str, Any]:
    settings = {
        "task": "listops",
        "about": "ListOps",
        "chance": 0.1,
        "majority": 0.2,
        "quick": True,
        "rates": rates,
        "seeds": [0, 1],
        "size": {"layers": 2, "width": 64, "heads": 4, "m": 8},
        "schedule": {"steps": 3, "batch": 4},
        "examples": [50, 10, 20],
        "forms": {form: {"hidden": 8, "parameters": 1000} for form in forms},
    }
    return {"machine": MACHINE, "settings": settings, "left_out": [{"reason": "time"}], "runs": runs}


def ran(form: str, rate: float, seed: int, validation: float, test: float) -> dict[str, Any]:
    return {"form": form, "rate": rate, "seed": seed, "validation": validation, "test": test}


def test_quality_is_that_of_the_rate_chosen_on_validation(results: Results) -> None:
    runs = [
        *(ran("csat", 1e-3, 0, 0.5, 0.9), ran("csat", 1e-2, 0, 0.6, 0.3), ran("csat", 1e-2, 1, 0.1, 0.5)),
        ran("full", 1e-3, 0, 0.5, 0.4),
    ]
    (results.folder / "quality_x.json").write_text(json.dumps(learnt(["csat", "full", "none"], [1e-3, 1e-2], runs)))
    text = tables.quality(results, "quality_x")
    assert "| `csat` | 40.0 ± 14.1 (2) | 0.01 | 1000 |" in text  # not the 90 % that the test split would choose
    assert "| `full` | 40.0 (1) | 0.001 | 1000 |" in text and "| `none`" not in text
    assert "**Not run yet: 5 of 9 runs** (`full` 2, `none` 3)." in text
    assert "A quick set" in text and "the most frequent label 20.0. 2 layers" in text
    grown = learnt(["csat", "full", "none"], [1e-3, 1e-2, 1e-1], [*runs, ran("csat", 1e-1, 0, 0.9, 0.2)])
    grown["settings"]["size"]["taps"] = 5
    grown["settings"] |= {"references": {"the first token": 0.25}, "median tokens": 7}
    (results.folder / "quality_x.json").write_text(json.dumps(grown))
    text = tables.quality(results, "quality_x")
    assert "| `csat` | 20.0 (1) | 0.1 | 1000 |" in text  # and its second seed is to be run again
    assert "**Not run yet: 8 of 12 runs** (`csat` 1, `full` 3, `none` 4)." in text
    assert (
        "the most frequent label 20.0, the first token 25.0. 2 layers" in text
        and "m = 8, behind a convolution of 5 taps;" in text
    )
    assert "3 steps of 4 out of 50 examples of 7 tokens in the median, 20 for the test" in text
    assert pictures.draw(results, "quality_x", pictures.quality).startswith(b"\x89PNG")


def test_the_ablation_puts_every_form_into_its_cell(results: Results) -> None:
    scores = {
        "full": 0.9,
        "no attention": 0.6,
        "pool, fixed, none, m = 8": 0.1,
        "pool, fixed, lista, m = 8": 0.2,
        "pool, learned, linear, m = 8": 0.3,
        "gaussian, fixed, none, m = 8": 0.4,
        "pool, fixed, lista, m = 16": 0.5,
    }
    runs = [ran(form, 1e-3, 0, 0.5, test) for form, test in scores.items()]
    (results.folder / "quality_ablation.json").write_text(json.dumps(learnt(list(scores), [1e-3], runs)))
    text = tables.ablation(results, "quality_ablation")
    for line in (
        "Full attention: 90.0 (1).\n\nNo attention: 60.0 (1).",
        "| pool, fixed | 10.0 (1) | - | 20.0 (1) |",
        "| pool, learned | - | 30.0 (1) | - |",
        "| gaussian, fixed | 40.0 (1) | - | - |",
        "| lista | 20.0 (1) | 50.0 (1) |",
        "differ by less than 31.3 lie within",  # 2 sqrt(2 p (1 - p) / 20), p = 0.429
    ):
        assert line in text
    titles = [section.title for section, names in report.found(results) if "quality_ablation" in names]
    assert titles == ["What each part of CSAT buys"]


def test_figures_of_gpu_check(results: Results) -> None:
    timed = {"ms": 2.0, "speed_over_sdpa": {"flash": 3.0, "cudnn": 2.5}}
    alone = {"ms": 4.0, "speed_over_sdpa": {"flash": None, "cudnn": None}}
    attention = [{"n": 4096, "m": 128, "d": 64, "forward": timed, "training": alone}]
    ops = [{"op": "attend", "family": "wgmma", "share": share} for share in (0.5, 0.7, 0.9)]
    stages = {"attention": {"rows": attention, "machine": MACHINE, "status": "passed"}}
    stages |= {"ops": {"rows": ops, "machine": MACHINE, "status": "left out sizes"}, "tests": {"status": "failed"}}
    (results.folder / "gpu_check_x.json").write_text(json.dumps({"device": "x", "stages": stages}))
    text = tables.gpu_check(results, "gpu_check_x")
    assert "| 4096 | 128 | 64 | 2.50 | 2 | - | 4 |" in text  # the faster backend is the rival
    assert "| `attend` | wgmma | 50 | 70 | 90 | 3 |" in text
    assert "attention: passed, ops: left out sizes, tests: failed." in text
    (results.folder / "gpu_check_x.json").write_text(json.dumps({"device": "x", "stages": {"build": stages["tests"]}}))
    assert tables.gpu_check(results, "gpu_check_x").endswith("gpu_check_x.json): build: failed.")


def test_figures_of_decoding(results: Results) -> None:
    ratios = {"block": {"full memory over it": 7.94, "full time over it": 0.5}}
    growth = {"full": {"4096": 1.0}, "block": {"4096": 1.0}}
    shape = {"heads": 2, "width": 64, "dtype": "float32", "measurements_per_block": 16, "m": 64}
    decoded = {"machine": MACHINE, "shape": shape, "rows": [{"n": 4096, "ratios": ratios}]}
    decoded["time a token over that at the shortest context"] = growth
    (results.folder / "decoding.json").write_text(json.dumps(decoded))
    text = tables.decoding(results)
    assert "| `block`: memory, full over it | 7.9 |" in text and "| `block`: time, full over it | 0.50 |" in text
    assert "| `full`: time over its own at n = 4096 | 1.00 |" in text


def of_text(forms: list[str], runs: list[dict[str, Any]]) -> dict[str, Any]:
    result = learnt(forms, [1e-3, 1e-2], runs)
    text = {"lower is better": True, "tokens": 16, "bytes": [900, 50, 60], "single bytes": 4.5, "task": "text"}
    del result["settings"]["examples"], result["settings"]["majority"], result["settings"]["chance"]
    result["settings"] |= text
    return result


def test_bits_per_byte_choose_the_lower_and_are_compared_seed_by_seed(results: Results) -> None:
    runs = [
        *(ran("full", 1e-3, 0, 2.0, 3.0), ran("full", 1e-2, 0, 2.5, 1.0), ran("full", 1e-3, 1, 2.0, 5.0)),
        *(ran("window", 1e-3, 0, 2.1, 9.0), ran("window", 1e-2, 0, 2.0, 3.1), ran("window", 1e-2, 1, 2.0, 5.3)),
    ]
    (results.folder / "quality_causal_x.json").write_text(json.dumps(of_text(["full", "window", "block"], runs)))
    text = tables.language(results, "quality_causal_x")
    assert "| `full` | 4.000 ± 1.414 (2) | - | 0.001 | 1000 |" in text  # not the run that is best on the test text
    assert "| `window` | 4.200 ± 1.556 (2) | +0.200 ± 0.141 | 0.01 | 1000 |" in text
    assert "frequencies of single bytes: 4.500" in text and "3 steps of 4 windows of 16 bytes out of 900, 60" in text
    assert "**Not run yet: 3 of 9 runs** (`block` 3)." in text
    assert pictures.draw(results, "quality_causal_x", pictures.language).startswith(b"\x89PNG")
    titles = [section.title for section, names in report.found(results) if "quality_causal_x" in names]
    assert len(titles) == 1 and titles[0].startswith("Language modelling, causal")


def test_seeds_tell_forms_apart_by_students_t(results: Results) -> None:
    assert tables.verdict([0.1, 0.2, 0.3], False) == "not told apart"  # t = 3.46, below 4.30
    assert tables.verdict([0.1, 0.2, 0.25], True) == "not told apart"
    assert tables.verdict([0.2, 0.2, 0.3], False) == "better" and tables.verdict([0.2, 0.2, 0.3], True) == "worse"
    assert tables.verdict([-0.2, -0.2, -0.3], True) == "better" and tables.verdict([0.0, 0.0], True) == "not told apart"
    assert tables.verdict([9.0], False) == "one seed" and tables.verdict([], False) == "one seed"
    scores = {
        "full": (3.0, 3.1, 3.2),
        "window": (2.9, 3.0, 3.11),
        "csat, block": (2.8, 3.2, 3.1),
        "csat, block + linear": (3.5, 3.6, 3.71),
        "csat, block + LISTA": (3.3, 3.4, 3.5),
    }
    runs = [ran(form, 1e-3, seed, 2.0, own[seed]) for form, own in scores.items() for seed in range(3)]
    text = tables.told_apart(of_text([*scores], runs))
    assert "against `full` better: `window`; not told apart: `csat, block`; worse: `csat, block + linear`" in text
    assert "against `csat, block + linear` better: `csat, block + LISTA`." in text
    assert (
        "so small a test" not in text and "the largest that was tried" not in text
    )  # bits of a long text; 1e-3 of two


def test_a_difference_within_the_error_of_the_test_set_tells_nothing() -> None:
    """Seeds that happen to agree say nothing about other items: 0.02 over 400 of them is one standard error or less."""
    scores = {"full": (0.30, 0.31, 0.32), "csat": (0.32, 0.33, 0.34), "linear": (0.40, 0.41, 0.42)}
    runs = [ran(form, 1e-2, seed, 0.2, own[seed]) for form, own in scores.items() for seed in range(3)]
    result = learnt([*scores], [1e-3, 1e-2], runs)
    result["settings"]["examples"] = [50, 10, 400]
    text = tables.told_apart(result)
    assert "against `full` not told apart: `csat`; better: `linear`" in text and "so small a test" in text
    assert text.endswith("The best rate of every form is the largest that was tried: a larger one may be better still.")


def test_the_page_says_which_sets_have_been_run(results: Results) -> None:
    runs = [ran("full", rate, 0, 2.0, 3.0) for rate in (1e-3, 1e-2)]
    for name in ("quality_causal_language", "quality_causal_language_quick"):
        (results.folder / f"{name}.json").write_text(json.dumps(of_text(["full", "window"], runs)))
    page = report.page(results, lambda name, drawer: f"{name}.png")
    assert "| causal-language | 2 of 6 runs | 2 of 6 runs | not run |" in page
    assert "| pathfinder-64 | not run | not run | not run |" in page and page.count("How far they have come") == 1
    assert tables.quality_file("pathfinder-64", "whole") == "quality_pathfinder_64_whole"


def test_captions_have_every_metric_beside_chance(results: Results) -> None:
    def judged(recall: float, bleu: float) -> dict[str, Any]:
        ways = {k: {"score": recall, "chance": 0.01} for k in tables.RECALLS}
        captioning = {name: {"score": bleu, "chance": 0.5} for name in tables.CAPTIONS}
        return {"figures": {"retrieval": {"i": ways, "t": ways}, "captioning": captioning}}

    runs = [
        ran("full", 1e-3, 0, 0.5, 0.3) | judged(0.3, 2.0),
        ran("full", 1e-3, 1, 0.5, 0.5) | judged(0.5, 4.0),
        ran("csat", 1e-3, 0, 0.5, 0.0) | {"reason": "the loss is nan"},
    ]
    result = learnt(["full", "csat"], [1e-3], runs)
    result["settings"] |= {"pairs": [90, 8, 9], "training images among": [[2, 8], [1, 9]]}
    (results.folder / "quality_captions.json").write_text(json.dumps(result))
    text = tables.captions(results, "quality_captions")
    both = "40.0 ± 14.1 / 40.0 ± 14.1"
    assert f"| `full` (2) | {both} | {both} | {both} | 3.00 ± 1.41 | 3.00 ± 1.41 | 0.001 |" in text
    assert "| chance | 1.0 / 1.0 | 1.0 / 1.0 | 1.0 / 1.0 | 0.50 | 0.50 |  |" in text and "`csat` (" not in text
    assert "3 steps of 4 pairs out of 90, 9 for the test" in text and "(`csat` 1)" in text
    assert pictures.draw(results, "quality_captions", pictures.captions).startswith(b"\x89PNG")
    assert "also 2 of 8 of the shard that chooses the rate and 1 of 9 of the test." in text
    assert "hang on it" not in text  # one rate alone

    result["settings"]["rates"] = [1e-3, 2e-3]
    result["runs"].append(ran("full", 2e-3, 0, 0.4, 0.2) | judged(0.2, 7.0))
    (results.folder / "quality_captions.json").write_text(json.dumps(result))
    text = tables.captions(results, "quality_captions")
    assert "| attention | BLEU-4, rate 0.001 | BLEU-4, rate 0.002 | CIDEr-D, rate 0.001 | CIDEr-D, rate 0.002 |" in text
    assert "| `full` | 2.00 | 7.00 | 2.00 | 7.00 |" in text and f"| `full` (2) | {both}" in text


def test_folders_and_files_that_are_no_results(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no known result file"):
        report.page(Results(tmp_path, "x"), lambda name, drawer: "")
    (tmp_path / "scaling.json").write_text("{")
    with pytest.raises(ValueError, match=r"scaling\.json is no JSON"):
        report.page(Results(tmp_path, "x"), lambda name, drawer: "")
    with pytest.raises(ValueError, match="no such file"):
        tables.pretrain(Results(tmp_path, "x"))


def test_spread_is_the_standard_deviation_of_a_sample() -> None:
    assert tables.spread([1.0, 2.0, 3.0]) == pytest.approx(1.0) and tables.spread([5.0]) == 0.0
