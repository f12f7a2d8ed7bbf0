"""Puts finished pretraining runs of equal settings side by side: one JSON of losses and held-out metrics, one picture.

    csat pretrain --config examples/pretrain.yaml --output runs/csat
    csat pretrain --config examples/pretrain.yaml --deepspeed examples/ds_sdpa.json --output runs/sdpa
    python benchmarks/pretrain_curves.py csat=runs/csat sdpa=runs/sdpa

Runs whose model, data or schedule differ are refused: only the DeepSpeed JSON, which chooses the attention, may.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from machine import header

HERE = Path(__file__).parent
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7")  # Okabe and Ito: told apart by every eye
LINES = ("-", "--", "-.", ":")


def read_run(folder: Path) -> dict[str, Any]:
    """Config, loss curve, speed and held-out metrics of one finished run."""
    evaluation = json.loads((folder / "evaluation" / "results.json").read_text())
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return {
        "settings": {key: evaluation["config"]["config"][key] for key in ("model", "train")},
        "attention": evaluation["config"]["deepspeed"].get("csat_attention", {"enabled": False}),
        "steps": [line["step"] for line in lines],
        "loss": [round(line["loss"], 4) for line in lines],
        "contrastive": [round(line["contrastive"], 4) for line in lines],
        "caption": [round(line["caption"], 4) for line in lines],
        "training seconds": round(lines[-1]["seconds"], 1),
        "held-out items": evaluation["items"],
        "retrieval": evaluation["retrieval"],
        "captioning": evaluation["captioning"],
    }


def draw(runs: dict[str, dict[str, Any]], path: Path) -> None:
    """Loss over steps, and held-out recall with its chance level."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, (curve, bars) = plt.subplots(1, 2, figsize=(10.5, 3.8), width_ratios=(1.25, 1))
    names = ("R@1", "R@5", "R@10")
    width = 0.8 / len(runs)
    for index, (name, run) in enumerate(runs.items()):
        style = {"color": COLOURS[index % 4], "linestyle": LINES[index % 4]}
        curve.plot(run["steps"], run["contrastive"], **style, label=f"{name}: contrastive")
        curve.plot(run["steps"], run["caption"], **style, linewidth=0.9, alpha=0.7, label=f"{name}: captioning")
        scores = [100 * sum(d[k]["score"] for d in run["retrieval"].values()) / len(run["retrieval"]) for k in names]
        places = [x + (index - (len(runs) - 1) / 2) * width for x in range(3)]
        bars.bar(places, scores, 0.92 * width, color=COLOURS[index % 4], label=name)
        for x, score in zip(places, scores, strict=True):
            bars.annotate(f"{score:.1f}", (x, score), ha="center", va="bottom", fontsize=8)
    direction = next(iter(next(iter(runs.values()))["retrieval"].values()))
    for x, name in enumerate(names):
        chance = 100 * direction[name]["chance"]
        bars.plot([x - 0.45, x + 0.45], [chance] * 2, color="black", linewidth=1, label="chance" if x == 0 else None)
    curve.set(xlabel="step", ylabel="training loss")
    bars.set(xticks=range(3), xticklabels=names, ylabel="held-out retrieval, mean of both ways (%)")
    for axes in (curve, bars):
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(frameon=False, fontsize=8)
    figure.tight_layout()
    figure.savefig(path, dpi=140)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", metavar="NAME=FOLDER")
    parser.add_argument("--output", type=Path, default=HERE / "results" / "pretrain.json")
    arguments = parser.parse_args()
    runs = {name: read_run(Path(folder)) for name, _, folder in (item.partition("=") for item in arguments.runs)}
    settings = [run.pop("settings") for run in runs.values()]
    if any(other != settings[0] for other in settings):
        parser.error("the runs differ in model or schedule; only their DeepSpeed JSON may")
    result = {"machine": header(), "settings": settings[0], "runs": runs}
    arguments.output.write_text(json.dumps(result, indent=1) + "\n")
    draw(runs, arguments.output.with_suffix(".png"))
    for name, run in runs.items():
        print(name, run["retrieval"], run["captioning"], f"{run['training seconds']} s", sep="\n  ")


if __name__ == "__main__":
    main()
