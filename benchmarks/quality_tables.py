"""Quality tables: what each mechanism learns with equal parameters, data, steps and seeds (the paper's Tables 1 to 4).

    python benchmarks/quality_tables.py causal-language     # Table 1: bytes of text, the causal forms
    python benchmarks/quality_tables.py masked-language     # Table 1: hidden bytes, every form of attention
    python benchmarks/quality_tables.py listops             # Table 2, the Long Range Arena, and what follows
    python benchmarks/quality_tables.py pathfinder          # 16 x 16 pixels, whole 32 x 32; pathfinder-64: 64 x 64
    python benchmarks/quality_tables.py fashion-mnist       # needs Debian's dataset-fashion-mnist
    python benchmarks/quality_tables.py captions            # Tables 3 and 4: retrieval and captioning
    python benchmarks/quality_tables.py ablation            # parts of CSAT one by one, on the quick ListOps

Each table has three sets. `--quick` takes at most a quarter of an hour on two cores and is easier, not only shorter;
the published one, which is the default, at most two hours; `--whole` has LRA's lengths and larger models, for a GPU,
where nobody has timed it. Processor minutes of one thread, from single steps on an Intel Xeon, quick / published:

    causal-language 6 / 100    masked-language 8 / 85      listops 9 / 110     pathfinder 15 / 75
    pathfinder-64  20 / 100    fashion-mnist  22 / 160     captions 9 / 100    ablation    6 / 85

On cuda where there is one, else on cpu, with the same settings. Runs that are in the result file are not made again, so
a command that was stopped, or that `--seconds` ended, is simply given again; so is one whose table has gained a form, a
rate or a seed. The protocol: `quality/protocol.py`.
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
from mechanisms import CAUSAL, CSAT, NONE, LayerShape, attention_layer, csat_layer
from quality import captions, corpus, language, listops, pathfinder, protocol
from quality.fashion_mnist import DEBIAN, fashion_mnist
from quality.model import Layer, Size
from quality.protocol import Protocol
from quality.task import Task
from quality.training import Schedule
from torch import nn

from csat_ext.bench.tables import QUALITY_TABLES, SETS, quality_file

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
    NONE,
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
    """Ensemble x fixed or learned x decoder at m, then m for the default; full attention and none beside.

    The signed ensemble is the paper's, Gaussian.
    """
    forms: dict[str, Layer] = named_forms(("full", NONE))
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


# ---- the tables ------------------------------------------------------------------------------------------------------

QUICK, PUBLISHED, WHOLE = SETS

SMALL = Size(layers=2, width=64, heads=4, hidden=128, m=8)
MIDDLE = replace(SMALL, m=32)
LARGE = Size(layers=4, width=128, heads=4, hidden=256, m=64)
RATES = (5e-4, 2e-3)
SHORT = listops.Sizes(depth=4, arguments=5, shortest=8, longest=64)
MIDDLING = listops.Sizes(depth=6, arguments=6, shortest=32, longest=256)
SHORT_PATHS = pathfinder.Sizes(side=16, dashes=2, short=1, distractors=1)
LONG_PATHS = pathfinder.Sizes(side=64, dashes=9, short=3, distractors=6)


def plan(which: str, size: Size, steps: int, batch: int, rates: tuple[float, ...] = (2e-3,), **others: Any) -> Protocol:
    return Protocol(size, Schedule(steps, batch), rates, quick=which == QUICK, **others)


def whole(size: Size = LARGE) -> Protocol:
    return plan(WHOLE, size, 3000, 32, RATES)


def quick_listops() -> Task:
    return listops.listops(SHORT, (8000, 500, 1000))


def whole_listops(lra: Path | None) -> Task:
    """LRA's settings; its own files where they are given."""
    counts = 20_000, 2000, 2000
    return listops.listops(listops.Sizes(), counts) if lra is None else listops.lra_listops(lra, counts)


