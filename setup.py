"""Builds csat_ext: `_C` (schemas, CPU kernels, Python bindings) and, with nvcc and a CUDA torch, `_cuda`.

Environment:
    CSAT_WITH_CUDA   0 | 1 | auto (default). 1 makes a missing CUDA toolkit or a CPU-only torch an error.
    CSAT_CUDA_ARCHS  architectures, default "80;90a"; PTX of the lowest is added, which later GPUs compile at load.
                     Without 90a a Hopper runs the kernels for Ampere's tensor cores.
    MAX_JOBS         upper bound of parallel compilers; lowered where memory (3 GiB a compiler) is short.
    CSAT_UNITY       1: the files that instantiate kernels are compiled three at a time, which is a fifth less work and
                     rebuilds more at a change; 0: one at a time. Default: 1 where at most 4 compilers run.

Everything else about the package stands in pyproject.toml.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

ROOT = Path(__file__).resolve().parent
DEFAULT_ARCHS = "80;90a"
GIB = 1 << 30
BYTES_PER_JOB = 3 * GIB
FEW_JOBS = 4  # more compilers than that want more files than a unity build has
UNITY_FILES = 3
# The oldest torch whose stable ABI the libraries use: 2.11.
STABLE_ABI = ["-DTORCH_TARGET_VERSION=0x020b000000000000"]
CXX_FLAGS = ["-O3", "-std=c++20", "-g0", "-fvisibility=hidden", "-fno-math-errno", *STABLE_ABI]


class BuildError(RuntimeError):
    """A build setting that cannot be honoured."""


def cuda_choice(setting: str, torch_cuda: str | None, cuda_home: str | None) -> tuple[bool, str]:
    """Whether `_cuda` is built, and the reason to tell the user when it is not ("" when there is nothing to tell)."""
    if setting not in ("0", "1", "auto"):
        raise BuildError(f"CSAT_WITH_CUDA must be 0, 1 or auto; got {setting!r}")
    if setting == "0":
        return False, ""
    missing = []
    if not torch_cuda:
        missing.append("the torch of this build has no CUDA")
    if not cuda_home:
        missing.append("no nvcc was found (CUDA_HOME is not set and nvcc is not on PATH)")
    if not missing:
        return True, ""
    reason = " and ".join(missing)
    if setting == "1":
        raise BuildError(f"CSAT_WITH_CUDA=1, but {reason}; install them, or set CSAT_WITH_CUDA=0 for the CPU kernels")
    return False, f"csat_ext: building the CPU kernels only, because {reason}"


def parse_archs(setting: str) -> list[str]:
    """Architectures such as ["80", "90a"] from "80;90a", in ascending order."""
    archs = [arch for arch in re.split(r"[;,\s]+", setting.strip()) if arch]
    wrong = [arch for arch in archs if not re.fullmatch(r"\d{2,3}[af]?", arch)]
    if wrong or not archs:
        raise BuildError(f"CSAT_CUDA_ARCHS must list architectures such as {DEFAULT_ARCHS!r}; got {setting!r}")
    return sorted(set(archs), key=lambda arch: (int(arch.rstrip("af")), arch))


def gencode_flags(archs: list[str]) -> list[str]:
    """nvcc flags: machine code of every architecture and PTX for later GPUs, all from one pass for the lowest.

    A pass for a higher one would have nothing to add but its time: what only Hopper has stands in files of its own, and
    PTX of sm_80 and sm_90 differ in how they widen a bfloat16, one instruction in both. PTX of an "a" or "f" target
    runs on no later GPU, so that here 90a counts as 90.
    """
    plain = sorted({int(arch.rstrip("af")) for arch in archs})
    code = ",".join(f"sm_{arch}" for arch in plain)
    return [f"-gencode=arch=compute_{plain[0]},code=[{code},compute_{plain[0]}]"]


def hopper_flags(archs: list[str]) -> list[str]:
    """The same of files with Hopper's instructions: machine code of sm_90a and no other. Without it they trap;
    nothing launches them, but the library's code names them."""
    return ["-gencode=arch=compute_90a,code=sm_90a"] if "90a" in archs else gencode_flags(archs)


def available_memory() -> int | None:
    """Bytes that can be allocated now, the control group's limit included; None where the system does not say."""
    limits = []
    try:
        text = Path("/proc/meminfo").read_text()
        limits.append(int(re.search(r"MemAvailable:\s+(\d+) kB", text)[1]) * 1024)  # type: ignore[index]
    except (OSError, TypeError):
        pass
    try:
        group = Path("/sys/fs/cgroup")
        limits.append(int((group / "memory.max").read_text()) - int((group / "memory.current").read_text()))
    except (OSError, ValueError):
        pass
    return min(limits, default=None)


