"""Image-text batches from WebDataset tar shards: the same for a given (seed, epoch, rank) in every run and resumption.

Two ways of reading, chosen by ``DataConfig.samples_per_epoch``:

* ``None`` (small sets): every sample is decoded once into memory; an epoch is a permutation of them all, dealt out to
  the ranks.
* a number (large sets): shards are streamed, shuffled by shard and then in a buffer; an epoch is that many samples.
  Every reader (worker of a rank) has its own shards, or, when there are fewer shards than readers, its own share of
  every shard's samples.

Either way `train_batches(config, epoch, rank, world_size, start_batch=k)` is the same call without start_batch less its
first k batches, and every rank yields exactly `batches_per_epoch(config, world_size)` of them.
"""

from __future__ import annotations

import glob
import io
import os
import random
import warnings
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import torch
import torch.nn.functional as F
import webdataset as wds
from PIL import Image
from tokenizers import Tokenizer
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, IterableDataset, get_worker_info

IMAGE_SUFFIXES = ("png", "jpg", "jpeg", "webp")
CAPTION_SUFFIX, CAPTIONS_SUFFIX = "txt", "captions.txt"  # the one caption; several, one a line
PIXEL_MEAN = PIXEL_STD = 0.5  # images leave here in [-1, 1]
SHUFFLE_BUFFER = 1024  # raw samples held per reader when streaming
MEMORY_LIMIT = 4 << 30  # bytes of decoded pixels that samples_per_epoch=None may hold
_SIDED_WORDS = frozenset(("left", "right"))  # a caption with one of these forbids a mirror image

Batch: TypeAlias = dict[str, Any]


class CorruptSampleWarning(UserWarning):
    """Samples or shards that were skipped because they could not be read: how many so far, and why the last one."""


class CorruptSampleError(ValueError):
    """A sample or shard that could not be read, under ``strict``."""

    def __str__(self) -> str:
        return str(self.args[0])  # webdataset appends what it was reading to the arguments of what passes through it


@dataclass(frozen=True)
class DataConfig:
    """Where samples come from and what a batch looks like.

    Args:
        train_shards, val_shards: WebDataset shards: a URL or path pattern with brace expansion and (paths) globs, or
            several. Tar files, in gzip or not, with members ``KEY.{png,jpg,jpeg,webp}`` and ``KEY.txt``, the caption,
            or ``KEY.captions.txt``, one caption a line. ``pipe:`` is refused.
        tokenizer: path of a `tokenizers` JSON with [PAD], [BOS], [EOS] that encodes a caption as [BOS] ... [EOS].
        image_size: side of the square images, in pixels.
        text_length: tokens of a caption, [BOS] and [EOS] included. Longer captions lose their last words, never [EOS].
        batch_size: samples of one rank's batch.
        num_workers: loader processes per rank; 0 reads in this process. When streaming, the order depends on it.
        seed: of shuffling and augmentation.
        augment: random zoom, shift, mirror (not where the caption says left or right) of train images.
        samples_per_epoch: None holds the whole set in memory; a number streams, and is what all ranks together see in
            an epoch.
        strict: raise `CorruptSampleError` for a sample or shard that cannot be read, instead of skipping it with a
            counted `CorruptSampleWarning`.

    Raises:
        ValueError, TypeError: naming the field, when it is out of range or of another type.
    """

    train_shards: str | tuple[str, ...]
    val_shards: str | tuple[str, ...]
    tokenizer: str
    image_size: int = 64
    text_length: int = 32
    batch_size: int = 64
    num_workers: int = 0
    seed: int = 0
    augment: bool = True
    samples_per_epoch: int | None = None
    strict: bool = False

    def __post_init__(self) -> None:
        for name in ("train_shards", "val_shards"):
            value = getattr(self, name)
            patterns = (value,) if isinstance(value, str) else tuple(value) if isinstance(value, (list, tuple)) else ()
            if not patterns or not all(isinstance(p, str) and p for p in patterns):
                raise TypeError(f"{name} must be a pattern or a non-empty list of patterns, got {value!r}")
            object.__setattr__(self, name, patterns)
        if not isinstance(self.tokenizer, (str, os.PathLike)):
            raise TypeError(f"tokenizer must be a path, got {self.tokenizer!r}")
        object.__setattr__(self, "tokenizer", os.fspath(self.tokenizer))
        least = {
            "image_size": 1,
            "text_length": 3,
            "batch_size": 1,
            "num_workers": 0,
            "seed": 0,
            "samples_per_epoch": 1,
        }
        for name, low in least.items():
            value = getattr(self, name)
            if name == "samples_per_epoch" and value is None:
                continue
            if isinstance(value, bool) or not isinstance(value, int):
                raise TypeError(f"{name} must be an int, got {value!r}")
            if value < low:
                raise ValueError(f"{name} must be at least {low}, got {value}")
        for name in ("augment", "strict"):
            if not isinstance(getattr(self, name), bool):
                raise TypeError(f"{name} must be a bool, got {getattr(self, name)!r}")


