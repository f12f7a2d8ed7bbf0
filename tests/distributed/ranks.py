"""Processes of one gloo group that stay up and run functions together: starting them costs more than most tests.

A plugin of the test files here (``pytest_plugins = ["ranks"]``), whose fixtures share the processes.
"""

from __future__ import annotations

import os
import tempfile
import traceback
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection, wait
from typing import Any

import forked
import pytest
import torch
import torch.distributed as dist


class Ranks:
    """``run(function, *args)`` calls a module-level function on every rank and returns the list of its results.

    An exception on any rank is raised here with its traceback, and the processes, which may wait for each other, end.
    """

    def __init__(self, count: int) -> None:
        self.count = count
        self._processes: list[Any] = []
        self._pipes: list[Connection] = []

    def run(self, function: Callable[..., Any], *args: Any, timeout: float = 120) -> list[Any]:
        if not self._processes:
            self._start()
        for pipe in self._pipes:
            pipe.send((function, args))
        results: dict[int, Any] = {}
        while len(results) < self.count:
            waiting = {pipe: rank for rank, pipe in enumerate(self._pipes) if rank not in results}
            ready = wait(list(waiting), timeout)
            if not ready:
                self.stop()
                raise TimeoutError(f"ranks {sorted(waiting.values())} did not answer in {timeout} s")
            for pipe in ready:
                assert isinstance(pipe, Connection)
                try:
                    failed, result = pipe.recv()
                except EOFError:
                    failed, result = True, "the process died"
                if failed:
                    self.stop()
                    raise AssertionError(f"rank {waiting[pipe]} of {self.count}:\n{result}")
                results[waiting[pipe]] = result
        return [results[rank] for rank in range(self.count)]

    def stop(self) -> None:
        for process in self._processes:
            process.kill()
            process.join()
        self._processes, self._pipes = [], []

    def _start(self) -> None:
        context = forked.server()
        rendezvous = tempfile.mkstemp()[1]
        for rank in range(self.count):
            here, there = context.Pipe()
            process = context.Process(target=_serve, args=(there, rank, self.count, rendezvous), daemon=True)
            process.start()
            self._processes.append(process)
            self._pipes.append(here)


def _serve(pipe: Connection, rank: int, count: int, rendezvous: str) -> None:
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(count)}
    os.environ |= {"DS_ACCELERATOR": "cpu", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{rendezvous}", rank=rank, world_size=count)
    while True:
        function, args = pipe.recv()
        try:
            torch.manual_seed(0)
            answer = (False, function(*args))
        except BaseException:
            answer = (True, traceback.format_exc())
        pipe.send(answer)


def _shared(count: int) -> Iterator[Ranks]:
    ranks = Ranks(count)
    yield ranks
    ranks.stop()


@pytest.fixture(scope="session")
def two() -> Iterator[Ranks]:
    yield from _shared(2)


@pytest.fixture(scope="session")
def four() -> Iterator[Ranks]:
    yield from _shared(4)


@pytest.fixture(params=["two", "four"])
def ranks(request: pytest.FixtureRequest) -> Ranks:
    return request.getfixturevalue(request.param)
