"""Training a language model through DeepSpeed, and its bits per byte on the text that was held out."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from csat_ext import __version__, checkpoints
from csat_ext.bench.machine import header
from csat_ext.language.config import DataConfig, LanguageConfig, from_dict, to_dict
from csat_ext.language.data import Text, files, held_out_windows, read_text, training_windows
from csat_ext.language.model import BYTES, LanguageModel, parameters
from csat_ext.pretrain.evaluate import stored_weights
from csat_ext.pretrain.progress import Reporter
from csat_ext.pretrain.train import (
    CHECKPOINTS,
    RUN,
    check_gradients,
    check_output,
    filled,
    refuse_another_run,
    set_up_process_group,
)
from csat_ext.section import SECTION, load_json, read_section

EVALUATION = "evaluation.json"


@dataclass(frozen=True)
class Run:
    """Everything that defines a run: the YAML file and the DeepSpeed JSON as they were read."""

    config: LanguageConfig
    deepspeed: dict[str, Any]

    @classmethod
    def load(cls, output: Path) -> Run:
        """The run that wrote the folder `output`.

        Raises:
            FileNotFoundError: there is none.
            ValueError: another kind of run wrote it, or another version that does not fit.
        """
        path = output / RUN
        if not path.is_file():
            raise FileNotFoundError(f"{path} does not exist: {output} is not the output folder of csat lm")
        raw = json.loads(path.read_text())
        try:
            return cls(from_dict(raw["config"]), raw["deepspeed"])
        except (ValueError, TypeError, KeyError) as error:
            raise ValueError(f"{path}: no run of csat lm that csat_ext {__version__} takes: {error}") from error

    def save(self, output: Path) -> None:
        output.mkdir(parents=True, exist_ok=True)
        whole = {"csat_ext": __version__, "config": to_dict(self.config), "deepspeed": self.deepspeed}
        (output / RUN).write_text(json.dumps(whole, indent=1) + "\n")


def read_run(config: LanguageConfig) -> Run:
    """Reads the DeepSpeed JSON of a config, and checks what it and the config point to before any heavy work.

    Raises:
        FileNotFoundError: the JSON or the text does not exist.
        ValueError, TypeError: as `csat_ext.section.read_section`; the section is enabled.
    """
    deepspeed = load_json(config.deepspeed)
    if read_section(deepspeed).enabled:
        raise ValueError(
            f"{SECTION}: an enabled section came; a language model has only causal attention, which model.attention "
            "chooses"
        )
    files(config.data)
    return Run(config, deepspeed)


def build_model(config: LanguageConfig) -> LanguageModel:
    """The model, its weights drawn from `train.seed`."""
    torch.manual_seed(config.train.seed)
    return LanguageModel(config.model)


def train(run: Run, output: Path, *, resume: bool = False) -> dict[str, Any]:
    """Trains to `train.steps`, writing metrics, TensorBoard events and checkpoints under `output`, and evaluates.

    Args:
        run: config and DeepSpeed JSON.
        output: folder of the run; one that holds checkpoints is only accepted with `resume`.
        resume: continue from the newest sound checkpoint; on CPU the losses are bitwise those of an uninterrupted run.

    Returns:
        The content of `evaluation.json`: `evaluate`.

    Raises:
        FileExistsError, FileNotFoundError: `output` holds checkpoints without `resume`, or no sound one with it.
        ValueError: the run in `output` had another model or other data; text too short for a window.
        FloatingPointError: a loss or a gradient is not finite; the checkpoints on disk are from before.
    """
    check_output(output, resume)
    config = run.config
    if resume:
        before = Run.load(output).config
        refuse_another_run(output, {"model": (before.model, config.model), "data": (before.data, config.data)})
    text = read_text(config.data)
    set_up_process_group()
    engine = _engine(run)
    step = int(checkpoints.restore(engine, output / CHECKPOINTS)["step"]) if resume else 0
    if dist.get_rank() == 0:
        run.save(output)
    with Reporter(config.train, ("loss",), output, step, engine, _describe(config, text, engine)) as report:
        while step < config.train.steps:
            step += 1
            report.add(step, *_train_step(engine, text, config.data, step))
            if step % config.train.checkpoint_every == 0 or step == config.train.steps:
                check_gradients(engine, step)
                checkpoints.save(engine, output / CHECKPOINTS, step, {"step": step}, config.train.keep_checkpoints)
    return _evaluated(engine.module, text, config, step, output)


def _engine(run: Run) -> Any:
    from csat_ext import deepspeed  # imports DeepSpeed, whose accelerator `set_up_process_group` chose

    config = run.config
    settings = filled(run.deepspeed, config.data.batch_size, config.train.steps, dist.get_world_size())
    engine, *_ = deepspeed.initialize(model=build_model(config).train(), config=settings)
    return engine


def _train_step(engine: Any, text: Text, data: DataConfig, step: int) -> tuple[Tensor, int]:
    """One optimizer step; returns this rank's mean loss (1,) and how many bytes it predicted."""
    accumulation = engine.gradient_accumulation_steps()
    total = torch.zeros(1, device=engine.device)
    for part in range(accumulation):
        index = (step - 1) * accumulation + part
        windows = training_windows(text.train, data, index, dist.get_rank(), dist.get_world_size())
        loss = engine(windows.to(engine.device))
        _refuse_not_finite(loss, step)
        engine.backward(loss)
        engine.step()
        total += loss.detach().float() / accumulation
    return total, accumulation * data.batch_size * data.context


