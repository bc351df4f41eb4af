"""Peak memory of a whole enclave, all its processes, over a session of many parties; and what a second worker brings.

Memory is the sum of PSS (proportional set sizes), so that what processes share counts once. It must not grow with rows.
Two workers are held against two processes that only spin, in the same run: what this machine's second core is worth.
"""

from __future__ import annotations

import multiprocessing
import tempfile
import threading
import time
from collections.abc import Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from figures import Figure

from support.enclave import Rows, Run, Simulation, agreement_of, identities, released

PARTIES = (17, 50)
ROWS_PER_UNIT = 8
SAMPLE_S = 0.02
SPINS = 20_000_000


class Watch:
    """Samples the PSS of a process and its children, in bytes, until `stop`."""

    def __init__(self, simulation: Simulation) -> None:
        self.peak = 0
        self._simulation = simulation
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def stop(self) -> int:
        """The peak."""
        self._ended.set()
        self._thread.join()
        return self.peak

    def _run(self) -> None:
        assert self._simulation.process is not None
        while not self._ended.wait(SAMPLE_S):
            pids = [self._simulation.process.pid, *self._simulation.worker_pids()]
            self.peak = max(self.peak, sum(pss(pid) for pid in pids))


def pss(pid: int) -> int:
    """Proportional set size of a process in bytes; 0 once it is gone."""
    try:
        rollup = Path(f"/proc/{pid}/smaps_rollup").read_text()
    except OSError:
        return 0
    return next(int(line.split()[1]) * 1024 for line in rollup.splitlines() if line.startswith("Pss:"))


def rows_of(seed: int, count: int) -> Rows:
    """Rows of units that have eight rows each, with keys as a hash spreads them."""
    random = np.random.default_rng(seed)
    units = random.integers(1, 2**64 - 1, max(count // ROWS_PER_UNIT, 1), dtype="<u8")
    count = len(units) * ROWS_PER_UNIT
    return Rows(
        keys=np.sort(np.repeat(units, ROWS_PER_UNIT)),
        amount=random.integers(0, 100_000, count).astype("<i8"),
        score=random.normal(size=count).clip(-9, 9).astype("<f8"),
        site=random.integers(1, 4, count).astype("u1"),
    )


@contextmanager
def session(parties: int, rows: int, workers: int) -> Any:
    """A run with all tables sealed and an enclave that is booted and loaded."""
    members = identities([f"p{number:02}" for number in range(parties)])
    with tempfile.TemporaryDirectory() as folder, Simulation(Path(folder), workers=workers) as simulation:
        agreement = agreement_of(simulation, members)
        run = Run(
            simulation,
            agreement,
            members,
            {name: {"visits": rows_of(number, rows // parties)} for number, name in enumerate(members)},
        )
        run.load()
        try:
            yield simulation, run
        finally:
            run.close()


def play(run: Run) -> float:
    """A whole session; seconds from the last countersignature to the release."""
    offer = run.offer()
    run.join(offer)
    roster, _ = run.start(offer)
    *others, last = roster.included
    for entry in others:
        run.host.want("awaiting", countersign=run.parties[entry.party].consent(offer, roster))
    begin = time.perf_counter()
    released(run.host.ask(countersign=run.parties[last.party].consent(offer, roster)))
    return time.perf_counter() - begin


def spin(_: int = 0) -> int:
    """Work of a fixed size that needs no memory."""
    total = 0
    for number in range(SPINS):
        total += number & 1
    return total


def spinning(processes: int) -> float:
    """Seconds for twice the fixed work over one or two processes."""
    with multiprocessing.get_context("spawn").Pool(processes) as pool:
        pool.map(spin, range(processes))
        begin = time.perf_counter()
        pool.map(spin, range(2), chunksize=1)
        return time.perf_counter() - begin


def figures(rows: Sequence[int]) -> list[Figure]:
    """Peak MiB for each size, beside that of the size before; then the speed of two workers over one."""
    found: list[Figure] = []
    for parties in PARTIES:
        before: float | None = None
        goal = "<= 250 MiB" if parties == PARTIES[0] else "<= 400 MiB"
        for count in rows if parties == PARTIES[0] else rows[-1:]:
            with session(parties, count, workers=2) as (simulation, run):
                watch = Watch(simulation)
                play(run)
                peak = watch.stop() / 2**20
            what = f"enclave's peak PSS, {parties} parties, {count:,} rows, 2 workers"
            found.append(Figure(what, peak, before, "MiB", "with fewer rows", f"{goal}, ratio <= 1.1"))
            before = peak
    times = {}
    for workers in (1, 2):
        with session(PARTIES[0], rows[-1], workers) as (_, run):
            times[workers] = play(run)
    ours, theirs = times[1] / times[2], spinning(1) / spinning(2)
    found.append(
        Figure(f"two workers over one, {rows[-1]:,} rows", ours, theirs, "x", "two spinning processes", ">= 0.9")
    )
    return found
