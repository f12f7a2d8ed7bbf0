"""Builds the emulated library with CMake (tests/emulator/CMakeLists.txt), which recompiles only what has changed."""

from __future__ import annotations

import fcntl
import functools
import os
import shutil
import subprocess
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
# CSAT_EMULATED_BUILD: a CMake build of this checkout with -DCSAT_EMULATE=ON that is there already.
BUILD_DIRECTORY = Path(os.environ.get("CSAT_EMULATED_BUILD", ROOT / "build" / "emulated"))


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


@functools.cache
def build(target: str = "csat_emulated", directory: Path = BUILD_DIRECTORY) -> Path:
    """Configures, builds and returns the path of the library, once a process; those that come at once wait for each
    other."""
    directory.mkdir(parents=True, exist_ok=True)
    cores = len(os.sched_getaffinity(0))
    with open(directory / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not (directory / "CMakeCache.txt").exists():
            generator = ["-G", "Ninja"] if shutil.which("ninja") else []
            switches = ["-DCSAT_EMULATE=ON", "-DCSAT_CUDA=OFF", "-DCMAKE_CXX_COMPILER=g++"]
            switches.append(f"-DCSAT_UNITY={'ON' if cores <= 4 else 'OFF'}")  # as in setup.py
            _run("cmake", "-S", str(ROOT), "-B", str(directory), *generator, *switches)
        _run("cmake", "--build", str(directory), "--target", target, "--parallel", str(cores))
    return directory / f"lib{target}.so"
