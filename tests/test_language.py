"""The language model: equal parameters, no future, decoding equal to the parallel pass, text split, command line."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from test_pretrain import command, metrics, refusal

from csat_ext.language import config as configs
from csat_ext.language.data import held_out_windows, read_text, training_windows
from csat_ext.language.generate import generate
from csat_ext.language.model import LanguageModel, parameters
from csat_ext.language.train import bits_per_byte, load_trained, single_byte_bits

REPOSITORY = Path(__file__).parents[1]
EXAMPLE = REPOSITORY / "examples" / "language_model" / "config.yaml"
LICENCE = REPOSITORY / "examples" / "data" / "LICENSE-APACHE-2.0.txt"  # real text that ships with the repository
FORMS = configs.ATTENTION
CONTEXT, STEPS = 40, 4


def config(form: str, **data: Any) -> configs.LanguageConfig:
    sizes = {"width": 32, "heads": 2, "layers": 2, "hidden": 64, "attention": form}
    blocks = {"causal": "block", "block_size": 8, "measurements": 3, "anchors": (), "window_blocks": 1}
    sections = {"block": blocks | {"decoder": "none"}}
    data = {"text": (str(LICENCE),), "context": CONTEXT, "batch_size": 4, **data}
    return configs.from_dict({"model": sizes | sections, "data": data, "deepspeed": "unused"})


def model(form: str) -> LanguageModel:
    torch.manual_seed(0)
    made = LanguageModel(config(form).model).eval()
    with torch.no_grad():
        for p in made.blocks.parameters():  # what attention says outweighs the byte that came last
            p.add_(0.5 * torch.randn_like(p))
    return made


@pytest.mark.parametrize("form", FORMS)
def test_greedy_generation_is_the_argmax_of_the_parallel_pass(form: str) -> None:
    prompt, lm = b"Licensed under the Apache License", model(form)
    made = generate(lm, prompt, 30)
    whole = torch.tensor([list(prompt + made.text)])
    with torch.no_grad():
        expected = lm.logits(whole[:, :-1])[0, len(prompt) - 1 :].argmax(-1)
    assert list(made.text) == expected.tolist()
    assert len(set(made.text)) > 1


@pytest.mark.parametrize("form", FORMS)
def test_caches_give_the_logits_of_the_parallel_pass(form: str) -> None:
    lm, tokens = model(form).double(), torch.randint(256, (2, 45))
    caches = lm.new_caches()
    with torch.no_grad():
        parts = [lm.logits(part, caches) for part in tokens.split([11, 1, 1, 20, 1, 11], 1)]
        torch.testing.assert_close(torch.cat(parts, 1), lm.logits(tokens), rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("form", FORMS)
def test_the_future_changes_no_prediction(form: str) -> None:
    lm, tokens = model(form), torch.randint(256, (1, 45))
    changed = tokens.clone()
    changed[:, 30:] = (changed[:, 30:] + 1) % 256
    with torch.no_grad():
        before, after = lm.logits(tokens), lm.logits(changed)
    assert torch.equal(before[:, :30], after[:, :30]) and not torch.equal(before[:, 30:], after[:, 30:])


def test_the_forms_have_equally_many_parameters() -> None:
    """Up to the one hidden unit a layer that rounding takes; by the shipped config as well."""
    for base in (config("sdpa").model, configs.load(EXAMPLE).model):
        counts = {}
        for form in FORMS:
            counts[form] = parameters(LanguageModel(configs.ModelConfig(**{**vars(base), "attention": form})))
        assert all(0 <= counts["sdpa"] - count <= base.layers * (2 * base.width + 1) for count in counts.values())


def test_a_layer_without_room_for_its_own_parameters_is_refused() -> None:
    tight = configs.ModelConfig(**{**vars(config("prefix").model), "attention": "prefix", "hidden": 3})
    with pytest.raises(ValueError, match=r"model\.hidden: 3 came; the 1026 parameters that model\.prefix adds"):
        LanguageModel(tight)


def test_the_caches_of_csat_stay_small() -> None:
    sizes = {form: [generate(model(form), b"a" * n, 1).cache_bytes for n in (24, 240)] for form in FORMS}
    per_layer_byte = 2 * 32 * 4  # keys and values of the width, float32
    assert sizes["sdpa"] == [2 * n * per_layer_byte for n in (24, 240)]
    assert sizes["prefix"][0] == sizes["prefix"][1]
    assert sizes["block"][1] < 0.45 * sizes["sdpa"][1]


def test_the_split_is_by_position_and_windows_cover_what_is_held_out(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "b.md").write_bytes(bytes(range(100)))
    (tmp_path / "in" / "a.txt").write_bytes(bytes(range(100, 200)))
    (tmp_path / "in" / "c.bin").write_bytes(b"x" * 100)
    data = config("sdpa", text=(str(tmp_path / "in"), str(tmp_path / "in" / "b.md")), held_out=0.2, context=9).data
    text = read_text(data)
    assert text.train.tolist() == [*range(100, 180), *range(80)]
    assert text.held_out.tolist() == [*range(180, 200), *range(80, 100)]
    predicted = torch.cat([w[:, 1:].flatten() for w in held_out_windows(text.held_out, data)])
    assert predicted.tolist() == text.held_out[1:37].tolist()
    whole = training_windows(text.train, data, 3, 0, 2), training_windows(text.train, data, 3, 1, 2)
    again = configs.DataConfig(**{**vars(data), "batch_size": 8})
    assert torch.equal(torch.cat(whole), training_windows(text.train, again, 3, 0, 1))
    assert not torch.equal(whole[0], training_windows(text.train, data, 4, 0, 2))


def test_bits_per_byte_are_those_of_a_known_model() -> None:
    data = config("sdpa").data
    text = read_text(data)
    lm = LanguageModel(config("sdpa").model)
    torch.nn.init.zeros_(lm.embedding.weight)  # every byte equally probable
    assert bits_per_byte(lm, text.held_out, data) == pytest.approx(8.0)
    assert 3 < single_byte_bits(text) < 6


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"prompt": b""}, "prompt: '' came"),
        ({"count": 0}, "bytes: 0 came"),
        ({"temperature": -1.0}, "temperature: -1.0 came"),
    ],
)
def test_generation_refuses_by_name(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        generate(model("prefix"), **({"prompt": b"a", "count": 1} | arguments))


def test_draws_follow_the_seed() -> None:
    lm = model("prefix")
    drawn = [generate(lm, b"The", 20, 3.0, seed).text for seed in (1, 1, 2)]
    assert drawn[0] == drawn[1] != drawn[2]


BAD_COMMANDS = {
    "an unknown form": (["model.attention=full"], "model.attention: 'full' came, accepted: sdpa, block, prefix"),
    "the other form": (["model.block.causal=prefix"], "causal"),
    "a text that is not there": (["data.text=nowhere"], "nowhere is no file and no folder with files"),
    "an unknown key": (["data.txt=a"], "config: data: unknown key 'txt'; did you mean 'text'?"),
    "a share": (["data.held_out=1.5"], "data.held_out: 1.5 came, a number between 0 and 1 is accepted"),
    "an enabled section": (["deepspeed=../ds_csat.json"], "csat_attention: an enabled section came"),
    "nothing to resume": (["--resume"], "there is no checkpoint to continue"),
}


@pytest.mark.parametrize("case", BAD_COMMANDS)
def test_bad_commands_end_in_one_line(case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    arguments, message = BAD_COMMANDS[case]
    line = refusal(monkeypatch, "lm", "--config", EXAMPLE, "--output", tmp_path, *arguments)
    assert line.startswith("csat: ") and message in line


def test_generating_from_no_run_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    line = refusal(monkeypatch, "generate", "--checkpoint", tmp_path, "--prompt", "a")
    assert "is not the output folder of csat lm" in line


@pytest.mark.slow
def test_trains_resumes_bitwise_and_generates(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    output, resumed = tmp_path / "run", tmp_path / "resumed"
    options = ("lm", "--config", EXAMPLE, "model.attention=prefix", f"data.text={LICENCE}", "data.batch_size=2")
    options += ("data.context=32", "train.log_every=1", "train.checkpoint_every=2", "--steps", str(STEPS))
    screen = command(*options, "--output", output)
    assert "2 layers of prefix attention" in screen and f"step {STEPS}/{STEPS}" in screen
    losses = [line["loss"] for line in metrics(output)]
    assert len(losses) == STEPS
    shutil.copytree(output, resumed)
    shutil.rmtree(resumed / "checkpoints" / f"step-{STEPS:08d}")  # as after a crash in step 3
    command(*options, "--output", resumed, "--resume")
    assert [line["loss"] for line in metrics(resumed)] == losses
    results = [json.loads((folder / "evaluation.json").read_text()) for folder in (output, resumed)]
    assert results[0]["bits per byte"] == results[1]["bits per byte"] < 9
    assert results[0]["step"] == STEPS and results[0]["bytes"]["training"] == 10488
    generated = generate(load_trained(output), b"Apache", 5, 0.8, 1)
    assert generated.text == generate(load_trained(resumed), b"Apache", 5, 0.8, 1).text
