"""Writes the tables of README.md from the result files, between `<!-- name -->` and `<!-- /name -->`.

python benchmarks/readme_tables.py            # rewrite
python benchmarks/readme_tables.py --check    # exit 1 where the page and the files disagree (a test runs this)
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"
README = Path(__file__).resolve().parents[1] / "README.md"


def load(name: str) -> dict[str, Any]:
    return json.loads((RESULTS / f"{name}.json").read_text())


def table(head: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    head = list(head)
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in lines)


def source(machine: dict[str, Any], name: str) -> str:
    """Where a table comes from: machine, date, command, file."""
    where = machine["device"] if machine["device"] != "cpu" else f"{machine['cpu']}, {machine['cores']} cores"
    command = machine["command"]
    return f"\n\n<sub>{where}, {machine['date'][:10]}, `{command}`, [{name}.json](benchmarks/results/{name}.json)</sub>"


def pretrain() -> str:
    """Held-out metrics of the runs of equal settings, chance beside them."""
    result = load("pretrain")
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
    return text + table(head, rows) + source(result["machine"], "pretrain")


def ensembles() -> str:
    """Output error of every ensemble on trained activations."""
    result = load("ensembles")
    sizes = list(next(iter(result["error"].values())))
    rows = [[name, *(f"{errors[m]:.2f}" for m in sizes)] for name, errors in result["error"].items()]
    rows.append(["*the mean of the values, no attention*", *[f"{result['error of the mean']:.2f}"] * len(sizes)])
    text = (
        f"Relative error of the attention output on the image tower of the `sdpa` run ({result['tokens']} tokens, "
        f"{result['layers']} layers, {result['images']} held-out images), nothing retrained:\n\n"
    )
    head = [f"ensemble, n = {result['tokens']}", *(f"m = {m}" for m in sizes)]
    return text + table(head, rows) + source(result["machine"], "ensembles")


def lista() -> str:
    """NMSE at full depth on the literature's problem."""
    result = load("lista_synthetic")
    rows = [
        [f"`{name}`", row["about"], f"{row['nmse_db'][-1]:.1f}"]
        for name, row in sorted(result["methods"].items(), key=lambda item: -item[1]["nmse_db"][-1])
    ]
    headers = [row["machine"] for row in result["methods"].values()]
    commands = "`, `".join(dict.fromkeys(machine["command"] for machine in headers))
    machine = {**headers[0], "command": commands}
    return table(["method", "what it is", "NMSE, dB"], rows) + source(machine, "lista_synthetic")


def scaling() -> str:
    """Time over full attention as n grows."""
    result = load("scaling")
    ratios = result["time over sdpa, forward and backward"]
    names = [name for name in next(iter(ratios.values())) if name != "sdpa"]
    rows = [[name, *(f"{ratios[n][name]:.2f}" for n in ratios)] for name in names]
    shape = result["shape"]
    text = (
        f"Time of forward and backward over that of torch's full attention, on a CPU ({shape['heads']} heads of "
        f"{shape['width']}, m = {shape['m']}, {shape['dtype']}; below 1 is faster):\n\n"
    )
    head = ["", *(f"n = {n}" for n in ratios)]
    return text + table(head, rows) + source(result["machine"], "scaling")


TABLES: dict[str, Callable[[], str]] = {
    "pretrain": pretrain,
    "ensembles": ensembles,
    "lista": lista,
    "scaling": scaling,
}


def filled(page: str) -> str:
    """The page with every marked table made anew."""
    for name, make in TABLES.items():
        marked = re.compile(rf"<!-- {name} -->.*?<!-- /{name} -->", re.DOTALL)
        if not marked.search(page):
            raise ValueError(f"README.md has no <!-- {name} --> ... <!-- /{name} -->")
        text = f"<!-- {name} -->\n{make()}\n<!-- /{name} -->"
        page = marked.sub(lambda _, text=text: text, page)  # type: ignore[misc]
    return page


def main() -> None:
    page = README.read_text()
    new = filled(page)
    if "--check" in sys.argv[1:]:
        sys.exit(
            0 if new == page else "README.md and benchmarks/results disagree: run python benchmarks/readme_tables.py"
        )
    README.write_text(new)


if __name__ == "__main__":
    main()
