"""Retrieval and captioning metrics against values worked by hand."""

from __future__ import annotations

import math

import pytest
import torch

from csat_ext.pretrain.metrics import bleu4, caption_words, chance_recall_at_k, cider_d, cider_d_scores, recall_at_k

# Rows are images, columns texts. Ranks of the diagonal: image to text 1, 2, 3; text to image (columns) 1, 1, 3.
SIMILARITY = torch.tensor([[0.9, 0.1, 0.5], [0.6, 0.5, 0.2], [0.8, 0.3, 0.1]])


def test_recall_of_the_diagonal() -> None:
    recall = recall_at_k(SIMILARITY, k=(1, 2, 3))
    assert recall["image_to_text"] == pytest.approx({1: 1 / 3, 2: 2 / 3, 3: 1.0})
    assert recall["text_to_image"] == pytest.approx({1: 2 / 3, 2: 2 / 3, 3: 1.0})


def test_recall_counts_any_match_of_the_group() -> None:
    # Images 0 and 2 show the same thing: image 2 finds text 0 first (0.8) and text 2 finds image 0 first (0.5).
    recall = recall_at_k(SIMILARITY, k=(1,), groups=["a", "b", "a"])
    assert recall["image_to_text"][1] == pytest.approx(2 / 3)
    assert recall["text_to_image"][1] == pytest.approx(1.0)


def test_recall_with_more_texts_than_images() -> None:
    scores = torch.tensor([[0.1, 0.9, 0.3, 0.2], [0.2, 0.1, 0.8, 0.7]])
    recall = recall_at_k(scores, k=(1, 2), groups=[0, 1], text_groups=[0, 0, 1, 1])
    assert recall["image_to_text"] == {1: 1.0, 2: 1.0}
    # Text 0 belongs to image 0 (0.1), image 1 has 0.2: the only miss.
    assert recall["text_to_image"] == {1: 0.75, 2: 1.0}


def test_constant_scores_are_no_model() -> None:
    recall = recall_at_k(torch.zeros(20, 20))
    assert recall["image_to_text"] == {1: 0.0, 5: 0.0, 10: 0.0}


def test_chance_recall() -> None:
    chance = chance_recall_at_k(torch.zeros(4, 4), k=(1, 2, 4, 9))
    assert chance["image_to_text"] == pytest.approx({1: 0.25, 2: 0.5, 4: 1.0, 9: 1.0})
    # Groups a a b b: two matches among four, 1 - C(2, 2) / C(4, 2) = 5/6 for k = 2.
    grouped = chance_recall_at_k(torch.zeros(4, 4), k=(1, 2, 3), groups="aabb")
    assert grouped["text_to_image"] == pytest.approx({1: 0.5, 2: 5 / 6, 3: 1.0})


def test_chance_recall_is_the_mean_over_random_orders() -> None:
    generator = torch.Generator().manual_seed(0)
    groups = [0, 0, 0, 1, 1, 2, 3, 4]
    draws = [recall_at_k(torch.rand(8, 8, generator=generator), (2,), groups)["image_to_text"][2] for _ in range(400)]
    expected = chance_recall_at_k(torch.zeros(8, 8), (2,), groups)["image_to_text"][2]
    assert sum(draws) / len(draws) == pytest.approx(expected, abs=0.03)  # standard error below 0.01


@pytest.mark.parametrize(
    ("arguments", "error", "match"),
    [
        ((torch.zeros(2, 2, 2),), ValueError, "similarity"),
        ((torch.zeros(0, 2),), ValueError, "not empty"),
        ((torch.full((2, 2), math.nan),), ValueError, "NaN"),
        ((torch.zeros(2, 2, dtype=torch.int64),), TypeError, "floating-point"),
        (([[1.0]],), TypeError, "floating-point"),
        ((torch.zeros(2, 2), (0,)), ValueError, "k must"),
        ((torch.zeros(2, 3),), ValueError, "groups"),
        ((torch.zeros(2, 2), (1,), ["a"]), ValueError, "groups"),
        ((torch.zeros(2, 2), (1,), ["a", "b"], ["a", "a"]), ValueError, "image 1 has no match"),
        ((torch.zeros(2, 2), (1,), None, ["a", "a"]), ValueError, "text_groups"),
    ],
)
def test_recall_refuses(arguments: tuple[object, ...], error: type[Exception], match: str) -> None:
    for metric in (recall_at_k, chance_recall_at_k):
        with pytest.raises(error, match=match):
            metric(*arguments)  # type: ignore[arg-type]


