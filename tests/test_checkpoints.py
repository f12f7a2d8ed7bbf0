"""`csat_ext.checkpoints` by itself: what `save` keeps. Faults have test_faults.py."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist

from csat_ext import checkpoints


class Engine:
    """What `checkpoints` needs of a DeepSpeed engine."""

    def save_checkpoint(self, folder: str, tag: str, client_state: dict[str, Any], save_latest: bool) -> None:
        (Path(folder) / tag).mkdir(parents=True)
        (Path(folder) / tag / "state").write_text(str(client_state["step"]))

    def load_checkpoint(self, folder: str, tag: str) -> tuple[str, dict[str, Any]]:
        return tag, {"step": int((Path(folder) / tag / "state").read_text())}


@pytest.fixture(autouse=True)
def group(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    store = tmp_path_factory.mktemp("group") / "store"
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def save(folder: Any, *steps: int, keep: int = 10) -> list[int]:
    """The steps that are there after those were saved."""
    for step in steps:
        checkpoints.save(Engine(), folder, step, {"step": step}, keep)
    return sorted(int(path.name.removeprefix("step-")) for path in Path(folder).glob("step-*"))


@pytest.mark.parametrize(("keep", "left"), [(1, [2]), (2, [2, 4]), (3, [2, 3, 4]), (4, [1, 2, 3, 4])])
def test_what_was_just_saved_stays_though_later_steps_are_there(tmp_path: Path, keep: int, left: list[int]) -> None:
    save(tmp_path, 1, 3, 4)
    assert save(tmp_path, 2, keep=keep) == left
    assert (tmp_path / "latest").read_text() == "step-00000002"


def test_the_newest_stay(tmp_path: Path) -> None:
    assert save(tmp_path, 1, 2, 3, 4, keep=2) == [3, 4]


@pytest.mark.parametrize("keep", [0, -1])
def test_keeping_none_is_refused_and_nothing_is_written(tmp_path: Path, keep: int) -> None:
    with pytest.raises(ValueError, match=f"keep: {keep} came, at least 1 is accepted"):
        save(tmp_path, 1, keep=keep)
    assert not list(tmp_path.iterdir())


def test_a_folder_may_be_a_string(tmp_path: Path) -> None:
    assert save(str(tmp_path), 1, 2) == [1, 2]
    assert checkpoints.restore(Engine(), str(tmp_path)) == {"step": 2}