class CaptionTokenizer:
    """A `tokenizers` file as the model needs it: fixed length, key mask, the ids of its special tokens.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is no tokenizer, lacks [PAD], [BOS] or [EOS], or does not encode as [BOS] ... [EOS].
    """

    def __init__(self, path: str | os.PathLike[str], length: int) -> None:
        if not Path(path).is_file():
            raise FileNotFoundError(f"tokenizer: no file {os.fspath(path)!r}")
        try:
            self._tokenizer = Tokenizer.from_file(os.fspath(path))
        except Exception as error:  # the library raises plain Exception
            raise ValueError(f"tokenizer: {os.fspath(path)!r} is not a tokenizers JSON: {error}") from error
        ids: dict[str, Any] = {token: self._tokenizer.token_to_id(token) for token in ("[PAD]", "[BOS]", "[EOS]")}
        if missing := [token for token, i in ids.items() if i is None]:
            raise ValueError(f"tokenizer: {os.fspath(path)!r} lacks {', '.join(missing)}")
        self.pad_id: int = ids["[PAD]"]
        self.bos_id: int = ids["[BOS]"]
        self.eos_id: int = ids["[EOS]"]
        self.length = length
        self.vocab_size: int = self._tokenizer.get_vocab_size()
        encoded = self._tokenizer.encode("a").ids
        if len(encoded) < 2 or (encoded[0], encoded[-1]) != (self.bos_id, self.eos_id):
            raise ValueError(
                f"tokenizer: {os.fspath(path)!r} must encode a caption as [BOS] ... [EOS]; 'a' became {encoded}"
            )
        self._tokenizer.enable_truncation(length)
        self._tokenizer.enable_padding(pad_id=self.pad_id, pad_token="[PAD]", length=length)

    def encode(self, caption: str) -> tuple[Tensor, Tensor]:
        """Tokens (length,) int64 and key mask (length,) bool, True = keep."""
        encoded = self._tokenizer.encode(caption)
        return torch.tensor(encoded.ids), torch.tensor(encoded.attention_mask, dtype=torch.bool)

    def decode(self, tokens: Tensor | list[int]) -> str:
        """The text of one row of tokens up to its first [EOS], special tokens left out."""
        ids = tokens.tolist() if isinstance(tokens, Tensor) else list(tokens)
        if self.eos_id in ids:
            ids = ids[: ids.index(self.eos_id)]
        return str(self._tokenizer.decode(ids, skip_special_tokens=True)).strip()


@dataclass
class Sample:
    """One image with its C captions: pixels (3, H, W) uint8, tokens (C, L) int64, token_mask (C, L) bool."""

    key: str
    captions: tuple[str, ...]
    pixels: Tensor
    tokens: Tensor
    token_mask: Tensor


