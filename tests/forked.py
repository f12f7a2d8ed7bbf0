"""Processes that tests start many of, without the seven seconds of importing torch and DeepSpeed: forks of a server
that has them. A fork has its own memory, environment, exit code and death; tests of what only a fresh interpreter shows
start one.
"""

from __future__ import annotations

import os
import socket
import sys
import tempfile
import time
from collections.abc import Callable
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any

import torch.multiprocessing as mp

_IMPORTED = ("csat_ext.pretrain.train", "torch._dynamo", "deepspeed.runtime.zero.muon.muon_optimizer")


def server() -> Any:
    """The multiprocessing context whose processes are forks of the server, which starts with the first of them."""
    context = mp.get_context("forkserver")
    context.set_forkserver_preload(list(_IMPORTED))
    return context


def csat(*arguments: str | Path, before: Callable[[], None] | None = None, **options: Any) -> tuple[int, str]:
    """`run` of `csat ARGUMENTS`; of a function at the top of a module first."""
    return run(_csat, [str(word) for word in arguments], before, **options)


def run(function: Callable[..., Any], *arguments: Any, ranks: int = 1, timeout: float = 240) -> tuple[int, str]:
    """Exit code (of the first that fails, 0 if none) and everything printed where that many processes, which find what
    torchrun tells them, each call a function at the top of a module."""
    environments: list[dict[str, str]] = [{}]
    if ranks > 1:
        place = {"WORLD_SIZE": str(ranks), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(_free_port())}
        environments = [{**place, "RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(ranks)]
    with tempfile.NamedTemporaryFile("r") as screen:
        calls = [(environment, screen.name, function, arguments) for environment in environments]
        processes = [server().Process(target=_call, args=call) for call in calls]
        for process in processes:
            process.start()
        codes = _exit_codes(processes, timeout)
        printed = screen.read()
    failed = next((code for code in codes if code), 0)
    assert failed or None not in codes, f"not at an end after {timeout} s\n{printed}"
    return failed, printed


def _exit_codes(processes: list[Any], timeout: float) -> list[int | None]:
    """Waits for all, or for the first that fails, and kills those that still run: their code is None."""
    end = time.monotonic() + timeout
    while (left := end - time.monotonic()) > 0:
        running = [process.sentinel for process in processes if process.exitcode is None]
        if not running or any(process.exitcode for process in processes):
            break
        wait(running, left)
    codes = [process.exitcode for process in processes]
    for process in processes:
        process.kill()
        process.join()
    return codes


def _free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


def _call(environment: dict[str, str], screen: str, function: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
    os.environ.update(environment)
    descriptor = os.open(screen, os.O_WRONLY | os.O_APPEND)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    function(*arguments)


def _csat(arguments: list[str], before: Callable[[], None] | None) -> None:
    from csat_ext import cli

    sys.argv = ["csat", *arguments]
    if before is not None:
        before()
    cli.main()
