"""The one trainer: the same examples in the same order, steps, batch, optimizer and schedule for every mechanism."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from csat_ext.module import parameter_groups

from .task import Split, Task


@dataclass(frozen=True)
class Schedule:
    """AdamW with weight decay on matrices, linear warm-up over a tenth of the steps, then a cosine to 0; gradients are
    cut to norm 1."""

    steps: int
    batch: int
    weight_decay: float = 0.01


def rate_at(step: int, steps: int) -> float:
    """Share of the rate at a step: up over the first tenth, down a cosine after it."""
    warm = max(steps // 10, 1)
    if step < warm:
        return (step + 1) / warm
    return 0.5 * (1 + math.cos(math.pi * (step - warm) / max(steps - warm, 1)))


def batches(examples: int, schedule: Schedule, seed: int) -> Iterator[Tensor]:
    """Rows of every step, by the seed alone: permutations of all the examples, one after the other."""
    generator = torch.Generator().manual_seed(seed)
    left = torch.empty(0, dtype=torch.int64)
    for _ in range(schedule.steps):
        while len(left) < schedule.batch:
            left = torch.cat((left, torch.randperm(examples, generator=generator)))
        yield left[: schedule.batch]
        left = left[schedule.batch :]


def train(model: nn.Module, split: Split, schedule: Schedule, rate: float, seed: int) -> dict[str, Any]:
    """Trains in place, in bfloat16 autocast on CUDA; returns the mean loss of the last tenth of the steps and seconds a
    step.

    Raises:
        FloatingPointError: the loss is no number any more.
    """
    device = next(model.parameters()).device
    groups = parameter_groups(model, lr=rate, weight_decay=schedule.weight_decay)
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.98))
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: rate_at(step, schedule.steps))
    model.train()
    losses = []
    start = time.perf_counter()
    for rows in batches(len(split), schedule, seed):
        rows = rows.to(device)
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            loss = cross_entropy(_logits(model, split, rows).float(), split.labels[rows])
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        scheduler.step()
        losses.append(loss.detach())
    last = float(torch.stack(losses[-max(schedule.steps // 10, 1) :]).mean())
    if not math.isfinite(last):
        raise FloatingPointError(f"the loss is {last} after {schedule.steps} steps at rate {rate}")
    return {"loss": last, "ms_a_step": 1e3 * (time.perf_counter() - start) / schedule.steps}


def _logits(model: nn.Module, split: Split, rows: Tensor | slice) -> Tensor:
    keep = None if split.keep is None else split.keep[rows]
    return model(split.tokens[rows], keep)


@torch.no_grad()
def accuracy(model: nn.Module, split: Split, batch: int) -> float:
    """Share of the examples whose label has the largest logit."""
    model.eval()
    device = next(model.parameters()).device
    right = 0
    for start in range(0, len(split), batch):
        rows = slice(start, start + batch)
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            logits = _logits(model, split, rows)
        right += int((logits.argmax(-1) == split.labels[rows]).sum())
    return right / len(split)


def on(task: Task, device: torch.device | str) -> Task:
    """The task with its splits on a device."""
    parts = (task.train.to(device), task.validation.to(device), task.test.to(device))
    return Task(task.name, task.about, task.classes, task.vocabulary, *parts)