def expand_shards(patterns: str | tuple[str, ...], name: str = "shards") -> list[str]:
    """Shard URLs of patterns: braces expanded, paths globbed; order as given, each pattern sorted.

    Raises:
        FileNotFoundError: a path that does not exist, or a pattern without a match.
        ValueError: a ``pipe:`` URL (it runs a shell command).
    """
    shards: list[str] = []
    for pattern in (patterns,) if isinstance(patterns, str) else patterns:
        for url in wds.shardlists.expand_urls(pattern):
            if url.startswith("pipe:"):
                raise ValueError(f"{name}: {url!r} would run a shell command; give a path or a URL of a tar file")
            if "://" in url and not url.startswith("file://"):
                shards.append(url)
                continue
            path = url.removeprefix("file://")
            found = [path] if os.path.exists(path) else sorted(glob.glob(path))
            if not found:
                raise FileNotFoundError(f"{name}: nothing matches {path!r} (from {pattern!r})")
            shards += found
    return shards


class _SkippedCount:
    """The policy for what cannot be read: raise (strict), or count and warn at the 1st, 10th, 100th, ... time."""

    def __init__(self, split: str, strict: bool) -> None:
        self.split, self.strict, self.count, self.reason = split, strict, 0, ""

    def __call__(self, error: Exception) -> bool:
        """A `webdataset` handler: True means go on."""
        if isinstance(error, CorruptSampleError):  # webdataset asks again at every stage that an exception passes
            raise error
        if self.strict:
            raise CorruptSampleError(f"{self.split}: {_message(error)}") from error
        self.count += 1
        self.reason = _message(error)
        if self.count in (1, 10, 100, 1000, 10000):
            self.report()
        return True

    def report(self) -> None:
        if self.count:
            message = f"{self.split}: {self.count} samples or shards skipped so far; the last: {self.reason}"
            warnings.warn(message, CorruptSampleWarning, stacklevel=3)


def _message(error: Exception) -> str:
    return f"{type(error).__name__}: " + ", ".join(str(a) for a in error.args if isinstance(a, str))


def raw_samples(shards: list[str], handler: Callable[[Exception], bool]) -> Iterator[dict[str, Any]]:
    """Undecoded samples of the shards in their order: ``__key__``, ``__url__`` and the members' bytes by suffix."""
    yield from wds.DataPipeline(wds.SimpleShardList(shards), wds.tarfile_to_samples(handler=handler))


def decode(raw: dict[str, Any], image_size: int, tokenizer: CaptionTokenizer) -> Sample:
    """One sample from its members: the image over white, RGB, resized to a square of image_size; captions stripped.

    Raises:
        ValueError: no image, an image that Pillow cannot read, no caption, or captions that are empty or not UTF-8.
    """
    where = f"sample {raw['__key__']!r} of {raw['__url__']!r}"
    members = sorted(name for name in raw if not name.startswith("__"))
    suffix = next((s for s in IMAGE_SUFFIXES if s in raw), None)
    if suffix is None:
        raise ValueError(f"{where} has no image: members {members}, accepted {list(IMAGE_SUFFIXES)}")
    written = next((s for s in (CAPTION_SUFFIX, CAPTIONS_SUFFIX) if s in raw), None)
    if written is None:
        raise ValueError(f"{where} has no caption: members {members}, needs {CAPTION_SUFFIX!r}")
    try:
        text = raw[written].decode("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{where}: the caption is not UTF-8 ({error})") from error
    lines = text.splitlines() if written == CAPTIONS_SUFFIX else [text]
    captions = tuple(caption for line in lines if (caption := line.strip()))
    if not captions:
        raise ValueError(f"{where}: the caption is empty")
    try:
        with Image.open(io.BytesIO(raw[suffix])) as opened:
            image = opened.convert("RGBA") if opened.mode in ("RGBA", "LA", "PA", "P") else opened.convert("RGB")
    except Exception as error:  # Pillow's decoders raise what they like
        raise ValueError(f"{where}: {suffix} cannot be decoded ({type(error).__name__}: {error})") from error
    if image.mode == "RGBA":
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
    if image.size != (image_size, image_size):
        image = image.resize((image_size, image_size), Image.Resampling.BICUBIC)
    pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1).contiguous()
    tokens, masks = zip(*map(tokenizer.encode, captions), strict=True)
    return Sample(raw["__key__"], captions, pixels, torch.stack(tokens), torch.stack(masks))


