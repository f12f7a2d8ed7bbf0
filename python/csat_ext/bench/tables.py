"""Tables in Markdown from result files: those of README.md and of docs/results.md, each with the file it comes from."""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Results:
    """A folder of result files, and how a page links to it."""

    folder: Path
    link: str

    def load(self, name: str) -> dict[str, Any]:
        """The result file of a name.

        Raises:
            ValueError: it is not there, or is no JSON.
        """
        path = self.folder / f"{name}.json"
        try:
            return json.loads(path.read_text())
        except FileNotFoundError:
            raise ValueError(f"results: {path.name} came, and {self.folder} has no such file") from None
        except json.JSONDecodeError as error:
            raise ValueError(f"{path.name} is no JSON: {error}") from None

    def has(self, name: str) -> bool:
        return (self.folder / f"{name}.json").is_file()

    def source(self, machine: dict[str, Any], name: str) -> str:
        """Where a table comes from: machine, date, command, file."""
        return f"\n\n<sub>{where(machine)}, `{machine['command']}`, [{name}.json]({self.link}/{name}.json)</sub>"


Maker = Callable[[Results], str]


def where(machine: dict[str, Any]) -> str:
    """Machine and date of a header."""
    place = machine["device"] if machine["device"] != "cpu" else f"{machine['cpu']}, {machine['cores']} cores"
    return f"{place}, {machine['date'][:10]}"


def table(head: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    head = list(head)
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in lines)


# ---- the tables of the README ----------------------------------------------------------------------------------------


def pretrain(results: Results) -> str:
    """Held-out metrics of the runs of equal settings, chance beside them."""
    result = results.load("pretrain")
    runs = result["runs"]
    chance: dict[str, float] = {}
    rows = []
    for name, run in runs.items():
        both = {k: [direction[k]["score"] for direction in run["retrieval"].values()] for k in ("R@1", "R@5", "R@10")}
        chance = {k: next(iter(run["retrieval"].values()))[k]["chance"] for k in both}
        captions = run["captioning"]
        rows.append(
            [f"`{name}`", f"{run['loss'][-1]:.2f}"]
            + [" / ".join(f"{100 * score:.1f}" for score in scores) for scores in both.values()]
            + [f"{captions['BLEU-4']['score']:.1f}", f"{captions['CIDEr-D']['score']:.2f}"]
        )
    last = next(iter(runs.values()))["captioning"]
    rows.append(
        ["chance", ""]
        + [f"{100 * value:.1f}" for value in chance.values()]
        + [f"{last['BLEU-4']['chance']:.1f}", f"{last['CIDEr-D']['chance']:.2f}"]
    )
    items = next(iter(runs.values()))["held-out items"]
    head = ["attention", "last training loss", "R@1 %", "R@5 %", "R@10 %", "BLEU-4", "CIDEr-D"]
    text = f"Held-out retrieval among {items} pairs, image to text / text to image, greedy captions; one seed each:\n\n"
    return text + table(head, rows) + results.source(result["machine"], "pretrain")


def ensembles(results: Results) -> str:
    """Output error of every ensemble on trained activations."""
    result = results.load("ensembles")
    sizes = list(next(iter(result["error"].values())))
    rows = [[name, *(f"{errors[m]:.2f}" for m in sizes)] for name, errors in result["error"].items()]
    rows.append(["*the mean of the values, no attention*", *[f"{result['error of the mean']:.2f}"] * len(sizes)])
    text = (
        f"Relative error of the attention output on the image tower of the `sdpa` run ({result['tokens']} tokens, "
        f"{result['layers']} layers, {result['images']} held-out images), nothing retrained:\n\n"
    )
    head = [f"ensemble, n = {result['tokens']}", *(f"m = {m}" for m in sizes)]
    return text + table(head, rows) + results.source(result["machine"], "ensembles")


def lista(results: Results) -> str:
    """NMSE at full depth on the literature's problem."""
    result = results.load("lista_synthetic")
    rows = [
        [f"`{name}`", row["about"], f"{row['nmse_db'][-1]:.1f}"]
        for name, row in sorted(result["methods"].items(), key=lambda item: -item[1]["nmse_db"][-1])
    ]
    headers = [row["machine"] for row in result["methods"].values()]
    commands = "`, `".join(dict.fromkeys(machine["command"] for machine in headers))
    machine = {**headers[0], "command": commands}
    return table(["method", "what it is", "NMSE, dB"], rows) + results.source(machine, "lista_synthetic")


