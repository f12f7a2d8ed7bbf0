"""Fashion-MNIST (Xiao, Rasul and Vollgraf 2017), pixel by pixel: 784 grey values, 10 classes.

From the files of Debian's package `dataset-fashion-mnist`, or the same four files in another folder; nothing is
downloaded.
"""

from __future__ import annotations

import gzip
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from .classification import Classification, Split, splits_of

DEBIAN = Path("/usr/share/datasets/fashion-mnist")
IMAGES, LABELS = 0x803, 0x801
"""First word of an IDX file of bytes with three axes, with one."""


def idx(path: Path, magic: int) -> Tensor:
    """The array of a gzipped IDX file of bytes.

    Raises:
        ValueError: the file is not there, or is none.
    """
    try:
        data = gzip.decompress(path.read_bytes())
    except OSError as error:
        raise ValueError(
            f"{path.name}: not in {path.parent} ({error.strerror or error}); install dataset-fashion-mnist (Debian)"
        ) from None
    axes = magic & 0xFF
    header = np.frombuffer(data, ">i4", count=1 + axes)
    shape = tuple(int(size) for size in header[1:])
    if header[0] != magic or len(data) != 4 * (1 + axes) + int(np.prod(shape)):
        raise ValueError(f"{path.name} is no IDX file of bytes with {axes} axes")
    return torch.from_numpy(np.frombuffer(data, np.uint8, offset=4 * (1 + axes)).reshape(shape).copy())


def fashion_mnist(counts: tuple[int, int, int], seed: int = 0, folder: Path = DEBIAN) -> Classification:
    """Train and validation images out of the 60,000, test images out of the 10,000, each in an order by the seed."""
    parts = {}
    for name, split in (("train", "train"), ("test", "t10k")):
        images = idx(folder / f"{split}-images-idx3-ubyte.gz", IMAGES).flatten(1)
        labels = idx(folder / f"{split}-labels-idx1-ubyte.gz", LABELS).long()
        order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))
        parts[name] = Split(images[order], None, labels[order])
    train, validation, _ = splits_of(parts["train"].tokens, None, parts["train"].labels, (*counts[:2], 0))
    (test, *_) = splits_of(parts["test"].tokens, None, parts["test"].labels, (counts[2], 0, 0))
    return Classification("fashion-mnist", "Fashion-MNIST by pixels", 10, 256, train, validation, test, grid=(28, 28))