def decoded(
    raw: Iterator[dict[str, Any]], config: DataConfig, handler: Callable[[Exception], bool]
) -> Iterator[Sample]:
    """`decode` over a stream; what cannot be decoded goes to the handler."""
    tokenizer = CaptionTokenizer(config.tokenizer, config.text_length)
    for members in raw:
        try:
            sample = decode(members, config.image_size, tokenizer)
        except ValueError as error:
            handler(error)
            continue
        yield sample


def augmentation(sample: Sample, seed: int, epoch: int) -> Tensor:
    """Affine map (2, 3) from output to input coordinates in [-1, 1] (`affine_grid`): a crop of 76 to 116 % of the side
    (beyond the image its border is repeated), shifted by up to a twentieth of it, mirrored half the time. A function of
    (seed, epoch, key, captions) alone."""
    rng = np.random.default_rng((seed, epoch, zlib.crc32(sample.key.encode())))
    zoom_x, zoom_y = rng.uniform(0.8, 1.1) * rng.uniform(0.95, 1.05, size=2)
    shift_x, shift_y = rng.uniform(-0.1, 0.1, size=2)
    words = " ".join(sample.captions).lower().split()
    mirror = -1.0 if rng.random() < 0.5 and _SIDED_WORDS.isdisjoint(words) else 1.0
    return torch.tensor([[mirror * zoom_x, 0.0, shift_x], [0.0, zoom_y, shift_y]], dtype=torch.float32)


def drawn_caption(sample: Sample, seed: int, epoch: int) -> int:
    """Which of an image's captions an epoch sees: a function of (seed, epoch, key) and of how many there are."""
    count = len(sample.captions)
    return int(np.random.default_rng((seed, epoch, zlib.crc32(sample.key.encode()), 1)).integers(count))


def collate(samples: list[Sample], drawn: tuple[int, int] | None = None, augment: bool = False) -> Batch:
    """A batch: image (B, 3, H, W) float32 in [-1, 1], tokens (B, L) int64, token_mask (B, L) bool (True = keep) of one
    caption of each, and the lists key, caption (that one) and captions (all of each).

    `drawn` is (seed, epoch), which draw the caption and, with `augment`, what becomes of the image; None takes the
    first caption and the image as it is.
    """
    image = torch.stack([s.pixels for s in samples]).float().div_(255).sub_(PIXEL_MEAN).div_(PIXEL_STD)
    if drawn is not None and augment:
        maps = torch.stack([augmentation(s, *drawn) for s in samples])
        grid = F.affine_grid(maps, list(image.shape), align_corners=False)
        image = F.grid_sample(image, grid, mode="bilinear", padding_mode="border", align_corners=False)
    chosen = [0 if drawn is None else drawn_caption(s, *drawn) for s in samples]
    return {
        "image": image,
        "tokens": torch.stack([s.tokens[i] for s, i in zip(samples, chosen, strict=True)]),
        "token_mask": torch.stack([s.token_mask[i] for s, i in zip(samples, chosen, strict=True)]),
        "key": [s.key for s in samples],
        "caption": [s.captions[i] for s, i in zip(samples, chosen, strict=True)],
        "captions": [list(s.captions) for s in samples],
    }


# --- the whole set in memory ---


def load_samples(config: DataConfig) -> tuple[Sample, ...]:
    """Every readable train sample, decoded, sorted by key; read once per process and state of the files.

    Raises:
        ValueError: nothing readable, two samples with one key, or more than `MEMORY_LIMIT` of pixels.
    """
    shards = expand_shards(config.train_shards, "train_shards")
    state = tuple((s, os.stat(s).st_mtime_ns, os.stat(s).st_size) if os.path.exists(s) else (s,) for s in shards)
    return _load_samples(config.tokenizer, config.image_size, config.text_length, config.strict, state)


