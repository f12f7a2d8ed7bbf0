"""Pictures of result files. Every PNG carries the digest of the file that it was drawn from.

Okabe and Ito's colours, told apart by colour-blind readers; each line has a marker of its own as well. There are more
markers than colours, so that no two of forty lines look alike.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from io import BytesIO
from pathlib import Path
from typing import Any

from csat_ext.bench.tables import Results, counted_runs, kind, mechanisms_of, where

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#8C6D1F")
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*", "h", "<")
Drawer = Callable[[Any, Any, dict[str, Any]], None]
"""pyplot, figure and result -> a figure with its axes."""


def digest(results: Results, name: str) -> str:
    """What a picture is known to be drawn from: SHA-256 of its result file."""
    return hashlib.sha256((results.folder / f"{name}.json").read_bytes()).hexdigest()


def drawn_from(png: Path) -> str | None:
    """The digest that a PNG carries; None of another file."""
    from PIL import Image

    with Image.open(png) as image:
        found = getattr(image, "text", {}).get("Source")
    return found if isinstance(found, str) else None


def draw(results: Results, name: str, drawer: Drawer, size: tuple[float, float] = (9.5, 3.9)) -> bytes:
    """The picture of a result file, a PNG."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure = pyplot.figure(figsize=size, layout="constrained")
    drawer(pyplot, figure, results.load(name))
    buffer = BytesIO()
    figure.savefig(buffer, dpi=130, format="png", metadata={"Source": digest(results, name)})
    pyplot.close(figure)
    return buffer.getvalue()


def _look(i: int) -> dict[str, Any]:
    return {"color": COLOURS[i % len(COLOURS)], "marker": MARKERS[i % len(MARKERS)], "markersize": 5}


def _lengths(axes: Any, lengths: list[int]) -> None:
    axes.set(xscale="log", xlabel="n, tokens")
    axes.set_xticks(lengths, [str(n) for n in lengths])
    axes.minorticks_off()
    axes.grid(visible=True, which="major", color="0.9")


def table5(pyplot: Any, figure: Any, result: dict[str, Any]) -> None:
    """Time and memory over n of the first kind of model in the file."""
    mlp = result["settings"]["mlp"][0]
    rows = [row for row in result["rows"] if row["mlp"] == mlp]
    panels = figure.subplots(1, 2)
    for axes, key, label in zip(panels, ("median_ms", "memory_MiB"), ("ms a step", "MiB"), strict=True):
        for i, name in enumerate(mechanisms_of(rows)):
            line = sorted((row["n"], row[key]) for row in rows if row["mechanism"] == name)
            axes.plot(*zip(*line, strict=True), label=name, **_look(i))
        axes.set(yscale="log", ylabel=label)
        _lengths(axes, sorted({row["n"] for row in rows}))
    panels[1].legend(loc="upper left", bbox_to_anchor=(1.01, 1), frameon=False)
    figure.suptitle(f"{kind(mlp)}: {where(result['machine'])}", fontsize=11)


def scaling(pyplot: Any, figure: Any, result: dict[str, Any]) -> None:
    """Time over full attention as n grows."""
    ratios = result["time over sdpa, forward and backward"]
    axes = figure.subplots()
    for i, name in enumerate(next(iter(ratios.values()))):
        axes.plot([int(n) for n in ratios], [row[name] for row in ratios.values()], label=name, **_look(i))
    axes.set(yscale="log", ylabel="time over that of sdpa")
    _lengths(axes, [int(n) for n in ratios])
    axes.legend(loc="upper left", bbox_to_anchor=(1.01, 1), frameon=False)
    axes.set_title(where(result["machine"]), fontsize=11)


def ensembles(pyplot: Any, figure: Any, result: dict[str, Any]) -> None:
    """Output error over m, averaging ensembles with full lines and signed ones with broken lines."""
    axes = figure.subplots()
    for i, (name, errors) in enumerate(result["error"].items()):
        averaging = name.startswith(("pool", "bucket"))
        style = "-" if averaging else "--"
        axes.plot([int(m) for m in errors], list(errors.values()), label=name, linestyle=style, **_look(i))
    axes.axhline(result["error of the mean"], color="0.4", linewidth=1, linestyle=":", label="the mean of the values")
    axes.set(xscale="log", yscale="log", xlabel="m, measurements", ylabel="relative error")
    sizes = [int(m) for m in next(iter(result["error"].values()))]
    axes.set_xticks(sizes, [str(m) for m in sizes])
    axes.minorticks_off()
    axes.grid(visible=True, which="major", color="0.9")
    axes.legend(loc="upper left", bbox_to_anchor=(1.01, 1), frameon=False)
    axes.set_title(where(result["machine"]), fontsize=11)


def _points(pyplot: Any, figure: Any, result: dict[str, Any], factor: float, label: str) -> Any:
    """A point for the test score of every seed, a bar at the mean, a row for each form of attention."""
    axes = figure.subplots()
    forms = counted_runs(result)
    for i, (form, runs) in enumerate(forms.items()):
        scores = [factor * run["test"] for run in runs]
        colour = COLOURS[0] if form.startswith("csat") else COLOURS[1] if form == "full" else "0.4"
        axes.plot(scores, [i] * len(scores), linestyle="none", marker="o", markersize=5, alpha=0.6, color=colour)
        axes.plot([sum(scores) / len(scores)], [i], marker="|", markersize=16, markeredgewidth=2, color=colour)
    s = result["settings"]
    axes.set_yticks(range(len(forms)), list(forms))
    axes.invert_yaxis()
    axes.set_xlabel(f"{label}: a point a seed, a bar at the mean")
    axes.grid(visible=True, axis="x", color="0.9")
    axes.set_title(f"{s['task']}{', quick' if s['quick'] else ''}: {where(result['machine'])}", fontsize=11)
    return axes


def quality(pyplot: Any, figure: Any, result: dict[str, Any]) -> None:
    """Test accuracy; the most frequent label as a line."""
    axes = _points(pyplot, figure, result, 100, "test accuracy, %; dotted: the most frequent label")
    axes.axvline(100 * result["settings"]["majority"], color="0.6", linestyle=":", linewidth=1)


def language(pyplot: Any, figure: Any, result: dict[str, Any]) -> None:
    """Bits per byte."""
    _points(pyplot, figure, result, 1, "bits per byte of the test text, less is better")


def captions(pyplot: Any, figure: Any, result: dict[str, Any]) -> None:
    """Recall at 10."""
    _points(pyplot, figure, result, 100, "R@10, %, mean of both ways")
