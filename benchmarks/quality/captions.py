"""Image-text retrieval and captioning by the pretraining job's model (the paper's Tables 3 and 4).

The model, its losses, data and metrics are those of `csat_ext.pretrain`. Attention is exchanged where
`examples/ds_csat.json` exchanges it: in the image tower, and from the captions to the image. The rate is chosen on the
last training shard, which is then no training data.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import count, islice
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from torch import Tensor, nn

from csat_ext.pretrain.config import ModelConfig, TrainConfig
from csat_ext.pretrain.data import Batch, CaptionTokenizer, DataConfig, expand_shards, load_samples, train_batches
from csat_ext.pretrain.evaluate import embed_and_caption, measured, retrieval
from csat_ext.pretrain.model import Mlp, VisionLanguageModel

from .model import Layer, Size
from .task import Task

SHIPPED = Path(__file__).resolve().parents[2] / "examples" / "data"
IMAGE_SIZE, TEXT_LENGTH, PATCH = 64, 24, 4
GRID = IMAGE_SIZE // PATCH, IMAGE_SIZE // PATCH
TEXT_LAYERS, DECODER_LAYERS = 1, 1
LABEL_SMOOTHING = 0.1
CHOSEN_BY, CHOSEN_ON, ITEMS = "R@10", 400, 64
"""What chooses the rate, among how many pairs; images of a forward pass that is scored."""


def exchange_attention(model: VisionLanguageModel, layer: Layer, size: Size, hidden: int, seed: int) -> None:
    """Puts a form of attention, starting from the same projections, into the image tower and between the captions and
    the image, and MLPs of that hidden width into the image tower."""
    tokens = model.vision.position.shape[1]
    sites = [(block, "attn") for block in model.vision.blocks] + [(b, "cross_attn") for b in model.decoder.blocks]
    for i, (block, name) in enumerate(sites):
        made = layer(size.shape(tokens, seed, i))
        made.load_state_dict(getattr(block, name).state_dict(), strict=False)
        setattr(block, name, made)
    for block in model.vision.blocks:
        block.mlp = Mlp(size.width, hidden)
        for linear in (block.mlp[0], block.mlp[2]):
            nn.init.xavier_uniform_(linear.weight)
            nn.init.zeros_(linear.bias)


def _to(batch: Batch, device: torch.device | str) -> Batch:
    return {key: value.to(device) if isinstance(value, Tensor) else value for key, value in batch.items()}


@dataclass(frozen=True)
class Captions(Task):
    """Attributes:
    data: training shards, and in `val_shards` those of the test.
    chosen_on: shards whose pairs choose the rate.
    """

    about: str
    data: DataConfig
    chosen_on: tuple[str, ...]
    device: str = "cpu"

    name = "captions"

    def facts(self) -> dict[str, Any]:
        images = [self._images(shards) for shards in self._shards()]
        train, chosen, test = (len(own) for own in images)
        known = set(images[0])
        return {
            "tokens": 1 + GRID[0] * GRID[1],
            "pairs": [train, min(chosen, CHOSEN_ON), test],
            "text layers": TEXT_LAYERS,
            "decoder": DECODER_LAYERS,
            "training images among": [[sum(image in known for image in own), len(own)] for own in images[1:]],
        }

    def _images(self, shards: tuple[str, ...]) -> list[bytes]:
        samples = load_samples(replace(self.data, train_shards=shards))
        return [sample.pixels.numpy().tobytes() for sample in samples]

    def _shards(self) -> tuple[tuple[str, ...], ...]:
        return self.data.train_shards, self.chosen_on, self.data.val_shards

    def to(self, device: torch.device | str) -> Captions:
        return replace(self, device=str(device))

    def model(self, layer: Layer, size: Size, hidden: int, seed: int) -> VisionLanguageModel:
        config = ModelConfig(PATCH, size.width, size.heads, size.layers, TEXT_LAYERS, DECODER_LAYERS)
        model = VisionLanguageModel(
            config,
            image_size=self.data.image_size,
            text_length=self.data.text_length,
            vocab_size=CaptionTokenizer(self.data.tokenizer, self.data.text_length).vocab_size,
            train=TrainConfig(label_smoothing=LABEL_SMOOTHING),
        )
        exchange_attention(model, layer, size, hidden, seed)
        return model

    def batches(self, steps: int, batch: int, seed: int) -> Iterator[Batch]:
        """Epoch after epoch, shuffled and augmented by the seed."""
        data = replace(self.data, batch_size=batch, seed=seed)
        endless = (pairs for epoch in count() for pairs in train_batches(data, epoch))
        for pairs in islice(endless, steps):
            yield _to(pairs, self.device)

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        return model(batch["image"], batch["tokens"], batch["token_mask"]).total

    def scores(self, model: nn.Module, batch: int) -> dict[str, Any]:
        """Mean of both ways' recall at 10, to choose the rate by and for the test; all metrics of the test beside."""
        data = replace(self.data, batch_size=ITEMS)
        others = embed_and_caption(model, replace(data, val_shards=self.chosen_on), CHOSEN_ON, caption=False)
        figures = measured(embed_and_caption(model, data))
        return {
            "validation": _chosen_by(retrieval(others)),
            "test": _chosen_by(figures["retrieval"]),
            "figures": figures,
        }


def _chosen_by(recall: dict[str, dict[str, dict[str, float]]]) -> float:
    return fmean(way[CHOSEN_BY]["score"] for way in recall.values())


def captions(folder: Path = SHIPPED) -> Captions:
    """The pairs of a folder with shards train-*.tar and val-*.tar, in gzip or not, and tokenizer.json.

    Raises:
        ValueError: a file is not there, or there is one training shard alone.
    """
    try:
        train, test = (expand_shards(str(folder / f"{part}-*.tar*")) for part in ("train", "val"))
    except FileNotFoundError as error:
        raise ValueError(f"--captions: {error}") from None
    if len(train) < 2:
        raise ValueError(f"--captions: {folder.name} has one training shard; at least 2 are accepted")
    data = DataConfig(tuple(train[:-1]), tuple(test), str(folder / "tokenizer.json"), IMAGE_SIZE, TEXT_LENGTH)
    about = "The clip art of examples/data" if folder == SHIPPED else f"The pairs of {folder.name}"
    return Captions(about, data, tuple(train[-1:]))
