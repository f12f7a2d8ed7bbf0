"""The decisions of setup.py (what is built, for which GPUs, with how many compilers), and `python -m csat_ext info`."""

from __future__ import annotations

import importlib.util
import os
import runpy
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch.utils.cpp_extension

SETUP = Path(__file__).resolve().parents[1] / "setup.py"


@pytest.fixture(scope="module")
def build() -> ModuleType:
    specification = importlib.util.spec_from_file_location("csat_setup", SETUP)
    assert specification is not None and specification.loader is not None
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    return module


def test_cuda_is_built_where_torch_and_nvcc_have_it(build: ModuleType) -> None:
    assert build.cuda_choice("auto", "13.0", "/cuda") == (True, "")
    assert build.cuda_choice("1", "13.0", "/cuda") == (True, "")
    assert build.cuda_choice("0", "13.0", "/cuda") == (False, "")


@pytest.mark.parametrize(
    ("torch_cuda", "home", "reason"),
    [(None, "/cuda", "has no CUDA"), ("13.0", None, "no nvcc"), (None, None, "has no CUDA and no nvcc")],
)
def test_missing_cuda_is_one_message_or_an_error(
    build: ModuleType, torch_cuda: str | None, home: str | None, reason: str
) -> None:
    with_cuda, message = build.cuda_choice("auto", torch_cuda, home)
    assert not with_cuda and reason in message and "\n" not in message
    with pytest.raises(build.BuildError, match=f"CSAT_WITH_CUDA=1, but .*{reason}"):
        build.cuda_choice("1", torch_cuda, home)
    assert build.cuda_choice("0", torch_cuda, home) == (False, "")


@pytest.mark.parametrize("setting", ["", "yes", "2", "AUTO"])
def test_unknown_cuda_setting(build: ModuleType, setting: str) -> None:
    with pytest.raises(build.BuildError, match="CSAT_WITH_CUDA must be 0, 1 or auto"):
        build.cuda_choice(setting, "13.0", "/cuda")


def test_architectures(build: ModuleType) -> None:
    assert build.parse_archs(build.DEFAULT_ARCHS) == ["80", "90a"]
    assert build.parse_archs("100 80, 90a;80") == ["80", "90a", "100"]
    for wrong in ("", "8.0", "sm_80", "80;native"):
        with pytest.raises(build.BuildError, match="CSAT_CUDA_ARCHS must list"):
            build.parse_archs(wrong)


def test_machine_code_for_each_architecture_and_ptx_for_later_ones(build: ModuleType) -> None:
    assert build.gencode_flags(["80", "90a"]) == ["-gencode=arch=compute_80,code=[sm_80,sm_90,compute_80]"]
    assert build.gencode_flags(["90a", "100", "120f"]) == [
        "-gencode=arch=compute_90,code=[sm_90,sm_100,sm_120,compute_90]"
    ]
    assert build.gencode_flags(["90", "90a"]) == ["-gencode=arch=compute_90,code=[sm_90,compute_90]"]
    assert build.hopper_flags(["80", "90a"]) == ["-gencode=arch=compute_90a,code=sm_90a"]
    assert build.hopper_flags(["80", "90"]) == build.gencode_flags(["80", "90"])