@lru_cache(maxsize=2)
def _load_samples(
    tokenizer: str, image_size: int, text_length: int, strict: bool, state: tuple[tuple[Any, ...], ...]
) -> tuple[Sample, ...]:
    shards = [entry[0] for entry in state]
    config = DataConfig(tuple(shards), tuple(shards), tokenizer, image_size, text_length, strict=strict)
    skipped = _SkippedCount("train_shards", strict)
    samples: dict[str, Sample] = {}
    for sample in decoded(raw_samples(shards, skipped), config, skipped):
        if sample.key in samples:
            raise ValueError(
                f"train_shards: two samples with key {sample.key!r}; keys must be distinct over all shards"
            )
        samples[sample.key] = sample
        if len(samples) * sample.pixels.numel() > MEMORY_LIMIT:
            raise ValueError(
                f"train_shards: {len(samples)} images of side {image_size} and more to come pass {MEMORY_LIMIT} bytes; "
                "set samples_per_epoch to stream"
            )
    if skipped.count not in (0, 1, 10, 100, 1000, 10000):
        skipped.report()
    if not samples:
        raise ValueError(f"train_shards: no readable sample in {shards}")
    return tuple(samples[key] for key in sorted(samples))


class _InMemory(Dataset[Batch]):
    """Batches of decoded samples by lists of indices."""

    def __init__(self, samples: tuple[Sample, ...], drawn: tuple[int, int], augment: bool) -> None:
        self.samples, self.drawn, self.augment = samples, drawn, augment

    def __getitem__(self, indices: list[int]) -> Batch:
        return collate([self.samples[i] for i in indices], self.drawn, self.augment)


# --- streaming ---


class _Streaming(IterableDataset[Batch]):
    """A rank's batches. The loader asks its W workers in turn, so batch b of a rank comes from worker b mod W: resuming
    at batch k, worker w plays the part of worker (w + k) mod W and skips what that one had already given."""

    def __init__(
        self, config: DataConfig, epoch: int, rank: int, world_size: int, start_batch: int, batches: int
    ) -> None:
        self.config, self.epoch, self.rank, self.world_size = config, epoch, rank, world_size
        self.start_batch, self.batches = start_batch, batches
        self.shards = expand_shards(config.train_shards, "train_shards")

    def __iter__(self) -> Iterator[Batch]:
        info = get_worker_info()
        workers, worker = (info.num_workers, info.id) if info is not None else (1, 0)
        part = (worker + self.start_batch) % workers
        own = range(part, self.batches, workers)
        samples = self._samples(self.rank * workers + part, self.world_size * workers)
        drawn = self.config.seed, self.epoch
        for batch in own:
            group = [
                next(samples) for _ in range(self.config.batch_size)
            ]  # decoded even if skipped: only good ones count
            if batch >= self.start_batch:
                yield collate(group, drawn, self.config.augment)

    def _samples(self, reader: int, readers: int) -> Iterator[Sample]:
        """Endless: passes over this reader's shards, each in another order."""
        skipped = _SkippedCount("train_shards", self.config.strict)
        by_sample = len(self.shards) < readers
        position = 0
        while True:
            order = random.Random(
                f"{self.config.seed} {self.epoch} {position}"
            )  # equal on every reader: it deals out the shards
            if position == 0 or by_sample:
                shuffled = order.sample(self.shards, len(self.shards))
                shards = shuffled if by_sample else shuffled[reader::readers]
            else:
                shards = order.sample(shards, len(shards))
            raw = raw_samples(shards, skipped)
            if by_sample:
                raw = (sample for i, sample in enumerate(raw) if i % readers == reader)
            buffer_rng = random.Random(f"{self.config.seed} {self.epoch} {position} {reader}")
            raw = wds.shuffle(SHUFFLE_BUFFER, initial=SHUFFLE_BUFFER, rng=buffer_rng)(raw)
            empty = True
            for sample in decoded(raw, self.config, skipped):
                empty = False
                yield sample
            if empty:
                raise ValueError(f"train_shards: reader {reader} of {readers} found no readable sample in {shards}")
            position += 1


# --- what training and evaluation call ---