def scaling(results: Results) -> str:
    """Time over full attention as n grows."""
    result = results.load("scaling")
    ratios = result["time over sdpa, forward and backward"]
    names = [name for name in next(iter(ratios.values())) if name != "sdpa"]
    rows = [[name, *(f"{ratios[n][name]:.2f}" for n in ratios)] for name in names]
    shape = result["shape"]
    text = (
        f"Time of forward and backward over that of torch's full attention, on a CPU ({shape['heads']} heads of "
        f"{shape['width']}, m = {shape['m']}, {shape['dtype']}; below 1 is faster):\n\n"
    )
    head = ["", *(f"n = {n}" for n in ratios)]
    return text + table(head, rows) + results.source(result["machine"], "scaling")


# ---- those of docs/results.md alone ----------------------------------------------------------------------------------


def mechanisms_of(rows: Iterable[dict[str, Any]]) -> list[str]:
    return list(dict.fromkeys(row["mechanism"] for row in rows))


def milliseconds(value: float) -> str:
    return f"{value:.0f}" if value >= 100 else f"{value:.3g}"


KINDS = {0: "Blocks of attention alone"}


def kind(mlp: int) -> str:
    """What a model of `benchmarks/table5.py` consists of."""
    return KINDS.get(mlp, f"Whole transformer blocks, MLP of {mlp} x the width")


def table5(results: Results, name: str) -> str:
    """Time and memory of the paper's model: full over each mechanism, and the growth exponents."""
    result = results.load(name)
    s = result["settings"]
    text = (
        f"{s['layers']} layers, width {s['width']}, {s['heads']} heads, m = {s['m']}, batch {s['batch']}, "
        f"{s['dtype']}, forward and backward{', **a quick run**' if s['quick'] else ''}. "
        "Full attention over each mechanism, time / memory; above 1 the mechanism is cheaper than full attention. The "
        "row `full` itself: time (on a CPU over that at the shortest length) and memory:\n"
    )
    parts = [text]
    for mlp in s["mlp"]:
        rows = [row for row in result["rows"] if row["mlp"] == mlp]
        if rows:
            parts += [f"\n{kind(mlp)}:\n\n", _table5_ratios(result, mlp), "\n"]
    paper = result["paper, full over csat"]
    parts += [_unfused(result, mlp) for mlp in s["mlp"]]
    parts.append(
        f"\nThe paper states {paper['time']} / {paper['memory']} for its CSAT, which decodes by LISTA, and finds it "
        "slower than Linformer and Performer. An exponent is fitted over the four longest lengths that were measured. "
    )
    return ("".join(parts) + _few_turns(result) + _left_out(result)).rstrip() + results.source(result["machine"], name)


def _table5_ratios(result: dict[str, Any], mlp: int) -> str:
    lengths = sorted({row["n"] for row in result["rows"] if row["mlp"] == mlp})
    over = {(r["mechanism"], r["n"]): r for r in result["full over each"] if r["mlp"] == mlp}
    slopes = {g["mechanism"]: g for g in result["growth"] if g["mlp"] == mlp}
    measured = {(r["mechanism"], r["n"]): r for r in result["rows"] if r["mlp"] == mlp}

    def cell(mechanism: str, n: int) -> str:
        if mechanism == "full" and (row := measured.get((mechanism, n))):
            return f"{_full_time(result, row, measured['full', lengths[0]])}, {row['memory_MiB']:.0f} MiB"
        ratio = over.get((mechanism, n))
        return "-" if ratio is None else f"{ratio['time']:.2f} / {ratio['memory']:.2f}"

    def exponents(mechanism: str) -> str:
        found = slopes.get(mechanism)
        return "-" if found is None else f"{found['time']:.2f} / {found['memory']:.2f}"

    names = mechanisms_of(result["rows"])
    rows = [[name, *(cell(name, n) for n in lengths), exponents(name)] for name in names]
    return table(["", *(f"n = {n}" for n in lengths), "grows as n to the"], rows)


def _full_time(result: dict[str, Any], row: dict[str, Any], shortest: dict[str, Any]) -> str:
    """Milliseconds on a GPU; on CPU, whose times say little elsewhere, multiples of that at the shortest length."""
    if result["machine"]["device"] != "cpu":
        return f"{milliseconds(row['median_ms'])} ms"
    return f"time {row['median_ms'] / shortest['median_ms']:.2f}"


