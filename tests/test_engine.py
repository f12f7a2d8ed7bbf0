"""Training through the real DeepSpeed engine: however state and work are spread over ranks, the losses are the same."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import forked
import pytest
import torch

from csat_ext.planning import state_bytes

pytest.importorskip("deepspeed")
pytestmark = [pytest.mark.slow, pytest.mark.distributed]

FLOAT32 = [
    "stage 1",
    "stage 2",
    "stage 3",
    "accumulation",
    "zero.Init",
    "within zero.Init",
    "torch checkpointing",
    "selective checkpointing",
    "deepspeed checkpointing",
    "compile",
    "offload",
]
BYTES = [f"bytes {stage} {precision}" for stage in (1, 2, 3) for precision in ("fp32", "bf16")]
STAGES = [1, 3]
HALF = ["bf16", "bf16 zero.Init", "fp16"]


def python(*arguments: str | Path) -> str:
    """Runs a Python command in a process of its own; fails the test where it fails."""
    environment = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
    path = os.pathsep.join(p for p in sys.path if p)
    environment |= {"OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu", "PYTHONPATH": path}
    done = subprocess.run(
        [sys.executable, *map(str, arguments)], env=environment, capture_output=True, text=True, timeout=280
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def job(folder: Path, *cases: str, ranks: int = 2) -> dict[str, Any]:
    import engine_job

    results = folder / "results.json"
    code, printed = forked.run(engine_job.main, str(results), *cases, ranks=ranks, timeout=280)
    assert code == 0, printed
    return json.loads(results.read_text())


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("engine")


@pytest.fixture(scope="module")
def losses(folder: Path) -> dict[str, list[float]]:
    """Every training, on two ranks."""
    checkpoints = [f"{verb} {stage} {folder / str(stage)}" for stage in STAGES for verb in ("save", "resume")]
    return job(folder, "stage 0", *FLOAT32, *HALF, *BYTES, *checkpoints)


@pytest.fixture(scope="module")
def alone(folder: Path, losses: dict[str, list[float]]) -> dict[str, list[float]]:
    """The checkpoints of two ranks, made universal and resumed by one."""
    for stage in STAGES:
        converter = ("-m", "deepspeed.checkpoint.ds_to_universal", "--inject_missing_state")
        source = folder / str(stage)
        python(*converter, "--input_folder", source / "half", "--output_folder", source / "universal")
    return job(folder, *(f"universal {stage} {folder / str(stage)}" for stage in STAGES), ranks=1)


@pytest.mark.parametrize("case", FLOAT32)
def test_the_same_losses_in_float32(losses: dict[str, list[float]], case: str) -> None:
    assert len(set(losses["stage 0"])) == len(losses["stage 0"])
    assert losses[case] == pytest.approx(losses["stage 0"], rel=1e-6)


@pytest.mark.parametrize("case", HALF)
def test_nearly_the_same_losses_in_half_precision(losses: dict[str, list[float]], case: str) -> None:
    assert losses[case] != losses["stage 0"]
    assert losses[case] == pytest.approx(losses["stage 0"], rel=2e-4 if case == "fp16" else 2e-3)


@pytest.mark.parametrize("stage", STAGES)
def test_a_resumed_run_goes_on_bitwise(losses: dict[str, list[float]], folder: Path, stage: int) -> None:
    saved, resumed = (losses[f"{verb} {stage} {folder / str(stage)}"] for verb in ("save", "resume"))
    assert resumed == saved[len(saved) // 2 :]


@pytest.mark.parametrize("stage", STAGES)
def test_a_universal_checkpoint_goes_on_with_another_number_of_ranks(
    losses: dict[str, list[float]], alone: dict[str, list[float]], folder: Path, stage: int
) -> None:
    """The thresholds keep their own learning rate, and every parameter group its own step counter."""
    resumed = losses[f"resume {stage} {folder / str(stage)}"]
    assert alone[f"universal {stage} {folder / str(stage)}"] == pytest.approx(resumed, rel=1e-6)


@pytest.mark.parametrize("stage", STAGES)
def test_zero_to_fp32_gives_weights_that_need_no_deepspeed(
    losses: dict[str, list[float]], folder: Path, tmp_path: Path, stage: int
) -> None:
    python("-m", "deepspeed.utils.zero_to_fp32", folder / str(stage), tmp_path, "-t", "half")
    weights = torch.load(tmp_path / "pytorch_model.bin", weights_only=True)
    expected = losses[f"resume {stage} {folder / str(stage)}"][0]
    assert first_loss(weights) == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("case", BYTES)
def test_a_rank_holds_the_bytes_that_the_plan_says(losses: dict[str, list[float]], case: str) -> None:
    _, stage, precision = case.split()
    count, parameters, optimizer = losses[case]
    foreseen = state_bytes(int(count), int(stage), 2, precision)
    assert parameters == pytest.approx(foreseen["parameters"], rel=0.01)
    assert optimizer == pytest.approx(foreseen["optimizer"], rel=0.01)


def first_loss(weights: dict[str, torch.Tensor]) -> float:
    """The loss of the first step after the checkpoint, without DeepSpeed."""
    import engine_job

    from csat_ext.deepspeed import apply

    model = engine_job.Model()
    apply(model, {"csat_attention": engine_job.SECTION})
    missing, unexpected = model.load_state_dict(weights, strict=False)
    assert not unexpected and all(name.endswith("measurement_key") for name in missing)
    batch = engine_job.global_batch(engine_job.STEPS // 2)
    with torch.no_grad():
        return float(model(batch))


def test_unknown_ops_of_selective_checkpointing_are_refused() -> None:
    from csat_ext.deepspeed import checkpoint_contexts

    with pytest.raises(ValueError, match=r"'atend' is not an op of torch\.ops\.csat; accepted: attend, "):
        checkpoint_contexts("atend")