def test_words() -> None:
    assert caption_words("A cat's Hat, black-and-white; 2 dogs_") == [
        "a",
        "cat's",
        "hat",
        "black",
        "and",
        "white",
        "2",
        "dogs",
    ]


def test_cider_d_of_equal_lengths() -> None:
    # Two images, L = ln 2. Every n-gram of one image's references has idf L, "a" (in both) has idf 0, unseen ones L.
    # Candidate 1 "a red dog" against "a red cat":
    #   n = 1: (red L, dog L) . (red L, cat L) = L^2, norms sqrt(2) L each       -> 1/2
    #   n = 2: (a red, red dog) . (a red, red cat) = L^2, norms sqrt(2) L each   -> 1/2
    #   n = 3: different, n = 4: none                                            -> 0
    #   10 (1/2 + 1/2) / 4 = 2.5
    # Candidate 2 equals its reference of three words: 10 (1 + 1 + 1 + 0) / 4 = 7.5
    scores = cider_d_scores(["a red dog", "a blue dog"], [["a red cat"], ["a blue dog"]])
    assert scores == pytest.approx([2.5, 7.5])
    assert cider_d(["a red dog", "a blue dog"], [["a red cat"], ["a blue dog"]]) == pytest.approx(5.0)


def test_cider_d_clips_and_penalises_length() -> None:
    # "red red red cat" against "red cat", in units of L = ln 2:
    #   n = 1: (red 3, cat 1), clipped to (1, 1) . (1, 1) = 2; norms sqrt(10), sqrt(2)  -> 2 / sqrt(20)
    #   n = 2: (red red 2, red cat 1) . (red cat 1) = 1; norms sqrt(5), 1               -> 1 / sqrt(5)
    #   n = 3, 4: the reference has none                                                -> 0
    #   lengths 4 and 2: exp(-2^2 / (2 6^2)) = exp(-1/18)
    expected = 10 * math.exp(-1 / 18) * (2 / math.sqrt(20) + 1 / math.sqrt(5)) / 4  # = 2.1152...
    score, other = cider_d_scores(["red red red cat", "green"], [["red cat"], ["blue dog"]])
    assert score == pytest.approx(expected)
    assert score == pytest.approx(2.11523, abs=1e-5)
    assert other == 0.0


def test_cider_d_averages_references() -> None:
    # "red cat" against "red cat": (1 + 1) / 4; against "big cat": n = 1 (red, cat) . (big, cat) = 1/2, n = 2: 0.
    # Document frequencies count images: "cat", in both references of one image, has idf L like the others.
    scores = cider_d_scores(["red cat", "blue dog"], [["red cat", "big cat"], ["blue dog"]])
    assert scores == pytest.approx([10 * (2 / 4 + 0.5 / 4) / 2, 10 * 2 / 4])


def test_cider_d_of_four_equal_words_is_ten_and_of_one_image_zero() -> None:
    assert cider_d_scores(["one two three four", "x"], [["one two three four"], ["y"]]) == pytest.approx([10.0, 0.0])
    assert cider_d(["a cat"], [["a cat"]]) == 0.0
    assert cider_d_scores(["", "dog"], [["cat"], ["dog"]]) == pytest.approx([0.0, 2.5])


def test_bleu4() -> None:
    # p = 5/5, 3/4, 2/3, 1/2; brevity exp(1 - 6/5).
    expected = 100 * math.exp(-0.2) * (1 * 3 / 4 * 2 / 3 * 1 / 2) ** 0.25
    assert bleu4(["The cat sat on mat"], [["the cat sat on the mat"]]) == pytest.approx(expected)
    assert bleu4(["the cat sat on the mat", "b"], [["the cat sat on the mat"], ["c", "b"]]) == pytest.approx(100.0)


@pytest.mark.parametrize("metric", [cider_d, bleu4])
def test_captions_refused(metric: object) -> None:
    assert callable(metric)
    with pytest.raises(ValueError, match="equally many"):
        metric([], [])
    with pytest.raises(ValueError, match="equally many"):
        metric(["a"], [["a"], ["b"]])
    with pytest.raises(ValueError, match="candidate 1 has none"):
        metric(["a", "b"], [["a"], []])
    with pytest.raises(TypeError, match="list of strings"):
        metric(["a"], ["a"])
    with pytest.raises(TypeError, match="list of strings"):
        metric("a", [["a"]])