def _unfused(result: dict[str, Any], mlp: int) -> str:
    """The longest length at which full attention with its scores kept and CSAT with LISTA both ran."""
    rows = [row for row in result["rows"] if row["mlp"] == mlp]
    kept = {row["n"]: row for row in rows if row["mechanism"] == "full, scores kept"}
    lista = {row["n"]: row for row in rows if row["mechanism"] == "csat + LISTA"}
    if not kept.keys() & lista.keys():
        return ""
    n = max(kept.keys() & lista.keys())
    time, memory = (kept[n][key] / lista[n][key] for key in ("median_ms", "memory_MiB"))
    what = f"{kind(mlp)}, full attention with its scores kept over `csat + LISTA` at n = {n}"
    return f"\n{what}: {time:.1f} / {memory:.1f}.\n"


def _few_turns(result: dict[str, Any]) -> str:
    """Lengths whose figures are of fewer turns than was asked for."""
    turns = {row["n"]: len(row["samples_ms"]) for row in result["rows"]}
    few = [f"{turns[n]} at n = {n}" for n in sorted(turns) if turns[n] < result["settings"]["turns"]]
    return (
        f"Medians of {result['settings']['turns']} turns, of fewer where time ran out: {', '.join(few)}. "
        if few
        else ""
    )


def _left_out(result: dict[str, Any]) -> str:
    reasons: dict[str, list[str]] = {}
    for entry in result["left_out"]:
        where = f"{entry['mechanism']} at n = {entry['n']}{' with MLP' if entry.get('mlp') else ''}"
        reasons.setdefault(entry["reason"].split(":")[0], []).append(where)
    return "".join(f"Left out for {reason}: {', '.join(dict.fromkeys(names))}. " for reason, names in reasons.items())


def gpu_check(results: Results, name: str) -> str:
    """What `benchmarks/gpu_check.py` timed: the whole operator beside fused full attention, each operator's share
    of what the device allows."""
    stages = results.load(name)["stages"]
    parts = [
        make(stages[stage]) + results.source(stages[stage]["machine"], name)
        for stage, make in (("attention", _gpu_attention), ("ops", _gpu_ops))
        if stages.get(stage, {}).get("rows")
    ]
    ran = ", ".join(f"{stage}: {result['status']}" for stage, result in stages.items())
    return "\n\n".join([*parts, f"Stages of [{name}.json]({results.link}/{name}.json): {ran}."])


GPU, GPU_M = "gpu_check_NVIDIA_H100_80GB_HBM3", 256
"""The file and the number of measurements that the README shows."""


def gpu(results: Results) -> str:
    """The whole operator beside fused full attention on a GPU, at one m."""
    stage = results.load(GPU)["stages"]["attention"]
    rows = [row for row in stage["rows"] if row["m"] == GPU_M]
    return _gpu_attention({"rows": rows}) + results.source(stage["machine"], GPU)


def _gpu_attention(stage: dict[str, Any]) -> str:
    psi = "the identity as dictionary, " if stage["rows"][0].get("psi") == "identity" else ""
    text = (
        "Time of full attention (the faster of torch's flash and cuDNN backends) over that of CSAT with LISTA (T = 3), "
        f"{psi}64 pairs of batch and head, bfloat16; above 1 CSAT is faster:\n\n"
    )
    head = ["n", "m", "D", "forward", "ms", "forward and backward", "ms"]
    return text + table(head, [_gpu_row(row) for row in stage["rows"]])


def _gpu_ops(stage: dict[str, Any]) -> str:
    """Smallest, median and largest share of the floor over the sizes."""
    groups: dict[tuple[str, str], list[float]] = {}
    for row in stage["rows"]:
        groups.setdefault((row["op"], row["family"]), []).append(row["share"])
    rows = [
        [
            f"`{op}`",
            family,
            *(f"{100 * share(shares):.0f}" for share in (min, statistics.median, max)),
            str(len(shares)),
        ]
        for (op, family), shares in groups.items()
    ]
    text = (
        "Each operator: the least time that a copy and a matrix product of the same run allow, over the time taken, in "
        "percent, over all sizes:\n\n"
    )
    return text + table(["operator", "kernels", "least", "median", "most", "sizes"], rows)


def _gpu_row(row: dict[str, Any]) -> list[str]:
    cells = [str(row["n"]), str(row["m"]), str(row["d"])]
    for name in ("forward", "training"):
        speeds = [speed for speed in row[name]["speed_over_sdpa"].values() if speed is not None]
        cells += [f"{min(speeds):.2f}" if speeds else "-", milliseconds(row[name]["ms"])]
    return cells


