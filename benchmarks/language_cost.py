"""What a training step of the causal language model costs as its context grows: tokens a second and memory.

The model of `csat lm` with full attention and with both causal forms, equal parameters, one window of the context a
batch. A step is the loss and the gradients of all parameters; the optimizer costs the same under every form. The forms
of one context take turns; of every form the least time is taken. Memory is what a step holds at most beyond the
weights. Ratios are to `sdpa` at the same context and to the form's own shortest context.

    python benchmarks/language_cost.py                   # cuda where there is one, else cpu
    python benchmarks/language_cost.py --contexts 1024 4096 --turns 3
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from deadline import Deadline
from machine import header

from csat_ext import CSATConfig
from csat_ext.bench.clock import Call, Clock, clock_for
from csat_ext.language.config import ATTENTION, ModelConfig
from csat_ext.language.model import BYTES, LanguageModel, parameters

HERE = Path(__file__).parent
CONTEXTS = (1024, 2048, 4096, 8192, 16384)
LAYERS, WIDTH, HEADS = 4, 256, 4  # heads of 64, as the kernels like them
BLOCK, R, M = 128, 16, 64  # tokens and measurements of a block as in decoding.py; measurements of the prefix form
MIB = 2**20


def sizes(form: str) -> ModelConfig:
    """The model with one form of attention; `ModelConfig` makes parameters equal."""
    common = {"anchors": (), "decoder": "none"}
    return ModelConfig(
        attention=form,
        width=WIDTH,
        heads=HEADS,
        layers=LAYERS,
        hidden=4 * WIDTH,
        block=CSATConfig(causal="block", block_size=BLOCK, measurements=R, window_blocks=1, **common),
        prefix=CSATConfig(causal="prefix", measurements=M, **common),
    )


def step_of(model: LanguageModel, context: int, device: torch.device) -> Call:
    """The loss of one window and the gradients of all parameters."""
    window = torch.randint(BYTES, (1, context + 1), device=device)
    weights = list(model.parameters())

    def step() -> tuple[torch.Tensor, ...]:
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            return torch.autograd.grad(model(window), weights)

    return step


def measured(context: int, models: dict[str, LanguageModel], clock: Clock, device: torch.device, turns: int) -> Any:
    """One row: least milliseconds and bytes of every form at a context."""
    steps = {form: clock.prepare(step_of(model, context, device))[0] for form, model in models.items()}
    held = {form: clock.peak_bytes(step) for form, step in steps.items()}
    seconds = {form: min(samples) for form, samples in _turns(steps, clock, turns).items()}
    return {
        "context": context,
        "tokens a second": {form: float(f"{context / s:.5g}") for form, s in seconds.items()},
        "memory_MiB": {form: round(bytes_ / MIB, 1) for form, bytes_ in held.items()},
    }


def _turns(steps: dict[str, Call], clock: Clock, turns: int) -> dict[str, list[float]]:
    samples: dict[str, list[float]] = {form: [] for form in steps}
    for _ in range(turns):
        for form, step in steps.items():
            samples[form].append(clock.seconds([step]))
    return samples


def ratios(rows: Sequence[dict[str, Any]]) -> dict[str, dict[str, dict[str, float]]]:
    """Form -> context -> sdpa over it in time and memory, and its own time a token over that at the first context."""
    found: dict[str, dict[str, dict[str, float]]] = {}
    for row in rows:
        speed, memory = row["tokens a second"], row["memory_MiB"]
        for form in speed:
            found.setdefault(form, {})[str(row["context"])] = {
                "sdpa time over it": round(speed[form] / speed["sdpa"], 2),
                "sdpa memory over it": round(memory["sdpa"] / memory[form], 2),
                "time a token over its own at the first": round(rows[0]["tokens a second"][form] / speed[form], 2),
            }
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--contexts", type=int, nargs="+", default=CONTEXTS)
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=float("inf"), help="no context is begun after that time")
    parser.add_argument("--output", type=Path, help="default: benchmarks/results/language_cost_<device>.json")
    arguments = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    output = arguments.output or HERE / "results" / f"language_cost_{device.type}.json"
    torch.manual_seed(0)
    clock, deadline = clock_for(device, quick=True), Deadline(arguments.seconds)
    models = {form: LanguageModel(sizes(form)).to(device) for form in ATTENTION}
    result: dict[str, Any] = {
        "machine": header(),
        "settings": {
            "dtype": "bfloat16 by autocast" if device.type == "cuda" else "float32",
            **{"layers": LAYERS, "width": WIDTH, "heads": HEADS, "turns": arguments.turns},
            **{"block_size": BLOCK, "measurements_per_block": R, "window_blocks": 1, "m": M},
            "parameters": {form: parameters(model) for form, model in models.items()},
        },
        "rows": [],
    }
    for context in arguments.contexts:
        if deadline.left() <= 0:
            break
        result["rows"].append(measured(context, models, clock, device, arguments.turns))
        result["ratios"] = ratios(result["rows"])
        output.write_text(json.dumps(result, indent=1) + "\n")
        print(json.dumps(result["rows"][-1]), flush=True)


if __name__ == "__main__":
    main()
