"""The quality tables: each task has the property that defines it, and the protocol is what it says."""

from __future__ import annotations

import gzip
import json
import math
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

sys.path.append(str(Path(__file__).resolve().parents[1] / "benchmarks"))
import quality_tables
from deadline import Deadline
from mechanisms import LayerShape
from quality import fashion_mnist, listops, pathfinder, protocol, training
from quality.classifier import Classifier, Size, count
from quality.task import Split, Task, splits_of

pytestmark = pytest.mark.usefixtures("one_thread")

# ---- ListOps ---------------------------------------------------------------------------------------------------------

SYMBOLS = ["", *map(str, range(10)), *(f"[{op}" for op in listops.OPERATORS), "]"]
SHORT = listops.Sizes(depth=5, arguments=4, shortest=10, longest=60)


def innermost(match: re.Match[str]) -> str:
    values = [int(digit) for digit in match[2].split()]
    value = {"MIN": np.min, "MAX": np.max, "MED": np.median, "SM": lambda v: np.sum(v) % 10}[match[1]](values)
    return str(int(value))


def evaluate(text: str) -> int:
    """Replaces innermost brackets by their values until none is left."""
    while "[" in text:
        text = re.sub(r"\[(\w+)((?: \d)+) \]", innermost, text)
    return int(text)


def written(tokens: torch.Tensor) -> str:
    return " ".join(SYMBOLS[t] for t in tokens.tolist() if t != listops.PADDING)


@pytest.fixture(scope="module")
def expressions() -> Task:
    return listops.listops(SHORT, (300, 50, 50))


def test_labels_are_the_values_of_the_expressions(expressions: Task) -> None:
    assert evaluate("[MAX 2 9 [MIN 4 7 ] 0 ]") == 9 and evaluate("[MED 1 2 ]") == 1
    for split in (expressions.train, expressions.validation, expressions.test):
        values = [evaluate(written(row)) for row in split.tokens]
        assert values == split.labels.tolist()
    assert set(expressions.train.labels.tolist()) == set(range(10))


def test_expressions_have_the_sizes_asked_for_and_are_all_different(expressions: Task) -> None:
    texts = []
    for split in (expressions.train, expressions.validation, expressions.test):
        assert split.keep is not None and torch.equal(split.keep, split.tokens != listops.PADDING)
        lengths = split.keep.sum(1)
        assert int(lengths.min()) > SHORT.shortest and int(lengths.max()) < SHORT.longest
        texts += [written(row) for row in split.tokens]
    assert len(set(texts)) == len(texts)
    depths, arguments = [], []
    for text in texts:
        marks = re.findall(r"\[|\]", text)
        depths.append(max(np.cumsum([1 if mark == "[" else -1 for mark in marks])))
        arguments += [len(inner.split()) for inner in re.findall(r"\[\w+((?: \d)+) \]", text)]
    assert max(depths) == SHORT.depth - 1  # operators; the deepest node is a digit
    assert min(arguments) >= 2 and max(arguments) == SHORT.arguments


def test_the_settings_are_those_of_lra() -> None:
    task = listops.listops(listops.Sizes(), (3, 1, 1))
    assert task.tokens == 2000 and task.vocabulary == 16 and task.classes == 10
    assert evaluate(written(task.train.tokens[0])) == int(task.train.labels[0])
    assert "the settings of LRA" in task.about


def test_the_files_of_lra_are_read(tmp_path: Path) -> None:
    texts = ["( ( ( [MAX 2 ) ( ( [MIN 4 ) ] ) ) ] )", "( ( ( [SM 9 ) 3 ) ] )", "( ( ( [MED 1 ) 2 ) ] )"]
    for name in listops.FILES:
        lines = [f"{text}\t{evaluate(re.sub('[()] ?', '', text).strip())}" for text in texts]
        (tmp_path / name).write_text("\n".join(["Source\tTarget", *lines]) + "\n")
    task = listops.lra_listops(tmp_path, (3, 2, 1))
    assert [len(part) for part in (task.train, task.validation, task.test)] == [3, 2, 1] and task.tokens == 2000
    assert [written(row) for row in task.train.tokens] == ["[MAX 2 [MIN 4 ] ]", "[SM 9 3 ]", "[MED 1 2 ]"]
    assert task.train.labels.tolist() == [4, 2, 1]
    with pytest.raises(ValueError, match=r"\(4, 0, 0\) came, 3 examples"):
        listops.lra_listops(tmp_path, (4, 2, 1))
    (tmp_path / listops.FILES[0]).write_text("Source\tTarget\n[AVG 1 2 ]\t1\n")
    with pytest.raises(ValueError, match=r"basic_train\.tsv: '\[AVG' came"):
        listops.lra_listops(tmp_path, (1, 1, 1))
    with pytest.raises(ValueError, match=r"basic_train\.tsv: not in"):
        listops.lra_listops(tmp_path / "nowhere", (1, 1, 1))


