"""The main job through its command line: training, choice of attention, ranks, resumption, evaluation, errors."""

from __future__ import annotations

import io
import json
import os
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import forked
import numpy as np
import pytest
import torch
import yaml
from PIL import Image

from csat_ext import cli
from csat_ext.deepspeed import apply, read_section
from csat_ext.module import CSATAttention
from csat_ext.pretrain import config as configs
from csat_ext.pretrain import evaluate, train
from csat_ext.pretrain.metrics import bleu4, cider_d
from csat_ext.pretrain.model import Losses, SDPAttention
from csat_ext.pretrain.train import Run, build_model, fill_auto, read_run

REPOSITORY = Path(__file__).parents[1]
EXAMPLES = REPOSITORY / "examples"
OPTIMIZER = {"type": "AdamW", "params": {"lr": 1e-3, "weight_decay": 0.01, "torch_adam": True}}
SCHEDULER = {
    "type": "WarmupCosineLR",
    "params": {"total_num_steps": "auto", "warmup_num_steps": 2, "warmup_min_ratio": 0.1},
}
DENSE = {"gradient_clipping": 1.0, "optimizer": OPTIMIZER, "scheduler": SCHEDULER}
SECTION = {"layers": "vision.*|decoder.*.cross_attn", "measurements": 5, "anchors": ["first"], "grid": [4, 4]}
COMPRESSED = {**DENSE, "csat_attention": SECTION}
STEPS = 4


def write_shard(path: Path, count: int, seed: int) -> None:
    """Pictures of one colour each, captioned by its name."""
    colours = {"red": (220, 30, 30), "green": (30, 180, 30), "blue": (30, 30, 220), "black": (10, 10, 10)}
    rng = np.random.default_rng(seed)
    with tarfile.open(path, "w") as tar:
        for i in range(count):
            name = list(colours)[i % len(colours)]
            pixels = np.clip(np.array(colours[name]) + rng.integers(-9, 9, (16, 16, 3)), 0, 255).astype(np.uint8)
            png = io.BytesIO()
            Image.fromarray(pixels).save(png, "PNG")
            for suffix, content in (("png", png.getvalue()), ("txt", f"a {name} square {i}".encode())):
                member = tarfile.TarInfo(f"{path.stem}-{i:03d}.{suffix}")
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))


