"""How a run tells what it does: JSON lines, TensorBoard events, a progress bar or plain lines."""

from __future__ import annotations

import json
import time
from contextlib import AbstractContextManager
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol

import torch
import torch.distributed as dist

METRICS = "metrics.jsonl"


class Schedule(Protocol):
    """What the reporter reads of a run's `train` section."""

    @property
    def steps(self) -> int: ...

    @property
    def log_every(self) -> int: ...


class Reporter(AbstractContextManager["Reporter"]):
    """Metrics of the run on rank 0: JSON lines, TensorBoard, and a progress bar or, without a terminal, plain lines.

    Args:
        train: length of the run and how often to write.
        losses: names of what `add` takes, the total first.
        output: folder of the run.
        step: the last step that was made before.
        engine: of DeepSpeed.
        title: what is trained, the first line.
    """

    def __init__(
        self, train: Schedule, losses: tuple[str, ...], output: Path, step: int, engine: Any, title: str
    ) -> None:
        self.train, self.losses, self.engine, self.output = train, losses, engine, output
        self.first = self.last = step
        self.window = torch.zeros(len(losses), device=engine.device)
        self.tokens = 0
        self.started = self.mark = time.perf_counter()
        self.main = dist.get_rank() == 0
        if not self.main:
            return
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
        from torch.utils.tensorboard import SummaryWriter

        self.console = Console(soft_wrap=True)
        self.console.print(title)
        self._forget_after(step)
        self.lines = (output / METRICS).open("a")
        self.board = SummaryWriter(str(output / "tensorboard"), purge_step=step + 1)
        columns = (
            TextColumn("training"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[status]}"),
            TimeRemainingColumn(),
        )
        self.progress = Progress(*columns, console=self.console, disable=not self.console.is_terminal)
        self.task = self.progress.add_task("", total=self.train.steps, completed=step, status="")
        self.progress.start()

    def add(self, step: int, losses: torch.Tensor, tokens: int) -> None:
        """Takes one step's local losses; every `log_every` steps they are averaged over ranks and written."""
        self.window += losses
        self.tokens += tokens
        if step % self.train.log_every == 0 or step == self.train.steps:
            self._flush(step)
        if self.main:
            self.progress.update(self.task, completed=step)

    def _flush(self, step: int) -> None:
        sums = torch.cat([self.window, torch.tensor([self.tokens], device=self.window.device)]).double()
        dist.all_reduce(sums)
        *means, tokens = sums.tolist()
        averages = [mean / dist.get_world_size() / (step - self.last) for mean in means]
        now = time.perf_counter()
        if self.main:
            metrics = {
                "step": step,
                **dict(zip(self.losses, averages, strict=True)),
                "lr": self.engine.get_lr()[0],
                "tokens_per_s": tokens / (now - self.mark),
                "seconds": now - self.started,
            }
            norm = self.engine.get_global_grad_norm()
            if norm is not None:  # the engine keeps none for float32 without ZeRO
                metrics["grad_norm"] = float(norm)
            self._write(metrics)
        self.window.zero_()
        self.tokens, self.last, self.mark = 0, step, now

    def _write(self, metrics: dict[str, Any]) -> None:
        self.lines.write(json.dumps(metrics) + "\n")
        self.lines.flush()
        for name, value in metrics.items():
            if name != "step":
                self.board.add_scalar(f"train/{name}", value, metrics["step"])
        total, *terms = (f"{name} {metrics[name]:.3f}" for name in self.losses)
        shown = f"{total} ({', '.join(terms)})" if terms else total
        status = f"{shown}  {metrics['tokens_per_s']:,.0f} tokens/s"
        self.progress.update(self.task, status=status)
        if not self.console.is_terminal:
            step = metrics["step"]
            left = metrics["seconds"] / (step - self.first) * (self.train.steps - step)
            self.console.print(
                f"step {step}/{self.train.steps}  {status}  lr {metrics['lr']:.2e}  ETA {left:.0f} s", highlight=False
            )

    def _forget_after(self, step: int) -> None:
        """Drops the metrics of steps that a resumed run will make again."""
        path = self.output / METRICS
        if path.is_file():
            # A line that was being written when the run was killed has no brace at its end.
            lines = [line for line in path.read_text().splitlines() if line.endswith("}")]
            kept = [line for line in lines if json.loads(line)["step"] <= step]
            path.write_text("".join(line + "\n" for line in kept))

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.main:
            self.progress.stop()
            self.lines.close()
            self.board.close()
