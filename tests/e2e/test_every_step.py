"""kill -9 of every process at every step of SPEC at which something durable or shared changes (the table in `moments`).

Members that are killed at theirs are in test_faults. `make faults` tries each step by itself; otherwise one play goes through
all of them for the coordinator, and through some for the others.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

from support.simulation.moments import MOMENTS, TARGETS, Killer, Moment
from support.simulation.theatre import Stage, Theatre

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(600)]

ALL = int(os.environ.get("PARLEY_FAULTS", "8")) >= 30


@pytest.fixture(scope="module")
def stage(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stage]:
    made = Stage(tmp_path_factory.mktemp("s"))
    yield made
    made.close()


def killed(stage: Stage, folder: Path, target: str, moments: Sequence[Moment]) -> None:
    """A play in which a target is killed at moments, to its end."""
    with Theatre(stage, folder, patience_s=30.0) as theatre:
        killer = Killer(theatre, target, moments)
        theatre.begin()
        theatre.finish()
        assert killer.missed == []
        # There is no enclave before a session is launched, and none when its release is stored.
        gone = {
            str(moment) for moment in MOMENTS if moment.op in ("OpenSession", "GetBundle") or moment.step == "ses-8"
        }
        assert set(killer.nobody) <= gone


def test_the_coordinator_killed_at_all_steps_one_after_the_other(stage: Stage, tmp_path: Path) -> None:
    killed(stage, tmp_path / "p", "coordinator", MOMENTS)


@pytest.mark.parametrize("target", TARGETS[1:])
def test_killed_at_some_steps_one_after_the_other(stage: Stage, tmp_path: Path, target: str) -> None:
    named = ("adm-7-join-answered", "ses-6-countersign-asked", "eng-1-last-pull-asked")
    killed(stage, tmp_path / "p", target, [moment for moment in MOMENTS if str(moment) in named])


@pytest.mark.parametrize(
    ("moment", "target"),
    [pytest.param(moment, target, id=f"{moment}-{target}") for moment in MOMENTS for target in TARGETS if ALL],
)
def test_killed_at_one_step(stage: Stage, tmp_path: Path, moment: Moment, target: str) -> None:
    killed(stage, tmp_path / "p", target, [moment])
