"""Times calls: in turns, with rotated inputs, by torch.utils.benchmark on CPU, by events and graph replay on CUDA.

What is timed takes turns (round 1 of every case, round 2 of every case, ..), so that what disturbs the machine disturbs
all of them. A round goes once over several sets of equal inputs, together larger than the last-level cache: each call
finds its inputs in memory, not in the cache.
"""

from __future__ import annotations

import os
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch

Call = Callable[[], Any]
COLD = 2.0
"""Inputs of a round over the last-level cache."""
MOST_SETS = 64
_UNKNOWN_CACHE = 32 << 20


@dataclass(frozen=True)
class Timing:
    """Seconds of one call, one sample for every turn."""

    samples: tuple[float, ...]

    @property
    def median(self) -> float:
        return statistics.median(self.samples)

    @property
    def spread(self) -> float:
        """Third quartile less the first; 0 of a single sample."""
        if len(self.samples) < 2:
            return 0.0
        first, _, third = statistics.quantiles(self.samples, n=4, method="inclusive")
        return third - first


class Clock(Protocol):
    """What times on one kind of device."""

    def prepare(self, call: Call) -> tuple[Call, str]:
        """The call, warmed up, as it is to be repeated, and by what it is timed."""

    def seconds(self, calls: Sequence[Call]) -> float:
        """Seconds of one call, on average over one round of all of them."""

    def peak_bytes(self, call: Call) -> int:
        """Most bytes of tensors that the call has in memory at once, beyond those that were there before."""


class CPUClock:
    """Wall clock of torch.utils.benchmark, with the threads that torch has."""

    def __init__(self, seconds_per_turn: float = 0.05) -> None:
        self.seconds_per_turn = seconds_per_turn

    def prepare(self, call: Call) -> tuple[Call, str]:
        call()
        return call, "torch.utils.benchmark"

    def seconds(self, calls: Sequence[Call]) -> float:
        from torch.utils.benchmark import Timer

        timer = Timer("for call in calls: call()", globals={"calls": calls}, num_threads=torch.get_num_threads())
        return timer.blocked_autorange(min_run_time=self.seconds_per_turn).median / len(calls)

    def peak_bytes(self, call: Call) -> int:
        os.environ.setdefault("KINETO_LOG_LEVEL", "9")  # the profiler speaks of itself on stderr
        from torch.profiler import ProfilerActivity, profile

        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
            kept = call()
        del kept
        events = [e for e in recorded.profiler.kineto_results.events() if e.name() == "[memory]"]
        held = most = 0
        for event in sorted(events, key=lambda e: e.start_ns()):
            held += event.nbytes()
            most = max(most, held)
        return most


class CUDAClock:
    """CUDA events around replays of a graph; around the launches themselves where a call cannot be captured."""

    def __init__(self, rounds_per_turn: int = 5) -> None:
        self.rounds_per_turn = rounds_per_turn

    def prepare(self, call: Call) -> tuple[Call, str]:
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(3):
                call()
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(graph):
                call()
        except RuntimeError:  # the call waits for the device, or its backward belongs to another stream
            torch.cuda.synchronize()
            return call, "cuda events"
        return _Replay(graph, call), "cuda graph"

    def seconds(self, calls: Sequence[Call]) -> float:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        for call in calls:  # the clock of the device goes up before it is read
            call()
        start.record()
        for _ in range(self.rounds_per_turn):
            for call in calls:
                call()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / 1e3 / self.rounds_per_turn / len(calls)

    def peak_bytes(self, call: Call) -> int:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        kept = call()
        torch.cuda.synchronize()
        del kept
        return torch.cuda.max_memory_allocated() - before


@dataclass(frozen=True)
class _Replay:
    """Replays a graph, and keeps the call: the graph reads the tensors that it holds, where they were."""

    graph: torch.cuda.CUDAGraph
    call: Call

    def __call__(self) -> None:
        self.graph.replay()


def clock_for(device: torch.device, *, quick: bool = False) -> Clock:
    """The clock of a device: "cpu" or "cuda".

    Raises:
        ValueError: any other device.
    """
    if device.type == "cpu":
        return CPUClock(0.01 if quick else 0.05)
    if device.type == "cuda":
        return CUDAClock()
    raise ValueError(f"device: {device} came; cpu and cuda can be timed")


def measure(cases: Mapping[str, Sequence[Call]], clock: Clock, turns: int) -> dict[str, Timing]:
    """Timing of every case, a sequence of prepared calls on rotated inputs; the cases take turns."""
    if turns < 1:
        raise ValueError(f"turns: {turns} came, at least 1 is accepted")
    samples: dict[str, list[float]] = {name: [] for name in cases}
    for _ in range(turns):
        for name, calls in cases.items():
            samples[name].append(clock.seconds(calls))
    return {name: Timing(tuple(values)) for name, values in samples.items()}


def cache_bytes(device: torch.device) -> int:
    """Last-level cache: L2 of a GPU, the largest of core 0 on CPU; 32 MiB where the system does not say."""
    if device.type == "cuda":
        return int(torch.cuda.get_device_properties(device).L2_cache_size)
    sizes = [path.read_text().strip() for path in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size")]
    units = {"K": 1 << 10, "M": 1 << 20}
    return max((int(s[:-1]) * units[s[-1]] for s in sizes if s[-1:] in units), default=_UNKNOWN_CACHE)


def rotations(bytes_of_one: int, cache: int, most: int = MOST_SETS) -> int:
    """How many sets of inputs make a round cold; `most` at most: some processors have hundreds of MiB of cache."""
    return max(2, min(most, -(-int(COLD * cache) // max(bytes_of_one, 1))))