def _refuse_not_finite(loss: Tensor, step: int) -> None:
    bad = (~loss.detach().isfinite()).float()
    dist.all_reduce(bad)
    if bad:
        raise FloatingPointError(
            f"step {step}: the loss is not finite on {int(bad)} rank(s); no weight was touched. Lower the rate, resume"
        )


def _evaluated(model: LanguageModel, text: Text, config: LanguageConfig, step: int, output: Path) -> dict[str, Any]:
    """`evaluate`, written by rank 0."""
    result = evaluate(model, text, config) | {"step": step, "machine": header()}
    if dist.get_rank() == 0:
        (output / EVALUATION).write_text(json.dumps(result, indent=1) + "\n")
    return result


def evaluate(model: LanguageModel, text: Text, config: LanguageConfig) -> dict[str, Any]:
    """Bits per byte of the text held out, beside those of the frequencies of single bytes in the training text."""
    model.eval()
    return {
        "attention": config.model.attention,
        "parameters": parameters(model),
        "bits per byte": bits_per_byte(model, text.held_out, config.data),
        "bits per byte of single bytes": single_byte_bits(text),
        "bytes": {"training": len(text.train), "held out": len(text.held_out), "sha256": text.sha256},
    }


@torch.no_grad()
def bits_per_byte(model: LanguageModel, held_out: Tensor, data: DataConfig) -> float:
    """Mean over the bytes that consecutive windows predict (`held_out_windows`)."""
    device = model.embedding.weight.device
    total, count = 0.0, 0
    for windows in held_out_windows(held_out, data):
        total += float(model(windows.to(device))) * len(windows)
        count += len(windows)
    return total / count / math.log(2)


def single_byte_bits(text: Text) -> float:
    """Bits a held-out byte under the frequencies of bytes in the training text, one added to every count."""
    counts = torch.bincount(text.train.long(), minlength=BYTES).double() + 1
    return float(-(counts / counts.sum()).log2()[text.held_out.long()].mean())


def load_trained(checkpoint: Path) -> LanguageModel:
    """The model of the newest checkpoint under the output folder of a run, in evaluation mode.

    Raises:
        FileNotFoundError: the folder holds no run or no checkpoint.
    """
    run = Run.load(checkpoint)
    latest = checkpoint / CHECKPOINTS / "latest"
    if not latest.is_file():
        raise FileNotFoundError(f"{latest} does not exist: the run in {checkpoint} has not written a checkpoint")
    model = build_model(run.config)
    model.load_state_dict(stored_weights(latest.parent, latest.read_text().strip()))
    return model.eval().to("cuda" if torch.cuda.is_available() else "cpu")


def _describe(config: LanguageConfig, text: Text, engine: Any) -> str:
    return (
        f"{parameters(engine.module)} parameters, {config.model.layers} layers of {config.model.attention} attention; "
        f"{len(text.train)} bytes of training text, {len(text.held_out)} held out; "
        f"{dist.get_world_size()} rank(s) on {engine.device}, global batch {engine.train_batch_size()}"
    )