# ---- Pathfinder ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def images() -> Task:
    return pathfinder.pathfinder(pathfinder.Sizes(), (120, 20, 20))


def discs(picture: np.ndarray) -> list[tuple[int, int]]:
    """Centres of the white squares of three by three pixels."""
    windows = np.lib.stride_tricks.sliding_window_view(picture, (3, 3))
    return [(int(r) + 1, int(c) + 1) for r, c in np.argwhere((windows == pathfinder.WHITE).all((2, 3)))]


def reached(picture: np.ndarray, start: tuple[int, int]) -> set[tuple[int, int]]:
    """Flood fill over white pixels, across gaps that are narrower than the distance of curves."""
    white = {(int(r), int(c)) for r, c in np.argwhere(picture == pathfinder.WHITE)}
    found, left = {start}, [start]
    while left:
        row, column = left.pop()
        near = {(r, c) for r, c in white - found if max(abs(r - row), abs(c - column)) < pathfinder.APART}
        found |= near
        left += near
    return found


def test_a_flood_from_one_disc_reaches_the_other_in_positive_images_alone(images: Task) -> None:
    for split in (images.train, images.test):
        for tokens, label in zip(split.tokens, split.labels.tolist(), strict=True):
            picture = tokens.reshape(32, 32).numpy()
            ends = discs(picture)
            assert len(ends) == 2
            assert (ends[1] in reached(picture, ends[0])) == bool(label)


def test_every_image_has_two_long_curves_and_classes_are_even(images: Task) -> None:
    for tokens in images.train.tokens[:40]:
        picture = tokens.reshape(32, 32).numpy()
        sizes, left = [], {(int(r), int(c)) for r, c in np.argwhere(picture)}
        while left:
            one = reached(picture, next(iter(left)))
            sizes.append(len(one))
            left -= one
        assert sorted(sizes)[-2] >= 12 and 2 <= len(sizes) <= 5  # five dashes of three pixels or more, ends on an edge
    labels = torch.cat([images.train.labels, images.validation.labels, images.test.labels])
    assert int(labels.sum()) == len(labels) // 2


def test_the_distance_of_the_discs_does_not_give_the_label_away(images: Task) -> None:
    far = {0: [], 1: []}  # type: dict[int, list[float]]
    for tokens, label in zip(images.train.tokens, images.train.labels.tolist(), strict=True):
        one, other = discs(tokens.reshape(32, 32).numpy())
        far[label].append(math.dist(one, other))
    negative, positive = (np.sort(far[label]) for label in (0, 1))
    points = np.unique(np.concatenate([negative, positive]))
    gap = [np.mean(negative <= x) - np.mean(positive <= x) for x in points]
    assert max(np.abs(gap)) < 0.25  # the best threshold is right in less than 62.5 % of these 120 images


def test_images_depend_on_the_seed_alone() -> None:
    one, again, other = (pathfinder.pathfinder(pathfinder.Sizes(), (4, 2, 2), seed=seed) for seed in (5, 5, 6))
    assert torch.equal(one.test.tokens, again.test.tokens) and torch.equal(one.train.labels, again.train.labels)
    assert not torch.equal(one.train.tokens, other.train.tokens)


# ---- Fashion-MNIST ---------------------------------------------------------------------------------------------------


def write_idx(path: Path, values: np.ndarray, magic: int) -> None:
    header = np.array([magic, *values.shape], ">i4").tobytes()
    path.write_bytes(gzip.compress(header + values.astype(np.uint8).tobytes()))