def gpu_ladder(results: Results, name: str) -> str:
    """Milliseconds of every operator at a few sizes, one column for each run of `benchmarks/gpu_check.py` on a GPU."""
    ladder = results.load(name)
    runs = ladder["runs"]
    head = ["n", "m", "D", "op", *(f"{i}" for i in range(1, len(runs) + 1))]
    rows = [
        [*(str(row[size]) for size in ("n", "m", "d")), f"`{row['op']}`", *_ladder_cells(runs, "ops", row, "ms")]
        for row in runs[0]["ops"]
    ]
    for row in runs[0]["whole"]:
        for part, what in (("forward", "csat_attention"), ("training", "csat_attention and its gradients")):
            cells = _ladder_cells(runs, "whole", row, f"{part}_ms")
            rows.append([*(str(row[size]) for size in ("n", "m", "d")), what, *cells])
    steps = [
        f"{i}. {run['device']}, {run['date'][:10]}, revision {run['revision'][:12]}: {run['what']}. {run['tests']}."
        for i, run in enumerate(runs, 1)
    ]
    return "\n".join(
        [f"{ladder['note']} Milliseconds:", "", *steps, "", table(head, rows) + results.source(ladder["machine"], name)]
    )


def _ladder_cells(runs: Sequence[dict[str, Any]], kind: str, row: dict[str, Any], figure: str) -> list[str]:
    """That figure of the same row in every run."""
    same = [key for key in ("n", "m", "d", "op") if key in row]
    found = [next(r for r in run[kind] if all(r[key] == row[key] for key in same)) for run in runs]
    return [milliseconds(r[figure]) for r in found]


README: dict[str, Maker] = {
    "pretrain": pretrain,
    "ensembles": ensembles,
    "lista": lista,
    "scaling": scaling,
    "gpu": gpu,
}
"""The tables that README.md has between `<!-- name -->` and `<!-- /name -->`."""


# ---- quality ---------------------------------------------------------------------------------------------------------


def spread(values: Sequence[float]) -> float:
    """Standard deviation of a sample; 0 of a single value."""
    return statistics.stdev(values) if len(values) > 1 else 0.0


def best(runs: Sequence[dict[str, Any]], settings: dict[str, Any]) -> dict[str, Any]:
    """The run that is best on validation, the one of the lower rate among equals."""
    sign = -1 if settings.get("lower is better") else 1
    return max(runs, key=lambda run: (sign * run["validation"], -run["rate"]))


def counted_runs(result: dict[str, Any]) -> dict[str, list[dict[str, Any]]]:
    """Form of attention -> its runs at the rate that was chosen on validation, with the first seed, one for each
    seed."""
    first = result["settings"]["seeds"][0]
    found: dict[str, list[dict[str, Any]]] = {}
    for form in result["settings"]["forms"]:
        runs = [run for run in result["runs"] if run["form"] == form]
        tried = [run for run in runs if run["seed"] == first]
        if tried:
            rate = best(tried, result["settings"])["rate"]
            found[form] = [run for run in runs if run["rate"] == rate]
    return found


def mean(scores: Sequence[float], digits: int = 1, sign: str = "") -> str:
    """Mean and standard deviation."""
    sigma = f" ± {spread(scores):.{digits}f}" if len(scores) > 1 else ""
    return f"{statistics.fmean(scores):{sign}.{digits}f}{sigma}"


def percent(runs: Sequence[dict[str, Any]]) -> str:
    """Mean and standard deviation of the test accuracy, in percent, and the number of runs."""
    return f"{mean([100 * run['test'] for run in runs])} ({len(runs)})"


OF_SEEDS = "mean ± standard deviation (number of seeds)"


def _protocol(result: dict[str, Any], scores: str, data: str) -> str:
    """What was learnt and how: `scores` says what the figures are, `data` what a step sees and the test has."""
    s, quick = result["settings"], result["settings"]["quick"]
    size, rates = s["size"], ", ".join(f"{rate:g}" for rate in s["rates"])
    taps = f", behind a convolution of {size['taps']} taps" if size.get("taps") else ""
    return (
        f"{s['about']}. {'**A quick set, too short for conclusions.** ' if quick else ''}{scores}. "
        f"{size['layers']} layers, width {size['width']}, {size['heads']} heads, m = {size['m']}{taps}; "
        f"{s['schedule']['steps']} steps of {s['schedule']['batch']} {data}; "
        f"rate {'out of ' if len(s['rates']) > 1 else ''}{rates}.\n\n"
    )


def _classified(result: dict[str, Any]) -> str:
    s = result["settings"]
    known = {"the most frequent label": s["majority"], **s.get("references", {})}
    median = f" of {s['median tokens']} tokens in the median" if "median tokens" in s else ""
    return _protocol(
        result,
        f"Test accuracy in percent, {OF_SEEDS}; chance {100 * s['chance']:.0f}, "
        + ", ".join(f"{name} {100 * score:.1f}" for name, score in known.items()),
        f"out of {s['examples'][0]} examples{median}, {s['examples'][2]} for the test",
    )


