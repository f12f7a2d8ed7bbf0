"""What goes wrong in a long run, done to real processes: it stops or goes on with a clear message, and resumes bit for
bit from the last good checkpoint."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import forked
import pytest
import torch
from test_pretrain import COMPRESSED, losses, metrics, refusal
from test_pretrain import job as job  # the fixture

from csat_ext.pretrain import config as configs
from csat_ext.pretrain.train import read_run

pytest.importorskip("deepspeed")
STEPS, EVERY = 16, 4
ENVIRONMENT = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "CSAT_TRACEBACK")}
ENVIRONMENT |= {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}


def arguments(job: Path, output: Path, *more: str, stage: int = 1) -> list[str]:
    """`csat pretrain` with ZeRO, so that a checkpoint has a shard for every rank."""
    path = job / f"zero{stage}.json"
    path.write_text(json.dumps({**COMPRESSED, "zero_optimization": {"stage": stage}}))
    schedule = (f"train.steps={STEPS}", f"train.checkpoint_every={EVERY}", "train.keep_checkpoints=4")
    fixed = ("pretrain", "--config", str(job / "job.yaml"), "--deepspeed", str(path), "--output", str(output))
    return [*fixed, "train.evaluate=false", "data.batch_size=4", *schedule, *more]


def start(*command: str | Path, ranks: int = 1) -> subprocess.Popen[str]:
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"] if ranks > 1 else []
    line = [sys.executable, *launcher, *map(str, command)]
    return subprocess.Popen(line, env=ENVIRONMENT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def finish(process: subprocess.Popen[str], code: int = 0) -> str:
    """Everything the process printed; fails the test where it ends otherwise than with `code`."""
    out, err = process.communicate(timeout=240)
    assert process.returncode == code, f"exit code {process.returncode}\n{out}\n{err}"
    return out + err


def csat(*command: str, code: int = 0, **options: Any) -> str:
    """Everything that `csat COMMAND` printed (see `forked`); fails the test where it does not end with `code`."""
    ended, told = forked.csat(*command, **options)
    assert ended == code, f"exit code {ended}\n{told}"
    return told


def tags(output: Path) -> list[str]:
    return sorted(path.name for path in (output / "checkpoints").glob("step-*"))


# ---- two ranks, ZeRO-1 -----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def uninterrupted(job: Path) -> Path:
    output = job / "uninterrupted"
    csat(*arguments(job, output), ranks=2)
    assert tags(output) == [f"step-{step:08d}" for step in (4, 8, 12, 16)]
    return output


# By itself, not by the test, whose polling may come late on a busy machine: at that step, whatever the load.
KILLED = """
import os, signal, sys
from csat_ext.pretrain import train
train_step = train._train_step
def killed(engine, batches, step):
    if step == 7 and os.environ["RANK"] == "1":
        os.kill(os.getpid(), signal.SIGKILL)
    return train_step(engine, batches, step)
