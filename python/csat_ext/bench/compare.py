"""One result file of `csat bench kernels` beside another.

A row is slower when the medians differ by more than the larger of both spreads (interquartile ranges). Files that do
not measure the same thing in the same place are refused by name, not compared.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from csat_ext.bench.clock import Timing

KEY = ("op", "pass", "n", "m", "width", "dtype", "layers", "batch", "heads")
"""What names a row."""
_SAME_MACHINE = ("cpu", "cores", "threads", "device", "torch", "python")
_SAME_ROW = ("timer", "sets", "cold", "FLOP/byte")
_LEAST_SAMPLES = 3
_CEILINGS_MAY_DIFFER = 0.1


@dataclass(frozen=True)
class Change:
    """The same row in both files. `verdict`: "slower", "faster" or "equal within the spread"."""

    name: str
    base: Timing
    new: Timing

    @property
    def ratio(self) -> float:
        """New time over the base's."""
        return self.new.median / self.base.median

    @property
    def verdict(self) -> str:
        difference = self.new.median - self.base.median
        if abs(difference) <= max(self.base.spread, self.new.spread):
            return "equal within the spread"
        return "slower" if difference > 0 else "faster"

    def __str__(self) -> str:
        times = [f"{1e3 * t.median:.4g} ± {1e3 * t.spread:.2g} ms" for t in (self.base, self.new)]
        return f"{self.verdict}: {self.name}: {' -> '.join(times)} ({self.ratio:.2f} x)"


@dataclass(frozen=True)
class Comparison:
    """Every row that both files have, the names of those that only one has, and what should make one doubt."""

    changes: tuple[Change, ...]
    only_base: tuple[str, ...]
    only_new: tuple[str, ...]
    doubts: tuple[str, ...]

    def of(self, verdict: str) -> list[Change]:
        return [change for change in self.changes if change.verdict == verdict]

    def __str__(self) -> str:
        lines = [f"doubt: {doubt}" for doubt in self.doubts]
        for verdict in ("slower", "faster"):
            lines += [str(c) for c in sorted(self.of(verdict), key=lambda c: -abs(c.ratio - 1))]
        lines += [f"only in the {which}: {name}" for which, names in self._alone() for name in names]
        counts = [f"{len(self.of(verdict))} {verdict}" for verdict in ("slower", "faster", "equal within the spread")]
        return "\n".join([*lines, f"{len(self.changes)} rows: {', '.join(counts)}"])

    def _alone(self) -> tuple[tuple[str, tuple[str, ...]], ...]:
        return ("base", self.only_base), ("new file", self.only_new)


def load(path: Path) -> dict[str, Any]:
    """A result file of `csat bench kernels`.

    Raises:
        FileNotFoundError, ValueError: there is none, or it is something else.
    """
    result = json.loads(path.read_text())
    if not isinstance(result, dict) or not {"schema", "machine", "settings", "ceilings", "rows"} <= result.keys():
        raise ValueError(f"{path.name} is no result file of csat bench kernels")
    return result


def compare(base: dict[str, Any], new: dict[str, Any]) -> Comparison:
    """The rows that both results have.

    Raises:
        ValueError: another schema, machine or setting, a row measured otherwise or twice or too rarely, or no row in
            common.
    """
    for name, one, other in _conditions(base, new):
        if one != other:
            raise ValueError(f"not comparable: {name} is {one!r} in the base and {other!r} in the new file")
    rows = [rows_by_name(result["rows"]) for result in (base, new)]
    common = [name for name in rows[0] if name in rows[1]]
    if not common:
        raise ValueError("not comparable: the files have no row in common")
    changes = tuple(_change(name, rows[0][name], rows[1][name]) for name in common)
    only_base, only_new = (tuple(n for n in one if n not in other) for one, other in (rows, rows[::-1]))
    return Comparison(changes, only_base, only_new, tuple(_doubts(base, new)))


def _conditions(base: dict[str, Any], new: dict[str, Any]) -> Iterator[tuple[str, Any, Any]]:
    yield "schema", base["schema"], new["schema"]
    for name in _SAME_MACHINE:
        yield name, base["machine"].get(name), new["machine"].get(name)
    for name in {**base["settings"], **new["settings"]}:
        yield name, base["settings"].get(name), new["settings"].get(name)


def row_name(row: dict[str, Any]) -> str:
    """What was timed, in words: two rows of one name measure the same."""
    return " ".join(str(row[key]) if isinstance(row[key], str) else f"{key}={row[key]}" for key in KEY)


def rows_by_name(rows: Sequence[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Raises ValueError where two rows have one name."""
    found: dict[str, dict[str, Any]] = {}
    for row in rows:
        if row_name(row) in found:
            raise ValueError(f"not comparable: {row_name(row)} stands twice in one file")
        found[row_name(row)] = row
    return found


def _change(name: str, base: dict[str, Any], new: dict[str, Any]) -> Change:
    for fact in _SAME_ROW:
        if base[fact] != new[fact]:
            both = f"{base[fact]!r} in the base and {new[fact]!r} in the new file"
            raise ValueError(f"not comparable: {name}: {fact} is {both}")
    timings = [Timing(tuple(ms / 1e3 for ms in row["samples_ms"])) for row in (base, new)]
    for timing in timings:
        if len(timing.samples) < _LEAST_SAMPLES:
            few = f"{len(timing.samples)} samples, {_LEAST_SAMPLES} are needed for a spread"
            raise ValueError(f"not comparable: {name} has {few}")
    return Change(name, *timings)


def _doubts(base: dict[str, Any], new: dict[str, Any]) -> Iterator[str]:
    for which, result in (("base", base), ("new file", new)):
        machine = result["machine"]
        if machine["load"] > machine["threads"] + 0.5 and result["settings"]["device"] == "cpu":
            load = f"load {machine['load']} for {machine['threads']} threads"
            yield f"the machine was busy at the end of the {which}: {load}"
        if str(machine["revision"]).endswith("+"):
            yield f"the {which} was measured with uncommitted changes"
        if result["ceilings"]["drift"] > _CEILINGS_MAY_DIFFER:
            yield f"the ceilings moved by {result['ceilings']['drift']:.0%} while the {which} was measured"
    one, other = ({"copy": r["ceilings"]["copy TB/s"], **r["ceilings"]["product TFLOP/s"]} for r in (base, new))
    for name in sorted(one.keys() & other.keys()):
        ratio = other[name] / one[name]
        if abs(ratio - 1) > _CEILINGS_MAY_DIFFER:
            yield f"the machine itself was not the same: its ceiling of {name} is {ratio:.2f} x the base's"