def quality(results: Results, name: str) -> str:
    """What each mechanism learns with equal parameters, examples, steps and seeds. No times: runs do not take turns."""
    result = results.load(name)
    forms = result["settings"]["forms"]
    rows = [
        [f"`{form}`", percent(runs), f"{runs[0]['rate']:g}", f"{forms[form]['parameters']}"]
        for form, runs in counted_runs(result).items()
    ]
    return (
        _classified(result)
        + table(["attention", "accuracy", "rate", "parameters"], rows)
        + told_apart(result)
        + _runs_missing(result)
        + results.source(result["machine"], name)
    )


STUDENT = {2: 12.71, 3: 4.30, 4: 3.18, 5: 2.78, 6: 2.57, 7: 2.45, 8: 2.36, 9: 2.31, 10: 2.26}
"""Number of seeds -> how many standard errors a mean has to be from 0, two-sided 95 %; more seeds are taken for ten."""

CONTROLS: dict[str, tuple[str, ...]] = {
    "full": (),
    "window": ("csat, block", "csat, block + linear", "csat, block + LISTA"),
    "csat, block + linear": ("csat, block + LISTA",),
    "csat + linear": ("csat + LISTA",),
    "no attention": (),
}
"""What is held against which forms; against `full` and no attention at all every one."""


def _differences(runs: Iterable[dict[str, Any]], base: Iterable[dict[str, Any]]) -> list[float]:
    """Test scores over those of the same seeds: a seed gives all forms the same data in the same order."""
    of_seed = {run["seed"]: run["test"] for run in base}
    return [run["test"] - of_seed[run["seed"]] for run in runs if run["seed"] in of_seed]


def _of_test_items(result: dict[str, Any], *scores: float) -> float:
    """Two standard errors of a difference of shares of right answers: all seeds share the items of the test, which more
    seeds make no more. 0 where the score is no such share."""
    s = result["settings"]
    items = (s.get("examples") or s.get("pairs") or (0, 0, 0))[2]
    return 2 * math.sqrt(sum(score * (1 - score) for score in scores) / items) if items else 0.0


def verdict(differences: Sequence[float], lower_is_better: bool, least: float = 0.0) -> str:
    """`better`, `worse`, or what cannot be told: by Student's t from these seeds, or as it is not above `least`."""
    if len(differences) < 2:
        return "one seed"
    error = spread(differences) / math.sqrt(len(differences))
    away = statistics.fmean(differences) * (-1 if lower_is_better else 1)
    if abs(away) <= max(STUDENT[min(len(differences), 10)] * error, least):
        return "not told apart"
    return "better" if away > 0 else "worse"


def told_apart(result: dict[str, Any]) -> str:
    """What the seeds tell of each form against its controls."""
    found, lower = counted_runs(result), bool(result["settings"].get("lower is better"))
    sentences = []
    for control, forms in CONTROLS.items():
        verdicts: dict[str, list[str]] = {}
        for form in forms or (name for name in found if name != control):
            if control in found and form in found:
                means = (statistics.fmean(run["test"] for run in found[name]) for name in (form, control))
                told = verdict(_differences(found[form], found[control]), lower, _of_test_items(result, *means))
                verdicts.setdefault(told, []).append(f"`{form}`")
        if verdicts:
            words = "; ".join(f"{told}: {', '.join(names)}" for told, names in verdicts.items())
            sentences.append(f"against `{control}` {words}")
    alone = "Student's t, 95 % for each pair by itself: of twenty pairs of equals one would be told apart"
    if any(_of_test_items(result, run["test"]) for runs in found.values() for run in runs):
        alone += "; and a difference above two standard errors of so small a test"
    return f"\n\nSeed by seed ({alone}), {'; '.join(sentences)}." + _largest_rate(result) if sentences else ""


def _largest_rate(result: dict[str, Any]) -> str:
    """For how many forms the best rate is the largest that was tried: those may not be at their best."""
    rates, found = result["settings"]["rates"], counted_runs(result)
    forms = [form for form, runs in found.items() if runs[0]["rate"] == max(rates)]
    if len(rates) < 2 or not forms:
        return ""
    which = "every form" if len(forms) == len(found) else ", ".join(f"`{form}`" for form in forms)
    return f" The best rate of {which} is the largest that was tried: a larger one may be better still."


