"""Causal associative recall: what each causal form remembers of 48 pairs through 16 measurements.

A sequence has 48 tokens that each carry a key and a value, then 16 that carry a key alone; keys are distinct, values
are drawn from 16 (chance 1/16). One layer of causal attention and a linear classifier have to name the value of each
key that is asked for. Full attention looks the pair up; what has mixed 48 tokens into 16 measurements must have kept
them apart. Equal widths, steps and seeds; the rate is the better of two on validation sequences, with the first seed.

    python examples/associative_recall.py                  # every form, three seeds; resumable
    python examples/associative_recall.py --forms sdpa "prefix, content" --steps 300
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from csat_ext import CSATAttention, CSATConfig
from csat_ext.bench.machine import header
from csat_ext.pretrain.model import SDPAttention

PAIRS, ASKED, VALUES = 48, 16, 16
N, WIDTH, HEADS, M, BLOCK = PAIRS + ASKED, 64, 2, 16, 16
BATCH, RATES = 64, (3e-3, 1e-2)
RESULT = Path(__file__).resolve().parents[1] / "benchmarks" / "results" / "associative_recall.json"


# ---- what is compared ------------------------------------------------------------------------------------------------


class Masked(SDPAttention):
    """Full attention under a mask (N, N), True = seen."""

    def __init__(self, seen: Tensor) -> None:
        super().__init__(WIDTH, HEADS)
        self.register_buffer("seen", seen)

    def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]
        q, k, v = self.heads(x)
        return self.out_proj(F.scaled_dot_product_attention(q, k, v, self.seen).transpose(1, 2).flatten(-2))

    def heads(self, x: Tensor) -> list[Tensor]:
        projections = self.q_proj, self.k_proj, self.v_proj
        return [p(x).unflatten(-1, (HEADS, -1)).transpose(1, 2) for p in projections]


class LinearAttention(Masked):
    """Causal linear attention with features elu(x) + 1 (Katharopoulos et al. 2020)."""

    def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]
        q, k, v = self.heads(x)
        weights = ((F.elu(q) + 1) @ (F.elu(k) + 1).mT) * self.seen
        return self.out_proj(((weights @ v) / weights.sum(-1, keepdim=True)).transpose(1, 2).flatten(-2))


def csat(**changes: Any) -> nn.Module:
    """A causal form of CSAT without a decoder: what is measured here is the memory."""
    return CSATAttention(WIDTH, HEADS, CSATConfig(anchors=(), decoder="none", **changes))


TOKEN = torch.arange(N)
CAUSAL = TOKEN[:, None] >= TOKEN
prefix = partial(csat, causal="prefix", measurements=M)
block = partial(csat, causal="block", block_size=BLOCK, measurements=BLOCK // 4)
FORMS: dict[str, Callable[[], nn.Module]] = {
    "sdpa": partial(Masked, CAUSAL),
    "prefix, content": prefix,
    "prefix, hashed columns": partial(prefix, content=False, ensemble="bucket"),
    "prefix, fixed signs": partial(prefix, content=False, ensemble="rademacher"),
    "block 16 to 4, fixed": block,
    "block 16 to 4, learned": partial(block, learned=True, length=BLOCK),
    "the window alone": partial(Masked, CAUSAL & (TOKEN[:, None] // BLOCK == TOKEN // BLOCK)),
    "linear attention": partial(LinearAttention, CAUSAL),
}


class Recall(nn.Module):
    """Keys (B, N) and values (B, N), VALUES where none is told -> logits (B, N, VALUES)."""

    def __init__(self, attention: nn.Module) -> None:
        super().__init__()
        self.keys, self.values = nn.Embedding(PAIRS, WIDTH), nn.Embedding(VALUES + 1, WIDTH)
        self.norm, self.attention, self.last = nn.LayerNorm(WIDTH), attention, nn.LayerNorm(WIDTH)
        self.classifier = nn.Linear(WIDTH, VALUES)

    def forward(self, keys: Tensor, values: Tensor) -> Tensor:
        x = self.keys(keys) + self.values(values)
        return self.classifier(self.last(x + self.attention(self.norm(x))))


# ---- task and training -----------------------------------------------------------------------------------------------


def batch(generator: torch.Generator, size: int = BATCH) -> tuple[Tensor, Tensor, Tensor]:
    """Keys (size, N), values (size, N) and the answers (size, ASKED)."""
    order = torch.rand(size, PAIRS, generator=generator).argsort(1)
    told = torch.randint(VALUES, (size, PAIRS), generator=generator)
    place = torch.rand(size, PAIRS, generator=generator).argsort(1)[:, :ASKED]  # of the pairs that are asked for
    keys = torch.cat([order, order.gather(1, place)], 1)
    values = torch.cat([told, torch.full((size, ASKED), VALUES)], 1)
    return keys, values, told.gather(1, place)


def trained(form: str, seed: int, rate: float, steps: int) -> Recall:
    torch.manual_seed(seed)
    model = Recall(FORMS[form]())
    optimizer = torch.optim.AdamW(model.parameters(), rate, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, total_steps=steps)
    generator = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        keys, values, answers = batch(generator)
        loss = F.cross_entropy(model(keys, values)[:, PAIRS:].flatten(0, 1), answers.flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    return model.eval()


@torch.no_grad()
def accuracy(model: Recall, seed: int) -> float:
    keys, values, answers = batch(torch.Generator().manual_seed(seed), 1000)
    return float((model(keys, values)[:, PAIRS:].argmax(-1) == answers).float().mean())


def run(form: str, seed: int, rate: float, steps: int) -> dict[str, Any]:
    model = trained(form, seed, rate, steps)
    scores = {name: round(accuracy(model, s), 4) for name, s in (("validation", 10**6), ("test", 10**6 + 1))}
    return {"form": form, "seed": seed, "rate": rate, **scores}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--forms", nargs="+", choices=FORMS, default=list(FORMS))
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--output", type=Path, default=RESULT)
    arguments = parser.parse_args()
    settings = {
        **{"pairs": PAIRS, "asked": ASKED, "values": VALUES, "m": M, "width": WIDTH, "heads": HEADS, "batch": BATCH},
        **{"steps": arguments.steps, "rates": list(RATES), "seeds": arguments.seeds},
    }
    result: dict[str, Any] = {"machine": header(), "settings": settings, "runs": []}
    if arguments.output.is_file():
        before = json.loads(arguments.output.read_text())
        if before["settings"] != settings:
            parser.error(f"{arguments.output} has runs of other settings; name another --output")
        result["runs"] = before["runs"]

    def one(form: str, seed: int, rate: float) -> dict[str, Any]:
        """The run, from the file where it is there."""
        asked = {"form": form, "seed": seed, "rate": rate}
        found = next((r for r in result["runs"] if asked.items() <= r.items()), None)
        if found is None:
            found = run(form, seed, rate, arguments.steps)
            result["runs"].append(found)
            arguments.output.write_text(json.dumps(result, indent=1) + "\n")
            print(found, flush=True)
        return found

    for form in arguments.forms:
        best = max((one(form, 0, rate) for rate in RATES), key=lambda r: r["validation"])["rate"]
        for seed in range(1, arguments.seeds):
            one(form, seed, best)


if __name__ == "__main__":
    main()
