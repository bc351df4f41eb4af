"""The table of phases: every phase with every operation."""

from __future__ import annotations

import itertools

import pytest

from parley_enclave.phases import TABLE, Op, Phase, Phases
from parley_protocol.errors import RefusedError

PATHS: dict[Phase, list[tuple[Op, Phase]]] = {Phase.EMPTY: []}
PATHS[Phase.LOADED] = [(Op.LOAD, Phase.LOADED)]
PATHS[Phase.OPEN] = [*PATHS[Phase.LOADED], (Op.BEGIN, Phase.OPEN)]
PATHS[Phase.ROSTERED] = [*PATHS[Phase.OPEN], (Op.START, Phase.ROSTERED)]
PATHS[Phase.COMPUTING] = [*PATHS[Phase.ROSTERED], (Op.COUNTERSIGN, Phase.COMPUTING)]
PATHS[Phase.RELEASED] = [*PATHS[Phase.COMPUTING], (Op.FINISH, Phase.RELEASED)]
PATHS[Phase.LOST] = [*PATHS[Phase.COMPUTING], (Op.FAIL, Phase.LOST)]


def at(phase: Phase) -> Phases:
    phases = Phases()
    for op, target in PATHS[phase]:
        phases.move(op, target)
    assert phases.now is phase
    return phases


@pytest.mark.parametrize(("phase", "op"), list(itertools.product(Phase, Op)))
def test_ses_1_an_operation_of_another_phase_is_refused_and_changes_nothing(phase: Phase, op: Op) -> None:
    phases = at(phase)
    if op in TABLE[phase]:
        assert phases.require(op) is phase
        return
    with pytest.raises(RefusedError) as refused:
        phases.require(op)
    assert refused.value.code == "phase"
    for target in Phase:
        with pytest.raises(RefusedError):
            phases.move(op, target)
    assert phases.now is phase


@pytest.mark.parametrize(("phase", "op", "target"), list(itertools.product(Phase, Op, Phase)))
def test_moves_are_those_of_the_table(phase: Phase, op: Op, target: Phase) -> None:
    phases = at(phase)
    if target in TABLE[phase].get(op, frozenset()):
        phases.move(op, target)
        assert phases.now is target
    else:
        with pytest.raises(RefusedError):
            phases.move(op, target)
        assert phases.now is phase


def test_nothing_but_a_start_or_countersignatures_leads_to_a_computation() -> None:
    ways = {
        (phase, op)
        for phase, row in TABLE.items()
        for op, targets in row.items()
        if Phase.COMPUTING in targets - {phase}
    }
    assert ways == {(Phase.OPEN, Op.START), (Phase.ROSTERED, Op.COUNTERSIGN)}


def test_a_release_comes_from_a_computation_only() -> None:
    ways = {
        (phase, op)
        for phase, row in TABLE.items()
        for op, targets in row.items()
        if Phase.RELEASED in targets - {phase}
    }
    assert ways == {(Phase.COMPUTING, Op.FINISH)}


def test_a_lost_session_is_left_by_a_new_one_only() -> None:
    assert {op for op, targets in TABLE[Phase.LOST].items() if targets != {Phase.LOST}} == {Op.BEGIN}
