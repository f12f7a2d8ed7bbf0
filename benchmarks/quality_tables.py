"""Quality tables: what each mechanism learns with equal parameters, examples, steps and seeds (the paper's Table 2).

    python benchmarks/quality_tables.py listops                 # LRA's lengths, 500 to 2000 tokens
    python benchmarks/quality_tables.py pathfinder              # 32 x 32 pixels
    python benchmarks/quality_tables.py fashion-mnist           # needs Debian's dataset-fashion-mnist
    python benchmarks/quality_tables.py ablation                # parts of CSAT one by one, on the quick ListOps
    python benchmarks/quality_tables.py listops --quick         # short expressions, small model; minutes on two cores

On cuda where there is one, else on cpu, with the same settings. Runs that are in the result file are not made again, so
a command that was stopped, or that `--seconds` ended, is simply given again. The protocol: `quality/protocol.py`.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from deadline import Deadline
from mechanisms import LayerShape, attention_layer, csat_layer
from quality import listops, pathfinder, protocol
from quality.classifier import Layer, Size
from quality.fashion_mnist import DEBIAN, fashion_mnist
from quality.protocol import Protocol
from quality.task import Task
from quality.training import Schedule
from torch import nn

HERE = Path(__file__).parent
FORMS = (
    "full",
    "linformer",
    "performer",
    "longformer",
    "nystromformer",
    "csat",
    "csat + linear",
    "csat + LISTA",
)


@dataclass(frozen=True)
class Table:
    """A task as it is made, the protocol, and the forms of attention in it."""

    make: Callable[[], Task]
    protocol: Protocol
    forms: dict[str, Layer]


def named_forms(names: Sequence[str] = FORMS) -> dict[str, Layer]:
    """Layers by name; Longformer in its banded form, which waits for no compiler when a batch has another size."""
    layers = {"longformer": "longformer, banded"}
    return {name: partial(attention_layer, layers.get(name, name)) for name in names}


# ---- the ablation ----------------------------------------------------------------------------------------------------


def csat_form(shape: LayerShape, m: int, learned: bool, **changes: Any) -> nn.Module:
    """A layer of CSAT; a learned Phi belongs to the one length of the task."""
    fixed: dict[str, Any] = {"learned": True, "length": shape.tokens} if learned else {}
    return csat_layer(replace(shape, m=m), **fixed, **changes)


def ablation_forms(m: int, ensembles: Sequence[str] = ("pool", "bucket", "gaussian")) -> dict[str, Layer]:
    """Ensemble x fixed or learned x decoder at m, then m for the default; full attention beside them.

    The signed ensemble is the paper's, Gaussian.
    """
    forms: dict[str, Layer] = named_forms(("full",))
    for ensemble in ensembles:
        for learned in (False, True):
            for decoder in ("none", "linear", "lista"):
                name = f"{ensemble}, {'learned' if learned else 'fixed'}, {decoder}, m = {m}"
                forms[name] = partial(csat_form, m=m, learned=learned, ensemble=ensemble, decoder=decoder)
    for other in (m // 4, m // 2, 2 * m):
        for decoder in ("none", "lista"):
            name = f"pool, fixed, {decoder}, m = {other}"
            forms[name] = partial(csat_form, m=other, learned=False, ensemble="pool", decoder=decoder)
    return forms


# ---- sizes -----------------------------------------------------------------------------------------------------------

SHORT = listops.Sizes(depth=4, arguments=5, shortest=8, longest=64)
SMALL = Size(layers=2, width=64, heads=4, hidden=128, m=8)


def quick_listops() -> Task:
    return listops.listops(SHORT, (8000, 500, 1000))


def whole_listops(lra: Path | None) -> Task:
    """LRA's settings; its own files where they are given."""
    counts = 20_000, 2000, 2000
    return listops.listops(listops.Sizes(), counts) if lra is None else listops.lra_listops(lra, counts)


