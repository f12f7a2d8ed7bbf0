"""Builds the emulated library with CMake (cmake/emulator.cmake), which recompiles only what has changed."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
BUILD_DIRECTORY = ROOT / "build" / "emulated"


def why_not_buildable() -> str | None:
    """What is missing on this machine, None if nothing."""
    missing = [tool for tool in ("cmake", "g++") if shutil.which(tool) is None]
    if missing:
        return f"{' and '.join(missing)} not found: the emulator compiles the kernels"
    if os.uname().machine != "x86_64":
        return "the emulator's context switch is written for x86-64"
    return None


def _run(*command: str) -> None:
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)} failed:\n{done.stdout[-4000:]}{done.stderr[-4000:]}")


def build(target: str = "csat_emulated", directory: Path = BUILD_DIRECTORY) -> Path:
    """Configures, builds and returns the path of the shared library."""
    compiler = ["-G", "Ninja"] if shutil.which("ninja") else []
    switches = ["-DCSAT_EMULATE=ON", "-DCSAT_CUDA=OFF", "-DCMAKE_CXX_COMPILER=g++"]
    if not (directory / "CMakeCache.txt").exists():
        _run("cmake", "-S", str(ROOT), "-B", str(directory), *compiler, *switches)
    _run("cmake", "--build", str(directory), "--target", target, "--parallel", str(len(os.sched_getaffinity(0))))
    return directory / f"lib{target}.so"
