"""The pretraining loop: one script for one CPU, several CPU ranks, one GPU or many nodes, always through DeepSpeed."""

from __future__ import annotations

import json
import logging
import os
import shutil
import socket
import sys
import time
import warnings
from collections.abc import Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
import torch.distributed as dist

from csat_ext.pretrain.config import PretrainConfig, from_dict, to_dict
from csat_ext.pretrain.data import CaptionTokenizer, batches_per_epoch, expand_shards, train_batches
from csat_ext.pretrain.model import VisionLanguageModel
from csat_ext.section import SECTION, load_json, read_section

CHECKPOINTS = "checkpoints"
METRICS = "metrics.jsonl"
RUN = "run.json"  # the config of the run: what `evaluate` and `--resume` read


@dataclass(frozen=True)
class Run:
    """Everything that defines a run: the YAML file and the DeepSpeed JSON as they were read."""

    config: PretrainConfig
    deepspeed: dict[str, Any]

    @classmethod
    def load(cls, output: Path) -> Run:
        """The run that wrote the folder `output`. Raises FileNotFoundError where there is none."""
        path = output / RUN
        if not path.is_file():
            raise FileNotFoundError(f"{path} does not exist: {output} is not the output folder of a pretraining run")
        raw = json.loads(path.read_text())
        return cls(from_dict(raw["config"]), raw["deepspeed"])

    def save(self, output: Path) -> None:
        output.mkdir(parents=True, exist_ok=True)
        (output / RUN).write_text(
            json.dumps({"config": to_dict(self.config), "deepspeed": self.deepspeed}, indent=1) + "\n"
        )


def read_run(config: PretrainConfig) -> Run:
    """Reads the DeepSpeed JSON of a config, and checks what it and the config point to before any heavy work.

    Raises:
        FileNotFoundError: the JSON, a shard or the tokenizer does not exist.
        ValueError, TypeError: as `csat_ext.section.read_section`.
    """
    ds_config = load_json(config.deepspeed)
    read_section(ds_config)
    expand_shards(config.data.train_shards, "data.train_shards")
    expand_shards(config.data.val_shards, "data.val_shards")
    CaptionTokenizer(config.data.tokenizer, config.data.text_length)
    return Run(config, ds_config)


def build_model(run: Run) -> VisionLanguageModel:
    """The model before conversion, its weights drawn from `train.seed`."""
    torch.manual_seed(run.config.train.seed)
    data = run.config.data
    return VisionLanguageModel(
        run.config.model,
        image_size=data.image_size,
        text_length=data.text_length,
        vocab_size=CaptionTokenizer(data.tokenizer, data.text_length).vocab_size,
        train=run.config.train,
    )


def pretrain(run: Run, output: Path, *, resume: bool = False) -> None:
    """Trains to `train.steps`, writing metrics, TensorBoard events and checkpoints under `output`.

    Args:
        run: config and DeepSpeed JSON.
        output: folder of the run; one that holds checkpoints is only accepted with `resume`.
        resume: continue from the newest checkpoint. On CPU the losses are bitwise those of an uninterrupted run.

    Raises:
        FileExistsError, FileNotFoundError: `output` holds checkpoints without `resume`, or none with it.
        ValueError: the run in `output` had another model, other data or another attention.
        FloatingPointError: the loss is no longer finite.
    """
    _check_output(run, output, resume)
    set_up_process_group()
    engine = _engine(run)
    step = 0
    if resume:
        _, state = engine.load_checkpoint(str(output / CHECKPOINTS))
        step = int(state["step"])
    if dist.get_rank() == 0:
        run.save(output)
    train = run.config.train
    with _Reporter(run, output, step, engine) as report:
        batches = _batches(run, step * engine.gradient_accumulation_steps())
        while step < train.steps:
            losses, tokens = _train_step(engine, batches)
            step += 1
            report.add(step, losses, tokens)
            if step % train.checkpoint_every == 0 or step == train.steps:
                _save(engine, output / CHECKPOINTS, step, train.keep_checkpoints)