def test_a_commit_changes_no_flag(build: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    """ninja and ccache compile anew what has other flags: the revision may reach library.cpp alone, in a header."""
    monkeypatch.setattr(torch.utils.cpp_extension, "CUDA_HOME", "/cuda")
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    flags = []
    for revision in ("0123456789ab", "fedcba987654"):
        monkeypatch.setattr(build, "git_revision", lambda revision=revision: revision)
        flags.append([vars(library) for library in build.extensions({"CSAT_WITH_CUDA": "1"})])
        assert revision not in repr(flags) and len(flags[-1]) == 2
        assert f'CSAT_REVISION "{revision}"' in build.build_facts("1", revision)
    assert flags[0] == flags[1]
    readers = [path for path in (SETUP.parent / "csrc").rglob("*.*") if "csat_build_facts" in path.read_text()]
    assert [path.name for path in readers] == ["library.cpp"]


def test_few_compilers_get_files_of_instances_together(build: ModuleType, tmp_path: Path) -> None:
    assert [build.unity_choice(None, jobs) for jobs in ("2", "4", "5", None)] == [True, True, False, False]
    assert build.unity_choice("1", "64") and not build.unity_choice("0", "1")
    with pytest.raises(build.BuildError, match="CSAT_UNITY must be 0 or 1; got 'on'"):
        build.unity_choice("on", "2")

    files = build.sources("csrc/kernels/instances/*.cu")
    included: list[str] = []
    for file in build.united(files, tmp_path):
        lines = (build.ROOT / file).read_text().splitlines()
        assert 1 <= len(lines) <= build.UNITY_FILES
        included += [str(Path(line.split('"')[1]).relative_to(build.ROOT)) for line in lines]
    assert sorted(included) == files


def test_a_file_that_stays_as_it_is_is_not_written(build: ModuleType, tmp_path: Path) -> None:
    header = tmp_path / "new" / "facts.h"
    build.write_changed(header, "1")
    os.utime(header, (1, 1))
    build.write_changed(header, "1")
    assert header.stat().st_mtime == 1
    build.write_changed(header, "2")
    assert header.stat().st_mtime > 1 and header.read_text() == "2"


def test_generated_kernel_files_are_those_of_the_tables() -> None:
    folder = SETUP.parent / "csrc" / "kernels" / "instances"
    files = runpy.run_path(str(folder / "generate.py"))["files"]()
    assert {path.name: path.read_text() for path in folder.glob("*.cu")} == files


def test_parallel_compilers_fit_memory_and_the_users_bound(build: ModuleType) -> None:
    gib = build.GIB
    assert build.job_count(16, 100 * gib, None) == 16
    assert build.job_count(16, 10 * gib, None) == 3
    assert build.job_count(16, 100 * gib, "4") == 4
    assert build.job_count(2, 100 * gib, "4") == 4
    assert build.job_count(16, 7 * gib, "4") == 2
    assert build.job_count(16, gib, None) == 1
    assert build.job_count(16, None, None) == 16
    for wrong in ("0", "-1", "many", ""):
        with pytest.raises(build.BuildError, match="MAX_JOBS must be a positive integer"):
            build.job_count(16, None, wrong)


def test_memory_is_known_here(build: ModuleType) -> None:
    memory = build.available_memory()
    assert memory is None or 0 < memory < 1 << 50


def test_cublas_comes_from_torchs_wheel(build: ModuleType, tmp_path: Path) -> None:
    torch_file = str(tmp_path / "torch" / "__init__.py")
    assert build.cublas_of_wheel(torch_file, "13.0") == ([], [], ["-lcublas"])
    library = tmp_path / "nvidia" / "cu13" / "lib" / "libcublas.so.13"
    library.parent.mkdir(parents=True)
    library.touch()
    include, directories, link = build.cublas_of_wheel(torch_file, "13.0")
    assert include == [str(tmp_path / "nvidia/cu13/include")] and directories == [str(library.parent)]
    assert link == ["-l:libcublas.so.13"]


def test_the_toolkit_is_asked_of_nvcc_itself(build: ModuleType, tmp_path: Path) -> None:
    """An nvcc on PATH may be a wrapper script: its own folder says nothing about the toolkit."""
    assert build.toolkit_of("#$ _SPACE_= \n#$ TOP=/opt/cuda/bin/..\n#$ X=1\n") == "/opt/cuda"
    assert build.toolkit_of("nvcc fatal: no input") is None
    assert build.find_toolkit({"PATH": str(tmp_path)}) is None
    wrapper = tmp_path / "nvcc"
    wrapper.write_text("#!/bin/sh\necho '#$ TOP=/opt/other' >&2\n")
    wrapper.chmod(0o755)
    assert build.find_toolkit({"PATH": str(tmp_path)}) == "/opt/other"
    assert build.find_toolkit({"PATH": str(tmp_path), "CUDA_HOME": "/opt/mine"}) is None


def test_one_version(build: ModuleType) -> None:
    import csat_ext
    from csat_ext import _C

    assert build.package_version() == csat_ext.__version__ == _C.build_info()["version"]


def test_info_says_which_backend_runs_and_why() -> None:
    command = [sys.executable, "-m", "csat_ext", "info"]
    text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    facts = dict(line.split("  ", 1) for line in text.splitlines())
    assert "C++ kernels" in facts["cpu tensors"]
    assert {"csat_ext", "torch", "python", "dtypes", "cuda build", "devices", "cuda tensors"} <= facts.keys()
    assert "torch" in facts["cuda tensors"] or "CUDA kernels" in facts["cuda tensors"]
    wrong = subprocess.run([*command[:3], "inform"], capture_output=True, text=True)
    assert wrong.returncode == 1 and "usage: python -m csat_ext info" in wrong.stderr


def test_import_makes_no_cuda_context() -> None:
    code = "import csat_ext.ops, torch; assert not torch.cuda.is_initialized()"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_missing_library_says_how_to_build(tmp_path: Path) -> None:
    import csat_ext

    package = tmp_path / "csat_ext"
    package.mkdir()
    for module in Path(csat_ext.__file__).parent.glob("*.py"):
        (package / module.name).write_text(module.read_text())
    result = subprocess.run(
        [sys.executable, "-c", "import csat_ext.ops"], cwd=tmp_path, capture_output=True, text=True, env={"PATH": ""}
    )
    assert result.returncode == 1 and "pip install ." in result.stderr and "csat_ext._C" in result.stderr
