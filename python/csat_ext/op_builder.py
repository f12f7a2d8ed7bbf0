"""`CSATAttentionBuilder`: hands DeepSpeed the compiled library, and makes DeepSpeed know that it can.

Importing this module imports neither DeepSpeed nor the library; `csat_ext.deepspeed` registers when it is imported.
"""

from __future__ import annotations

import importlib
import importlib.util
import subprocess
import sys
from pathlib import Path
from typing import Any

BUILDER = "CSATAttentionBuilder"
LIBRARY = "csat_ext._C"
OP_NAME = "csat_attention"

_CHECKOUT = Path(__file__).resolve().parents[2]


def register() -> None:
    """Makes DeepSpeed know `CSATAttentionBuilder`: `create_op_builder`, `deepspeed.ops.op_builder` and `ds_report`.

    DeepSpeed has no entry point for third parties: a CUDA accelerator looks names up in a class dictionary, the
    CPU one in a chain of ifs, which is wrapped. Idempotent.
    """
    import deepspeed.ops.op_builder as op_builder
    from deepspeed.accelerator import get_accelerator
    from deepspeed.git_version_info import installed_ops
    from deepspeed.ops.op_builder.all_ops import ALL_OPS

    accelerator = get_accelerator()
    if accelerator.get_op_builder(BUILDER) is None or getattr(op_builder, BUILDER, None) is None:
        builder = _builder_class()
        if hasattr(accelerator, "class_dict"):
            accelerator._lazy_init_class_dict()
            accelerator.class_dict[BUILDER] = builder
        else:
            known = accelerator.get_op_builder
            accelerator.get_op_builder = lambda name: builder if name == BUILDER else known(name)
        setattr(op_builder, BUILDER, builder)
        ALL_OPS[builder.NAME] = builder()
        installed_ops[builder.NAME] = is_built()


def is_built() -> bool:
    """Whether the compiled library is there; one that is there but does not load raises its own error when loaded."""
    return importlib.util.find_spec(LIBRARY) is not None


def load() -> Any:
    """The compiled library: the installed one, or, in a checkout that was never built, one that is built now.

    The build is the project's own (`setup.py build_ext --inplace`); of several processes one builds, the others wait.

    Raises:
        ImportError: not built and not in a checkout; the build failed (with the compiler's last lines); or the library
            is there and does not load.
    """
    if not is_built():
        if not (_CHECKOUT / "setup.py").is_file():
            raise ImportError(f"{LIBRARY} is not built and its sources are not here: reinstall csat_ext")
        _build_in_place()
    importlib.import_module("csat_ext.ops")  # what compilers and autograd know of the operators
    return importlib.import_module(LIBRARY)


def _build_in_place() -> None:
    from torch.utils.file_baton import FileBaton

    folder = _CHECKOUT / "build"
    folder.mkdir(exist_ok=True)
    baton = FileBaton(str(folder / "op_builder.lock"))
    if not baton.try_acquire():
        baton.wait()
    else:
        try:
            command = [sys.executable, "setup.py", "build_ext", "--inplace"]
            done = subprocess.run(command, cwd=_CHECKOUT, capture_output=True, text=True)
        finally:
            baton.release()
        if done.returncode:
            last = "\n".join((done.stdout + done.stderr).strip().splitlines()[-20:])
            raise ImportError(f"{LIBRARY} could not be built in {_CHECKOUT}:\n{last}")
    importlib.invalidate_caches()
    if not is_built():
        raise ImportError(f"{LIBRARY} was not built by the process that tried: see its error")


def _builder_class() -> Any:
    from deepspeed.ops.op_builder.builder import OpBuilder

    class CSATAttentionBuilder(OpBuilder):
        """DeepSpeed's view of the library."""

        BUILD_VAR = "DS_BUILD_CSAT_ATTENTION"
        NAME = OP_NAME

        def __init__(self, name: str = NAME) -> None:
            super().__init__(name=name)

        def absolute_name(self) -> str:
            return LIBRARY

        def sources(self) -> list[str]:
            return sorted(str(path) for path in (_CHECKOUT / "csrc" / "torch").rglob("*.cpp"))

        def is_compatible(self, verbose: bool = False) -> bool:
            return is_built() or bool(self.sources())

        def load(self, verbose: bool = True) -> Any:
            # The stock load() compares recorded torch versions; the stable ABI makes that comparison wrong.
            return load()

    return CSATAttentionBuilder
