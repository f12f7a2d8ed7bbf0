"""Bytes of text: a split by position, windows drawn for training, consecutive windows of what is held out."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from csat_ext.language.config import DataConfig


@dataclass(frozen=True)
class Text:
    """Both parts of the text, (bytes,) uint8, and the SHA-256 of the whole."""

    train: Tensor
    held_out: Tensor
    sha256: str


def files(config: DataConfig) -> list[Path]:
    """The files that the config names.

    Raises:
        FileNotFoundError: naming what does not exist, or holds no file of the suffixes.
    """
    found: list[Path] = []
    for name in config.text:
        path = Path(name).expanduser()
        inside = sorted(p for p in path.rglob("*") if p.suffix in config.suffixes and p.is_file())
        if not path.is_file() and not inside:
            raise FileNotFoundError(f"data.text: {path} is no file and no folder with files {list(config.suffixes)}")
        found += inside if path.is_dir() else [path]
    return list(dict.fromkeys(found))


def read_text(config: DataConfig) -> Text:
    """Reads every file and cuts off its last `held_out` share.

    Raises:
        FileNotFoundError: as `files`.
        ValueError: a part is shorter than one window.
    """
    contents = [path.read_bytes() for path in files(config)]
    borders = [len(content) - int(len(content) * config.held_out) for content in contents]
    parts = {
        "training": b"".join(content[:border] for content, border in zip(contents, borders, strict=True)),
        "held-out": b"".join(content[border:] for content, border in zip(contents, borders, strict=True)),
    }
    for name, part in parts.items():
        if len(part) <= config.context:
            raise ValueError(
                f"data.text: {len(part)} bytes of {name} text came, more than data.context = {config.context} are "
                "accepted"
            )
    train, held_out = (torch.from_numpy(np.frombuffer(part, np.uint8).copy()) for part in parts.values())
    return Text(train, held_out, hashlib.sha256(b"".join(contents)).hexdigest())


def training_windows(train: Tensor, config: DataConfig, index: int, rank: int, world_size: int) -> Tensor:
    """This rank's part of batch `index` of a run, (batch_size, context + 1) int64; the whole batch depends on the seed,
    the index and its size alone."""
    draws = np.random.default_rng([config.seed, index])
    starts = draws.integers(0, len(train) - config.context, config.batch_size * world_size)
    own = torch.from_numpy(starts[rank * config.batch_size : (rank + 1) * config.batch_size])
    return train[own[:, None] + torch.arange(config.context + 1)].long()


def held_out_windows(held_out: Tensor, config: DataConfig) -> Iterator[Tensor]:
    """Batches (up to batch_size, context + 1) int64 of consecutive windows, which together predict every byte once but
    the first and what is left over at the end. A window sees nothing before its first byte."""
    count = (len(held_out) - 1) // config.context
    starts = torch.arange(count) * config.context
    for own in starts.split(config.batch_size):
        yield held_out[own[:, None] + torch.arange(config.context + 1)].long()