def set_up_process_group() -> None:
    """Joins the launcher's process group, or makes a group of one where no launcher (torchrun, deepspeed) set RANK.

    Sets DS_ACCELERATOR=cpu on a machine without a GPU, and keeps DeepSpeed's own messages below the level of errors.
    """
    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    if "RANK" not in os.environ:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        os.environ.update(RANK="0", WORLD_SIZE="1", LOCAL_RANK="0", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    import deepspeed

    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    warnings.filterwarnings(
        "ignore", category=FutureWarning, module=r"torch\.distributed"
    )  # DeepSpeed's calls, not ours
    if os.environ.get("DS_ACCELERATOR") == "cpu":
        # DeepSpeed would compile a shared-memory all-reduce with g++ for a minute before the first step; gloo serves.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    else:
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
    if not dist.is_initialized():
        deepspeed.init_distributed(verbose=False)


def leave_process_group() -> None:
    """Waits for the other ranks (rank 0 may still evaluate) and leaves the group."""
    dist.barrier()
    dist.destroy_process_group()


def _check_output(run: Run, output: Path, resume: bool) -> None:
    """Refuses to overwrite a run, to resume nothing, and to resume another run than the one in `output`."""
    latest = output / CHECKPOINTS / "latest"
    if not resume:
        if latest.exists():
            raise FileExistsError(
                f"output: {output} holds checkpoints; pass --resume to continue them or another --output"
            )
        return
    if not latest.exists():
        raise FileNotFoundError(f"--resume: {latest} does not exist, there is no checkpoint to continue")
    before = Run.load(output)
    pairs = {
        "model": (before.config.model, run.config.model),
        "data": (before.config.data, run.config.data),
        SECTION: tuple(read_section(r.deepspeed) for r in (before, run)),
    }
    for name, (old, new) in pairs.items():
        if old != new:
            raise ValueError(f"--resume: {name} differs from the run in {output}: it was {old}, now {new}")


def _engine(run: Run) -> Any:
    from csat_ext import deepspeed  # imports DeepSpeed, whose accelerator `set_up_process_group` chose

    model = build_model(run)
    model.train()
    engine, *_ = deepspeed.initialize(model=model, config=fill_auto(run, dist.get_world_size()))
    return engine


def fill_auto(run: Run, world_size: int) -> dict[str, Any]:
    """The DeepSpeed config with `"auto"` replaced by what the YAML file knows: batch sizes and the schedule's length.

    Raises:
        ValueError: a number where the YAML file says another one.
    """
    config = json.loads(json.dumps(run.deepspeed))
    accumulation = config.setdefault("gradient_accumulation_steps", 1)
    if isinstance(accumulation, bool) or not isinstance(accumulation, int) or accumulation < 1:
        raise ValueError(
            f"DeepSpeed config: gradient_accumulation_steps is {accumulation!r}; accepted: a positive int (the batch "
            "sizes follow from it and from the run's config)"
        )
    _fill(config, "train_micro_batch_size_per_gpu", run.config.data.batch_size)
    _fill(config, "train_batch_size", run.config.data.batch_size * accumulation * world_size)
    schedule = config.get("scheduler", {}).get("params", {})
    if "total_num_steps" in schedule:
        _fill(schedule, "total_num_steps", run.config.train.steps)
    config.setdefault("steps_per_print", sys.maxsize)
    return config


def _fill(section: dict[str, Any], key: str, value: int) -> None:
    if section.setdefault(key, "auto") not in ("auto", value):
        raise ValueError(
            f'DeepSpeed config: {key} is {section[key]!r} but the run\'s config makes it {value}; write "auto"'
        )
    section[key] = value


def _batches(run: Run, start: int) -> Iterator[dict[str, Any]]:
    """This rank's batches from micro batch `start` of the run on, epoch after epoch."""
    rank, world_size = dist.get_rank(), dist.get_world_size()
    epoch, first = divmod(start, batches_per_epoch(run.config.data, world_size))
    while True:
        yield from train_batches(run.config.data, epoch, rank, world_size, start_batch=first)
        epoch, first = epoch + 1, 0


def _train_step(engine: Any, batches: Iterator[dict[str, Any]]) -> tuple[torch.Tensor, int]:
    """One optimizer step; returns this rank's mean losses (3,) and how many tokens, visual and text, it saw."""
    accumulation = engine.gradient_accumulation_steps()
    total, tokens = torch.zeros(3, device=engine.device), 0
    for _ in range(accumulation):
        batch = next(batches)
        image, ids, mask = (
            batch[key].to(engine.device, non_blocking=True) for key in ("image", "tokens", "token_mask")
        )
        losses = engine(image, ids, mask)
        engine.backward(losses.total)
        engine.step()
        total += torch.stack([loss.detach().float() for loss in losses]) / accumulation
        tokens += image.shape[0] * engine.module.vision.position.shape[1] + int(batch["token_mask"].sum())
    return total, tokens


def _save(engine: Any, folder: Path, step: int, keep: int) -> None:
    engine.save_checkpoint(str(folder), tag=f"step-{step:08d}", client_state={"step": step})
    if dist.get_rank() == 0:
        for old in sorted(folder.glob("step-*"))[:-keep]:
            shutil.rmtree(old)
    dist.barrier()


class _Reporter(AbstractContextManager["_Reporter"]):
    """Metrics of the run on rank 0: JSON lines, TensorBoard, and a progress bar or, without a terminal, plain lines."""

    def __init__(self, run: Run, output: Path, step: int, engine: Any) -> None:
        self.train, self.engine, self.output = run.config.train, engine, output
        self.first = self.last = step
        self.window = torch.zeros(3, device=engine.device)
        self.tokens = 0
        self.started = self.mark = time.perf_counter()
        self.main = dist.get_rank() == 0
        if not self.main:
            return
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
        from torch.utils.tensorboard import SummaryWriter

        self.console = Console(soft_wrap=True)
        self.console.print(_describe(run, engine))
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
        total, contrastive, caption = (mean / dist.get_world_size() / (step - self.last) for mean in means)
        if not torch.isfinite(torch.tensor(total)):
            raise FloatingPointError(
                f"step {step}: the loss is {total}; lower the learning rate or resume an earlier checkpoint"
            )
        now = time.perf_counter()
        if self.main:
            metrics = {
                "step": step,
                "loss": total,
                "contrastive": contrastive,
                "caption": caption,
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
        status = (
            f"loss {metrics['loss']:.3f} (contrastive {metrics['contrastive']:.3f}, caption {metrics['caption']:.3f})  "
            f"{metrics['tokens_per_s']:,.0f} tokens/s"
        )
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
            kept = [line for line in path.read_text().splitlines() if line and json.loads(line)["step"] <= step]
            path.write_text("".join(line + "\n" for line in kept))

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.main:
            self.progress.stop()
            self.lines.close()
            self.board.close()


def _describe(run: Run, engine: Any) -> str:
    from csat_ext.module import CSATAttention
    from csat_ext.pretrain.model import SDPAttention

    kinds = {"csat": CSATAttention, "sdpa": SDPAttention}
    sites = {kind: sum(isinstance(m, cls) for m in engine.module.modules()) for kind, cls in kinds.items()}
    weights = sum(getattr(p, "ds_numel", p.numel()) for p in engine.module.parameters())
    words = ", ".join(f"{count} {kind}" for kind, count in sites.items() if count)
    section = read_section(run.deepspeed)
    if section.enabled:
        attention = section.attention
        words += f" (m = {attention.measurements}, {attention.ensemble}, decoder {attention.decoder})"
    return (
        f"{weights / 1e6:.2f} M parameters, attention modules: {words}; "
        f"{dist.get_world_size()} rank(s) on {engine.device}, ZeRO stage {engine.zero_optimization_stage()}, "
        f"global batch {engine.train_batch_size()}"
    )