def job_count(cpus: int, memory: int | None, user: str | None) -> int:
    """Parallel compilers: one per CPU, 3 GiB each, never more than MAX_JOBS says."""
    jobs = cpus
    if user is not None:
        if not user.isdigit() or int(user) < 1:
            raise BuildError(f"MAX_JOBS must be a positive integer; got {user!r}")
        jobs = int(user)
    if memory is not None:
        jobs = min(jobs, memory // BYTES_PER_JOB)
    return max(1, jobs)


def unity_choice(setting: str | None, jobs: str | None) -> bool:
    """Whether files of instances are compiled together, from CSAT_UNITY and the parallel compilers."""
    if setting not in (None, "0", "1"):
        raise BuildError(f"CSAT_UNITY must be 0 or 1; got {setting!r}")
    return setting == "1" if setting else jobs is not None and int(jobs) <= FEW_JOBS


def united(files: list[str], folder: Path) -> list[str]:
    """Files in `folder` that include a few of `files` each: half of what one that instantiates kernels costs is reading
    the headers. The largest (forward_*) come first, so that compilers end together."""
    ordered = sorted(files, reverse=True)
    groups = [ordered[i : i + UNITY_FILES] for i in range(0, len(ordered), UNITY_FILES)]
    together = [folder / f"instances_{number:02}.cu" for number in range(len(groups))]
    for path, group in zip(together, groups, strict=True):
        write_changed(path, "".join(f'#include "{ROOT / file}"\n' for file in group))
    return [os.path.relpath(path, ROOT) for path in together]


def package_version() -> str:
    return re.search(r'^version = "([^"]+)"', (ROOT / "pyproject.toml").read_text(), re.MULTILINE)[1]  # type: ignore[index]


def git_revision() -> str:
    """Short commit hash, "" outside a checkout of this project."""
    if not (ROOT / ".git").exists():
        return ""
    command = ["git", "-C", str(ROOT), "rev-parse", "--short=12", "HEAD"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return ""


def build_facts(version: str, revision: str) -> str:
    """The header of library.cpp. Not macros on the command line: there every commit would compile every file anew."""
    return f'#define CSAT_VERSION "{version}"\n#define CSAT_REVISION "{revision}"\n'


def write_changed(path: Path, text: str) -> None:
    """Leaves a file alone that says so already: ninja goes by the time of the last change."""
    if path.is_file() and path.read_text() == text:
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


def cublas_of_wheel(torch_file: str, torch_cuda: str) -> tuple[list[str], list[str], list[str]]:
    """(include, library dirs, link flags) of the cuBLAS that torch brought; the toolkit's own where there is none."""
    major = torch_cuda.split(".")[0]
    home = Path(torch_file).parents[1] / "nvidia" / f"cu{major}"
    if (home / "lib" / f"libcublas.so.{major}").exists():
        return [str(home / "include")], [str(home / "lib")], [f"-l:libcublas.so.{major}"]
    return [], [], ["-lcublas"]


def toolkit_of(dryrun: str) -> str | None:
    """The toolkit's folder from what `nvcc --dryrun` prints: "#$ TOP=/usr/local/cuda/bin/.."."""
    found = re.search(r"^#\$ TOP=(.+)$", dryrun, re.MULTILINE)
    return os.path.realpath(found[1].strip()) if found else None


def find_toolkit(environment: Mapping[str, str]) -> str | None:
    """CUDA_HOME where the user set none: asked of nvcc itself, which may be a wrapper or a link elsewhere."""
    nvcc = shutil.which("nvcc", path=environment.get("PATH"))
    if environment.get("CUDA_HOME") or environment.get("CUDA_PATH") or nvcc is None:
        return None
    command = [nvcc, "--dryrun", "-c", "-x", "cu", os.devnull, "-o", os.devnull]
    try:
        return toolkit_of(subprocess.run(command, capture_output=True, text=True, check=True, timeout=60).stderr)
    except (OSError, subprocess.SubprocessError):
        return None


def sources(*patterns: str) -> list[str]:
    return sorted(str(path.relative_to(ROOT)) for pattern in patterns for path in ROOT.glob(pattern))


def extensions(environment: Mapping[str, str]) -> list:
    import pybind11
    import torch
    from torch.utils.cpp_extension import CUDA_HOME, CppExtension, CUDAExtension

    include = [str(ROOT / "csrc")]
    built = [
        CppExtension(
            "csat_ext._C",
            sources("csrc/torch/library.cpp", "csrc/torch/cpu/*.cpp", "csrc/kernels/limits.cpp"),
            # before torch's own copy of pybind11, which refuses the stable ABI in torch 2.11
            include_dirs=[pybind11.get_include(), *include],
            extra_compile_args={"cxx": CXX_FLAGS},
            extra_link_args=["-s"],
        )
    ]
    with_cuda, message = cuda_choice(environment.get("CSAT_WITH_CUDA", "auto"), torch.version.cuda, CUDA_HOME)
    if message:
        print(message, file=sys.stderr)
    if with_cuda:
        archs = parse_archs(environment.get("CSAT_CUDA_ARCHS", DEFAULT_ARCHS))
        if "90" in archs and "90a" not in archs:
            print("csat_ext: warpgroup products of Hopper need 90a beside or in place of 90", file=sys.stderr)
        cublas_include, cublas_dirs, cublas_link = cublas_of_wheel(torch.__file__, torch.version.cuda)
        hopper = sources("csrc/kernels/instances/*_wgmma_*.cu")
        instances = sorted(set(sources("csrc/kernels/instances/*.cu")) - set(hopper))
        if unity_choice(environment.get("CSAT_UNITY"), environment.get("MAX_JOBS")):
            instances = united(instances, ROOT / "build" / "unity")
            hopper = united(hopper, ROOT / "build" / "unity" / "hopper")
        nvcc_flags = ["-O3", "-std=c++20", "-DNDEBUG", *STABLE_ABI, "-Xcompiler=-fvisibility=hidden"]
        nvcc_flags += ["--expt-relaxed-constexpr"]  # limits.h is constexpr on both sides
        cuda = CUDAExtension(
            "csat_ext._cuda",
            [*instances, *sources("csrc/kernels/*.cu", "csrc/kernels/*.cpp", "csrc/torch/ops_cuda.cpp")],
            include_dirs=[*include, *cublas_include],
            library_dirs=cublas_dirs,
            # USE_CUDA declares the CUDA part of torch's stable shims.
            define_macros=[("USE_CUDA", "1"), ("CSAT_CUDA_ARCHS", ".".join(archs))],
            extra_compile_args={"cxx": CXX_FLAGS, "nvcc": [*nvcc_flags, *gencode_flags(archs)]},
            extra_link_args=["-s", *cublas_link],
        )
        cuda.hopper = (hopper, {"cxx": CXX_FLAGS, "nvcc": [*nvcc_flags, *hopper_flags(archs)]})
        built.append(cuda)
    return built


def main() -> None:
    if toolkit := find_toolkit(os.environ):
        os.environ["CUDA_HOME"] = toolkit  # read by torch.utils.cpp_extension when it is imported
    from setuptools import setup
    from torch.utils.cpp_extension import BuildExtension

    class BuildLibraries(BuildExtension):
        """Tells library.cpp what it is built from; leaves no library of an earlier build in build/lib, from where it
        would get into the wheel."""

        def build_extensions(self) -> None:
            generated = Path(self.build_temp, "generated").resolve()
            write_changed(generated / "csat_build_facts.h", build_facts(package_version(), git_revision()))
            next(e for e in self.extensions if e.name == "csat_ext._C").include_dirs.append(str(generated))
            super().build_extensions()

        def build_extension(self, extension) -> None:
            """Torch's builder has one set of nvcc flags a library: files of Hopper's go by themselves."""
            files, flags = getattr(extension, "hopper", ([], None))
            if files:
                shared = {"macros": extension.define_macros, "include_dirs": extension.include_dirs}
                made = self.compiler.compile(files, output_dir=self.build_temp, extra_postargs=flags, **shared)
                extension.extra_objects += made
            super().build_extension(extension)

        def run(self) -> None:
            super().run()
            built = {Path(output).name for output in self.get_outputs()}
            for library in Path(self.build_lib, "csat_ext").glob("*.so"):
                if library.name not in built:
                    library.unlink()

    cpus = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    os.environ["MAX_JOBS"] = str(job_count(cpus, available_memory(), os.environ.get("MAX_JOBS")))
    setup(ext_modules=extensions(os.environ), cmdclass={"build_ext": BuildLibraries})


if __name__ == "__main__":
    main()
