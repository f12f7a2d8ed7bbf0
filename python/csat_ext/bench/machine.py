"""The header that every result file carries: what ran, where, when and from which revision."""

from __future__ import annotations

import os
import platform
import re
import shlex
import subprocess
import sys
from datetime import datetime, timezone
from pathlib import Path


def header() -> dict[str, object]:
    """CPU, cores, device, load, versions, date, command and revision, ready for json.dump. Reads only this machine."""
    import torch

    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"
    return {
        "cpu": _cpu_model(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "load": round(os.getloadavg()[0], 1),
        "device": device,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "command": _command(sys.argv),
        "revision": _revision(),
    }


def _cpu_model() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def _command(argv: list[str]) -> str:
    """The command line: a script relative to its checkout, no folder in front of other files, so that a result file
    names no path of a machine."""
    script = Path(argv[0]).resolve()
    rest = [re.sub(r"(^|=)/.*/", r"\1", argument) for argument in argv[1:]]
    if script.suffix != ".py":
        return shlex.join([script.name, *rest])
    root = next((p for p in script.parents if (p / "pyproject.toml").exists()), script.parent)
    return shlex.join(["python", str(script.relative_to(root)), *rest])


def checkout() -> Path | None:
    """The checkout whose python/csat_ext this package is; None where it is installed."""
    import csat_ext

    package = Path(csat_ext.__path__[0]).resolve()
    root = package.parents[1]
    return root if package == root / "python" / "csat_ext" and (root / ".git").exists() else None


def _revision() -> str:
    """The commit of the package that runs, with "+" after it when tracked files differ; of an installed one the commit
    that it was built from; "unknown" without either."""
    root = checkout()
    if root is None:
        return _built_revision() or "unknown"
    try:
        commit = git(root, "rev-parse", "HEAD")
        changed = git(root, "status", "--porcelain", "--untracked-files=no")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return commit + ("+" if changed else "")


def _built_revision() -> str:
    try:
        from csat_ext._library import _C
    except ImportError:
        return ""
    return str(_C.build_info()["revision"])


def git(where: Path, *arguments: str) -> str:
    """What git prints, without the last line break."""
    return subprocess.run(["git", *arguments], cwd=where, check=True, capture_output=True, text=True).stdout.strip()
