"""A coordinator on a machine with a slow disk and a wrong clock: `hindered.py FILE run --dir DIR`.

It is the real program. FILE holds JSON, {"disk_s": seconds that each sync to the disk takes longer, "clock_ms": how far the
wall clock is ahead}, and is looked at again whenever it is written.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from sqlalchemy import event
from sqlalchemy.engine import Engine

from parley_coordinator import kms, live
from parley_coordinator.__main__ import main as coordinator


class Hindrance:
    """What FILE says now."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._seen = -1
        self._found = {"disk_s": 0.0, "clock_ms": 0}

    def __getitem__(self, name: str) -> float:
        written = self._path.stat().st_mtime_ns
        if written != self._seen:
            self._found = json.loads(self._path.read_text())
            self._seen = written
        return self._found[name]


def main(arguments: Sequence[str]) -> int:
    """Runs the coordinator."""
    hindrance = Hindrance(Path(arguments[0]))
    # A KMS here is away for seconds: it is asked again within them.
    kms.RETRY_MS, live.KMS_PAUSE_S, live.KMS_PAUSE_MOST_S = 500, 0.3, 2.0  # type: ignore[misc]
    clock = time.time_ns
    time.time_ns = lambda: clock() + int(hindrance["clock_ms"]) * 1_000_000

    def slow(sync: Callable[[int], None]) -> Callable[[int], None]:
        def slowly(descriptor: int) -> None:
            time.sleep(hindrance["disk_s"])
            sync(descriptor)

        return slowly

    os.fsync, os.fdatasync = slow(os.fsync), slow(os.fdatasync)  # type: ignore[assignment]
    # SQLite's own syncs come with the commit of a transaction that wrote.
    event.listen(Engine, "commit", lambda _connection: time.sleep(hindrance["disk_s"]))
    return coordinator(arguments[1:])


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