train._train_step = killed
from csat_ext import cli
sys.argv = ["csat", *sys.argv[1:]]
cli.main()
"""


@pytest.mark.slow
@pytest.mark.distributed
def test_a_killed_rank_ends_the_run_which_resumes_bitwise(job: Path, uninterrupted: Path) -> None:
    output, script = job / "killed", job / "killed.py"
    script.write_text(KILLED)
    told = finish(start(script, *arguments(job, output), ranks=2), code=1)
    assert "Signal 9 (SIGKILL)" in told
    assert EVERY < len(metrics(output)) < STEPS
    csat(*arguments(job, output, "--resume"), ranks=2)
    assert losses(output) == losses(uninterrupted)


@pytest.mark.slow
@pytest.mark.distributed
def test_damaged_checkpoints_are_passed_over(job: Path, uninterrupted: Path) -> None:
    """The newest lacks its seal, one lost the end of a shard, one has a flipped bit: the run goes on from the first."""
    output = job / "damaged"
    shutil.copytree(uninterrupted, output)
    checkpoints = output / "checkpoints"
    (checkpoints / "step-00000016" / "manifest.json").unlink()
    shard = next((checkpoints / "step-00000012").glob("zero_pp_rank_1_*optim_states.pt"))
    os.truncate(shard, shard.stat().st_size // 2)
    shard = next((checkpoints / "step-00000008").glob("zero_pp_rank_0_*optim_states.pt"))
    content = bytearray(shard.read_bytes())
    content[len(content) // 2] ^= 1
    shard.write_bytes(content)
    told = csat(*arguments(job, output, "--resume"), ranks=2)
    assert "step-00000016 has no manifest.json: it was half written; passed over" in told
    for step, rank in ((12, 1), (8, 0)):
        assert f"step-{step:08d} is damaged: zero_pp_rank_{rank}_mp_rank_00_optim_states.pt is not what was" in told
    assert losses(output) == losses(uninterrupted)
    assert tags(output) == tags(uninterrupted)


@pytest.mark.slow
def test_without_a_sound_checkpoint_there_is_nothing_to_resume(job: Path, uninterrupted: Path) -> None:
    output = job / "hopeless"
    shutil.copytree(uninterrupted, output)
    for tag in tags(output)[1:]:
        shutil.rmtree(output / "checkpoints" / tag)
    manifest = output / "checkpoints" / tags(output)[0] / "manifest.json"
    manifest.write_text(json.dumps({"format": 0, "files": {}}))
    told = csat(*arguments(job, output, "--resume"), code=1)
    assert "csat: " in told and "holds no checkpoint to continue: step-00000004 has a manifest.json of format 0" in told


# ---- one rank --------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_full_disk_leaves_the_last_good_checkpoint(job: Path) -> None:
    """The run writes to a file system, in a mount namespace of its own, that holds one checkpoint and a half."""
    if shutil.which("unshare") is None or subprocess.run(["unshare", "-rm", "true"], capture_output=True).returncode:
        pytest.skip("no mount namespace may be made here")
    mount, output = job / "small", job / "saved"
    mount.mkdir()
    command = " ".join([sys.executable, "-m", "csat_ext.cli", *arguments(job, mount / "run")])
    script = f"mount -t tmpfs -o size=4m small {mount} && {command}; code=$?; cp -r {mount}/run {output}; exit $code"
    told = finish(
        subprocess.Popen(
            ["unshare", "-rm", "sh", "-c", script],
            env=ENVIRONMENT,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        ),
        1,
    )
    line = next(line for line in told.splitlines() if line.startswith("csat: "))
    assert "step-00000008: the checkpoint could not be written" in line
    assert "MiB are free there. The last good one is step-00000004: make room and resume" in line
    assert tags(output) == ["step-00000004"]
    csat(*arguments(job, output, "--resume", "train.steps=6"))
    assert [line["step"] for line in metrics(output)] == list(range(1, 7))


def poison() -> None:
    """Batch 6 has a NaN."""
    from csat_ext.pretrain import train

    batches = train.train_batches

    def poisoned(config: Any, epoch: int, rank: int, world_size: int, start_batch: int = 0) -> Iterator[dict[str, Any]]:
        drawn = batches(config, epoch, rank, world_size, start_batch=start_batch)
        for number, batch in enumerate(drawn, start_batch):
            if epoch == 0 and number == 5:
                batch["image"][1, 0, 3, 3] = torch.nan
            yield batch

    train.train_batches = poisoned


@pytest.mark.slow
def test_a_batch_of_nan_stops_the_run_or_is_left_out(job: Path) -> None:
    """At ZeRO-3, whose parameters are gathered for a forward pass that no backward pass follows."""
    stopped, through = job / "stopped", job / "through"
    told = csat(*arguments(job, stopped, stage=3), before=poison, code=1)
    assert "csat: step 6: the loss of batch 6 is not finite on 1 of 1 rank(s); no weight was touched" in told
    assert "resume with train.bad_batches=skip" in told and tags(stopped) == ["step-00000004"]
    skip = "train.bad_batches=skip"
    told = csat(*arguments(job, stopped, "--resume", skip, stage=3), before=poison)
    assert told.count("step 6: the loss of batch 6 is not finite on 1 of 1 rank(s); left out") == 1
    csat(*arguments(job, through, skip, stage=3), before=poison)
    assert losses(stopped) == losses(through)
    assert len(losses(through)) == STEPS
    for tag in tags(through)[2:]:
        shutil.rmtree(through / "checkpoints" / tag)
    csat(*arguments(job, through, "--resume", skip, stage=3), before=poison)  # step 8 has drawn nine batches
    assert losses(through) == losses(stopped)


@pytest.mark.slow
def test_a_truncated_data_shard_is_named(job: Path) -> None:
    shard = job / "truncated.tar"
    with tarfile.open(job / "train.tar") as whole:
        end = whole.getmembers()[60].offset_data + 10
    shard.write_bytes((job / "train.tar").read_bytes()[:end])
    data = f"data.train_shards={shard}"
    told = csat(*arguments(job, job / "short", data, "train.steps=1"))
    assert "CorruptSampleWarning: train_shards: 1 samples or shards skipped" in told and "truncated.tar" in told
    told = csat(*arguments(job, job / "strict", data, "data.strict=true"), code=1)
    assert "csat: train_shards: " in told and "truncated.tar" in told


# ---- older versions --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"config": {"model": {"widht": 3}}}, "unknown key 'widht'; did you mean 'width'"),
        ({"deepspeed": {"csat_attention": {"rows": 3}}}, "csat_attention: unknown key 'rows'"),
        ({"config": None}, "'config'"),
    ],
)
@pytest.mark.parametrize("version", [None, "0.0.7"])
def test_a_config_of_another_version_is_refused_by_name(
    change: dict[str, object],
    message: str,
    version: str | None,
    job: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints" / "latest").write_text("step-00000002")
    read_run(configs.load(job / "job.yaml")).save(tmp_path)
    path = tmp_path / "run.json"
    written = {**json.loads(path.read_text()), **change, "csat_ext": version}
    path.write_text(json.dumps({key: value for key, value in written.items() if value is not None}))
    line = refusal(monkeypatch, "pretrain", "--config", job / "job.yaml", "--output", tmp_path, "--resume")
    assert f"was written by csat_ext {version or 'an older version'} and this is " in line and message in line


def test_a_config_without_the_keys_that_came_later_is_taken(
    job: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Missing keys have their defaults, so that the run is the same one: the refusal that follows is of its weights."""
    from csat_ext.pretrain.train import Run

    run = read_run(configs.load(job / "job.yaml"))
    run.save(tmp_path)
    path = tmp_path / "run.json"
    written = json.loads(path.read_text())
    del written["config"]["train"]["bad_batches"], written["csat_ext"]
    path.write_text(json.dumps(written))
    assert Run.load(tmp_path) == run
