"""The example of causal associative recall: its task, its forms, and a run that is taken up again."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch

sys.path.append(str(Path(__file__).resolve().parents[1] / "examples"))
import associative_recall as recall

from csat_ext.bench import tables


def test_the_answer_is_the_value_of_the_key_that_is_asked_for() -> None:
    keys, values, answers = recall.batch(torch.Generator().manual_seed(0), 5)
    told_keys, told = keys[:, : recall.PAIRS], values[:, : recall.PAIRS]
    assert keys.shape == values.shape == (5, recall.N) and answers.shape == (5, recall.ASKED)
    assert bool((told_keys.sort(1).values == torch.arange(recall.PAIRS)).all())
    assert bool((values[:, recall.PAIRS :] == recall.VALUES).all())
    for row in range(5):
        told_of = dict(zip(told_keys[row].tolist(), told[row].tolist(), strict=True))
        assert [told_of[key] for key in keys[row, recall.PAIRS :].tolist()] == answers[row].tolist()


@pytest.mark.parametrize("form", recall.FORMS)
def test_every_form_is_causal_and_differentiable(form: str) -> None:
    torch.manual_seed(0)
    model = recall.Recall(recall.FORMS[form]()).double()
    x = torch.randn(1, recall.N, recall.WIDTH, dtype=torch.float64, requires_grad=True)
    y = model.attention(x)
    at = 40
    (gradient,) = torch.autograd.grad(y[:, at].sum(), x)
    assert not gradient[:, at + 1 :].any() and bool(gradient[:, at].any())


def test_full_attention_learns_it_and_the_window_does_not(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    output = tmp_path / "runs.json"
    forms = ["sdpa", "the window alone"]
    arguments = ["x", "--forms", *forms, "--steps", "120", "--seeds", "1", "--output", str(output)]
    monkeypatch.setattr(sys, "argv", arguments)
    recall.main()
    first = output.read_text()
    recall.main()  # nothing is run again
    assert output.read_text() == first
    best = {form: max(r["test"] for r in json.loads(first)["runs"] if r["form"] == form) for form in forms}
    assert best["sdpa"] > 0.9 and best["the window alone"] < 0.15
    monkeypatch.setattr(sys, "argv", [*arguments[:-4], "--seeds", "2", "--output", str(output)])
    with pytest.raises(SystemExit):
        recall.main()
    (tmp_path / "associative_recall.json").write_text(first)
    page = tables.recall(tables.Results(tmp_path, "r"))
    assert f"| `sdpa` | {best['sdpa']:.2f} |" in page and "(chance 0.06)" in page