def batches_per_epoch(config: DataConfig, world_size: int = 1) -> int:
    """Train batches that every one of `world_size` ranks yields per epoch; the samples that fill no whole round of
    batches wait for another epoch's permutation.

    Raises:
        ValueError: world_size below 1, or not one full batch per rank.
    """
    _checked_rank(0, world_size)
    samples = config.samples_per_epoch if config.samples_per_epoch is not None else len(load_samples(config))
    batches = samples // (config.batch_size * world_size)
    if batches == 0:
        raise ValueError(
            f"batch_size {config.batch_size} x world_size {world_size} exceeds the {samples} samples of an epoch"
        )
    return batches


def _checked_rank(rank: int, world_size: int) -> None:
    if world_size < 1:
        raise ValueError(f"world_size must be at least 1, got {world_size}")
    if not 0 <= rank < world_size:
        raise ValueError(f"rank must be in [0, world_size = {world_size}), got {rank}")


def train_batches(
    config: DataConfig, epoch: int, rank: int = 0, world_size: int = 1, start_batch: int = 0
) -> Iterator[Batch]:
    """The train batches of one epoch and rank from `start_batch` on (see `collate` for their contents).

    Ranks see disjoint samples within an epoch (streaming: within a pass over the shards). The same arguments give the
    same batches, and `start_batch=k` gives them without the first k, whatever was read before; the caption and the
    augmentation of a sample depend on (seed, epoch, key).

    Raises:
        ValueError: epoch < 0, rank or start_batch out of range, too few samples, nothing readable.
        CorruptSampleError: with `strict`, the first unreadable sample or shard.
        FileNotFoundError: no shard matches, or no tokenizer there.
    """
    batches = batches_per_epoch(config, world_size)
    _checked_rank(rank, world_size)
    if epoch < 0:
        raise ValueError(f"epoch must be at least 0, got {epoch}")
    if not 0 <= start_batch <= batches:
        raise ValueError(f"start_batch must be in [0, batches_per_epoch = {batches}], got {start_batch}")
    if config.samples_per_epoch is not None:
        stream = _Streaming(config, epoch, rank, world_size, start_batch, batches)
        return _loaded(stream, None, config.num_workers)
    samples = load_samples(config)
    permutation = np.random.default_rng((config.seed, epoch)).permutation(len(samples))
    own = permutation[rank::world_size][: batches * config.batch_size].reshape(batches, config.batch_size)
    dataset = _InMemory(samples, (config.seed, epoch), config.augment)
    return _loaded(dataset, own[start_batch:].tolist(), config.num_workers)


def _loaded(dataset: Dataset[Batch], indices: list[Any] | None, num_workers: int) -> Iterator[Batch]:
    generator = torch.Generator().manual_seed(0)  # otherwise the loader draws its base seed from the global state
    return iter(DataLoader(dataset, batch_size=None, sampler=indices, num_workers=num_workers, generator=generator))


def validation_batches(config: DataConfig, rank: int = 0, world_size: int = 1) -> Iterator[Batch]:
    """The validation samples once, in the order of the shards, without augmentation; rank r has every world_size-th
    from the r-th on. The last batch may be smaller.

    Raises:
        ValueError: rank out of range; while reading: nothing readable.
        CorruptSampleError: while reading, with `strict`: the first unreadable sample or shard.
        FileNotFoundError: no shard matches, or no tokenizer there.
    """
    _checked_rank(rank, world_size)
    shards = expand_shards(config.val_shards, "val_shards")
    CaptionTokenizer(config.tokenizer, config.text_length)
    return _validation_batches(config, shards, rank, world_size)


def _validation_batches(config: DataConfig, shards: list[str], rank: int, world_size: int) -> Iterator[Batch]:
    skipped = _SkippedCount("val_shards", config.strict)
    group: list[Sample] = []
    read = 0
    for sample in decoded(raw_samples(shards, skipped), config, skipped):
        if read % world_size == rank:
            group.append(sample)
        read += 1
        if len(group) == config.batch_size:
            yield collate(group)
            group = []
    if not read:
        raise ValueError(f"val_shards: no readable sample in {shards}")
    if group:
        yield collate(group)
