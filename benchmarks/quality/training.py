"""The one trainer: the same data in the same order, steps, batch, optimizer and schedule for every mechanism."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from csat_ext.module import parameter_groups

from .task import Task


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


def precision(device: torch.device | str) -> torch.autocast:
    """bfloat16 autocast on CUDA, nothing elsewhere."""
    kind = torch.device(device).type
    return torch.autocast(kind, torch.bfloat16, enabled=kind == "cuda")


def train(model: nn.Module, task: Task, schedule: Schedule, rate: float, seed: int) -> dict[str, Any]:
    """Trains in place; returns the mean loss of the last tenth of the steps and milliseconds a step.

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
    for batch in task.batches(schedule.steps, schedule.batch, seed):
        with precision(device):
            loss = task.loss(model, batch)
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


@torch.no_grad()
def scored(model: nn.Module, task: Task, batch: int) -> dict[str, Any]:
    """The task's scores of a trained model."""
    model.eval()
    with precision(next(model.parameters()).device):
        return task.scores(model, batch)