def listops_table(which: str, given: argparse.Namespace) -> Table:
    if given.lra_listops is not None and which != WHOLE:
        raise ValueError(f"--lra-listops: its lengths belong to --{WHOLE}, --{which} came")
    rates = *RATES, 5e-3  # the higher of two was best everywhere
    make, protocol = {
        QUICK: (quick_listops, plan(which, SMALL, 300, 32)),
        PUBLISHED: (lambda: listops.listops(MIDDLING, (20_000, 1000, 2000)), plan(which, MIDDLE, 1000, 32, rates)),
        WHOLE: (lambda: whole_listops(given.lra_listops), whole()),
    }[which]
    return Table(make, protocol, named_forms())


def pathfinder_table(which: str, given: argparse.Namespace) -> Table:
    """On two cores the images have 16 x 16 pixels, of which the task can be learnt; of 32 x 32 full attention did not
    in 400 steps. Every form sees what is near by a convolution: where the neighbours of a pixel are is not asked."""
    near = replace(MIDDLE, taps=3)
    sizes, counts, protocol = {
        QUICK: (replace(SHORT_PATHS, distractors=0), (4000, 300, 500), plan(which, near, 400, 32, (4e-3,))),
        PUBLISHED: (SHORT_PATHS, (8000, 1000, 2000), plan(which, near, 1000, 32, (1e-3, 4e-3))),
        WHOLE: (pathfinder.Sizes(), (40_000, 2000, 4000), whole(replace(LARGE, taps=3))),
    }[which]
    return Table(lambda: pathfinder.pathfinder(sizes, counts), protocol, named_forms())


def pathfinder_64_table(which: str, given: argparse.Namespace) -> Table:
    counts, protocol = {
        QUICK: ((500, 100, 100), plan(which, SMALL, 15, 4)),
        PUBLISHED: ((4000, 500, 500), plan(which, MIDDLE, 150, 8)),
        WHOLE: ((40_000, 2000, 4000), whole(replace(LARGE, m=128))),
    }[which]

    def make() -> Task:
        if given.lra_pathfinder is not None:
            return pathfinder.lra_pathfinder(given.lra_pathfinder, LONG_PATHS.side, counts)
        return pathfinder.pathfinder(LONG_PATHS, counts)

    return Table(make, protocol, named_forms())


def fashion_mnist_table(which: str, given: argparse.Namespace) -> Table:
    counts, protocol = {
        QUICK: ((4000, 1000, 1000), plan(which, SMALL, 100, 16)),
        PUBLISHED: ((20_000, 1000, 2000), plan(which, MIDDLE, 500, 16, RATES)),
        WHOLE: ((50_000, 10_000, 10_000), whole()),
    }[which]
    return Table(lambda: fashion_mnist(counts, folder=given.fashion_mnist), protocol, named_forms())


def ablation_table(which: str, given: argparse.Namespace) -> Table:
    """Parameters are not made equal: what a part of CSAT costs is part of it."""
    ensembles = ("pool", "gaussian") if which == QUICK else ("pool", "bucket", "gaussian")
    steps = {QUICK: 200, PUBLISHED: 1500, WHOLE: 3000}[which]
    return Table(
        quick_listops, plan(which, SMALL, steps, 32, equal_parameters=False), ablation_forms(SMALL.m, ensembles)
    )


def language_table(given: argparse.Namespace, causal: bool, plans: dict[str, tuple[int, int, Protocol]]) -> Table:
    """plans: set -> bytes of a window, bytes that are judged, protocol."""
    context, judged, protocol = plans[given.which]
    forms = dict(CAUSAL) | named_forms((NONE,)) if causal else named_forms()
    return Table(
        lambda: language.Language(corpus.text(given.text, given.wikitext), context, causal, judged), protocol, forms
    )


def causal_language_table(which: str, given: argparse.Namespace) -> Table:
    plans = {
        QUICK: (256, 50_000, plan(which, MIDDLE, 600, 4)),
        PUBLISHED: (256, 200_000, plan(which, MIDDLE, 2000, 16, (1e-3, 3e-3))),
        WHOLE: (2048, 10_000_000, plan(which, replace(LARGE, m=256), 10_000, 32, RATES)),
    }
    return language_table(given, True, plans)


