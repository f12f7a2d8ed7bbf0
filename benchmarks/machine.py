"""The header that every result file carries: what ran, where, when and from which revision."""

from __future__ import annotations

import os
import platform
import shlex
import subprocess
import sys
from datetime import datetime, timezone
from pathlib import Path


def header() -> dict[str, object]:
    """CPU, cores, device, versions, date, command and revision, ready for json.dump. Reads nothing but this machine."""
    import torch

    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"
    return {
        "cpu": _cpu_model(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "device": device,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "command": _command(),
        "revision": _revision(),
    }


def _cpu_model() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def _command() -> str:
    """The command line with the script relative to the repository: a result file names no path of a machine."""
    root = Path(__file__).resolve().parents[1]
    script = Path(sys.argv[0]).resolve()
    name = script.relative_to(root) if script.is_relative_to(root) else script.name
    return shlex.join(["python", str(name), *sys.argv[1:]])


def _revision() -> str:
    """The commit, with "+" after it when tracked files differ from it; "unknown" outside a git checkout."""
    here = Path(__file__).parent
    try:
        commit = _git(here, "rev-parse", "HEAD")
        changed = _git(here, "status", "--porcelain", "--untracked-files=no")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return commit + ("+" if changed else "")


def _git(where: Path, *arguments: str) -> str:
    return subprocess.run(["git", *arguments], cwd=where, check=True, capture_output=True, text=True).stdout.strip()
