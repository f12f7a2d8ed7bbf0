"""Makes shards and a tokenizer of Flickr30k or COCO, from the files that their owners give out.

    # Flickr30k or COCO with the splits of Karpathy and Li 2015; of COCO, train2014 and val2014 lie in the folder
    python examples/data/caption_shards.py karpathy dataset_flickr30k.json flickr30k-images --out flickr30k
    python examples/data/caption_shards.py karpathy dataset_coco.json coco --out coco_shards
    # COCO with its own train and val
    python examples/data/caption_shards.py coco annotations/captions_train2017.json train2017 \
        annotations/captions_val2017.json val2017 --out coco_shards
    # Flickr30k's own captions, which have no split: 1000 images are held out by a hash of their names
    python examples/data/caption_shards.py flickr30k results_20130124.token flickr30k-images --out flickr30k

Written: train-*.tar, val-*.tar and tokenizer.json, as `csat pretrain` and `quality_tables.py captions` read them. Each
image is cut to a centred square and reduced to `--side` pixels; all of its captions are kept. Needs pillow, tokenizers
and typer.
"""

from __future__ import annotations

import io
import json
import tarfile
from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer
from make_dataset import SAMPLES_PER_SHARD, order, train_tokenizer
from PIL import Image, ImageOps

HELD_OUT = 1000
"""Images of Flickr30k's usual test split."""


@dataclass(frozen=True)
class Described:
    """An image, its captions, and whether it is held out."""

    file: Path
    captions: tuple[str, ...]
    held_out: bool


# ---- the three formats -----------------------------------------------------------------------------------------------


def of_karpathy(file: Path, images: Path, held_out: str = "test") -> list[Described]:
    """`dataset_*.json`: train and restval are trained on, `held_out` is held out, the other split is left out."""
    found = []
    for image in json.loads(file.read_text())["images"]:
        if image["split"] in ("train", "restval", held_out):
            path = images / image.get("filepath", "") / image["filename"]
            captions = tuple(sentence["raw"] for sentence in image["sentences"])
            found.append(Described(path, captions, image["split"] == held_out))
    return found


def of_coco(file: Path, images: Path, held_out: bool) -> list[Described]:
    """`captions_*.json` of one split."""
    whole = json.loads(file.read_text())
    captions: dict[int, list[str]] = defaultdict(list)
    for annotation in whole["annotations"]:
        captions[annotation["image_id"]].append(annotation["caption"])
    return [Described(images / i["file_name"], tuple(captions[i["id"]]), held_out) for i in whole["images"]]


def of_flickr30k(file: Path, images: Path, held_out: int = HELD_OUT) -> list[Described]:
    """`results_*.token`, lines `NAME.jpg#NUMBER<tab>CAPTION`."""
    captions: dict[str, list[str]] = defaultdict(list)
    for line in file.read_text().splitlines():
        name, _, caption = line.partition("\t")
        captions[name.partition("#")[0]].append(caption)
    names = sorted(captions, key=order)
    return [Described(images / name, tuple(captions[name]), i < held_out) for i, name in enumerate(names)]


# ---- shards ----------------------------------------------------------------------------------------------------------


def members(described: Described, side: int) -> Iterator[tuple[str, bytes]]:
    """Suffix and content of an image's members.

    Raises:
        ValueError: the image is not there or cannot be read; no caption.
    """
    captions = [" ".join(caption.split()) for caption in described.captions]
    if not any(captions):
        raise ValueError(f"{described.file.name} has no caption")
    try:
        with Image.open(described.file) as opened:
            square = ImageOps.fit(opened.convert("RGB"), (side, side), Image.Resampling.BICUBIC)
    except OSError as error:
        raise ValueError(f"{described.file}: {error.strerror or error}") from error
    packed = io.BytesIO()
    square.save(packed, "WEBP", quality=90)
    yield "webp", packed.getvalue()
    yield "captions.txt", "\n".join(caption for caption in captions if caption).encode()


def write_split(out: Path, name: str, images: Iterable[Described], side: int) -> None:
    """The images in shards, in an order by a hash of their names; shards of an earlier run are removed."""
    for old in out.glob(f"{name}-*.tar"):
        old.unlink()
    images = sorted(images, key=lambda image: order(image.file.name))
    shards = max(1, -(-len(images) // SAMPLES_PER_SHARD), 2 * (name == "train"))  # the last one may choose a rate
    for i in range(shards):
        with tarfile.open(out / f"{name}-{i:06d}.tar", "w") as tar:
            for image in images[i::shards]:
                for suffix, content in members(image, side):
                    info = tarfile.TarInfo(f"{image.file.stem}.{suffix}")
                    info.size = len(content)
                    tar.addfile(info, io.BytesIO(content))


def write(images: list[Described], out: Path, side: int) -> None:
    """Both splits and the tokenizer of the training captions."""
    out.mkdir(parents=True, exist_ok=True)
    train, held_out = ([image for image in images if image.held_out == part] for part in (False, True))
    for name, split in (("train", train), ("val", held_out)):
        if not split:
            raise ValueError(f"no image for {name}")
        write_split(out, name, split, side)
    vocabulary = train_tokenizer(out, [caption for image in train for caption in image.captions])
    print(f"{len(train)} images to train on, {len(held_out)} held out, {vocabulary} tokens: {out}")


# ---- the command -----------------------------------------------------------------------------------------------------

app = typer.Typer(add_completion=False, help=__doc__, rich_markup_mode=None)
Out = Annotated[Path, typer.Option(help="folder of the shards")]
Side = Annotated[int, typer.Option(help="pixels; data.image_size of the run")]


@app.command()
def karpathy(file: Path, images: Path, out: Out, side: Side = 64, held_out: str = "test") -> None:
    write(of_karpathy(file, images, held_out), out, side)


@app.command()
def coco(train: Path, train_images: Path, val: Path, val_images: Path, out: Out, side: Side = 64) -> None:
    write(of_coco(train, train_images, False) + of_coco(val, val_images, True), out, side)


@app.command()
def flickr30k(file: Path, images: Path, out: Out, side: Side = 64, held_out: int = HELD_OUT) -> None:
    write(of_flickr30k(file, images, held_out), out, side)


if __name__ == "__main__":
    app()
