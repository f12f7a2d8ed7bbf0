"""Checkpoints of a DeepSpeed engine that survive a killed rank, a full disk and a damaged file.

A checkpoint is a folder ``step-00000100`` that DeepSpeed writes, sealed by a manifest (name, size and CRC-32 of every
file) that is written last and at once. What has no manifest is half written; what differs from it is damaged; `restore`
takes the newest sound one. All ranks call these functions together, on a file system that they share.
"""

from __future__ import annotations

import json
import os
import shutil
import warnings
import zlib
from pathlib import Path
from typing import Any

import torch.distributed as dist

LATEST = "latest"  # the file by which DeepSpeed's own tools find the newest checkpoint
MANIFEST = "manifest.json"
_FORMAT = 1
_CHUNK = 1 << 24


class UnsoundCheckpointWarning(UserWarning):
    """A checkpoint that was passed over: which, and why."""


def save(engine: Any, folder: str | os.PathLike[str], step: int, state: dict[str, Any], keep: int) -> None:
    """Writes and seals the checkpoint of a step, then removes all but `keep`: this one and, of the others, the newest.

    Raises:
        ValueError: keep is below 1, and nothing is written; the ranks see different files in the folder, which they
            must share, and the checkpoint has no seal.
        OSError: it could not be written; what there is of it is removed and the earlier ones stay as they are.
    """
    if keep < 1:
        raise ValueError(f"keep: {keep} came, at least 1 is accepted: the checkpoint that is written stays")
    folder, tag = Path(folder), _tag(step)
    if dist.get_rank() == 0:
        shutil.rmtree(folder / tag, ignore_errors=True)  # half written by a run that was killed here
    dist.barrier()
    try:
        engine.save_checkpoint(str(folder), tag=tag, client_state=state, save_latest=False)
        _seal(folder / tag)
    except (OSError, RuntimeError) as error:  # torch's writer turns the system's error into a RuntimeError
        shutil.rmtree(folder / tag, ignore_errors=True)
        free = shutil.disk_usage(folder).free / 2**20
        last = (folder / LATEST).read_text() if (folder / LATEST).is_file() else "none"
        raise OSError(
            f"{folder / tag}: the checkpoint could not be written ({error}); {free:.0f} MiB are free there. The last "
            f"good one is {last}: make room and resume"
        ) from error
    if dist.get_rank() == 0:
        _write(folder / LATEST, tag)
        others = [other for other in _tags(folder) if other != tag]  # of later steps too: a run that went back
        for old in others[: max(len(others) - (keep - 1), 0)]:
            shutil.rmtree(folder / old)
    dist.barrier()


def restore(engine: Any, folder: str | os.PathLike[str]) -> dict[str, Any]:
    """Loads the newest sound checkpoint and returns the state that was saved with it.

    Warns of every newer one that is passed over (`UnsoundCheckpointWarning`), on rank 0.

    Raises:
        FileNotFoundError: none is sound; the message says what is wrong with each.
    """
    folder, reasons = Path(folder), []
    for tag in reversed(_of_first_rank(_tags(folder))):
        reason = _defect(folder / tag)
        if reason is None:
            _, state = engine.load_checkpoint(str(folder), tag=tag)
            return dict(state)
        reasons.append(f"{tag} {reason}")
        if dist.get_rank() == 0:
            warnings.warn(f"{folder}: {reasons[-1]}; passed over", UnsoundCheckpointWarning, stacklevel=2)
    raise FileNotFoundError(f"{folder} holds no checkpoint to continue: {'; '.join(reasons) or 'it is empty'}")


def _tag(step: int) -> str:
    return f"step-{step:08d}"


def _tags(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.glob("step-*") if path.is_dir())


def _write(path: Path, text: str) -> None:
    """All or nothing: a reader finds the old content or the new."""
    temporary = path.with_suffix(".partial")
    with temporary.open("w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)


def _of_first_rank(value: Any) -> Any:
    """What rank 0 came with: all go on alike, also where they do not see the same files."""
    box = [value]
    dist.broadcast_object_list(box, src=0)
    return box[0]


def _seal(folder: Path) -> None:
    dist.barrier()
    files = sorted(path.name for path in folder.iterdir() if path.is_file()) if folder.is_dir() else []
    listings: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(listings, files)
    for rank, listing in enumerate(listings):
        if different := sorted({*listing} ^ {*listings[0]}):
            raise ValueError(
                f"{folder}: ranks 0 and {rank} see different files there, such as {different[0]}; it must lie on a "
                "file system that all ranks share"
            )
    parts: list[Any] = [None] * dist.get_world_size()
    own = {name: _fingerprint(folder / name) for name in files[dist.get_rank() :: dist.get_world_size()]}
    dist.all_gather_object(parts, own)
    if dist.get_rank() == 0:
        merged = {name: mark for part in parts for name, mark in part.items()}
        _write(folder / MANIFEST, json.dumps({"format": _FORMAT, "files": merged}, indent=1) + "\n")


def _fingerprint(path: Path) -> list[int]:
    """Size and CRC-32."""
    crc = 0
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK):
            crc = zlib.crc32(chunk, crc)
    return [path.stat().st_size, crc]


def _manifest(folder: Path) -> dict[str, list[int]] | str:
    """The files of a checkpoint and their fingerprints, or what is wrong with its manifest."""
    try:
        manifest = json.loads((folder / MANIFEST).read_text())
    except FileNotFoundError:
        return f"has no {MANIFEST}: it was half written"
    except ValueError as error:
        return f"has an unreadable {MANIFEST} ({error})"
    if manifest.get("format") != _FORMAT:
        return f"has a {MANIFEST} of format {manifest.get('format')!r}; this version reads {_FORMAT}"
    return manifest["files"]


def _defect(folder: Path) -> str | None:
    """What is wrong with a checkpoint, found by all ranks together, or None."""
    manifest = _of_first_rank(_manifest(folder))
    if isinstance(manifest, str):
        return manifest
    found = None
    for name in sorted(manifest)[dist.get_rank() :: dist.get_world_size()]:
        path = folder / name
        if not path.is_file():
            found = f"lacks {name}"
        elif _fingerprint(path) != manifest[name]:
            found = f"is damaged: {name} is not what was written"
    parts: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(parts, found)
    return next((part for part in parts if part is not None), None)
