"""`csat_ext.checkpoints` where the ranks see different files: no rank may go on alone, for the others would wait."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch.distributed as dist

from csat_ext import checkpoints

if TYPE_CHECKING:
    from ranks import Ranks

pytest_plugins = ["ranks"]
pytestmark = pytest.mark.distributed


class Engine:
    def save_checkpoint(self, folder: str, tag: str, client_state: dict[str, Any], save_latest: bool) -> None:
        (Path(folder) / tag).mkdir(parents=True, exist_ok=True)
        (Path(folder) / tag / f"state-{dist.get_rank()}").write_text("1")

    def load_checkpoint(self, folder: str, tag: str) -> tuple[str, dict[str, Any]]:
        return tag, {"tag": tag}


def folders_of_their_own(folder: Path) -> None:
    with pytest.raises(ValueError, match=r"ranks 0 and 1 see different files there, such as state-.*all ranks share"):
        checkpoints.save(Engine(), folder / str(dist.get_rank()), 1, {}, keep=2)


def test_a_disk_of_each_rank_is_refused(two: Ranks, tmp_path: Path) -> None:
    two.run(folders_of_their_own, tmp_path)


def restored_where_one_sees_nothing(folder: Path) -> str:
    checkpoints.save(Engine(), folder, 1, {}, keep=2)
    with pytest.raises(FileNotFoundError, match=r"step-00000001 lacks state-\d"):
        checkpoints.restore(Engine(), folder if dist.get_rank() == 0 else folder / "elsewhere")
    return str(checkpoints.restore(Engine(), folder)["tag"])


def test_ranks_restore_together_or_not_at_all(two: Ranks, tmp_path: Path) -> None:
    assert two.run(restored_where_one_sees_nothing, tmp_path) == ["step-00000001"] * 2