def tables(quick: bool, folder: Path, lra: Path | None = None) -> dict[str, Table]:
    """The tables by name. The quick ones say in their own words that they are easier, not only shorter."""
    few = Protocol(SMALL, Schedule(steps=300, batch=32), rates=(2e-3,), quick=True)
    some = Protocol(
        Size(layers=4, width=128, heads=4, hidden=256, m=64), Schedule(steps=3000, batch=32), rates=(5e-4, 2e-3)
    )
    parts = replace(few, equal_parameters=False)
    quick_ablation = replace(parts, schedule=Schedule(steps=200, batch=32))
    if quick:
        pixels = replace(few, schedule=Schedule(steps=100, batch=16))
        return {
            "listops": Table(quick_listops, few, named_forms()),
            "pathfinder": Table(
                lambda: pathfinder.pathfinder(pathfinder.Sizes(), (2000, 500, 500)), pixels, named_forms()
            ),
            "fashion-mnist": Table(lambda: fashion_mnist((4000, 1000, 1000), folder=folder), pixels, named_forms()),
            "ablation": Table(quick_listops, quick_ablation, ablation_forms(SMALL.m, ("pool", "gaussian"))),
        }
    return {
        "listops": Table(lambda: whole_listops(lra), some, named_forms()),
        "pathfinder": Table(
            lambda: pathfinder.pathfinder(pathfinder.Sizes(), (40_000, 2000, 4000)), some, named_forms()
        ),
        "fashion-mnist": Table(lambda: fashion_mnist((50_000, 10_000, 10_000), folder=folder), some, named_forms()),
        "ablation": Table(
            quick_listops,
            replace(parts, schedule=Schedule(steps=3000, batch=32), quick=False),
            ablation_forms(SMALL.m),
        ),
    }


# ---- the command -----------------------------------------------------------------------------------------------------


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("table", choices=("listops", "pathfinder", "fashion-mnist", "ablation"))
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--device", choices=("cpu", "cuda"), help="default: cuda where there is one")
    parser.add_argument("--seconds", type=float, default=math.inf, help="no run is begun that may not end within them")
    parser.add_argument("--steps", type=int, help="of training; default: that of the table")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--forms", nargs="+", help="some of the table's forms of attention")
    parser.add_argument("--lra-listops", type=Path, help="folder of LRA's basic_train.tsv and so on, for listops")
    parser.add_argument("--fashion-mnist", type=Path, default=DEBIAN, help="folder of the four files")
    parser.add_argument("--output", type=Path, help="default: benchmarks/results/quality_<table>[_quick].json")
    return parser.parse_args(arguments)


def chosen(given: argparse.Namespace) -> Table:
    """The table with what the command line changes.

    Raises:
        ValueError: a form that the table does not have, or no seed.
    """
    table = tables(given.quick, given.fashion_mnist, given.lra_listops)[given.table]
    for name in given.forms or ():
        if name not in table.forms:
            raise ValueError(f"--forms: {name!r} came; accepted: {', '.join(table.forms)}")
    if given.seeds < 1:
        raise ValueError(f"--seeds: {given.seeds} came, at least 1 is accepted")
    plan = replace(table.protocol, seeds=tuple(range(given.seeds)))
    if given.steps:
        plan = replace(plan, schedule=replace(plan.schedule, steps=given.steps))
    forms = {name: layer for name, layer in table.forms.items() if not given.forms or name in given.forms}
    return replace(table, protocol=plan, forms=forms)


def main(arguments: Sequence[str] | None = None) -> None:
    given = parse(arguments)
    try:
        table = chosen(given)
        device = given.device or ("cuda" if torch.cuda.is_available() else "cpu")
        name = f"quality_{given.table}{'_quick' if given.quick else ''}.json"
        output = given.output or HERE / "results" / name.replace("-", "_")
        deadline = Deadline(given.seconds)
        result = protocol.run(table.forms, table.make(), table.protocol, device, deadline, output)
    except ValueError as error:
        raise SystemExit(f"quality_tables: {error}") from None
    print(f"{len(result['runs'])} runs, {len(result['left_out'])} left out for time; written: {output}")


if __name__ == "__main__":
    main()
