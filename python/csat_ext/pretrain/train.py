"""The pretraining loop: one script for one CPU, several CPU ranks, one GPU or many nodes, always through DeepSpeed."""

from __future__ import annotations

import gc
import json
import logging
import math
import os
import socket
import sys
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from csat_ext import __version__, checkpoints
from csat_ext.pretrain.config import PretrainConfig, from_dict, to_dict
from csat_ext.pretrain.data import CaptionTokenizer, batches_per_epoch, expand_shards, train_batches
from csat_ext.pretrain.model import Losses, VisionLanguageModel
from csat_ext.pretrain.progress import METRICS as METRICS
from csat_ext.pretrain.progress import Reporter
from csat_ext.section import SECTION, load_json, read_section

CHECKPOINTS = "checkpoints"
RUN = "run.json"  # the config of the run: what `evaluate` and `--resume` read
LOSSES = ("loss", "contrastive", "caption")
MAX_BAD_BATCHES = 10  # in a row: then it is not the data


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
        try:
            read_section(raw["deepspeed"])
            return cls(from_dict(raw["config"]), raw["deepspeed"])
        except (ValueError, TypeError, KeyError) as error:
            written = raw.get("csat_ext", "an older version")
            raise ValueError(
                f"{path} was written by csat_ext {written} and this is {__version__}, which does not take it: {error}"
            ) from error

    def save(self, output: Path) -> None:
        output.mkdir(parents=True, exist_ok=True)
        (output / RUN).write_text(
            json.dumps({"csat_ext": __version__, "config": to_dict(self.config), "deepspeed": self.deepspeed}, indent=1)
            + "\n"
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
        resume: continue from the newest sound checkpoint (`csat_ext.checkpoints`). On CPU the losses are bitwise those
            of an uninterrupted run.

    Raises:
        FileExistsError, FileNotFoundError: `output` holds checkpoints without `resume`, or no sound one with it.
        ValueError: the run in `output` had another model, other data or another attention, or an older version wrote
            it and its config means nothing here.
        FloatingPointError: a loss or a gradient is not finite; the checkpoints on disk are from before.
        OSError: a checkpoint could not be written.
    """
    _check_output(run, output, resume)
    set_up_process_group()
    engine = _engine(run)
    step = drawn = 0
    if resume:
        state = checkpoints.restore(engine, output / CHECKPOINTS)
        step = int(state["step"])
        drawn = int(state.get("batches", step * engine.gradient_accumulation_steps()))
    if dist.get_rank() == 0:
        run.save(output)
    train = run.config.train
    with Reporter(train, LOSSES, output, step, engine, _describe(run, engine)) as report:
        batches = _Batches(run, drawn)
        while step < train.steps:
            step += 1
            losses, tokens = _train_step(engine, batches, step)
            report.add(step, losses, tokens)
            if step % train.checkpoint_every == 0 or step == train.steps:
                check_gradients(engine, step)
                state = {"step": step, "batches": batches.drawn}
                checkpoints.save(engine, output / CHECKPOINTS, step, state, train.keep_checkpoints)


def set_up_process_group() -> None:
    """Joins the launcher's process group, or makes a group of one where no launcher (torchrun, deepspeed) set RANK.

    Sets DS_ACCELERATOR=cpu on a machine without a GPU, and keeps DeepSpeed's own messages below the level of errors.

    Raises:
        RuntimeError: MPI or srun started several processes, which know nothing of each other here.
    """
    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    if "RANK" not in os.environ:
        _refuse_many_alone()
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


def _refuse_many_alone() -> None:
    """Several runs of one rank each would all write into one folder."""
    for started in ("OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "SLURM_STEP_NUM_TASKS"):
        if int(os.environ.get(started, "1")) > 1:
            raise RuntimeError(
                f"{started} is {os.environ[started]}, but RANK is not set: each of these processes would train alone. "
                "Start them by torchrun or by deepspeed's own launcher (pdsh), under srun one torchrun a node"
            )


def leave_process_group() -> None:
    """Waits for the other ranks and leaves the group; the memory of an engine that is gone can be used again."""
    dist.barrier()
    dist.destroy_process_group()
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def check_output(output: Path, resume: bool) -> None:
    """Refuses to overwrite a run, and to resume nothing."""
    latest = output / CHECKPOINTS / "latest"
    if not resume and latest.exists():
        raise FileExistsError(f"output: {output} holds checkpoints; pass --resume to continue them or another --output")
    if resume and not latest.exists():
        raise FileNotFoundError(f"--resume: {latest} does not exist, there is no checkpoint to continue")


def refuse_another_run(output: Path, pairs: dict[str, tuple[Any, Any]]) -> None:
    """Raises ValueError for the first of these parts, as it was and as it is now, that differs."""
    for name, (old, new) in pairs.items():
        if old != new:
            raise ValueError(f"--resume: {name} differs from the run in {output}: it was {old}, now {new}")


def _check_output(run: Run, output: Path, resume: bool) -> None:
    """Refuses to overwrite a run, to resume nothing, and to resume another run than the one in `output`."""
    check_output(output, resume)
    if not resume:
        return
    before = Run.load(output)
    pairs = {
        "model": (before.config.model, run.config.model),
        "data": (before.config.data, run.config.data),
        SECTION: (read_section(before.deepspeed), read_section(run.deepspeed)),
    }
    refuse_another_run(output, pairs)


def _engine(run: Run) -> Any:
    from csat_ext import deepspeed  # imports DeepSpeed, whose accelerator `set_up_process_group` chose

    model = build_model(run)
    model.train()
    engine, *_ = deepspeed.initialize(model=model, config=fill_auto(run, dist.get_world_size()))
    return engine


def fill_auto(run: Run, world_size: int) -> dict[str, Any]:
    """The DeepSpeed config of a run without `"auto"`: `filled`."""
    return filled(run.deepspeed, run.config.data.batch_size, run.config.train.steps, world_size)


def filled(deepspeed: dict[str, Any], batch_size: int, steps: int, world_size: int) -> dict[str, Any]:
    """The DeepSpeed config with `"auto"` replaced by what the YAML file knows: batch sizes and the schedule's length.

    Raises:
        ValueError: a number where the YAML file says another one.
    """
    config: dict[str, Any] = json.loads(json.dumps(deepspeed))
    accumulation = config.setdefault("gradient_accumulation_steps", 1)
    if isinstance(accumulation, bool) or not isinstance(accumulation, int) or accumulation < 1:
        raise ValueError(
            f"DeepSpeed config: gradient_accumulation_steps is {accumulation!r}; accepted: a positive int (the batch "
            "sizes follow from it and from the run's config)"
        )
    _fill(config, "train_micro_batch_size_per_gpu", batch_size)
    _fill(config, "train_batch_size", batch_size * accumulation * world_size)
    schedule = config.get("scheduler", {}).get("params", {})
    if "total_num_steps" in schedule:
        _fill(schedule, "total_num_steps", steps)
    config.setdefault("steps_per_print", sys.maxsize)
    return config


def _fill(section: dict[str, Any], key: str, value: int) -> None:
    if section.setdefault(key, "auto") not in ("auto", value):
        raise ValueError(
            f'DeepSpeed config: {key} is {section[key]!r} but the run\'s config makes it {value}; write "auto"'
        )
    section[key] = value


class _Batches:
    """This rank's batches from micro batch `drawn` of the run on, epoch after epoch."""

    def __init__(self, run: Run, drawn: int) -> None:
        self.skip_bad, self.drawn = run.config.train.bad_batches == "skip", drawn
        self._stream = self._endless(run, drawn)

    @staticmethod
    def _endless(run: Run, start: int) -> Iterator[dict[str, Any]]:
        rank, world_size = dist.get_rank(), dist.get_world_size()
        epoch, first = divmod(start, batches_per_epoch(run.config.data, world_size))
        while True:
            yield from train_batches(run.config.data, epoch, rank, world_size, start_batch=first)
            epoch, first = epoch + 1, 0

    def __next__(self) -> dict[str, Any]:
        self.drawn += 1
        return next(self._stream)


def _train_step(engine: Any, batches: _Batches, step: int) -> tuple[torch.Tensor, int]:
    """One optimizer step; returns this rank's mean losses (3,) and how many tokens, visual and text, it saw."""
    accumulation = engine.gradient_accumulation_steps()
    total, tokens = torch.zeros(3, device=engine.device), 0
    for _ in range(accumulation):
        losses, batch = _finite_losses(engine, batches, step)
        engine.backward(losses.total)
        engine.step()
        total += torch.stack([loss.detach().float() for loss in losses]) / accumulation
        tokens += len(batch["key"]) * engine.module.vision.position.shape[1] + int(batch["token_mask"].sum())
    return total, tokens


def _finite_losses(engine: Any, batches: _Batches, step: int) -> tuple[Losses, dict[str, Any]]:
    """Losses of the next batch, and the batch; one that is not finite on some rank stops the run or is left out by all
    ranks, before a gradient is made of it."""
    for _ in range(MAX_BAD_BATCHES):
        batch = next(batches)
        losses = engine(*(batch[key].to(engine.device, non_blocking=True) for key in ("image", "tokens", "token_mask")))
        bad = (~losses.total.detach().isfinite()).float()
        dist.all_reduce(bad)
        if not bad:
            return losses, batch
        where = f"{int(bad)} of {dist.get_world_size()} rank(s)"
        told = f"step {step}: the loss of batch {batches.drawn} is not finite on {where}"
        if not batches.skip_bad:
            raise FloatingPointError(
                f"{told}; no weight was touched. Mend the data, or resume with train.bad_batches=skip"
            )
        if dist.get_rank() == 0:
            warnings.warn(f"{told}; left out", stacklevel=2)
    raise FloatingPointError(
        f"step {step}: {MAX_BAD_BATCHES} batches in a row have a loss that is not finite: the weights are at fault; "
        "lower the learning rate and resume an earlier checkpoint"
    )


def check_gradients(engine: Any, step: int) -> None:
    """Refuses to save weights that a gradient of NaN went into; under fp16 the loss scaler leaves such steps out."""
    norm = engine.get_global_grad_norm()
    if norm is not None and not engine.fp16_enabled() and not math.isfinite(norm):
        raise FloatingPointError(
            f"step {step}: the norm of the gradient is {norm}; nothing was saved. Lower the learning rate and resume"
        )


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
