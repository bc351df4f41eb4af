"""kill -9 of every process at every step of SPEC at which something durable or shared changes (the table in `moments`).

`make faults` tries each step by itself, with each process; otherwise
plays go through some of them.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

from support.simulation.moments import (
    KMS_MEMBER_STEPS,
    KMS_MOMENTS,
    MEMBER_STEPS,
    MOMENTS,
    TARGETS,
    Killer,
    Moment,
)
from support.simulation.plan import KMS_PARTY, World
from support.simulation.theatre import PATIENCE_S, Stage, Stages, Theatre

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(600)]

ALL = int(os.environ.get("PARLEY_FAULTS", "8")) >= 30


EACH_S = 20.0
"""What a kill may add: an enclave starts again, and the members join it."""
PLAIN, KMS, PAIR = World(), World(kms=True), World("pair")


@pytest.fixture(scope="module")
def stages(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stages]:
    made = Stages(tmp_path_factory.mktemp("s"))
    yield made
    made.close()


@pytest.fixture(scope="module")
def stage(stages: Stages) -> Stage:
    return stages.of(PLAIN)


def killed(stage: Stage, folder: Path, target: str, moments: Sequence[Moment], world: World = PLAIN) -> None:
    """Plays in which a target is killed at moments, one after the other, until it was at all of them; each to its end."""
    # There is no enclave before a session is launched, and none when its release is stored. And a party that speaks to KMS
    # does not wait for the next one.
    gone = {str(moment) for moment in MOMENTS if moment.op in ("OpenSession", "GetBundle") or moment.step == "ses-8"}
    gone |= {str(moment) for moment in KMS_MOMENTS if moment.wire in ("party", "calls")}
    left = list(moments)
    while left:
        with Theatre(stage, folder / str(len(left)), world, patience_s=30.0) as theatre:
            killer = Killer(theatre, target, left)
            theatre.begin()
            theatre.finish(patience_s=PATIENCE_S + EACH_S * len(left))
            assert set(killer.nobody) <= gone
            assert len(killer.missed) < len(left), f"{left[0]} did not come"
            left = killer.missed


@pytest.mark.parametrize("target", TARGETS)
def test_killed_at_some_steps_one_after_the_other(stage: Stage, tmp_path: Path, target: str) -> None:
    some = {
        "coordinator": MOMENTS if ALL else MOMENTS[::4],
        "enclave": _named("adm-7-join-answered", "eng-1-last-pull-asked"),
        "machine": _named("ses-6-countersign-asked"),
        "module": _named("ses-3-begin-answered"),
        "worker": _named("adm-5-pull-asked", "eng-1-last-pull-asked"),
    }
    killed(stage, tmp_path / "p", target, some[target])


def test_a_partys_kms_killed_at_the_steps_of_its_join(stages: Stages, tmp_path: Path) -> None:
    killed(stages.of(KMS), tmp_path / "p", "kms", KMS_MOMENTS if ALL else KMS_MOMENTS[2::3], KMS)


@pytest.mark.skipif(not ALL, reason="`make faults` kills the others there, too")
@pytest.mark.parametrize("target", TARGETS)
def test_another_process_killed_at_the_steps_of_a_kms_join(stages: Stages, tmp_path: Path, target: str) -> None:
    killed(stages.of(KMS), tmp_path / "p", target, KMS_MOMENTS, KMS)


def test_of_two_coordinators_one_killed_at_some_steps(stages: Stages, tmp_path: Path) -> None:
    """The other one takes the session over each time."""
    some = _named("adm-7-join-answered", "crd-13-Start-answered", "ses-12-last-countersign-answered")
    # It takes a while: within it the parties may have gone by the next moment.
    killed(stages.of(PAIR), tmp_path / "p", "node", MOMENTS if ALL else some, PAIR)


def _named(*names: str) -> list[Moment]:
    return [moment for moment in MOMENTS if str(moment) in names]


@pytest.mark.parametrize(
    ("moment", "target"),
    [pytest.param(moment, target, id=f"{moment}-{target}") for moment in MOMENTS for target in TARGETS if ALL],
)
def test_killed_at_one_step(stage: Stage, tmp_path: Path, moment: Moment, target: str) -> None:
    killed(stage, tmp_path / "p", target, [moment])


@pytest.mark.parametrize(
    "steps",
    [[step] for *_, step in MEMBER_STEPS] if ALL else [[step for *_, step in MEMBER_STEPS]],
    ids=lambda steps: "-".join(steps) if ALL else "all",
)
def test_a_member_killed_at_its_steps(stage: Stage, tmp_path: Path, steps: Sequence[str]) -> None:
    with Theatre(stage, tmp_path / "p") as theatre:
        left = theatre.dies_at("bob", *steps)
        theatre.begin()
        theatre.finish()
        assert left.read_text() == ""
        body = stage.oracle((0, 0, 0)).body.to_bytes().hex()
        # Its log has no line where it died between the release and that line; the others' have.
        assert {line[2] for line in theatre.log("ann") if line[0] == "released"} == {body}


@pytest.mark.skipif(not ALL, reason="`make faults` kills a member that joins by KMS, too")
def test_a_member_that_joins_by_kms_killed_at_its_steps(stages: Stages, tmp_path: Path) -> None:
    stage = stages.of(KMS)
    with Theatre(stage, tmp_path / "p", KMS) as theatre:
        left = theatre.dies_at(KMS_PARTY, *(step for *_, step in KMS_MEMBER_STEPS))
        theatre.begin()
        theatre.finish()
        assert left.read_text() == ""
        body = stage.oracle((0, 0, 0)).body.to_bytes().hex()
        assert {line[2] for line in theatre.log("ann") if line[0] == "released"} == {body}