@pytest.fixture(scope="session")
def job(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with shards, tokenizer, YAML and both DeepSpeed JSONs of a run of seconds."""
    folder = tmp_path_factory.mktemp("job")
    write_shard(folder / "train.tar", 40, seed=0)
    write_shard(folder / "val.tar", 12, seed=1)
    shutil.copy(EXAMPLES / "data" / "tokenizer.json", folder)
    settings = {
        "deepspeed": "csat.json",
        "model": {"width": 32, "heads": 2, "vision_layers": 1, "text_layers": 1, "decoder_layers": 1, "embed_dim": 16},
        "data": {
            "train_shards": "train.tar",
            "val_shards": "val.tar",
            "tokenizer": "tokenizer.json",
            "image_size": 16,
            "text_length": 8,
            "batch_size": 8,
        },
        "train": {"steps": STEPS, "log_every": 1, "checkpoint_every": 2},
        "evaluate": {"examples": 2},
    }
    (folder / "job.yaml").write_text(yaml.safe_dump(settings))
    (folder / "csat.json").write_text(json.dumps(COMPRESSED))
    (folder / "sdpa.json").write_text(json.dumps(DENSE))
    return folder


def command(*arguments: str | Path, ranks: int = 1) -> str:
    """Runs `csat ARGUMENTS` from a fresh interpreter, by torchrun on several ranks, and returns what it printed; fails
    the test where it fails."""
    launcher = [] if ranks == 1 else ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
    interpreter = [sys.executable, *launcher, "-m", "csat_ext.cli"]
    environment = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
    environment |= {
        "OMP_NUM_THREADS": "1",
        "CSAT_TRACEBACK": "1",
        "PYTHONPATH": os.pathsep.join(p for p in sys.path if p),
    }
    done = subprocess.run(
        [*interpreter, *map(str, arguments)], env=environment, capture_output=True, text=True, timeout=240
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def metrics(output: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]


def losses(output: Path) -> list[tuple[float, ...]]:
    return [tuple(line[key] for key in ("step", "loss", "contrastive", "caption", "lr")) for line in metrics(output)]


@pytest.fixture(scope="session")
def trained(job: Path) -> tuple[Path, str]:
    """Output folder and screen of one run with CSAT attention, evaluation included."""
    output = job / "trained"
    return output, command("pretrain", "--config", job / "job.yaml", "--output", output)


@pytest.mark.slow
def test_trains_evaluates_and_says_so(trained: tuple[Path, str]) -> None:
    output, screen = trained
    lines = metrics(output)
    assert [line["step"] for line in lines] == [1, 2, 3, 4]
    assert all(np.isfinite(line["loss"]) and line["lr"] > 0 and line["tokens_per_s"] > 0 for line in lines)
    assert lines[0]["loss"] != lines[-1]["loss"]
    assert sorted(path.name for path in (output / "checkpoints").iterdir()) == [
        "latest",
        "step-00000002",
        "step-00000004",
    ]
    assert any((output / "tensorboard").iterdir())
    assert "2 csat, 2 sdpa (m = 5, pool, decoder lista)" in screen
    assert "step 4/4" in screen and "ETA" in screen
    assert "DeepSpeed" not in screen and "[INFO]" not in screen and "WARNING" not in screen


@pytest.mark.slow
def test_evaluation_writes_results_and_a_picture(trained: tuple[Path, str]) -> None:
    results = json.loads((trained[0] / "evaluation" / "results.json").read_text())
    assert (results["step"], results["items"]) == (STEPS, 12)
    for direction in ("image_to_text", "text_to_image"):
        scores = results["retrieval"][direction]
        assert scores["R@5"]["chance"] == pytest.approx(5 / 12)  # 12 distinct captions
        assert 0 <= scores["R@1"]["score"] <= scores["R@5"]["score"] <= scores["R@10"]["score"] <= 1
    assert set(results["captioning"]) == {"BLEU-4", "CIDEr-D"}
    assert results["config"]["deepspeed"]["csat_attention"] == SECTION
    assert results["training"]["step"] == STEPS
    assert results["command"].startswith("csat pretrain --config") and results["machine"]["torch"] and results["date"]
    with Image.open(trained[0] / "evaluation" / "examples.png") as picture:
        assert picture.width > 800 and picture.height > 200
        assert len(picture.convert("RGB").getcolors(1 << 24)) > 100


def test_every_caption_of_an_image_is_right() -> None:
    """Two images, with two captions and with one; the second caption of the first is nearest to the second image."""
    image = torch.eye(2)
    text = torch.tensor([[1.0, 0.0], [0.1, 0.9], [0.0, 1.0]])
    captions = [("a fox", "a sly animal"), ("the moon",)]
    items = evaluate.Items(image, text, captions, ["a fox", "a fox"], torch.zeros(2, 3, 4, 4))
    found = evaluate.measured(items)
    assert found["items"] == 2
    assert found["retrieval"]["image_to_text"]["R@1"] == {"score": 1.0, "chance": pytest.approx((2 / 3 + 1 / 3) / 2)}
    assert found["retrieval"]["text_to_image"]["R@1"] == {"score": pytest.approx(2 / 3), "chance": 0.5}
    captioning = found["captioning"]
    assert captioning["CIDEr-D"]["score"] == pytest.approx(cider_d(["a fox", "a fox"], captions))
    assert captioning["BLEU-4"]["chance"] == pytest.approx(bleu4(["a fox", "a fox"], captions[::-1]))
    first = items.first(1)
    assert len(first.text) == 2 and first.captions == captions[:1] and len(first.image) == len(first.generated) == 1


@pytest.mark.slow
def test_resumed_run_equals_the_uninterrupted_one_bitwise(trained: tuple[Path, str], job: Path) -> None:
    output = job / "resumed"
    shutil.copytree(trained[0], output)
    shutil.rmtree(output / "checkpoints" / f"step-{STEPS:08d}")  # as after a crash in step 3
    (output / "checkpoints" / "latest").write_text("step-00000002")
    fixed = ("pretrain", "--config", job / "job.yaml", "--output", output)
    code, screen = forked.csat(*fixed, "--resume", "train.evaluate=false")
    assert code == 0, screen
    assert losses(output) == losses(trained[0])


@pytest.mark.slow
@pytest.mark.distributed
def test_two_ranks_give_the_losses_of_one(trained: tuple[Path, str], job: Path) -> None:
    """Half the batch on each of two ranks: contrastive negatives and token counts come from both."""
    output = job / "two"
    arguments = (
        "pretrain",
        "--config",
        job / "job.yaml",
        "--output",
        output,
        "data.batch_size=4",
        "train.evaluate=false",
    )
    screen = command(*arguments, ranks=2)
    assert "2 rank(s)" in screen and screen.count("step 4/4") == 1
    assert np.array(losses(output)) == pytest.approx(np.array(losses(trained[0])), rel=2e-5)


def kinds(run: Run) -> dict[str, type]:
    model = build_model(run)
    apply(model, read_section(run.deepspeed))
    return {name: type(m) for name, m in model.named_modules() if isinstance(m, SDPAttention | CSATAttention)}


def test_the_json_chooses_the_attention(job: Path) -> None:
    compressed = kinds(read_run(configs.load(job / "job.yaml")))
    assert compressed == {
        "vision.blocks.0.attn": CSATAttention,
        "text.blocks.0.attn": SDPAttention,
        "decoder.blocks.0.self_attn": SDPAttention,
        "decoder.blocks.0.cross_attn": CSATAttention,
    }
    assert set(kinds(read_run(configs.load(job / "job.yaml", deepspeed=str(job / "sdpa.json")))).values()) == {
        SDPAttention
    }


def test_both_attentions_start_from_the_same_weights(job: Path) -> None:
    run = read_run(configs.load(job / "job.yaml"))
    dense, compressed = build_model(run), build_model(run)
    apply(compressed, read_section(run.deepspeed))
    compressed_weights = compressed.state_dict()
    assert all(weight.equal(compressed_weights[name]) for name, weight in dense.state_dict().items())


def test_auto_is_filled_from_the_yaml_and_contradictions_are_refused(job: Path) -> None:
    run = read_run(configs.load(job / "job.yaml"))
    filled = fill_auto(run, world_size=3)
    assert (filled["train_micro_batch_size_per_gpu"], filled["train_batch_size"]) == (8, 24)
    assert filled["scheduler"]["params"]["total_num_steps"] == STEPS
    with pytest.raises(ValueError, match="train_batch_size is 7 but the run's config makes it 8"):
        fill_auto(Run(run.config, {**run.deepspeed, "train_batch_size": 7}), world_size=1)
    with pytest.raises(ValueError, match="gradient_accumulation_steps is 'auto'"):
        fill_auto(Run(run.config, {**run.deepspeed, "gradient_accumulation_steps": "auto"}), world_size=1)


SHIPPED = sorted([*EXAMPLES.glob("ds_*.json"), *(EXAMPLES / "scale").glob("*.json")])


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.name)
def test_the_shipped_configs_are_valid(path: Path) -> None:
    """For us and for DeepSpeed, and they convert what they name."""
    from deepspeed.runtime.config import DeepSpeedConfig

    run = read_run(configs.load(EXAMPLES / "pretrain.yaml", deepspeed=str(path)))
    attention = set(kinds(run).values())
    assert attention == ({SDPAttention} if path.name == "ds_sdpa.json" else {SDPAttention, CSATAttention})
    filled = fill_auto(run, world_size=1)
    assert DeepSpeedConfig(filled).zero_config.stage == filled["zero_optimization"]["stage"]


def test_the_shipped_batch_script_is_a_script() -> None:
    subprocess.run(["bash", "-n", EXAMPLES / "scale" / "pretrain.slurm"], check=True)


@pytest.mark.slow
@pytest.mark.distributed
def test_the_config_of_many_nodes_trains_on_two_ranks(trained: tuple[Path, str], job: Path) -> None:
    """ZeRO-3 in bfloat16: nearly the losses of one rank in float32."""
    shipped = json.loads((EXAMPLES / "scale" / "many_nodes.json").read_text())
    (job / "many.json").write_text(json.dumps({**shipped, "csat_attention": SECTION, **DENSE}))
    output = job / "many"
    fixed = ("pretrain", "--config", job / "job.yaml", "--deepspeed", job / "many.json", "--output", output)
    code, screen = forked.csat(*fixed, "data.batch_size=4", "train.evaluate=false", ranks=2)
    assert code == 0 and "2 rank(s) on cpu, ZeRO stage 3" in screen, screen
    totals = [np.array(losses(folder))[:, 1] for folder in (output, trained[0])]
    assert totals[0] == pytest.approx(totals[1], rel=2e-2)


BAD_COMMANDS = {
    "an unknown key": (["model.widht=64"], "config: model: unknown key 'widht'; did you mean 'width'?"),
    "an unknown section": (["modle.width=64"], "config: the file: unknown key 'modle'; did you mean 'model'?"),
    "a wrong value": (["model.heads=many"], "config: model.heads"),
    "heads that do not divide": (["model.heads=3"], "model.width: 32 is not a multiple of model.heads = 3"),
    "a number out of range": (["train.steps=0"], "csat: config: train.steps: 0 came, at least 1 is accepted"),
    "data out of range": (["data.seed=-1"], "csat: config: data: seed must be at least 0, got -1"),
    "a value that is no YAML": (["train.steps=["], "override: the value of 'train.steps=[' is not valid YAML"),
    "a section that is a number": (["data=3"], "config: data is 3, a mapping with the keys"),
    "no equals sign": (["model.width"], "override: 'model.width' came, section.key=value is accepted"),
    "a missing shard": (["data.train_shards=nowhere.tar"], "data.train_shards: nothing matches"),
    "a missing tokenizer": (["data.tokenizer=nowhere.json"], "tokenizer: no file"),
    "a missing JSON": (["--deepspeed", "nowhere.json"], "DeepSpeed config: no file"),
    "nothing to resume": (["--resume"], "there is no checkpoint to continue"),
}


def refusal(monkeypatch: pytest.MonkeyPatch, *arguments: str | Path) -> str:
    """The one line that `csat ARGUMENTS` ends with; no heavy work may have begun."""
    monkeypatch.delenv("CSAT_TRACEBACK", raising=False)
    monkeypatch.setattr(sys, "argv", ["csat", *map(str, arguments)])
    monkeypatch.setattr("csat_ext.pretrain.train.set_up_process_group", lambda: pytest.fail("heavy work began"))
    with pytest.raises(SystemExit) as exit:
        cli.main()
    assert isinstance(exit.value.code, str) and "\n" not in exit.value.code
    return exit.value.code


@pytest.mark.parametrize("case", BAD_COMMANDS)
def test_bad_commands_end_in_one_line(case: str, job: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    arguments, message = BAD_COMMANDS[case]
    line = refusal(monkeypatch, "pretrain", "--config", job / "job.yaml", "--output", tmp_path, *arguments)
    assert line.startswith("csat: ") and message in line


def test_a_misspelt_section_is_refused(job: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "ds.json"
    path.write_text(json.dumps({**DENSE, "csat_atention": SECTION}))
    line = refusal(monkeypatch, "pretrain", "--config", job / "job.yaml", "--deepspeed", path)
    assert "unknown section 'csat_atention'; did you mean 'csat_attention'?" in line


def test_an_existing_run_is_not_overwritten(job: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints" / "latest").write_text("step-00000002")
    line = refusal(monkeypatch, "pretrain", "--config", job / "job.yaml", "--output", tmp_path)
    assert "pass --resume" in line


@pytest.mark.parametrize(
    ("change", "name"),
    [(["model.width=64"], "model"), (["data.seed=1"], "data"), (["--deepspeed", "sdpa"], "csat_attention")],
)
def test_resuming_another_run_is_refused(
    change: list[str], name: str, job: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints" / "latest").write_text("step-00000002")
    read_run(configs.load(job / "job.yaml")).save(tmp_path)
    change = [str(job / "sdpa.json") if word == "sdpa" else word for word in change]
    line = refusal(monkeypatch, "pretrain", "--config", job / "job.yaml", "--output", tmp_path, "--resume", *change)
    assert f"--resume: {name} differs from the run" in line


def test_evaluate_without_a_run_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert "is not the output folder of a pretraining run" in refusal(monkeypatch, "evaluate", "--checkpoint", tmp_path)


@pytest.mark.parametrize("started", ["OMPI_COMM_WORLD_SIZE", "SLURM_STEP_NUM_TASKS"])
def test_processes_that_would_each_train_alone_are_refused(started: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RANK", raising=False)
    monkeypatch.setenv(started, "4")
    with pytest.raises(RuntimeError, match=f"{started} is 4, but RANK is not set: .* torchrun"):
        train.set_up_process_group()
    assert "RANK" not in os.environ


def test_no_rank_waits_for_the_evaluation(job: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It may take longer than the ten minutes after which NCCL gives a barrier up."""
    order: list[str] = []
    monkeypatch.setenv("RANK", "0")
    for name in ("pretrain", "leave_process_group"):
        monkeypatch.setattr(train, name, lambda *_, name=name, **__: order.append(name))
    monkeypatch.setattr(cli, "_evaluate", lambda *_: order.append("evaluate"))
    cli.pretrain(config=job / "job.yaml", output=tmp_path)
    assert order == ["pretrain", "leave_process_group", "evaluate"]


def test_help_is_light() -> None:
    """`csat --help` imports nothing that only a command needs."""
    check = "import sys, csat_ext.cli; sys.exit(int(not {'deepspeed', 'webdataset', 'yaml'}.isdisjoint(sys.modules)))"
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}
    done = subprocess.run([sys.executable, "-c", check], env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr


def test_a_steps_losses_are_the_mean_of_its_micro_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    vision = SimpleNamespace(position=torch.zeros(1, 17, 8))
    engine = SimpleNamespace(
        gradient_accumulation_steps=lambda: 2, device="cpu", module=SimpleNamespace(vision=vision),
        backward=lambda loss: None, step=lambda: None,
    )  # fmt: skip
    drawn = iter([Losses(*torch.tensor([5.0, 3.0, 2.0])), Losses(*torch.tensor([9.0, 5.0, 4.0]))])
    batch = {"key": ["a", "b"], "token_mask": torch.tensor([[True, True, False], [True, True, True]])}
    monkeypatch.setattr(train, "_finite_losses", lambda *arguments: (next(drawn), batch))
    total, tokens = train._train_step(engine, None, 1)  # type: ignore[arg-type]
    assert total.tolist() == [7, 4, 3] and tokens == 2 * (2 * 17 + 5)
