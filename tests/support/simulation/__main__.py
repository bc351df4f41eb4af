"""`python -m support.simulation`: plays seeds until the time is over, or one seed; exit code 1 at the first that fails.

Each seed is played in a world of its own (`plan.World`). Plans of worlds with several coordinators need a PostgreSQL.
"""

from __future__ import annotations

import argparse
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import pytest

from support.simulation.plan import Plan, World
from support.simulation.runner import fails, shrink
from support.simulation.theatre import Stages


def main(arguments: Sequence[str] | None = None) -> int:
    """Plays, and prints what was played."""
    parser = argparse.ArgumentParser(prog="python -m support.simulation", description=__doc__)
    parser.add_argument("--seconds", type=float, default=600.0, help="how long to play")
    parser.add_argument("--seed", type=int, default=None, help="the first seed; default: by the clock")
    parser.add_argument("--one", action="store_true", help="play that seed alone")
    parser.add_argument(
        "--world", default="", help="play all seeds in this one: alone, pair or apart; then kms, standing"
    )
    parser.add_argument("--plan", default="", help="play this plan alone: what a failure has printed")
    parser.add_argument("--keep-going", action="store_true", help="go on after a seed that fails")
    parser.add_argument("--shrink", action="store_true", help="look for the fewest steps that fail too")
    options = parser.parse_args(arguments)
    # Whatever ends this ends what it started, too.
    signal.signal(signal.SIGTERM, lambda _number, _frame: sys.exit(143))
    seed = options.seed if options.seed is not None else int(time.time()) % 1_000_000
    folder = Path(tempfile.mkdtemp(prefix="parley-soak-"))
    end = time.monotonic() + options.seconds
    steps: Counter[str] = Counter()
    codes: Counter[str] = Counter()
    worlds: Counter[str] = Counter()
    releases = failed = skipped = 0
    world = World.parse(options.world) if options.world else None
    stages = Stages(folder / "s")
    try:
        while True:
            plan = Plan.parse(options.plan) if options.plan else Plan.of(seed, world)
            try:
                found = fails(stages, folder / "p", plan, print)
            except pytest.skip.Exception as lacking:
                print(f"SEED {plan.seed} IS NOT PLAYED: {lacking}", flush=True)
                skipped += 1
                seed += 1
                if options.one or options.plan or time.monotonic() > end:
                    break
                continue
            worlds[str(plan.world)] += 1
            steps.update(step.op for step in plan.steps)
            codes.update(found.codes)
            releases += found.releases
            if found.error:
                failed += 1
                print(f"SEED {plan.seed} FAILS: {found.error}", flush=True)
                if options.shrink:
                    plan = shrink(stages, folder / "p", plan, print)
                print(f"replay: make soak PLAN='{plan.to_json()}'", flush=True)
                if not options.keep_going:
                    break
            seed += 1
            if options.one or options.plan or time.monotonic() > end:
                break
    finally:
        stages.close()
        shutil.rmtree(folder, ignore_errors=True)
    total = ", ".join(f"{op} {count}" for op, count in steps.most_common())
    places = ", ".join(f"{name} {count}" for name, count in worlds.most_common())
    print(f"{worlds.total()} seeds, {failed} failed, {skipped} NOT PLAYED; {places}")
    print(f"{releases} releases; {steps.total()} operations: {total}")
    print(f"errors that members met: {', '.join(f'{code} {count}' for code, count in codes.most_common()) or 'none'}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
