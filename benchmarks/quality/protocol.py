"""The protocol of every quality table: what is fixed, what is chosen on validation, what is run with every seed.

For each form of attention the rate is chosen among the same few on the validation split with the first seed; then every
seed is run at that rate, and the test split is looked at once a run. Each run is on disk when it ends, and one that is
there is not run again.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from baselines import parameters
from deadline import Deadline
from machine import header

from csat_ext.bench.tables import best

from .model import Layer, Size, equal_hidden
from .task import Task
from .training import Schedule, scored, train


@dataclass(frozen=True)
class Protocol:
    """Attributes:
    equal_parameters: MLPs are widened until every form has the parameters of the largest.
    rates: tried on the validation split.
    """

    size: Size
    schedule: Schedule
    rates: tuple[float, ...]
    seeds: tuple[int, ...] = (0, 1, 2)
    equal_parameters: bool = True
    quick: bool = False


def grown(earlier: Any, now: Any) -> bool:
    """Whether `now` is `earlier` with at most more entries: forms, facts, and rates and seeds behind the others."""
    if isinstance(earlier, dict) and isinstance(now, dict):
        return all(key in now and grown(value, now[key]) for key, value in earlier.items())
    if isinstance(earlier, list) and isinstance(now, list):
        return earlier == now[: len(earlier)]
    return bool(earlier == now)


class Record:
    """A result file: the settings, and one entry a run in the order that they were made. A table that has grown keeps
    its earlier runs: `earlier` says of each stop what made the file so far, and how many runs it had.

    Raises:
        ValueError: the file has runs of other settings.
    """

    def __init__(self, path: Path, settings: dict[str, Any]) -> None:
        self.path, self.settings = path, json.loads(json.dumps(settings))
        self.runs: list[dict[str, Any]] = []
        self.left_out: list[dict[str, Any]] = []
        self.earlier: list[dict[str, Any]] = []
        if path.exists():
            earlier = json.loads(path.read_text())
            if not grown(earlier["settings"], self.settings):
                raise ValueError(f"{path.name} has runs of other settings: remove it, or name another --output")
            self.runs = earlier["runs"]
            self.earlier = [*earlier.get("earlier", ()), {"runs": len(self.runs), **earlier["machine"]}]

    def find(self, form: str, rate: float, seed: int) -> dict[str, Any] | None:
        key = (form, rate, seed)
        return next((run for run in self.runs if (run["form"], run["rate"], run["seed"]) == key), None)

    def put(self, run: dict[str, Any]) -> None:
        self.runs.append(run)
        self.save()

    def save(self) -> None:
        whole = {
            "machine": header(),
            "earlier": self.earlier,
            "settings": self.settings,
            "left_out": self.left_out,
            "runs": self.runs,
        }
        self.path.write_text(json.dumps(whole, indent=1) + "\n")

    def chosen_rate(self, form: str, rates: tuple[float, ...], seed: int) -> float | None:
        """The rate that is best on validation with a seed; None until all were tried."""
        tried = [run for rate in rates if (run := self.find(form, rate, seed)) is not None]
        return best(tried, self.settings)["rate"] if len(tried) == len(rates) else None


def count(task: Task, layer: Layer, size: Size, hidden: int) -> int:
    """Parameters of the model; nothing is computed."""
    with torch.random.fork_rng(devices=[]):
        return parameters(task.model(layer, size, hidden, seed=0))


def hidden_widths(forms: Mapping[str, Layer], task: Task, protocol: Protocol) -> dict[str, tuple[int, int]]:
    """Form -> width of its MLPs and parameters of its model."""
    size = protocol.size
    base = {name: count(task, layer, size, size.hidden) for name, layer in forms.items()}
    hidden = equal_hidden(base, size) if protocol.equal_parameters else dict.fromkeys(forms, size.hidden)
    return {name: (hidden[name], count(task, forms[name], size, hidden[name])) for name in forms}


def wanted(forms: Mapping[str, Layer], protocol: Protocol, record: Record) -> Iterator[tuple[str, float, int]]:
    """Form, rate and seed of every run that is not there yet; all rates with the first seed, then the seeds in turn."""
    first, *others = protocol.seeds
    for rate in protocol.rates:
        for form in forms:
            if record.find(form, rate, first) is None:
                yield form, rate, first
    for seed in others:
        for form in forms:
            rate_of_form = record.chosen_rate(form, protocol.rates, first)
            if rate_of_form is not None and record.find(form, rate_of_form, seed) is None:
                yield form, rate_of_form, seed


def run_one(
    layer: Layer, hidden: int, task: Task, protocol: Protocol, rate: float, seed: int, device: str = "cpu"
) -> dict[str, Any]:
    """One training and its scores; the task lies on the device that trains."""
    torch.manual_seed(seed)
    model = task.model(layer, protocol.size, hidden, seed).to(device)
    try:
        found = train(model, task, protocol.schedule, rate, seed)
    except FloatingPointError as error:  # a rate that is too high is a result
        return {"validation": task.worst, "test": task.worst, "reason": str(error)}
    return found | scored(model, task, protocol.schedule.batch)


def run(
    forms: Mapping[str, Layer], task: Task, protocol: Protocol, device: str, deadline: Deadline, output: Path
) -> dict[str, Any]:
    """Every run of a table that is not in the file yet, while time is left; returns what the file has."""
    widths = hidden_widths(forms, task, protocol)
    settings = {
        "task": task.name,
        "about": task.about,
        **task.facts(),
        "device": device,
        **asdict(protocol),
        "forms": {name: {"hidden": hidden, "parameters": own} for name, (hidden, own) in widths.items()},
    }
    if task.lower_is_better:
        settings["lower is better"] = True
    record, there, slowest = Record(output, settings), task.to(device), 0.0
    for form, rate, seed in wanted(forms, protocol, record):
        if deadline.left() < slowest or deadline.left() == 0:
            record.left_out.append({"form": form, "rate": rate, "seed": seed, "reason": "time"})
            continue
        before = deadline.left()
        found = run_one(forms[form], widths[form][0], there, protocol, rate, seed, device)
        slowest = max(slowest, before - deadline.left() if before != float("inf") else 0.0)
        record.put({"form": form, "rate": rate, "seed": seed, **found})
        print(f"{task.name} {form}, rate {rate}, seed {seed}: test {found['test']:.3f}", flush=True)
    record.save()
    return json.loads(output.read_text())
