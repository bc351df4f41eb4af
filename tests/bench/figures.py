"""What a measurement gives: both sides of a comparison, taken in one run."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True)
class Figure:
    """One row of the table. `ours` and `theirs` have the same `unit`; `goal` is the ratio ours / theirs to reach, as text."""

    what: str
    ours: float
    theirs: float | None
    unit: str
    against: str
    goal: str

    @property
    def ratio(self) -> float | None:
        """ours / theirs, where there is another side."""
        return None if not self.theirs else self.ours / self.theirs


def seconds(work: Callable[[], object]) -> float:
    """Wall time of one call."""
    begin = time.perf_counter()
    work()
    return time.perf_counter() - begin


def paired(ours: Callable[[], object], theirs: Callable[[], object], runs: int = 5) -> tuple[float, float]:
    """Median seconds of both, run in turn after one warm-up each, so that a drifting machine meets both alike."""
    ours()
    theirs()
    pairs = [(seconds(ours), seconds(theirs)) for _ in range(runs)]
    return statistics.median(pair[0] for pair in pairs), statistics.median(pair[1] for pair in pairs)