QUALITY_TABLES = (
    "causal-language",
    "masked-language",
    "listops",
    "pathfinder",
    "pathfinder-64",
    "fashion-mnist",
    "captions",
    "ablation",
)
"""The tables of `benchmarks/quality_tables.py`."""
SETS = {"quick": "_quick", "published": "", "whole": "_whole"}
"""A set of a table -> the ending of its result file."""


def quality_file(table: str, which: str) -> str:
    """Name of the result file of a set."""
    return f"quality_{table}{SETS[which]}".replace("-", "_")


def _runs_of_plan(result: dict[str, Any]) -> tuple[int, dict[str, int]]:
    """Runs that each form has in the end, one at every rate and one for every other seed; those of them that are there:
    not the other seeds at a rate that a later one has beaten."""
    s, counted = result["settings"], counted_runs(result)
    first = s["seeds"][0]
    there = {
        form: sum(run["form"] == form and run["seed"] == first for run in result["runs"])
        + sum(run["seed"] != first for run in counted.get(form, ()))
        for form in s["forms"]
    }
    return len(s["rates"]) + len(s["seeds"]) - 1, there


def _runs_missing(result: dict[str, Any]) -> str:
    """Which runs of the plan the file does not have."""
    each, there = _runs_of_plan(result)
    missing = [f"`{form}` {each - count}" for form, count in there.items() if count < each]
    if not missing:
        return ""
    left = sum(each - count for count in there.values())
    return f"\n\n**Not run yet: {left} of {each * len(there)} runs** ({', '.join(missing)})."


def sets_run(results: Results) -> str:
    """What the quality tables are, and how far each of their sets has come."""
    cells = []
    for name in QUALITY_TABLES:
        row = [name]
        for which in SETS:
            file = quality_file(name, which)
            if not results.has(file):
                row.append("not run")
                continue
            each, there = _runs_of_plan(results.load(file))
            row.append(f"{sum(there.values())} of {each * len(there)} runs")
        cells.append(row)
    return (
        "Protocol: `benchmarks/quality/protocol.py`; command: `benchmarks/quality_tables.py`. Each table has a quick "
        "set, a quarter of an hour on two cores at most, a published one, two hours at most, and one of LRA's lengths, "
        "for a GPU. How far they have come:\n\n" + table(["table", *SETS], cells)
    )


def language(results: Results, name: str) -> str:
    """Bits per byte of each form of attention, and what it needs more than the first form with the same seeds."""
    result = results.load(name)
    s, found = result["settings"], counted_runs(result)
    first = next(iter(s["forms"]))
    rows = []
    for form, runs in found.items():
        more = _differences(runs, found.get(first, ()))
        over = mean(more, 3, "+") if more and form != first else "-"
        bits = f"{mean([run['test'] for run in runs], 3)} ({len(runs)})"
        rows.append([f"`{form}`", bits, over, f"{runs[0]['rate']:g}", f"{s['forms'][form]['parameters']}"])
    text = _protocol(
        result,
        f"Bits per byte of the test text, lower is better, {OF_SEEDS}; frequencies of single bytes: "
        f"{s['single bytes']:.3f}",
        f"windows of {s['tokens']} bytes out of {s['bytes'][0]}, {s['bytes'][2]} for the test",
    )
    head = ["attention", "bits per byte", f"over `{first}`, seed by seed", "rate", "parameters"]
    ending = told_apart(result) + _runs_missing(result) + results.source(result["machine"], name)
    return text + table(head, rows) + ending


def captions(results: Results, name: str) -> str:
    """Recall both ways and the scores of captions for each form of attention, chance beneath."""
    result = results.load(name)
    s = result["settings"]
    chance, rows = None, []
    for form, runs in counted_runs(result).items():
        figures = [run["figures"] for run in runs if "figures" in run]
        if figures:
            chance = figures[0]
            rows.append([f"`{form}` ({len(figures)})", *_of_captions(figures, "score"), f"{runs[0]['rate']:g}"])
    if chance is not None:
        rows.append(["chance", *_of_captions([chance], "chance"), ""])
    text = _protocol(
        result,
        f"Held-out recall in percent, image to text / text to image, and greedy captions, {OF_SEEDS}",
        f"pairs out of {s['pairs'][0]}, {s['pairs'][2]} for the test",
    )
    parameters = [own["parameters"] for own in s["forms"].values()]
    equal = f"\n\nParameters: {min(parameters)} to {max(parameters)}."
    if "training images among" in s:
        chosen, test = (f"{known} of {every}" for known, every in s["training images among"])
        equal += f" Images of the training are also {chosen} of the shard that chooses the rate and {test} of the test."
    head = ["attention", *(f"{k}" for k in RECALLS), *CAPTIONS, "rate"]
    told = told_apart(result).replace("Seed by seed", "Mean R@10 of both ways, seed by seed")
    ending = equal + told + _captions_by_rate(result) + _runs_missing(result) + results.source(result["machine"], name)
    return text + table(head, rows) + ending


