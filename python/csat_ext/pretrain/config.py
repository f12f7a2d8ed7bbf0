"""The YAML file of a pretraining run: sizes of the model, data, schedule and evaluation.

Attention is not named here: the `csat_attention` section of the DeepSpeed JSON chooses it (see `csat_ext.deepspeed`),
and so are optimizer, precision and ZeRO stage, which DeepSpeed owns.
"""

from __future__ import annotations

import dataclasses
import typing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from csat_ext.config import refuse_unknown
from csat_ext.pretrain.data import DataConfig

Config = typing.TypeVar("Config")


@dataclass(frozen=True)
class ModelConfig:
    """Sizes of `VisionLanguageModel`; image size, text length and vocabulary come from the data.

    Attributes:
        patch_size: side of a square image patch, in pixels: even, and it divides the image's side.
        width: embedding width of all three transformers, a multiple of `heads` and of 4.
        heads: attention heads of every block.
        vision_layers, text_layers, decoder_layers: blocks of the three transformers.
        mlp_ratio: hidden width of a block's MLP over `width`.
        embed_dim: width of the contrastive embedding.
        temperature: initial softmax temperature of the contrastive loss (CLIP: 0.07).
    """

    patch_size: int = 4
    width: int = 192
    heads: int = 6
    vision_layers: int = 4
    text_layers: int = 2
    decoder_layers: int = 2
    mlp_ratio: float = 4.0
    embed_dim: int = 128
    temperature: float = 0.07

    def __post_init__(self) -> None:
        for name in ("patch_size", "width", "heads", "vision_layers", "text_layers", "decoder_layers", "embed_dim"):
            at_least(f"model.{name}", getattr(self, name), 1)
        if self.width % self.heads or self.width % 4:
            raise ValueError(f"model.width: {self.width} is not a multiple of model.heads = {self.heads} and of 4")
        if self.patch_size % 2:
            raise ValueError(f"model.patch_size: {self.patch_size} came, an even number is accepted")
        if self.mlp_ratio <= 0 or self.temperature <= 0:
            raise ValueError("model.mlp_ratio and model.temperature: positive numbers are accepted")


@dataclass(frozen=True)
class TrainConfig:
    """Length, loss weights and bookkeeping of a run.

    Attributes:
        steps: optimizer steps of the whole run; the JSON's `"auto"` schedule lengths follow it.
        seed: seed of the initial weights (the data has its own, `data.seed`).
        contrastive_weight, caption_weight: weights of the two losses.
        label_smoothing: of the captioning cross entropy, in [0, 1).
        log_every: steps between two lines of metrics.
        checkpoint_every: steps between two checkpoints; the last step always writes one.
        keep_checkpoints: how many of the newest checkpoints stay on disk.
        bad_batches: what a batch does whose loss is not finite on some rank: ``"stop"`` the run before it touches a
            weight, or be left out (``"skip"``), by all ranks alike.
        evaluate: run the evaluation on the held-out split after the last step.
    """

    steps: int = 400
    seed: int = 0
    contrastive_weight: float = 1.0
    caption_weight: float = 1.0
    label_smoothing: float = 0.0
    log_every: int = 10
    checkpoint_every: int = 100
    keep_checkpoints: int = 2
    bad_batches: str = "stop"
    evaluate: bool = True

    def __post_init__(self) -> None:
        for name in ("steps", "log_every", "checkpoint_every", "keep_checkpoints"):
            at_least(f"train.{name}", getattr(self, name), 1)
        for name in ("contrastive_weight", "caption_weight"):
            at_least(f"train.{name}", getattr(self, name), 0)
        if self.bad_batches not in ("stop", "skip"):
            raise ValueError(f"train.bad_batches: {self.bad_batches!r} came, 'stop' or 'skip' is accepted")
        if not 0 <= self.label_smoothing < 1:
            raise ValueError(f"train.label_smoothing: {self.label_smoothing} came, a number in [0, 1) is accepted")


@dataclass(frozen=True)
class EvaluateConfig:
    """Held-out evaluation.

    Attributes:
        batch_size: images a forward pass.
        examples: rows of the picture with example retrievals and captions.
        max_items: evaluate on the first so many held-out items; None takes all.
    """

    batch_size: int = 64
    examples: int = 6
    max_items: int | None = None

    def __post_init__(self) -> None:
        at_least("evaluate.batch_size", self.batch_size, 1)
        at_least("evaluate.examples", self.examples, 0)
        if self.max_items is not None:
            at_least("evaluate.max_items", self.max_items, 1)


