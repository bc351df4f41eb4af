"""Plays one plan, and looks for a smaller one that fails too."""

from __future__ import annotations

import shutil
import traceback
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from support.simulation.plan import NAMES, Plan
from support.simulation.theatre import Stages, Theatre

TRIES: Final = 2
"""How often a smaller plan is played before it counts as one that does not fail: processes run as the machine lets them."""

LINES: Final = 20
"""Warnings and errors of each coordinator that are shown with a play that failed."""


@dataclass
class Found:
    """What a play led to: the invariant that does not hold, or nothing; codes that members met; releases that they hold."""

    error: str = ""
    codes: Counter[str] = field(default_factory=Counter)
    releases: int = 0


def fails(stages: Stages, folder: Path, plan: Plan, say: Callable[[str], None]) -> Found:
    """Plays a plan in a folder that is gone afterwards."""
    say(str(plan).splitlines()[0])
    found = Found()
    try:
        with Theatre(stages.of(plan.world), folder, plan.world, rounds=plan.rounds, say=say) as theatre:
            try:
                theatre.play(plan)
            except Exception:
                for node in theatre.nodes:
                    told = [line for line in node.log.splitlines() if '"level":"info"' not in line]
                    say("\n".join(f"  {node.label}: {line}" for line in told[-LINES:]))
                raise
            finally:
                for name in NAMES:
                    log = theatre.log(name)
                    found.codes.update(line[2] for line in log if line[0] == "error")
                    found.releases += sum(line[0] == "released" for line in log)
    except AssertionError as error:
        found.error = str(error) or repr(error)
    except Exception:  # a seed that the witness itself does not understand is printed like any other
        found.error = traceback.format_exc()
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    return found


def shrink(stages: Stages, folder: Path, plan: Plan, say: Callable[[str], None]) -> Plan:
    """The plan without every step that it fails without."""
    for number in [int(text) for text in plan.numbers.split(",")]:
        if len(plan.steps) == 1:
            break
        smaller = plan.without(number)
        if any(fails(stages, folder, smaller, say).error for _ in range(TRIES)):
            plan = smaller
    return plan