def test_idx_files_are_read(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    pictures = {name: rng.integers(0, 256, (n, 4, 5)) for name, n in (("train", 9), ("t10k", 6))}
    for name, values in pictures.items():
        write_idx(tmp_path / f"{name}-images-idx3-ubyte.gz", values, fashion_mnist.IMAGES)
        write_idx(tmp_path / f"{name}-labels-idx1-ubyte.gz", np.arange(len(values)), fashion_mnist.LABELS)
    task = fashion_mnist.fashion_mnist((5, 4, 3), folder=tmp_path)
    for split, name in ((task.train, "train"), (task.validation, "train"), (task.test, "t10k")):
        for tokens, label in zip(split.tokens, split.labels.tolist(), strict=True):
            assert np.array_equal(tokens.reshape(4, 5).numpy(), pictures[name][label])
    assert not set(task.train.labels.tolist()) & set(task.validation.labels.tolist())
    write_idx(tmp_path / "t10k-labels-idx1-ubyte.gz", np.arange(6), fashion_mnist.IMAGES)
    with pytest.raises(ValueError, match=r"t10k-labels-idx1-ubyte\.gz is no IDX file of bytes with 1 axes"):
        fashion_mnist.fashion_mnist((5, 4, 3), folder=tmp_path)
    with pytest.raises(ValueError, match="dataset-fashion-mnist"):
        fashion_mnist.fashion_mnist((5, 4, 3), folder=tmp_path / "nowhere")


@pytest.mark.skipif(not fashion_mnist.DEBIAN.is_dir(), reason="Debian's dataset-fashion-mnist is not installed")
def test_the_files_of_debian() -> None:
    task = fashion_mnist.fashion_mnist((50_000, 10_000, 10_000))
    assert task.tokens == 784 and task.test.labels.bincount().tolist() == [1000] * 10


# ---- the classifier and the trainer ----------------------------------------------------------------------------------

SIZE = Size(layers=2, width=16, heads=2, hidden=24, m=4)


def first_token(examples: int = 256, n: int = 16) -> Task:
    """The label is the first token, the others are noise, the last ones padding."""
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(0, 4, (examples, n), generator=generator, dtype=torch.uint8)
    keep = torch.arange(n) < torch.randint(4, n + 1, (examples, 1), generator=generator)
    quarter = examples // 4
    parts = splits_of(tokens, keep, tokens[:, 0].long(), (2 * quarter, quarter, quarter))
    return Task("first", "the first token", 4, 4, *parts)


def plan(**changes: Any) -> protocol.Protocol:
    settings: dict[str, Any] = {"rates": (1e-3, 1e-2), "seeds": (0, 1), "schedule": training.Schedule(4, 16)}
    return protocol.Protocol(SIZE, **(settings | changes))


@pytest.mark.parametrize("name", quality_tables.FORMS)
def test_padding_changes_no_logit(name: str) -> None:
    layer = quality_tables.named_forms()[name]
    torch.manual_seed(0)
    model = Classifier(layer, SIZE, 24, 16, 8, 3, seed=0).double()
    tokens, keep = torch.randint(0, 8, (2, 16)), torch.arange(16).expand(2, 16) < torch.tensor([[16], [9]])
    other = torch.where(keep, tokens, 7 - tokens)
    kept, changed = (model(t, keep) for t in (tokens, other))
    torch.testing.assert_close(kept, changed)


def test_every_form_gets_the_parameters_of_the_largest() -> None:
    widths = protocol.hidden_widths(quality_tables.named_forms(), first_token(), plan())
    counts = [own for _, own in widths.values()]
    unit = SIZE.layers * (2 * SIZE.width + 1)
    assert max(counts) - min(counts) <= unit
    assert widths["linformer"][0] < widths["full"][0] and min(hidden for hidden, _ in widths.values()) == 24
    equal = protocol.hidden_widths(quality_tables.named_forms(), first_token(), plan(equal_parameters=False))
    assert {hidden for hidden, _ in equal.values()} == {24}
    full = quality_tables.named_forms()["full"]
    assert equal["full"][1] == count(full, SIZE, 24, 16, 4, 4)


def test_an_epoch_is_a_permutation_and_the_seed_is_all_that_orders_it() -> None:
    schedule = training.Schedule(steps=6, batch=5)
    rows = torch.cat(list(training.batches(15, schedule, seed=1)))
    assert sorted(rows[:15].tolist()) == sorted(rows[15:].tolist()) == list(range(15))
    assert torch.equal(rows, torch.cat(list(training.batches(15, schedule, seed=1))))
    assert not torch.equal(rows, torch.cat(list(training.batches(15, schedule, seed=2))))
    rates = [training.rate_at(step, 100) for step in range(100)]
    assert rates[9] == 1 == max(rates) and rates[0] == pytest.approx(0.1) and 0 < rates[-1] < 1e-3


@pytest.mark.parametrize("name", ["full", "csat + LISTA"])
def test_the_trainer_learns_what_can_be_learnt(name: str) -> None:
    task, layer = first_token(), quality_tables.named_forms()[name]
    found = protocol.run_one(layer, 24, task, plan(schedule=training.Schedule(steps=150, batch=32)), 1e-2, seed=0)
    assert found["test"] > 0.7 > 2 * task.majority()


def test_a_seed_gives_the_same_run() -> None:
    task, layer = first_token(), quality_tables.named_forms()["csat"]
    one, other = (protocol.run_one(layer, 24, task, plan(), 1e-2, seed=3) for _ in range(2))
    assert one["test"] == other["test"] and one["loss"] == pytest.approx(other["loss"], rel=1e-4)


def test_a_loss_that_is_no_number_is_a_result() -> None:
    task, layer = first_token(), quality_tables.named_forms()["full"]
    found = protocol.run_one(layer, 24, task, plan(schedule=training.Schedule(30, 16)), 1e30, seed=0)
    assert found["test"] == 0 and "the loss is" in found["reason"]


def test_accuracy_counts_every_example_once() -> None:
    class Parity(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = torch.nn.Parameter(torch.zeros(1))

        def forward(self, tokens: torch.Tensor, keep: torch.Tensor | None) -> torch.Tensor:
            return torch.nn.functional.one_hot((tokens[:, 0] % 2).long(), 2) + self.weight

    tokens = torch.arange(10, dtype=torch.uint8)[:, None]
    split = Split(tokens, None, torch.tensor([0, 1] * 4 + [1, 0]))
    assert training.accuracy(Parity(), split, batch=3) == pytest.approx(0.8)


# ---- the protocol ----------------------------------------------------------------------------------------------------


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[..., tuple[list[Any], dict[str, Any]]]:
    """The protocol with made-up scores: on validation the rate 0.01 is best for "full", 0.001 for "csat"; on the test
    split it is the other way round."""
    forms = {name: quality_tables.named_forms()[name] for name in ("full", "csat")}
    asked: list[tuple[str, float, int]] = []

    def one(layer: Any, hidden: int, task: Task, settings: Any, rate: float, seed: int) -> dict[str, Any]:
        name = layer.args[0]
        asked.append((name, rate, seed))
        good = (rate == 1e-2) == (name == "full")
        return {"validation": 0.9 if good else 0.5, "test": 0.1 if good else 0.6, "loss": 1.0, "ms_a_step": 1.0}

    def call(seconds: float = math.inf, **changes: Any) -> tuple[list[Any], dict[str, Any]]:
        asked.clear()
        output = tmp_path / "quality.json"
        result = protocol.run(forms, first_token(), plan(**changes), "cpu", Deadline(seconds), output)
        return list(asked), result

    monkeypatch.setattr(protocol, "run_one", one)
    return call


def test_rates_are_chosen_on_validation_and_seeds_run_at_them(run: Any) -> None:
    asked, result = run(seeds=(0, 1, 2))
    first = [("full", 1e-3, 0), ("csat", 1e-3, 0), ("full", 1e-2, 0), ("csat", 1e-2, 0)]
    rest = [(name, rate, seed) for seed in (1, 2) for name, rate in (("full", 1e-2), ("csat", 1e-3))]
    assert asked == first + rest
    assert len(result["runs"]) == 8 and result["left_out"] == []
    assert result["settings"]["majority"] == pytest.approx(first_token().majority())
    assert set(result["settings"]["forms"]["csat"]) == {"hidden", "parameters"}


def test_what_is_there_is_not_run_again(run: Any) -> None:
    _, partial = run(seconds=0)
    assert partial["runs"] == [] and len(partial["left_out"]) == 4
    asked, result = run()
    assert len(asked) == 6 and result["left_out"] == []
    asked, again = run()
    assert asked == [] and again["runs"] == result["runs"]
    with pytest.raises(ValueError, match=r"quality\.json has runs of other settings"):
        run(seeds=(0, 1, 2, 3))


# ---- the command -----------------------------------------------------------------------------------------------------


def test_every_form_of_the_ablation_is_a_layer_of_its_own() -> None:
    forms = quality_tables.ablation_forms(4)
    assert len(forms) == 1 + 3 * 2 * 3 + 3 * 2
    shape, x, counts = LayerShape(16, 2, 16, 4), torch.randn(1, 16, 16), {}
    for name, layer in forms.items():
        made = layer(shape)
        assert made(x, key_mask=None).shape == x.shape
        counts[name] = sum(p.numel() for p in made.parameters())
        if name != "full":
            ensemble, learned, decoder, m = name.split(", ")
            assert made.config.ensemble == ensemble and made.config.decoder == decoder
            assert made.config.learned == (learned == "learned") and m == f"m = {made.config.measurements}"
    assert counts["pool, learned, none, m = 4"] == counts["pool, fixed, none, m = 4"] + 2 * 4 * (16 + 1)


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(quality_tables, "quick_listops", lambda: listops.listops(SHORT, (64, 32, 32)))
    output = tmp_path / "q.json"
    common = ["listops", "--quick", "--device", "cpu", "--output", str(output), "--seeds", "1", "--steps", "2"]
    quality_tables.main([*common, "--forms", "full", "csat + LISTA"])
    result = json.loads(output.read_text())
    assert [run["form"] for run in result["runs"]] == ["full", "csat + LISTA"] and result["settings"]["quick"]
    assert all(0 <= run["test"] <= 1 and run["loss"] > 0 for run in result["runs"])
    assert "2 runs" in capsys.readouterr().out
    for wrong, message in (
        ([*common, "--forms", "ful"], "--forms: 'ful'"),
        ([*common[:-3], "0"], "--seeds: 0"),
        (["fashion-mnist", "--fashion-mnist", str(tmp_path)], "dataset-fashion-mnist"),
    ):
        with pytest.raises(SystemExit, match=message):
            quality_tables.main(wrong)