def _captions_by_rate(result: dict[str, Any]) -> str:
    """The scores of captions at every rate with the first seed: recall chose the rate, and captions hang on it more
    than on the form of attention."""
    rates, seed = result["settings"]["rates"], result["settings"]["seeds"][0]
    if len(rates) < 2:
        return ""
    scored = (run for run in result["runs"] if run["seed"] == seed and "figures" in run)
    first = {(run["form"], run["rate"]): run["figures"] for run in scored}
    rows = [
        [f"`{form}`", *(_of_captions([first[form, rate]], "score")[len(RECALLS) + i] for i in (0, 1) for rate in rates)]
        for form in result["settings"]["forms"]
        if all((form, rate) in first for rate in rates)
    ]
    head = ["attention", *(f"{name}, rate {rate:g}" for name in CAPTIONS for rate in rates)]
    text = "The rate is that of the best recall, and captions hang on it: their scores compare at one rate alone."
    return f"\n\n{text} With the first seed:\n\n{table(head, rows)}" if rows else ""


RECALLS, CAPTIONS = ("R@1", "R@5", "R@10"), ("BLEU-4", "CIDEr-D")


def _of_captions(figures: Sequence[dict[str, Any]], key: str) -> list[str]:
    """The cells of one row: `score` or `chance` of every metric."""
    ways = list(figures[0]["retrieval"])
    recall = [
        " / ".join(mean([100 * own["retrieval"][way][k][key] for own in figures]) for way in ways) for k in RECALLS
    ]
    return recall + [mean([own["captioning"][name][key] for own in figures], 2) for name in CAPTIONS]


def _within_error(result: dict[str, Any], found: dict[str, list[dict[str, Any]]]) -> str:
    """What two accuracies of the level of these have to differ by, for the few items of the test."""
    level = statistics.fmean(run["test"] for runs in found.values() for run in runs)
    least = 100 * _of_test_items(result, level, level)
    return f" Two of these that differ by less than {least:.1f} lie within two standard errors of so small a test."


DECODERS = ("none", "linear", "lista")


def ablation(results: Results, name: str) -> str:
    """Ensemble x fixed or learned x decoder, then decoder x m for the default ensemble."""
    result = results.load(name)
    runs = counted_runs(result)
    parts = {tuple(form.split(", ")): own for form, own in runs.items() if form.count(", ") == 3}
    m = f"m = {result['settings']['size']['m']}"

    def cell(*form: str) -> str:
        return percent(parts[form]) if form in parts else "-"

    kinds = list(dict.fromkeys((ensemble, phi) for ensemble, phi, _, _ in parts))
    rows = [[f"{ensemble}, {phi}", *(cell(ensemble, phi, d, m) for d in DECODERS)] for ensemble, phi in kinds]
    sizes = sorted({int(size.removeprefix("m = ")) for *_, size in parts})
    of_m = [[d, *(cell("pool", "fixed", d, f"m = {size}") for size in sizes)] for d in ("none", "lista")]
    ends = {"full": "Full attention", "no attention": "No attention"}
    beside = "".join(f"{name}: {percent(runs[form])}.\n\n" for form, name in ends.items() if form in runs)
    return (
        _classified(result)
        + beside
        + table([f"ensemble, Phi; {m}", *(f"decoder `{d}`" for d in DECODERS)], rows)
        + "\n\n"
        + table(["pool, fixed; decoder", *(f"m = {size}" for size in sizes)], of_m)
        + "\n\nHere parameters are not made equal: learned Phi and decoders add theirs."
        + _within_error(result, runs)
        + _runs_missing(result)
        + results.source(result["machine"], name)
    )


# ---- decoding --------------------------------------------------------------------------------------------------------


