"""One git revision beside another: both are built, and measured by this revision's code, in processes of their own."""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from csat_ext.bench.clock import Timing
from csat_ext.bench.compare import load, row_name, rows_by_name
from csat_ext.bench.machine import checkout, git

_RATES = ("TFLOP/s", "TB/s", "of product", "of copy")


def build(tree: Path) -> None:
    """Builds the libraries of a checkout in place, so that none older than the sources is measured.

    Raises:
        ValueError: they do not build; with the end of what the compiler said.
    """
    command = [sys.executable, "setup.py", "build_ext", "--inplace"]
    done = subprocess.run(command, cwd=tree, capture_output=True, text=True)
    if done.returncode:
        raise ValueError(f"{tree.name}: does not build:\n{done.stderr[-1000:]}")


@contextmanager
def built(root: Path, revision: str) -> Iterator[Path]:
    """A worktree of the revision of the checkout at `root`, its libraries built in place; gone afterwards.

    Raises:
        ValueError: an unknown revision, or one that does not build.
    """
    try:
        commit = git(root, "rev-parse", "--verify", f"{revision}^{{commit}}")
    except subprocess.CalledProcessError:
        raise ValueError(f"base: {revision!r} is neither a file nor a revision of this checkout") from None
    with tempfile.TemporaryDirectory() as folder:
        tree = Path(folder) / "base"
        git(root, "worktree", "add", "--detach", str(tree), commit)
        try:
            build(tree)
            yield tree
        finally:
            git(root, "worktree", "remove", "--force", str(tree))


def measured(tree: Path, arguments: dict[str, Any]) -> dict[str, Any]:
    """What `kernels.measured(**arguments)` of this code gives over the csat_ext of the checkout at `tree`.

    Raises:
        ValueError: that csat_ext lacks what this code calls.
    """
    with tempfile.TemporaryDirectory() as folder:
        output = Path(folder) / "result.json"
        environment = {**os.environ, "PYTHONPATH": str(tree / "python")}
        runner = Path(__file__).with_name("runner.py")
        command = [sys.executable, str(runner), str(output), json.dumps(arguments), json.dumps(sys.argv)]
        done = subprocess.run(command, env=environment, capture_output=True, text=True)
        if done.returncode:
            raise ValueError(f"base: cannot be measured by this code:\n{done.stderr[-1000:]}")
        return load(output)


def beside(
    revision: str, arguments: dict[str, Any], report: Callable[[str], None] = print
) -> tuple[dict[str, Any], dict[str, Any]]:
    """(result of the revision, result of this checkout as it stands), measured in the order base, new, new, base: what
    drifts with time falls on both alike.

    Raises:
        ValueError: csat_ext is installed instead of lying in a checkout; else as `built` and `measured`.
    """
    root = checkout()
    if root is None:
        raise ValueError("base: csat_ext is installed, not a checkout: a result file is accepted, not a revision")
    results: dict[str, list[dict[str, Any]]] = {"base": [], "new": []}
    with built(root, revision) as tree:
        build(root)
        for name, where in (("base", tree), ("new", root), ("new", root), ("base", tree)):
            report(f"measuring {revision if name == 'base' else 'this checkout'}")
            results[name].append(measured(where, arguments))
    return pooled(*results["base"]), pooled(*results["new"])


def pooled(first: dict[str, Any], second: dict[str, Any]) -> dict[str, Any]:
    """Two results of one revision as one, with the samples of both; what only one could measure is left out."""
    other = rows_by_name(second["rows"])
    rows = []
    for row in first["rows"]:
        if row_name(row) not in other:
            continue
        samples = row["samples_ms"] + other[row_name(row)]["samples_ms"]
        median = statistics.median(samples)
        rates = {name: row[name] * row["median_ms"] / median for name in _RATES}
        spread = Timing(tuple(samples)).spread
        rows.append({**row, **rates, "samples_ms": samples, "median_ms": median, "spread_ms": spread})
    return {**first, "rows": rows}
