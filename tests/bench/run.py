"""`make bench`: runs every measurement, each in its own process, and prints ratios as a table and as JSON.

    python tests/bench/run.py [--only NAME ...] [--rows 1000000,3000000,10000000] [--json FILE]

A measurement is a module of this folder with `figures(rows) -> list[Figure]`; memory is that of its own process.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib
import json
import os
import platform
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
MEASUREMENTS = ("verification", "sealing", "upload", "engine", "memory", "start")
ASKED = ("load",)
"""Measurements that take minutes and gigabytes of disk: only by name."""


def measure(name: str, rows: list[int]) -> list[dict[str, object]]:
    """Runs one module here and gives its rows as plain values."""
    module = importlib.import_module(name)
    return [
        {**dataclasses.asdict(figure), "ratio": figure.ratio, "measurement": name} for figure in module.figures(rows)
    ]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="*", choices=MEASUREMENTS + ASKED, default=list(MEASUREMENTS))
    parser.add_argument("--rows", default="1000000,3000000,10000000", help="sizes, in rows")
    parser.add_argument("--json", default="bench.json", help="where the figures go")
    parser.add_argument("--inside", choices=MEASUREMENTS + ASKED, help=argparse.SUPPRESS)
    options = parser.parse_args()
    rows = [int(size) for size in options.rows.split(",")]
    sys.path[:0] = [str(HERE), str(HERE.parent)]
    if options.inside:
        print(json.dumps(measure(options.inside, rows)))
        return 0
    found: list[dict[str, object]] = []
    failed: list[str] = []
    for name in options.only:
        command = [sys.executable, __file__, "--inside", name, "--rows", options.rows]
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)
        if done.returncode:
            failed.append(name)
            continue
        # A library may print while it is measured: the figures are the last line.
        figures = json.loads(done.stdout.strip().splitlines()[-1])
        found += figures
        for figure in figures:
            print(line(figure), flush=True)
    machine = f"{platform.machine()}, {os.cpu_count()} cores, Python {platform.python_version()}"
    Path(options.json).write_text(json.dumps({"machine": machine, "figures": found}, indent=1) + "\n")
    print(f"{machine}; written to {options.json}")
    for name in failed:
        print(f"{name}: failed", file=sys.stderr)
    return 1 if failed else 0


def line(figure: dict[str, object]) -> str:
    """One row as text."""
    against = (
        f"{figure['theirs']:.3g} {figure['unit']} {figure['against']}" if figure["theirs"] else str(figure["against"])
    )
    ratio = f"{figure['ratio']:.2f}" if figure["ratio"] else "-"
    ours = f"{figure['ours']:.3g} {figure['unit']}"
    return f"{figure['what']:<58} {ours:>14}   {against:<40} ratio {ratio:>6}   goal {figure['goal']}"


if __name__ == "__main__":
    sys.exit(main())
