"""The roofline (Williams, Waterman and Patterson 2009) of a result file of `csat bench kernels`, as a picture."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from csat_ext.bench.pictures import COLOURS, MARKERS


def points(result: dict[str, Any], dtype: str, direction: str) -> dict[str, list[tuple[float, float, float, float]]]:
    """Op -> (FLOP/byte, TFLOP/s, and how far below and above the spread reaches) of every row, by rising n.

    Raises:
        ValueError: the file has no such row.
    """
    rows = [row for row in result["rows"] if row["dtype"] == dtype and row["pass"] == direction]
    if not rows:
        had = sorted({(row["dtype"], row["pass"]) for row in result["rows"]})
        raise ValueError(f"no row of dtype {dtype!r} and pass {direction!r}; the file has {had}")
    found: dict[str, list[tuple[float, float, float, float]]] = {}
    for row in sorted(rows, key=lambda row: row["n"]):
        rate, median = row["TFLOP/s"], row["median_ms"]
        half = min(row["spread_ms"] / 2, 0.9 * median)
        slow, fast = rate * median / (median + half), rate * median / (median - half)
        found.setdefault(row["op"], []).append((row["FLOP/byte"], rate, rate - slow, fast - rate))
    return found


def draw(result: dict[str, Any], output: Path, *, dtype: str | None = None, direction: str = "forward") -> None:
    """Writes the picture: the roof of this machine as measured in the same run, and every problem under it.

    dtype: that of the first row where it is absent. Operations and bytes are the least that the formulas need, so that
    a point's height is what is useful of the kernel's work.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    dtype = dtype or result["rows"][0]["dtype"]
    found = points(result, dtype, direction)
    copy, product = result["ceilings"]["copy TB/s"], result["ceilings"]["product TFLOP/s"][dtype]
    intensities = [x for line in found.values() for x, *_ in line]
    left, right = min([*intensities, product / copy]) / 2, max([*intensities, product / copy]) * 2

    figure, axes = pyplot.subplots(figsize=(8, 5.2), layout="constrained")
    ridge = product / copy
    axes.plot([left, ridge, right], [copy * left, product, product], color="0.25", linewidth=1.5)
    axes.annotate(f"matrix product: {product:.3g} TFLOP/s", (ridge, product), (0, 6), **_note())
    axes.annotate(f"copy: {copy:.3g} TB/s", (left, copy * left), (16, -2), **_note())
    for i, (op, line) in enumerate(found.items()):
        x, y, below, above = zip(*line, strict=True)
        look: dict[str, Any] = {"color": COLOURS[i % len(COLOURS)], "marker": MARKERS[i % len(MARKERS)]}
        axes.errorbar(x, y, yerr=[below, above], label=op, linestyle="none", markersize=7, capsize=2, **look)
    axes.set(xscale="log", yscale="log", xlim=(left, right))
    axes.set_ylim(top=2.5 * max([product, *(y for line in found.values() for _, y, *_ in line)]))
    axes.set_xlabel("floating-point operations for every byte that has to move")
    axes.set_ylabel("TFLOP/s")
    axes.set_title(f"{direction}, {dtype}: {_where(result['machine'])}", fontsize=11)
    axes.grid(visible=True, which="major", color="0.9")
    axes.legend(loc="upper left", bbox_to_anchor=(1.01, 1), frameon=False)
    figure.savefig(output, dpi=150)
    pyplot.close(figure)


def _note() -> dict[str, Any]:
    return {"textcoords": "offset points", "fontsize": 9, "color": "0.25"}


def _where(machine: dict[str, Any]) -> str:
    place = machine["device"] if machine["device"] != "cpu" else f"{machine['cpu']}, threads: {machine['threads']}"
    changed = "+" if machine["revision"].endswith("+") else ""
    return f"{place}, {machine['date'][:10]}, {machine['revision'][:10]}{changed}"
