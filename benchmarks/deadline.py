"""Seconds left of those that a run may take."""

from __future__ import annotations

import time


class Deadline:
    """Seconds left of those that the run may take."""

    def __init__(self, seconds: float) -> None:
        self._end = time.monotonic() + seconds

    def left(self) -> float:
        return max(self._end - time.monotonic(), 0.0)