@dataclass(frozen=True)
class PretrainConfig:
    """A whole run: the four sections of the YAML file and the path of the DeepSpeed JSON."""

    data: DataConfig
    deepspeed: str
    model: ModelConfig = field(default_factory=ModelConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    evaluate: EvaluateConfig = field(default_factory=EvaluateConfig)


DATA_PATHS = ("train_shards", "val_shards", "tokenizer")


def load(path: str | Path, overrides: typing.Sequence[str] = (), deepspeed: str | None = None) -> PretrainConfig:
    """Reads a YAML file, as `read` does, into a checked config, as `checked` does."""
    return checked(read(path, overrides, deepspeed, PretrainConfig, DATA_PATHS), PretrainConfig)


def from_dict(raw: dict[str, Any]) -> PretrainConfig:
    """The config of a nested dict with absolute paths. Raises ValueError naming the wrong key or value."""
    return checked(raw, PretrainConfig)


def to_dict(config: PretrainConfig) -> dict[str, Any]:
    """The nested dict that `from_dict` reads back."""
    return dataclasses.asdict(config)


# ---- YAML files of any run -------------------------------------------------------------------------------------------


def read(
    path: str | Path, overrides: typing.Sequence[str], deepspeed: str | None, kind: type, data_paths: tuple[str, ...]
) -> dict[str, Any]:
    """Reads a YAML file; relative paths in it are relative to the file itself.

    Args:
        path: the YAML file.
        overrides: `section.key=value` strings, the value in YAML syntax; they win over the file.
        deepspeed: path of a DeepSpeed JSON (relative to the working directory) that wins over the file's.
        kind: the dataclass of the file, for messages.
        data_paths: keys of the section `data` that hold paths.

    Raises:
        FileNotFoundError: `path` does not exist.
        ValueError: a wrong override, malformed YAML.
    """
    import yaml

    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"config: no file {path}")
    try:
        raw = yaml.safe_load(path.read_text())
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"config: {path} is not valid YAML: {' '.join(str(error).split())}") from error
    if not isinstance(raw, dict):
        raise ValueError(
            f"config: {path} holds {type(raw).__name__}, a mapping with the keys {_names(kind)} is accepted"
        )
    for override in overrides:
        _override(raw, override)
    if deepspeed is not None:
        raw["deepspeed"] = str(Path(deepspeed).resolve())
    return _absolute(raw, path.resolve().parent, data_paths)


def checked(raw: dict[str, Any], kind: type[Config]) -> Config:
    """The dataclass of a nested dict with absolute paths. Raises ValueError naming the wrong key or value."""
    from pydantic import TypeAdapter, ValidationError

    _refuse_unknown(raw, kind, "")
    try:
        return TypeAdapter(kind).validate_python(raw)
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(str(part) for part in first["loc"])
        message = str(first["ctx"]["error"]) if first["type"] == "value_error" else first["msg"]  # a check of our own
        where = f"{key}: " if key and not message.startswith(f"{key}.") else ""
        raise ValueError(f"config: {where}{message}") from error


def _names(cls: Any) -> list[str]:
    return [f.name for f in dataclasses.fields(cls)]


def _refuse_unknown(raw: Any, cls: Any, prefix: str) -> None:
    if not isinstance(raw, dict):
        raise ValueError(
            f"config: {prefix.rstrip('.') or 'the file'} is {raw!r}, a mapping with the keys {_names(cls)} is accepted"
        )
    types = typing.get_type_hints(cls)
    refuse_unknown(raw, tuple(types), f"config: {prefix.rstrip('.') or 'the file'}")
    for key, value in raw.items():
        if dataclasses.is_dataclass(types[key]):
            _refuse_unknown(value, types[key], f"{prefix}{key}.")


def _override(raw: dict[str, Any], override: str) -> None:
    import yaml

    key, separator, value = override.partition("=")
    if not separator or not key:
        raise ValueError(f"override: {override!r} came, section.key=value is accepted")
    *sections, last = key.split(".")
    target = raw
    for section in sections:
        target = target.setdefault(section, {})
        if not isinstance(target, dict):
            raise ValueError(f"override: {override!r}: {section} is not a section")
    try:
        target[last] = yaml.safe_load(value)
    except yaml.YAMLError as error:
        raise ValueError(f"override: the value of {override!r} is not valid YAML") from error


def _absolute(raw: dict[str, Any], base: Path, data_paths: tuple[str, ...]) -> dict[str, Any]:
    """The same mapping with its relative paths made absolute; URLs are left alone."""

    def resolve(value: Any) -> Any:
        if isinstance(value, list):
            return [resolve(item) for item in value]
        return value if not isinstance(value, str) or "://" in value or value.startswith("pipe:") else str(base / value)

    raw = {key: resolve(value) if key == "deepspeed" else value for key, value in raw.items()}
    if isinstance(raw.get("data"), dict):
        raw["data"] = {key: resolve(value) if key in data_paths else value for key, value in raw["data"].items()}
    return raw


def at_least(name: str, value: float, bound: float) -> None:
    """Raises ValueError, naming the value, where it is below the bound."""
    if value < bound:
        raise ValueError(f"{name}: {value} came, at least {bound} is accepted")
