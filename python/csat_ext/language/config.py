"""The YAML file of a language model: sizes and form of attention, text, schedule.

Optimizer, precision and ZeRO stage are in the DeepSpeed JSON that the file names. The `csat_attention` section of such
a JSON converts attention that looks both ways and is refused here: `model.attention` chooses among the causal forms.
"""

from __future__ import annotations

import dataclasses
import typing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from csat_ext.config import CSATConfig
from csat_ext.pretrain.config import at_least, checked, read

ATTENTION = ("sdpa", "block", "prefix")


@dataclass(frozen=True)
class ModelConfig:
    """Sizes of `LanguageModel`.

    Attributes:
        attention: ``"sdpa"``, full causal attention, or the causal form of CSAT whose section is read.
        width: embedding width, a multiple of `heads` and even.
        heads: attention heads of every block.
        layers: blocks.
        hidden: hidden width of a block's MLP beside full attention. Beside CSAT it is as much smaller as makes up for
            CSAT's own parameters, so that all three models have as many.
        block, prefix: the layers of both forms; their `layer` is counted by the model.
    """

    attention: str = "block"
    width: int = 64
    heads: int = 4
    layers: int = 2
    hidden: int = 256
    block: CSATConfig = field(
        default_factory=lambda: CSATConfig(
            causal="block", block_size=32, measurements=8, anchors=(), window_blocks=1, decoder="none"
        )
    )
    prefix: CSATConfig = field(
        default_factory=lambda: CSATConfig(causal="prefix", measurements=32, anchors=(), decoder="none")
    )

    def __post_init__(self) -> None:
        if self.attention not in ATTENTION:
            raise ValueError(f"model.attention: {self.attention!r} came, accepted: {', '.join(ATTENTION)}")
        for name in ("width", "heads", "layers", "hidden"):
            at_least(f"model.{name}", getattr(self, name), 1)
        if self.width % self.heads or self.width % 2:
            raise ValueError(f"model.width: {self.width} is not even or no multiple of model.heads = {self.heads}")
        for form in ("block", "prefix"):
            causal = getattr(self, form).causal
            if causal != form:
                raise ValueError(f"model.{form}.causal: {causal!r} came, {form!r} is accepted")


@dataclass(frozen=True)
class DataConfig:
    """Text, read as bytes.

    Attributes:
        text: files, and folders whose files of these suffixes are read, in the order of their names.
        suffixes: of files in folders.
        held_out: the last share of every file, which no training window reaches.
        context: bytes that a window predicts.
        batch_size: windows of one rank's batch.
        seed: of which windows are drawn.
    """

    text: str | tuple[str, ...]
    suffixes: tuple[str, ...] = (".txt", ".md")
    held_out: float = 0.1
    context: int = 256
    batch_size: int = 16
    seed: int = 0

    def __post_init__(self) -> None:
        object.__setattr__(self, "text", (self.text,) if isinstance(self.text, str) else tuple(self.text))
        if not self.text:
            raise ValueError("data.text: nothing came, at least one file or folder is accepted")
        if not 0 < self.held_out < 1:
            raise ValueError(f"data.held_out: {self.held_out} came, a number between 0 and 1 is accepted")
        for name in ("context", "batch_size"):
            at_least(f"data.{name}", getattr(self, name), 1)
        at_least("data.seed", self.seed, 0)


@dataclass(frozen=True)
class TrainConfig:
    """Length and bookkeeping of a run, as in `csat_ext.pretrain.config.TrainConfig`.

    Attributes:
        steps: optimizer steps of the whole run; the JSON's `"auto"` schedule lengths follow it.
        seed: seed of the initial weights.
        log_every, checkpoint_every: steps between two lines of metrics, two checkpoints; the last step writes both.
        keep_checkpoints: how many of the newest checkpoints stay on disk.
    """

    steps: int = 400
    seed: int = 0
    log_every: int = 20
    checkpoint_every: int = 200
    keep_checkpoints: int = 2

    def __post_init__(self) -> None:
        for name in ("steps", "log_every", "checkpoint_every", "keep_checkpoints"):
            at_least(f"train.{name}", getattr(self, name), 1)


@dataclass(frozen=True)
class LanguageConfig:
    """A whole run: the three sections of the YAML file and the path of the DeepSpeed JSON."""

    data: DataConfig
    deepspeed: str
    model: ModelConfig = field(default_factory=ModelConfig)
    train: TrainConfig = field(default_factory=TrainConfig)


def load(path: str | Path, overrides: typing.Sequence[str] = (), deepspeed: str | None = None) -> LanguageConfig:
    """Reads a YAML file, as `csat_ext.pretrain.config.read` does, into a checked config."""
    return from_dict(read(path, overrides, deepspeed, LanguageConfig, ("text",)))


def from_dict(raw: dict[str, Any]) -> LanguageConfig:
    """The config of a nested dict with absolute paths. Raises ValueError naming the wrong key or value."""
    return checked(raw, LanguageConfig)


def to_dict(config: LanguageConfig) -> dict[str, Any]:
    """The nested dict that `from_dict` reads back."""
    return dataclasses.asdict(config)