def decoding(results: Results) -> str:
    """Memory and time of the full cache over those of each form, and how each grows with the context."""
    result = results.load("decoding")
    shape, found = result["shape"], result["rows"]
    growth = result["time a token over that at the shortest context"]
    rows = []
    for form in found[0]["ratios"]:
        for name, key, digits in (("memory", "full memory over it", 1), ("time", "full time over it", 2)):
            cells = [f"{row['ratios'][form][key]:.{digits}f}" for row in found]
            rows.append([f"`{form}`: {name}, full over it", *cells])
    shortest = found[0]["n"]
    rows += [
        [f"`{form}`: time over its own at n = {shortest}", *(f"{ratio:.2f}" for ratio in own.values())]
        for form, own in growth.items()
    ]
    about = (
        f"{shape['heads']} heads of {shape['width']}, {shape['dtype']}; r = {shape['measurements_per_block']} "
        f"measurements of each block, no window before the query's own block; prefix with m = {shape['m']}.\n\n"
    )
    head = ["", *(f"n = {row['n']}" for row in found)]
    return about + table(head, rows) + results.source(result["machine"], "decoding")


def causal_cost(results: Results) -> str:
    """Time of the causal forms over full causal attention, and of a token over that at the shortest length."""
    result = results.load("causal_cost")
    shape = result["shape"]
    growth = next(value for key, value in result.items() if key.startswith("time a token"))
    shortest = next(iter(growth["sdpa"]))
    over = result["time over sdpa, forward and backward"]
    rows = [[f"`{name}`: time over `sdpa`", *(f"{x:.2f}" for x in own.values())] for name, own in over.items()]
    rows += [
        [f"`{name}`: a token over its own at n = {shortest}", *(f"{x:.2f}" for x in own.values())]
        for name, own in growth.items()
    ]
    about = (
        f"The operator alone, forward and backward, {shape['heads']} heads of {shape['width']}, {shape['dtype']}, one "
        f"thread; r = {shape['r']} measurements of each block, prefix with m = {shape['m']}:\n\n"
    )
    head = ["", *(f"n = {n}" for n in growth["sdpa"])]
    return about + table(head, rows) + results.source(result["machine"], "causal_cost")


def language_cost(results: Results, name: str) -> str:
    """Tokens a second and memory of a training step of the language model as its context grows."""
    result = results.load(name)
    s, measured = result["settings"], result["rows"]
    first = measured[0]["context"]
    rows = []
    for form, own in result["ratios"].items():
        if form == "sdpa":
            if result["machine"]["device"] != "cpu":  # a processor's speed says little of another's
                rows.append(
                    [f"`{form}`: tokens a second", *(f"{row['tokens a second'][form]:.0f}" for row in measured)]
                )
            cells = [f"{row['memory_MiB'][form]:.0f}" for row in measured]
            rows.append([f"`{form}`: MiB", *cells])
        else:
            for what in ("time", "memory"):
                cells = [f"{ratio[f'sdpa {what} over it']:.2f}" for ratio in own.values()]
                rows.append([f"`{form}`: {what}, `sdpa` over it", *cells])
    rows += [
        [
            f"`{form}`: time a token over its own at {first}",
            *(f"{ratio['time a token over its own at the first']:.2f}" for ratio in own.values()),
        ]
        for form, own in result["ratios"].items()
    ]
    about = (
        f"A training step (loss and all gradients) of `csat lm`: {s['layers']} layers, width {s['width']}, "
        f"{s['heads']} heads, MLP and output layer included, one window, {s['dtype']}; blocks of {s['block_size']} "
        f"tokens to {s['measurements_per_block']} measurements, one exact before the query's own; prefix with "
        f"m = {s['m']}.\n\n"
    )
    head = ["", *(f"{row['context']} bytes" for row in measured)]
    return about + table(head, rows) + results.source(result["machine"], name)


def recall(results: Results) -> str:
    """Accuracy of each form on associative recall, at the better rate on validation with the first seed."""
    result = results.load("associative_recall")
    s = result["settings"]
    rows = []
    for form in dict.fromkeys(run["form"] for run in result["runs"]):
        runs = [run for run in result["runs"] if run["form"] == form]
        rate = max((r for r in runs if r["seed"] == 0), key=lambda r: (r["validation"], -r["rate"]))["rate"]
        scores = [run["test"] for run in runs if run["rate"] == rate]
        rows.append([f"`{form}`", ", ".join(f"{score:.2f}" for score in scores), f"{rate:g}"])
    about = (
        f"{s['pairs']} pairs, then {s['asked']} keys whose values are asked for, out of {s['values']} (chance "
        f"{1 / s['values']:.2f}); one layer of width {s['width']}, {s['heads']} heads, m = {s['m']}, no decoder; "
        f"{s['steps']} steps of {s['batch']} sequences. Test accuracy of every seed:\n\n"
    )
    return (
        about + table(["attention", "accuracy", "rate"], rows) + results.source(result["machine"], "associative_recall")
    )
