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


def csat(
    *arguments: str | Path, ranks: int = 1, before: Callable[[], None] | None = None, timeout: float = 240
) -> tuple[int, str]:
    """Exit code (the first that is not 0) and everything printed by `csat ARGUMENTS` on that many ranks.

    before: a function at the top of a module, called in every process first.
    """
    environments: list[dict[str, str]] = [{}]
    if ranks > 1:
        place = {"WORLD_SIZE": str(ranks), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(_free_port())}
        environments = [{**place, "RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(ranks)]
    with tempfile.NamedTemporaryFile("r") as screen:
        words = [str(word) for word in arguments]
        processes = [server().Process(target=_main, args=(words, e, screen.name, before)) for e in environments]
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


def _main(arguments: list[str], environment: dict[str, str], screen: str, before: Callable[[], None] | None) -> None:
    from csat_ext import cli

    os.environ.update(environment)
    descriptor = os.open(screen, os.O_WRONLY | os.O_APPEND)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    sys.argv = ["csat", *arguments]
    if before is not None:
        before()
    cli.main()