def masked_language_table(which: str, given: argparse.Namespace) -> Table:
    """Where a byte is hidden, attention has to find its neighbours first, which but for a window it does not do in so
    few steps: models that read text both ways see what is near by a convolution, the same for every form."""
    near = replace(MIDDLE, taps=5)
    plans = {
        QUICK: (128, 50_000, plan(which, near, 600, 16, (1e-2,))),
        PUBLISHED: (256, 200_000, plan(which, near, 1500, 16, (3e-3, 1e-2, 2e-2))),
        WHOLE: (2048, 10_000_000, plan(which, replace(LARGE, m=256, taps=5), 10_000, 32, (*RATES, 5e-3))),
    }
    return language_table(given, False, plans)


def captions_table(which: str, given: argparse.Namespace) -> Table:
    """m = 65: the class token and a pool of 8 x 8 for CSAT, as in examples/ds_csat.json."""
    protocol = {
        QUICK: plan(which, Size(2, 64, 4, 256, 65), 60, 32),
        PUBLISHED: plan(which, Size(2, 96, 4, 384, 65), 300, 64, (1e-3, 2e-3)),
        WHOLE: plan(WHOLE, Size(6, 256, 8, 1024, 65), 10_000, 256, (5e-4, 1e-3)),
    }[which]
    forms = named_forms(("full", "linformer", "performer"))
    image = {"anchors": ("first",), "grid": captions.GRID}
    forms |= {name: partial(csat_layer, **image, **own) for name, own in CSAT.items()}
    return Table(lambda: captions.captions(given.captions), protocol, forms)


TABLES: dict[str, Callable[[str, argparse.Namespace], Table]] = {
    "causal-language": causal_language_table,
    "masked-language": masked_language_table,
    "listops": listops_table,
    "pathfinder": pathfinder_table,
    "pathfinder-64": pathfinder_64_table,
    "fashion-mnist": fashion_mnist_table,
    "captions": captions_table,
    "ablation": ablation_table,
}
"""The makers of `QUALITY_TABLES`."""


# ---- the command -----------------------------------------------------------------------------------------------------


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("table", choices=QUALITY_TABLES)
    sets = parser.add_mutually_exclusive_group()
    for name in (QUICK, PUBLISHED, WHOLE):
        sets.add_argument(f"--{name}", dest="which", action="store_const", const=name)
    parser.set_defaults(which=PUBLISHED)
    parser.add_argument("--device", choices=("cpu", "cuda"), help="default: cuda where there is one")
    parser.add_argument("--seconds", type=float, default=math.inf, help="no run is begun that may not end within them")
    parser.add_argument("--steps", type=int, help="of training; default: that of the table")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--forms", nargs="+", help="some of the table's forms of attention")
    parser.add_argument("--text", type=Path, nargs="+", default=(), help="files or folders, for the language tables")
    parser.add_argument("--wikitext", type=Path, help="folder of WikiText's wiki.train.raw and so on, for the same")
    parser.add_argument("--captions", type=Path, default=captions.SHIPPED, help="folder of shards and tokenizer.json")
    parser.add_argument("--lra-listops", type=Path, help="folder of LRA's basic_train.tsv and so on, for --whole")
    parser.add_argument("--lra-pathfinder", type=Path, help="LRA's pathfinder64/curv_contour_length_14")
    parser.add_argument("--fashion-mnist", type=Path, default=DEBIAN, help="folder of the four files")
    parser.add_argument("--output", type=Path, help="default: benchmarks/results/quality_<table>[_quick|_whole].json")
    return parser.parse_args(arguments)


def chosen(given: argparse.Namespace) -> Table:
    """The table with what the command line changes.

    Raises:
        ValueError: a form that the table does not have, or no seed.
    """
    table = TABLES[given.table](given.which, given)
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
        output = given.output or HERE / "results" / f"{quality_file(given.table, given.which)}.json"
        deadline = Deadline(given.seconds)
        result = protocol.run(table.forms, table.make(), table.protocol, device, deadline, output)
    except ValueError as error:
        raise SystemExit(f"quality_tables: {error}") from None
    print(f"{len(result['runs'])} runs, {len(result['left_out'])} left out for time; written: {output}")


if __name__ == "__main__":
    main()
