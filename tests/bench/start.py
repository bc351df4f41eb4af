"""How long a user waits: for `parley --help`, and for the whole demo once everything is installed."""

from __future__ import annotations

import statistics
import subprocess
import sys
from pathlib import Path

from figures import Figure, seconds

PARLEY = str(Path(sys.executable).with_name("parley"))


def run(*command: str) -> None:
    """Runs a command to its end; CalledProcessError where it fails."""
    subprocess.run(command, check=True, capture_output=True)


def figures(rows: list[int]) -> list[Figure]:
    """Seconds of whole processes; `--help` beside an interpreter that does nothing."""
    for command in ([PARLEY, "--help"], [sys.executable, "-c", ""]):
        run(*command)
    helps = [seconds(lambda: run(PARLEY, "--help")) for _ in range(9)]
    nothing = [seconds(lambda: run(sys.executable, "-c", "")) for _ in range(9)]
    demos = sum(seconds(lambda name=name: run(PARLEY, "demo", name)) for name in ("flights", "pay"))  # type: ignore[misc]
    return [
        Figure("parley --help", statistics.median(helps), statistics.median(nothing), "s", "python -c ''", "<= 0.25 s"),
        Figure("both demos, everything installed", demos, None, "s", "", "<= 15 s"),
    ]
