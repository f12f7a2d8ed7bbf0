"""Retrieval and captioning scores: pure functions of a similarity matrix or of lists of strings.

* Recall@K, image to text and text to image, with several matches per item allowed.
* CIDEr-D: Vedantam, Zitnick, Parikh, "CIDEr: Consensus-based Image Description Evaluation", CVPR 2015 (the CIDEr metric
  and its variant CIDEr-D), idf from the references of the evaluated set.
* BLEU-4: `sacrebleu` (Post 2018).
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Hashable, Sequence

import torch
from torch import Tensor

IMAGE_TO_TEXT, TEXT_TO_IMAGE = "image_to_text", "text_to_image"
_NGRAM_ORDERS = (1, 2, 3, 4)
_LENGTH_SIGMA = 6.0  # the Gaussian penalty of CIDEr-D
_CIDER_SCALE = 10.0

Vector = dict[tuple[str, ...], float]


def recall_at_k(
    similarity: Tensor,
    k: Sequence[int] = (1, 5, 10),
    groups: Sequence[Hashable] | None = None,
    text_groups: Sequence[Hashable] | None = None,
) -> dict[str, dict[int, float]]:
    """The share of queries with a match among their K best, both ways.

    A wrong item of equal score counts as ranked before the match: constant scores do not look like a perfect model.

    Args:
        similarity: (images, texts), larger = more alike.
        k: ranks to report, each at least 1.
        groups: what image i shows; text j matches it where ``text_groups[j] == groups[i]``. None: i matches j = i only.
        text_groups: the same for texts; None: `groups`.

    Returns:
        ``{"image_to_text": {k: share}, "text_to_image": {k: share}}``, shares in [0, 1].

    Raises:
        ValueError: a shape that is not 2-D, NaN, a wrong number of groups, a query without any match, k < 1.
        TypeError: similarity is not a floating-point tensor.
    """
    matches = _matches(similarity, k, groups, text_groups)
    directions = {IMAGE_TO_TEXT: (similarity, matches), TEXT_TO_IMAGE: (similarity.T, matches.T)}
    recall = {}
    for name, (scores, match) in directions.items():
        best = scores.masked_fill(~match, -torch.inf).amax(1, keepdim=True)
        ahead = ((scores >= best) & ~match).sum(1)
        recall[name] = {n: (ahead < n).double().mean().item() for n in k}
    return recall


def chance_recall_at_k(
    similarity: Tensor,
    k: Sequence[int] = (1, 5, 10),
    groups: Sequence[Hashable] | None = None,
    text_groups: Sequence[Hashable] | None = None,
) -> dict[str, dict[int, float]]:
    """`recall_at_k` of a random order: 1 - C(n - g, k) / C(n, k) for a query with g matches among n; same arguments."""
    matches = _matches(similarity, k, groups, text_groups)
    chance = {}
    for name, match in ((IMAGE_TO_TEXT, matches), (TEXT_TO_IMAGE, matches.T)):
        items, counts = match.shape[1], Counter(match.sum(1).tolist())
        chance[name] = {
            n: sum(c * (1 - math.comb(items - g, n) / math.comb(items, n)) for g, c in counts.items()) / match.shape[0]
            if n < items
            else 1.0
            for n in k
        }
    return chance


def _matches(
    similarity: Tensor, k: Sequence[int], groups: Sequence[Hashable] | None, text_groups: Sequence[Hashable] | None
) -> Tensor:
    """(images, texts) bool: which text belongs to which image."""
    if not isinstance(similarity, Tensor) or not similarity.is_floating_point():
        raise TypeError(
            f"similarity must be a floating-point tensor, got {getattr(similarity, 'dtype', type(similarity))}"
        )
    if similarity.ndim != 2 or 0 in similarity.shape:
        raise ValueError(f"similarity must be (images, texts) and not empty, got shape {tuple(similarity.shape)}")
    if torch.isnan(similarity).any():
        raise ValueError("similarity holds NaN")
    if any(isinstance(n, bool) or not isinstance(n, int) or n < 1 for n in k):
        raise ValueError(f"k must be integers of at least 1, got {tuple(k)}")
    images, texts = similarity.shape
    if groups is None and text_groups is not None:
        raise ValueError("text_groups needs groups")
    image_ids = list(range(images)) if groups is None else list(groups)
    text_ids = image_ids if text_groups is None else list(text_groups)
    if (len(image_ids), len(text_ids)) != (images, texts):
        raise ValueError(
            f"groups: {len(image_ids)} images and {len(text_ids)} texts, similarity has {images} and {texts}"
        )
    number = {group: i for i, group in enumerate(dict.fromkeys([*image_ids, *text_ids]))}
    rows, columns = (torch.tensor([number[g] for g in ids], device=similarity.device) for ids in (image_ids, text_ids))
    matches = rows[:, None] == columns[None, :]
    for name, counts in (("image", matches.sum(1)), ("text", matches.sum(0))):
        if lonely := (counts == 0).nonzero().flatten().tolist():
            raise ValueError(f"groups: {name} {lonely[0]} has no match ({len(lonely)} such {name}s)")
    return matches


def caption_words(caption: str) -> list[str]:
    """Lower-case words and numbers, punctuation left out (in place of the PTB tokenizer of the original code)."""
    return re.findall(r"[^\W_]+(?:'[^\W_]+)*", caption.lower())


def cider_d_scores(candidates: Sequence[str], references: Sequence[Sequence[str]]) -> list[float]:
    """CIDEr-D of every candidate against its own references (one or more each), in [0, 10].

    With g_n(x) the tf-idf vector of x's n-grams (tf: raw count; idf: log(images / max(1, images that have the n-gram in
    a reference))) and l(x) the number of words::

        CIDEr-D_n(c, S) = 10 / |S| sum_{s in S} exp(-(l(c) - l(s))^2 / (2 sigma^2))
                          min(g_n(c), g_n(s)) . g_n(s) / (|g_n(c)| |g_n(s)|)

    averaged over n = 1 ... 4, sigma = 6; a term with a zero norm is 0. In a set of one image every idf, so every score,
    is 0.

    Raises:
        ValueError: no candidates, another number of references than candidates, or a candidate without references.
        TypeError: a single string where a list of references is due.
    """
    _check_captions(candidates, references)
    words = [[caption_words(r) for r in refs] for refs in references]
    frequency: Counter[tuple[str, ...]] = Counter()
    for refs in words:
        frequency.update({gram for ref in refs for n in _NGRAM_ORDERS for gram in _ngrams(ref, n)})
    log_images = math.log(len(references))

    def vector(caption: list[str], n: int) -> Vector:
        return {g: c * (log_images - math.log(max(1, frequency[g]))) for g, c in _ngrams(caption, n).items()}

    def similarity(candidate: list[str], reference: list[str]) -> float:
        penalty = math.exp(-((len(candidate) - len(reference)) ** 2) / (2 * _LENGTH_SIGMA**2))
        cosines = (_clipped_cosine(vector(candidate, n), vector(reference, n)) for n in _NGRAM_ORDERS)
        return penalty * sum(cosines) / len(_NGRAM_ORDERS)

    return [
        _CIDER_SCALE * sum(similarity(caption_words(candidate), ref) for ref in refs) / len(refs)
        for candidate, refs in zip(candidates, words, strict=True)
    ]


def cider_d(candidates: Sequence[str], references: Sequence[Sequence[str]]) -> float:
    """The mean of `cider_d_scores`."""
    scores = cider_d_scores(candidates, references)
    return sum(scores) / len(scores)


def bleu4(candidates: Sequence[str], references: Sequence[Sequence[str]]) -> float:
    """Corpus BLEU-4 of sacrebleu in [0, 100]: case-insensitive, 13a tokens, exponential smoothing; arguments and
    errors as `cider_d_scores`."""
    import sacrebleu

    _check_captions(candidates, references)
    most = max(len(refs) for refs in references)
    streams = [[refs[i] if i < len(refs) else None for refs in references] for i in range(most)]
    return float(sacrebleu.corpus_bleu(list(candidates), streams, lowercase=True).score)  # type: ignore[arg-type]


def _ngrams(words: list[str], n: int) -> Counter[tuple[str, ...]]:
    return Counter(tuple(words[i : i + n]) for i in range(len(words) - n + 1))


def _clipped_cosine(candidate: Vector, reference: Vector) -> float:
    norms = math.sqrt(sum(v * v for v in candidate.values())) * math.sqrt(sum(v * v for v in reference.values()))
    dot = sum(min(value, reference[gram]) * reference[gram] for gram, value in candidate.items() if gram in reference)
    return dot / norms if norms > 0 else 0.0


def _check_captions(candidates: Sequence[str], references: Sequence[Sequence[str]]) -> None:
    if isinstance(candidates, str) or any(isinstance(refs, str) for refs in references):
        raise TypeError("candidates must be a list of strings and references a list of such lists, got a string")
    if not candidates or len(candidates) != len(references):
        raise ValueError(
            f"candidates and references must be equally many and not none, got {len(candidates)} and {len(references)}"
        )
    if lonely := [i for i, refs in enumerate(references) if not refs]:
        raise ValueError(f"references: candidate {lonely[0]} has none")
